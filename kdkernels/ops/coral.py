r"""CORAL: squared Frobenius distance of two batches' covariances (Sun & Saenko 2016, arXiv 1607.01719).

    ‖C_x − C_y‖² / (4 d²),  C with ddof 1

With A and B the centred samples over √(n − 1) (so that C_x = AᵀA), filled up to equally many rows, D = A − B and
S = A + B, the covariances are differenced first, and nothing cancels as x nears y:

    C_x − C_y = ½ (DᵀS + SᵀD)
    ‖C_x − C_y‖² = ½ (⟨DDᵀ, SSᵀ⟩ + ⟨DSᵀ, SDᵀ⟩)

The first is one product of d·d·n, taken where d ≤ n; the second needs no d×d matrix, but three of n·n·d.

Gradient: 4 A (C_x − C_y) of A, and −4 B (C_x − C_y) of B; with n < d, (S ± D)(DᵀS + SᵀD), whose inner products the
forward has. Saved: A and B, or D and S, and those products.

The products are torch's on every backend; Triton makes D and S in 2 reads of x and y, and the squares in 1 read of the
products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels.backend import LIBRARY, full_precision, launcher, resolve, statistics_dtype, unobserved
from kdkernels.ops.features import (
    FeatureLoss,
    as_problems,
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
    there, scale = _scale(x, weights)
    if isinstance(there, bool):
        there = torch.full(x.shape[:-2], there, device=x.device)
    return there, centred * scale, scale


def _scale(x: Tensor, weights: Tensor | None) -> tuple[Tensor | bool, Tensor | float]:
    """Whether there is a covariance (...,), and what of the centred samples its root is (..., n, 1)."""
    if weights is None:
        n = x.shape[-2]
        return n > 1, 1 / max(n - 1, 1) ** 0.5
    share = proportions(weights, x)
    left = 1 - share.square().sum(-1, keepdim=True)
    there = (share > 0).sum(-1) > 1
    return there, square_root(share / torch.where(there[..., None], left, 1))[..., None]


# The squared distances of the problems' covariances; then, where a gradient is needed, what it is made of: A and B as
# `needs` says and C_x − C_y, or S over D and their inner products. The weights are shares, scales and the number of the
# first sample with weight, or none.
LIBRARY.define(
    "coral(Tensor x, Tensor y, Tensor[] x_weights, Tensor[] y_weights, bool[] needs, str backend) -> Tensor[]"
)


def _outputs(x: Tensor, y: Tensor, needs: Sequence[bool]) -> tuple[list[Tensor | None], list[Tensor]]:
    """All that a kernel fills, in its order, and what of that the op returns."""
    problems, n, d = x.shape
    m, rows = y.shape[1], max(n, y.shape[1])

    def new(*shape: int) -> Tensor:
        return x.new_empty(problems, *shape, dtype=statistics_dtype(x.dtype))

    samples, loss = new(2 * rows, d), new()
    if d > rows:
        products = new(2 * rows, 2 * rows)
        returned = [samples, products] if any(needs) else []
        return [samples, products, loss, None, None, None], [loss, *returned]
    kept = [
        new(n, d) if needs[0] else None,
        new(m, d) if needs[1] else None,
        new(d, d) if any(needs) else None,
    ]
    return [samples, new(d, d), loss, *kept], [loss, *(z for z in kept if z is not None)]


def _body(x: Tensor, y: Tensor, *arguments: Any) -> list[Tensor]:  # as in the schema
    outputs, returned = _outputs(x, y, arguments[-2])
    if x.shape[0]:
        launcher(arguments[-1], "coral")(x, y, *arguments[:-2], *outputs)
    return returned


def _fake(x: Tensor, y: Tensor, *arguments: Any) -> list[Tensor]:
    return _outputs(x, y, arguments[-2])[1]


LIBRARY.impl("coral", _body, "CPU")
LIBRARY.impl("coral", _body, "CUDA")
torch.library.register_fake("kdkernels::coral", _fake, lib=LIBRARY)


def _run(
    x: Tensor,  # (..., n, d)
    y: Tensor,  # (..., m, d)
    weights: Sequence[Tensor | None],  # (..., n), (..., m)
    scales: Sequence[Tensor | float],  # (..., n, 1), (..., m, 1), or of all samples
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, list[Tensor | None]]:
    """The squared distances (...,), and what `_Coral` keeps."""
    batch, rows = x.shape[:-2], max(x.shape[-2], y.shape[-2])
    given: list[list[Tensor]] = []
    for z, weight, scale in zip((x, y), weights, scales):
        given.append([])
        if weight is not None and isinstance(scale, Tensor) and z.shape[-2]:
            first = (weight > 0).to(torch.int8).argmax(-1)
            of_samples = (
                as_problems(each, 1).contiguous() for each in (proportions(weight, z), scale[..., 0])
            )
            given[-1] = [*of_samples, first.reshape(-1)]
    a, b = (as_problems(z, 2) for z in (x, y))
    a, b = (z if z.stride(2) == 1 else z.contiguous() for z in (a, b))
    run = _body if unobserved(x) else torch.ops.kdkernels.coral
    loss, *found = run(a, b, *given, needs, backend)
    found = [z.view(*batch, *z.shape[1:]) for z in found]
    if found and x.shape[-1] > rows:
        samples, products = found
        total, difference = samples[..., :rows, :], samples[..., rows:, :]
        of_total, cross = products[..., :rows, :rows], products[..., :rows, rows:]
        return loss.view(batch), [difference, total, cross, products[..., rows:, rows:], of_total]
    each = iter(found)
    return loss.view(batch), [next(each) if need else None for need in (*needs, any(needs))]


class _Coral(torch.autograd.Function):
    """`coral_reference` without labels, whose backward takes two products (of a side) where autograd takes four. Second
    derivatives, and those of weights, go through the reference."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (..., n, d)
        y: Tensor,  # (..., m, d)
        x_weights: Tensor | None,  # (..., n)
        y_weights: Tensor | None,  # (..., m)
        backend: str,
    ) -> Tensor:  # (...,)
        dtype, d = statistics_dtype(x.dtype), x.shape[-1]
        (there_x, scale_x), (there_y, scale_y) = _scale(x, x_weights), _scale(y, y_weights)
        both = there_x & there_y
        there = (both.to(dtype) if isinstance(both, Tensor) else float(both)) / (4 * d * d)
        kept: Sequence[Tensor | None]
        with full_precision(x):
            if backend == "reference":
                a, b = (centre(z.to(dtype), w)[2] for z, w in ((x, x_weights), (y, y_weights)))
                a, b = equal_rows(a * scale_x, b * scale_y)
                difference, total = a - b, a + b
                if d <= a.shape[-2]:
                    cross = difference.mT @ total
                    covariance = 0.5 * (cross + cross.mT)
                    kept = (a, b, covariance)
                    each = covariance.square().sum((-2, -1))
                else:
                    cross = total @ difference.mT
                    grams = (difference @ difference.mT, total @ total.mT)
                    kept = (difference, total, cross, *grams)
                    each = 0.5 * (grams[0] * grams[1] + cross * cross.mT).sum((-2, -1))
            else:
                scales, needs = (scale_x, scale_y), list(ctx.needs_input_grad[:2])
                each, kept = _run(x, y, (x_weights, y_weights), scales, needs, backend)
        factors = (there, scale_x, scale_y)
        ctx.numbers = [None if isinstance(factor, Tensor) else factor for factor in factors]
        tensors = (factor if isinstance(factor, Tensor) else None for factor in factors)
        ctx.save_for_backward(x, y, x_weights, y_weights, *tensors, *kept)
        return each * there

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # (...,)
        inputs, tensors, kept = ctx.saved_tensors[:4], ctx.saved_tensors[4:7], ctx.saved_tensors[7:]
        needs = ctx.needs_input_grad[:4]
        twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if twice or needs[2] or needs[3]:

            def reference(x: Tensor, y: Tensor, u: Tensor | None, v: Tensor | None) -> Tensor:
                return coral_reference(x, y, x_weights=u, y_weights=v)

            return (*by_reference(reference, inputs, needs, grad_output, twice), None)
        there, *scales = (
            tensor if number is None else number for tensor, number in zip(tensors, ctx.numbers)
        )
        upstream = (grad_output * there)[..., None, None]
        found: list[Tensor | None] = []
        with full_precision(grad_output):
            for z, scale, need, sign in zip(inputs, scales, needs, (1, -1)):
                if not need:
                    found.append(None)
                    continue
                if len(kept) == 3:  # 4 A (C_x − C_y)
                    gradient = kept[0 if sign == 1 else 1] @ kept[2]
                    factor = upstream * (4 * sign * scale)
                else:  # (S ± D)(DᵀS + SᵀD)
                    difference, total, cross, of_difference, of_total = kept
                    factor = upstream * scale
                    if sign == 1:
                        gradient = (cross + of_difference) @ total + (of_total + cross.mT) @ difference
                    else:
                        gradient = (of_difference - cross) @ total + (cross.mT - of_total) @ difference
                gradient = gradient[..., : z.shape[-2], :] * factor
                found.append(gradient.to(z.dtype))
        return (*found, None, None, None)


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
        backend: "reference" or "triton"; None takes the best that there is (without Triton the reference's formula, its
            backward in fewer products). A named one is obeyed or raises.

    A side with fewer than two samples of weight > 0 has no covariance: that problem, or class, adds 0.

    Returns:
        (...): float32, or float64 for float64 features.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, value or name.

    Second derivatives are right.
    """
    check_features(x, y)
    runs = resolve(backend, x, "x", has=("reference", "triton"))
    x_weights = check_sample_weights(x_weights, x, "x_weights")
    y_weights = check_sample_weights(y_weights, y, "y_weights")
    labels = check_class_labels(labels, x, y)
    weighted = any(w is not None and w.requires_grad for w in (x_weights, y_weights))
    if backend == "reference" or (runs == "reference" and weighted):
        return coral_reference(x, y, x_weights=x_weights, y_weights=y_weights, labels=labels)
    if labels is None:
        return _Coral.apply(x, y, x_weights, y_weights, runs)
    (x, x_weights), (y, y_weights) = by_class(x, x_weights, labels), by_class(y, y_weights, labels)
    return _Coral.apply(x, y, x_weights, y_weights, runs).sum(-1)


class CoralLoss(FeatureLoss):
    """`coral` as a module: ``CoralLoss()(x, y)``; weights and labels are given with each call."""

    function = staticmethod(coral)
