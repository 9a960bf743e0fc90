r"""The shared-classifier block of SRRL, SimKD, IJCKD and ATSC: the student's features, through a projector, into the
teacher's classifier, beside the teacher's features.

    v = P gap(student) + p   (gap: the mean over space; P optional)
    s = v Wᵀ + b,  t = gap(teacher) Wᵀ + b
    hard_weight CE(s, labels) + soft_weight T² KL(t / T ‖ s / T) + logit_mse_weight mean_j (s_j − t_j)²
      + feature_mse_weight mean (P student + p − teacher)²    of the maps, or of their gaps

Each part is a mean over the rows that count; the MSEs are means over their elements, as ``F.mse_loss`` has it. The
logits are formed as in kdkernels.ops.linear_loss, each part of W read once for both sides, and not at all where no
part needs them; pooling and the maps' MSE take one read of both maps (kdkernels.ops.pool_mse).

Sources: SRRL (Yang et al., ICLR 2021), SimKD (arXiv 2203.14001), IJCKD (arXiv 2304.11004), ATSC (arXiv 2406.08528).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.ops.distillation_loss import distillation_spec, named_terms
from kdkernels.ops.linear_loss import Scale, check_side
from kdkernels.ops.module import LossModule
from kdkernels.ops.pool_mse import pool_mse
from kdkernels.ops.rows import (
    Temperature,
    check_number,
    check_weights,
    kind_of,
    reduce_rows,
    rows_that_count,
)
from kdkernels.ops.teacher_statistics import TeacherStatistics, loss_of_teacher

MATCHES = ("map", "pooled")


def shared_classifier_loss(
    student: Tensor,
    teacher: Tensor | TeacherStatistics,
    weight: Tensor,
    bias: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    projector_weight: Tensor | None = None,
    projector_bias: Tensor | None = None,
    soft: str = "kl",
    soft_weight: float = 0.0,
    hard_weight: float = 1.0,
    logit_mse_weight: float = 1.0,
    feature_mse_weight: float = 1.0,
    temperature: Temperature = 1.0,
    teacher_temperature: Temperature | None = None,
    feature_match: str | None = None,
    detach_teacher: bool = False,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    logit_scale: Scale | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "batchmean",
    return_terms: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    r"""hard CE + soft T² KL + MSE of logits + MSE of features, of a student behind the teacher's classifier.

    The defaults are IJCKD's: CE + MSE(s, t) + MSE(maps). SimKD is ``hard_weight=0, logit_mse_weight=0``; SRRL's
    regression ``hard_weight=0, feature_match="pooled"``; ATSC takes SimKD's with a teacher that requires grad, and a
    head that may.

    Args:
        student: (B, D_s) features, or (B, C, H, W) maps (any number of spatial dimensions), which are averaged over
            space: float32, float16, bfloat16, or float64 (backends reference and cpu).
        teacher: (B, D_t) features or maps of the student's dtype, or the `TeacherStatistics` of `precompute_teacher`
            (soft "kl"; with a feature MSE they need the features).
        weight: (N, D_t): the classifier of both. Its gradient, where it requires one, is that of both sides.
        bias: (N,).
        labels: (B,) integers; may be None where ``hard_weight`` is 0.
        projector_weight: (D_t, D_s): a linear map of the student's features (a 1×1 convolution of its maps); None:
            none.
        projector_bias: (D_t,).
        soft, temperature, teacher_temperature, label_smoothing, ignore_index, logit_scale: as in
            `linear_distillation_loss`.
        soft_weight, hard_weight: weights of T²·soft and of the cross-entropy.
        logit_mse_weight: weight of the mean over classes of (s − t)².
        feature_mse_weight: weight of the mean over a sample's elements of the features' squared difference.
        feature_match: "map" or "pooled": what the features' MSE is of. None: of the maps where both are maps, else of
            the features. Maps that differ in size are compared at the smaller size: the larger is averaged to it
            (SimKD's rule).
        detach_teacher: the teacher's logits are constants: no gradient goes to the teacher's features through them, nor
            to the classifier. The features' MSE still has its gradient to both sides.
        mask: bool, broadcasts to (B,): True where a sample counts.
        weights: floating, broadcasts to (B,): multiplies each sample's loss; differentiable.
        reduction: "none" (samples), "sum", or "batchmean": the sum divided by how many samples count.
        return_terms: also give the parts: a dict with "soft", "hard", "z_loss", "logit_mse", "feature_mse"; detached.
        backend: "reference", "cpu", "triton" or "cuda"; None takes the best that is available. A named one is obeyed
            or raises.

    Returns:
        The loss, () or (B,): float32, or float64; or (loss, terms).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value.
        RuntimeError: the named backend is not available.

    >>> loss = kdkernels.shared_classifier_loss(connector(maps), teacher_maps, fc.weight, fc.bias, labels)
    """
    feature_mse_weight = check_number(feature_mse_weight, "feature_mse_weight")
    if feature_match is not None and feature_match not in MATCHES:
        raise ValueError(f"feature_match must be None or one of {', '.join(MATCHES)}, got {feature_match!r}")
    spec = distillation_spec(
        soft,
        labels,
        soft_weight=soft_weight,
        hard_weight=hard_weight,
        label_smoothing=label_smoothing,
        logit_mse_weight=logit_mse_weight,
    )
    statistics = teacher if isinstance(teacher, TeacherStatistics) else None
    features: Tensor | None = teacher.features if isinstance(teacher, TeacherStatistics) else teacher
    if statistics is not None and features is None and feature_mse_weight:
        raise ValueError(
            "teacher must hold its features (keep_features=True) where feature_mse_weight is not 0"
        )
    _check_features(student, "student")
    if statistics is None or features is not None:
        _check_features(features, "teacher")
        assert features is not None
        if features.shape[0] != student.shape[0]:
            raise ValueError(
                f"teacher must have the student's {student.shape[0]} samples, got {features.shape[0]}"
            )
        if features.dtype != student.dtype:
            raise TypeError(f"teacher must have the student's dtype {student.dtype}, got {features.dtype}")
    if projector_weight is None and projector_bias is not None:
        raise TypeError("projector_bias must be None where projector_weight is")
    if projector_weight is not None:
        names = {"student_weight": "projector_weight", "student_bias": "projector_bias"}
        check_side(student.movedim(1, -1), projector_weight, projector_bias, "student", names)

    both_maps = features is not None and student.dim() > 2 and features.dim() > 2
    if feature_match == "map" and not both_maps:
        raise ValueError("feature_match must be 'pooled' or None where student and teacher are not both maps")
    as_maps = both_maps and feature_match != "pooled" and feature_mse_weight != 0
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    labelled = labels if isinstance(labels, Tensor) and labels.shape == student.shape[:1] else None
    counts = rows_that_count(student[:, :1].flatten(1), mask, labelled, ignore_index)
    of_features = pooled_teacher = None
    if as_maps:
        assert features is not None
        if projector_weight is not None and counts is not None:  # whatever a sample holds that does not count
            student = torch.where(counts.view(-1, *[1] * (student.dim() - 1)), student, 0)
        student = project(student, projector_weight, projector_bias)
        _check_widths(student, features)
        maps = _same_size(student, features)
        pooled, pooled_teacher, of_features = pool_mse(*maps, mask=counts, backend=backend)
        # Only the comparison is at one size. (Where bins overlap, a map and its smaller self differ in their mean.)
        if soft_weight or hard_weight or logit_mse_weight:
            pooled = pooled if maps[0] is student else _pool(student, counts)
            pooled_teacher = pooled_teacher if maps[1] is features else _pool(features, counts)
    else:
        pooled = project(_pool(student, counts), projector_weight, projector_bias)
        pooled_teacher = None if features is None else _pool(features, counts)
        if feature_mse_weight:
            assert pooled_teacher is not None
            _check_widths(pooled, pooled_teacher)
            *_, of_features = pool_mse(pooled, pooled_teacher, mask=counts, backend=backend)

    options: dict[str, Any] = {
        "temperature": temperature,
        "teacher_temperature": teacher_temperature,
        "logit_scale": logit_scale,
        "mask": mask,
        "weights": weights,
        "ignore_index": ignore_index,
        "reduction": reduction,
        "with_terms": return_terms,
        "backend": backend,
    }
    head, head_bias = weight, bias
    if detach_teacher:
        head, head_bias = weight.detach(), None if bias is None else bias.detach()
        pooled_teacher = None if pooled_teacher is None else pooled_teacher.detach()
    loss, terms = loss_of_teacher(
        pooled,
        weight,
        pooled_teacher if statistics is None else statistics,
        head,
        labels,
        spec,
        bias=bias,
        teacher_bias=head_bias,
        **options,
    )
    of_features_loss = None
    if of_features is not None:
        rows_weights = None if weights is None else check_weights(weights, pooled, dtype)
        of_features_loss = reduce_rows(feature_mse_weight * of_features, counts, rows_weights, reduction)
        loss = loss + of_features_loss
    if terms is None:
        return loss
    named = named_terms(terms, soft)
    named["feature_mse"] = (
        torch.zeros_like(named["soft"]) if of_features_loss is None else of_features_loss.detach()
    )
    return loss, named


shared_classifier_loss_reference = partial(shared_classifier_loss, backend="reference")


def _check_features(x: Any, name: str) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor of features, got {kind_of(x)}")
    if x.dim() < 2:
        raise ValueError(f"{name} must have shape (B, D) or (B, C, ...), got {tuple(x.shape)}")


def _check_widths(student: Tensor, teacher: Tensor) -> None:
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"student must have the teacher's {teacher.shape[1]} features for a feature MSE, got {student.shape[1]} "
            "(projector_weight can map them)"
        )


def _pool(x: Tensor, counts: Tensor | None) -> Tensor:  # (B, C, ...) -> (B, C)
    x = x if x.dim() == 2 else x.flatten(2).mean(2)
    return x if counts is None else torch.where(counts[:, None], x, 0)


def project(
    x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:  # (B, D_s, ...) -> (B, D_t, ...)
    """The linear map of features, or of each place of a map."""
    if weight is None:
        return x
    if x.dim() == 2:
        return F.linear(x, weight, bias)
    maps = F.conv1d(x.flatten(2), weight[:, :, None], bias)
    return maps.unflatten(2, x.shape[2:])


def _same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps at the smaller of their sizes."""
    if student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    if student.dim() != teacher.dim() or student.dim() > 5:
        raise ValueError(
            f"student and teacher must have as many spatial dimensions, at most 3, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}"
        )
    pool: Any = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[student.dim() - 3]
    if student.shape[2] > teacher.shape[2]:
        return pool(student, list(teacher.shape[2:])), teacher
    return student, pool(teacher, list(student.shape[2:]))


class SharedClassifierLoss(LossModule):
    """`shared_classifier_loss` as a module: ``SharedClassifierLoss(soft_weight=1.0)(student, teacher, weight, bias,
    labels)``; the projector's weight and bias with each call."""

    function = staticmethod(shared_classifier_loss)
    per_call = ("projector_weight", "projector_bias", *LossModule.per_call)
