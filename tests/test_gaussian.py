"""gaussian_wasserstein and gaussian_kl: closed forms, textbook formulas in float64, near convergence, large d."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from conftest import device_of
from distances import assert_equal_up_to_rounding, features, gradients, moved
from testing import assert_same_bits_whatever_the_threads
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import kdkernels
from kdkernels import gaussian_kl, gaussian_wasserstein

BACKENDS = [
    name
    for name in ("reference", "cpu", "triton")
    if kdkernels.available_backends(device_of(name))[name] == "available"
]
over_backends = pytest.mark.parametrize("backend", BACKENDS)


def on(function, backend):
    return partial(moved, function, backend)


def covariance(x):
    return torch.cov(x.T, correction=0).reshape(x.shape[1], x.shape[1])


def square_root_of(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T


def textbook_bures(x, y):
    root = square_root_of(covariance(x))
    middle = square_root_of(root @ covariance(y) @ root)
    shift = (x.mean(0) - y.mean(0)).square().sum()
    return shift + torch.trace(covariance(x)) + torch.trace(covariance(y)) - 2 * torch.trace(middle)


@over_backends
def test_diagonal_wasserstein_is_the_formula(backend):
    x, y = features(20, 6, m=15, backend=backend)

    def formula(x, y):
        spread = x.std(0, correction=0) - y.std(0, correction=0)
        return (x.mean(0) - y.mean(0)).square().sum() + spread.square().sum()

    got = gradients(on(gaussian_wasserstein, backend), x, y)
    assert_equal_up_to_rounding(got, gradients(formula, x.double(), y.double()))
    # 2 w_i ((mu_x - mu_y) + (sigma_x - sigma_y) (x_i - mu_x) / sigma_x)
    sigma_x, sigma_y = x.std(0, correction=0), y.std(0, correction=0)
    by_hand = 2 / 20 * ((x.mean(0) - y.mean(0)) + (sigma_x - sigma_y) * (x - x.mean(0)) / sigma_x)
    torch.testing.assert_close(got[1], by_hand)


@over_backends
def test_closed_forms(backend):
    points = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 0.0, 4.0]])
    assert on(gaussian_wasserstein, backend)(*points) == 5
    x, _ = features(50, 4, backend=backend)
    rel = 1e-12 if x.dtype == torch.float64 else 1e-5
    for kind in ("diagonal", "full"):
        which = backend if kind == "diagonal" else None
        distance = partial(on(gaussian_wasserstein, which), covariance=kind)
        assert distance(x, x + torch.tensor([3.0, 0, 0, 4], dtype=x.dtype)).item() == pytest.approx(
            25, rel=rel
        )
        centred = x - x.mean(0)
        expected = 4 * covariance(x).trace().item()
        assert distance(centred, 3 * centred).item() == pytest.approx(expected, rel=rel)
    # One dimension: mean 0 and variance 1 from mean 1 and variance 4.
    one, other = (torch.tensor([[-1.0], [z]], dtype=x.dtype) for z in (1.0, 3.0))
    expected = math.log(2) + (1 + 1) / (2 * 4) - 0.5
    assert on(gaussian_kl, backend)(one, other, eps=0).item() == pytest.approx(expected, rel=rel)
    assert gaussian_kl(one, other, eps=0, covariance="full").item() == pytest.approx(expected, rel=rel)
    back = -math.log(2) + (4 + 1) / 2 - 0.5
    assert on(gaussian_kl, backend)(other, one, eps=0).item() == pytest.approx(back, rel=rel)


@pytest.mark.parametrize(("n", "m", "d"), [(30, 20, 5), (6, 6, 6), (7, 5, 12), (5, 9, 7), (2, 2, 3)])
def test_full_wasserstein_is_the_textbook(n, m, d):
    x, y = features(n, d, m=m)
    value, of_x, of_y = gradients(gaussian_wasserstein, x, y, covariance="full")
    # The textbook takes roots of eigenvalues that are 0 up to rounding: half the digits.
    assert value.item() == pytest.approx(textbook_bures(x, y).item(), rel=1e-7)
    if n > d and m > d:
        assert_equal_up_to_rounding((value, of_x, of_y), gradients(textbook_bures, x, y), scale=100)


def test_full_wasserstein_agrees_with_pot():
    ot = pytest.importorskip("ot")
    x, y = features(40, 6, m=30)
    squared = ot.gaussian.bures_wasserstein_distance(
        x.mean(0), y.mean(0), covariance(x), covariance(y)
    ).square()
    assert gaussian_wasserstein(x, y, covariance="full").item() == pytest.approx(squared.item(), rel=1e-9)


def test_full_is_diagonal_where_covariances_are():
    """Signs of a Hadamard matrix are uncorrelated."""
    signs = torch.tensor([[1.0, 1, 1], [-1, 1, -1], [1, -1, -1], [-1, -1, 1]]).double()
    x, y = signs * torch.tensor([1.0, 2, 3]), signs[[1, 0, 2, 3]] * torch.tensor([3.0, 1, 1]) + 1
    diagonal = gradients(gaussian_wasserstein, x, y)
    full = gradients(gaussian_wasserstein, x, y, covariance="full")
    assert diagonal[0] == 3 + 4 + 1 + 4
    torch.testing.assert_close(full[0], diagonal[0])
    torch.testing.assert_close(gaussian_kl(x, y, covariance="full", eps=0.1), gaussian_kl(x, y, eps=0.1))


@pytest.mark.parametrize(("n", "d"), [(60, 4), (10, 10), (8, 25)])
def test_inequalities(n, d):
    """Per dimension ≤ Gaussian ≤ empirical ≤ the coupling of x_i with y_i; and a rotation of both is nothing."""
    pytest.importorskip("scipy")
    x, y = features(5, n, d)
    diagonal, full = gaussian_wasserstein(x, y), gaussian_wasserstein(x, y, covariance="full")
    empirical, identity = kdkernels.wasserstein(x, y), (x - y).square().sum(-1).mean(-1)
    assert (diagonal < full).all() and (full < empirical).all() and (empirical <= identity).all()
    rotation = torch.linalg.qr(features(d, d)[0])[0]
    torch.testing.assert_close(gaussian_wasserstein(x @ rotation, y @ rotation, covariance="full"), full)


@pytest.mark.parametrize("shape", [(64, 16), (24, 100)], ids=["n > d", "n < d"])
def test_near_convergence(shape):
    """y = x + 1e-3 noise, in float32: what subtracts traces has no digit left; ours has three or more."""
    n, d = shape
    x = features(n, d, dtype=torch.float32)[0]
    y = x + 1e-3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    y = y - y.mean(0) + x.mean(0)  # the covariances' part alone
    usual = textbook_bures(x, y).item()
    for function, options in (
        (gaussian_wasserstein, {"covariance": "full"}),
        (gaussian_kl, {"covariance": "full", "shrinkage": 0.1}),
        (kdkernels.coral, {}),
    ):
        got = gradients(function, x, y, **options)
        truth = gradients(function, x.double(), y.double(), **options)
        for a, b in zip(got, truth):
            assert ((a.double() - b).norm() / b.norm()).item() < 2e-3, function
        if function is gaussian_wasserstein:
            assert abs(usual / truth[0].item() - 1) > 0.1


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_nearly_equal_samples(backend):
    """Samples a thousandth of their mean apart: their rounded means would cost three digits of the rest."""
    generator = torch.Generator().manual_seed(0)
    x, y = (5 + 1e-3 * torch.randn(n, 40, generator=generator) for n in (2, 3))
    for function, options in ((gaussian_wasserstein, {}), (gaussian_kl, {"eps": 1e-12})):
        got = gradients(on(function, backend), x, y, **options)
        for a, b in zip(got, gradients(function, x.double(), y.double(), **options)):
            assert ((a.double() - b).norm() / b.norm()).item() < 1e-6, function


@over_backends
def test_diagonal_kl_is_torch(backend):
    x, y = features(20, 6, m=15, backend=backend)

    def formula(x, y, eps):
        p = Normal(x.mean(0), (x.var(0, correction=0) + eps).sqrt())
        return kl_divergence(p, Normal(y.mean(0), (y.var(0, correction=0) + eps).sqrt())).sum()

    for eps in (0.0, 1e-6, 0.5):
        got = gradients(on(gaussian_kl, backend), x, y, eps=eps)
        assert_equal_up_to_rounding(got, gradients(formula, x.double(), y.double(), eps=eps))


@pytest.mark.parametrize(("n", "m", "d"), [(30, 20, 5), (6, 6, 6), (7, 5, 12), (5, 9, 30)])
@pytest.mark.parametrize("shrinkage", [0.0, 0.1, 1.0])
def test_full_kl_is_torch(n, m, d, shrinkage):
    if min(n, m) <= d and not shrinkage:
        with pytest.raises(
            ValueError, match=rf"needs shrinkage > 0 where n <= d, got {min(n, m)} samples of {d}"
        ):
            gaussian_kl(*features(n, d, m=m), covariance="full")
        return
    eps = 1e-3

    def formula(x, y):
        def normal(z):
            c = (z - z.mean(0)).T @ (z - z.mean(0)) / len(z)
            ridge = shrinkage * torch.trace(c) / d + eps
            return MultivariateNormal(z.mean(0), (1 - shrinkage) * c + ridge * torch.eye(d, dtype=z.dtype))

        return kl_divergence(normal(x), normal(y))

    x, y = features(n, d, m=m)
    got = gradients(gaussian_kl, x, y, covariance="full", shrinkage=shrinkage, eps=eps)
    assert_equal_up_to_rounding(got, gradients(formula, x, y), scale=100)


def test_diagonal_shrinkage():
    x, y = features(9, 4)
    got = gradients(gaussian_kl, x, y, shrinkage=0.25, eps=0.01)

    def formula(x, y):
        def normal(z):
            v = z.var(0, correction=0)
            return Normal(z.mean(0), (0.75 * v + 0.25 * v.mean() + 0.01).sqrt())

        return kl_divergence(normal(x), normal(y)).sum()

    assert_equal_up_to_rounding(got, gradients(formula, x, y))


@over_backends
def test_dead_units_of_kl(backend):
    """A teacher's dead unit has the variance eps."""
    x, y = features(30, 3, backend=backend)
    y[:, 0] = 0
    x[:, 0] -= x[:, 0].mean()
    value = on(gaussian_kl, backend)(x[:, :1], y[:, :1], eps=1e-6).item()
    v = x[:, 0].var(correction=0).item() + 1e-6
    rel = 1e-9 if x.dtype == torch.float64 else 1e-5
    assert value == pytest.approx(0.5 * (v / 1e-6 - 1 - math.log(v / 1e-6)), rel=rel)
    # The other way round, 1 + (v_x - v_y) / v_y rounds to 0 in float32.
    x, y = torch.zeros(30, 1), 1000 * torch.randn(30, 1, generator=torch.Generator().manual_seed(0))
    got = gradients(on(gaussian_kl, backend), x, y)
    truth = gradients(gaussian_kl, x.double(), y.double(), backend="reference")
    assert truth[0] > 10
    assert_equal_up_to_rounding(got, truth)
    x, y = features(30, 3)
    half = gradients(on(gaussian_kl, backend), x.bfloat16(), y.bfloat16())
    assert all(torch.isfinite(z).all() for z in half)


@over_backends
@pytest.mark.parametrize("function", [gaussian_wasserstein, gaussian_kl])
def test_a_student_that_is_near(function, backend):
    """Both forms are of second order in what differs."""
    x, _ = features(64, 32, dtype=torch.float32)
    y = x + 1e-3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    got = gradients(on(function, backend), x, y)
    truth = gradients(function, x.double(), y.double(), backend="reference")
    for a, b in zip(got, truth):
        assert ((a.double() - b).norm() / b.norm()).item() < 5e-3


@over_backends
def test_min_samples(backend):
    x, y = features(7, 3, backend=backend)
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    kl = on(gaussian_kl, backend)
    rel = 1e-10 if x.dtype == torch.float64 else 1e-5

    def of(*classes):
        return sum(kl(x[labels == c], y[labels == c]).item() for c in classes)

    for least, classes in ((2, (0, 1, 2)), (3, (0,)), (4, ())):
        value = kl(x, y, labels=labels, min_samples=least)
        assert value.item() == pytest.approx(of(*classes), rel=rel)
    full = gaussian_kl(x, y, labels=labels, min_samples=3, covariance="full", shrinkage=0.5)
    only = gaussian_kl(x[:3], y[:3], covariance="full", shrinkage=0.5)
    torch.testing.assert_close(full, only)
    # A sample without weight is none.
    weights = torch.tensor([1.0, 1, 1, 1, 0, 1, 1])
    value = kl(x, y, labels=labels, x_weights=weights, y_weights=weights)
    assert value.item() == pytest.approx(of(0, 2), rel=max(rel, 1e-6))
    single = kl(x[:1], y[:1], labels=labels[:1], min_samples=1)
    assert single.item() == pytest.approx((x[0] - y[0]).square().sum().item() / 2e-6, rel=10 * rel)


@pytest.mark.parametrize("labelled", [False, True])
@over_backends
def test_one_sample_with_weight(backend, labelled):
    """It has exactly no spread, whatever its weight and place: the gradient of σ is 0, and not a rounding's sign."""
    x, y = features(8, 5, dtype=torch.float32)
    options = {"labels": torch.full((8,), 3)} if labelled else {}
    for kind in ("diagonal", "full"):
        for weight in (0.1, 0.7, 3.0):
            weights = torch.zeros(8)
            weights[5] = weight
            which = backend if kind == "diagonal" else None
            distance = partial(on(gaussian_wasserstein, which), covariance=kind)
            got = gradients(distance, x, y, x_weights=weights, **options)
            one, of_x, of_y = gradients(distance, x[5:6], y)
            assert_equal_up_to_rounding((got[0], got[1][5:6], got[2]), (one, of_x, of_y))


@over_backends
def test_constant_beside_a_sample_without_weight(backend):
    """The samples with weight have exactly no spread, wherever the one without is."""
    x, y = features(40, 5, dtype=torch.float32)
    x[1:, 2] = 0.1
    x[0, 2] = 5.3
    weights = torch.linspace(0.1, 1.3, 40)
    weights[0] = 0
    got = gradients(on(gaussian_wasserstein, backend), x, y, x_weights=weights)
    truth = gradients(
        gaussian_wasserstein, x.double(), y.double(), x_weights=weights.double(), backend="reference"
    )
    assert_equal_up_to_rounding(got, truth)


def test_no_square_matrix_of_many_features():
    """d × d would be 10 GB."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(6, 50_000, generator=generator) for _ in range(2))
    for function, options in (
        (gaussian_wasserstein, {"covariance": "full"}),
        (gaussian_kl, {"covariance": "full", "shrinkage": 0.1}),
        (kdkernels.coral, {}),
    ):
        loss, of_x, of_y = gradients(function, x, y, **options)
        assert loss > 0 and torch.isfinite(of_x).all() and torch.isfinite(of_y).all()


def test_large_offset_of_the_mean():
    """Variances are those of centred samples: features far from 0 keep their digits."""
    away = [(z + 1000).float() for z in features(40, 8)]
    for backend in BACKENDS:
        for function in (gaussian_wasserstein, gaussian_kl):
            far = gradients(on(function, backend), *away)
            truth = gradients(function, *(z.double() for z in away), backend="reference")
            assert_equal_up_to_rounding(far, truth, scale=1000)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("with_labels", [False, True])
def test_opcheck(backend, with_labels):
    device = device_of(backend)
    x, y = (z.to(device) for z in features(2, 5, 4, dtype=torch.float32))
    labels = torch.tensor([[0, 1, 0, 1, 7], [3, 3, 3, 3, 3]], device=device) if with_labels else None
    weights = torch.rand(2, 5, device=device)
    for name in ("gaussian_fwd", "gaussian_bwd"):
        torch.library.opcheck(
            getattr(torch.ops.kdkernels, name).default,
            (x, y, labels, weights, None, 1, 1e-6, 2, [True, True], backend),
        )


@over_backends
@pytest.mark.parametrize("function", [gaussian_wasserstein, gaussian_kl])
@pytest.mark.parametrize(
    ("batch", "n", "m", "d"),
    [((), 1, 2, 1), ((3,), 65, 64, 63), ((2, 2), 33, 17, 129), ((), 1300, 530, 24), ((2,), 600, 1030, 3)],
    ids=["1x1", "63 columns", "129 columns", "split", "split, 3 columns"],
)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_sizes(backend, function, batch, n, m, d, weighted):
    """Around the blocks of columns, and many samples of few columns, which some backends split."""
    x, y = features(*batch, n, d, m=m, dtype=torch.float32)
    generator = torch.Generator().manual_seed(4)
    options = {}
    if weighted:
        for side, size in (("x_weights", n), ("y_weights", m)):
            options[side] = torch.rand(*batch, size, generator=generator) + 0.1
            options[side][..., 1::3] = 0
    loss, *got = gradients(on(function, backend), x, y, **options)
    truth = gradients(partial(function, backend="reference"), x.double(), y.double(), **options)
    assert_equal_up_to_rounding((loss, *got), truth, scale=4)
    assert all(t.abs().max() > 1e-5 for t in truth)
    # The loss alone, and equal batches, of which nothing remains.
    assert torch.equal(on(function, backend)(x, y, **options), loss)
    for value in gradients(on(function, backend), x, x.clone()):
        assert (value == 0).all()


@over_backends
@pytest.mark.parametrize("function", [gaussian_wasserstein, gaussian_kl])
def test_classes_of_many_sizes(function, backend):
    """One of many samples, some of few, some of one; two blocks of columns."""
    x, y = features(2, 90, 140, dtype=torch.float32)
    labels = torch.cat([torch.zeros(60), torch.arange(10) - 5, torch.arange(20) // 3 + 100]).long()
    labels = torch.stack([labels[torch.randperm(90, generator=torch.Generator().manual_seed(0))], labels % 7])
    got = gradients(on(function, backend), x, y, labels=labels)
    truth = gradients(partial(function, backend="reference"), x.double(), y.double(), labels=labels)
    assert_equal_up_to_rounding(got, truth, scale=200 if function is gaussian_kl else 4)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the native module")
def test_same_bits_whatever_the_threads():
    x, y = features(3, 200, 300, dtype=torch.float32)
    labels = torch.randint(0, 9, (3, 200), generator=torch.Generator().manual_seed(0))
    run = partial(gradients, gaussian_kl, x, y, labels=labels, backend="cpu")
    assert_same_bits_whatever_the_threads(run)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the native module")
def test_labels_of_any_size():
    """Far apart they are sorted, near ones counted."""
    x, y = features(50, 70, dtype=torch.float32)
    few = torch.randint(0, 9, (50,), generator=torch.Generator().manual_seed(0))
    far = few * 2**60 - 2**62
    near = gradients(gaussian_wasserstein, x, y, labels=few, backend="cpu")
    for labels in (far, few.to(torch.int8) - 100, few.to(torch.uint8)):
        other = gradients(gaussian_wasserstein, x, y, labels=labels, backend="cpu")
        assert all(torch.equal(a, b) for a, b in zip(near, other))


def test_bad_options():
    x, y = features(5, 4)
    for function in (gaussian_wasserstein, gaussian_kl):
        with pytest.raises(ValueError, match="covariance must be one of diagonal, full, got 'half'"):
            function(x, y, covariance="half")
        with pytest.raises(ValueError, match="has no backend 'cpu', only reference"):
            function(
                x,
                y,
                covariance="full",
                backend="cpu",
                **({"shrinkage": 0.1} if function is gaussian_kl else {}),
            )
    for bad in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="shrinkage must be"):
            gaussian_kl(x, y, shrinkage=bad)
    with pytest.raises(TypeError, match="shrinkage must be a number, got '0'"):
        gaussian_kl(x, y, shrinkage="0")
    with pytest.raises(ValueError, match="eps must be finite and at least 0"):
        gaussian_kl(x, y, eps=-1.0)
    with pytest.raises(ValueError, match="min_samples must be finite and at least 1"):
        gaussian_kl(x, y, min_samples=0)
    with pytest.raises(ValueError, match="has no backend 'cpu', only reference"):
        gaussian_kl(x, y, shrinkage=0.1, backend="cpu")
    with pytest.raises(ValueError, match="needs shrinkage > 0 with labels"):
        gaussian_kl(x, y[:, :4], covariance="full", labels=torch.zeros(5, dtype=torch.int64))
