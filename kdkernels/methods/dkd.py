"""DKD (Zhao et al., arXiv 2203.08679): CE + w T² (α TCKD + β NCKD), w growing to 1 over the first `warmup` epochs.

On images without a label the target class is the teacher's largest logit.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from kdkernels.methods.kd import KD


class DKD(KD):
    """Decoupled distillation."""

    soft = "dkd"

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        soft_weight: float = 1.0,
        hard_weight: float = 1.0,
        warmup: int = 20,
        **rest: Any,
    ) -> None:
        super().__init__(
            student,
            teacher,
            temperature=temperature,
            soft_weight=soft_weight,
            hard_weight=hard_weight,
            **rest,
        )
        if warmup < 0:
            raise ValueError(f"warmup must be a number of epochs, 0 or more, got {warmup}")
        self.alpha, self.beta, self.warmup = alpha, beta, warmup
        self._ramp = 1.0

    def start_epoch(self, epoch: int, epochs: int) -> None:
        self._ramp = min(1.0, epoch / self.warmup) if self.warmup else 1.0

    def soft_weight_now(self) -> float:
        return self._ramp * self.soft_weight

    def soft_options(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "beta": self.beta}
