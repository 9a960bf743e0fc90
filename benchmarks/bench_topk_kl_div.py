"""topk_kl_div, each backend that runs here, beside eager PyTorch and `torch.compile` of it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks import formulas, harness
from benchmarks.harness import Case, Shape
from kdkernels import topk_kl_div

K, TEMPERATURE = 64, 2.0


def inputs(shape: Shape, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Logits, and the teacher's log-probabilities and classes, as a cache on disk holds them."""
    student, teacher = harness.logits(shape, torch.float32, "cpu")
    log_probs, indices = torch.log_softmax(teacher / TEMPERATURE, -1).topk(min(K, shape[1] // 2))
    return [student.to(device, dtype), log_probs.to(device), indices.to(device)]


CASES = {
    f"topk_kl_div, {tail}": Case(
        eager=partial(formulas.topk, temperature=TEMPERATURE, tail=tail),
        ours=partial(topk_kl_div, temperature=TEMPERATURE, tail=tail),
        inputs=inputs,
    )
    for tail in ("bucket", "drop")
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@DTYPES
@pytest.mark.parametrize("loss", CASES)
def test_topk_kl_div(benchmark, loss, dtype):
    harness.cell(benchmark, "topk_kl_div", loss, CASES[loss], "Llama-3, 16 tokens", dtype, True, seconds=1.5)


@pytest.mark.skipif(harness.DEVICE != "cpu", reason="resident memory is the CPU's")
def test_topk_kl_div_memory(benchmark):
    loss = "topk_kl_div, bucket"
    harness.memory_cell(benchmark, "topk_kl_div", loss, CASES[loss], "Llama-3", torch.bfloat16)
