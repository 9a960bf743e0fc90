"""The libraries that compute one of our losses, as losses of plain logits; `pip install 'kdkernels[peers]'`.

A library that is not installed, or does not import here, is left out with its reason.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Loss


def library(name: str) -> tuple[Any, str]:
    """(the module, "") or (None, why there is none)."""
    try:
        return importlib.import_module(name), ""
    except Exception as error:  # a peer that is broken here must not break a benchmark
        return None, f"{type(error).__name__}: {error}"


TORCHDISTILL, NO_TORCHDISTILL = library("torchdistill.losses.mid_level")
LIGER, NO_LIGER = library("liger_kernel.chunked_loss.jsd_loss")


def versions() -> dict[str, str]:
    loaded = {"torchdistill": TORCHDISTILL, "liger-kernel": LIGER}
    return {name: importlib.metadata.version(name) for name, module in loaded.items() if module}


def _torchdistill(name: str, **options: Any) -> Loss:
    module = getattr(TORCHDISTILL, name)(".", "output", ".", "output", **options)

    def loss(student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
        return module({".": {"output": student}}, {".": {"output": teacher}}, labels)

    return loss


def torchdistill_kd(*, temperature: float, hard: float, soft: float) -> dict[str, Loss]:
    """KDLoss: hard CE + soft T² KL."""
    if TORCHDISTILL is None:
        return {}
    return {"torchdistill": _torchdistill("KDLoss", temperature=temperature, alpha=hard, beta=soft)}


def torchdistill_standardized(*, temperature: float, weight: float) -> dict[str, Loss]:
    """LogitStdKDLoss, which without a hard part is the KL alone."""
    if TORCHDISTILL is None:
        return {}
    kl = _torchdistill("LogitStdKDLoss", temperature=temperature, alpha=0.0)
    return {"torchdistill": lambda student, teacher: weight * temperature**2 * kl(student, teacher)}


def liger_jsd(*, beta: float, temperature: float) -> dict[str, Loss]:
    """What LigerFusedLinearJSDLoss computes of one chunk's logits: torch code, which runs anywhere."""
    if LIGER is None:
        return {}
    function = partial(LIGER.LigerFusedLinearJSDFunction.distillation_loss_fn, beta=beta)

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return function(student / temperature, teacher / temperature) / student.shape[0]

    return {"liger": loss}


def liger_linear(*, temperature: float, hard: float, soft: float, compiled: bool = True) -> dict[str, Loss]:
    """LigerFusedLinearJSDLoss at beta 0, which is the forward KL: chunks of 1024 rows, compiled, as it comes.

    It has no T², wants labels for any loss, and computes the gradient of a frozen head too.
    """
    if LIGER is None:
        return {}

    def loss(
        student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        if labels is None:
            labels = torch.zeros(student.shape[0], dtype=torch.long, device=student.device)
        weights = (hard, soft, 0.0)
        return LIGER.LigerFusedLinearJSDFunction.apply(
            student,
            weight,
            teacher,
            teacher_weight,
            labels,
            None,
            None,
            *weights,
            -100,
            temperature,
            compiled,
        )

    return {"liger": loss}


def absent(**reasons: str) -> dict[str, str]:
    return {name: reason for name, reason in reasons.items() if reason}
