r"""CORAL: squared Frobenius distance of two batches' covariances (Sun & Saenko 2016, arXiv 1607.01719).

    ‖C_x − C_y‖² / (4 d²),  C with ddof 1

With A and B the centred samples over √(n − 1) (so that C_x = AᵀA), filled up to equally many rows, D = A − B and
S = A + B, the covariances are differenced first, and nothing cancels as x nears y:

    C_x − C_y = ½ (DᵀS + SᵀD)
    ‖C_x − C_y‖² = ½ (⟨DDᵀ, SSᵀ⟩ + ⟨DSᵀ, SDᵀ⟩)

The first is one product of d·d·n, taken where d ≤ n; the second needs no d×d matrix, but three of n·n·d.

Gradient: 4 A (C_x − C_y) of A, and −4 B (C_x − C_y) of B; with n < d, (S ± D)(DᵀS + SᵀD), whose inner products the
forward has. Saved: A and B, or D and S, and those products.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdkernels.backend import full_precision, resolve, statistics_dtype
from kdkernels.ops.features import (
    FeatureLoss,
    by_class,
    by_reference,
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
    (there_x, a, _), (there_y, b, _) = _unbiased_root(x, x_weights), _unbiased_root(y, y_weights)
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


def _unbiased_root(x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor | float]:
    """Whether there is a covariance (...,), the A (..., n, d) whose AᵀA is it, Σ w (x − μ)(x − μ)ᵀ / (1 − Σ w²), and
    what of the centred samples A is (..., n, 1)."""
    _, _, centred = centre(x, weights)
    if weights is None:
        n = x.shape[-2]
        scale = 1 / max(n - 1, 1) ** 0.5
        return torch.full(x.shape[:-2], n > 1, device=x.device), centred * scale, scale
    share = proportions(weights, x)
    left = 1 - share.square().sum(-1, keepdim=True)
    there = (share > 0).sum(-1) > 1
    scales = square_root(share / torch.where(there[..., None], left, 1))[..., None]
    return there, centred * scales, scales


class _Coral(torch.autograd.Function):
    """`coral_reference` without labels and without gradients of the weights, whose backward takes two products (of a
    side) where autograd takes four."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (..., n, d)
        y: Tensor,  # (..., m, d)
        x_weights: Tensor | None,  # (..., n)
        y_weights: Tensor | None,  # (..., m)
    ) -> Tensor:  # (...,)
        dtype = statistics_dtype(x.dtype)
        there_x, a, scale_x = _unbiased_root(x.to(dtype), x_weights)
        there_y, b, scale_y = _unbiased_root(y.to(dtype), y_weights)
        a, b = equal_rows(a, b)
        difference, total = a - b, a + b
        rows, d = a.shape[-2:]
        there = (there_x & there_y).to(dtype) / (4 * d * d)
        kept: tuple[Tensor, ...]
        with full_precision(x):
            if d <= rows:
                cross = difference.mT @ total
                kept = (a, b, 0.5 * (cross + cross.mT))
                each = kept[2].square().sum((-2, -1))
            else:
                cross = total @ difference.mT
                grams = (difference @ difference.mT, total @ total.mT)
                kept = (difference, total, cross, *grams)
                each = 0.5 * (grams[0] * grams[1] + cross * cross.mT).sum((-2, -1))
        scales = [torch.as_tensor(scale, dtype=dtype, device=x.device) for scale in (scale_x, scale_y)]
        ctx.save_for_backward(x, y, x_weights, y_weights, there, *scales, *kept)
        return each * there

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # (...,)
        x, y, x_weights, y_weights, there, scale_x, scale_y, *kept = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            reference = partial(coral_reference, x_weights=x_weights, y_weights=y_weights)
            return (*by_reference(reference, (x, y), needs, grad_output, True), None, None)
        upstream = (grad_output * there)[..., None, None]
        found: list[Tensor | None] = []
        with full_precision(x):
            for z, scale, need, sign in ((x, scale_x, needs[0], 1), (y, scale_y, needs[1], -1)):
                if not need:
                    found.append(None)
                    continue
                factor = upstream * scale
                if len(kept) == 3:  # 4 A (C_x − C_y)
                    gradient = kept[0 if sign == 1 else 1] @ kept[2]
                    factor = 4 * sign * factor
                else:  # (S ± D)(DᵀS + SᵀD)
                    difference, total, cross, of_difference, of_total = kept
                    if sign == 1:
                        gradient = (cross + of_difference) @ total + (of_total + cross.mT) @ difference
                    else:
                        gradient = (of_difference - cross) @ total + (cross.mT - of_total) @ difference
                gradient = gradient[..., : z.shape[-2], :] * factor
                found.append(gradient.to(z.dtype))
        return (*found, None, None)


def _by_position(
    x: Tensor, y: Tensor, x_weights: Tensor | None, y_weights: Tensor | None, labels: Tensor | None
) -> Tensor:
    return coral_reference(x, y, x_weights=x_weights, y_weights=y_weights, labels=labels)


_native = native_distance("coral", "", _by_position)


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
        backend: "reference" or "cpu"; None takes the best that there is. A named one is obeyed or raises.

    A side with fewer than two samples of weight > 0 has no covariance: that problem, or class, adds 0.

    Returns:
        (...): float32, or float64 for float64 features.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, value or name.

    Second derivatives are right.
    """
    check_features(x, y)
    chosen = resolve(backend, x, "x", has=("reference", "cpu"))
    x_weights = check_sample_weights(x_weights, x, "x_weights")
    y_weights = check_sample_weights(y_weights, y, "y_weights")
    labels = check_class_labels(labels, x, y)
    if chosen != "reference":
        return _native(x, y, x_weights, y_weights, labels, (), chosen)
    if backend == "reference" or any(w is not None and w.requires_grad for w in (x_weights, y_weights)):
        return coral_reference(x, y, x_weights=x_weights, y_weights=y_weights, labels=labels)
    if labels is None:
        return _Coral.apply(x, y, x_weights, y_weights)
    (x, x_weights), (y, y_weights) = by_class(x, x_weights, labels), by_class(y, y_weights, labels)
    return _Coral.apply(x, y, x_weights, y_weights).sum(-1)


class CoralLoss(FeatureLoss):
    """`coral` as a module: ``CoralLoss()(x, y)``; weights and labels are given with each call."""

    function = staticmethod(coral)
