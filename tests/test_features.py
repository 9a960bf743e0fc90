"""What holds of every distance of two batches of features: problems, classes, weights, dtypes, zeros, derivatives."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from conftest import GPU, device_of
from distances import (
    CASES,
    GRID,
    assert_equal_up_to_rounding,
    features,
    gradients,
    over_cases,
    ready,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import kdkernels
from kdkernels.ops.features import by_class, segments, sizes

LABELLED = [(name, backend) for name, backend in GRID if CASES[name].labels]
# The interpreter takes a minute for these.
SLOW = [(name, "triton") for name in CASES if name.startswith(("mmd", "energy"))]
FLOAT64 = [(name, backend) for name, backend in GRID if backend != "triton"]
over_float64 = pytest.mark.parametrize(("name", "backend"), FLOAT64, ids=[f"{n}-{b}" for n, b in FLOAT64])
over_labelled = pytest.mark.parametrize(("name", "backend"), LABELLED, ids=[f"{n}-{b}" for n, b in LABELLED])


@over_cases
@pytest.mark.parametrize("shape", [(9, 4), (5, 11)], ids=["n > d", "n < d"])
def test_batch_is_a_loop(name, backend, shape):
    function = ready(name, backend, weighted=False)
    x, y = features(2, 3, *shape, backend=backend)
    upstream = torch.rand(2, 3, dtype=torch.float64) + 0.5
    loss, *got = gradients(function, x, y, upstream=upstream)
    assert loss.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            one, *each = gradients(function, x[i, j], y[i, j], upstream=upstream[i, j])
            assert one.shape == () and one > 0
            assert_equal_up_to_rounding((loss[i, j], *(g[i, j] for g in got)), (one, *each))


@over_labelled
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_labels_are_a_loop(name, backend, weighted):
    function = ready(name, backend, weighted=weighted)
    x, y = features(2, 14, 5, backend=backend)
    generator = torch.Generator().manual_seed(1)
    # Classes of many, of two, of one sample (9), and absent ones; other ones in the other problem.
    labels = torch.tensor([[3, 7, 3, 7, 3, 7, 3, 9, 3, 7, 3, -2, -2, 7], [0] * 7 + [50] * 7])
    weights = {}
    if weighted:
        weights = {
            side: torch.rand(2, 14, generator=generator, dtype=torch.float64) + 0.2
            for side in ("x_weights", "y_weights")
        }
    loss, *got = gradients(function, x, y, labels=labels, **weights)
    assert loss.shape == (2,)
    for i in range(2):
        total = 0.0
        for label in labels[i].unique():
            here = labels[i] == label
            if here.sum() == 1 and name.startswith("gaussian_kl"):
                assert all((g[i, here] == 0).all() for g in got)
                continue
            those = {side: w[i, here] for side, w in weights.items()}
            one, *each = gradients(function, x[i, here], y[i, here], **those)
            total += one.item()
            assert_equal_up_to_rounding([g[i, here] for g in got], each, scale=8)
        assert loss[i].item() == pytest.approx(total, rel=1e-10 if x.dtype == torch.float64 else 1e-5)


@over_labelled
def test_one_class_is_no_labels(name, backend):
    function = ready(name, backend, weighted=False)
    x, y = features(8, 5, backend=backend)
    assert_equal_up_to_rounding(
        gradients(function, x, y, labels=torch.full((8,), 4)), gradients(function, x, y), scale=8
    )


@over_labelled
def test_classes_of_one_sample(name, backend):
    """W₂ is the distance of the samples, MMD² that of two points; a covariance, and so KL and CORAL, is not there: 0;
    nor are pairs of an unbiased estimate."""
    function = ready(name, backend, weighted=False)
    x, y = features(6, 5, backend=backend)
    loss, *got = gradients(function, x, y, labels=torch.arange(6))
    if name.startswith(("mmd", "energy")) and name != "mmd, unbiased":
        expected = gradients(lambda a, b: sum(function(c[None], d[None]) for c, d in zip(a, b)), x, y)
        assert loss > 0
        assert_equal_up_to_rounding((loss, *got), expected)
    elif name.startswith(("gaussian_kl", "coral", "mmd")):
        assert loss == 0 and all((g == 0).all() for g in got)
    else:
        p = {"wasserstein, p=1": 1, "wasserstein, p=3": 3, "sinkhorn, euclidean": 1}.get(name, 2)
        expected = gradients(lambda a, b: (a - b).norm(dim=-1).pow(p).sum(), x, y)
        assert_equal_up_to_rounding((loss, *got), expected)


@over_cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(12, 5), (6, 40), (1, 3), (300, 9)])
def test_equal_batches_are_exactly_zero(name, backend, dtype, shape):
    function = ready(name, backend, weighted=False)
    if CASES[name].signed:
        pytest.skip("not 0 where x equals y")
    if (name, backend) in SLOW:
        if dtype == torch.float64:
            pytest.skip("float32 again")
        shape = (min(shape[0], 40), shape[1])
    x, _ = features(*shape, dtype=dtype, backend=backend)
    x[:, 1] = 0  # a dead unit
    x[:, 2] = 0.1  # one that is stuck
    if shape[0] > 3:
        x[3] = x[2]  # and samples that are equal
    loss, of_x, of_y = gradients(function, x, x)
    assert loss == 0
    # Woodbury's form (full KL, n < d) cancels in float64.
    # Autograd sums the two sides' shares of a sample, of the order of 10, one after the other.
    own = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    summed = name.startswith(("mmd", "energy")) and backend == "reference"
    allowed = 1e-13 if name == "gaussian_kl, full" else 40 * own if summed else 0
    assert of_x.abs().max() <= allowed and of_y.abs().max() <= allowed
    if CASES[name].labels:
        if backend == "triton" and not GPU:  # slow, and of several blocks all the same
            x = x[:100]
        loss, of_x, of_y = gradients(function, x, x, labels=torch.arange(len(x)) % 5)
        assert loss.abs() <= allowed and of_x.abs().max() <= allowed and of_y.abs().max() <= allowed


@pytest.mark.parametrize(("name", "backend"), [c for c in GRID if c[0] in ("gaussian_wasserstein", "coral")])
def test_float16_gradients_meet_a_loss_scale_before_they_are_rounded(name, backend):
    small, scale = (2**-7, 2**24) if name == "coral" else (2**-12, 2**16)
    upstream = torch.tensor(float(scale))
    x, y = (small * z for z in features(256, 6, dtype=torch.float16, backend=backend))
    _, *got = gradients(ready(name, backend, weighted=False), x, y, upstream=upstream)
    truth = ready(name, "reference", weighted=False)
    _, *exact = gradients(truth, x.double(), y.double(), upstream=upstream)
    for g, true in zip(got, exact):
        assert true.abs().max() / scale < 2**-17  # where rounding would be 1 % of it
        assert (g.double() - true).norm() < 1e-3 * true.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40, 7), (12, 30)], ids=["n > d", "n < d"])
@pytest.mark.parametrize(
    ("name", "backend", "labelled"), [(*pair, False) for pair in GRID] + [(*pair, True) for pair in LABELLED]
)
def test_dtypes(name, backend, dtype, shape, labelled):
    """Statistics in float32, gradients in the input's dtype, both near float64 of the same numbers."""
    function = ready(name, backend, weighted=False)
    options = {"labels": (torch.arange(shape[0]) % 4).expand(2, -1)} if labelled else {}
    x, y = features(2, *shape, dtype=dtype, backend=backend)
    loss, *got = gradients(function, x, y, **options)
    assert loss.dtype == torch.float32 and all(g.dtype == dtype for g in got)
    truth = gradients(partial(CASES[name].function, backend="reference"), x.double(), y.double(), **options)
    assert all(t.abs().max() > 1e-5 for t in truth)
    assert_equal_up_to_rounding((loss, *got), truth, scale=4)


@over_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dead_and_deficient(name, backend, dtype):
    """Constant dimensions on one side or both, equal samples: all is finite."""
    function = ready(name, backend, weighted=False)
    x, y = features(10, 6, dtype=dtype, backend=backend)
    x[:, 0] = y[:, 0] = 0
    x[:, 1] = 0.7
    y[:, 2] = -3
    x[1:5] = x[0]
    y[:] = y[:1] if name != "gaussian_kl" else y
    for labels in (None, torch.arange(10) // 3):
        options = {"labels": labels} if CASES[name].labels else {}
        for a, b in ((x, y), (y, x)):
            assert all(torch.isfinite(z).all() for z in gradients(function, a, b, **options))


@over_cases
def test_weights_of_one_kind(name, backend):
    """Equal weights are none, whatever their scale; a sample of weight 0 is not there."""
    function = ready(name, backend, weighted=True)
    x, y = features(2, 7, 4, m=7, backend=backend)
    plain = gradients(function, x, y)
    equal = {"x_weights": torch.full((2, 7), 3.0), "y_weights": torch.full((2, 7), 0.2).double()}
    assert_equal_up_to_rounding(gradients(function, x, y, **equal), plain)
    kept = torch.tensor([True, False, True, True, True, False, True])
    masked = gradients(
        function, x, y, x_weights=kept.double().expand(2, 7), y_weights=kept.double().expand(2, 7)
    )
    fewer = gradients(function, x[:, kept], y[:, kept])
    assert_equal_up_to_rounding((masked[0], *(g[:, kept] for g in masked[1:])), fewer)
    assert all((g[:, ~kept] == 0).all() for g in masked[1:])


@pytest.mark.parametrize(("name", "backend"), [pair for pair in GRID if CASES[pair[0]].repeats])
def test_weights_are_repetitions(name, backend):
    function = ready(name, backend, weighted=True)
    x, y = features(5, 4, m=4, backend=backend)
    times_x, times_y = torch.tensor([1, 3, 2, 1, 4]), torch.tensor([2, 1, 1, 5])
    loss, *got = gradients(function, x, y, x_weights=times_x.double(), y_weights=times_y.double())
    again, *of_many = gradients(function, x.repeat_interleave(times_x, 0), y.repeat_interleave(times_y, 0))
    summed = [
        torch.zeros_like(z).index_add(0, torch.arange(len(z)).repeat_interleave(times), g)
        for z, times, g in ((x, times_x, of_many[0]), (y, times_y, of_many[1]))
    ]
    assert_equal_up_to_rounding((loss, *got), (again, *summed), scale=8)


@over_cases
def test_no_weight_or_no_sample_is_zero(name, backend):
    function = ready(name, backend, weighted=True)
    x, y = features(2, 5, 4, backend=backend)
    weights = torch.tensor([[0.0] * 5, [1.0] * 5])
    loss, *got = gradients(function, x, y, x_weights=weights)
    assert loss[0] == 0 and loss[1] > 0 and all((g[0] == 0).all() for g in got)
    assert all(torch.isfinite(g).all() for g in got)
    for n, m in ((0, 3), (3, 0), (0, 0)):
        loss, *got = gradients(function, x[:, :n], y[:, :m])
        assert loss.shape == (2,) and (loss == 0).all() and all((g == 0).all() for g in got)
    loss, *got = gradients(function, x[:0], y[:0])
    assert loss.shape == (0,)


@over_cases
def test_order_of_the_samples_is_nothing(name, backend):
    function = ready(name, backend, weighted=False)
    x, y = features(9, 4, backend=backend)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    loss, of_x, of_y = gradients(function, x, y)
    permuted, of_permuted, of_y_again = gradients(function, x[order], y)
    assert_equal_up_to_rounding((permuted, of_permuted, of_y_again), (loss, of_x[order], of_y), scale=8)
    again, of_y, of_x_again = gradients(function, y, x)
    if not name.startswith("gaussian_kl"):  # all others are symmetric
        assert_equal_up_to_rounding((again, of_x_again), (loss, of_x), scale=8)


# test_sinkhorn.py has that of smaller problems: it takes a hundred iterations for each number.
@pytest.mark.parametrize(
    ("name", "backend"), [pair for pair in FLOAT64 if not pair[0].startswith("sinkhorn")]
)
@pytest.mark.parametrize("shape", [(6, 3, 5), (4, 6, 4), (4, 6, 3)], ids=["n > d", "n = m < d", "n < d"])
def test_gradcheck(name, backend, shape):
    n, d, m = shape
    function = ready(name, backend, weighted=CASES[name].pot)
    x, y = features(2, n, d, m=m, backend=backend)
    generator = torch.Generator().manual_seed(3)
    weights = [torch.rand(2, k, generator=generator, dtype=torch.float64) + 0.5 for k in (n, m)]
    if CASES[name].constant_weights:

        def call(x, y):
            return function(x, y, x_weights=weights[0], y_weights=weights[1])

        inputs = [x, y]
    else:

        def call(x, y, u, v):
            return function(x, y, x_weights=u, y_weights=v)

        inputs = [x, y, *weights]
    inputs = [z.requires_grad_() for z in inputs]
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(lambda x, y: function(x, y[:, :m]), inputs[:2])


@over_float64
def test_gradcheck_with_labels(name, backend):
    if not CASES[name].labels:
        return
    function = ready(name, backend, weighted=False)
    x, y = (z.requires_grad_() for z in features(2, 7, 3))
    labels = torch.tensor([[1, 0, 1, 0, 1, 0, 5], [2, 2, 2, 2, 1, 1, 1]])
    assert torch.autograd.gradcheck(lambda x, y: function(x, y, labels=labels), (x, y))
    assert torch.autograd.gradgradcheck(lambda x, y: function(x, y, labels=labels), (x, y))


@over_cases
def test_gradients_only_where_required_and_backward_twice(name, backend):
    function = ready(name, backend, weighted=False)
    x, y = features(2, 6, 4, dtype=torch.float32)
    _, of_x, of_y = gradients(function, x, y)
    for wanted, expected in ((0, of_x), (1, of_y)):
        inputs = [x.clone(), y.clone()]
        inputs[wanted].requires_grad_()
        loss = function(*inputs).sum()
        [first] = torch.autograd.grad(loss, inputs[wanted], retain_graph=True)
        kept = first.clone()
        [second] = torch.autograd.grad(2 * loss, inputs[wanted])
        assert torch.equal(first, kept) and torch.allclose(first, expected, rtol=1e-6)
        assert torch.allclose(second, 2 * first, rtol=1e-6) and second.data_ptr() != first.data_ptr()
    with torch.no_grad():
        assert not function(x.requires_grad_(), y).requires_grad


@over_cases
def test_layouts(name, backend):
    function = ready(name, backend, weighted=False)
    x, y = features(3, 8, 6, dtype=torch.float32)
    dense = gradients(function, x[:, ::2, 1:5].contiguous(), y[:, ::2, 1:5].contiguous())
    strided = gradients(lambda x, y: function(x[:, ::2, 1:5], y[:, ::2, 1:5]), x, y)
    assert_equal_up_to_rounding((strided[0], *(g[:, ::2, 1:5] for g in strided[1:])), dense)
    transposed = gradients(
        lambda x, y: function(x.mT, y.mT), x[:, ::2, 1:5].mT.contiguous(), y[:, ::2, 1:5].mT.contiguous()
    )
    assert_equal_up_to_rounding((transposed[0], *(g.mT for g in transposed[1:])), dense)
    expanded = function(x[:1, :4, :4].expand(5, 4, 4), y[0, :4, :4].expand(5, 4, 4))
    assert_equal_up_to_rounding([expanded], [function(x[0, :4, :4], y[0, :4, :4]).expand(5)])


@over_cases
def test_autocast_leaves_statistics_alone(name, backend):
    function = ready(name, backend, weighted=False)
    x, y = features(7, 9, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = function(x, y)
    assert under.dtype == torch.float32
    assert_equal_up_to_rounding([under], [function(x, y)])


ANY = [pair for pair in GRID if pair not in SLOW]


def assert_near_in_any_shape(name, backend, data):
    """Finite, not negative, and near the reference in float64."""
    batch = data.draw(st.lists(st.integers(1, 3), max_size=2), label="batch")
    n, m = data.draw(st.integers(1, 12), label="n"), data.draw(st.integers(1, 12), label="m")
    # On a line, a distance's slope is a sign, and a sum of signs may be nothing but what rounding leaves.
    signs = name in ("wasserstein, p=1", "energy_distance", "sinkhorn, euclidean")
    d = data.draw(st.integers(2 if signs else 1, 140), label="d")
    seed = data.draw(st.integers(0, 1000), label="seed")
    weighted = data.draw(st.booleans(), label="weighted")
    options = {}
    if CASES[name].labels and data.draw(st.booleans(), label="labelled"):
        m = n
        options["labels"] = torch.randint(0, 4, (*batch, n), generator=torch.Generator().manual_seed(seed))
    if weighted:
        for side, size in (("x_weights", n), ("y_weights", m)):
            drawn = data.draw(
                st.lists(st.sampled_from([0.0, 0.25, 1.0, 1.0, 3.0]), min_size=size, max_size=size),
                label=side,
            )
            options[side] = torch.tensor(drawn).expand(*batch, size)
    function = ready(name, backend, weighted=weighted or n != m)
    x, y = features(*batch, n, d, m=m, dtype=torch.float32, seed=seed)
    got = gradients(function, x, y, **options)
    truth = gradients(partial(CASES[name].function, backend="reference"), x.double(), y.double(), **options)
    assert got[0].shape == tuple(batch) and (CASES[name].signed or (got[0] >= 0).all())
    # A variance of what is nearly one sample has few digits, and KL divides by it.
    scale = 200 if name.startswith("gaussian_kl") else 20
    assert_equal_up_to_rounding(got, truth, scale, CASES[name].terms)


INTERPRETED = [pair for pair in ANY if pair[1] == "triton"]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize(("name", "backend"), [pair for pair in ANY if pair not in INTERPRETED])
def test_any_shapes_and_weights(name, backend, data):
    assert_near_in_any_shape(name, backend, data)


@settings(max_examples=5, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize(("name", "backend"), INTERPRETED)
def test_any_shapes_and_weights_interpreted(name, backend, data):
    assert_near_in_any_shape(name, backend, data)


@over_cases
def test_modules(name, backend):
    ready(name, backend, weighted=False)
    device = "cpu" if backend is None else device_of(backend)
    x, y = (z.to(device) for z in features(6, 4, backend=backend))
    function = CASES[name].function
    options = dict(function.keywords) if isinstance(function, partial) else {}
    function = function.func if isinstance(function, partial) else function
    module = {
        kdkernels.gaussian_wasserstein: kdkernels.GaussianWassersteinLoss,
        kdkernels.gaussian_kl: kdkernels.GaussianKLLoss,
        kdkernels.coral: kdkernels.CoralLoss,
        kdkernels.sinkhorn_divergence: kdkernels.SinkhornDivergenceLoss,
        kdkernels.wasserstein: kdkernels.WassersteinLoss,
        kdkernels.mmd: kdkernels.MMDLoss,
        kdkernels.energy_distance: kdkernels.EnergyDistanceLoss,
    }.get(function, kdkernels.SlicedWassersteinLoss)
    if module is kdkernels.SlicedWassersteinLoss:
        function, options = kdkernels.sliced_wasserstein, {**options, "projections": torch.eye(4).double()}
    loss = module(**options, backend=backend)
    assert torch.equal(loss(x, y), function(x, y, **options, backend=backend))
    labels = {"labels": torch.arange(6, device=device) % 2} if CASES[name].labels else {}
    weights = {} if CASES[name].pot else {"x_weights": torch.arange(1.0, 7.0, device=device)}
    assert torch.equal(
        loss(x, y, **labels, **weights), function(x, y, **labels, **weights, **options, backend=backend)
    )
    assert f"backend={backend!r}" in repr(loss)
    with pytest.raises(TypeError, match=r"takes .*backend; got 'colour'"):
        module(colour=1)


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name):
    function = CASES[name].function
    x, y = features(2, 5, 4)

    def refused(error, message, *inputs, **options):
        with pytest.raises(error, match=message):
            function(*inputs, **options)

    refused(TypeError, "x must be a tensor of features, got 1.5", 1.5, y)
    refused(TypeError, "y must be a tensor of features, got None", x, None)
    refused(ValueError, r"x must have shape \(..., n, d\) with d >= 1, got \(4,\)", x[0, 0], y)
    refused(ValueError, r"y must have shape .*got \(2, 5, 0\)", x, y[:, :, :0])
    refused(ValueError, r"same batch dimensions and d, got x \(2, 5, 4\) and y \(2, 5, 3\)", x, y[..., :3])
    refused(ValueError, "same batch dimensions and d", x, y[0])
    refused(TypeError, "y must have x's dtype torch.float64, got torch.float32", x, y.float())
    refused(ValueError, "y must be on x's device cpu, got meta", x, y.to("meta"))
    refused(TypeError, "x must be float64, float32, float16 or bfloat16, got int64", x.long(), y.long())
    refused(TypeError, "x_weights must be a floating tensor, got 1", x, y, x_weights=1)
    refused(
        ValueError,
        r"y_weights must have the shape of the samples \(2, 5\), got \(4,\)",
        x,
        y,
        y_weights=torch.ones(4),
    )
    refused(ValueError, "y_weights must have the shape", x, y, y_weights=torch.ones(3, 5))
    refused(ValueError, "x_weights must be on x's device", x, y, x_weights=torch.ones(2, 5, device="meta"))
    for bad in (-1.0, math.nan, math.inf):
        weights = torch.tensor([1.0, bad, 1.0, 1.0, 1.0])
        refused(ValueError, "x_weights must be finite and not negative", x, y, x_weights=weights)
    refused(ValueError, "backend must be None or one of", x, y, backend="best")
    refused(TypeError, "backend must be None or a name", x, y, backend=3)
    if "triton" not in CASES[name].backends:
        refused(ValueError, "has no backend 'triton', only reference", x, y, backend="triton")
    if "cpu" not in CASES[name].backends:
        refused(ValueError, "has no backend 'cpu', only reference", x, y, backend="cpu")
    if not CASES[name].labels:
        return
    labels = torch.zeros(2, 5, dtype=torch.int64)
    refused(TypeError, "labels must be an integer tensor", x, y, labels=labels.double())
    refused(TypeError, "labels must be an integer tensor", x, y, labels=[0, 1])
    refused(
        ValueError, r"labels must have the shape of the samples \(2, 5\), got \(5,\)", x, y, labels=labels[0]
    )
    refused(ValueError, "the same samples, got n 5 and m 4", x, y[:, :4], labels=labels)
    refused(ValueError, "labels must be on x's device", x, y, labels=labels.to("meta"))


COMPILED = [name for name in CASES if not name.startswith("wasserstein")]


@pytest.mark.parametrize("name", COMPILED)
def test_compile(name):
    """One graph, with the gradient of an eager call."""
    case = CASES[name]
    x, y = features(2, 6, 4, dtype=torch.float32)
    options = {}
    by_segments = "cpu" in case.backends and not name.startswith("sinkhorn")
    if case.labels and (by_segments or name in ("gaussian_kl, shrinkage", "mmd, linear")):
        options["labels"] = torch.tensor([[0, 1, 0, 1, 2, 2], [5, 5, 5, 1, 1, 1]])
    function = case.function
    if name.startswith("sliced"):
        p = function.keywords.get("p", 2) if isinstance(function, partial) else 2
        directions = torch.nn.functional.normalize(features(3, 4, dtype=torch.float32)[0], dim=-1)
        function = partial(kdkernels.sliced_wasserstein, projections=directions, p=p)
    torch._dynamo.reset()
    compiled = torch.compile(partial(function, **options), fullgraph=True)
    assert_equal_up_to_rounding(gradients(compiled, x, y), gradients(function, x, y, **options), scale=4)


def test_segments():
    labels = torch.tensor([[7, -1, 7, 3], [2, 2, 2, 2]])
    assert segments(labels).tolist() == [[2, 0, 2, 1], [0, 0, 0, 0]]
    assert sizes(labels, None).tolist() == [[1, 1, 2, 0], [4, 0, 0, 0]]
    assert sizes(labels, torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 0]])).tolist() == [
        [0, 1, 1, 0],
        [3, 0, 0, 0],
    ]
    x = torch.arange(8.0).reshape(2, 4, 1)
    by, weights = by_class(x, None, labels)
    assert by.shape == (2, 3, 4, 1) and weights.shape == (2, 3, 4)
    assert [by[0, c][weights[0, c] > 0].flatten().tolist() for c in range(3)] == [[1], [3], [0, 2]]
    assert [by[1, c][weights[1, c] > 0].flatten().tolist() for c in range(3)] == [[4, 5, 6, 7], [], []]
