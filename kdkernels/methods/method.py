"""What every method is: a student, a teacher, a loss in named terms, and what is shipped in the end.

method = SimKD(student, teacher)
optimizer = torch.optim.SGD(method.parameters_to_train(), 0.05)
for epoch in range(1, epochs + 1):
    method.train()
    method.start_epoch(epoch, epochs)
    for images, labels in loader:
        output = method(images, labels)
        optimizer.zero_grad(); output.loss.backward(); optimizer.step()
method.deployable().save("student.safetensors")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

import kdkernels
from kdkernels.methods.connectors import make_connector
from kdkernels.methods.deployable import Deployable
from kdkernels.methods.network import Network, Seen

if TYPE_CHECKING:
    from typing_extensions import Self


class Output(NamedTuple):
    """What a step gives."""

    loss: Tensor  # ()
    terms: dict[str, Tensor]  # the loss's parts with their weights; detached, and adding up to it
    logits: Tensor  # (M, N): of what is deployed


class Method(nn.Module):
    """The base of all methods. Raises, in one line, ValueError of options that it does not know, of class counts that
    differ and of maps that do not fit, TypeError of what is no model.

    The models are not changed; the teacher is frozen (its parameters require no gradient,
    and it stays in evaluation mode) by every method that does not train it.

    Called with images (M, …) and labels (L,), L ≤ M: the first L images have those labels, the others have none and
    take part in all but the cross-entropy.
    """

    #: Which of the teacher's outputs a step uses: these a caller may keep and hand in again.
    uses: tuple[str, ...] = ("logits",)
    #: Whether the teacher is trained too.
    learning_teacher = False

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        student_classifier: str | None = None,
        teacher_classifier: str | None = None,
        student_map: str | None = None,
        teacher_map: str | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self._student = Network(student, "student", student_classifier, student_map)
        self._names = {"classifier": teacher_classifier, "map": teacher_map}  # the same in every teacher
        self._teacher = self._take_teacher(teacher)
        self.student, self.teacher = student, teacher
        self.backend = backend
        #: Makes one batch of all processes' features; one process has them all already.
        self.gather: Callable[[Tensor], Tensor] = lambda x: x

    def _take_teacher(self, teacher: nn.Module) -> Network:
        network = Network(teacher, "teacher", **self._names)
        if self._student.classes != network.classes:
            raise ValueError(
                f"student must have the teacher's {network.classes} classes, got {self._student.classes}"
            )
        if self.learning_teacher:
            teacher.requires_grad_(True)
        else:
            teacher.requires_grad_(False).eval()
        return network

    def train(self, mode: bool = True) -> Self:
        """Training mode for all but a frozen teacher."""
        super().train(mode)
        for teacher in self.frozen():
            teacher.eval()
        return self

    def frozen(self) -> list[nn.Module]:
        """The models that stay as they are."""
        return [self.teacher]

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Before each epoch, counted from 1."""

    def parameters_to_train(self) -> list[nn.Parameter]:
        """What the optimizer gets."""
        return list(self.student.parameters())

    def look_at_teacher(self, images: Tensor) -> Seen:
        """The frozen teacher's outputs for these images: constants, which may be kept and given to later calls."""
        with torch.no_grad():
            return self._teacher(images)

    def forward(self, images: Tensor, labels: Tensor, teacher: Seen | None = None) -> Output:
        """The loss of a batch. `teacher`: what `look_at_teacher` gave for these images, if it is known already."""
        raise NotImplementedError

    def predict(self, images: Tensor) -> Tensor:
        """(M, N) logits of what would be deployed now."""
        return self.student(images)

    def deployable(self) -> Deployable:
        """The module to ship, a copy."""
        return Deployable(self.student)

    def monitor(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """What a method wants logged each epoch beside its loss, on images that it does not train on."""
        return {}

    def _make_connector(self, connector: str | nn.Module, network: Network, factor: int = 2) -> nn.Module:
        """From the student's last map to that of a teacher."""
        like = self._student.classifier.weight
        return make_connector(connector, self._student.width, network.width, factor, like)

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Of the rows that have a label; 0 where none has."""
        rows = logits[: len(labels)]
        result = kdkernels.distillation_loss(
            rows, rows.detach(), labels, soft_weight=0.0, hard_weight=1.0, backend=self.backend
        )
        assert isinstance(result, Tensor)
        return result

    def _output(self, terms: Mapping[str, Tensor], logits: Tensor) -> Output:
        """The loss is the terms' sum."""
        loss = torch.stack([*terms.values()]).sum()
        return Output(loss, {name: term.detach() for name, term in terms.items()}, logits)
