r"""What a frozen teacher gives to every later epoch, when student and teacher share a frozen head W, b.

With z = a (x Wᵀ + b) the student's logits at temperature T, p the teacher's softmax, q the student's, r the teacher's
largest class and e_r its unit vector:

    KL(p‖q) = [lse(z / T) − z_r / T] − (a / T) (x · m + c) − H(p)
    m = Wᵀ (p − e_r),  c = b · (p − e_r),  H(p) = −Σ p log p
    dKL/dx  = (a / T) [Wᵀ (q − e_r) − m]

No teacher logits at all: two products a step, the student's logits and their gradient. m, c, H and r are computed once.

Rounding: the parts cancel as the student nears the teacher. Measuring from r keeps them small where the teacher is sure
(p − e_r is then 0), but the relative error of the loss is still about eps32 (CE_r + |rest|) / KL, with CE_r the
bracket, and that of the gradient about u √(CE_r / KL), with u half the input's eps (6e-8; 2e-3 for bfloat16, whose two
parts are each rounded). docs/numerics.md has measurements: 1 % of the gradient in bfloat16 at KL 1, 10 % at 1e-2; 1 %
of the loss in float32 below KL 1e-5. The full form, with the teacher's hidden states, has neither error in bfloat16 and
not the loss's in float32; `precision` says from where on it is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from kdkernels.backend import statistics_dtype
from kdkernels.ops import projection
from kdkernels.ops.divergences import KL, NONE, Spec
from kdkernels.ops.linear_loss import (
    check_chunks,
    check_side,
    common_linear_loss,
    linear_loss,
    planned_rows,
)
from kdkernels.ops.rows import (
    check_number,
    check_temperature,
    check_weights,
    reduce_rows,
    rows_that_count,
)


@dataclass(frozen=True)
class TeacherStatistics:
    """What `precompute_teacher` gives; ``statistics[rows]`` picks samples (an index, slice, mask or index tensor).

    Attributes:
        top: (...,) int64: the teacher's largest class, r.
        direction: (..., D) m = Wᵀ(p − e_r), float32 or float64.
        offset: (...,) c = b·(p − e_r).
        entropy: (...,) H(p).
        log_probs, indices: (..., k) the k largest log-probabilities at `temperature` and their classes, or None.
        features: (..., D) the teacher's hidden states, or None.
        temperature, logit_scale: what they hold for.
        precision: the relative error that a loss made of them may have; None: any.
    """

    top: Tensor
    direction: Tensor
    offset: Tensor
    entropy: Tensor
    log_probs: Tensor | None
    indices: Tensor | None
    features: Tensor | None
    temperature: float
    logit_scale: float
    precision: float | None

    def _map(self, function: Any) -> TeacherStatistics:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: function(v) for k, v in tensors.items() if isinstance(v, Tensor)})

    def __getitem__(self, rows: Any) -> TeacherStatistics:
        return self._map(lambda x: x[rows])

    def __len__(self) -> int:
        return len(self.top)

    def to(self, *args: Any, **options: Any) -> TeacherStatistics:
        """As ``Tensor.to`` of a device."""
        return self._map(lambda x: x.to(*args, **options))


@torch.no_grad()
def precompute_teacher(
    teacher: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    k: int | None = None,
    keep_features: bool = True,
    precision: float | None = None,
    chunk_rows: int | None = None,
) -> TeacherStatistics:
    r"""What later epochs need of a frozen teacher: once over its hidden states, chunk by chunk.

    The result takes the place of ``teacher`` in `linear_kl_div`, `linear_distillation_loss` (soft="kl") and
    `shared_classifier_loss`, where student and teacher share the frozen head ``weight``, ``bias``: a step is then two
    matrix products instead of three. Where the heads differ, ``k`` log-probabilities are what to keep::

        cache = kdkernels.precompute_teacher(hidden, teacher_head.weight, k=64)
        loss = kdkernels.linear_kl_div(x, head.weight, teacher_log_probs=cache.log_probs,
                                       teacher_indices=cache.indices)

    Args:
        teacher: (..., D) hidden states, float32, float16, bfloat16 or float64.
        weight: (N, D), of the teacher's dtype.
        bias: (N,).
        temperature: T, for which alone the result holds.
        logit_scale: factor of the logits.
        k: how many of the largest log-probabilities at T to keep; None: none.
        keep_features: keep the hidden states too: the full form needs them.
        precision: the relative error that losses and gradients may have, as estimated from the loss; where it would be
            larger (student and teacher agree closely), a step takes the full form. Needs ``keep_features``; on a GPU
            each step then waits for its loss. None: always the form without teacher logits.
        chunk_rows: rows at a time; None: what `plan_linear_loss` says.

    Returns:
        `TeacherStatistics`: (D + 4) float32 a row, 12 k bytes for ``k``, and the hidden states.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value.
    """
    check_side(teacher, weight, bias, "teacher", {"teacher_weight": "weight", "teacher_bias": "bias"})
    dtype = statistics_dtype(teacher.dtype)
    if isinstance(temperature, Tensor):
        raise TypeError("temperature must be a float: the statistics hold for one")
    t = float(check_temperature(temperature, "temperature", teacher, dtype))
    scale = check_number(logit_scale, "logit_scale")
    if k is not None and not (isinstance(k, int) and 1 <= k <= weight.shape[0]):
        raise ValueError(f"k must be None or from 1 to the {weight.shape[0]} classes, got {k!r}")
    if precision is not None:
        if not keep_features:
            raise ValueError("keep_features must be True where precision is given: the full form needs them")
        if check_number(precision, "precision") <= 0:
            raise ValueError(f"precision must be positive, got {precision}")
    check_chunks(None, chunk_rows)
    shape = teacher.shape[:-1]
    rows = teacher.reshape(-1, teacher.shape[-1])
    if chunk_rows is None:
        chunk_rows = planned_rows(rows, weight.shape[0])
    parts = []
    for chunk in rows.split(max(chunk_rows, 1)):
        z = projection.logits(chunk, weight, bias) * (scale / t)
        top = z.argmax(1)
        log_p = torch.log_softmax(z, 1)
        p = log_p.exp()
        entropy = -torch.where(p > 0, p * log_p, 0).sum(1)
        kept = log_p.topk(k) if k else (None, None)
        # p − e_r, whose entry at r is minus the sum of the others: no cancellation where the teacher is sure.
        p.scatter_(1, top[:, None], 0)
        p.scatter_(1, top[:, None], -p.sum(1, keepdim=True))
        direction = projection.grad_features(p, weight)
        offset = torch.zeros_like(entropy)
        if bias is not None:
            offset = torch.where(p != 0, p * bias.to(dtype), 0).sum(1)
        parts.append((top, direction, offset, entropy, *kept))
    found = [None if x[0] is None else torch.cat(x).view(*shape, *x[0].shape[1:]) for x in zip(*parts)]
    if not parts:
        empty = teacher.new_empty(shape, dtype=dtype)
        found = [empty.long(), teacher.to(dtype), empty, empty, None, None]
    return TeacherStatistics(  # type: ignore[misc]
        *found,  # type: ignore[arg-type]
        features=teacher.detach() if keep_features else None,
        temperature=t,
        logit_scale=scale,
        precision=precision,
    )


def loss_of_teacher(
    student: Tensor,
    weight: Tensor,
    teacher: Tensor | TeacherStatistics | None,
    teacher_weight: Tensor | None,
    labels: Tensor | None,
    spec: Spec,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """`linear_loss`, of which the teacher may be known by its statistics."""
    if not isinstance(teacher, TeacherStatistics):
        arguments = (student, weight, teacher, teacher_weight, labels, spec)
        found = common_linear_loss(*arguments, options)
        return linear_loss(*arguments, **options) if found is None else (found, None)
    if spec.divergence == NONE and not spec.logit_mse:
        return linear_loss(student, weight, None, None, labels, spec, **options)
    if teacher_weight is not None and teacher_weight is not weight:
        raise ValueError("teacher_weight must be None or student_weight with TeacherStatistics")
    statistics, bias = teacher, options.pop("bias", None)
    if spec.divergence != KL or spec.standardize or spec.logit_mse:
        raise ValueError(
            "teacher must be hidden states unless soft is 'kl' without standardize and the logits' MSE: "
            "TeacherStatistics do not say more"
        )
    for name, value in (("student_weight", weight), ("student_bias", bias)):
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(f"{name} must not require grad: TeacherStatistics hold for one frozen head")
    check_side(student, weight, bias, "student")
    for name in (
        "log_probs",
        "indices",
        "softcap",
        "teacher_softcap",
        "teacher_logit_scale",
        "valid_classes",
    ):
        if options.get(name) is not None:
            raise ValueError(f"{name} must be None with TeacherStatistics, got {options[name]!r}")
    t, scale = statistics.temperature, statistics.logit_scale
    for name, value, own in (
        ("temperature", options["temperature"], t),
        ("teacher_temperature", options.get("teacher_temperature"), t),
        ("logit_scale", 1.0 if options.get("logit_scale") is None else options["logit_scale"], scale),
    ):
        if value is not None and (isinstance(value, Tensor) or value != own):
            raise ValueError(f"{name} must be {own}, for which the TeacherStatistics hold, got {value!r}")
    if statistics.top.shape != student.shape[:-1]:
        raise ValueError(
            f"teacher must have the student's rows {tuple(student.shape[:-1])}, got {tuple(statistics.top.shape)}"
        )
    mask, weights = options["mask"], options["weights"]
    options = {k: v for k, v in options.items() if k not in ("log_probs", "indices", "tail", "teacher_bias")}
    dtype = statistics_dtype(student.dtype)
    with_terms = options.pop("with_terms", False)
    loss, terms = linear_loss(
        student,
        weight,
        None,
        None,
        labels,
        spec,
        bias=bias,
        log_probs=statistics.entropy.new_zeros(*statistics.top.shape, 1),
        indices=statistics.top[..., None],
        tail="drop",
        with_terms=True,
        **options,
    )
    assert terms is not None
    counts = rows_that_count(student, mask, labels, options.get("ignore_index", -100))
    x = student.to(dtype)
    if counts is not None:
        x = torch.where(counts[..., None], x, 0)
    inner = (x * statistics.direction.to(dtype)).sum(-1) + statistics.offset
    factor = spec.soft_weight * (t * t if spec.squared else 1.0)
    rest = -factor * (inner * (scale / t) + statistics.entropy)
    weights = None if weights is None else check_weights(weights, student, dtype)
    rest = reduce_rows(rest, counts, weights, options["reduction"])
    precision, features = statistics.precision, statistics.features
    if precision is not None and _error(student, terms[0], rest.detach()) > precision:
        options.update(bias=bias, teacher_bias=bias, with_terms=with_terms)
        return linear_loss(student, weight, features, weight, labels, spec, **options)
    if not with_terms:
        return loss + rest, None
    return loss + rest, torch.cat((terms[:1] + rest.detach()[None], terms[1:]))


def _error(student: Tensor, bracket: Tensor, rest: Tensor) -> float:
    """The estimate of the module's opening: the larger relative error of loss and gradient."""
    loss_eps = torch.finfo(bracket.dtype).eps
    gradient_eps = torch.finfo(student.dtype).eps / 2
    top, other = bracket.abs().sum(), rest.abs().sum()
    kl = (bracket.sum() + rest.sum()).abs()
    return float(
        torch.maximum(loss_eps * (top + other) / kl, gradient_eps * (top / kl).sqrt()).nan_to_num(0.0)
    )
