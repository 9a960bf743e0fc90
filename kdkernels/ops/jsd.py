r"""Generalised Jensen–Shannon divergence of temperature softmaxes (Lin 1991; GKD, Agarwal et al., arXiv 2306.13649).

    M = beta P + (1 − beta) Q,   JSD = beta KL(P‖M) + (1 − beta) KL(Q‖M)

With `normalize` it is divided by beta (1 − beta), which makes a family that is continuous in beta and ends in
KL(P‖Q) at beta = 0 and KL(Q‖P) at beta = 1; without, both ends are 0.

Gradient: dJSD/dx_j = (1 − beta) Q_j (log(Q_j / M_j) − KL(Q‖M)) in the student's scaled logits x = z / T.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from kdkernels.ops.divergences import KL, MIXTURE, REVERSE_KL, Spec
from kdkernels.ops.logit_loss import logit_loss
from kdkernels.ops.module import LossModule
from kdkernels.ops.rows import Range, Temperature, check_fraction


def jsd_spec(beta: float, normalize: bool, **rest: Any) -> Spec:
    """The member of the family that `jsd` is."""
    check_fraction(beta, "beta")
    if normalize and beta in (0, 1):
        return Spec(KL if beta == 0 else REVERSE_KL, **rest)
    if beta in (0, 1):
        return Spec(MIXTURE, 0.0, 0.0, 0.5, **rest)
    first, second = (1 / (1 - beta), 1 / beta) if normalize else (beta, 1 - beta)
    return Spec(MIXTURE, float(first), float(second), float(beta), **rest)


def jsd(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 0.5,
    normalize: bool = False,
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
    r"""Generalised Jensen–Shannon divergence β·KL(p_T‖m) + (1−β)·KL(p_S‖m), m = β p_T + (1−β) p_S; no T² factor.

    With ``normalize`` it is divided by β(1−β): KL(p_T‖p_S) at β = 0, KL(p_S‖p_T) at β = 1, continuous between.

    How other libraries' β maps to this one: TRL's GKD and Liger's JSD use the same m = β p_T + (1−β) p_S and the same
    weights, unnormalised, except that they define β = 0 and β = 1 as the two KLs, where this one (unnormalised) is 0:
    ask for ``normalize=True`` there. A library whose β multiplies the student (m = β p_S + (1−β) p_T) has 1 − β here.

    Args:
        student: (..., N) logits: float32, float16, bfloat16, or float64 (backends reference and cpu).
        teacher: (..., N) logits of the same dtype and device. −inf is legal in both (a masked class).
        beta: β in [0, 1], the teacher's share of the mixture.
        normalize: divide by β(1−β).
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

    >>> loss = 4.0**2 * kdkernels.jsd(student_logits, teacher_logits, beta=0.5, temperature=4.0)
    """
    spec = jsd_spec(beta, normalize, standardize=standardize)
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


jsd_reference = partial(jsd, backend="reference")


class JSDLoss(LossModule):
    """`jsd` as a module: ``JSDLoss(beta=0.1, temperature=2.0)(student, teacher)``."""

    function = staticmethod(jsd)
