"""How everything here is measured.

Providers run one after another in every round, in an order that is drawn anew, in one process with the same threads:
load from elsewhere, and caches that another has left, fall on all of them alike, and ratios hold where seconds do not.
Each provider's result is checked against float64 before anything is timed. A round also copies a tensor, which gives
the bandwidth that the machine had at that time.
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels import available_backends
from kdkernels.backend import BACKENDS

Loss = Callable[..., Tensor]  # of a student's logits, and of whatever else its inputs are
Job = Callable[[], object]
Shape = tuple[int, ...]  # rows first, classes last

# Rows × classes, by where they come from.
SHAPES = {
    "CIFAR-100": (128, 100),
    "ImageNet": (256, 1000),
    "small LM": (64, 32_000),
    "Llama-3, 16 tokens": (16, 128_256),
    "Llama-3": (128, 128_256),
}
# Rows × features × classes; or samples × channels × height × width × classes.
HEADS = {
    "CIFAR-100 head": (128, 256, 100),
    "ImageNet head": (256, 512, 1000),
    "small LM head": (512, 512, 32_000),
    "Llama-3 head": (256, 1024, 128_256),
    "ImageNet maps": (64, 512, 7, 7, 1000),
}
ALL_SHAPES: dict[str, Shape] = {**SHAPES, **HEADS}
COPY_BYTES = 64 << 20
COMPILED = ("compile", "liger")  # providers whose first call of a shape compiles it
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def logits(shape: Shape, dtype: torch.dtype, device: str, count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(3 * torch.randn(shape, generator=generator)).to(device, dtype) for _ in range(count)]


class Case(NamedTuple):
    """One loss to measure."""

    eager: Loss  # as people write it
    ours: Loss  # the same with `backend=`
    inputs: Callable[[Shape, torch.dtype, str], list[Tensor]] = logits  # the student's logits first
    peers: Mapping[str, Loss] = {}  # libraries that compute it, where they are installed
    absent: Mapping[str, str] = {}  # and why others are not there
    leaves: int = 1  # how many of the inputs, the first ones, get a gradient
    of_rows: Sequence[int] | None = None  # which inputs have a row for each of the student's; None: all
    # What else runs in the same rounds, and is no loss: the least that any has to do, for one.
    others: Callable[[list[Tensor]], dict[str, Job]] | None = None


def providers(case: Case, device: str) -> dict[str, Loss]:
    torch._dynamo.reset()  # one shape, one graph: what a user's fixed-size training step compiles to
    available = [name for name, state in available_backends(device).items() if state == "available"]
    if device == "cpu" and "triton" in available:
        available.remove("triton")  # its interpreter: there is nothing to time
    return {
        "eager": case.eager,
        "compile": torch.compile(case.eager, dynamic=False),
        **case.peers,
        **{name: partial(case.ours, backend=name) for name in available},
    }


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


Result = tuple[Tensor, list[Tensor]]  # a loss and its gradients


def evaluate(loss: Loss, inputs: Sequence[Tensor], leaves: int) -> Result:
    given = [x.detach().requires_grad_(i < leaves) for i, x in enumerate(inputs)]
    value = loss(*given)
    gradients = torch.autograd.grad(value, given[:leaves])
    return value.detach().double(), [x.double() for x in gradients]


def check(result: Result, truth: Result, dtype: torch.dtype, name: str) -> None:
    """Raises AssertionError unless loss and gradients agree with float64: closely, where they are ours; of what ours
    is measured against it is asked only to be the same loss (benchmarks/parity.py has its errors)."""
    (value, gradients), (true_value, true_gradients) = result, truth
    ours = name in BACKENDS and name != "reference"
    tolerance = 20 * max(torch.finfo(dtype).eps, 1e-6) if ours else 0.5
    assert abs(value / true_value - 1) < tolerance, f"{name}: loss {value} instead of {true_value}"
    for gradient, true_gradient in zip(gradients, true_gradients):
        error = (gradient - true_gradient).norm() / true_gradient.norm()
        assert error < tolerance, f"{name}: gradient off by {error:.1e}"


def check_all(case: Case, losses: Mapping[str, Loss], inputs: Sequence[Tensor]) -> None:
    """Every provider computes the same loss: ours, the baselines and the peers."""
    dtype, leaves = inputs[0].dtype, case.leaves

    def exact(inputs: Sequence[Tensor], dtype: torch.dtype = torch.float64) -> list[Tensor]:
        return [x.to(dtype) if x.is_floating_point() else x for x in inputs]

    of_rows = range(len(inputs)) if case.of_rows is None else case.of_rows
    few = [x[:4] if i in of_rows else x for i, x in enumerate(inputs)]
    truth = evaluate(partial(case.ours, backend="reference"), exact(few), leaves)
    for name, loss in losses.items():
        if name != "compile":
            check(evaluate(loss, few, leaves), truth, dtype, name)
    # What is compiled is compiled for all rows alone, as for steps of one size; eager has been checked by now.
    torch._dynamo.reset()
    truth = evaluate(case.eager, exact(inputs, torch.float32), leaves)
    check(evaluate(losses["compile"], inputs, leaves), truth, dtype, "compile")


def interleave(
    jobs: Mapping[str, Job], device: str, *, seconds: float, least: int = 7, warmups: int = 3
) -> dict[str, list[float]]:
    """Seconds of each run of each job; as many rounds as fit into `seconds`, but `least`."""
    order = list(jobs.items())
    for _ in range(warmups):
        for _, job in order:
            job()
    times: dict[str, list[float]] = {name: [] for name in jobs}
    begin, rounds, draw = time.perf_counter(), 0, random.Random(0)
    while rounds < least or (time.perf_counter() - begin < seconds and rounds < 2000):
        draw.shuffle(order)
        for name, job in order:
            synchronize(device)
            start = time.perf_counter()
            job()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
        rounds += 1
    return times


def step(loss: Loss, inputs: Sequence[Tensor], leaves: int) -> Job:
    """What a training step does with a loss; without leaves, the forward alone."""
    given = [x.detach().requires_grad_(i < leaves) for i, x in enumerate(inputs)]

    def job() -> None:
        for leaf in given[:leaves]:
            leaf.grad = None
        value = loss(*given)
        if leaves:
            value.backward()

    return job


def measure(
    losses: Mapping[str, Loss],
    inputs: Sequence[Tensor],
    *,
    leaves: int,
    others: Mapping[str, Job],
    **options: Any,
) -> dict[str, list[float]]:
    """Seconds of each run of each provider, of the other jobs, and of "copy"."""
    device = inputs[0].device.type
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.zeros_like(source)  # written once: its pages are there
    jobs = {"copy": partial(target.copy_, source), **others}
    jobs |= {name: step(loss, inputs, leaves) for name, loss in losses.items()}
    return interleave(jobs, device, **options)


def summary(times: dict[str, list[float]], moved_bytes: int | None) -> dict[str, dict[str, float]]:
    """Median and quartiles in ms, and the share of the copy's bandwidth that `moved_bytes` make."""
    copied = 2 * COPY_BYTES / statistics.median(times["copy"])
    cells: dict[str, dict[str, float]] = {"copy": {"gb_per_s": copied / 1e9}}
    for name, values in times.items():
        if name != "copy":
            low, median, high = (1e3 * x for x in statistics.quantiles(values, n=4))
            cells[name] = {"median_ms": median, "low_ms": low, "high_ms": high, "rounds": len(values)}
            if moved_bytes is not None:
                cells[name]["copy_share"] = moved_bytes / (median / 1e3) / copied
    return cells


def cell(
    benchmark: Any,
    suite: str,
    loss: str,
    case: Case,
    shape: str,
    dtype: torch.dtype,
    backward: bool,
    seconds: float = 3.0,
    without: Sequence[str] = (),
    **options: int,
) -> None:
    """Checks and measures one cell: one case, shape, dtype, forward with or without backward; `without` names
    providers that are left out."""
    inputs = case.inputs(ALL_SHAPES[shape], dtype, DEVICE)
    losses = {name: f for name, f in providers(case, DEVICE).items() if name not in without}
    check_all(case, losses, inputs)
    moved = None
    if shape in SHAPES:
        # Every input is read once, and the student's gradient written: what a fused loss has to move.
        moved = sum(x.nbytes for x in inputs) + (inputs[0].nbytes if backward else 0)
    times = benchmark.pedantic(
        measure,
        args=(losses, inputs),
        kwargs={
            "leaves": case.leaves if backward else 0,
            "others": case.others(inputs) if case.others is not None else {},
            "seconds": seconds,
            **options,
        },
        rounds=1,
        iterations=1,
    )
    short, what = str(dtype).removeprefix("torch."), "forward+backward" if backward else "forward"
    size = "×".join(map(str, ALL_SHAPES[shape]))
    benchmark.extra_info.update(
        suite=suite,
        loss=loss,
        cell=f"{loss}: {shape} {size} {short} {what}",
        shape=list(ALL_SHAPES[shape]),
        dtype=short,
        what=what,
        providers=summary(times, moved),
        absent=dict(case.absent),
    )


def memory_cell(
    benchmark: Any,
    suite: str,
    loss: str,
    case: Case,
    shape: str,
    dtype: torch.dtype,
    without: Sequence[str] = ("reference",),
) -> None:
    """Measures the peak memory of every provider but those `without`, each in a process of its own."""
    names = [name for name in providers(case, "cpu") if name not in without]
    peaks = benchmark.pedantic(
        lambda: {name: peak_memory(suite, loss, name, dtype, ALL_SHAPES[shape]) for name in names},
        rounds=1,
        iterations=1,
    )
    benchmark.extra_info.update(
        suite=suite,
        loss=loss,
        shape=list(ALL_SHAPES[shape]),
        dtype=str(dtype).removeprefix("torch."),
        what="peak memory",
        gradients={name: peak / gradients for name, (peak, gradients) in peaks.items()},
        extra_bytes={name: peak - gradients for name, (peak, gradients) in peaks.items()},
    )


_PEAK = """
import re, sys, torch
from benchmarks import harness, bench_{suite} as bench
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
case, provider, dtype = bench.CASES[sys.argv[1]], sys.argv[2], getattr(torch, sys.argv[3])
*rows, classes = map(int, sys.argv[4:])
loss = harness.providers(case, "cpu")[provider]
# Compilers and threads have their memory after this.
few = classes if provider in harness.COMPILED else classes // 64
harness.step(loss, case.inputs((*rows, few), dtype, "cpu"), case.leaves)()
inputs = case.inputs((*rows, classes), dtype, "cpu")
step = harness.step(loss, inputs, case.leaves)
open("/proc/self/clear_refs", "w").write("5")  # the peak starts over
before = int(open("/proc/self/statm").read().split()[1]) * 4096
step()
print(peak() - before, sum(x.nbytes for x in inputs[:case.leaves]))
"""
# Memory that is freed goes back to the system, so that none that was there before is used again unseen.
_RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def peak_memory(suite: str, loss: str, provider: str, dtype: torch.dtype, shape: Shape) -> tuple[int, int]:
    """Bytes of one forward + backward: peak resident memory above its inputs, and the gradients in it; Linux."""
    command = [sys.executable, "-c", _PEAK.format(suite=suite), loss, provider]
    arguments = (str(dtype).removeprefix("torch."), *map(str, shape))
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, check=True, env={**os.environ, **_RETURNED}
    )
    peak, gradients = map(int, done.stdout.split()[-2:])
    return peak, gradients
