"""SRRL (Yang et al., ICLR 2021): the student's features, through a connector, should be the teacher's and make the
teacher's classifier say what it says of its own.

    hard_weight CE(z_S, y) + soft_weight T² KL(p_T ‖ p_S) + feature_weight L_FM + regression_weight L_SR
    L_FM = mean (v − f_T)²     L_SR = mean (W_T v + b_T − z_T)²     v: the connected, pooled features of the student

The student keeps its own classifier, which is what is deployed. Four releases differ; `variant` picks one:

    official   connector on the map, then the mean over space; CE alone                        (KD_SRRL)
    simkd      mean first, then the connector; CE + KD at T = 4                                (SimKD and ATSC)
    ctkd       as simkd, CE 0.1 + KD 0.9                                                       (CTKD)
    cls_kd     as official, with L_SR five times                                               (cls_KD)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import kdkernels
from kdkernels.methods.kd import KD
from kdkernels.methods.method import Output
from kdkernels.methods.network import Seen

VARIANTS: dict[str, dict[str, Any]] = {
    "official": {"hard_weight": 1.0, "soft_weight": 0.0, "regression_weight": 1.0},
    "simkd": {"hard_weight": 1.0, "soft_weight": 1.0, "regression_weight": 1.0},
    "ctkd": {"hard_weight": 0.1, "soft_weight": 0.9, "regression_weight": 1.0},
    "cls_kd": {"hard_weight": 1.0, "soft_weight": 0.0, "regression_weight": 5.0},
}


class SRRL(KD):
    """Softmax regression; a weight that is given replaces the variant's."""

    uses = ("logits", "features")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        variant: str = "official",
        connector: str | nn.Module = "conv",
        factor: int = 2,
        feature_weight: float = 1.0,
        regression_weight: float | None = None,
        soft_weight: float | None = None,
        hard_weight: float | None = None,
        temperature: float = 4.0,
        **rest: Any,
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        weights = VARIANTS[variant] | {
            name: value
            for name, value in (
                ("hard_weight", hard_weight),
                ("soft_weight", soft_weight),
                ("regression_weight", regression_weight),
            )
            if value is not None
        }
        self.regression_weight = weights.pop("regression_weight")
        super().__init__(student, teacher, temperature=temperature, **weights, **rest)
        self.feature_weight = feature_weight
        self.pools_first = variant in ("simkd", "ctkd")
        self.connector = self._make_connector(connector, self._teacher, factor)

    def parameters_to_train(self) -> list[nn.Parameter]:
        return [*super().parameters_to_train(), *self.connector.parameters()]

    def forward(self, images: Tensor, labels: Tensor, teacher: Seen | None = None) -> Output:
        teacher = self.look_at_teacher(images) if teacher is None else teacher
        student = self._student(images)
        self._teacher.check_end()
        x = self._student.of_width(student.map)
        x = self.connector(x.mean((2, 3), keepdim=True) if self.pools_first else x)
        weight, bias = self._teacher.classifier_as(x)
        loss, parts = kdkernels.shared_classifier_loss(
            x,
            teacher.features.to(x.dtype),
            weight,
            bias,
            hard_weight=0.0,
            logit_mse_weight=self.regression_weight,
            feature_mse_weight=self.feature_weight,
            feature_match="pooled",
            return_terms=True,
            backend=self.backend,
        )
        own = self.of_logits(student.logits, teacher.logits, labels)
        terms = {name: term for name, term in own.terms.items() if name != "soft" or self.soft_weight}
        return Output(
            own.loss + loss,
            {**terms, "feature": parts["feature_mse"], "regression": parts["logit_mse"]},
            student.logits,
        )
