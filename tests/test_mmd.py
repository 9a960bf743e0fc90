"""mmd and energy_distance: sums written out, closed forms, bandwidths, near and equal samples, tiles, memory, agreement
with scipy and geomloss."""

from __future__ import annotations

import importlib.util
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import device_of
from distances import assert_equal_up_to_rounding, features, gradients, moved
from testing import assert_same_bits_whatever_the_threads

import kdkernels
from kdkernels import energy_distance, mmd

if importlib.util.find_spec("triton") is not None:
    from kdkernels._triton import mmd as triton_mmd

BACKENDS = [name for name in ("reference", "cpu") if kdkernels.available_backends("cpu")[name] == "available"]
over_backends = pytest.mark.parametrize("backend", BACKENDS)
# In float32, and of few samples: the interpreter is slow.
WITH_TRITON = [
    *BACKENDS,
    *(["triton"] if kdkernels.available_backends(device_of("triton"))["triton"] == "available" else []),
]
with_triton = pytest.mark.parametrize("backend", WITH_TRITON)
triton = pytest.mark.skipif("triton" not in WITH_TRITON, reason="needs Triton")
native = pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the native module")
BANDWIDTHS = [2.0, 5.0]

KERNELS = {
    "rbf": lambda a, b, s: torch.exp(-(a - b).square().sum() / (2 * s * s)),
    "laplacian": lambda a, b, s: torch.exp(-(a - b).square().sum().sqrt() / s),
    "imq": lambda a, b, s: 1 / (1 + (a - b).square().sum() / (s * s)).sqrt(),
    "polynomial": lambda a, b, s: ((a * b).sum() / (s * s) + 1) ** 3,
    "linear": lambda a, b, s: (a * b).sum(),
    "energy": lambda a, b, s: -(a - b).square().sum().sqrt(),
}


def written_out(x, y, kernel, bandwidths, unbiased=False, u=None, v=None):
    """MMD² by the sums of its definition, pair by pair."""
    u, v = ((torch.ones(len(z)).double() if w is None else w) for z, w in ((x, u), (y, v)))
    u, v = u / u.sum(), v / v.sum()

    def mean(a, p, b, q, without):
        total = torch.zeros((), dtype=a.dtype)
        for i in range(len(a)):
            for j in range(len(b)):
                if without and i == j:
                    continue
                if a is b and i == j and kernel in ("laplacian", "energy"):  # 0 has no derivative
                    total = total + p[i] * q[j] * (len(bandwidths) if kernel == "laplacian" else 0)
                    continue
                total = total + p[i] * q[j] * sum(KERNELS[kernel](a[i], b[j], s) for s in bandwidths)
        return total / (1 - p.square().sum()) if without else total

    return mean(x, u, x, u, unbiased) + mean(y, v, y, v, unbiased) - 2 * mean(x, u, y, v, False)


def on(function, backend):
    return partial(moved, function, backend)


def distance(kernel, backend, **options):
    if kernel == "energy":
        return partial(on(energy_distance, backend), **options)
    if kernel == "linear":
        return partial(mmd, kernel="linear", **options)
    return partial(on(mmd, backend), kernel=kernel, bandwidths=BANDWIDTHS, **options)


@with_triton
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_definition(backend, kernel, estimator, weighted):
    x, y = features(5, 3, m=4, backend=backend)
    options, weights = {}, {}
    if kernel != "energy":
        options["estimator"] = estimator
    elif estimator == "unbiased":
        return
    if weighted:
        weights = {"u": torch.tensor([1.0, 2, 0, 3, 1]).double(), "v": torch.tensor([2.0, 1, 1, 5]).double()}
        options |= {"x_weights": weights["u"], "y_weights": weights["v"]}
    bandwidths = BANDWIDTHS if kernel not in ("linear", "energy") else [1.0]
    truth = gradients(
        lambda x, y: written_out(x, y, kernel, bandwidths, estimator == "unbiased", **weights),
        x.double(),
        y.double(),
    )
    assert all(t.abs().max() > 1e-3 for t in truth)
    assert_equal_up_to_rounding(gradients(distance(kernel, backend, **options), x, y), truth, scale=4)


@with_triton
def test_two_points(backend):
    dtype, rel = (torch.float32, 1e-6) if backend == "triton" else (torch.float64, 1e-15)
    a, b = torch.zeros(1, 3, dtype=dtype), torch.tensor([[2.0, -1.0, 2.0]], dtype=dtype)
    run = on(mmd, backend)
    assert on(energy_distance, backend)(a, b).item() == pytest.approx(6, rel=rel)
    for kernel, k in (("rbf", -9 / 8), ("laplacian", -3 / 2)):
        loss = run(a, b, kernel=kernel, bandwidths=2)
        expected = 2 - 2 * torch.tensor(k).double().exp()
        assert loss.item() == pytest.approx(expected.item(), rel=rel)
    assert run(a, b, kernel="imq", bandwidths=4).item() == pytest.approx(2 - 2 / 1.25)
    assert mmd(a, b, kernel="linear").item() == pytest.approx(9, rel=1e-15)
    # The mean distance of (0 + 0 + 3)/3.
    for kernel, k in (("rbf", -9 / 2), ("laplacian", -3)):
        expected = 2 - 2 * torch.tensor(k).double().exp()
        assert run(a, b, kernel=kernel).item() == pytest.approx(expected.item(), rel=rel)


def test_linear_is_the_distance_of_the_means():
    x, y = features(2, 9, 5, m=6)
    loss, *got = gradients(partial(mmd, kernel="linear"), x, y)
    truth = gradients(lambda x, y: (x.mean(1) - y.mean(1)).square().sum(-1), x, y)
    assert_equal_up_to_rounding((loss, *got), truth)
    unbiased = gradients(partial(mmd, kernel="linear", estimator="unbiased"), x, y)

    def formula(x, y):
        means = (x.mean(1) - y.mean(1)).square().sum(-1)
        return means - x.var(1).sum(-1) / 9 - y.var(1).sum(-1) / 6

    assert_equal_up_to_rounding(unbiased, gradients(formula, x, y))
    # Far from the origin, float32 still sees them: the same numbers, moved.
    x, y = ((z * 256).round() / 256 for z in (x, y))
    for estimator in ("biased", "unbiased"):
        far = mmd(x.float() + 4096, y.float() + 4096, kernel="linear", estimator=estimator)
        truth = mmd(x, y, kernel="linear", estimator=estimator)
        assert_equal_up_to_rounding([far], [truth], scale=4)


@over_backends
@pytest.mark.parametrize("kernel", ["rbf", "laplacian", "imq", "polynomial", "linear"])
def test_unbiased_is_zero_in_expectation(backend, kernel):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(4000, k, 3, generator=generator, dtype=torch.float64) for k in (5, 4))
    for estimator in ("biased", "unbiased"):
        each = distance(kernel, backend, estimator=estimator)(x, y)
        deviation = each.mean() / (each.std() / 4000**0.5)
        assert (each < 0).any() == (estimator == "unbiased")
        assert (deviation.abs() < 3.5) == (estimator == "unbiased"), deviation


@with_triton
def test_unbiased_needs_two_samples(backend):
    x, y = features(5, 3, backend=backend)
    mmd = on(kdkernels.mmd, backend)
    options = {"estimator": "unbiased", "bandwidths": 2.0}
    for a, b in ((x[:1], y), (x, y[:1]), (x[:0], y)):
        loss, *got = gradients(mmd, a, b, **options)
        assert loss == 0 and all((g == 0).all() for g in got)
    only = torch.tensor([0.0, 2.0, 0, 0, 0])
    loss, *got = gradients(mmd, x, y, x_weights=only, **options)
    assert loss == 0 and all((g == 0).all() for g in got)
    # A class of one sample, beside one of four.
    labels = torch.tensor([3, 3, 7, 3, 3])
    loss, of_x, of_y = gradients(mmd, x, y, labels=labels, **options)
    rest = labels == 3
    assert_equal_up_to_rounding(
        (loss, of_x[rest], of_y[rest]), gradients(mmd, x[rest], y[rest], **options), scale=8
    )
    assert (of_x[2] == 0).all() and (of_y[2] == 0).all()


@with_triton
def test_bandwidths(backend):
    x, y = features(*((12, 5) if backend == "triton" else (60, 5)), m=20, backend=backend)
    one = partial(on(mmd, backend), x, y)
    for kernel in ("rbf", "laplacian", "imq", "polynomial"):
        several = [3.0, 0.5, 6.0, 12.0, 1.0]
        total = sum(one(kernel=kernel, bandwidths=s) for s in several)
        for given in (several, tuple(several), torch.tensor(several), torch.tensor(several).double()):
            assert_equal_up_to_rounding([one(kernel=kernel, bandwidths=given)], [total])
        assert_equal_up_to_rounding(
            [one(kernel=kernel, bandwidths=several[::-1])], [one(kernel=kernel, bandwidths=several)]
        )
        assert torch.equal(
            one(kernel=kernel, bandwidths=2), one(kernel=kernel, bandwidths=torch.tensor(2.0).double())
        )
        assert torch.equal(one(kernel=kernel, bandwidths=2), one(kernel=kernel, bandwidths=[2.0]))
    assert_equal_up_to_rounding(
        [one(kernel="polynomial")], [one(kernel="polynomial", bandwidths=torch.tensor(5.0).double().sqrt())]
    )


@over_backends
@pytest.mark.parametrize("factor", [2**0.5, 2.0, 3.0, 1.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bandwidths_that_are_powers(backend, dtype, factor):
    """One exponential is then a power of another: as good as its own."""
    x, y = features(70, 5, m=50, dtype=dtype)
    options = {"bandwidths": [1.5 * factor**k for k in range(8)]}
    for kernel in ("rbf", "laplacian"):
        got = gradients(mmd, x, y, kernel=kernel, backend=backend, **options)
        truth = gradients(mmd, x.double(), y.double(), kernel=kernel, backend="reference", **options)
        assert_equal_up_to_rounding(got, truth)


@with_triton
@pytest.mark.parametrize("kernel", ["rbf", "laplacian", "imq"])
def test_mean_distance(backend, kernel):
    """A constant: the gradient is that of the bandwidth given."""
    mmd = on(kdkernels.mmd, backend)
    sizes = [(6, 6, False), (6, 4, False), (6, 4, True), (70, 50, True)]
    for n, m, weighted in sizes[:3] if backend == "triton" and kernel != "rbf" else sizes:
        x, y = features(2, n, 3, m=m, backend=backend)
        generator = torch.Generator().manual_seed(0)
        u, v = (torch.rand(2, k, generator=generator, dtype=torch.float64) for k in (n, m))
        weights = {"x_weights": u, "y_weights": v} if weighted else {}
        p, q = (w / w.sum(-1, keepdim=True) if weighted else torch.ones_like(w) / w.shape[1] for w in (u, v))
        s, t = x.double(), y.double()
        means = [
            (a[:, :, None] * b[:, None] * (s[:, :, None] - t[:, None]).norm(dim=-1)).sum((1, 2))
            for (a, s), (b, t) in (((p, s), (p, s)), ((q, t), (q, t)), ((p, s), (q, t)))
        ]
        sigma = sum(means) / 3
        for estimator in ("biased", "unbiased"):
            options = {"kernel": kernel, "estimator": estimator}
            loss, *got = gradients(mmd, x, y, **options, **weights)
            for i in range(2):
                own = {name: w[i] for name, w in weights.items()}
                truth = gradients(mmd, x[i], y[i], bandwidths=sigma[i].item(), **options, **own)
                assert_equal_up_to_rounding((loss[i], *(g[i] for g in got)), truth, scale=4)
        if n == m:  # KD²M's: of all entries of the three matrices
            every = torch.cat([torch.cdist(s, s), torch.cdist(t, t), torch.cdist(s, t)], 1)
            assert_equal_up_to_rounding([every.mean((1, 2))], [sigma])
    x = torch.ones(4, 3)
    assert mmd(x, x, kernel=kernel) == 0
    # Of each class, its own.
    x, y = features(9, 3, backend=backend)
    labels = torch.tensor([0, 1, 0, 1, 1, 1, 0, 0, 0])
    each = sum(mmd(x[labels == c], y[labels == c], kernel=kernel) for c in (0, 1))
    assert_equal_up_to_rounding([mmd(x, y, kernel=kernel, labels=labels)], [each])


SIZES = [1, 2, 16, 17, 31, 32, 33, 47, 48, 49, 95, 97, 191, 192, 193, 250]
WIDTHS = [1, 7, 8, 15, 16, 17, 48, 49, 63, 130]


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", ["rbf", "polynomial", "energy"])
@pytest.mark.parametrize(
    ("n", "m", "d"),
    [(n, 40, 20) for n in SIZES]
    + [(40, m, 20) for m in SIZES]
    + [(60, 50, d) for d in WIDTHS]
    + [(50, 60, 512), (50, 60, 513), (20, 5, 1100)]
    + [(800, 30, 20), (900, 1600, 5), (2000, 1300, 3)],
)
def test_every_size(n, m, d, kernel, dtype):
    """Samples around a panel, in blocks of one, two and four panels; features around a register, three of them, and
    a product's depth."""
    x, y = features(n, d, m=m, dtype=dtype)
    bandwidths = None if kernel == "energy" else [d**0.5, 2 * d**0.5]

    def run(x, y, backend):
        if kernel == "energy":
            return energy_distance(x, y, backend=backend)
        return mmd(x, y, kernel=kernel, bandwidths=bandwidths, backend=backend)

    truth = gradients(run, x.double(), y.double(), backend="reference")
    got = gradients(run, x, y, backend="cpu")
    assert all(t.abs().max() > 1e-5 for t in truth)
    assert_equal_up_to_rounding(got, truth)
    for i, needs in enumerate(((True, False), (False, True), (False, False))):
        leaves = [z.clone().requires_grad_(need) for z, need in zip((x, y), needs)]
        loss = run(*leaves, backend="cpu")
        assert_equal_up_to_rounding([loss.detach()], truth[:1])
        if i < 2:
            [of_one] = torch.autograd.grad(loss, leaves[i])
            assert torch.equal(of_one, got[1 + i])


TILES = {  # rows, steps of columns and of features, and features of a program's gradient
    "registers": (32, 32, 16, 64, 1),
    "memory": (32, 32, 16, 16, 2),
    "wide": (64, 32, 16, 16, 3),
}


@triton
@pytest.mark.parametrize(("kernel", "tile"), zip(("rbf", "polynomial", "energy"), TILES))
@pytest.mark.parametrize(
    ("n", "m", "d"), [(1, 33, 17), (16, 31, 70), (33, 32, 49), (65, 40, 20), (20, 70, 33), (5, 1, 80)]
)
def test_every_tile(n, m, d, kernel, tile, monkeypatch):
    """Samples around a block, features around a step, a block, several blocks; gradients in registers and in memory."""
    monkeypatch.setattr(triton_mmd, "tile", lambda *sizes: triton_mmd.Tile(*TILES[tile]))
    x, y = features(n, d, m=m, dtype=torch.float32)
    options = {} if kernel == "energy" else {"kernel": kernel, "bandwidths": [d**0.5, 2 * d**0.5]}
    run = energy_distance if kernel == "energy" else mmd
    truth = gradients(run, x.double(), y.double(), backend="reference", **options)
    got = gradients(on(run, "triton"), x, y, **options)
    assert all(t.abs().max() > 1e-5 for t in truth)
    assert_equal_up_to_rounding(got, truth)
    for i, needs in enumerate(((True, False), (False, True), (False, False))):
        leaves = [z.clone().requires_grad_(need) for z, need in zip((x, y), needs)]
        loss = on(run, "triton")(*leaves, **options)
        assert_equal_up_to_rounding([loss.detach()], truth[:1])
        if i < 2:
            [of_one] = torch.autograd.grad(loss, leaves[i])
            assert torch.equal(of_one, got[1 + i])


@pytest.mark.parametrize("backend", [name for name in WITH_TRITON if name != "reference"])
@pytest.mark.parametrize("kernel", ["laplacian", "energy", "rbf"])
@pytest.mark.parametrize("noise", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_near_samples(backend, kernel, noise, offset, monkeypatch):
    """Pairs far nearer than the samples are far from 0: |a|² + |b|² − 2 ab would say nothing of them."""
    half = 50
    if backend == "triton":
        if noise == 1e-3:
            pytest.skip("slow, and between two others")
        half = 15
        blocks = TILES["memory" if offset else "registers"]
        monkeypatch.setattr(triton_mmd, "tile", lambda *sizes: triton_mmd.Tile(*blocks))
    x, _ = features(2 * half, 24)
    generator = torch.Generator().manual_seed(1)
    x = (x + offset).float()
    # Within the batch and across.
    x[half:] = x[:half] + noise * torch.randn(half, 24, generator=generator)
    y = x[torch.randperm(2 * half, generator=generator)]
    y = y + noise * torch.randn(2 * half, 24, generator=generator)

    def run(x, y, backend):
        if kernel == "energy":
            return on(energy_distance, backend)(x, y)
        return on(mmd, backend)(x, y, kernel=kernel, bandwidths=[0.1, 3.0])

    (truth, *true_gradients), (got, *of_ours), (_, *of_theirs) = (
        gradients(run, a, b, backend=name)
        for a, b, name in ((x.double(), y.double(), "reference"), (x, y, backend), (x, y, "reference"))
    )
    # The loss is a difference of sums of the order of 1 to 6.
    assert abs(got.item() - truth.item()) < 2e-6 and got >= 0
    for a, b, theirs in zip(of_ours, true_gradients, of_theirs):
        own = 2 * (theirs.double() - b).abs().max() + 2e-5 * b.abs().max()
        assert (a.double() - b).abs().max() <= own < 0.3 * b.abs().max()


@with_triton
@pytest.mark.parametrize("kernel", ["rbf", "laplacian", "imq"])
def test_narrow_bandwidth(backend, kernel):
    """A sample's kernel value with itself is all but everything; its slope is nothing."""
    x, y = features(40 if backend == "triton" else 60, 200, dtype=torch.float32)
    options = {"kernel": kernel, "bandwidths": {"rbf": 2.5, "laplacian": 1.0, "imq": 0.1}[kernel]}
    truth = gradients(mmd, x.double(), y.double(), backend="reference", **options)
    assert all(t.abs().max() < 1e-3 for t in truth[1:])
    assert_equal_up_to_rounding(gradients(on(mmd, backend), x, y, **options), truth, scale=4)


@with_triton
@pytest.mark.parametrize("n", [20, 300])
def test_equal_in_another_order(backend, n):
    if backend == "triton" and n == 300:
        pytest.skip("slow")
    x, _ = features(n, 40, dtype=torch.float32)
    y = x[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
    for run in (energy_distance, partial(mmd, kernel="laplacian"), partial(mmd, bandwidths=[4.0, 8.0])):
        loss, *got = gradients(on(run, backend), x, y)
        assert 0 <= loss < 1e-5  # of distances of 10
        assert all(g.abs().max() < 1e-6 for g in got)


@with_triton
def test_equal_samples_of_other_weights(backend):
    """What is equal has distance 0 only if it weighs the same."""
    x, _ = features(6, 5, dtype=torch.float32)
    u = torch.tensor([1.0, 1, 1, 1, 1, 4])
    truth = gradients(mmd, x.double(), x.double(), bandwidths=3.0, x_weights=u, backend="reference")
    got = gradients(on(mmd, backend), x, x, bandwidths=3.0, x_weights=u)
    assert truth[0] > 1e-2
    assert_equal_up_to_rounding(got, truth)


@over_backends
def test_second_derivative_where_equal(backend):
    """Zero loss and gradient are no constants: of one sample, MMD² is k(0)·2 − 2 k(r)."""
    x = torch.tensor([[1.0, 2.0], [-3.0, 0.5]]).double()[:1]

    def run(a):
        return mmd(a, x, bandwidths=2.0, backend=backend)

    hessian = torch.autograd.functional.hessian(run, x).reshape(2, 2)
    torch.testing.assert_close(hessian, 2 * torch.eye(2).double() / 4)


@with_triton
def test_far_samples(backend):
    """All kernel values underflow but the diagonal's."""
    x, y = features(60, 5, dtype=torch.float32)
    for kernel in ("rbf", "laplacian"):
        loss, *got = gradients(on(mmd, backend), 1e6 * x, 1e6 * y, kernel=kernel, bandwidths=1.0)
        assert loss == pytest.approx(2 / 60) and all(torch.isfinite(g).all() for g in got)
        assert all(g.abs().max() < 1e-20 for g in got)


@with_triton
@pytest.mark.parametrize("n", [5, 60])
def test_nan_is_seen(backend, n):
    x, y = features(n, 5, dtype=torch.float32)
    x[3, 1] = float("nan")
    for run in (energy_distance, mmd, partial(mmd, kernel="polynomial"), partial(mmd, bandwidths=1.0)):
        assert torch.isnan(on(run, backend)(x, y))
        assert torch.isnan(on(run, backend)(x, x))


@over_backends
@pytest.mark.parametrize(("n", "m"), [(7, 7), (12, 5), (300, 200)])
def test_scipy_in_one_dimension(backend, n, m):
    stats = pytest.importorskip("scipy.stats")
    x, y = features(n, 1, m=m)
    u = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for weights in (None, u):
        expected = stats.energy_distance(x[:, 0], y[:, 0], weights) ** 2
        got = energy_distance(x, y, x_weights=weights, backend=backend)
        assert got.item() == pytest.approx(expected, rel=1e-10)


@over_backends
def test_agrees_with_geomloss(backend):
    """Whose losses are half of ours, and whose kernel has one bandwidth."""
    geomloss = pytest.importorskip("geomloss")
    x, y = features(40, 6, m=30)
    for name, run in (
        ("energy", energy_distance),
        ("gaussian", partial(mmd, bandwidths=1.5)),
        ("laplacian", partial(mmd, kernel="laplacian", bandwidths=1.5)),
    ):
        theirs = geomloss.SamplesLoss(name, blur=1.5, backend="tensorized")
        truth = gradients(lambda x, y, theirs=theirs: 2 * theirs(x, y), x, y)
        # geomloss keeps its roots' gradients finite by a small number.
        got = gradients(run, x, y, backend=backend)
        for a, b in zip(got, truth):
            assert (a - b).abs().max() <= 1e-3 * b.abs().max()


@pytest.mark.parametrize("backend", [name for name in WITH_TRITON if name != "reference"])
def test_classes_are_problems_of_their_own(backend):
    """Small ones beside one another, large ones after one another; rows in any order."""
    large, small, classes = (50, 40, 9) if backend == "triton" else (500, 300, 60)
    generator = torch.Generator().manual_seed(0)
    labels = torch.cat((torch.full((large,), 4), torch.randint(5, classes, (small,), generator=generator)))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    x, y = features(len(labels), 33, dtype=torch.float32)
    for run in (energy_distance, partial(mmd, estimator="unbiased", bandwidths=8.0), mmd):
        got = gradients(on(run, backend), x, y, labels=labels)
        truth = [torch.zeros((), dtype=torch.float64), x.double(), y.double()]
        for label in labels.unique():
            here = labels == label
            loss, of_x, of_y = gradients(run, x[here].double(), y[here].double(), backend="reference")
            truth[0] += loss
            truth[1][here], truth[2][here] = of_x, of_y
        assert_equal_up_to_rounding(got, truth)


@native
def test_same_bits_whatever_the_threads():
    x, y = features(2, 300, 100, m=250, dtype=torch.float32)
    labels = torch.arange(600).reshape(2, 300) % 7
    run = partial(gradients, backend="cpu", upstream=torch.ones(2))
    assert_same_bits_whatever_the_threads(partial(run, mmd, x, y))
    assert_same_bits_whatever_the_threads(partial(run, energy_distance, x, x.flip(1), labels=labels))
    x, y = features(1700, 40, m=100, dtype=torch.float32)
    assert_same_bits_whatever_the_threads(partial(gradients, energy_distance, x, y, backend="cpu"))


@native
def test_memory():
    """No matrix of pairs: of 6000 samples one would be 36 MiB, and half of one 18."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("needs /proc/self/clear_refs")

    def resident(field: str) -> int:
        return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10

    x, y = (z.requires_grad_() for z in features(3000, 20, dtype=torch.float32))
    mmd(x[:64], y[:64]).backward()
    for run in (mmd, energy_distance):
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        run(x, y, backend="cpu").backward()
        assert resident("VmHWM") - before < 8 << 20


@pytest.mark.parametrize("backend", [name for name in WITH_TRITON if name != "reference"])
@pytest.mark.parametrize("op", ["mmd_fwd", "mmd_bwd"])
def test_opcheck(op, backend):
    x, y = torch.randn(2, 2, 7, 5, device=device_of(backend))
    labels = torch.arange(14, device=x.device).reshape(2, 7) % 3
    for others in (
        (None, None, None, None, 0, False),
        (labels, torch.rand(2, 7).to(x.device), None, torch.tensor([1.0, 2.0]).to(x.device), 1, True),
    ):
        for needs in ([True, True], [False, True], [False, False])[: 1 if backend == "triton" else 3]:
            torch.library.opcheck(getattr(torch.ops.kdkernels, op).default, (x, y, *others, needs, backend))


@native
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_compile_of_weights_and_mean_distance(estimator):
    x, y = features(2, 40, 6, m=30, dtype=torch.float32)
    weights = torch.rand(40, generator=torch.Generator().manual_seed(0))

    def run(x, y):
        return mmd(2 * x, 2 * y, estimator=estimator, x_weights=weights) + energy_distance(x, y)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True)
    assert_equal_up_to_rounding(gradients(compiled, x, y), gradients(run, x, y))


def test_bad_options():
    x, y = features(5, 4)

    def refused(error, message, **options):
        with pytest.raises(error, match=message):
            mmd(x, y, **options)

    refused(
        ValueError,
        "kernel must be one of rbf, laplacian, polynomial, imq, linear, got 'gauss'",
        kernel="gauss",
    )
    refused(ValueError, "kernel must be one of", kernel="energy")
    refused(ValueError, "estimator must be one of biased, unbiased, got 'u'", estimator="u")
    refused(ValueError, "the linear kernel has no bandwidths, got 2", kernel="linear", bandwidths=2)
    refused(ValueError, "has no backend 'cpu', only reference", kernel="linear", backend="cpu")
    for bad in (0, -1.0, float("inf"), float("nan"), [1.0, 0.0], torch.tensor([1.0, -2.0])):
        refused(ValueError, "bandwidths must be finite and above 0, got", bandwidths=bad)
    for bad in ("1", True, [1.0, "2"], 1j):
        refused(TypeError, "bandwidths must be a float, several, or a tensor, got", bandwidths=bad)
    refused(TypeError, "bandwidths must be floats, got", bandwidths=torch.tensor([1]))
    refused(ValueError, "bandwidths must be at least one, got none", bandwidths=[])
    refused(ValueError, r"bandwidths must have shape \(\) or \(K,\), got \(0,\)", bandwidths=torch.ones(0))
    refused(ValueError, r"bandwidths must have shape .* got \(1, 1\)", bandwidths=torch.ones(1, 1))
    refused(ValueError, "bandwidths must be on x's device", bandwidths=torch.ones(2, device="meta"))
    refused(ValueError, r"have no gradient: detach\(\)", bandwidths=torch.ones(2, requires_grad=True))
    with pytest.raises(TypeError, match="bandwidths"):
        energy_distance(x, y, bandwidths=1.0)


@triton
def test_triton_has_no_float64():
    x, y = (z.to(device_of("triton")) for z in features(5, 4))
    for run in (mmd, energy_distance):
        with pytest.raises(
            TypeError, match="backend 'triton' takes float32, float16, bfloat16; x is float64"
        ):
            run(x, y, backend="triton")
