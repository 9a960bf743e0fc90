"""DGKD (Son et al., arXiv 2009.08825): a student learns from the teacher and from all larger assistants at once,

    (1 − λ) CE + λ T² Σ_j KL(p_j ‖ p_S),

where each batch leaves `drop` of the terms out, drawn anew. The student's logits are read once for all teachers.
`element_mean=True` divides the KLs by the number of classes too, as the authors' code does. The assistants are trained
so themselves, largest first: kdkernels.methods.takd.chain(models, dense=True).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import kdkernels
from kdkernels.methods.method import Method, Output
from kdkernels.methods.network import Seen


class DGKD(Method):
    """Densely guided distillation; `teachers` are the teacher and the assistants."""

    def __init__(
        self,
        student: nn.Module,
        teachers: nn.Module | Sequence[nn.Module],
        *,
        temperature: float = 5.0,
        soft_weight: float = 1.0,
        drop: int = 1,
        element_mean: bool = False,
        generator: torch.Generator | None = None,
        **rest: Any,
    ) -> None:
        teachers = [teachers] if isinstance(teachers, nn.Module) else list(teachers)
        if not teachers:
            raise ValueError("teachers must be one model at least, got none")
        super().__init__(student, teachers[0], **rest)
        if drop < 0 or (drop >= len(teachers) and len(teachers) > 1):
            raise ValueError(f"drop must leave one of the {len(teachers)} teachers at least, got {drop}")
        self.teachers = nn.ModuleList(teachers)
        self._networks = [self._teacher, *(self._take_teacher(t) for t in teachers[1:])]
        self.temperature, self.soft_weight = temperature, soft_weight
        self.drop = drop if len(teachers) > 1 else 0
        self.element_mean, self.generator = element_mean, generator

    def frozen(self) -> list[nn.Module]:
        return list(self.teachers)

    def look_at(self, number: int) -> Callable[[Tensor], Seen]:
        """What `look_at_teacher` is, of one of the teachers."""

        def look(images: Tensor) -> Seen:
            with torch.no_grad():
                return self._networks[number](images)

        return look

    def look_at_teachers(self, images: Tensor) -> list[Tensor]:
        """Every teacher's logits, (M, N) each."""
        return self._look_at(images, range(len(self._networks)))

    def _look_at(self, images: Tensor, numbers: Sequence[int]) -> list[Tensor]:
        with torch.no_grad():
            return [self._networks[number](images).logits for number in numbers]

    @torch.compiler.disable
    def _kept(self) -> list[int]:
        """The teachers of a batch."""
        numbers = range(len(self._networks))
        if not (self.training and self.drop):
            return list(numbers)
        return sorted(torch.randperm(len(numbers), generator=self.generator)[self.drop :].tolist())

    def forward(
        self, images: Tensor, labels: Tensor, teacher: Seen | Sequence[Tensor] | None = None
    ) -> Output:
        """`teacher`: what `look_at_teachers` gave for these images, if it is known already."""
        if isinstance(teacher, Seen):
            raise TypeError("teacher must be the logits of all teachers (look_at_teachers), got those of one")
        if teacher is not None and len(teacher) != len(self._networks):
            raise ValueError(
                f"teacher must be the logits of all {len(self._networks)} teachers, got {len(teacher)}"
            )
        kept = self._kept()
        of_kept = self._look_at(images, kept) if teacher is None else [teacher[number] for number in kept]
        logits = self.student(images)
        soft = kdkernels.multi_teacher_kl_div(
            logits,
            [x.to(logits.dtype) for x in of_kept],
            temperatures=self.temperature,
            backend=self.backend,
        )
        assert isinstance(soft, Tensor)
        scale = self.soft_weight * self.temperature**2 / (logits.shape[1] if self.element_mean else 1)
        terms = {"soft": scale * soft}
        if self.soft_weight != 1:
            terms["hard"] = (1 - self.soft_weight) * self._cross_entropy(logits, labels)
        return self._output(terms, logits)
