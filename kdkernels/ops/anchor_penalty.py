r"""How far parameters are from where they started: Σ ‖θ − θ⁰‖² (ATSC, arXiv 2406.08528, keeps its teacher there).

Gradient: 2 (θ − θ⁰), and its negative for an anchor that requires it. Both directions are a few multi-tensor launches
for each device and dtype, however many the parameters are. Saved: the parameters and anchors themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdkernels.backend import statistics_dtype
from kdkernels.ops.rows import kind_of


def anchor_penalty_reference(
    parameters: Iterable[Tensor], anchors: Iterable[Tensor], *, min_dim: int = 0
) -> Tensor:
    """The specification of `anchor_penalty`: plain PyTorch, with any derivative. Arguments are taken as they come."""
    pairs = [(theta, anchor) for theta, anchor in zip(parameters, anchors) if theta.dim() >= min_dim]
    if not pairs:
        return torch.zeros(())
    each = [(theta.to(_dtype(theta, anchor)) - anchor).square().sum() for theta, anchor in pairs]
    return torch.stack([x.to(each[0].device, torch.result_type(x, _widest(pairs))) for x in each]).sum()


def _dtype(theta: Tensor, anchor: Tensor) -> torch.dtype:
    return statistics_dtype(torch.promote_types(theta.dtype, anchor.dtype))


def _widest(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    wide = any(_dtype(*pair) == torch.float64 for pair in pairs)
    return torch.zeros((), dtype=torch.float64 if wide else torch.float32)


def _differences(
    parameters: Sequence[Tensor], anchors: Sequence[Tensor]
) -> list[tuple[list[int], list[Tensor]]]:
    """θ − θ⁰ in the statistics' dtype, by device and dtype: (their places, the differences)."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, (theta, anchor) in enumerate(zip(parameters, anchors)):
        groups.setdefault((theta.device, _dtype(theta, anchor)), []).append(i)
    return [
        (
            places,
            list(
                torch._foreach_sub(
                    [parameters[i].to(dtype) for i in places], [anchors[i].to(dtype) for i in places]
                )
            ),
        )
        for (_, dtype), places in groups.items()
    ]


class _AnchorPenalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.count = count
        totals = [
            torch.stack(torch._foreach_norm(differences)).square().sum()
            for _, differences in _differences(tensors[:count], tensors[count:])
        ]
        if len(totals) == 1:
            return totals[0]
        wide = torch.float64 if any(x.dtype == torch.float64 for x in totals) else torch.float32
        return torch.stack([x.to(totals[0].device, wide) for x in totals]).sum()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # ()
        count = ctx.count
        parameters, anchors = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        needs = ctx.needs_input_grad[1:]
        found: list[Tensor | None] = [None] * (2 * count)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            for i, (theta, anchor) in enumerate(zip(parameters, anchors)):
                dtype = _dtype(theta, anchor)
                each = 2 * grad_output.to(theta.device, dtype) * (theta.to(dtype) - anchor.to(dtype))
                found[i] = each.to(theta.dtype)
                found[count + i] = -each.to(anchor.dtype)
        else:
            for places, differences in _differences(parameters, anchors):
                torch._foreach_mul_(
                    differences, 2 * grad_output.to(differences[0].device, differences[0].dtype)
                )
                for i, each in zip(places, differences):
                    if needs[count + i]:
                        found[count + i] = -each.to(anchors[i].dtype)
                    found[i] = each.to(parameters[i].dtype)
        return (None, *(x if need else None for x, need in zip(found, needs)))


def anchor_penalty(
    parameters: Iterable[Tensor],
    anchors: Iterable[Tensor],
    *,
    min_dim: int = 0,
    backend: str | None = None,
) -> Tensor:
    r"""Σ ‖θ − θ⁰‖² over parameters and their anchors, summed (not averaged) over every element.

    Args:
        parameters: tensors of any shapes and floating dtypes, on any devices.
        anchors: as many, of the same shapes, each on its parameter's device; of any floating dtype (float32 anchors of
            bfloat16 parameters are well kept). Gradients go to parameters and anchors that require it.
        min_dim: take only parameters with at least so many dimensions: 2 leaves biases and normalisations free, as
            ATSC (arXiv 2406.08528) does.
        backend: "reference" or None.

    Returns:
        (), on the first parameter's device: float32, or float64 where a pair has float64. 0 of no parameter.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: parameters and anchors that do not match.

    Second derivatives are right.

    >>> anchors = [p.detach().clone() for p in teacher.parameters()]
    >>> loss = mse + 10 * kdkernels.anchor_penalty(teacher.parameters(), anchors, min_dim=2)
    """
    if backend not in (None, "reference"):
        raise ValueError(f"anchor_penalty has only the backend reference, got {backend!r}")
    if isinstance(min_dim, bool) or not isinstance(min_dim, int):
        raise TypeError(f"min_dim must be an int, got {kind_of(min_dim)}")
    every = []
    for name, side in (("parameters", parameters), ("anchors", anchors)):
        if isinstance(side, Tensor):
            raise TypeError(f"{name} must be several tensors, got {kind_of(side)}")
        side = list(side)
        for value in side:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                raise TypeError(f"{name} must be floating tensors, got {kind_of(value)}")
        every.append(side)
    if len(every[0]) != len(every[1]):
        raise ValueError(
            f"there must be an anchor for each of {len(every[0])} parameters, got {len(every[1])}"
        )
    for i, (theta, anchor) in enumerate(zip(*every)):
        if theta.shape != anchor.shape or theta.device != anchor.device:
            raise ValueError(
                f"anchor {i} must have its parameter's shape {tuple(theta.shape)} and device {theta.device}, got "
                f"{tuple(anchor.shape)} on {anchor.device}"
            )
    if backend == "reference":
        return anchor_penalty_reference(*every, min_dim=min_dim)
    pairs = [(theta, anchor) for theta, anchor in zip(*every) if theta.dim() >= min_dim]
    if not pairs:
        return torch.zeros(())
    return _AnchorPenalty.apply(len(pairs), *(theta for theta, _ in pairs), *(anchor for _, anchor in pairs))


class AnchorPenaltyLoss(nn.Module):
    """`anchor_penalty` as a module that holds the anchors: copies of the parameters it is made from, as buffers.

    >>> penalty = kdkernels.AnchorPenaltyLoss(teacher.parameters(), min_dim=2)
    >>> loss = mse + 10 * penalty(teacher.parameters())
    """

    def __init__(self, parameters: Iterable[Tensor], *, min_dim: int = 0, backend: str | None = None) -> None:
        super().__init__()
        self.min_dim, self.backend = min_dim, backend
        self.count = 0
        for theta in parameters:
            self.register_buffer(f"anchor_{self.count}", theta.detach().clone())
            self.count += 1

    def forward(self, parameters: Iterable[Tensor]) -> Tensor:
        anchors = [getattr(self, f"anchor_{i}") for i in range(self.count)]
        return anchor_penalty(parameters, anchors, min_dim=self.min_dim, backend=self.backend)

    def extra_repr(self) -> str:
        return f"{self.count} anchors, min_dim={self.min_dim}"
