r"""Sliced Wasserstein distance (Bonneel et al. 2015): the mean over L directions θ of the 1-D transport costs of x·θ
and y·θ, Σ γ |x·θ − y·θ|ᵖ, which sorting solves.

Equal weights and n = m:  1/(L n) Σ_l Σ_i |a_(i) − b_(i)|ᵖ  with a and b the sorted projections. Otherwise the quantile
functions are merged: between two neighbouring levels of either, one pair of samples meets, with the levels' difference
as its mass.

Gradient: of the projections, p |a − b|^(p−1) sign(a − b) times the mass, 0 where a = b (at p = 1 too); then one product
with the directions.

Saved by the native form: the projections and their gradients, made while the sorted rows were at hand. Second
derivatives, and those of weights, go through the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdkernels.backend import LIBRARY, full_precision, launcher, resolve, statistics_dtype, unobserved
from kdkernels.ops.features import (
    FeatureLoss,
    as_problems,
    by_reference,
    check_features,
    check_order,
    check_sample_weights,
    proportions,
)
from kdkernels.ops.native_distance import fill
from kdkernels.ops.rows import kind_of


def sliced_wasserstein_reference(
    x: Tensor,  # (..., n, d)
    y: Tensor,  # (..., m, d)
    *,
    directions: Tensor,  # (L, d)
    p: float = 2,
    x_weights: Tensor | None = None,  # (..., n)
    y_weights: Tensor | None = None,  # (..., m)
) -> Tensor:
    """The specification of `sliced_wasserstein`, given the directions: plain PyTorch, on any device, with any
    derivative."""
    a, b = project(x, directions), project(y, directions)
    return sorted_cost_reference(a, b, x_weights, y_weights, p).mean(-1)


def project(x: Tensor, directions: Tensor) -> Tensor:  # (..., n, d), (L, d) -> (..., L, n)
    with full_precision(x):
        return directions @ x.to(directions.dtype).mT


def sorted_cost_reference(
    a: Tensor,  # (..., L, n)
    b: Tensor,  # (..., L, m)
    a_weights: Tensor | None,  # (..., n)
    b_weights: Tensor | None,  # (..., m)
    p: float,
) -> Tensor:  # (..., L)
    """1-D transport costs. A problem without weight on either side is 0."""
    (a, a_order), (b, b_order) = a.sort(dim=-1, stable=True), b.sort(dim=-1, stable=True)
    n, m = a.shape[-1], b.shape[-1]
    if n == 0 or m == 0:
        return a.sum(-1) * 0 + b.sum(-1) * 0
    if n == m and a_weights is None and b_weights is None:
        return power(a - b, p).mean(-1)
    levels_a, levels_b = (
        _levels(weights, z, order) for weights, z, order in ((a_weights, a, a_order), (b_weights, b, b_order))
    )
    levels = torch.cat((levels_a, levels_b), -1).sort(-1).values
    mass = torch.diff(levels, prepend=torch.zeros_like(levels[..., :1]))
    at_a, at_b = (
        torch.searchsorted(own.detach().contiguous(), levels.detach()).clamp(max=own.shape[-1] - 1)
        for own in (levels_a, levels_b)
    )
    cost = (mass * power(a.gather(-1, at_a) - b.gather(-1, at_b), p)).sum(-1)
    there = (levels_a[..., -1] > 0) & (levels_b[..., -1] > 0)
    return torch.where(there, cost, 0)


def _levels(weights: Tensor | None, z: Tensor, order: Tensor) -> Tensor:  # (..., L, n)
    """Of each sorted sample, which share of the mass lies up to it."""
    n = z.shape[-1]
    if weights is None:
        return (torch.arange(1, n + 1, dtype=z.dtype, device=z.device) / n).expand(z.shape)
    share = proportions(weights, z.mT)
    return share.unsqueeze(-2).expand(z.shape).gather(-1, order).cumsum(-1)


def power(difference: Tensor, p: float) -> Tensor:
    """|difference|ᵖ, with gradient 0 where it is 0."""
    return difference.square() if p == 2 else difference.abs() if p == 1 else difference.abs().pow(p)


_INPUTS = "Tensor a, Tensor b, Tensor? a_weights, Tensor? b_weights, float p, bool[] needs, str backend"
# The rows' costs, then their gradients by a and b where `needs` asks for them.
LIBRARY.define(f"sliced_wasserstein({_INPUTS}) -> Tensor[]")


def _outputs(a: Tensor, b: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    return [
        torch.empty(a.shape[:2], dtype=a.dtype, device=a.device),
        torch.empty_like(a) if needs[0] else None,
        torch.empty_like(b) if needs[1] else None,
    ]


def _body(a: Tensor, b: Tensor, *arguments: Any) -> list[Tensor]:  # as in _INPUTS
    outputs = _outputs(a, b, arguments[-2])
    fill(outputs, launcher(arguments[-1], "sliced_wasserstein"), a, b, *arguments[:-2])
    return [output for output in outputs if output is not None]


def _fake(a: Tensor, b: Tensor, *arguments: Any) -> list[Tensor]:
    return [output for output in _outputs(a, b, arguments[-2]) if output is not None]


LIBRARY.impl("sliced_wasserstein", _body, "CPU")
LIBRARY.impl("sliced_wasserstein", _body, "CUDA")
torch.library.register_fake("kdkernels::sliced_wasserstein", _fake, lib=LIBRARY)


class _SortedCost(torch.autograd.Function):
    """`sorted_cost_reference` of (B, L, n) and (B, L, m), by a kernel that makes the gradients with the costs."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,  # (B, L, n)
        b: Tensor,  # (B, L, m)
        a_weights: Tensor | None,  # (B, n)
        b_weights: Tensor | None,  # (B, m)
        p: float,
        backend: str,
    ) -> Tensor:  # (B, L)
        needs = list(ctx.needs_input_grad[:2])
        run = _body if unobserved(a) else torch.ops.kdkernels.sliced_wasserstein
        cost, *gradients = run(a, b, a_weights, b_weights, p, needs, backend)
        ctx.p = p
        ctx.save_for_backward(a, b, a_weights, b_weights, *gradients)
        return cost

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # (B, L)
        inputs, gradients = ctx.saved_tensors[:4], list(ctx.saved_tensors[4:])
        needs = ctx.needs_input_grad[:4]
        twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if twice or needs[2] or needs[3]:
            found = by_reference(partial(sorted_cost_reference, p=ctx.p), inputs, needs, grad_output, twice)
            return (*found, None, None)
        each = (gradients.pop(0) * grad_output[..., None] if need else None for need in needs[:2])
        return (*each, None, None, None, None)


def draw_directions(
    projections: int, d: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
) -> Tensor:  # (projections, d)
    """Uniform on the sphere, the same ones for every dtype."""
    source = device if generator is None else generator.device
    drawn = torch.randn(projections, d, dtype=torch.float32, device=source, generator=generator)
    drawn = drawn.to(device, dtype)
    return drawn / drawn.norm(dim=-1, keepdim=True)


def sliced_wasserstein(
    x: Tensor,
    y: Tensor,
    *,
    projections: int | Tensor = 128,
    p: float = 2,
    generator: torch.Generator | None = None,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Sliced Wasserstein distance to the power p: the mean over random directions of 1-D transport costs; no root.

    Args:
        x: (..., n, d) features: float32, float16, bfloat16, float64. Leading dimensions are independent problems,
            which share the directions.
        y: (..., m, d) features of the same dtype and device. Gradients go to x and y.
        projections: how many directions are drawn, uniformly on the sphere; or the directions themselves, (L, d) with
            rows of length 1, differentiable.
        p: ≥ 1. The gradient at ties is 0, at p = 1 too.
        generator: draws the directions, on its own device; None is torch's generator of x's device.
        x_weights, y_weights: floating (..., n) and (..., m), ≥ 0: what each sample counts for, in any scale;
            differentiable. Values are checked on the CPU only. A problem whose weights are all 0 on either side, or
            that has no samples, is 0.
        backend: "reference", "cpu" or "triton"; None takes the best that there is. A named one is obeyed or raises.

    Returns:
        (...): float32, or float64 for float64 features; exactly 0 with gradient 0 where x equals y.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, value or name.

    Second derivatives are right (the order of the samples is locally constant).
    """
    check_features(x, y)
    p = check_order(p)
    dtype = statistics_dtype(x.dtype)
    if isinstance(projections, Tensor):
        if not projections.is_floating_point():
            raise TypeError(f"projections must be a number or a floating tensor, got {kind_of(projections)}")
        if projections.dim() != 2 or projections.shape[0] == 0 or projections.shape[1] != x.shape[-1]:
            raise ValueError(
                f"projections must be (L, d) with L >= 1 and d = {x.shape[-1]}, got {tuple(projections.shape)}"
            )
        if projections.device != x.device:
            raise ValueError(f"projections must be on x's device {x.device}, got {projections.device}")
        directions = projections.to(dtype)
    else:
        if isinstance(projections, bool) or not isinstance(projections, int):
            raise TypeError(f"projections must be a number or a floating tensor, got {kind_of(projections)}")
        if projections < 1:
            raise ValueError(f"projections must be at least 1, got {projections}")
        directions = draw_directions(projections, x.shape[-1], dtype, x.device, generator)
    backend = resolve(backend, x, "x", has=("reference", "cpu", "triton"))
    x_weights = check_sample_weights(x_weights, x, "x_weights")
    y_weights = check_sample_weights(y_weights, y, "y_weights")
    if backend == "reference":
        return sliced_wasserstein_reference(
            x, y, directions=directions, p=p, x_weights=x_weights, y_weights=y_weights
        )
    weights = (None if w is None else as_problems(w, 1).contiguous() for w in (x_weights, y_weights))
    a, b = (project(as_problems(z, 2), directions).contiguous() for z in (x, y))
    return _SortedCost.apply(a, b, *weights, p, backend).mean(-1).reshape(x.shape[:-2])


class SlicedWassersteinLoss(FeatureLoss):
    """`sliced_wasserstein` as a module: ``SlicedWassersteinLoss(projections=64)(x, y)``; weights are given with each
    call."""

    function = staticmethod(sliced_wasserstein)
