r"""How far apart two rows of logits are, for logging: entropies, KL, overlap and top-1 match from one read of both.

entropy = −Σ p log p,   KL = Σ p_T log(p_T / p_S),   agreement = Σ min(p_T, p_S) = 1 − TV
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels.backend import resolve, statistics_dtype
from kdkernels.ops.divergences import STATISTICS, Spec, statistics_rows
from kdkernels.ops.logit_loss import NOTHING, run_logit_loss
from kdkernels.ops.rows import (
    Range,
    Temperature,
    as_matrix,
    as_vectors,
    check_logits,
    check_mask,
    check_reduction,
    check_temperatures,
    refuse_logits,
    scale_of_rows,
    split_temperatures,
)


class KDStatistics(NamedTuple):
    """Each () or (...), float32 (float64 for float64 logits), without a graph."""

    student_entropy: Tensor
    teacher_entropy: Tensor
    kl: Tensor
    agreement: Tensor
    top1_match: Tensor


def kd_statistics(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: Temperature = 1.0,
    teacher_temperature: Temperature | None = None,
    standardize: bool = False,
    mask: Tensor | None = None,
    reduction: str = "batchmean",
    valid_classes: Range = None,
    teacher_valid_classes: Range = None,
    backend: str | None = None,
) -> KDStatistics:
    r"""What a training loop logs about student and teacher, from one read of both logits; no gradient.

    Args:
        student: (..., N) logits: float32, float16, bfloat16, or float64 (backends reference and cpu).
        teacher: (..., N) logits of the same dtype and device. −inf is legal in both (a masked class).
        temperature, teacher_temperature, standardize, mask, valid_classes, teacher_valid_classes: as in `jsd`.
        reduction: "none" (each row's), "sum", or "batchmean": the mean over the rows that count.
        backend: "reference", "cpu", "triton" or "cuda"; None takes the best that is available.

    Returns:
        KDStatistics: ``student_entropy`` and ``teacher_entropy`` (nats), ``kl`` = KL(p_T‖p_S) (nats), ``agreement`` =
        Σ min(p_T, p_S) in [0, 1], ``top1_match`` (1 where both have their first maximum at the same class, so its
        mean is the share of such rows).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value.
        RuntimeError: the named backend is not available.

    >>> statistics = kdkernels.kd_statistics(student_logits, teacher_logits)
    >>> log({"top-1 match": statistics.top1_match.item(), "KL": statistics.kl.item()})
    """
    start, teacher_start, classes = ranges = check_logits(
        student, teacher, valid_classes, teacher_valid_classes
    )
    if teacher is None:
        refuse_logits(student, teacher)
    check_reduction(reduction)
    backend = resolve(backend, student, "student")
    rows, dtype = student.shape[:-1], statistics_dtype(student.dtype)
    temperature, teacher_temperature = check_temperatures(temperature, teacher_temperature, student, dtype)
    if mask is not None:
        mask = check_mask(mask, student)
    spec = Spec(STATISTICS, standardize=standardize)
    with torch.no_grad():
        [each] = as_vectors(mask)
        scale, value = scale_of_rows(None, each, reduction, rows.numel(), dtype)
        if backend == "reference":
            student = student.narrow(-1, start, classes).to(dtype)
            teacher = teacher.narrow(-1, teacher_start, classes).to(dtype)
            if mask is not None:
                student, teacher = (torch.where(mask[..., None], x, 0) for x in (student, teacher))
            found = torch.stack(statistics_rows(student, teacher, temperature, teacher_temperature, spec))
            if mask is not None:
                found = torch.where(mask, found, 0)
            found = found.reshape(5, -1) * (value if scale is None else scale)
        else:
            temperatures = split_temperatures(*as_vectors(temperature, teacher_temperature))
            kl, terms = run_logit_loss(
                True,
                as_matrix(student),
                as_matrix(teacher),
                None,
                *temperatures,
                scale,
                value,
                each,
                *spec,
                *ranges,
                True,
                NOTHING,
                backend,
            )
            found = torch.cat((kl[None], terms[:4]))
        found = found.view(5, *rows) if reduction == "none" else found.sum(1)
    kl, teacher_entropy, student_entropy, agreement, top1_match = found
    return KDStatistics(student_entropy, teacher_entropy, kl, agreement, top1_match)
