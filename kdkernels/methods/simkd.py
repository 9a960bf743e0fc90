"""SimKD (Chen et al., arXiv 2203.14001): the teacher's classifier is reused, and the student's last map, through a
projector, learns to be the teacher's: mean (P(f_S) − f_T)². Maps of two sizes are compared at the smaller.

Deployed: the student without its classifier, the projector, the mean over space, the teacher's classifier.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import kdkernels
from kdkernels.methods.deployable import Deployable, classify
from kdkernels.methods.method import Method, Output
from kdkernels.methods.network import Network, Seen


class SharedHead(Method):
    """A student behind the teacher's classifier: SimKD, IJCKD, ATSC.

    hard_weight CE(z, y) + soft_weight T² KL(p_T ‖ p) + logit_weight mean (z − z_T)² + feature_weight mean (g − f_T)²,
    with g = connector(f_S) and z = W_T gap(g) + b_T.
    """

    uses: tuple[str, ...] = ("map",)

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        connector: str | nn.Module = "bottleneck",
        factor: int = 2,
        feature_weight: float = 1.0,
        logit_weight: float = 0.0,
        hard_weight: float = 0.0,
        soft_weight: float = 0.0,
        temperature: float = 4.0,
        **rest: Any,
    ) -> None:
        super().__init__(student, teacher, **rest)
        self.connector = self._make_connector(connector, self._teacher, factor)
        self.feature_weight, self.logit_weight = feature_weight, logit_weight
        self.hard_weight, self.soft_weight, self.temperature = hard_weight, soft_weight, temperature

    def parameters_to_train(self) -> list[nn.Parameter]:
        """The student without its classifier, which nothing uses, and the connector."""
        return [*self._student_body(), *self.connector.parameters()]

    def _student_body(self) -> list[nn.Parameter]:
        unused = {id(p) for p in self._student.classifier.parameters()}
        return [p for p in self.student.parameters() if id(p) not in unused]

    def _connected(self, student: Seen, network: Network, connector: nn.Module) -> Tensor:  # (M, C_T, H, W)
        y = connector(self._student.of_width(student.map))
        if y.dim() != 4 or y.shape[1] != network.width:
            raise ValueError(
                f"connector must give the teacher's (M, {network.width}, H, W), got {tuple(y.shape)}"
            )
        return y

    def forward(self, images: Tensor, labels: Tensor, teacher: Seen | None = None) -> Output:
        teacher = self.look_at_teacher(images) if teacher is None else teacher
        connected = self._connected(self._student(images), self._teacher, self.connector)
        return self._shared(connected, teacher.map, self._teacher, labels)

    def _shared(
        self,
        connected: Tensor,  # (M, C_T, H, W)
        target: Tensor,  # (M, C_T, H', W')
        network: Network,
        labels: Tensor,  # (L,)
    ) -> Output:
        network.check_end()
        weight, bias = network.classifier_as(connected)
        labelled = len(labels) == len(connected)
        loss, parts = kdkernels.shared_classifier_loss(
            connected,
            network.of_width(target).to(connected.dtype),
            weight,
            bias,
            labels if labelled and self.hard_weight else None,
            soft_weight=self.soft_weight,
            hard_weight=self.hard_weight if labelled else 0.0,
            logit_mse_weight=self.logit_weight,
            feature_mse_weight=self.feature_weight,
            temperature=self.temperature,
            return_terms=True,
            backend=self.backend,
        )
        weights = {
            "hard": self.hard_weight,
            "soft": self.soft_weight,
            "logit_mse": self.logit_weight,
            "feature_mse": self.feature_weight,
        }
        terms = {name: parts[name] for name, used in weights.items() if used}
        if self.hard_weight and not labelled:
            own = classify(connected[: len(labels)], network.classifier)
            hard = self.hard_weight * self._cross_entropy(own, labels)
            loss, terms["hard"] = loss + hard, hard.detach()
        with torch.no_grad():
            logits = classify(connected, network.classifier)
        return Output(loss, terms, logits)

    def predict(self, images: Tensor) -> Tensor:
        connected = self._connected(self._student(images), self._teacher, self.connector)
        return classify(connected, self._teacher.classifier)

    def deployable(self) -> Deployable:
        return Deployable(
            self.student,
            [(self.connector, self._teacher.classifier)],
            classifier=self._student.classifier_name,
            map=self._student.found_map(),
        )


class SimKD(SharedHead):
    """SimKD: the features alone."""
