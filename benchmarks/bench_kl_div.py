"""kl_div, each backend that runs here, beside what people write today: eager PyTorch and `torch.compile` of it.

Eager is torch's own ``F.kl_div`` of two log-softmaxes, which is also what torchdistill's and mdistiller's KD
losses compute.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks import formulas, harness
from kdkernels import kl_div

TEMPERATURE = 4.0
CASES = {
    "kl_div": harness.Case(
        eager=partial(formulas.kl, temperature=TEMPERATURE), ours=partial(kl_div, temperature=TEMPERATURE)
    )
}


@pytest.mark.parametrize("backward", [True, False], ids=["forward+backward", "forward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", harness.SHAPES)
def test_kl_div(benchmark, shape, dtype, backward):
    harness.cell(benchmark, "kl_div", "kl_div", CASES["kl_div"], shape, dtype, backward)


@pytest.mark.skipif(harness.DEVICE != "cpu", reason="resident memory is the CPU's")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_kl_div_memory(benchmark, dtype):
    # So large that every tensor has pages of its own.
    harness.memory_cell(benchmark, "kl_div", "kl_div", CASES["kl_div"], "Llama-3", dtype)
