r"""MasKD's distillation loss (Huang et al. 2023, arXiv 2205.14589): squared feature differences under T masks.

    loss = mean_n Σ_t π_nt mean_c [ Σ_hw (M_nt,hw (S_nc,hw − F_nc,hw))² / (eps + Σ_hw M_nt,hw) ]

M enters squared above and plainly below, as in the release. The sums over t and c change places:

    w_n,hw = Σ_t π_nt M²_nt,hw / (C (eps + Σ_hw M_nt,hw)),    loss = mean_n Σ_hw w_n,hw Σ_c (S − F)²_nc,hw

so one weight map and one reduction do, and no (N, T, C, H, W) tensor is made.

Gradient: 2 w (S − F) / N to the student, its negative to the teacher; Σ_c (S − F)² to the map, and through that to
masks and mask weights. The kernels make them with the loss (2 reads and 1 write of the features), save them beside
their inputs and hand them out once; a later backward computes them again. float16 holds so small gradients only under
the loss scale that its training takes, so there the backward makes them, of w times the upstream gradient (2 more
reads). Second derivatives go through the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels.backend import LIBRARY, fresh, launcher, resolve, statistics_dtype, unobserved
from kdkernels.ops.features import FeatureLoss, by_reference, check_at_least
from kdkernels.ops.rows import kind_of
from kdkernels.ops.scale_rows import scale_rows_


def masked_feature_loss_reference(
    student: Tensor,  # (N, C, H, W)
    teacher: Tensor,  # (N, C, H, W)
    masks: Tensor,  # (N, T, H, W)
    mask_weights: Tensor | None = None,  # (N, T)
    *,
    eps: float = 1e-6,
) -> Tensor:
    """The specification of `masked_feature_loss`: plain PyTorch, with any derivative. Arguments are taken as they
    come."""
    weight_map = _weight_map(masks, mask_weights, student, eps)
    difference = student.to(weight_map.dtype) - teacher
    return (weight_map * difference.square().sum(1)).sum() / max(student.shape[0], 1)


def _weight_map(
    masks: Tensor, mask_weights: Tensor | None, student: Tensor, eps: float
) -> Tensor:  # (N, H, W)
    masks = masks.to(statistics_dtype(student.dtype))
    share = 1 / (student.shape[1] * (eps + masks.sum((-2, -1))))
    if mask_weights is not None:
        share = share * mask_weights.to(masks.dtype)
    return (share[..., None, None] * masks.square()).sum(1)


def _weighted_squares_reference(student: Tensor, teacher: Tensor, weight_map: Tensor) -> Tensor:
    return (weight_map * (student.to(weight_map.dtype) - teacher).square().sum(1)).sum()


_INPUTS = "Tensor student, Tensor teacher, Tensor weight_map, bool[] needs, str backend"
# The loss, then as `needs` asks for them the gradients of the student (minus the teacher's) and of the map.
LIBRARY.define(f"masked_feature_loss({_INPUTS}) -> Tensor[]")


def _outputs(
    student: Tensor, teacher: Tensor, weight_map: Tensor, needs: Sequence[bool], backend: str
) -> list[Tensor | None]:
    return [
        weight_map.new_empty(()),
        fresh(student.shape, student.dtype, student.device) if needs[0] else None,
        fresh(weight_map.shape, weight_map.dtype, weight_map.device) if needs[1] else None,
    ]


def _body(
    student: Tensor, teacher: Tensor, weight_map: Tensor, needs: Sequence[bool], backend: str
) -> list[Tensor]:
    outputs = _outputs(student, teacher, weight_map, needs, backend)
    inputs = (z.contiguous() for z in (student, teacher, weight_map))
    launcher(backend, "masked_feature_loss")(*inputs, *outputs)
    return [output for output in outputs if output is not None]


def _fake(*arguments: Any) -> list[Tensor]:
    return [output for output in _outputs(*arguments) if output is not None]


LIBRARY.impl("masked_feature_loss", _body, "CPU")
LIBRARY.impl("masked_feature_loss", _body, "CUDA")
torch.library.register_fake("kdkernels::masked_feature_loss", _fake, lib=LIBRARY)


class _WeightedSquares(torch.autograd.Function):
    """Σ w Σ_c (student − teacher)²."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, weight_map: Tensor, backend: str) -> Tensor:
        ctx.backend = backend
        ctx.save_for_backward(student, teacher, weight_map)
        # A captured graph cannot hand a buffer out once: there the backward computes.
        ctx.later = torch.compiler.is_compiling() or student.dtype == torch.float16
        loss, *ctx.gradients = _WeightedSquares.run(ctx, student, teacher, weight_map, not ctx.later)
        return loss

    @staticmethod
    def run(ctx: Any, student: Tensor, teacher: Tensor, weight_map: Tensor, wanted: bool) -> list[Tensor]:
        of_student, of_teacher, of_map, _ = ctx.needs_input_grad
        needs = [wanted and (of_student or of_teacher), wanted and of_map]
        run = _body if unobserved(student) else torch.ops.kdkernels.masked_feature_loss
        return run(student, teacher, weight_map, needs, ctx.backend)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # ()
        student, teacher, weight_map = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        gradients, ctx.gradients = ctx.gradients, None
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            inputs = (student, teacher, weight_map)
            return (*by_reference(_weighted_squares_reference, inputs, needs, grad_output, True), None)
        scaled = student.dtype == torch.float16
        if gradients is None or ctx.later:
            # The same kernel on the same inputs: bit for bit what the first backward had.
            weights = weight_map * grad_output if scaled else weight_map
            gradients = _WeightedSquares.run(ctx, student, teacher, weights, True)[1:]
        of_student = of_teacher = of_map = None
        if needs[0] or needs[1]:
            gradient = gradients[0]
            if gradient.numel() and not scaled:
                scale_rows_(gradient, grad_output.contiguous(), ctx.backend)
            of_student = gradient if needs[0] else None
            of_teacher = -gradient if needs[1] else None
        if needs[2]:
            of_map = gradients[-1] * grad_output
        return of_student, of_teacher, of_map, None


def masked_feature_loss(
    student: Tensor,
    teacher: Tensor,
    masks: Tensor,
    mask_weights: Tensor | None = None,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    r"""MasKD's loss under learned masks (arXiv 2205.14589), without its (N, T, C, H, W) tensors.

    mean_n Σ_t π_nt mean_c [Σ_hw (M (student − teacher))² / (eps + Σ_hw M)]; sum it over the levels of a pyramid.

    Args:
        student: (N, C, H, W) features: float32, float16, bfloat16, float64.
        teacher: (N, C, H, W) of the same dtype and device. Gradients go to all four tensors.
        masks: (N, T, H, W), floating or bool.
        mask_weights: floating (N, T), such as a softmax over T; None is 1 for each (the release for segmentation).
        eps: ≥ 0, added to each mask's sum: an empty mask adds 0. 0 is the release for detection (NaN of an empty mask).
        backend: "reference", "cpu" or "triton"; None takes the best that there is. A named one is obeyed or raises.

    Returns:
        (): float32, or float64 for float64 features. 0 of an empty batch.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or value.

    Second derivatives are right.
    """
    for name, value in (("student", student), ("teacher", teacher)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor of features, got {kind_of(value)}")
    if student.dim() != 4 or student.shape[1] == 0:
        raise ValueError(f"student must have shape (N, C, H, W) with C >= 1, got {tuple(student.shape)}")
    if teacher.shape != student.shape:
        raise ValueError(
            f"teacher must have the student's shape {tuple(student.shape)}, got {tuple(teacher.shape)}"
        )
    if teacher.dtype != student.dtype:
        raise TypeError(f"teacher must have the student's dtype {student.dtype}, got {teacher.dtype}")
    if not isinstance(masks, Tensor) or not (masks.is_floating_point() or masks.dtype == torch.bool):
        raise TypeError(f"masks must be a floating or bool tensor, got {kind_of(masks)}")
    n, _, height, width = student.shape
    if masks.dim() != 4 or (masks.shape[0], *masks.shape[2:]) != (n, height, width):
        raise ValueError(f"masks must have shape ({n}, T, {height}, {width}), got {tuple(masks.shape)}")
    if mask_weights is not None:
        if not isinstance(mask_weights, Tensor) or not mask_weights.is_floating_point():
            raise TypeError(f"mask_weights must be a floating tensor, got {kind_of(mask_weights)}")
        if mask_weights.shape != masks.shape[:2]:
            raise ValueError(
                f"mask_weights must have shape {tuple(masks.shape[:2])}, got {tuple(mask_weights.shape)}"
            )
    others = {"teacher": teacher, "masks": masks, "mask_weights": mask_weights}
    for name, other in others.items():
        if other is not None and other.device != student.device:
            raise ValueError(f"{name} must be on the student's device {student.device}, got {other.device}")
    check_at_least(eps, "eps", 0)
    backend = resolve(backend, student, "student", has=("reference", "cpu", "triton"))
    if backend == "reference":
        return masked_feature_loss_reference(student, teacher, masks, mask_weights, eps=eps)
    weight_map = _weight_map(masks, mask_weights, student, eps) / max(n, 1)
    return _WeightedSquares.apply(student, teacher, weight_map, backend)


class MaskedFeatureLoss(FeatureLoss):
    """`masked_feature_loss` as a module: ``MaskedFeatureLoss()(student, teacher, masks, mask_weights)``."""

    function = staticmethod(masked_feature_loss)
