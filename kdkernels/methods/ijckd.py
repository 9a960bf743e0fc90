"""IJCKD (Li et al., arXiv 2304.11004): the student's last map, through a connector, into the teacher's frozen
classifier,

    CE(z, y) + mean (z − z_T)² + mean (g − f_T)²,     g = connector(f_S),  z = W_T gap(g) + b_T.

The classifier is assumed to be the ideal one for both networks' features; then the student's error is bounded by the
teacher's and by how far the features are apart. `monitor` gives three pieces in the spirit of that bound. The exact
theorem was not at hand: they are a proxy, not the bound.

Deployed: the student without its classifier, the connector, the mean over space, the teacher's classifier.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import kdkernels
from kdkernels.methods.deployable import classify
from kdkernels.methods.simkd import SharedHead


class IJCKD(SharedHead):
    """All weights 1, no temperature, as released. `connector`: "bottleneck" (SimKD's), "conv" (SRRL's), "linear", or a
    module (M, C_S, H, W) → (M, C_T, H, W)."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        hard_weight: float = 1.0,
        logit_weight: float = 1.0,
        feature_weight: float = 1.0,
        **rest: Any,
    ) -> None:
        super().__init__(
            student,
            teacher,
            hard_weight=hard_weight,
            logit_weight=logit_weight,
            feature_weight=feature_weight,
            **rest,
        )

    def monitor(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """The teacher's cross-entropy, the student's through the same classifier, and the pooled features' mean squared
        difference: a proxy of the bound's pieces. In evaluation mode, or batch norms learn from these images."""
        with torch.no_grad():
            student, teacher = self._student(images), self._teacher(images)
            connected = self._connected(student, self._teacher, self.connector)
            x, y = (z.mean((2, 3)).to(connected.dtype) for z in (connected, teacher.map))
            *_, distance = kdkernels.pool_mse(x, y, backend=self.backend)
            logits = classify(connected, self._teacher.classifier)
            return {
                "bound_proxy/teacher_ce": float(self._cross_entropy(teacher.logits, labels)),
                "bound_proxy/student_ce": float(self._cross_entropy(logits, labels)),
                "bound_proxy/feature_mse": float(distance.mean()),
            }
