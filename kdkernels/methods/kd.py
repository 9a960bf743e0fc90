"""KD: hard_weight CE(z_S, y) + soft_weight T² KL(p_T ‖ p_S), both softmaxes of logits / T (Hinton et al.,
arXiv 1503.02531); with `standardize`, of logits standardised row by row (LSKD, arXiv 2403.01427)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import kdkernels
from kdkernels.methods.method import Method, Output
from kdkernels.methods.network import Seen
from kdkernels.ops.rows import Temperature


class KD(Method):
    """Distillation of logits. The student's and the teacher's logits are read once for both terms."""

    soft = "kl"

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        temperature: float = 4.0,
        soft_weight: float = 0.9,
        hard_weight: float = 0.1,
        standardize: bool = False,
        **rest: Any,
    ) -> None:
        super().__init__(student, teacher, **rest)
        self.temperature, self.standardize = temperature, standardize
        self.soft_weight, self.hard_weight = soft_weight, hard_weight

    def soft_options(self) -> dict[str, Any]:
        """What the divergence takes beside its weight and temperature."""
        return {}

    def soft_temperature(self) -> Temperature:
        return self.temperature

    def soft_weight_now(self) -> float:
        return self.soft_weight

    def forward(self, images: Tensor, labels: Tensor, teacher: Seen | None = None) -> Output:
        teacher = self.look_at_teacher(images) if teacher is None else teacher
        return self.of_logits(self.student(images), teacher.logits, labels)

    def of_logits(self, logits: Tensor, teacher: Tensor, labels: Tensor) -> Output:
        """The loss of logits."""
        options: dict[str, Any] = {
            "soft": self.soft,
            "temperature": self.soft_temperature(),
            "soft_weight": self.soft_weight_now(),
            "standardize": self.standardize,
            "backend": self.backend,
            **self.soft_options(),
        }
        teacher = teacher.to(logits.dtype)
        if len(labels) == len(logits):
            loss, terms = kdkernels.distillation_loss(
                logits, teacher, labels, hard_weight=self.hard_weight, return_terms=True, **options
            )
            kept = {name: terms[name] for name in ("hard", "soft")}
            return Output(loss, kept, logits)
        terms = {}
        if self.hard_weight:
            terms["hard"] = self.hard_weight * self._cross_entropy(logits, labels)
        targets = None
        if self.soft in ("dkd", "nkd"):  # of an image without a label: what the teacher takes it for
            targets = torch.cat([labels, teacher[len(labels) :].argmax(1)])
        soft = kdkernels.distillation_loss(logits, teacher, targets, hard_weight=0.0, **options)
        assert isinstance(soft, Tensor)
        return self._output({**terms, "soft": soft}, logits)
