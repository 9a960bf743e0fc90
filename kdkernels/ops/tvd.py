r"""Total variation distance of temperature softmaxes: TV = 1/2 sum_j |P_j − Q_j|.

Gradient: dTV/dx_j = Q_j (a_j − sum_k Q_k a_k), a = 1/2 sign(Q − P), in the student's scaled logits; where P_j = Q_j the
subgradient a_j = 0 is taken.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from kdkernels.ops.divergences import TOTAL_VARIATION, Spec
from kdkernels.ops.logit_loss import logit_loss
from kdkernels.ops.module import LossModule
from kdkernels.ops.rows import Range, Temperature


def tvd(
    student: Tensor,
    teacher: Tensor,
    *,
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
    r"""Total variation distance ½ Σ |p_T − p_S| of temperature softmaxes; no T² factor.

    Where the two are equal the derivative of |·| is taken as 0.

    Args:
        student: (..., N) logits: float32, float16, bfloat16, or float64 (backends reference and cpu).
        teacher: (..., N) logits of the same dtype and device. −inf is legal in both (a masked class).
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

    >>> loss = kdkernels.tvd(student_logits, teacher_logits)
    """
    spec = Spec(TOTAL_VARIATION, standardize=standardize)
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


tvd_reference = partial(tvd, backend="reference")


class TVDLoss(LossModule):
    """`tvd` as a module: ``TVDLoss(temperature=2.0)(student, teacher)``."""

    function = staticmethod(tvd)
