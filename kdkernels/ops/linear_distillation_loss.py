r"""The whole loss of a distillation step from hidden states, without logits in memory.

    s = student Wᵀ_s + b_s,  t = teacher Wᵀ_t + b_t
    hard_weight CE(s, labels) + soft_weight T² D(t / T, s / T) + z_loss lse(s)² + logit_mse_weight mean (s − t)²

kdkernels.ops.linear_loss says how it is carried out, and what it costs.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from kdkernels.ops.distillation_loss import distillation_spec, named_terms
from kdkernels.ops.linear_loss import Scale
from kdkernels.ops.module import LossModule
from kdkernels.ops.rows import Range, Temperature
from kdkernels.ops.teacher_statistics import TeacherStatistics, loss_of_teacher


def linear_distillation_loss(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor | TeacherStatistics | None = None,
    teacher_weight: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_log_probs: Tensor | None = None,
    teacher_indices: Tensor | None = None,
    tail: str = "bucket",
    soft: str = "kl",
    temperature: Temperature = 1.0,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_mse_weight: float = 0.0,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: Scale | None = None,
    teacher_softcap: float | None = None,
    teacher_logit_scale: Scale | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    gamma: float = 1.5,
    normalize: bool = False,
    standardize: bool = False,
    teacher_temperature: Temperature | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "batchmean",
    valid_classes: Range = None,
    teacher_valid_classes: Range = None,
    return_terms: bool = False,
    strategy: str | None = None,
    chunk_rows: int | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    r"""`distillation_loss` of student·student_weightᵀ and teacher·teacher_weightᵀ, whose logits are never in memory as
    a whole; they are float32-accurate where the inputs are float16 or bfloat16.

    The loss is that of `distillation_loss` on the two products, with the same meaning of its arguments (its defaults
    here are those of the plain KL). Gradients go to whichever of student, teacher, their weights and biases,
    temperatures, logit scales and row weights require it, and only those are computed: a frozen head costs no matrix
    product.

    Args:
        student: (..., D_s) hidden states: float32, float16, bfloat16, or float64 (backends reference and cpu). Under
            autocast, hidden states, weights and biases are cast as `F.linear` would.
        student_weight: (N, D_s), of the student's dtype: the head, as in ``nn.Linear``.
        teacher: (..., D_t) hidden states for the same rows; D_t and the dtype may be others.
        teacher_weight: (N, D_t). May be the student's head itself (the same tensor, with the same bias): then each
            part of it is read once for both sides, and its gradient is that of both.
        labels: (...) integers: each row's class. May be None where ``hard_weight`` is 0; "dkd" and "nkd" then take
            the teacher's largest logit.
        student_bias, teacher_bias: (N,). −inf is legal without a softcap: a class of no mass.
        teacher_log_probs: instead of teacher and teacher_weight: (..., N) log-probabilities (or logits) of any
            floating dtype, divided by the teacher's temperature like logits; or, with teacher_indices, (..., k) of
            them AT ``temperature``, used as they are, as in `topk_kl_div` (soft="kl" only).
        teacher_indices: (..., k) integers: the classes of teacher_log_probs.
        tail: what becomes of the mass that k log-probabilities leave: "bucket", "renormalize", "drop" (`topk_kl_div`).
        soft: "kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "dkd", "nkd".
        temperature: T of the soft term, which is multiplied by T²; a positive float, or a floating tensor that
            broadcasts to the rows, learnable.
        soft_weight, hard_weight, label_smoothing, z_loss, ignore_index: as in `distillation_loss`.
        logit_mse_weight: weight of mean_j (s_j − t_j)².
        softcap: c of c·tanh(u / c), through which the logits u go; positive. None: no cap.
        logit_scale: factor of x·Wᵀ + b, before the cap: a float, or a floating tensor of one value, learnable.
        teacher_softcap, teacher_logit_scale: the teacher's, where they differ (``math.inf`` and 1 for none).
        alpha, beta, gamma, normalize, standardize: of the divergences, as in `distillation_loss`.
        teacher_temperature: the teacher's T, when it differs. T² is the student's.
        mask: bool, broadcasts to the rows: True where a row counts. Others may hold anything; on the CPU they are not
            projected either.
        weights: floating, broadcasts to the rows: multiplies each row's loss; differentiable.
        reduction: "none" (the rows), "sum", or "batchmean": the sum divided by how many rows count. With "none" the
            gradients are computed in the backward, from logits formed again: 2 products more.
        valid_classes, teacher_valid_classes: the classes that there are: the first n, or (start, stop); the others
            are not projected, and their weights get a gradient of 0.
        return_terms: also give the parts, as `distillation_loss` does.
        strategy: "chunks" (a few rows at a time), "tiles" (backend triton: logits never leave the chip; not for "dkd",
            "nkd", ``standardize`` and given log-probabilities); None: what `plan_linear_loss` says.
        chunk_rows: rows in a chunk, instead of what `plan_linear_loss` says: fewer take less memory, and longer.
        backend: "reference", "cpu", "triton" or "cuda"; None takes the best that is available. A named one is obeyed
            or raises.

    Returns:
        The loss, () or (...): float32, or float64 for float64 hidden states; or (loss, terms).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value.
        RuntimeError: the named backend is not available.

    Sources: chunks of logits between products, Liger-Kernel (arXiv 2410.10989); tiles that are formed again, Cut
    Your Losses (arXiv 2411.09009).

    >>> loss = kdkernels.linear_distillation_loss(
    ...     hidden, model.lm_head.weight, teacher_hidden, teacher.lm_head.weight, labels, hard_weight=0.5)
    """
    spec = distillation_spec(
        soft,
        labels,
        soft_weight=soft_weight,
        hard_weight=hard_weight,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        logit_mse_weight=logit_mse_weight,
        alpha=alpha,
        beta=beta,
        gamma=gamma,
        normalize=normalize,
        standardize=standardize,
    )
    loss, terms = loss_of_teacher(
        student,
        student_weight,
        teacher,
        teacher_weight,
        labels,
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
        ignore_index=ignore_index,
        reduction=reduction,
        valid_classes=valid_classes,
        teacher_valid_classes=teacher_valid_classes,
        strategy=strategy,
        chunk_rows=chunk_rows,
        with_terms=return_terms,
        backend=backend,
    )
    return loss if terms is None else (loss, named_terms(terms, soft))


linear_distillation_loss_reference = partial(linear_distillation_loss, backend="reference")


class LinearDistillationLoss(LossModule):
    """`linear_distillation_loss` as a module: ``LinearDistillationLoss(temperature=2.0)(student, student_weight,
    teacher, teacher_weight, labels)``; biases and given log-probabilities with each call."""

    function = staticmethod(linear_distillation_loss)
    per_call = (
        "student_bias",
        "teacher_bias",
        "teacher_log_probs",
        "teacher_indices",
        *LossModule.per_call,
    )
