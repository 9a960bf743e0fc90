"""Each loss as people write it in PyTorch: what ours is measured against.

The formulas are those of the libraries named at each; the code is not theirs. Sums are over the classes, means
over the rows. Statistics have the logits' dtype where the library leaves them so, and float32 where it says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def kl(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """mdistiller, torchtune and most training scripts."""
    log_q, log_p = (F.log_softmax(x / temperature, -1) for x in (student, teacher))
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def reverse_kl(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """MiniLLM's direction."""
    return kl(teacher, student, temperature=temperature)


def skew_kl(student: Tensor, teacher: Tensor, *, alpha: float, temperature: float) -> Tensor:
    """DistiLLM, with the teacher's entropy: KL(p‖α p + (1−α) q)."""
    log_q, log_p = (F.log_softmax(x / temperature, -1) for x in (student, teacher))
    p, q = log_p.exp(), log_q.exp()
    return (p * (log_p - torch.log(alpha * p + (1 - alpha) * q))).sum(-1).mean()


def hard_and_soft(
    student: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float, hard: float, soft: float
) -> Tensor:
    """Hinton et al.: cross-entropy of the labels, T² KL of the teacher."""
    return hard * F.cross_entropy(student, labels) + soft * temperature**2 * kl(
        student, teacher, temperature=temperature
    )


def standardized_kl(student: Tensor, teacher: Tensor, *, temperature: float, weight: float) -> Tensor:
    """LSKD, in its release and in torchdistill."""

    def standardize(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (1e-7 + x.std(-1, keepdim=True))

    return weight * temperature**2 * kl(standardize(student), standardize(teacher), temperature=temperature)


def dkd(
    student: Tensor, teacher: Tensor, labels: Tensor, *, alpha: float, beta: float, temperature: float
) -> Tensor:
    """mdistiller, T² included: the logarithm of summed softmaxes; 1000 less hides the target from a softmax."""
    target = F.one_hot(labels, student.shape[-1]).bool()

    def pair(logits: Tensor) -> Tensor:
        p = F.softmax(logits / temperature, -1)
        return torch.stack([(p * target).sum(-1), (p * ~target).sum(-1)], -1)

    target_part = F.kl_div(pair(student).log(), pair(teacher), reduction="batchmean")
    hidden = 1000.0 * target
    log_q = F.log_softmax(student / temperature - hidden, -1)
    p = F.softmax(teacher / temperature - hidden, -1)
    return temperature**2 * (alpha * target_part + beta * F.kl_div(log_q, p, reduction="batchmean"))


def nkd(student: Tensor, teacher: Tensor, labels: Tensor, *, gamma: float, temperature: float) -> Tensor:
    """cls_KD, which cuts the target's column out; filling it is faster, and one graph for a compiler."""
    y = labels[:, None]
    log_q_y = F.log_softmax(student, -1).gather(-1, y)
    p_y = F.softmax(teacher, -1).gather(-1, y)
    target = F.one_hot(labels, student.shape[-1]).bool()
    low = torch.finfo(student.dtype).min / 2  # finite, so that 0 times it is 0
    log_q = F.log_softmax((student / temperature).masked_fill(target, low), -1)
    p = F.softmax((teacher / temperature).masked_fill(target, low), -1)
    return -(p_y * log_q_y).mean() - gamma * temperature**2 * (p * log_q).sum(-1).mean()


def jsd(student: Tensor, teacher: Tensor, *, beta: float, temperature: float) -> Tensor:
    """TRL's GKD, and Liger's chunked loss."""
    log_q, log_p = (F.log_softmax(x / temperature, -1) for x in (student, teacher))
    if beta == 0:
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    if beta == 1:
        return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    log_m = torch.logsumexp(torch.stack([log_q + math.log1p(-beta), log_p + math.log(beta)]), 0)
    of_teacher = F.kl_div(log_m, log_p, reduction="batchmean", log_target=True)
    of_student = F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)
    return beta * of_teacher + (1 - beta) * of_student


def tvd(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """DistillKit, whose softmaxes are float32."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    q, p = (F.softmax(x / temperature, -1, dtype=dtype) for x in (student, teacher))
    return 0.5 * (p - q).abs().sum(-1).mean()


def topk(
    student: Tensor, log_probs: Tensor, indices: Tensor, *, temperature: float, tail: str = "bucket"
) -> Tensor:
    """TRL's sparse distillation losses (bucket), axolotl's and DistillKit's (drop); statistics in float32."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    log_q = F.log_softmax(student / temperature, -1, dtype=dtype).gather(-1, indices)
    log_p = log_probs
    if tail == "bucket":

        def with_rest(x: Tensor) -> Tensor:
            total = torch.logsumexp(x, -1, keepdim=True).clamp(max=-1e-7)
            return torch.cat([x, torch.log(-torch.expm1(total))], -1)

        log_q, log_p = with_rest(log_q), with_rest(log_p)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def multi_teacher(
    student: Tensor, *teachers: Tensor, weights: Sequence[float], temperatures: Sequence[float]
) -> Tensor:
    """A sum over the teachers, as DGKD and most scripts have it."""
    losses = [
        weight * kl(student, teacher, temperature=temperature)
        for teacher, weight, temperature in zip(teachers, weights, temperatures)
    ]
    return torch.stack(losses).sum()


def of_heads(
    student: Tensor,
    weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    *labels: Tensor,
    loss: Callable[..., Tensor],
    upcast: bool = False,
) -> Tensor:
    """A loss of logits from hidden states and heads, which is how training scripts come by logits; `upcast`: as under
    autocast, whose softmaxes are float32."""
    logits = [F.linear(student, weight), F.linear(teacher, teacher_weight)]
    return loss(*(x.float() if upcast else x for x in logits), *labels)


def shared_classifier(
    student: Tensor, weight: Tensor, bias: Tensor, teacher: Tensor, labels: Tensor
) -> Tensor:
    """IJCKD: CE + MSE of logits + MSE of maps (or features), with SimKD's path through the teacher's classifier."""

    def classify(x: Tensor) -> Tensor:
        return F.linear(x.flatten(2).mean(2) if x.dim() > 2 else x, weight, bias)

    s, t = classify(student), classify(teacher)
    return F.cross_entropy(s, labels) + F.mse_loss(s, t) + F.mse_loss(student, teacher)
