"""CTKD (Li et al., arXiv 2211.16231): KD whose temperature T = start + span·sigmoid(θ) is learned against the student.

T stands in both softmaxes and in T²; all three carry gradient. A gradient reversal makes θ ascend the loss, with a
strength that grows from 0 to 1 along a cosine over the first `reversal_epochs` epochs. θ is trained by the student's
optimizer, as in the authors' code.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kdkernels.methods.kd import KD
from kdkernels.ops.temperature import LearnableTemperature, cosine_reversal


class CTKD(KD):
    """Curriculum temperature; `soft` "kl", or "dkd" with its alpha and beta."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        soft: str = "kl",
        start: float = 1.0,
        span: float = 20.0,
        reversal_epochs: int = 10,
        soft_weight: float = 0.9,
        hard_weight: float = 0.1,
        alpha: float = 1.0,
        beta: float = 8.0,
        **rest: Any,
    ) -> None:
        super().__init__(student, teacher, soft_weight=soft_weight, hard_weight=hard_weight, **rest)
        if soft not in ("kl", "dkd"):
            raise ValueError(f"soft must be 'kl' or 'dkd', got {soft!r}")
        if not reversal_epochs > 0:
            raise ValueError(f"reversal_epochs must be positive, got {reversal_epochs}")
        self.soft, self.alpha, self.beta = soft, alpha, beta
        self.learned = LearnableTemperature(start, span).to(self._student.classifier.weight.device)
        self.reversal_epochs = reversal_epochs
        self.strength = cosine_reversal(1, reversal_epochs)

    def parameters_to_train(self) -> list[nn.Parameter]:
        return [*super().parameters_to_train(), *self.learned.parameters()]

    def start_epoch(self, epoch: int, epochs: int) -> None:
        self.strength = cosine_reversal(epoch, self.reversal_epochs)

    def soft_temperature(self) -> Tensor:
        return self.learned(self.strength)

    def soft_options(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "beta": self.beta} if self.soft == "dkd" else {}

    def monitor(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        return {"temperature": float(self.learned().detach())}
