"""Logit standardisation (LSKD, Sun et al., arXiv 2403.01427): KD of z' = (z − mean) / (1e-7 + std) instead of z, with
a base temperature of 2 and a large weight; the cross-entropy stays on z."""

from __future__ import annotations

from typing import Any

from torch import nn

from kdkernels.methods.kd import KD


class LSKD(KD):
    """KD of standardised logits; the authors' CIFAR weights. On DKD, NKD and CTKD it is `standardize=True`."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        temperature: float = 2.0,
        soft_weight: float = 9.0,
        hard_weight: float = 0.1,
        **rest: Any,
    ) -> None:
        super().__init__(
            student,
            teacher,
            temperature=temperature,
            soft_weight=soft_weight,
            hard_weight=hard_weight,
            **{"standardize": True, **rest},
        )
