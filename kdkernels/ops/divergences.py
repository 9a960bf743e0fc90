r"""What a loss from logits puts between two rows of logits: the formulas of the family, in plain PyTorch.

P = softmax(teacher / T_t) and Q = softmax(student / T_s); D = log P − log Q; y the row's label. A `Spec` says which
divergence, with which numbers; `soft_rows` is the specification that every kernel is tested against.

Each Kullback–Leibler term is summed in the Bregman form Σ p (Δ + e^−Δ − 1), whose terms are all ≥ 0 and of second
order, so that nothing cancels as the student approaches the teacher.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Divergence in csrc/kdkernels.h.
(
    NONE,
    KL,
    REVERSE_KL,
    MIXTURE,
    TOTAL_VARIATION,
    DECOUPLED,
    REVERSE_DECOUPLED,
    NORMALIZED,
    REVERSE_NORMALIZED,
) = range(9)
STATISTICS = 9
OF_LABELS = (DECOUPLED, REVERSE_DECOUPLED, NORMALIZED, REVERSE_NORMALIZED)
SPREAD_EPS = 1e-7  # added to the standard deviation (LSKD, arXiv 2403.01427)


class Spec(NamedTuple):
    """One loss of the family: soft_weight (T² if squared) D(P, Q) + hard_weight CE + z_loss lse² + logit_mse MSE."""

    divergence: int = KL
    first: float = 1.0
    second: float = 1.0
    mix: float = 0.0
    standardize: bool = False
    soft_weight: float = 1.0
    squared: bool = False
    hard_weight: float = 0.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    logit_mse: float = 0.0

    @property
    def reads_target(self) -> bool:
        return self.divergence != NONE or self.logit_mse != 0

    @property
    def of_kernels(self) -> tuple[int | float | bool, ...]:
        """What kernels of logits take: all but the soft term's scale, which they have for each row or as a number."""
        return (*self[:5], *self[7:])

    def exchanged(self) -> Spec:
        """What there is of the teacher, seen from its side: the soft term with the sides exchanged, and the MSE."""
        divergence = {
            KL: REVERSE_KL,
            REVERSE_KL: KL,
            DECOUPLED: REVERSE_DECOUPLED,
            REVERSE_DECOUPLED: DECOUPLED,
            NORMALIZED: REVERSE_NORMALIZED,
            REVERSE_NORMALIZED: NORMALIZED,
        }.get(self.divergence, self.divergence)
        spec = self._replace(divergence=divergence, hard_weight=0.0, label_smoothing=0.0, z_loss=0.0)
        if divergence == MIXTURE:
            spec = spec._replace(first=self.second, second=self.first, mix=1 - self.mix)
        return spec


def standardized(logits: Tensor) -> Tensor:  # (..., N)
    """(z − mean) / (1e-7 + std) of each row, std over N − 1; −inf stays, uncounted; a constant row gives zeros."""
    live = logits != -torch.inf
    count = live.sum(-1, keepdim=True)
    # From the maximum, so that a constant row is exactly 0.
    top = logits.detach().amax(-1, keepdim=True)
    z = torch.where(live, logits - torch.where(top == -torch.inf, 0, top), 0)
    z = torch.where(live, z - z.sum(-1, keepdim=True) / count.clamp(min=1), 0)
    variance = z.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    constant = variance == 0
    spread = torch.where(constant, 1, variance).sqrt()
    z = torch.where(constant, 0, z / (spread + SPREAD_EPS))
    masked = torch.where(constant, logits.detach(), logits) / (spread.detach() + SPREAD_EPS)
    return torch.where(live, z, torch.where(live, 0, masked))


def tempered(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """log softmax(logits / T)."""
    return torch.log_softmax(divided(logits, temperature), -1)


def divided(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """logits / T; −inf stays, and has no part in the temperature's gradient."""
    if not isinstance(temperature, Tensor):
        return logits / temperature
    live, temperature = logits != -torch.inf, temperature[..., None]
    return torch.where(live, logits, 0) / temperature + torch.where(live, 0, logits) / temperature.detach()


def kl_rows(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(P‖Q) from log-probabilities."""
    p, q = log_p.exp(), log_q.exp()
    return bregman(p, q, torch.where(p == 0, 0, log_p - log_q))


def bregman(p: Tensor, q: Tensor, delta: Tensor) -> Tensor:
    """Σ p δ with δ = log(p / q), 0 where p = 0, and Σ p = Σ q."""
    near = delta.abs() < 1
    difference = torch.where(near & (p > 0), p * torch.expm1(-torch.where(near, delta, 0)), q - p)
    return (p * delta + difference).sum(-1)


def mixture_rows(log_p: Tensor, log_q: Tensor, spec: Spec) -> Tensor:
    """first KL(P‖M) + second KL(Q‖M), M = mix P + (1 − mix) Q."""

    def to_mixture(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:  # KL(A‖share A + (1 − share) B)
        a, b = log_a.exp(), log_b.exp()
        alive = ~(a < torch.finfo(a.dtype).tiny)  # so that e^(log b − log a) is finite
        a, difference = torch.where(alive, a, 0), torch.where(alive, log_b - log_a, 0)
        return bregman(a, share * a + (1 - share) * b, -torch.log1p((1 - share) * torch.expm1(difference)))

    rows = weighted(spec.first, to_mixture(log_p, log_q, spec.mix))
    return rows + weighted(spec.second, to_mixture(log_q, log_p, 1 - spec.mix))


def weighted(weight: float, rows: Tensor) -> Tensor:
    """weight · rows with 0 · ∞ = 0."""
    return weight * (rows if weight else torch.where(rows.isinf(), 0, rows))


def total_variation_rows(log_p: Tensor, log_q: Tensor) -> Tensor:
    """½ Σ |P − Q|, with derivative 0 where the two are equal."""
    p, q = log_p.exp(), log_q.exp()
    both = (p > 0) & (q > 0)
    delta = torch.where(both, log_p - log_q, 0)
    near = both & (delta.abs() < 1)
    difference = torch.where(near, p * torch.expm1(-torch.where(near, delta, 0)), q - p)
    return 0.5 * difference.abs().sum(-1)


def split_off(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (..., N), (...)
    """(log P', u, alone): the log-softmax over the classes other than y, the logit of y against their sum (P_y =
    sigmoid(u)), and where there is no other class (P' is then 0 and u infinite)."""
    target = logits.gather(-1, labels[..., None])[..., 0]
    others = logits.scatter(-1, labels[..., None], -torch.inf)
    alone = (others == -torch.inf).all(-1)
    others = torch.where(alone[..., None], 0, others)
    log_others = torch.where(alone[..., None], -torch.inf, torch.log_softmax(others, -1))
    target = torch.where(target == torch.inf, torch.nan, target)
    return log_others, torch.where(alone, torch.inf, target - torch.logsumexp(others, -1)), alone


def decoupled_rows(p_logits: Tensor, q_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """KL of the target class against all others, and KL among the others (DKD, arXiv 2203.08679)."""
    (log_p, u_p, alone_p), (log_q, u_q, alone_q) = split_off(p_logits, labels), split_off(q_logits, labels)

    def both(u: Tensor) -> Tensor:  # log P_y and log (1 - P_y)
        return torch.stack((torch.nn.functional.logsigmoid(u), torch.nn.functional.logsigmoid(-u)), -1)

    target = kl_rows(both(u_p), both(u_q))
    others = torch.where(alone_p | alone_q, 0, kl_rows(log_p, log_q))
    return target, torch.where(alone_q & ~alone_p, torch.inf, others)


def cross_entropy_rows(log_p: Tensor, log_q: Tensor) -> Tensor:
    """−Σ P log Q, 0 where P = 0."""
    p = log_p.exp()
    return -(p * torch.where(p > 0, log_q, 0)).sum(-1)


def soft_rows(
    student: Tensor,  # (..., N)
    teacher: Tensor,  # (..., N)
    labels: Tensor | None,  # (...)
    temperature: float | Tensor,
    teacher_temperature: float | Tensor,
    spec: Spec,
) -> tuple[Tensor, Tensor]:
    """soft_weight (T² if squared) D(P, Q) row by row, and its part with the factor `first` (0 where it has none)."""
    if spec.standardize:
        student, teacher = standardized(student), standardized(teacher)
    scale = spec.soft_weight * (temperature**2 if spec.squared else 1.0)
    if spec.divergence in OF_LABELS:
        assert labels is not None
        p, q = divided(teacher, teacher_temperature), divided(student, temperature)
        if spec.divergence in (REVERSE_DECOUPLED, REVERSE_NORMALIZED):
            p, q, teacher, student = q, p, student, teacher
        if spec.divergence in (DECOUPLED, REVERSE_DECOUPLED):
            target, others = decoupled_rows(p, q, labels)
            first = scale * weighted(spec.first, target)
            return first + scale * weighted(spec.second, others), first
        (log_p, _, alone), (log_q, _, _) = split_off(p, labels), split_off(q, labels)
        y = labels[..., None]
        p_y = torch.softmax(teacher, -1).gather(-1, y)[..., 0]
        log_q_y = torch.log_softmax(student, -1).gather(-1, y)[..., 0]
        first = weighted(spec.first, -p_y * torch.where(p_y == 0, 0, log_q_y))
        others = torch.where(alone, 0, cross_entropy_rows(log_p, log_q))
        return first + scale * weighted(spec.second, others), first
    log_p, log_q = tempered(teacher, teacher_temperature), tempered(student, temperature)
    if spec.divergence == KL:
        rows = kl_rows(log_p, log_q)
    elif spec.divergence == REVERSE_KL:
        rows = kl_rows(log_q, log_p)
    elif spec.divergence == MIXTURE:
        rows = mixture_rows(log_p, log_q, spec)
    else:
        rows = total_variation_rows(log_p, log_q)
    return scale * rows, torch.zeros_like(rows)


def hard_rows(student: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy with smoothing over the classes that are not −inf."""
    target = student.gather(-1, labels[..., None])[..., 0]
    hard = torch.logsumexp(student, -1) - weighted(1 - label_smoothing, target)
    if label_smoothing:
        live = student > -torch.inf
        hard = hard - label_smoothing * torch.where(live, student, 0).sum(-1) / live.sum(-1)
    return hard


def mse_rows(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared difference of the logits as they are; 0 at a class that is −inf in both."""
    masked = (student == -torch.inf) & (teacher == -torch.inf)
    return torch.where(masked, 0, student - teacher).square().mean(-1)


def statistics_rows(
    student: Tensor,
    teacher: Tensor,
    temperature: float | Tensor,
    teacher_temperature: float | Tensor,
    spec: Spec,
) -> list[Tensor]:
    """KL(P‖Q), the entropies of P and of Q, Σ min(P, Q), and whether both have the same first maximum."""
    top = (student.argmax(-1) == teacher.argmax(-1)).to(student.dtype)
    if spec.standardize:
        student, teacher = standardized(student), standardized(teacher)
    log_p, log_q = tempered(teacher, teacher_temperature), tempered(student, temperature)
    overlap = torch.minimum(log_p.exp(), log_q.exp()).sum(-1)
    entropies = [cross_entropy_rows(log_p, log_p), cross_entropy_rows(log_q, log_q)]
    return [kl_rows(log_p, log_q), *entropies, overlap, top]
