"""What every distance of two batches of features shares: the checks of its arguments, samples' weights, classes.

A batch is x (..., n, d): n samples of d features each; the leading dimensions are independent problems.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from kdkernels.backend import statistics_dtype
from kdkernels.ops.module import LossModule
from kdkernels.ops.rows import kind_of

COVARIANCES = ("diagonal", "full")


def check_features(x: Any, y: Any, *, equal_width: bool = True) -> None:
    # In one expression: of a small batch's call the checks are a good part.
    if not (
        isinstance(x, Tensor)
        and isinstance(y, Tensor)
        and len(of_x := x.shape) > 1
        and len(of_y := y.shape) > 1
        and of_x[-1]
        and of_y[-1]
        and of_x[:-2] == of_y[:-2]
        and (of_x[-1] == of_y[-1] or not equal_width)
        and x.dtype == y.dtype
        and x.device == y.device
    ):
        _refuse_features(x, y, equal_width)


def _refuse_features(x: Any, y: Any, equal_width: bool) -> NoReturn:
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor of features, got {kind_of(value)}")
        if value.dim() < 2 or value.shape[-1] == 0:
            raise ValueError(f"{name} must have shape (..., n, d) with d >= 1, got {tuple(value.shape)}")
    if x.shape[:-2] != y.shape[:-2] or (equal_width and x.shape[-1] != y.shape[-1]):
        same = "batch dimensions and d" if equal_width else "batch dimensions"
        raise ValueError(
            f"x and y must have the same {same}, got x {tuple(x.shape)} and y {tuple(y.shape)}"
            + (" (a student of another width needs a projection first)" if equal_width else "")
        )
    if y.dtype != x.dtype:
        raise TypeError(f"y must have x's dtype {x.dtype}, got {y.dtype}")
    raise ValueError(f"y must be on x's device {x.device}, got {y.device}")


def check_sample_weights(weights: Any, x: Tensor, name: str) -> Tensor | None:  # (..., n)
    """In the statistics' dtype, expanded to x's samples. Values are looked at on the CPU only."""
    if weights is None:
        return None
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor, got {kind_of(weights)}")
    if weights.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, got {weights.device}")
    samples = x.shape[:-1]
    if weights.dim() == 0 or weights.shape[-1] != samples[-1] or weights.dim() > len(samples):
        raise ValueError(
            f"{name} must have the shape of the samples {tuple(samples)}, got {tuple(weights.shape)}"
        )
    if any(have not in (1, want) for have, want in zip(reversed(weights.shape), reversed(samples))):
        raise ValueError(
            f"{name} must have the shape of the samples {tuple(samples)}, got {tuple(weights.shape)}"
        )
    if weights.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = weights.detach()[~((weights >= 0) & (weights < math.inf))]
        if bad.numel():
            raise ValueError(f"{name} must be finite and not negative, got {bad[0].item()}")
    return weights.to(statistics_dtype(x.dtype)).expand(samples)


def check_class_labels(labels: Any, x: Tensor, y: Tensor) -> Tensor | None:  # (..., n)
    if labels is None:
        return None
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be an integer tensor, got {kind_of(labels)}")
    if x.shape[-2] != y.shape[-2]:
        raise ValueError(
            f"labels are those of x and of y: both must have the same samples, got n {x.shape[-2]} and m {y.shape[-2]}"
        )
    if labels.shape != x.shape[:-1]:
        raise ValueError(
            f"labels must have the shape of the samples {tuple(x.shape[:-1])}, got {tuple(labels.shape)}"
        )
    if labels.device != x.device:
        raise ValueError(f"labels must be on x's device {x.device}, got {labels.device}")
    return labels


def check_choice(value: Any, name: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_order(p: Any) -> float:
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(f"p must be a float, got {kind_of(p)}")
    if not 1 <= p < math.inf:
        raise ValueError(f"p must be finite and at least 1, got {p}")
    return float(p)


def check_at_least(value: Any, name: str, least: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {kind_of(value)}")
    if not least <= value < math.inf:
        raise ValueError(f"{name} must be finite and at least {least}, got {value}")


def proportions(weights: Tensor | None, x: Tensor) -> Tensor:  # (..., n), adding up to 1
    """What each sample counts for. Zeros where no sample of a problem has weight."""
    if weights is None:
        n = x.shape[-2]
        return torch.full(x.shape[:-1], 1 / max(n, 1), dtype=statistics_dtype(x.dtype), device=x.device)
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total > 0, total, 1)


def square_root(value: Tensor) -> Tensor:
    """√value, with gradient 0 where it is 0."""
    positive = ~(value <= 0)  # NaN is NaN
    return torch.where(positive, torch.where(positive, value, 1).sqrt(), 0)


def segments(labels: Tensor) -> Tensor:  # (..., n) -> (..., n) int64 in [0, n)
    """The labels numbered from 0 in their order, without a wait for a device."""
    ordered, order = labels.sort(dim=-1, stable=True)
    numbers = torch.zeros_like(ordered, dtype=torch.int64)
    numbers[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    return torch.empty_like(numbers).scatter_(-1, order, numbers.cumsum(-1))


def centre(x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Whether there is a sample with weight (...,), the mean (..., d) and x − mean (..., n, d)."""
    if x.shape[-2] == 0:
        return torch.zeros(x.shape[:-2], dtype=torch.bool, device=x.device), x.sum(-2), x
    # From the first sample that has weight, so that what is constant is exactly 0.
    if weights is None:
        there = torch.ones(x.shape[:-2], dtype=torch.bool, device=x.device)
        origin = x[..., :1, :].detach()
        moved = x - origin
        shift = moved.mean(-2, keepdim=True)
    else:
        share = proportions(weights, x)
        there = (share > 0).any(-1)
        first = (weights > 0).to(torch.int8).argmax(-1)[..., None, None].expand(*x.shape[:-2], 1, x.shape[-1])
        origin = x.detach().gather(-2, first)
        moved = x - origin
        shift = (share[..., None] * moved).sum(-2, keepdim=True)
    return there, (origin + shift).squeeze(-2), moved - shift


def moments(
    x: Tensor,  # (..., n, d)
    weights: Tensor | None,  # (..., n)
    labels: Tensor | None,  # (..., n)
) -> tuple[Tensor, Tensor, Tensor]:
    """(weight, mean, variance) of each segment: (..., S), (..., S, d), (..., S, d), with ddof 0.

    S is 1 without labels, else n: the number of classes is not known without a wait; those beyond it have weight 0.
    """
    if labels is None:
        there, mean, centred = centre(x, weights)
        variance = (proportions(weights, x)[..., None] * centred.square()).sum(-2, keepdim=True)
        return there.to(x.dtype)[..., None], mean[..., None, :], variance
    *batch, n, d = x.shape
    problems = math.prod(batch)
    number = segments(labels).reshape(problems, n)
    number = (number + n * torch.arange(problems, device=x.device)[:, None]).reshape(-1)
    if weights is None:
        weights = torch.ones(x.shape[:-1], dtype=x.dtype, device=x.device)
    x, weights = x.reshape(-1, d), weights.reshape(-1)
    total = torch.zeros_like(weights).index_add(0, number, weights)
    share = (weights / torch.where(total > 0, total, 1)[number])[:, None]
    # From the first sample that has weight, so that what is constant has exactly no variance.
    place = torch.where(weights > 0, torch.arange(len(x), device=x.device), len(x))
    first = (
        torch.full_like(number, len(x)).scatter_reduce(0, number, place, "amin").clamp(max=max(len(x) - 1, 0))
    )
    origin = x.detach()[first]
    moved = x - origin[number]
    shift = torch.zeros_like(x).index_add(0, number, share * moved)
    variance = torch.zeros_like(x).index_add(0, number, share * (moved - shift[number]).square())
    mean = origin + shift
    return total.reshape(*batch, n), mean.reshape(*batch, n, d), variance.reshape(*batch, n, d)


def sizes(labels: Tensor, weights: Tensor | None) -> Tensor:  # (..., n) -> (..., n)
    """How many samples that have weight each segment has."""
    number = segments(labels)
    counted = torch.ones_like(number) if weights is None else (weights > 0).long()
    return torch.zeros_like(number).scatter_add(-1, number, counted)


def by_class(
    x: Tensor,  # (..., n, d)
    weights: Tensor | None,  # (..., n)
    labels: Tensor,  # (..., n)
) -> tuple[Tensor, Tensor]:
    """Each class as a problem of its own, filled up with samples of weight 0: (..., S, L, d) and (..., S, L).

    How many classes there are (S), and samples in the largest (L), is a size of the result: a GPU is waited for.
    """
    *batch, n, d = x.shape
    if weights is None:
        weights = torch.ones(x.shape[:-1], dtype=statistics_dtype(x.dtype), device=x.device)
    if x.shape[:-1].numel() == 0:
        return x.unsqueeze(-3), weights.unsqueeze(-2)
    ordered, order = segments(labels).reshape(-1, n).sort(dim=-1, stable=True)
    place = torch.arange(n, device=x.device).expand_as(ordered)
    first = torch.zeros_like(ordered).scatter_reduce(-1, ordered, place, "amin", include_self=False)
    place = place - first.gather(-1, ordered)
    classes, largest = int(ordered.max()) + 1, int(place.max()) + 1
    sample = torch.full((ordered.shape[0], classes * largest), n, device=x.device)
    sample.scatter_(-1, ordered * largest + place, order)
    there, sample = sample < n, sample.clamp(max=n - 1)
    weights = torch.where(there, weights.reshape(-1, n).gather(-1, sample), 0)
    x = x.reshape(-1, n, d).gather(-2, sample[..., None].expand(-1, -1, d))
    return x.reshape(*batch, classes, largest, d), weights.reshape(*batch, classes, largest)


def as_problems(x: Tensor, trailing: int) -> Tensor:
    """The batch dimensions, which are all but the last `trailing`, as one."""
    batch = x.dim() - trailing
    return x.reshape(math.prod(x.shape[:batch]), *x.shape[batch:])


def by_reference(
    reference: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    grad_output: Tensor,
    twice: bool,
) -> tuple[Tensor | None, ...]:
    """The gradients that a kernel does not make: second derivatives (`twice`: as a graph), and those of weights."""
    with torch.enable_grad():
        if not twice:
            inputs = [x if x is None else x.detach().requires_grad_(need) for x, need in zip(inputs, needs)]
        loss = reference(*inputs)
    wanted = [x for x, need in zip(inputs, needs) if need and x is not None]
    found = iter(torch.autograd.grad(loss, wanted, grad_output, create_graph=twice))
    return tuple(next(found) if need else None for need in needs)


class FeatureLoss(LossModule):
    """A distance of two batches of features as a module."""

    per_call: ClassVar[tuple[str, ...]] = ("x_weights", "y_weights", "labels")
