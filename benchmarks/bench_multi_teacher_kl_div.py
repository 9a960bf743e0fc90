"""multi_teacher_kl_div of four teachers, each backend that runs here, beside eager PyTorch and `torch.compile`."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks import formulas, harness
from benchmarks.harness import Case
from kdkernels import multi_teacher_kl_div

OPTIONS = {"weights": [0.4, 0.3, 0.2, 0.1], "temperatures": [4.0] * 4}


def ours(student: Tensor, *teachers: Tensor, backend: str) -> Tensor:
    return multi_teacher_kl_div(student, teachers, **OPTIONS, backend=backend)


CASES = {
    "multi_teacher_kl_div": Case(
        eager=partial(formulas.multi_teacher, **OPTIONS), ours=ours, inputs=partial(harness.logits, count=5)
    )
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@DTYPES
@pytest.mark.parametrize("shape", ["CIFAR-100", "ImageNet", "small LM"])
def test_multi_teacher_kl_div(benchmark, shape, dtype):
    [(loss, case)] = CASES.items()
    harness.cell(benchmark, "multi_teacher_kl_div", loss, case, shape, dtype, True, seconds=1.5)


@pytest.mark.skipif(harness.DEVICE != "cpu", reason="resident memory is the CPU's")
def test_multi_teacher_kl_div_memory(benchmark):
    [(loss, case)] = CASES.items()
    harness.memory_cell(benchmark, "multi_teacher_kl_div", loss, case, "Llama-3", torch.bfloat16)
