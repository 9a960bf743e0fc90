"""How everything here is measured.

Providers run one after another in every round, in an order that rotates, in one process with the same threads:
load from elsewhere falls on all of them alike, and ratios hold where seconds do not. Each provider's result is
checked against float64 before anything is timed. A round also copies a tensor, which gives the bandwidth that
the machine had at that time.
"""

from __future__ import annotations

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
Shape = tuple[int, int]

# Rows × classes, by where they come from.
SHAPES = {
    "CIFAR-100": (128, 100),
    "ImageNet": (256, 1000),
    "small LM": (64, 32_000),
    "Llama-3, 16 tokens": (16, 128_256),
    "Llama-3": (128, 128_256),
}
COPY_BYTES = 64 << 20
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


def check(loss: Loss, truth: Loss, inputs: Sequence[Tensor], name: str) -> None:
    """Raises AssertionError unless loss and gradient agree with float64: closely, where they are ours; of what ours
    is measured against it is asked only to be the same loss (benchmarks/parity.py has its errors)."""

    def run(function: Loss, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        student, *others = inputs
        student = student.detach().requires_grad_()
        value = function(student, *others)
        return value.detach().double(), torch.autograd.grad(value, student)[0].double()

    exact = [x.double() if x.is_floating_point() else x for x in inputs]
    (value, gradient), (true_value, true_gradient) = run(loss, inputs), run(truth, exact)
    ours = name in BACKENDS and name != "reference"
    tolerance = 20 * max(torch.finfo(inputs[0].dtype).eps, 1e-6) if ours else 0.5
    assert abs(value / true_value - 1) < tolerance, f"{name}: loss {value} instead of {true_value}"
    error = (gradient - true_gradient).norm() / true_gradient.norm()
    assert error < tolerance, f"{name}: gradient off by {error:.1e}"


def check_all(case: Case, losses: Mapping[str, Loss], inputs: Sequence[Tensor]) -> None:
    """Every provider computes the same loss: ours, the baselines and the peers."""
    truth = partial(case.ours, backend="reference")
    few = [x[:4] for x in inputs]
    for name, loss in losses.items():
        # What is compiled for all rows is not compiled again for a few; eager has been checked by then.
        if name == "compile":
            check(loss, case.eager, inputs, name)
        else:
            check(loss, truth, few, name)


def measure(
    losses: Mapping[str, Loss], inputs: Sequence[Tensor], *, backward: bool, seconds: float
) -> dict[str, list[float]]:
    """Seconds of each run of each provider, and of "copy"; as many rounds as fit into `seconds`, at least 7."""
    student, *others = inputs
    device = student.device.type
    leaf = student.detach().requires_grad_(backward)
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.zeros_like(source)  # written once: its pages are there

    def step(loss: Loss) -> None:
        leaf.grad = None
        value = loss(leaf, *others)
        if backward:
            value.backward()

    def copy() -> None:
        target.copy_(source)

    jobs: list[tuple[str, Callable[[], None]]] = [("copy", copy)]
    jobs += [(name, lambda loss=loss: step(loss)) for name, loss in losses.items()]  # type: ignore[misc]
    for _ in range(3):
        for _, job in jobs:
            job()
    times: dict[str, list[float]] = {name: [] for name, _ in jobs}
    begin, rounds = time.perf_counter(), 0
    while rounds < 7 or (time.perf_counter() - begin < seconds and rounds < 2000):
        first = rounds % len(jobs)
        for name, job in jobs[first:] + jobs[:first]:
            synchronize(device)
            start = time.perf_counter()
            job()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
        rounds += 1
    return times


def summary(times: dict[str, list[float]], moved_bytes: int) -> dict[str, dict[str, float]]:
    """Median and quartiles in ms, and the share of the copy's bandwidth that `moved_bytes` make."""
    copied = 2 * COPY_BYTES / statistics.median(times["copy"])
    cells: dict[str, dict[str, float]] = {"copy": {"gb_per_s": copied / 1e9}}
    for name, values in times.items():
        if name != "copy":
            low, median, high = (1e3 * x for x in statistics.quantiles(values, n=4))
            share = moved_bytes / (median / 1e3) / copied
            cells[name] = {
                "median_ms": median,
                "low_ms": low,
                "high_ms": high,
                "rounds": len(values),
                "copy_share": share,
            }
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
) -> None:
    """Checks and measures one cell: one case, shape, dtype, forward with or without backward."""
    inputs = case.inputs(SHAPES[shape], dtype, DEVICE)
    losses = providers(case, DEVICE)
    check_all(case, losses, inputs)
    # Every input is read once, and the student's gradient written: what a fused loss has to move.
    moved = sum(x.nbytes for x in inputs) + (inputs[0].nbytes if backward else 0)
    times = benchmark.pedantic(
        measure,
        args=(losses, inputs),
        kwargs={"backward": backward, "seconds": seconds},
        rounds=1,
        iterations=1,
    )
    rows, classes = inputs[0].shape
    short, what = str(dtype).removeprefix("torch."), "forward+backward" if backward else "forward"
    benchmark.extra_info.update(
        suite=suite,
        loss=loss,
        cell=f"{loss}: {shape} {rows}×{classes} {short} {what}",
        shape=[rows, classes],
        dtype=short,
        what=what,
        providers=summary(times, moved),
        absent=dict(case.absent),
    )


def memory_cell(benchmark: Any, suite: str, loss: str, case: Case, shape: str, dtype: torch.dtype) -> None:
    """Measures the peak memory of every provider but the reference, each in a process of its own."""
    names = [name for name in providers(case, "cpu") if name != "reference"]
    peaks = benchmark.pedantic(
        lambda: {name: peak_memory(suite, loss, name, dtype, SHAPES[shape]) for name in names},
        rounds=1,
        iterations=1,
    )
    benchmark.extra_info.update(
        suite=suite,
        loss=loss,
        shape=list(SHAPES[shape]),
        dtype=str(dtype).removeprefix("torch."),
        what="peak memory",
        gradients=peaks,
    )


_PEAK = """
import re, sys, torch
from benchmarks import harness, bench_{suite} as bench
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
case, provider, dtype = bench.CASES[sys.argv[1]], sys.argv[2], getattr(torch, sys.argv[3])
rows, classes = int(sys.argv[4]), int(sys.argv[5])
loss = harness.providers(case, "cpu")[provider]
small = case.inputs((rows, classes if provider == "compile" else classes // 64), dtype, "cpu")
loss(small[0].requires_grad_(), *small[1:]).backward()  # compilers and threads have their memory
del small
student, *others = case.inputs((rows, classes), dtype, "cpu")
student.requires_grad_()
open("/proc/self/clear_refs", "w").write("5")  # the peak starts over
before = int(open("/proc/self/statm").read().split()[1]) * 4096
loss(student, *others).backward()
print((peak() - before) / student.nbytes)
"""


def peak_memory(suite: str, loss: str, provider: str, dtype: torch.dtype, shape: Shape) -> float:
    """Peak resident memory of one forward + backward above its inputs, in gradients; Linux."""
    command = [sys.executable, "-c", _PEAK.format(suite=suite), loss, provider]
    arguments = (str(dtype).removeprefix("torch."), *map(str, shape))
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])
