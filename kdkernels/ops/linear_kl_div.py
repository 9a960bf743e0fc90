r"""KL divergence of tempered softmaxes from hidden states, without logits in memory.

    KL(P‖Q),  P = softmax(teacher Wᵀ_t / T_t),  Q = softmax(student Wᵀ_s / T_s),  no T² factor

kdkernels.ops.linear_loss says how it is carried out, and what it costs.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from kdkernels.ops.divergences import KL, REVERSE_KL, Spec
from kdkernels.ops.linear_loss import Scale
from kdkernels.ops.module import LossModule
from kdkernels.ops.rows import Range, Temperature
from kdkernels.ops.teacher_statistics import TeacherStatistics, loss_of_teacher


def linear_kl_div(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor | TeacherStatistics | None = None,
    teacher_weight: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_log_probs: Tensor | None = None,
    teacher_indices: Tensor | None = None,
    tail: str = "bucket",
    temperature: Temperature = 1.0,
    teacher_temperature: Temperature | None = None,
    reverse: bool = False,
    standardize: bool = False,
    softcap: float | None = None,
    logit_scale: Scale | None = None,
    teacher_softcap: float | None = None,
    teacher_logit_scale: Scale | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "batchmean",
    valid_classes: Range = None,
    teacher_valid_classes: Range = None,
    strategy: str | None = None,
    chunk_rows: int | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""`kl_div` of student·student_weightᵀ and teacher·teacher_weightᵀ: KL(teacher‖student), row-wise, no T² factor.

    Args:
        student, student_weight, student_bias: (..., D_s), (N, D_s), (N,).
        teacher, teacher_weight, teacher_bias: (..., D_t), (N, D_t), (N,).
        teacher_log_probs, teacher_indices, tail: a teacher known by (..., N) or (..., k) log-probabilities instead.
        temperature: T, a positive float, or a floating tensor that broadcasts to the rows, learnable.
        teacher_temperature: the teacher's, when it differs.
        reverse: KL(student‖teacher).
        standardize: of logits that have each row's mean taken off, divided by its standard deviation (LSKD).
        softcap, logit_scale, teacher_softcap, teacher_logit_scale, mask, weights, reduction, valid_classes,
            teacher_valid_classes, strategy, chunk_rows, backend: as in `linear_distillation_loss`.

    Returns:
        The loss, () or (...): float32, or float64 for float64 hidden states.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value.
        RuntimeError: the named backend is not available.

    >>> loss = kdkernels.linear_kl_div(hidden, head.weight, teacher_hidden, teacher_head.weight, temperature=2.0)
    """
    spec = Spec(REVERSE_KL if reverse else KL, standardize=standardize)
    loss, _ = loss_of_teacher(
        student,
        student_weight,
        teacher,
        teacher_weight,
        None,
        spec,
        bias=student_bias,
        teacher_bias=teacher_bias,
        log_probs=teacher_log_probs,
        indices=teacher_indices,
        tail=tail,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        softcap=softcap,
        teacher_softcap=teacher_softcap,
        logit_scale=logit_scale,
        teacher_logit_scale=teacher_logit_scale,
        mask=mask,
        weights=weights,
        reduction=reduction,
        valid_classes=valid_classes,
        teacher_valid_classes=teacher_valid_classes,
        strategy=strategy,
        chunk_rows=chunk_rows,
        backend=backend,
    )
    return loss


linear_kl_div_reference = partial(linear_kl_div, backend="reference")


class LinearKLDivLoss(LossModule):
    """`linear_kl_div` as a module: ``LinearKLDivLoss(temperature=2.0)(student, student_weight, teacher,
    teacher_weight)``; biases and given log-probabilities with each call."""

    function = staticmethod(linear_kl_div)
    per_call = ("student_bias", "teacher_bias", "teacher_log_probs", "teacher_indices", *LossModule.per_call)
