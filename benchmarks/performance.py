"""`python -m benchmarks.performance`: docs/performance.md: how the losses from hidden states are carried out, and the
least time that the products of Liger's published cells take.

Nothing here is timed. Published times are others', with their source; the floors are derived from the operations; the
launches are counted, by running the op's own Python on tensors without data, on any machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.report import lines_of
from kdkernels import backend
from kdkernels.ops import linear_loss, projection, scale_rows
from kdkernels.ops.divergences import KL, Spec

FILE = Path(__file__).parent.parent / "docs" / "performance.md"


class Gpu(NamedTuple):
    sustained: float  # bfloat16 operations a second
    cores: int
    cache: int


# What large bfloat16 products sustain of the dense peak (989 and 312 TFLOP/s): Liger's CuTe cross-entropy publishes 698
# to 706 on an H100; for the A100, 80 % of the peak.
GPUS = {"H100": Gpu(660e12, 132, 50 << 20), "A100": Gpu(250e12, 108, 40 << 20)}


class Published(NamedTuple):
    op: str
    gpu: str
    rows: int
    milliseconds: float
    torch: float  # eager, published beside it
    memory: str  # likewise
    products: int  # what the same loss takes
    launches: str  # of theirs


D, N = 4096, 128_256
PEER = "Liger's benchmark data and pull requests, 0.8.5 or before"
CELLS = [
    Published("FusedLinearJSD", "H100", 1024, 111, 26, "–", 4, "about 11 × 32 chunks"),
    Published("FusedLinearJSD", "H100", 8192, 182.6, 195.3, "8.7 GB (56.4)", 4, "about 11 × 32 chunks"),
    Published("chunked JSD", "H100", 8192, 60.7, 213.2, "11.1 GB (68.9)", 4, "compiled, 8 chunks"),
    Published("FusedLinearKL", "A100", 8192, 129.2, 195.3, "2.0 GB (19.0)", 3, "–"),
    Published("FusedLinearKL", "A100", 4096, 64.4, 94.8, "–", 3, "–"),
    Published("FusedLinearKL", "A100", 2048, 33.1, 47.3, "509 MB", 3, "–"),
]


def floor(rows: int, products: int, gpu: Gpu) -> float:
    """Milliseconds of the products alone."""
    return 1e3 * products * 2 * rows * N * D / gpu.sustained


class Launches(TorchDispatchMode):
    """Counts what runs on the device, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if not func.is_view and not name.startswith(("empty", "new_empty", "detach", "_unsafe_view", "lift")):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))

    def kernel(self, name: str) -> Any:
        def launch(*arguments: object) -> None:
            self.counts[f"kdkernels {name}"] += 1

        return launch


@contextmanager
def on(gpu: Gpu) -> Iterator[Launches]:
    """Tensors without data are as on this GPU, and kernels of ours are only counted."""
    mode = Launches()

    def logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """One product, which leaves float32."""
        mode.counts["mm"] += 1
        return torch.empty(x.shape[0], weight.shape[0], device=x.device)

    with ExitStack() as stack:
        for target, name, value in (
            (linear_loss, "_machine", lambda _: (gpu.cores, gpu.cache)),
            (linear_loss, "_same_memory", lambda a, b: a is b),
            (scale_rows, "unobserved", lambda _: True),
            (projection, "logits", logits),
        ):
            stack.enter_context(patch.object(target, name, value))
        kernels = {("cuda", name): mode.kernel(name) for name in ("logit_loss", "scale_rows")}
        stack.enter_context(patch.dict(backend._LAUNCHERS, kernels))
        stack.enter_context(mode)
        linear_loss._planned_rows.cache_clear()
        yield mode
        linear_loss._planned_rows.cache_clear()


def launches(rows: int, gpu: Gpu, given: bool) -> Counter[str]:
    """Of a step of `linear_kl_div` with a learnt head in bfloat16; `given`: the teacher by log-probabilities."""
    kind = linear_loss.LOGITS if given else linear_loss.HIDDEN
    options = linear_loss.Options(
        Spec(KL), kind, False, 0, (0.0, 0.0), (0, 0, N), "batchmean", -1, False, "cuda"
    )
    x, weight, teacher, teacher_weight, log_probs = (
        torch.empty(size, device="meta", dtype=torch.bfloat16)
        for size in ((rows, D), (N, D), (rows, D), (N, D), (rows, N))
    )
    sides = (log_probs, None) if given else (teacher, teacher_weight)
    tensors = (x, weight, None, *sides, None)
    needs = [True, True] + [False] * 8
    call = linear_loss._call(tensors, (1.0, 1.0, 1.0, 1.0), None, None, None, None, 1 / rows, options, needs)
    with on(gpu) as mode:
        loss, *gradients = linear_loss._execute(True, call)
        upstream = loss.sum()
        for gradient in gradients:  # the backward
            scale_rows.scale_rows_(gradient, upstream, "cuda")
    return mode.counts


def total(counts: Counter[str]) -> str:
    """All launches, and which of them are products."""
    products = sum(n for name, n in counts.items() if name in ("mm", "addmm", "addmm_"))
    return f"{counts.total():,} ({products:,} products)"


def chunks(rows: int, gpu: Gpu) -> tuple[int, int]:
    """(rows of a chunk, chunks)"""
    each = linear_loss.plan_linear_loss(rows, N, device="cuda", cores=gpu.cores).chunk_rows
    return each, -(-rows // each)


def extra(rows: int, gpu: Gpu, given: bool) -> float:
    """GiB that a step with a learnt head holds besides its inputs and the gradients that it gives."""
    each, count = chunks(rows, gpu)
    both_sides = 2 * 4 * each * N  # float32; a teacher's log-probabilities are cast a chunk at a time
    gradient = 2 * each * N
    probe = torch.empty(0, dtype=torch.bfloat16, device="meta")
    sums = 4 * N * D if projection.sum_dtype(probe, count) == torch.float32 else 0
    return (both_sides + gradient + sums) / 2**30


INTRODUCTION = """\
# Performance of the losses from hidden states

Written by `python -m benchmarks.performance`. It holds no measurement of ours on a GPU: there is none yet. Measured on
CPUs, with machine and versions: [benchmarks/results/](../benchmarks/results), of these losses `linear-cpu.md`.

## How a call is carried out

`linear_kl_div`, `linear_distillation_loss` and `shared_classifier_loss` take hidden states and heads, and never hold
the logits of all rows. M rows, D features, N classes.

**Chunks.** For a few rows at a time: one matrix product makes the student's logits, in float32 whatever the inputs are,
one the teacher's (one for both sides, where they share a head: each part of the head is then read once); the loss's
kernel turns the student's logits into their gradient, in place where both are float32; two more products make the
gradients of features and head, and the chunk's logits are forgotten. So the forward has already computed the gradients,
and the backward hands them out; it multiplies them by the upstream gradient only where that is not 1.

**Tiles.** Where the head is small (up to 4096 classes) and the backend has the kernel: the logits exist as tiles on the
chip, never in memory, and are formed again in the backward.

| step | products of 2 M N D operations |
| --- | --- |
| learnt head | 4: two logits, gradient of the features, gradient of the head |
| frozen head | 3 |
| frozen head that both share, teacher known by `precompute_teacher` | 2 |
| teacher known by log-probabilities | 3, frozen head 2 |
| `reduction="none"`, learnt row weights, a captured graph | 2 more: the backward forms the logits again |
| no gradient wanted | 2 |

`kdkernels.ops.linear_loss.plan_linear_loss` chooses, from the shape and the machine alone. On a CPU a chunk's logits of
both sides are as many as the last cache holds, at most 32 MiB, and at least 16 rows; on a GPU, enough 128 × 128 tiles
for eight on each multiprocessor. `chunk_rows=` overrides it: fewer rows take less memory, and longer.

**Memory**, besides the inputs and the gradients that the call gives: 8 · chunk_rows · N bytes (float32 logits of both
sides); in half precision 2 · chunk_rows · N more for the logits' gradient, and 4 · N · D for a learnt head's float32
sums, where there are more than 8 chunks. Nothing of the size M × N. The CPU's one kernel for calls of few rows and
classes (one chunk, N ≤ 4096, no mask, cap or logit scale; bfloat16, and on Intel CPUs float32 and float64, up to 8
million multiplications a product) holds both sides' logits, their gradients and both heads once more.
"""


def main() -> None:
    rows = []
    for cell in CELLS:
        gpu, given = GPUS[cell.gpu], cell.products == 3
        each, count = chunks(cell.rows, gpu)
        least = floor(cell.rows, cell.products, gpu)
        theirs = [cell.op, cell.gpu, str(cell.rows), f"{cell.milliseconds:g}", f"{cell.torch:g}"]
        theirs += [cell.memory, cell.launches]
        derived = [str(cell.products), f"{least:.1f}", f"{cell.milliseconds / least:.1f}"]
        derived += [f"{count} × {each} rows", total(launches(cell.rows, gpu, given))]
        rows.append([*theirs, *derived, f"{extra(cell.rows, gpu, given):.2f}"])
    header = [
        "op",
        "GPU",
        "rows",
        "Liger, ms *(published)*",
        "its PyTorch, ms *(published)*",
        "memory (PyTorch) *(published)*",
        "launches of Liger",
        "products",
        "floor, ms *(derived)*",
        "Liger in floors",
        "chunks of ours",
        "launches of ours *(counted)*",
        "extra memory of ours, GiB *(derived)*",
    ]
    rates = " and ".join(f"{gpu.sustained / 1e12:g} TFLOP/s on an {name}" for name, gpu in GPUS.items())
    text = [
        INTRODUCTION,
        "## Liger's published cells, and the floor of the same shapes",
        "",
        f"Forward + backward in bfloat16, D = {D}, N = {N:,}, learnt head.",
        "",
        f"- *Published*: {PEER}; not measured here. A publication that gives no width is taken to have that of the "
        "others.",
        "- *Derived*, not measured: the floor is the time of the matrix products alone, products × 2 · rows · N · D / "
        f"sustained operations a second, with {rates} (SXM, bfloat16; Liger publishes 698 to 706 TFLOP/s for a fused "
        "cross-entropy of its own on an H100). At that rate no loss of these products takes less. What ours takes, "
        "nobody has measured.",
        "- FusedLinearKL is given the teacher's probabilities: three products, and ours are counted with "
        "`teacher_log_probs`.",
        "- *Counted*: by running the op's own Python on tensors without data. Liger's launches are about 11 a chunk, "
        "as a comment in its source says, of as many chunks as its formula gives.",
        "",
        *lines_of(header, rows),
    ]
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text("\n".join(text) + "\n")
    print(FILE)


if __name__ == "__main__":
    main()
