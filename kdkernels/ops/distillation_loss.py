r"""The whole loss of a distillation step: soft term, hard cross-entropy, z-loss and logit MSE, in one pass over the
logits.

    hard_weight CE(student, labels) + soft_weight T² D(teacher / T, student / T) + z_loss lse(student)²
        + logit_mse_weight mean_j (student_j − teacher_j)²

CE, with label smoothing, and lse = log Σ e^z are of the raw logits. T² stands in the kernel: its gradient leaves in
final form, and the backward pass has nothing to multiply.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from kdkernels.ops.divergences import (
    DECOUPLED,
    KL,
    NONE,
    NORMALIZED,
    REVERSE_KL,
    TOTAL_VARIATION,
    Spec,
)
from kdkernels.ops.jsd import jsd_spec
from kdkernels.ops.logit_loss import TERMS, logit_loss
from kdkernels.ops.module import LossModule
from kdkernels.ops.rows import Range, Temperature, check_fraction, check_number
from kdkernels.ops.skew_kl_div import skew_spec

SOFT = ("kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "dkd", "nkd")


def distillation_spec(
    soft: str,
    labels: Tensor | None,
    *,
    soft_weight: float,
    hard_weight: float,
    label_smoothing: float,
    z_loss: float = 0.0,
    logit_mse_weight: float = 0.0,
    alpha: float | None = None,
    beta: float | None = None,
    gamma: float = 1.5,
    normalize: bool = False,
    standardize: bool = False,
) -> Spec:
    """The member of the family that the options of `distillation_loss` describe."""
    if soft not in SOFT:
        raise ValueError(f"soft must be one of {', '.join(SOFT)}, got {soft!r}")
    check_fraction(label_smoothing, "label_smoothing")
    rest: dict[str, Any] = {
        "standardize": standardize,
        "soft_weight": check_number(soft_weight, "soft_weight"),
        "squared": True,
        "hard_weight": check_number(hard_weight, "hard_weight"),
        "label_smoothing": float(label_smoothing),
        "z_loss": check_number(z_loss, "z_loss"),
        "logit_mse": check_number(logit_mse_weight, "logit_mse_weight"),
    }
    if labels is None and hard_weight:
        raise TypeError("labels must be given where hard_weight is not 0")
    if soft_weight == 0:
        return Spec(NONE, **rest)
    if soft == "jsd":
        return jsd_spec(0.5 if beta is None else beta, normalize, **rest)
    if soft in ("skew_kl", "skew_reverse_kl"):
        return skew_spec(0.1 if alpha is None else alpha, soft == "skew_reverse_kl", **rest)
    if soft == "dkd":
        first = check_number(1.0 if alpha is None else alpha, "alpha")
        second = check_number(8.0 if beta is None else beta, "beta")
        return Spec(DECOUPLED, first, second, **rest)
    if soft == "nkd":
        return Spec(NORMALIZED, rest["soft_weight"], check_number(gamma, "gamma"), **rest)
    return Spec({"kl": KL, "reverse_kl": REVERSE_KL, "tvd": TOTAL_VARIATION}[soft], **rest)


def named_terms(terms: Tensor, soft: str) -> dict[str, Tensor]:  # (5, ...)
    """The parts of a loss by name."""
    named = dict(zip(TERMS, terms))
    target = named.pop("target")
    if soft in ("dkd", "nkd"):
        named.update(target=target, non_target=named["soft"] - target)
    return named


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    soft: str = "kl",
    temperature: Temperature = 4.0,
    soft_weight: float = 0.9,
    hard_weight: float = 0.1,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_mse_weight: float = 0.0,
    ignore_index: int = -100,
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
    backend: str | None = None,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    r"""hard_weight·CE(student, labels) + soft_weight·T²·soft(student, teacher) + z_loss·lse² + logit_mse_weight·MSE, in
    one pass.

    Args:
        student: (..., N) logits: float32, float16, bfloat16, or float64 (backends reference and cpu).
        teacher: (..., N) logits of the same dtype and device. −inf is legal in both (a masked class).
        labels: (...) integers: each row's class, in the student's numbering. May be None where ``hard_weight`` is 0;
            "dkd" and "nkd" then take the teacher's largest logit.
        soft: the divergence: "kl" (`kl_div`), "reverse_kl", "jsd" (`jsd`), "skew_kl" and "skew_reverse_kl"
            (`skew_kl_div`), "tvd" (`tvd`), "dkd" (`dkd`), "nkd" (`nkd`, whose T² is inside and multiplies its
            non-target part only: here it is soft_weight·nkd).
        temperature: T of the soft term, and the teacher's unless ``teacher_temperature`` is given: a positive float,
            or a floating tensor that broadcasts to the rows (...), learnable; its gradient goes through T² too.
        soft_weight: the soft term's weight.
        hard_weight: the cross-entropy's weight; it is taken of the raw logits.
        label_smoothing: in [0, 1], as in ``F.cross_entropy``, over the classes that are not −inf.
        z_loss: weight of the squared log-sum-exp of the student's raw logits (PaLM, arXiv 2204.02311).
        logit_mse_weight: weight of the mean over a row's classes of (student − teacher)², of the raw logits: neither
            temperature nor ``standardize`` nor ``soft_weight`` has a part in it. A class that is −inf in both counts
            as equal, one that is so in one only makes the loss infinite.
        ignore_index: a row with this label counts for nothing: neither hard nor soft, nor in the denominator.
        alpha: of "dkd" (1) and of the skewed KLs (0.1).
        beta: of "dkd" (8) and of "jsd" (0.5).
        gamma: of "nkd".
        normalize: of "jsd".
        standardize: the soft term takes (z − mean) / (1e-7 + std) of each row instead of the logits z, on both sides
            (LSKD, arXiv 2403.01427). The cross-entropy stays on the raw logits.
        teacher_temperature: the teacher's T, when it differs. T² is the student's.
        mask: bool, broadcasts to the rows: True where a row counts. A row that does not count is not read.
        weights: floating, broadcasts to the rows: multiplies each row's loss; differentiable.
        reduction: "none" (the rows), "sum", or "batchmean": the sum divided by how many rows count.
        valid_classes: the student's classes that there are: the first n, or (start, stop). The others (padding of a
            vocabulary) carry no mass and get no gradient. The teacher's too, unless ``teacher_valid_classes`` is given;
            the two must be equally long.
        return_terms: also give the parts: a dict with "soft", "hard", "z_loss", "logit_mse" (they add up to the loss)
            and, of "soft", "target" and "non_target" for "dkd" and "nkd". Detached, weighted and reduced like the loss;
            they come from the same pass.
        backend: "reference", "cpu", "triton" or "cuda"; None takes the best that is available. A named one is obeyed
            or raises.

    Returns:
        The loss, () or (...): float32, or float64 for float64 logits; or (loss, terms).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value.
        RuntimeError: the named backend is not available.

    >>> loss = kdkernels.distillation_loss(student_logits, teacher_logits, labels, temperature=4.0)
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
    loss, terms = logit_loss(
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
        with_terms=return_terms,
        backend=backend,
    )
    return loss if terms is None else (loss, named_terms(terms, soft))


distillation_loss_reference = partial(distillation_loss, backend="reference")


class DistillationLoss(LossModule):
    """`distillation_loss` as a module: ``DistillationLoss(temperature=2.0)(student, teacher, labels)``."""

    function = staticmethod(distillation_loss)
