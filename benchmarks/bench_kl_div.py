"""kl_div, each backend that runs here, beside what people write today: eager PyTorch and `torch.compile` of it.

Eager is torch's own ``F.kl_div`` of two log-softmaxes, which is also what torchdistill's and mdistiller's KD
losses compute.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from kdkernels import available_backends, kl_div, kl_div_reference

TEMPERATURE = 4.0
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def eager(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = (F.log_softmax(x / TEMPERATURE, -1) for x in (student, teacher))
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def providers(device: str) -> dict[str, harness.Loss]:
    torch._dynamo.reset()  # one shape, one graph: what a user's fixed-size training step compiles to
    available = [name for name, state in available_backends(device).items() if state == "available"]
    return {
        "eager": eager,
        "compile": torch.compile(eager, dynamic=False),
        **{name: partial(kl_div, temperature=TEMPERATURE, backend=name) for name in available},
    }


def logits(shape: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(3 * torch.randn(shape, generator=generator)).to(DEVICE, dtype) for _ in range(2)]


@pytest.mark.parametrize("backward", [True, False], ids=["forward+backward", "forward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", harness.SHAPES)
def test_kl_div(benchmark, name, dtype, backward):
    student, teacher = logits(harness.SHAPES[name], dtype)
    losses = providers(DEVICE)
    rows = min(4, student.shape[0])
    for provider, loss in losses.items():
        if provider not in ("eager", "compile"):
            harness.check(
                loss,
                partial(kl_div_reference, temperature=TEMPERATURE),
                student[:rows],
                teacher[:rows],
                provider,
            )
    size = student.numel() * student.element_size()
    moved = size * (3 if backward else 2)
    times = benchmark.pedantic(
        harness.measure,
        args=(losses, student, teacher),
        kwargs={"backward": backward},
        rounds=1,
        iterations=1,
    )
    rows, classes = student.shape
    short, what = str(dtype).removeprefix("torch."), "forward+backward" if backward else "forward"
    benchmark.extra_info.update(
        suite="kl_div",
        cell=f"{name} {rows}×{classes} {short} {what}",
        shape=[rows, classes],
        dtype=short,
        what=what,
        providers=harness.summary(times, moved),
    )


@pytest.mark.skipif(DEVICE != "cpu", reason="resident memory is the CPU's")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_kl_div_memory(benchmark, dtype):
    shape = harness.SHAPES["Llama-3"]  # large enough that every tensor has pages of its own
    names = [provider for provider in providers("cpu") if provider != "reference"]
    peaks = benchmark.pedantic(
        lambda: {p: harness.peak_memory("kl_div", p, dtype, shape) for p in names}, rounds=1, iterations=1
    )
    benchmark.extra_info.update(
        suite="kl_div",
        shape=list(shape),
        dtype=str(dtype).removeprefix("torch."),
        what="peak memory",
        gradients=peaks,
    )
