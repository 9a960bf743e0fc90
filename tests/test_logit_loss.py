"""jsd, skew_kl_div, tvd, dkd, nkd, distillation_loss, kd_statistics: against textbook formulas, in every backend."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from testing import compare, leaves, logits
from torch import Tensor

from kdkernels import distillation_loss, dkd, jsd, nkd, skew_kl_div, tvd
from kdkernels.ops.rows import REDUCTIONS


class Case(NamedTuple):
    """A public loss with options."""

    function: Callable[..., Any]
    options: dict[str, Any]
    parts: float = 1.0  # the sum of the factors of its parts
    squared: bool = False  # whether T² is one of them

    @property
    def takes_labels(self) -> bool:
        return "labels" in inspect.signature(self.function).parameters

    def __call__(self, **arguments: Any) -> Tensor:
        return self.function(**self.options, **arguments)

    def factor(self, temperature: float) -> float:
        return self.parts * (max(1.0, temperature**2) if self.squared else 1.0)


def whole(soft: str, parts: float = 1.0, **options: Any) -> Case:
    """distillation_loss with every part of it on."""
    every = {"soft": soft, "soft_weight": 0.8, "hard_weight": 0.3, "label_smoothing": 0.1, "z_loss": 1e-3}
    return Case(distillation_loss, {**every, **options}, 0.8 * parts + 0.4, True)


CASES = {
    "jsd": Case(jsd, {}),
    "jsd-0.1": Case(jsd, {"beta": 0.1}),
    "jsd-normalized": Case(jsd, {"beta": 0.3, "normalize": True}, 5),
    "skew": Case(skew_kl_div, {}),
    "skew-reverse": Case(skew_kl_div, {"alpha": 0.3, "reverse": True}),
    "tvd": Case(tvd, {}),
    "dkd": Case(dkd, {}, 9),
    "dkd-2-0.5": Case(dkd, {"alpha": 2.0, "beta": 0.5}, 2.5),
    "nkd": Case(nkd, {"gamma": 3.5}, 4.5, True),
    "kl": Case(distillation_loss, {"soft_weight": 1.0, "hard_weight": 0.0}, 1, True),
    "whole-kl": whole("kl"),
    "whole-reverse_kl": whole("reverse_kl"),
    "whole-jsd": whole("jsd", 4.5, beta=0.7, normalize=True),
    "whole-skew_kl": whole("skew_kl"),
    "whole-skew_reverse_kl": whole("skew_reverse_kl", alpha=0.2),
    "whole-tvd": whole("tvd"),
    "whole-dkd": whole("dkd", 5, alpha=1.0, beta=4.0),
    "whole-nkd": whole("nkd", 2.5),
}
# One of each divergence.
KINDS = ["jsd", "skew", "skew-reverse", "tvd", "dkd", "nkd", "whole-kl", "whole-reverse_kl"]


def labels_of(shape: tuple[int, ...], classes: int) -> Tensor:
    """The first class, the last, and others."""
    count = math.prod(shape)
    labels = torch.arange(count) * 7 % classes
    labels[count // 2] = classes - 1
    return labels.view(shape)


def batch(
    case: Case, regime: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **more: Any
) -> dict[str, Any]:
    student, teacher = logits(regime, shape, dtype)
    arguments: dict[str, Any] = {"student": student, "teacher": teacher, **more}
    if case.takes_labels:
        arguments.setdefault("labels", labels_of(shape[:-1], shape[-1]))
    return arguments


def check(name: str, backend: str, arguments: dict[str, Any], **options: Any) -> None:
    """`compare` of one of CASES."""
    case = CASES[name]
    t = arguments.get("temperature", inspect.signature(case.function).parameters["temperature"].default)
    largest = t.max().item() if isinstance(t, Tensor) else t
    compare(case, backend, arguments, factor=case.factor(largest), **options)


def to(device: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}


# The textbook: formulas over (M, N) rows as papers print them, with nothing of kdkernels.


def kl_of(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def others(p: Tensor, labels: Tensor) -> Tensor:  # (M, N) -> (M, N - 1) without each row's label
    keep = torch.ones_like(p, dtype=torch.bool).scatter(1, labels[:, None], False)
    return p[keep].view(len(p), -1)


def textbook_jsd(p, q, *_, beta=0.5, normalize=False):
    mixture = beta * p + (1 - beta) * q
    rows = beta * kl_of(p, mixture) + (1 - beta) * kl_of(q, mixture)
    return rows / (beta * (1 - beta)) if normalize else rows


def textbook_skew(p, q, *_, alpha=0.1, reverse=False):
    return kl_of(q, (1 - alpha) * p + alpha * q) if reverse else kl_of(p, alpha * p + (1 - alpha) * q)


def textbook_dkd(p, q, labels, *_, alpha=1.0, beta=8.0):
    b_p, b_q = (x.gather(1, labels[:, None])[:, 0] for x in (p, q))
    target = b_p * (b_p / b_q).log() + (1 - b_p) * ((1 - b_p) / (1 - b_q)).log()
    return alpha * target + beta * kl_of(
        others(p, labels) / (1 - b_p)[:, None], others(q, labels) / (1 - b_q)[:, None]
    )


def textbook_nkd(p, q, labels, student, teacher, temperature, *, gamma=1.5):
    """p and q are of the temperature; the target part takes the logits."""
    p_y = torch.softmax(teacher, -1).gather(1, labels[:, None])[:, 0]
    target = p_y * F.cross_entropy(student, labels, reduction="none")
    p, q = (others(x, labels) / others(x, labels).sum(-1, keepdim=True) for x in (p, q))
    return target - gamma * temperature**2 * (p * q.log()).sum(-1)


def textbook_soft(name, student, teacher, labels, temperature, teacher_temperature, **options):
    if options.pop("standardize", False):
        student, teacher = (
            (x - x.mean(-1, keepdim=True)) / (1e-7 + x.std(-1, keepdim=True)) for x in (student, teacher)
        )
    p = torch.softmax(teacher / teacher_temperature[:, None], -1)
    q = torch.softmax(student / temperature[:, None], -1)
    formula = {
        "kl": lambda *_: kl_of(p, q),
        "reverse_kl": lambda *_: kl_of(q, p),
        "jsd": textbook_jsd,
        "skew_kl_div": textbook_skew,
        "skew_kl": textbook_skew,
        "skew_reverse_kl": partial(textbook_skew, reverse=True),
        "tvd": lambda *_: 0.5 * (p - q).abs().sum(-1),
        "dkd": textbook_dkd,
        "nkd": textbook_nkd,
    }[name]
    return formula(p, q, labels, student, teacher, temperature, **options)


def textbook(case, student, teacher, labels, temperature, teacher_temperature, **options):
    """The rows' losses: (M,) of (M, N), labels (M,) and temperatures (M,)."""
    options = {**case.options, **options}
    rows = (student, teacher, labels, temperature, teacher_temperature)
    if case.function is not distillation_loss:
        return textbook_soft(case.function.__name__, *rows, **options)
    soft, soft_weight, hard_weight = (
        options.pop("soft", "kl"),
        options.pop("soft_weight"),
        options.pop("hard_weight"),
    )
    smoothing, z_loss = options.pop("label_smoothing", 0.0), options.pop("z_loss", 0.0)
    hard = F.cross_entropy(student, labels, label_smoothing=smoothing, reduction="none")
    square = 1 if soft == "nkd" else temperature**2
    z = torch.logsumexp(student, -1) ** 2
    return soft_weight * square * textbook_soft(soft, *rows, **options) + hard_weight * hard + z_loss * z


def assert_equal_to_rounding(got: Tensor, expected: Tensor, what: str) -> None:
    assert got.shape == expected.shape, what
    assert (got - expected).abs().max() <= 1e-10 * expected.abs().max(), what


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
@pytest.mark.parametrize("standardize", [False, True], ids=["raw", "standardized"])
@pytest.mark.parametrize("name", CASES)
def test_textbook(backend, name, standardize):
    """Values and gradients, with every argument that rows have, in float64."""
    case, shape = CASES[name], (2, 3)
    generator = torch.Generator().manual_seed(5)

    def random(*size: int) -> Tensor:
        return torch.rand(size, generator=generator, dtype=torch.float64)

    student, teacher = logits("plain", (*shape, 9), torch.float64)
    labels = labels_of(shape, 9)
    mask = torch.tensor([[True, False, True], [True, True, True]])
    counts = mask
    arguments = {
        "student": student,
        "teacher": teacher,
        "temperature": 0.5 + 3 * random(2, 3),
        "teacher_temperature": 0.5 + 3 * random(2, 1),
        "weights": random(2, 3) - 0.3,
    }
    extra = {"standardize": standardize, "mask": mask}
    if case.takes_labels:
        extra["labels"] = labels.masked_fill(torch.tensor([[False] * 3, [True, False, False]]), -1)
        extra["ignore_index"] = -1
        counts = mask & (extra["labels"] != -1)
    flat = labels.flatten()
    for reduction in REDUCTIONS:
        a = leaves(arguments)
        upstream = random(*shape) if reduction == "none" else random()
        loss = case(**a, **extra, reduction=reduction, backend=backend)
        gradients = torch.autograd.grad(loss, list(a.values()), upstream)
        b = leaves(arguments)
        temperatures = (b[name].expand(shape).flatten() for name in ("temperature", "teacher_temperature"))
        rows = textbook(
            case,
            b["student"].flatten(0, 1),
            b["teacher"].flatten(0, 1),
            flat,
            *temperatures,
            standardize=standardize,
        )
        rows = rows.view(shape) * b["weights"] * counts
        expected = (
            rows if reduction == "none" else rows.sum() / (counts.sum() if reduction == "batchmean" else 1)
        )
        assert_equal_to_rounding(loss, expected, "loss")
        truths = torch.autograd.grad(expected, list(b.values()), upstream)
        for argument, gradient, truth in zip(a, gradients, truths):
            assert_equal_to_rounding(gradient, truth, argument)


@pytest.mark.parametrize("name", CASES)
def test_every_loss(backend, name):
    arguments = batch(CASES[name], "plain", (4, 37), temperature=2.0)
    check(name, backend, arguments)
    check(name, backend, {**arguments, "standardize": True, "reduction": "none"})


@pytest.mark.parametrize("name", KINDS)
def test_every_dtype(backend_dtype, name):
    backend, dtype = backend_dtype
    check(name, backend, batch(CASES[name], "plain", (3, 41), dtype, temperature=2.0))


@pytest.mark.parametrize("regime", ["near", "far", "ties", "uniform"])
@pytest.mark.parametrize("name", KINDS)
def test_regimes(backend, name, regime):
    if name == "tvd" and regime == "ties":
        return  # where p = q, which of the two is larger is a matter of rounding
    # Near convergence a loss is of second order, and far away a gradient is that of a one-hot side.
    check(name, backend, batch(CASES[name], regime, (3, 40)), vacuous=regime in ("near", "far"))
