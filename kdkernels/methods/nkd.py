"""NKD (Yang et al., arXiv 2303.13005): CE − p_T(y) log p_S(y) + γ T² CE(q_T, q_S), q the softmaxes of the other
classes' logits / T. On images without a label the target class is the teacher's largest logit.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from kdkernels.methods.kd import KD


class NKD(KD):
    """Normalised distillation; the authors' ImageNet values (CIFAR: temperature 3, gamma 3.5)."""

    soft = "nkd"

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        gamma: float = 1.5,
        temperature: float = 1.0,
        soft_weight: float = 1.0,
        hard_weight: float = 1.0,
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
        self.gamma = gamma

    def soft_options(self) -> dict[str, Any]:
        return {"gamma": self.gamma}
