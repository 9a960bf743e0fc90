"""sliced_wasserstein: one dimension, permutations, translations, ties, weights, agreement with scipy and POT."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conftest import device_of
from distances import assert_equal_up_to_rounding, features, gradients, moved
from testing import assert_same_bits_whatever_the_threads

import kdkernels
from kdkernels import sliced_wasserstein

BACKENDS = [
    name
    for name in ("reference", "cpu", "triton")
    if kdkernels.available_backends(device_of(name))[name] == "available"
]
over_backends = pytest.mark.parametrize("backend", BACKENDS)
over_float64 = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
ONE = torch.ones(1, 1, dtype=torch.float64)


def on(backend):
    return partial(moved, sliced_wasserstein, backend)


def dtype_of(backend: str) -> torch.dtype:
    return torch.float32 if backend == "triton" else torch.float64


def relative(backend: str) -> float:
    return 1e-5 if backend == "triton" else 1e-12


def directions(count: int, d: int) -> torch.Tensor:
    return torch.nn.functional.normalize(features(count, d, seed=9)[0], dim=-1)


@over_backends
def test_one_dimension(backend):
    x = torch.tensor([[3.0], [1.0], [2.0]]).to(dtype_of(backend))
    y = torch.tensor([[2.5], [7.0], [0.0]]).to(dtype_of(backend))
    for p, expected in ((1, (1 + 0.5 + 4) / 3), (2, (1 + 0.25 + 16) / 3), (3, (1 + 0.125 + 64) / 3)):
        loss, of_x, of_y = gradients(on(backend), x, y, projections=ONE, p=p)
        assert loss.item() == pytest.approx(expected, rel=relative(backend))
        by_hand = torch.tensor([-p * 4.0 ** (p - 1), p, -p * 0.5 ** (p - 1)], dtype=x.dtype) / 3
        torch.testing.assert_close(of_x[:, 0], by_hand)
        torch.testing.assert_close(of_y[:, 0], -by_hand[[2, 0, 1]])


@over_backends
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("n", "m"), [(7, 7), (7, 5), (3, 12), (1, 4), (6, 9), (700, 300), (512, 512), (4100, 40)]
)
def test_scipy_in_one_dimension(backend, weighted, n, m):
    stats = pytest.importorskip("scipy.stats")
    x, y = features(n, 1, m=m, backend=backend)
    u = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64) if weighted else None
    v = torch.rand(m, generator=torch.Generator().manual_seed(1), dtype=torch.float64) if weighted else None
    expected = stats.wasserstein_distance(x[:, 0], y[:, 0], u, v)
    loss = on(backend)(x, y, projections=ONE, p=1, x_weights=u, y_weights=v)
    assert loss.item() == pytest.approx(expected, rel=relative(backend))


@over_backends
@pytest.mark.parametrize("p", [1, 1.5, 2, 4])
def test_translation_and_permutation(backend, p):
    x, _ = features(300, 5, backend=backend)
    theta = directions(7, 5).to(x.dtype)
    shift = torch.tensor([1.0, -2, 0.5, 0, 3]).to(x.dtype)
    expected = (theta @ shift).abs().pow(p).mean().item()
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    permuted = on(backend)(x, (x + shift)[order], projections=theta, p=p)
    assert permuted.item() == pytest.approx(expected, rel=relative(backend))
    # More of the same samples are the same distribution.
    many = on(backend)(x, (x + shift).repeat(3, 1), projections=theta, p=p)
    assert many.item() == pytest.approx(expected, rel=relative(backend))


@over_backends
@pytest.mark.parametrize("p", [1, 2])
def test_agrees_with_pot(backend, p):
    ot = pytest.importorskip("ot")
    for n, m in ((20, 20), (20, 13)):
        x, y = features(n, 4, m=m, backend=backend)
        theta = directions(31, 4)

        def pot(x, y, theta=theta):
            return ot.sliced_wasserstein_distance(x, y, projections=theta.T, p=p) ** p

        got = gradients(on(backend), x, y, projections=theta, p=p)
        assert_equal_up_to_rounding(got, gradients(pot, x.double(), y.double()))


@over_backends
@pytest.mark.parametrize("p", [1, 1.5, 2])
@pytest.mark.parametrize("n", [6, 400])
def test_ties(backend, p, n):
    """Equal samples within a batch and across batches: finite, and 0 where they meet."""
    x = torch.zeros(n, 3)
    x[n // 2 :] = torch.tensor([1.0, -1.0, 2.0])
    loss, of_x, of_y = gradients(on(backend), x, x.flip(0), projections=directions(9, 3).float(), p=p)
    assert loss == 0 and (of_x == 0).all() and (of_y == 0).all()


@over_backends
def test_signs_and_special_values_sort(backend):
    """Negative numbers, both zeros, subnormals and infinities come in their order."""
    values = [-3.0, -1e-42, -0.0, 0.0, 1e-42, 2.0, -1e30, 1e30, -7.5, 5e-39]
    for n in (10, 1000):
        x = torch.tensor(values).repeat(n // 10)[:, None]
        order = torch.randperm(n, generator=torch.Generator().manual_seed(3))
        y = (x + 1)[order]
        expected = (x.flatten().sort().values - y.flatten().sort().values).abs().mean()
        loss = on(backend)(x, y, projections=torch.ones(1, 1), p=1)
        torch.testing.assert_close(loss, expected)
    x = torch.tensor([[1.0], [float("nan")], [2.0]])
    assert torch.isnan(on(backend)(x, x + 1, projections=torch.ones(1, 1)))


@over_float64
def test_directions(backend):
    x, y = features(9, 4)
    seeded = partial(sliced_wasserstein, projections=5, backend=backend)
    double, again, single = (
        seeded(a, b, generator=torch.Generator().manual_seed(4))
        for a, b in ((x, y), (x, y), (x.float(), y.float()))
    )
    assert torch.equal(double, again)
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=0)
    torch.manual_seed(1)
    first = sliced_wasserstein(x, y, projections=5, backend=backend)
    assert sliced_wasserstein(x, y, projections=5, backend=backend) != first
    torch.manual_seed(1)
    assert sliced_wasserstein(x, y, projections=5, backend=backend) == first
    # Uniform on the sphere: E (θ·t)² = ‖t‖² / d.
    far = sliced_wasserstein(
        x, x + 2, projections=20_000, generator=torch.Generator().manual_seed(0), backend=backend
    )
    assert far.item() == pytest.approx(4, rel=0.05)
    assert sliced_wasserstein(x, y, projections=500, backend=backend) < (x - y).square().sum(-1).mean() / 2


@over_float64
def test_gradient_of_directions(backend):
    """For max-sliced distances, which look for the worst direction."""
    x, y = (z.requires_grad_() for z in features(6, 3, m=4))
    theta = directions(5, 3).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, y, t: sliced_wasserstein(x, y, projections=t, p=3, backend=backend), (x, y, theta)
    )


@over_backends
@pytest.mark.parametrize("n", [1, 2, 3, 63, 64, 65, 1000, 1023, 1024, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_number_of_samples(backend, n, dtype):
    if dtype not in kdkernels.backend.DTYPES[backend]:
        pytest.skip(f"{backend} has no {dtype}")
    x, y = features(n, 3, dtype=dtype)
    theta = directions(4, 3).to(dtype)
    got = gradients(on(backend), x, y, projections=theta)
    # Which of two near samples comes first is the dtype's to say, and the gradient's: that one is in the same dtype.
    assert_equal_up_to_rounding(
        got, gradients(sliced_wasserstein, x, y, projections=theta, backend="reference")
    )
    truth = sliced_wasserstein(x.double(), y.double(), projections=theta.double(), backend="reference")
    assert_equal_up_to_rounding(got[:1], [truth])


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize(("weighted", "p"), [("", 1), ("", 1.5), ("x", 2), ("y", 1), ("xy", 1.5), ("xy", 2)])
@pytest.mark.parametrize(("n", "m"), [(33, 33), (130, 129), (2, 150)])
def test_merged_quantiles(backend, n, m, weighted, p):
    """Samples without weight; a block of samples and more; one that meets many."""
    x, y = features(2, n, 1, m=m, dtype=torch.float32)
    weights = {
        f"{side}_weights": torch.rand(2, size, generator=torch.Generator().manual_seed(size)) + 0.1
        for side, size in (("x", n), ("y", m))
        if side in weighted
    }
    for each in weights.values():
        each[0, 1::3] = 0
    # Products with 1 and -1 are exact: the order is that of float64.
    call = {"projections": torch.tensor([[1.0], [-1.0]]), "p": p, **weights}
    got = gradients(on(backend), x, y, **call)
    truth = gradients(on("reference"), x.double(), y.double(), **call)
    assert all((z != 0).any() for z in truth)
    assert_equal_up_to_rounding(got, truth)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_opcheck(backend):
    a, b = (torch.randn(2, 3, n, device=device_of(backend)) for n in (7, 5))
    for weights in (None, torch.rand(2, 7, device=device_of(backend))):
        torch.library.opcheck(
            torch.ops.kdkernels.sliced_wasserstein.default, (a, b, weights, None, 2.0, [True, True], backend)
        )


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the native module")
def test_same_bits_whatever_the_threads():
    x, y = features(3, 900, 20, dtype=torch.float32)
    theta = directions(31, 20).float()
    a, b = (theta @ z.mT for z in (x, y))
    op = torch.ops.kdkernels.sliced_wasserstein
    assert_same_bits_whatever_the_threads(partial(op, a, b, None, None, 2.0, [True, True], "cpu"))


def test_bad_options():
    x, y = features(5, 4)
    for bad, error in (
        (0, ValueError),
        (-1, ValueError),
        (2.0, TypeError),
        (True, TypeError),
        (torch.ones(3, 4).long(), TypeError),
    ):
        with pytest.raises(error, match="projections must be"):
            sliced_wasserstein(x, y, projections=bad)
    for shape in ((4,), (0, 4), (3, 5)):
        with pytest.raises(ValueError, match=r"projections must be \(L, d\) with L >= 1 and d = 4"):
            sliced_wasserstein(x, y, projections=torch.ones(shape))
    with pytest.raises(ValueError, match="projections must be on x's device"):
        sliced_wasserstein(x, y, projections=torch.ones(3, 4, device="meta"))
    with pytest.raises(ValueError, match=r"p must be finite and at least 1, got 0\.5"):
        sliced_wasserstein(x, y, p=0.5)
    with pytest.raises(TypeError, match="p must be a float, got '2'"):
        sliced_wasserstein(x, y, p="2")
