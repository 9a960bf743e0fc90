"""The family of losses from two rows of logits, each backend that runs here, beside eager PyTorch, `torch.compile`
of it, and the libraries that are installed (benchmarks.formulas and benchmarks.peers say what they are)."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks import formulas, harness, peers
from benchmarks.harness import Case, Shape
from kdkernels import distillation_loss, dkd, jsd, nkd, tvd

TEMPERATURE = 4.0
KD = {"temperature": TEMPERATURE, "hard": 0.1, "soft": 0.9}
STANDARDIZED = {"temperature": 2.0, "weight": 9.0}  # LSKD's own
JSD = {"beta": 0.5, "temperature": 1.0}
DKD = {"alpha": 1.0, "beta": 8.0, "temperature": TEMPERATURE}
NKD = {"gamma": 1.5, "temperature": 1.0}


def with_labels(shape: Shape, dtype: torch.dtype, device: str) -> list[Tensor]:
    labels = torch.randint(shape[1], shape[:1], generator=torch.Generator().manual_seed(1))
    return [*harness.logits(shape, dtype, device), labels.to(device)]


def squared_dkd(student: Tensor, teacher: Tensor, labels: Tensor, *, backend: str) -> Tensor:
    return TEMPERATURE**2 * dkd(student, teacher, labels, **DKD, backend=backend)


CASES = {
    "distillation_loss": Case(
        eager=partial(formulas.hard_and_soft, **KD),
        ours=partial(
            distillation_loss, temperature=TEMPERATURE, hard_weight=KD["hard"], soft_weight=KD["soft"]
        ),
        inputs=with_labels,
        peers=peers.torchdistill_kd(**KD),
        absent=peers.absent(torchdistill=peers.NO_TORCHDISTILL),
    ),
    "distillation_loss, standardize": Case(
        eager=partial(formulas.standardized_kl, **STANDARDIZED),
        ours=partial(distillation_loss, temperature=2.0, hard_weight=0.0, soft_weight=9.0, standardize=True),
        peers=peers.torchdistill_standardized(**STANDARDIZED),
        absent=peers.absent(torchdistill=peers.NO_TORCHDISTILL),
    ),
    "dkd": Case(eager=partial(formulas.dkd, **DKD), ours=squared_dkd, inputs=with_labels),
    "nkd": Case(eager=partial(formulas.nkd, **NKD), ours=partial(nkd, **NKD), inputs=with_labels),
    "jsd": Case(
        eager=partial(formulas.jsd, **JSD),
        ours=partial(jsd, **JSD),
        peers=peers.liger_jsd(**JSD),
        absent=peers.absent(liger=peers.NO_LIGER),
    ),
    "tvd": Case(eager=partial(formulas.tvd, temperature=1.0), ours=partial(tvd, temperature=1.0)),
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
SHAPES = ("CIFAR-100", "ImageNet", "small LM")


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("loss", CASES)
def test_logit_loss(benchmark, loss, shape, dtype):
    harness.cell(benchmark, "logit_loss", loss, CASES[loss], shape, dtype, True, seconds=1.5)


@DTYPES
@pytest.mark.parametrize("loss", ["distillation_loss", "jsd"])
def test_logit_loss_forward(benchmark, loss, dtype):
    harness.cell(benchmark, "logit_loss", loss, CASES[loss], "small LM", dtype, False, seconds=1.5)


@pytest.mark.skipif(harness.DEVICE != "cpu", reason="resident memory is the CPU's")
@pytest.mark.parametrize("loss", ["distillation_loss", "dkd", "jsd"])
def test_logit_loss_memory(benchmark, loss):
    harness.memory_cell(benchmark, "logit_loss", loss, CASES[loss], "Llama-3", torch.bfloat16)
