"""The losses from hidden states through heads, each backend that runs here, beside eager PyTorch, `torch.compile` of
it, Liger's chunked loss, and the floor: the same matrix products by torch, with nothing between them.

Products in the floor: the student's and the teacher's logits (one product, where they share a head), the gradient of
the student's features, and that of the head where it is learnt. In float32 on a CPU the floor is measured twice: by
`torch.mm`, and by oneDNN, which torch has too, and which is the faster on some machines. For maps it also reads both
maps and writes a gradient, once.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks import formulas, harness, peers
from benchmarks.harness import Case, Job, Shape
from kdkernels import (
    TeacherStatistics,
    linear_distillation_loss,
    linear_kl_div,
    precompute_teacher,
    shared_classifier_loss,
)

TEMPERATURE = 2.0
KD = {"temperature": TEMPERATURE, "hard": 0.1, "soft": 0.9}
LARGE = ("small LM head", "Llama-3 head")
kl = partial(formulas.kl, temperature=TEMPERATURE)


def heads(shape: Shape, dtype: torch.dtype, device: str, labels: bool = False) -> list[Tensor]:
    """Hidden states and heads whose logits are N(0, 3²): student, its weight, teacher, its weight (labels)."""
    rows, features, classes = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    sides = [
        x.to(device, dtype)
        for _ in range(2)
        for x in (normal(rows, features), 3 / features**0.5 * normal(classes, features))
    ]
    y = torch.randint(classes, (rows,), generator=generator).to(device)
    return [*sides, y] if labels else sides


def cached(shape: Shape, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Student, the head of both, teacher, and what is kept of the teacher."""
    student, weight, teacher, _ = heads(shape, dtype, device)
    kept = precompute_teacher(teacher, weight, temperature=TEMPERATURE)
    return [student, weight, teacher, kept.top, kept.direction, kept.offset, kept.entropy]


def classifier(shape: Shape, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Student's features or maps, the classifier's weight and bias, the teacher's features or maps, labels."""
    *size, classes = shape
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(size, generator=generator) for _ in range(2))
    weight = 3 / size[1] ** 0.5 * torch.randn(classes, size[1], generator=generator)
    bias = torch.randn(classes, generator=generator)
    y = torch.randint(classes, size[:1], generator=generator)
    return [*(x.to(device, dtype) for x in (student, weight, bias, teacher)), y.to(device)]


def products(pairs: list[tuple[Tensor, Tensor]], more: Job | None = None) -> dict[str, Job]:
    """The floor: a bᵀ for every pair."""
    onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)

    def by_mm() -> None:
        for a, b in pairs:
            torch.mm(a, b.T)
        if more is not None:
            more()

    def by_onednn() -> None:
        for a, b in pairs:
            onednn(a, b, None, "none", [], "")
        if more is not None:
            more()

    a = pairs[0][0]
    has_onednn = a.device.type == "cpu" and a.dtype == torch.float32 and onednn is not None
    return {"floor": by_mm} | ({"floor (oneDNN)": by_onednn} if has_onednn else {})


def floor(inputs: list[Tensor], *, learnt: bool = True) -> dict[str, Job]:
    student, weight, teacher, teacher_weight, *_ = inputs
    grad = torch.randn_like(student @ weight.T)
    pairs = [(student, weight), (teacher, teacher_weight), (grad, weight.T)]
    return products(pairs + [(grad.T, student.T)] * learnt)


def with_unfrozen(inputs: list[Tensor]) -> dict[str, Job]:
    """The floor of a frozen head, and what ours takes where it is learnt."""
    learnt = harness.step(partial(linear_kl_div, temperature=TEMPERATURE), inputs, 2)
    return {**floor(inputs, learnt=False), "unfrozen": learnt}


def with_full_form(inputs: list[Tensor]) -> dict[str, Job]:
    """The floor where the teacher's logits are not needed, and what ours takes where they are formed."""
    student, weight, teacher = inputs[:3]
    grad = torch.randn_like(student @ weight.T)
    ours = partial(linear_kl_div, temperature=TEMPERATURE)
    full = harness.step(lambda x: ours(x, weight, teacher, weight), [student], 1)
    return {**products([(student, weight), (grad, weight.T)]), "full form": full}


def classifier_floor(inputs: list[Tensor], *, learnt: bool = False) -> dict[str, Job]:
    student, weight, _, teacher, _ = inputs
    pooled = [x.flatten(2).mean(2) if x.dim() > 2 else x for x in (student, teacher)]
    both = torch.cat(pooled)
    grad = torch.randn_like(both @ weight.T)
    pairs = [(both, weight), (grad[: len(student)], weight.T)] + [(grad.T, both.T)] * learnt
    return products(pairs, partial(torch.sub, student, teacher) if student.dim() > 2 else None)


def ours_cached(
    student: Tensor,
    weight: Tensor,
    teacher: Tensor,
    top: Tensor,
    direction: Tensor,
    offset: Tensor,
    entropy: Tensor,
    *,
    backend: str,
) -> Tensor:
    statistics = TeacherStatistics(
        top, direction, offset, entropy, None, None, None, TEMPERATURE, logit_scale=1.0, precision=None
    )
    return linear_kl_div(student, weight, statistics, temperature=TEMPERATURE, backend=backend)


def eager_shared(student: Tensor, weight: Tensor, teacher: Tensor, *_: Tensor) -> Tensor:
    return formulas.of_heads(student, weight, teacher, weight, loss=kl)


def ours_classifier(
    student: Tensor, weight: Tensor, bias: Tensor, teacher: Tensor, labels: Tensor, *, backend: str
) -> Tensor:
    return shared_classifier_loss(student, teacher, weight, bias, labels, backend=backend)


ABSENT = peers.absent(liger=peers.NO_LIGER)
KL = Case(
    eager=partial(formulas.of_heads, loss=kl),
    ours=partial(linear_kl_div, temperature=TEMPERATURE),
    inputs=heads,
    peers={
        "eager, upcast": partial(formulas.of_heads, loss=kl, upcast=True),
        **peers.liger_linear(temperature=TEMPERATURE, hard=0.0, soft=1.0),
    },
    absent=ABSENT,
    leaves=2,
    of_rows=(0, 2),
    others=floor,
)
IJCKD = Case(
    eager=formulas.shared_classifier,
    ours=ours_classifier,
    inputs=classifier,
    of_rows=(0, 3, 4),
    others=classifier_floor,
)
CASES = {
    "linear_kl_div": KL,
    "linear_kl_div, frozen head": KL._replace(leaves=1, others=with_unfrozen),
    "linear_kl_div, cached teacher": KL._replace(
        eager=eager_shared,
        ours=ours_cached,
        inputs=cached,
        peers={},
        absent={},
        leaves=1,
        of_rows=(0, 2, 3, 4, 5, 6),
        others=with_full_form,
    ),
    "linear_distillation_loss": KL._replace(
        eager=partial(formulas.of_heads, loss=partial(formulas.hard_and_soft, **KD)),
        ours=partial(
            linear_distillation_loss,
            temperature=TEMPERATURE,
            hard_weight=KD["hard"],
            soft_weight=KD["soft"],
        ),
        inputs=partial(heads, labels=True),
        peers=peers.liger_linear(temperature=TEMPERATURE, hard=KD["hard"], soft=KD["soft"] * TEMPERATURE**2),
        of_rows=(0, 2, 4),
    ),
    "shared_classifier_loss": IJCKD,
    "shared_classifier_loss, head learnt": IJCKD._replace(
        leaves=3, others=partial(classifier_floor, learnt=True)
    ),
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def cell(benchmark, loss, shape, dtype):
    without = ["eager, upcast"] if dtype == torch.float32 else []
    rounds = {}
    if shape in LARGE:
        without.append("reference")
        rounds = {"least": 5, "warmups": 1}
    harness.cell(
        benchmark,
        "linear_loss",
        loss,
        CASES[loss],
        shape,
        dtype,
        True,
        seconds=2.0,
        without=without,
        **rounds,
    )


@DTYPES
@pytest.mark.parametrize("shape", ["CIFAR-100 head", "ImageNet head", *LARGE])
@pytest.mark.parametrize("loss", [name for name in CASES if name.startswith("linear")])
def test_linear_loss(benchmark, loss, shape, dtype):
    cell(benchmark, loss, shape, dtype)


@DTYPES
@pytest.mark.parametrize(
    "loss, shape",
    [
        ("shared_classifier_loss", "ImageNet head"),
        ("shared_classifier_loss", "ImageNet maps"),
        ("shared_classifier_loss, head learnt", "ImageNet head"),
    ],
)
def test_shared_classifier_loss(benchmark, loss, shape, dtype):
    cell(benchmark, loss, shape, dtype)


@pytest.mark.skipif(harness.DEVICE != "cpu", reason="resident memory is the CPU's")
@DTYPES
@pytest.mark.parametrize("shape", LARGE)
@pytest.mark.parametrize("loss", ["linear_kl_div", "linear_kl_div, frozen head"])
def test_linear_loss_memory(benchmark, loss, shape, dtype):
    without = ["reference"] + ["eager, upcast"] * (dtype == torch.float32)
    harness.memory_cell(benchmark, "linear_loss", loss, CASES[loss], shape, dtype, without)
