"""ATSC (Jang et al., arXiv 2406.08528): SimKD with a teacher that adapts itself to the student. Each batch takes two
steps:

    A  student, connector and teacher:  mean (P(f_S) − f_T)² + anchor_weight Σ ‖θ − θ⁰‖²
       f_T is not detached; the sum is over the teacher's parameters of two dimensions or more, θ⁰ as it came.
    B  the teacher's classifier:  CE(W f_T + b, y), with the features of the teacher as step A left it

The teacher is in training mode, as in the authors' code. Step B there trains the classifier's bias alone
(`head_update="bias"`); "full" trains its weight too, "none" leaves step B out.

Biases and normalisations are free there, and on few images the teacher may shrink its features, and the loss, to
nothing with them: `anchor_min_dim=1` holds them too, and a `hard_weight` gives the features something to say.

Several teachers: each has its connector and its classifier; losses and logits are their means. The paper's own
algorithm for several was not at hand: this is our reading.

Deployed: the student without its classifier, the connector, the mean over space, the adapted teacher's classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kdkernels.methods.deployable import Deployable, classify
from kdkernels.methods.method import Output
from kdkernels.methods.network import Seen
from kdkernels.methods.simkd import SharedHead
from kdkernels.ops.anchor_penalty import AnchorPenaltyLoss

if TYPE_CHECKING:
    from typing_extensions import Self

HEAD_UPDATES = ("bias", "full", "none")


class ATSC(SharedHead):
    """Adaptive teacher, shared classifier.

        optimizer.zero_grad()                               # of parameters_to_train()
        method(images, labels).loss.backward()              # step A
        optimizer.step()
        upkeep_optimizer.zero_grad()                        # of upkeep_parameters(), where there are any
        method.upkeep_loss(images, labels).backward()       # step B
        upkeep_optimizer.step()

    Both optimizers have the same rate, momentum and weight decay in the authors' code.
    """

    uses: tuple[str, ...] = ()
    learning_teacher = True

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Sequence[nn.Module],
        *,
        anchor_weight: float = 1.0,
        anchor_min_dim: int = 2,
        head_update: str = "bias",
        connector: str | nn.Module = "bottleneck",
        factor: int = 2,
        teacher_training: bool = True,
        **rest: Any,
    ) -> None:
        teachers = [teacher] if isinstance(teacher, nn.Module) else list(teacher)
        if not teachers:
            raise ValueError("teacher must be a model or several, got none")
        if head_update not in HEAD_UPDATES:
            raise ValueError(f"head_update must be one of {', '.join(HEAD_UPDATES)}, got {head_update!r}")
        if isinstance(connector, nn.Module) and len(teachers) > 1:
            raise ValueError("connector must be a name where there are several teachers, got a module")
        super().__init__(student, teachers[0], connector=connector, factor=factor, **rest)
        self.teachers = nn.ModuleList(teachers)
        self._networks = [self._teacher, *(self._take_teacher(t) for t in teachers[1:])]
        more = (self._make_connector(connector, network, factor) for network in self._networks[1:])
        self.connectors = nn.ModuleList([self.connector, *more])
        self.anchor_weight, self.head_update = anchor_weight, head_update
        self.teacher_training = teacher_training
        self.penalties = nn.ModuleList(
            AnchorPenaltyLoss(t.parameters(), min_dim=anchor_min_dim) for t in teachers
        )

    def frozen(self) -> list[nn.Module]:
        return []

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if not self.teacher_training:
            for teacher in self.teachers:
                teacher.eval()
        return self

    def parameters_to_train(self) -> list[nn.Parameter]:
        """Step A's: the student without its classifier, the connectors, the teachers."""
        body = self._student_body()
        return [*body, *self.connectors.parameters(), *self.teachers.parameters()]

    def upkeep_parameters(self) -> list[nn.Parameter]:
        heads = [network.classifier for network in self._networks]
        biases = [head.bias for head in heads if head.bias is not None]
        if self.head_update == "none":
            return []
        return biases if self.head_update == "bias" else [p for head in heads for p in head.parameters()]

    def forward(self, images: Tensor, labels: Tensor, teacher: Seen | None = None) -> Output:
        if teacher is not None:
            raise ValueError("teacher must be None: a teacher that learns has no outputs to keep")
        student = self._student(images)
        outputs = []
        for network, connector, penalty in zip(self._networks, self.connectors, self.penalties):
            connected = self._connected(student, network, connector)
            output = self._shared(connected, network(images).map, network, labels)
            anchor = self.anchor_weight * penalty(network.model.parameters())
            terms = {**output.terms, "anchor": anchor.detach()}
            outputs.append(Output(output.loss + anchor, terms, output.logits))
        if len(outputs) == 1:
            return outputs[0]
        losses, all_terms, logits = zip(*outputs)
        return Output(
            torch.stack(losses).mean(),
            {name: torch.stack([terms[name] for terms in all_terms]).mean() for name in all_terms[0]},
            torch.stack(logits).mean(0),
        )

    def upkeep_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Step B's loss; nothing but `upkeep_parameters` gets a gradient, and a constant comes where there are none.

        The teachers see all images once more, as their batch norms should; without labels there is nothing to see."""
        learn = {id(p) for p in self.upkeep_parameters()}
        losses = []
        for network in self._networks:
            head = network.classifier
            features = head.weight.new_empty(0, network.width)
            if len(labels):
                with torch.no_grad():
                    features = network(images).features.to(head.weight.dtype)
            weight, bias = (
                p if p is None or id(p) in learn else p.detach() for p in (head.weight, head.bias)
            )
            assert weight is not None
            losses.append(self._cross_entropy(nn.functional.linear(features, weight, bias), labels))
        return torch.stack(losses).mean()

    def predict(self, images: Tensor) -> Tensor:
        student = self._student(images)
        logits = [
            classify(self._connected(student, network, connector), network.classifier)
            for network, connector in zip(self._networks, self.connectors)
        ]
        return torch.stack(logits).mean(0)

    def deployable(self) -> Deployable:
        return Deployable(
            self.student,
            [(c, n.classifier) for c, n in zip(self.connectors, self._networks)],
            classifier=self._student.classifier_name,
            map=self._student.found_map(),
        )
