"""MGD (Yang et al., arXiv 2205.01529): from a randomly masked map of the student a small generator must make the whole
map of the teacher.

    CE + α / M · Σ (G(mask ∘ align(f_S)) − f_T)²       summed over channels and places, averaged over images

align: a 1×1 convolution, where the channels differ. G: 3×3 convolution, ReLU, 3×3 convolution. The mask drops channels
(classification) or places (`mask="pixels"`) with probability `drop`, drawn for each image and call; what is kept is not
scaled up. As α multiplies a sum, it is tied to the map's size.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

import kdkernels
from kdkernels.methods.method import Method, Output
from kdkernels.methods.network import Seen

MASKS = ("channels", "pixels")


class MGD(Method):
    """Masked generation; the authors' ImageNet values (cls_KD's CIFAR: weight 1.2e-3)."""

    uses = ("map",)

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        weight: float = 7e-5,
        drop: float = 0.15,
        mask: str = "channels",
        hard_weight: float = 1.0,
        generator: torch.Generator | None = None,
        **rest: Any,
    ) -> None:
        super().__init__(student, teacher, **rest)
        if mask not in MASKS:
            raise ValueError(f"mask must be one of {', '.join(MASKS)}, got {mask!r}")
        if not 0 <= drop < 1:
            raise ValueError(f"drop must be from 0 to below 1, got {drop}")
        self.weight, self.drop, self.mask, self.hard_weight = weight, drop, mask, hard_weight
        self.random = generator
        ours, theirs = self._student.width, self._teacher.width
        self.align = nn.Identity() if ours == theirs else nn.Conv2d(ours, theirs, 1)
        self.align.to(self._student.classifier.weight)
        self.generation = nn.Sequential(
            nn.Conv2d(theirs, theirs, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(theirs, theirs, 3, padding=1),
        ).to(self._student.classifier.weight)

    def parameters_to_train(self) -> list[nn.Parameter]:
        return [*super().parameters_to_train(), *self.align.parameters(), *self.generation.parameters()]

    def forward(self, images: Tensor, labels: Tensor, teacher: Seen | None = None) -> Output:
        teacher = self.look_at_teacher(images) if teacher is None else teacher
        student = self._student(images)
        x = self.align(self._student.of_width(student.map))
        x, y = at_one_size(x, self._teacher.of_width(teacher.map))
        count, channels, height, width = x.shape
        shape = (count, channels, 1, 1) if self.mask == "channels" else (count, 1, height, width)
        # Drawn on the CPU, so that a seed means the same masks on every device.
        kept = (torch.rand(shape, generator=self.random) >= self.drop).to(x)
        made = self.generation(x * kept)
        # Means over a map's elements.
        *_, mse = kdkernels.pool_mse(made, y.to(made.dtype), backend=self.backend)
        terms = {
            "hard": self.hard_weight * self._cross_entropy(student.logits, labels),
            "generation": self.weight * y.shape[1:].numel() * mse.mean(),
        }
        return self._output(terms, student.logits)


def at_one_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:  # (M, C, H, W) both
    """Both maps at the smaller of their sizes: the larger is averaged to it (SimKD's rule)."""
    if student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    pool = cast(Any, nn.functional.adaptive_avg_pool2d)
    if student.shape[2] > teacher.shape[2]:
        return pool(student, list(teacher.shape[2:])), teacher
    return student, pool(teacher, list(student.shape[2:]))
