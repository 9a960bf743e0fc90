"""`python -m benchmarks.numerics`: the error of every loss against float64, as docs/numerics.md.

Every row of data is a call of its own, so that no mean hides it; each cell is the worst row's relative error of
the loss and of the student's gradient (in norm). The truth is the reference in float64 on the same rounded logits.
Set TRITON_INTERPRET=1 for the Triton backend's columns; its interpreter does not compute bfloat16 as a GPU does.
`python -m benchmarks.numerics linear` prints the part on the losses from hidden states, and writes nothing.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kdkernels
from benchmarks import formulas, peers
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


# The losses from hidden states: rows, features, classes.
HEAD = (64, 512, 32_000)
KEPT = (16, 256, 8192)
NEAR_HEADS = {
    "one head, features 1e-2 off": (1e-2, None),
    "one head, features 1e-3 off": (1e-3, None),
    "heads 1e-2 apart, features 1e-2 off": (1e-2, 1e-2),
    "heads 1e-3 apart, features 1e-3 off": (1e-3, 1e-3),
}


def heads_data(
    size: tuple[int, int, int], noise: float, apart: float | None, scale: float, dtype: torch.dtype
) -> list[Tensor]:
    """Student, its head, teacher, its head: logits of N(0, scale²); `noise` and `apart` are relative."""
    rows, features, classes = size
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    teacher, weight = (
        normal(rows, features).to(dtype),
        (scale / features**0.5 * normal(classes, features)).to(dtype),
    )
    student, own = teacher.double() + noise * normal(rows, features), weight
    if apart is not None:
        own = (weight.double() + apart * scale / features**0.5 * normal(classes, features)).to(dtype)
    return [student.to(dtype), own, teacher, weight]


def with_gradients(call: Call, inputs: list[Tensor], leaves: int) -> list[Tensor]:
    """The loss and the gradients of the first inputs, in float64."""
    given = [x.detach().clone().requires_grad_(i < leaves) for i, x in enumerate(inputs)]
    loss = call(*given)
    return [loss.detach().double(), *(g.double() for g in torch.autograd.grad(loss, given[:leaves]))]


def native() -> list[str]:
    """Backends of ours that run at these sizes: not Triton's interpreter."""
    available = kdkernels.available_backends("cpu")
    return [name for name, state in available.items() if state == "available" and name != "triton"]


def near_heads_lines() -> list[str]:
    """bfloat16 features and heads, of a student that is close to its teacher."""
    calls: dict[str, Call] = {
        "eager": partial(formulas.of_heads, loss=formulas.kl),
        "eager, upcast": partial(formulas.of_heads, loss=formulas.kl, upcast=True),
        **peers.liger_linear(temperature=1.0, hard=0.0, soft=1.0),
        **{name: partial(kdkernels.linear_kl_div, backend=name) for name in native()},
    }
    rows = []
    for note, (noise, apart) in NEAR_HEADS.items():
        inputs = heads_data(HEAD, noise, apart, 3.0, torch.bfloat16)
        exact = [x.double() for x in inputs]
        truth = with_gradients(partial(kdkernels.linear_kl_div, backend="reference"), exact, 2)
        errors = [
            cell([relative(*pair) for pair in zip(with_gradients(call, inputs, 2), truth)])
            for call in calls.values()
        ]
        rows.append([note, f"{truth[0].item():.0e}", *errors])
    return [
        "",
        "## From hidden states, near convergence",
        "",
        f"`linear_kl_div` of bfloat16 features and heads ({HEAD[0]} rows, {HEAD[1]} features, {HEAD[2]:,} classes, "
        "logits of N(0, 3²), T = 1): error of the loss / the gradient of the features / that of the head, relative to "
        "float64 on the same rounded features and heads, in norm over all rows. eager rounds the logits to bfloat16; "
        "upcast casts them to float32 after that.",
        "",
        *lines_of(["student", "KL", *(f"`{n}`" if n in native() else n for n in calls)], rows),
    ]


def estimate(inputs: list[Tensor], u: float) -> list[float]:
    """What the opening of kdkernels/ops/teacher_statistics.py says of a loss and gradient made of statistics; u is the
    rounding of the gradients that are added."""
    x, weight, teacher, _ = (x.double() for x in inputs)
    s, t = x @ weight.T, teacher @ weight.T
    top = t.argmax(1, keepdim=True)
    bracket = (torch.logsumexp(s, 1, keepdim=True) - s.gather(1, top)).mean()
    kl = torch.nn.functional.kl_div(
        s.log_softmax(1), t.log_softmax(1), log_target=True, reduction="batchmean"
    )
    rest = (bracket - kl).abs()
    return [torch.finfo(torch.float32).eps * float((bracket + rest) / kl), u * float((bracket / kl).sqrt())]


def statistics_lines() -> list[str]:
    """The form without teacher logits beside the full one, as the student nears the teacher."""
    backend = native()[-1]
    rows = []
    for dtype, scale, noises in (
        (torch.float32, 3.0, (0.5, 0.15, 0.05, 0.015, 5e-3, 1.5e-3, 5e-4, 1.5e-4, 5e-5)),
        (torch.float32, 12.0, (0.5, 0.15, 0.05, 0.015, 5e-3, 1.5e-3, 5e-4, 1.5e-4, 5e-5)),
        (torch.bfloat16, 3.0, (0.5, 0.15, 0.05, 0.015, 1e-3, 1e-4)),
        (torch.bfloat16, 12.0, (0.5, 0.15, 0.05, 0.015, 1e-3, 1e-4)),
    ):
        u = torch.finfo(dtype).eps / 2
        for noise in noises:
            inputs = heads_data(KEPT, noise, None, scale, dtype)
            _, weight, teacher, _ = inputs
            kept = kdkernels.precompute_teacher(teacher, weight)
            full = partial(kdkernels.linear_kl_div, backend=backend)
            truth = with_gradients(
                partial(kdkernels.linear_kl_div, backend="reference"), [x.double() for x in inputs], 1
            )
            by_form = [
                with_gradients(lambda x, w, *_: full(x, w, kept), inputs, 1),  # noqa: B023
                with_gradients(full, inputs, 1),
            ]
            errors = [cell([relative(*pair) for pair in zip(got, truth)]) for got in by_form]
            rows.append(
                [
                    short(dtype),
                    f"{scale:g}",
                    f"{truth[0].item():.0e}",
                    errors[0],
                    cell(estimate(inputs, u)),
                    errors[1],
                ]
            )
    return [
        "",
        "## A teacher known by its statistics",
        "",
        f"`linear_kl_div` through one frozen head ({KEPT[0]} rows, {KEPT[1]} features, {KEPT[2]:,} classes, T = 1, "
        f"backend `{backend}`), the teacher given by `precompute_teacher` or by its hidden states; the student nears "
        "the teacher from row to row. Error of the loss / the features' gradient relative to float64 on the same "
        f"inputs (absolute below {number(NEGLIGIBLE)}); the estimate is that of kdkernels/ops/teacher_statistics.py.",
        "",
        *lines_of(["dtype", "std of logits", "KL", "statistics", "estimate", "hidden states"], rows),
    ]


def main(arguments: Sequence[str] = ()) -> None:
    if "linear" in arguments:  # the parts on hidden states alone, to look at
        print("\n".join([*near_heads_lines(), *statistics_lines()]))
        return
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
    lines += [*near_heads_lines(), *statistics_lines()]
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text("\n".join(lines) + "\n")
    print(FILE)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main(sys.argv[1:])
