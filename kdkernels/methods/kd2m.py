"""KD²M (Montesuma, arXiv 2504.01757): CE + weight · D(X, Y), D a distance between the distributions of a batch's
penultimate features in the student, X, and in the teacher, Y.

The metrics, by name: see METRICS. The class-conditional ones are sums over the classes in the batch, as in the
authors' code; an image without a label counts for the class the teacher gives it. The joint one divides the features'
costs by their greatest, as they do. Where the two networks' features
differ in number, a linear projector (trained along) takes the student's to the teacher's.

If the loss behind the head is L-Lipschitz in the features, |R_S − R_T| ≤ L W₁(P_S, P_T) ≤ L W₂(P_S, P_T): a standard
statement (Kantorovich-Rubinstein, Jensen), not the paper's own theorem, which was not at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import kdkernels
from kdkernels.methods.method import Method, Output
from kdkernels.methods.network import Seen


class Batch(NamedTuple):
    """What a metric may look at; every process's samples."""

    x: Tensor  # (M, D) the student's features
    y: Tensor  # (M, D) the teacher's
    labels: Tensor  # (M,)
    x_logits: Tensor  # (M, N)
    y_logits: Tensor  # (M, N)


Metric = Callable[..., Tensor]

METRICS: dict[str, Metric] = {
    "w2": lambda b, **o: kdkernels.wasserstein(b.x, b.y, **o),
    "conditional-w2": lambda b, **o: kdkernels.wasserstein(b.x, b.y, labels=b.labels, **o),
    "joint-w2": lambda b, **o: kdkernels.joint_wasserstein(
        b.x, b.y, b.x_logits, b.y_logits, **{"normalize": True, **o}
    ),
    "gaussian-w2": lambda b, **o: kdkernels.gaussian_wasserstein(b.x, b.y, **o),
    "conditional-gaussian-w2": lambda b, **o: kdkernels.gaussian_wasserstein(b.x, b.y, labels=b.labels, **o),
    "bures": lambda b, **o: kdkernels.gaussian_wasserstein(b.x, b.y, covariance="full", **o),
    "gaussian-kl": lambda b, **o: kdkernels.gaussian_kl(b.x, b.y, **o),
    "conditional-gaussian-kl": lambda b, **o: kdkernels.gaussian_kl(b.x, b.y, labels=b.labels, **o),
    "mmd-linear": lambda b, **o: kdkernels.mmd(b.x, b.y, kernel="linear", **o),
    "mmd-rbf": lambda b, **o: kdkernels.mmd(b.x, b.y, **o),
    "energy": lambda b, **o: kdkernels.energy_distance(b.x, b.y, **o),
    "sinkhorn": lambda b, **o: kdkernels.sinkhorn_divergence(b.x, b.y, **o),
    "sliced": lambda b, **o: kdkernels.sliced_wasserstein(b.x, b.y, **o),
    "gromov": lambda b, **o: kdkernels.gromov_wasserstein(b.x, b.y, **o),
    "coral": lambda b, **o: kdkernels.coral(b.x, b.y, **o),
}
ANY_WIDTH = ("gromov",)  # compares distances within each side: the features may differ in number


class KD2M(Method):
    """Distribution matching of features. `metric_options` go to the distance (``{"p": 1}``, ``{"epsilon": 0.1}``)."""

    uses = ("features", "logits")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        metric: str = "w2",
        weight: float = 1e-4,
        hard_weight: float = 1.0,
        projector: nn.Module | None = None,
        metric_options: dict[str, Any] | None = None,
        **rest: Any,
    ) -> None:
        super().__init__(student, teacher, **rest)
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
        self.metric, self.weight, self.hard_weight = metric, weight, hard_weight
        self.metric_options = dict(metric_options or {})
        same = self._student.width == self._teacher.width or metric in ANY_WIDTH
        if projector is None:
            projector = nn.Identity() if same else nn.Linear(self._student.width, self._teacher.width)
            projector.to(self._student.classifier.weight)
        self.projector = projector

    def parameters_to_train(self) -> list[nn.Parameter]:
        return [*super().parameters_to_train(), *self.projector.parameters()]

    def forward(self, images: Tensor, labels: Tensor, teacher: Seen | None = None) -> Output:
        teacher = self.look_at_teacher(images) if teacher is None else teacher
        student = self._student(images)
        guesses = teacher.logits[len(labels) :].argmax(1)
        x = self.projector(student.features)
        # Half precision is for features, not for distances.
        dtype = torch.promote_types(x.dtype, torch.float32)
        batch = Batch(
            self.gather(x.to(dtype)),
            self.gather(teacher.features.to(dtype)),
            self.gather(torch.cat([labels, guesses])),
            self.gather(student.logits.to(dtype)),
            self.gather(teacher.logits.to(dtype)),
        )
        distance = METRICS[self.metric](batch, backend=self.backend, **self.metric_options)
        terms = {
            "hard": self.hard_weight * self._cross_entropy(student.logits, labels),
            "distance": self.weight * distance,
        }
        return self._output(terms, student.logits)
