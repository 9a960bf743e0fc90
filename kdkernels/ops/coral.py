r"""CORAL: squared Frobenius distance of two batches' covariances (Sun & Saenko 2016, arXiv 1607.01719).

    ‖C_x − C_y‖² / (4 d²),  C with ddof 1

With A and B the centred samples over √(n − 1) (so that C_x = AᵀA), filled up to equally many rows, D = A − B and
S = A + B, the covariances are differenced first, and nothing cancels as x nears y:

    C_x − C_y = ½ (DᵀS + SᵀD)
    ‖C_x − C_y‖² = ½ (⟨DDᵀ, SSᵀ⟩ + ⟨DSᵀ, SDᵀ⟩)

The first is one product of d·d·n, taken where d ≤ n; the second needs no d×d matrix, but three of n·n·d.

Gradient: 4 A (C_x − C_y) of A, and −4 B (C_x − C_y) of B; with n < d, (S ± D)(DᵀS + SᵀD), whose inner products the
forward has. With Triton the products are torch's: kernels make D and S in 2 reads of x and y, and the squares in 1 read
of the products.

Saved by the native form: the inputs, and the gradient that the forward already computed. Memory beyond the gradients:
D and S, and d×d or n×n products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.backend import full_precision, resolve, statistics_dtype
from kdkernels.ops.features import (
    FeatureLoss,
    by_class,
    centre,
    check_class_labels,
    check_features,
    check_sample_weights,
    proportions,
    square_root,
)
from kdkernels.ops.gaussian import equal_rows
from kdkernels.ops.native_distance import native_distance


def coral_reference(
    x: Tensor,  # (..., n, d)
    y: Tensor,  # (..., m, d)
    *,
    x_weights: Tensor | None = None,  # (..., n)
    y_weights: Tensor | None = None,  # (..., m)
    labels: Tensor | None = None,  # (..., n)
) -> Tensor:
    """The specification of `coral`: plain PyTorch, on any device, with any derivative. Arguments are taken as they
    come."""
    x, y = (z.to(statistics_dtype(z.dtype)) for z in (x, y))
    if labels is not None:
        (x, x_weights), (y, y_weights) = by_class(x, x_weights, labels), by_class(y, y_weights, labels)
    (there_x, a), (there_y, b) = _unbiased_root(x, x_weights), _unbiased_root(y, y_weights)
    a, b = equal_rows(a, b)
    difference, total = a - b, a + b
    rows, d = a.shape[-2:]
    with full_precision(x):
        if d <= rows:
            cross = difference.mT @ total
            each = 0.25 * (cross + cross.mT).square().sum((-2, -1))
        else:
            cross = difference @ total.mT
            grams = (difference @ difference.mT) * (total @ total.mT)
            each = 0.5 * (grams + cross * cross.mT).sum((-2, -1))
    each = torch.where(there_x & there_y, each, 0) / (4 * d * d)
    return each if labels is None else each.sum(-1)


def _unbiased_root(x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Whether there is a covariance (...,), and the A (..., n, d) whose AᵀA is it, Σ w (x − μ)(x − μ)ᵀ / (1 − Σ w²)."""
    _, _, centred = centre(x, weights)
    if weights is None:
        n = x.shape[-2]
        scale = 1 / max(n - 1, 1) ** 0.5
        return torch.full(x.shape[:-2], n > 1, device=x.device), centred * scale
    share = proportions(weights, x)
    left = 1 - share.square().sum(-1, keepdim=True)
    there = (share > 0).sum(-1) > 1
    scales = square_root(share / torch.where(there[..., None], left, 1))[..., None]
    return there, centred * scales


def _by_position(
    x: Tensor, y: Tensor, x_weights: Tensor | None, y_weights: Tensor | None, labels: Tensor | None
) -> Tensor:
    return coral_reference(x, y, x_weights=x_weights, y_weights=y_weights, labels=labels)


_native = native_distance("coral", "", _by_position, ("CPU", "CUDA"))


def coral(
    x: Tensor,
    y: Tensor,
    *,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    labels: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""CORAL, ‖C_x − C_y‖²_F / (4 d²) with the batches' covariances C (ddof 1); Sun & Saenko 2016, arXiv 1607.01719.

    Exactly 0 with gradient 0 where x equals y. No d×d matrix where max(n, m) < d.

    Args:
        x: (..., n, d) features: float32, float16, bfloat16, float64. Leading dimensions are independent problems.
        y: (..., m, d) features of the same dtype and device. Gradients go to x and y.
        x_weights, y_weights: floating (..., n) and (..., m), ≥ 0, in any scale: C = Σ w (x − μ)(x − μ)ᵀ / (1 − Σ w²)
            for weights that add up to 1, which is ddof 1 where they are equal. Differentiable (a weight of exactly 0
            has gradient 0). Values are checked on the CPU only.
        labels: integers (..., n), x and y being the same samples through two networks (n = m): the **sum** over the
            classes present of each class's distance. (A GPU is waited for, to know the classes' sizes.)
        backend: "reference", "cpu" or "triton"; None takes the best that there is. A named one is obeyed or raises.

    A side with fewer than two samples of weight > 0 has no covariance: that problem, or class, adds 0.

    Returns:
        (...): float32, or float64 for float64 features.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, value or name.

    Second derivatives are right.
    """
    check_features(x, y)
    backend = resolve(backend, x, "x", has=("reference", "cpu", "triton"))
    x_weights = check_sample_weights(x_weights, x, "x_weights")
    y_weights = check_sample_weights(y_weights, y, "y_weights")
    labels = check_class_labels(labels, x, y)
    if backend == "reference":
        return coral_reference(x, y, x_weights=x_weights, y_weights=y_weights, labels=labels)
    if backend == "triton" and labels is not None:
        (x, x_weights), (y, y_weights) = by_class(x, x_weights, labels), by_class(y, y_weights, labels)
        return _native(x, y, x_weights, y_weights, None, (), backend).sum(-1)
    return _native(x, y, x_weights, y_weights, labels, (), backend)


class CoralLoss(FeatureLoss):
    """`coral` as a module: ``CoralLoss()(x, y)``; weights and labels are given with each call."""

    function = staticmethod(coral)
