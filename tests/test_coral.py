"""coral: the formula, both of its ways, closed forms."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conftest import device_of
from distances import assert_equal_up_to_rounding, features, gradients, moved
from testing import assert_same_bits_whatever_the_threads

import kdkernels
from kdkernels import coral

BACKENDS = [
    "reference",
    *(["cpu"] if kdkernels.available_backends("cpu")["cpu"] == "available" else []),
    *(["triton"] if kdkernels.available_backends(device_of("triton"))["triton"] == "available" else []),
]
over_backends = pytest.mark.parametrize("backend", BACKENDS)


def on(backend):
    return partial(moved, coral, backend)


def formula(x, y):
    d = x.shape[-1]
    difference = torch.cov(x.T).reshape(d, d) - torch.cov(y.T).reshape(d, d)
    return difference.square().sum() / (4 * d * d)


@over_backends
@pytest.mark.parametrize(
    ("n", "m", "d"), [(30, 20, 5), (6, 6, 6), (7, 5, 12), (5, 9, 30), (2, 2, 1), (40, 3, 20)]
)
def test_formula(backend, n, m, d):
    x, y = features(n, d, m=m, backend=backend)
    got = gradients(on(backend), x, y)
    assert_equal_up_to_rounding(got, gradients(formula, x.double(), y.double()), scale=4)


@over_backends
def test_closed_forms(backend):
    x, _ = features(20, 6, backend=backend)
    scale = torch.cov(x.T).square().sum() / (4 * 36)
    torch.testing.assert_close(on(backend)(x, 2 * x), 9 * scale)
    least = torch.finfo(x.dtype).eps ** 2
    assert on(backend)(x, -x) < least and on(backend)(x, x + 5) < 100 * least
    one = torch.tensor([[-1.0], [1.0]]).to(x.dtype)  # variances 2 and 8
    torch.testing.assert_close(on(backend)(one, 2 * one), torch.tensor(9.0).to(x.dtype))


@over_backends
def test_weights_are_reliabilities(backend):
    """C = Σ w (x − μ)(x − μ)ᵀ / (1 − Σ w²), numpy's aweights."""
    x, y = features(8, 5, m=6, backend=backend)
    u, v = (torch.rand(n, dtype=torch.float64) + 0.2 for n in (8, 6))
    expected = (
        torch.cov(x.double().T, aweights=u) - torch.cov(y.double().T, aweights=v)
    ).square().sum() / 100
    torch.testing.assert_close(on(backend)(x, y, x_weights=u, y_weights=v), expected.to(x.dtype))


@over_backends
def test_one_sample_has_no_covariance(backend):
    x, y = features(1, 5, m=4, backend=backend)
    loss, *got = gradients(on(backend), x, y)
    assert loss == 0 and all((g == 0).all() for g in got)


@pytest.mark.parametrize(("n", "d"), [(300, 40), (1300, 40), (60, 200)], ids=["n > d", "parts", "n < d"])
def test_whatever_the_threads(n, d):
    x, y = (z.float() for z in features(n, d, m=n - 7))
    assert_same_bits_whatever_the_threads(lambda: gradients(coral, x, y))


@over_backends
@pytest.mark.parametrize("shape", [(64, 16), (24, 100)], ids=["n > d", "n < d"])
def test_near_convergence(backend, shape):
    """y = x + 1e-3 noise and an offset, in float32: what subtracts covariances has no digit left."""
    x = features(*shape, dtype=torch.float32)[0] + 10
    y = x + 1e-3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    truth = gradients(partial(coral, backend="reference"), x.double(), y.double())
    for a, b in zip(gradients(on(backend), x, y), truth):
        assert ((a - b).abs().max() / b.abs().max()).item() < 1e-3


@over_backends
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize(
    ("batch", "n", "m", "d"),
    [((3,), 65, 64, 63), ((), 300, 520, 70), ((2, 2), 9, 17, 129), ((), 66, 70, 131), ((), 20, 30, 300)],
)
def test_sizes(backend, batch, n, m, d, weighted):
    """Several tiles, and parts of the samples; a first sample that is far away and has no weight."""
    x, y = features(*batch, n, d, m=m, dtype=torch.float32)
    weights = {}
    if weighted:
        weights = {
            f"{side}_weights": torch.rand(*batch, k, generator=torch.Generator().manual_seed(k)) + 0.1
            for side, k in (("x", n), ("y", m))
        }
        weights["x_weights"][..., 0] = 0
        x[..., 0, :] = 1e6
    got = gradients(on(backend), x, y, **weights)
    truth = gradients(on("reference"), x.double(), y.double(), **weights)
    assert_equal_up_to_rounding(got, truth, scale=2)


@over_backends
def test_gradient_of_weights(backend):
    """Theirs alone go through the reference."""
    x, y = features(8, 5, m=6, dtype=torch.float32)
    u, v = (torch.rand(n) + 0.2 for n in (8, 6))

    def weighted(function, *inputs):
        return gradients(lambda x, y, u, v: function(x, y, x_weights=u, y_weights=v), *inputs)

    assert_equal_up_to_rounding(
        weighted(on(backend), x, y, u, v), weighted(on("reference"), x, y, u, v), scale=4
    )


@pytest.mark.skipif(BACKENDS[-1] != "triton", reason="needs Triton")
def test_autocast_is_not_followed_inside():
    device = device_of("triton")
    for d in (4, 11):
        x, y = (z.to(device) for z in features(9, d, m=5, dtype=torch.float32))
        plain = gradients(on("triton"), x, y)
        with torch.autocast(device if isinstance(device, str) else device.type, dtype=torch.bfloat16):
            assert all(torch.equal(a, b) for a, b in zip(gradients(on("triton"), x, y), plain))
