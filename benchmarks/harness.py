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
from collections.abc import Callable

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]

# Rows × classes, by where they come from.
SHAPES = {
    "CIFAR-100": (128, 100),
    "ImageNet": (256, 1000),
    "small LM": (64, 32_000),
    "Llama-3, 16 tokens": (16, 128_256),
    "Llama-3": (128, 128_256),
}
COPY_BYTES = 64 << 20


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def check(loss: Loss, truth: Loss, student: Tensor, teacher: Tensor, name: str) -> None:
    """Raises AssertionError unless loss and gradient agree with float64."""

    def run(function: Loss, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        s = student.detach().to(dtype).requires_grad_()
        value = function(s, teacher.to(dtype))
        return value.detach().double(), torch.autograd.grad(value, s)[0].double()

    (value, gradient), (true_value, true_gradient) = run(loss, student.dtype), run(truth, torch.float64)
    tolerance = 20 * max(torch.finfo(student.dtype).eps, 1e-6)
    assert abs(value / true_value - 1) < tolerance, f"{name}: loss {value} instead of {true_value}"
    error = (gradient - true_gradient).norm() / true_gradient.norm()
    assert error < tolerance, f"{name}: gradient off by {error:.1e}"


def measure(
    providers: dict[str, Loss], student: Tensor, teacher: Tensor, *, backward: bool, seconds: float = 3.0
) -> dict[str, list[float]]:
    """Seconds of each run of each provider, and of "copy"; as many rounds as fit into `seconds`, at least 7."""
    device = student.device.type
    leaf = student.detach().requires_grad_(backward)
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.zeros_like(source)  # written once: its pages are there

    def step(loss: Loss) -> None:
        leaf.grad = None
        value = loss(leaf, teacher)
        if backward:
            value.backward()

    def copy() -> None:
        target.copy_(source)

    jobs: list[tuple[str, Callable[[], None]]] = [("copy", copy)]
    jobs += [(name, lambda loss=loss: step(loss)) for name, loss in providers.items()]  # type: ignore[misc]
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


_PEAK = """
import re, sys, torch, benchmarks.bench_{suite} as bench
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
dtype, rows, classes = getattr(torch, sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
loss = bench.providers("cpu")[sys.argv[1]]
s, t = (torch.randn(rows, classes).to(dtype) for _ in range(2))
small = s[:, :classes // 64].clone() if sys.argv[1] != "compile" else s.clone()
loss(small.requires_grad_(), t[:, :small.shape[1]].clone()).backward()  # compilers and threads have their memory
del small
s.requires_grad_()
open("/proc/self/clear_refs", "w").write("5")  # the peak starts over
before = int(open("/proc/self/statm").read().split()[1]) * 4096
loss(s, t).backward()
print((peak() - before) / (s.numel() * s.element_size()))
"""


def peak_memory(suite: str, provider: str, dtype: torch.dtype, shape: tuple[int, int]) -> float:
    """Peak resident memory of one forward + backward above its inputs, in gradients; Linux."""
    command = [sys.executable, "-c", _PEAK.format(suite=suite), provider, str(dtype).removeprefix("torch.")]
    done = subprocess.run([*command, *map(str, shape)], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])
