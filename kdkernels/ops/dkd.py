r"""Decoupled knowledge distillation (DKD, Zhao et al., arXiv 2203.08679).

With y the target class, b = (p_y, 1 − p_y) and p' the softmax over the other classes:

    DKD = alpha KL(b_T‖b_S) + beta KL(p'_T‖p'_S)

Both parts come from log-sum-exps with and without the target, never from the log of a softmax. Gradient in the
student's scaled logits: alpha (b_S − b_T) at y; elsewhere −alpha (b_S − b_T) p'_S + beta (p'_S − p'_T). It holds that
KL(p_T‖p_S) = KL(b_T‖b_S) + (1 − b_T) KL(p'_T‖p'_S).
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from kdkernels.ops.divergences import DECOUPLED, Spec
from kdkernels.ops.logit_loss import logit_loss
from kdkernels.ops.module import LossModule
from kdkernels.ops.rows import Range, Temperature, check_number


def dkd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: Temperature = 4.0,
    teacher_temperature: Temperature | None = None,
    standardize: bool = False,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "batchmean",
    valid_classes: Range = None,
    teacher_valid_classes: Range = None,
    backend: str | None = None,
) -> Tensor:
    r"""Decoupled distillation α·TCKD + β·NCKD: KL of the target class against all others, and among the others.

    No T² factor (multiply by it for the loss of the paper, arXiv 2203.08679, or use `distillation_loss`). With two
    classes the non-target part is 0.

    Args:
        student: (..., N) logits: float32, float16, bfloat16, or float64 (backends reference and cpu).
        teacher: (..., N) logits of the same dtype and device. −inf is legal in both (a masked class).
        labels: (...) integers: each row's class, in the student's numbering. None takes the teacher's
            largest logit.
        ignore_index: a row with this label counts for nothing, not in "batchmean" either.
        alpha: α, the target part's weight.
        beta: β, the non-target part's weight.
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

    >>> loss = 4.0**2 * kdkernels.dkd(student_logits, teacher_logits, labels, temperature=4.0)
    """
    spec = Spec(DECOUPLED, check_number(alpha, "alpha"), check_number(beta, "beta"), standardize=standardize)
    loss, _ = logit_loss(
        student,
        teacher,
        labels,
        spec,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        mask=mask,
        weights=weights,
        ignore_index=ignore_index,
        reduction=reduction,
        valid_classes=valid_classes,
        teacher_valid_classes=teacher_valid_classes,
        backend=backend,
    )
    return loss


dkd_reference = partial(dkd, backend="reference")


class DKDLoss(LossModule):
    """`dkd` as a module: ``DKDLoss(beta=2.0)(student, teacher, labels)``."""

    function = staticmethod(dkd)
