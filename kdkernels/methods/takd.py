"""TAKD (Mirzadeh et al., arXiv 1902.03393): a chain teacher → assistants → student, each hop a run of plain KD with the
model before it frozen at its best epoch.

A hop's loss is (1 − λ) CE + λ T² KL(p ‖ p_S). `element_mean=True` divides the KL by the number of classes too, as the
authors' code does. `chain` says which run follows which.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from kdkernels.methods.kd import KD


class TAKD(KD):
    """One hop of the chain."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        temperature: float = 5.0,
        soft_weight: float = 0.5,
        element_mean: bool = False,
        **rest: Any,
    ) -> None:
        rest.setdefault("hard_weight", 1.0 - soft_weight)
        super().__init__(student, teacher, temperature=temperature, soft_weight=soft_weight, **rest)
        self.element_mean = element_mean

    def soft_weight_now(self) -> float:
        return self.soft_weight / (self._student.classes if self.element_mean else 1)


class Hop(NamedTuple):
    """One run of a chain: who learns, from whom (positions in the chain, the teacher's first)."""

    learner: int
    teachers: tuple[int, ...]


def chain(models: Sequence[Any], dense: bool = False) -> list[Hop]:
    """The runs of a chain of models, the teacher first and the student last.

    Each learns from the one before it (TAKD), or from all before it (`dense`: DGKD).
    """
    if len(models) < 2:
        raise ValueError(f"a chain must have a teacher and a student at least, got {len(models)} models")
    return [Hop(i, tuple(range(i)) if dense else (i - 1,)) for i in range(1, len(models))]
