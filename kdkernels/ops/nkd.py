r"""Normalised knowledge distillation (NKD, Yang et al., arXiv 2303.13005).

With y the target class, p at temperature 1 and p' the softmax over the other classes at temperature T:

    NKD = −p_T(y) log p_S(y) + gamma T² (−sum_k p'_T(k) log p'_S(k))

A cross-entropy: the teacher's entropy is in its value. Gradient in the student's logits:
p_T(y) (p_S − onehot(y)) + gamma T (p'_S − p'_T).
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from kdkernels.ops.divergences import NORMALIZED, Spec
from kdkernels.ops.logit_loss import logit_loss
from kdkernels.ops.module import LossModule
from kdkernels.ops.rows import Range, Temperature, check_number


def nkd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    gamma: float = 1.5,
    temperature: Temperature = 1.0,
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
    r"""Normalised distillation −p_T(y)·log p_S(y) + γ·T²·CE(p'_T, p'_S), p' the softmax over the non-target classes.

    The whole loss of the paper (arXiv 2303.13005), to be added to the cross-entropy: T² multiplies the non-target
    part only, and the target part is at temperature 1, so that the factor belongs to the loss here. The paper does not
    differentiate p_T(y): with a frozen teacher nothing else is done, and a teacher that requires grad gets the gradient
    of the formula as it stands. With two classes the non-target part is 0.

    Args:
        student: (..., N) logits: float32, float16, bfloat16, or float64 (backends reference and cpu).
        teacher: (..., N) logits of the same dtype and device. −inf is legal in both (a masked class).
        labels: (...) integers: each row's class, in the student's numbering. None takes the teacher's
            largest logit.
        ignore_index: a row with this label counts for nothing, not in "batchmean" either.
        gamma: γ, the non-target part's weight.
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

    >>> loss = F.cross_entropy(student_logits, labels) + kdkernels.nkd(student_logits, teacher_logits, labels)
    """
    spec = Spec(NORMALIZED, 1.0, check_number(gamma, "gamma"), standardize=standardize, squared=True)
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


nkd_reference = partial(nkd, backend="reference")


class NKDLoss(LossModule):
    """`nkd` as a module: ``NKDLoss(gamma=3.5, temperature=3.0)(student, teacher, labels)``."""

    function = staticmethod(nkd)
