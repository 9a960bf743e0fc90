r"""Skewed KL divergences of temperature softmaxes (DistiLLM, Ko et al., arXiv 2402.03898).

skew KL:           KL(P‖alpha P + (1 − alpha) Q)
skew reverse KL:   KL(Q‖(1 − alpha) P + alpha Q)
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from kdkernels.ops.divergences import KL, MIXTURE, REVERSE_KL, Spec
from kdkernels.ops.logit_loss import logit_loss
from kdkernels.ops.module import LossModule
from kdkernels.ops.rows import Range, Temperature, check_fraction


def skew_spec(alpha: float, reverse: bool, **rest: Any) -> Spec:
    """The member of the family that `skew_kl_div` is."""
    check_fraction(alpha, "alpha")
    if alpha == 0:
        return Spec(REVERSE_KL if reverse else KL, **rest)
    if alpha == 1:
        return Spec(MIXTURE, 0.0, 0.0, 0.5, **rest)
    sides = (0.0, 1.0, 1.0 - alpha) if reverse else (1.0, 0.0, float(alpha))
    return Spec(MIXTURE, *sides, **rest)


def skew_kl_div(
    student: Tensor,
    teacher: Tensor,
    *,
    alpha: float = 0.1,
    reverse: bool = False,
    temperature: Temperature = 1.0,
    teacher_temperature: Temperature | None = None,
    standardize: bool = False,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "batchmean",
    valid_classes: Range = None,
    teacher_valid_classes: Range = None,
    backend: str | None = None,
) -> Tensor:
    r"""Skew KL(p_T‖α p_T + (1−α) p_S), or with ``reverse`` KL(p_S‖(1−α) p_T + α p_S); no T² factor.

    α = 0 is the plain KL (its reverse), α = 1 is 0; between, the divergence is finite whatever the supports.

    Args:
        student: (..., N) logits: float32, float16, bfloat16, or float64 (backends reference and cpu).
        teacher: (..., N) logits of the same dtype and device. −inf is legal in both (a masked class).
        alpha: α in [0, 1], the share of the first distribution in the mixture.
        reverse: the skew reverse KL.
        temperature: T, and the teacher's unless ``teacher_temperature`` is given: a positive float, or a floating
            tensor that broadcasts to the rows (...), learnable.
        teacher_temperature: the teacher's T, when it differs.
        standardize: take (z − mean) / (1e-7 + std) of each row (std over N − 1) instead of the logits z, on both
            sides (LSKD, arXiv 2403.01427); a constant row gives zeros.
        mask: bool, broadcasts to the rows: True where a row counts. A row that does not count is not read.
        weights: floating, broadcasts to the rows: multiplies each row's loss; differentiable.
        reduction: "none" (the rows), "sum", or "batchmean": the sum divided by how many rows count.
        valid_classes: the student's classes that there are: the first n, or (start, stop). The others (padding of
            a vocabulary) carry no mass and get no gradient. The teacher's too, unless
            ``teacher_valid_classes`` is given; the two must be equally long.
        backend: "reference", "cpu", "triton" or "cuda"; None takes the best that is available. A named one is
            obeyed or raises.

    Returns:
        The loss, () or (...): float32, or float64 for float64 logits. Gradients go to the student, the teacher, the
        temperatures and the weights, where required; second derivatives go through the reference.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value.
        RuntimeError: the named backend is not available.

    >>> loss = kdkernels.skew_kl_div(student_logits, teacher_logits, alpha=0.1)
    """
    spec = skew_spec(alpha, reverse, standardize=standardize)
    loss, _ = logit_loss(
        student,
        teacher,
        None,
        spec,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        mask=mask,
        weights=weights,
        reduction=reduction,
        valid_classes=valid_classes,
        teacher_valid_classes=teacher_valid_classes,
        backend=backend,
    )
    return loss


skew_kl_div_reference = partial(skew_kl_div, backend="reference")


class SkewKLDivLoss(LossModule):
    """`skew_kl_div` as a module: ``SkewKLDivLoss(alpha=0.1, reverse=True)(student, teacher)``."""

    function = staticmethod(skew_kl_div)
