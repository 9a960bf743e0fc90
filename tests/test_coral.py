"""coral: the formula, both of its ways, closed forms."""

from __future__ import annotations

import pytest
import torch
from distances import assert_equal_up_to_rounding, features, gradients

from kdkernels import coral


def formula(x, y):
    d = x.shape[-1]
    difference = torch.cov(x.T).reshape(d, d) - torch.cov(y.T).reshape(d, d)
    return difference.square().sum() / (4 * d * d)


@pytest.mark.parametrize(
    ("n", "m", "d"), [(30, 20, 5), (6, 6, 6), (7, 5, 12), (5, 9, 30), (2, 2, 1), (40, 3, 20)]
)
def test_formula(n, m, d):
    x, y = features(n, d, m=m)
    assert_equal_up_to_rounding(gradients(coral, x, y), gradients(formula, x, y), scale=4)


def test_closed_forms():
    x, _ = features(20, 6)
    scale = torch.cov(x.T).square().sum() / (4 * 36)
    torch.testing.assert_close(coral(x, 2 * x), 9 * scale)
    assert coral(x, -x) < 1e-28 and coral(x, x + 5) < 1e-28
    one = torch.tensor([[-1.0], [1.0]]).double()  # variances 2 and 8
    torch.testing.assert_close(coral(one, 2 * one), torch.tensor(9.0).double())


def test_weights_are_reliabilities():
    """C = Σ w (x − μ)(x − μ)ᵀ / (1 − Σ w²), numpy's aweights."""
    x, y = features(8, 5, m=6)
    u, v = torch.rand(8, dtype=torch.float64) + 0.2, torch.rand(6, dtype=torch.float64) + 0.2
    expected = (torch.cov(x.T, aweights=u) - torch.cov(y.T, aweights=v)).square().sum() / 100
    torch.testing.assert_close(coral(x, y, x_weights=u, y_weights=v), expected)


def test_one_sample_has_no_covariance():
    x, y = features(1, 5, m=4)
    loss, *got = gradients(coral, x, y)
    assert loss == 0 and all((g == 0).all() for g in got)


@pytest.mark.parametrize(("n", "d"), [(300, 40), (60, 200)], ids=["n > d", "n < d"])
def test_whatever_the_threads(n, d):
    x, y = (z.float() for z in features(n, d, m=n - 7))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(gradients(coral, x, y))
    finally:
        torch.set_num_threads(threads)
    for one in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(one, found[0]))
