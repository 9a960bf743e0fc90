"""`python -m benchmarks.numerics`: the error of every loss against float64, as docs/numerics.md.

Every row of data is a call of its own, so that no mean hides it; each cell is the worst row's relative error of
the loss and of the student's gradient (in norm). The truth is the reference in float64 on the same rounded logits.
Set TRITON_INTERPRET=1 for the Triton backend's columns; its interpreter does not compute bfloat16 as a GPU does.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kdkernels
from benchmarks import formulas
from benchmarks.errors import NEGLIGIBLE, number, relative
from benchmarks.report import lines_of

FILE = Path(__file__).parent.parent / "docs" / "numerics.md"
Call = Callable[..., Tensor]  # student, teacher, labels, temperature


class Regime(NamedTuple):
    shape: tuple[int, int]
    temperature: float
    scale: float
    noise: float  # 0: student and teacher are independent
    note: str


REGIMES = {
    "plain": Regime((16, 1000), 1.0, 3.0, 0.0, "N(0, 3²) logits, 1,000 classes, T = 1"),
    "warm": Regime((16, 1000), 4.0, 3.0, 0.0, "the same at T = 4"),
    "near": Regime(
        (4, 32_000), 2.0, 3.0, 1e-3, "a student 1e-3 (relative) off its teacher, 32,000 classes, T = 2"
    ),
    "far": Regime((16, 1000), 1.0, 1e3, 0.0, "N(0, 1000²) logits, T = 1"),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def data(regime: Regime, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(regime.shape, generator=generator, dtype=torch.float64)

    teacher = (regime.scale * normal()).to(dtype)
    student = teacher.double() * (1 + regime.noise * normal()) if regime.noise else regime.scale * normal()
    labels = torch.randint(regime.shape[1], regime.shape[:1], generator=generator)
    return student.to(dtype), teacher, labels


def of_logits(function: Any, **options: Any) -> Call:
    return lambda s, t, y, temperature, **backend: function(
        s, t, temperature=temperature, **options, **backend
    )


def of_labels(function: Any, **options: Any) -> Call:
    return lambda s, t, y, temperature, **backend: function(
        s, t, y, temperature=temperature, **options, **backend
    )


def top(teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """A teacher's 64 largest log-probabilities, as a float32 cache holds them."""
    log_probs, indices = torch.log_softmax(teacher.double() / temperature, -1).float().topk(64)
    return log_probs.to(torch.promote_types(teacher.dtype, torch.float32)), indices


def ours_topk(s: Tensor, t: Tensor, y: Tensor, temperature: float, **backend: str) -> Tensor:
    return kdkernels.topk_kl_div(s, *top(t, temperature), temperature=temperature, **backend)


def eager_topk(s: Tensor, t: Tensor, y: Tensor, temperature: float) -> Tensor:
    return formulas.topk(s, *top(t, temperature), temperature=temperature)


WEIGHTS = [0.4, 0.3, 0.2, 0.1]


def several(s: Tensor, t: Tensor, temperature: float) -> tuple[list[Tensor], list[float]]:
    """Four teachers, of which two agree with the student, and their temperatures."""
    own = s.detach()
    return [t, own, t, own], [temperature, temperature, 2 * temperature, 2 * temperature]


def ours_multi(s: Tensor, t: Tensor, y: Tensor, temperature: float, **backend: str) -> Tensor:
    teachers, temperatures = several(s, t, temperature)
    return kdkernels.multi_teacher_kl_div(s, teachers, weights=WEIGHTS, temperatures=temperatures, **backend)


def eager_multi(s: Tensor, t: Tensor, y: Tensor, temperature: float) -> Tensor:
    teachers, temperatures = several(s, t, temperature)
    return formulas.multi_teacher(s, *teachers, weights=WEIGHTS, temperatures=temperatures)


def dkd_eager(s: Tensor, t: Tensor, y: Tensor, temperature: float) -> Tensor:
    return formulas.dkd(s, t, y, alpha=1.0, beta=8.0, temperature=temperature) / temperature**2


OPS: dict[str, tuple[Call, Call]] = {
    "kl_div": (of_logits(kdkernels.kl_div), of_logits(formulas.kl)),
    "kl_div, reverse": (of_logits(kdkernels.kl_div, reverse=True), of_logits(formulas.reverse_kl)),
    "skew_kl_div": (of_logits(kdkernels.skew_kl_div, alpha=0.1), of_logits(formulas.skew_kl, alpha=0.1)),
    "jsd": (of_logits(kdkernels.jsd), of_logits(formulas.jsd, beta=0.5)),
    "tvd": (of_logits(kdkernels.tvd), of_logits(formulas.tvd)),
    "dkd": (of_labels(kdkernels.dkd), dkd_eager),
    "nkd": (of_labels(kdkernels.nkd), of_labels(formulas.nkd, gamma=1.5)),
    "distillation_loss": (
        of_labels(kdkernels.distillation_loss),
        of_labels(formulas.hard_and_soft, hard=0.1, soft=0.9),
    ),
    "distillation_loss, standardize": (
        of_logits(kdkernels.distillation_loss, soft_weight=9.0, hard_weight=0.0, standardize=True),
        of_logits(formulas.standardized_kl, weight=9.0),
    ),
    "topk_kl_div": (ours_topk, eager_topk),
    "multi_teacher_kl_div": (ours_multi, eager_multi),
}


def providers(dtype: torch.dtype) -> list[str]:
    available = [name for name, state in kdkernels.available_backends("cpu").items() if state == "available"]
    if dtype == torch.bfloat16 and "triton" in available:
        available.remove("triton")
    return ["eager", *available]


def evaluate(
    call: Call, student: Tensor, teacher: Tensor, labels: Tensor, temperature: float
) -> list[tuple[Tensor, Tensor]]:
    """Each row's loss and gradient."""
    results = []
    for i in range(len(student)):
        leaf = student[i : i + 1].detach().clone().requires_grad_()
        loss = call(leaf, teacher[i : i + 1], labels[i : i + 1], temperature)
        [gradient] = torch.autograd.grad(loss, leaf)
        results.append((loss.detach().double(), gradient.double()))
    return results


def worst(got: list[tuple[Tensor, Tensor]], truth: list[tuple[Tensor, Tensor]]) -> list[float]:
    return largest([[relative(*pair) for pair in zip(*rows)] for rows in zip(got, truth)])


def measure(op: str, regime: Regime, dtype: torch.dtype) -> dict[str, list[float]]:
    ours, eager = OPS[op]
    student, teacher, labels = data(regime, dtype)
    arguments = (labels, regime.temperature)
    truth = evaluate(partial(ours, backend="reference"), student.double(), teacher.double(), *arguments)
    calls = {name: eager if name == "eager" else partial(ours, backend=name) for name in providers(dtype)}
    return {name: worst(evaluate(call, student, teacher, *arguments), truth) for name, call in calls.items()}


def cell(errors: list[float]) -> str:
    return " / ".join(map(number, errors))


def largest(errors: list[list[float]]) -> list[float]:
    """Of losses, and of gradients; NaN is larger than any."""
    return [max(column, key=lambda e: (e != e, e)) for column in zip(*errors)]


def heads(names: list[str]) -> list[str]:
    return [name if name == "eager" else f"`{name}`" for name in names]


def main() -> None:
    found = {
        (dtype, regime, op): measure(op, REGIMES[regime], dtype)
        for dtype in DTYPES
        for op in OPS
        for regime in REGIMES
    }
    every = providers(torch.float32)
    triton = "triton" in every
    lines = [
        "# Numerics",
        "",
        "Written by `python -m benchmarks.numerics`"
        + (" with TRITON_INTERPRET=1" if triton else "")
        + f": torch "
        f"{torch.__version__}, kdkernels {kdkernels.__version__}, Python {platform.python_version()}, "
        f"{torch.backends.cpu.get_cpu_capability()}.",
        "",
        "Loss / gradient: the worst row's error relative to float64 on the same rounded logits, the gradient's in "
        f'norm (absolute where that is below {number(NEGLIGIBLE)}). "eager" is the loss as people write it in '
        "PyTorch (benchmarks/formulas.py). A half's gradient cannot be nearer than its own rounding, about 2e-4 "
        "(float16) or 2e-3 (bfloat16); in float16 the gradients of a near student are so small that they lose digits."
        + (" Triton ran in its interpreter." if triton else ""),
        "",
        *(f"- {name}: {regime.note}." for name, regime in REGIMES.items()),
        "",
        "## The worst of all losses",
        "",
    ]
    rows = []
    for dtype in DTYPES:
        for regime in REGIMES:
            row = [short(dtype), regime]
            for name in every:
                present = name in providers(dtype)
                row.append(cell(largest([found[dtype, regime, op][name] for op in OPS])) if present else "–")
            rows.append(row)
    lines += lines_of(["dtype", "data", *heads(every)], rows)
    for dtype in DTYPES:
        names = providers(dtype)
        rows = [
            [f"`{op}`", regime, *(cell(found[dtype, regime, op][name]) for name in names)]
            for op in OPS
            for regime in REGIMES
        ]
        lines += ["", f"## {short(dtype)}", "", *lines_of(["loss", "data", *heads(names)], rows)]
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text("\n".join(lines) + "\n")
    print(FILE)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main()
