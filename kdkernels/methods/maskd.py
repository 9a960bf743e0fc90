"""MasKD (Huang et al., arXiv 2205.14589): the frozen teacher's map is distilled under masks that were learned on it.

Stage 1, `prepare`: tokens e (T, C), masks M = sigmoid(e · F) of the teacher's map F (M, C, H, W). The teacher goes on
from F' = Σ_t π_t (M_t ∘ F), π = softmax over t of (3×3 convolution → mean over space → 1×1 convolution)(F), and its
loss on the labels, plus the masks' likeness (Dice), trains e and π:

    CE(teacher(F'), y) + diversity_weight · mean_{t ≠ t'} 2⟨M_t, M_t'⟩ / (‖M_t‖² + ‖M_t'‖²)

Stage 2: CE(z_S, y) + weight · mean_n Σ_t π_t mean_c [Σ_hw (M_t (align(f_S) − f_T))² / Σ_hw M_t].
After `student_masks_after` steps the masks are multiplied by those of the student's own map.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import kdkernels
from kdkernels.methods.method import Method, Output
from kdkernels.methods.mgd import at_one_size
from kdkernels.methods.network import Seen


class MaskTokens(nn.Module):
    """The tokens, and what weighs their masks."""

    def __init__(self, channels: int, tokens: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(tokens, channels).normal_(0, 0.01))
        self.weigh = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, tokens, 1),
            nn.Flatten(),
        )

    def masks(self, x: Tensor) -> Tensor:  # (M, C, H, W) -> (M, T, H, W)
        return torch.einsum("tc,mchw->mthw", self.tokens, self._cast(x)).sigmoid()

    def weights(self, x: Tensor) -> Tensor:  # (M, C, H, W) -> (M, T), adding up to 1
        return self.weigh(self._cast(x)).softmax(1)

    def _cast(self, x: Tensor) -> Tensor:
        """In the tokens' dtype, unless autocast sees to that."""
        return x if torch.is_autocast_enabled(x.device.type) else x.to(self.tokens.dtype)

    def masked(self, x: Tensor) -> tuple[Tensor, Tensor]:  # (M, C, H, W) -> itself, (M, T, H, W)
        """F' and the masks."""
        masks = self.masks(x)
        return x * torch.einsum("mt,mthw->mhw", self.weights(x), masks)[:, None], masks


def likeness(masks: Tensor) -> Tensor:  # (M, T, H, W) -> ()
    """The mean of 2⟨a, b⟩ / (‖a‖² + ‖b‖²) over pairs of an image's masks; 0 of a single mask."""
    flat = masks.flatten(2)
    products = flat @ flat.mT  # (M, T, T)
    squares = products.diagonal(dim1=1, dim2=2)
    dice = 2 * products / (squares[:, :, None] + squares[:, None] + 2e-12)
    count = masks.shape[1]
    if count == 1 or not len(masks):
        return dice.sum() * 0
    off_diagonal = dice.sum((1, 2)) - dice.diagonal(dim1=1, dim2=2).sum(1)
    return off_diagonal.mean() / (count * (count - 1))


class MasKD(Method):
    """Masked distillation. Call `prepare` once before the first epoch."""

    uses = ("map",)

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        tokens: int = 6,
        weight: float = 1.0,
        hard_weight: float = 1.0,
        diversity_weight: float = 1.0,
        mask_steps: int = 2000,
        mask_learning_rate: float = 0.1,
        student_masks_after: int | None = None,
        **rest: Any,
    ) -> None:
        super().__init__(student, teacher, **rest)
        if tokens < 1:
            raise ValueError(f"tokens must be 1 or more, got {tokens}")
        self.weight, self.hard_weight, self.diversity_weight = weight, hard_weight, diversity_weight
        self.mask_steps, self.mask_learning_rate = mask_steps, mask_learning_rate
        self.student_masks_after = student_masks_after
        ours, theirs = self._student.width, self._teacher.width
        like = self._student.classifier.weight
        self.align = nn.Identity() if ours == theirs else nn.Conv2d(ours, theirs, 1)
        self.align.to(like)
        self.tokens = MaskTokens(theirs, tokens).to(like)
        self.steps, self.prepared = 0, False

    def parameters_to_train(self) -> list[nn.Parameter]:
        """Stage 2's: the student and what aligns its map; the tokens are frozen by then."""
        return [*super().parameters_to_train(), *self.align.parameters()]

    def mask_loss(self, images: Tensor, labels: Tensor) -> Output:
        """Stage 1's loss, for the parameters of `tokens`."""
        if not self._teacher.looked:
            self._teacher.look(images)
        if self._teacher.map_name is None:
            raise ValueError("teacher must have maps (M, C, H, W) for masks, got one without")
        calls = 0
        masks = None

        def replace(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            nonlocal calls, masks
            calls += 1
            if calls < self._teacher.map_calls:  # a module of several uses, of which the map is the last
                return output
            masked, masks = self.tokens.masked(self._teacher.of_width(output.detach()))
            return masked.to(output.dtype)

        handle = self.teacher.get_submodule(self._teacher.map_name).register_forward_hook(replace)
        try:
            logits = self.teacher(images)
        finally:
            handle.remove()
        assert masks is not None
        terms = {
            "hard": self._cross_entropy(logits, labels),
            "likeness": self.diversity_weight * likeness(masks),
        }
        return self._output(terms, logits)

    def prepare(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Stage 1: learn the masks on at most `mask_steps` batches of images and labels (SGD, rate falling to 1e-6
        along a cosine), and freeze them. Raises ValueError where there is no batch."""
        self.tokens.requires_grad_(True)
        optimizer = torch.optim.SGD(self.tokens.parameters(), self.mask_learning_rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.mask_steps, 1e-6)
        steps = 0
        for images, labels in itertools.islice(batches, self.mask_steps):
            optimizer.zero_grad()
            self.mask_loss(images, labels).loss.backward()
            optimizer.step()
            schedule.step()
            steps += 1
        if not steps:
            raise ValueError("batches must hold one batch of images and labels at least, got none")
        optimizer.zero_grad()
        self._freeze_masks()

    def _freeze_masks(self) -> None:
        self.tokens.requires_grad_(False)
        self.prepared = True

    def get_extra_state(self) -> dict[str, Any]:
        return {"steps": self.steps, "prepared": self.prepared}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        if state["prepared"]:
            self._freeze_masks()

    def forward(self, images: Tensor, labels: Tensor, teacher: Seen | None = None) -> Output:
        if not self.prepared:
            raise RuntimeError("the masks are not learned yet: call prepare(batches) first")
        teacher = self.look_at_teacher(images) if teacher is None else teacher
        student = self._student(images)
        x = self.align(self._student.of_width(student.map))
        x, y = at_one_size(x, self._teacher.of_width(teacher.map))
        y = y.to(x.dtype)
        with torch.no_grad():
            masks, weights = self.tokens.masks(y), self.tokens.weights(y)
            if self.student_masks_after is not None and self.steps >= self.student_masks_after:
                masks = masks * self.tokens.masks(x)
            if self.training and self.student_masks_after is not None:
                self.steps += 1
        terms = {
            "hard": self.hard_weight * self._cross_entropy(student.logits, labels),
            "masked": self.weight * kdkernels.masked_feature_loss(x, y, masks, weights, backend=self.backend),
        }
        return self._output(terms, student.logits)
