"""jsd, skew_kl_div, tvd, dkd, nkd, distillation_loss, kd_statistics: against textbook formulas, in every backend."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import GPU, device_of
from testing import (
    EPS32,
    NAMES,
    assert_near,
    assert_same_bits_whatever_the_threads,
    assert_shifts_do_not_show,
    compare,
    leaves,
    logits,
    run,
)
from torch import Tensor

import kdkernels
from kdkernels import distillation_loss, dkd, jsd, kd_statistics, kl_div, nkd, skew_kl_div, tvd
from kdkernels.backend import statistics_dtype
from kdkernels.ops.calls import COMMON
from kdkernels.ops.distillation_loss import SOFT
from kdkernels.ops.divergences import Spec
from kdkernels.ops.logit_loss import run_logit_loss_kernels
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
    parts = 0.8 * parts + 0.4 + options.get("logit_mse_weight", 0.0)
    return Case(distillation_loss, {**every, **options}, parts, True)


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
    "mse-kl": whole("kl", logit_mse_weight=0.6),
    "mse-jsd": whole("jsd", logit_mse_weight=0.6),
    "mse-dkd": whole("dkd", 9, logit_mse_weight=0.6),
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


def textbook_standardized(x, standardize=True):
    return (x - x.mean(-1, keepdim=True)) / (1e-7 + x.std(-1, keepdim=True)) if standardize else x


def textbook_soft(name, student, teacher, labels, temperature, teacher_temperature, **options):
    standardize = options.pop("standardize", False)
    student, teacher = (textbook_standardized(x, standardize) for x in (student, teacher))
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
    mse = options.pop("logit_mse_weight", 0.0) * F.mse_loss(student, teacher, reduction="none").mean(-1)
    hard = F.cross_entropy(student, labels, label_smoothing=smoothing, reduction="none")
    square = 1 if soft == "nkd" else temperature**2
    z = torch.logsumexp(student, -1) ** 2
    return (
        soft_weight * square * textbook_soft(soft, *rows, **options) + hard_weight * hard + z_loss * z + mse
    )


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
    if name in KINDS or name.startswith("mse"):
        check(name, backend, {**arguments, "standardize": True, "reduction": "none"})


@pytest.mark.parametrize("name", ["jsd", "tvd", "nkd", "whole-dkd", "whole-kl", "mse-kl"])
def test_every_dtype(backend_dtype, name):
    backend, dtype = backend_dtype
    check(name, backend, batch(CASES[name], "plain", (3, 41), dtype, temperature=2.0))


@pytest.mark.parametrize("regime", ["near", "far", "ties"])
@pytest.mark.parametrize("name", [*KINDS, "mse-kl"])
def test_regimes(backend, name, regime):
    if name == "tvd" and regime == "ties":
        return  # where p = q, which of the two is larger is a matter of rounding
    # Near convergence a loss is of second order, and far away a gradient is that of a one-hot side.
    check(name, backend, batch(CASES[name], regime, (3, 40)), vacuous=regime in ("near", "far"))


@pytest.mark.parametrize("name", ["skew-reverse", "nkd", "whole-kl", "whole-dkd", "mse-jsd"])
def test_row_arguments(backend, name):
    case, shape = CASES[name], (2, 4)
    generator = torch.Generator().manual_seed(3)
    arguments = batch(
        case,
        "plain",
        (*shape, 50),
        temperature=0.5 + 3 * torch.rand(shape, generator=generator),
        teacher_temperature=0.5 + 3 * torch.rand(2, 1, generator=generator),
        mask=torch.tensor([[True, False, True, True], [False, True, True, False]]),
        weights=torch.rand(shape, generator=generator) - 0.3,
    )
    if case.takes_labels:
        arguments["labels"][0, 0] = -100
    for reduction in REDUCTIONS:
        check(name, backend, {**arguments, "reduction": reduction})
    # Of standardized logits, which are small, little hangs on the temperature.
    check(name, backend, {**arguments, "standardize": True}, vacuous=True)


@pytest.mark.parametrize("name", ["whole-kl", "nkd", "tvd"])
def test_one_learnable_temperature_for_both(backend, name):
    """Its derivative goes through both sides, and through T² where there is one."""
    check(name, backend, batch(CASES[name], "plain", (4, 60), temperature=torch.tensor(2.5)))


# Around the width of a vector, of a warp's and a block's tile, and of what one tile of Triton holds.
SIZES = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 255, 256, 257, 1000, 1025, 4099, 9000]


@pytest.mark.parametrize("name", ["whole-kl", "jsd", "dkd", "nkd"])
@pytest.mark.parametrize("classes", SIZES)
def test_every_number_of_classes(backend, classes, name):
    case = CASES[name]
    arguments = batch(case, "plain", (2, classes), temperature=2.0)
    arguments["student"][:, -1] += 4  # the last class counts
    if case.takes_labels:
        arguments["labels"] = torch.tensor([classes - 1, classes // 2])
    check(name, backend, arguments, vacuous=classes == 1, wanted=("student",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_many_rows(name, dtype):
    """The CPU kernel keeps what it found of a row where there are many; peaks in its first and its last block."""
    _ready_cpu()
    case = CASES[name]
    for standardize, temperature in ((False, 4.0), (False, 3.0), (True, 2.0)):
        arguments = batch(case, "plain", (66, 600), dtype=dtype, temperature=temperature)
        arguments["standardize"] = standardize
        for row, (of_student, of_teacher, height) in enumerate(
            [(3, 590, 12), (590, 3, 12), (3, 3, 40), (590, 590, 40), (300, 590, 200), (590, 300, 200)]
        ):
            arguments["student"][row, of_student] += height
            arguments["teacher"][row, of_teacher] += height
        arguments["student"][7, :5] = -torch.inf
        arguments["teacher"][7, :5] = -torch.inf
        check(name, "cpu", arguments, vacuous=True, wanted=("student",))


@pytest.mark.parametrize("name", ["kl", "whole-kl", "mse-kl", "skew-reverse"])
def test_many_rows_with_a_learnable_temperature(name):
    _ready_cpu()
    for temperature in (torch.tensor(2.5), torch.linspace(1, 3, 66)):
        arguments = batch(CASES[name], "plain", (66, 600), temperature=temperature)
        check(name, "cpu", arguments, wanted=("student", "temperature"))
        check(name, "cpu", {**arguments, "teacher_temperature": 3.0}, wanted=("student", "temperature"))


@pytest.mark.parametrize("standardize", [False, True], ids=["raw", "standardized"])
@pytest.mark.parametrize("shape", [(3, 600), (66, 600), (2, 9000)], ids=str)
@pytest.mark.parametrize("name", ["jsd", "tvd", "skew-reverse", "dkd", "kl"])
def test_sides_far_from_each_other(name, shape, standardize, backend):
    """All of a side's logits may lie high or low: a softmax does not know."""
    if backend != "cpu" and shape[0] > 3:
        pytest.skip("nothing there depends on the number of rows")
    arguments = batch(CASES[name], "plain", shape, temperature=2.0, standardize=standardize)
    assert_shifts_do_not_show(partial(CASES[name], backend=backend), to(device_of(backend), arguments))


def _ready_cpu() -> None:
    if kdkernels.available_backends("cpu")["cpu"] != "available":
        pytest.skip(kdkernels.available_backends("cpu")["cpu"])


@pytest.mark.parametrize("name", ["dkd", "nkd", "whole-kl"])
def test_labels_anywhere_in_a_long_row(backend, name):
    """At both ends of what a vector, a warp, a block or a tile may hold."""
    edges = (
        (0, 32, 4096, 8192, 9000) if is_slow((1, 9000), backend) else (0, 8, 32, 256, 1024, 4096, 8192, 9000)
    )
    places = sorted({place for edge in edges for place in (edge - 1, edge) if 0 <= place < 9000})
    student, teacher = logits("plain", (1, 9000), torch.float32)
    arguments = {
        "student": student.repeat(len(places), 1),
        "teacher": teacher.repeat(len(places), 1),
        "labels": torch.tensor(places),
        "temperature": 2.0,
        "reduction": "none",
    }
    check(name, backend, arguments, vacuous=True, wanted=("student",))


def test_two_classes_have_no_other_class(backend):
    """DKD's and NKD's part of the other classes is exactly 0, and so is its gradient."""
    device = device_of(backend)
    student, teacher = logits("plain", (6, 2), torch.float32)
    arguments = to(device, {"student": student, "teacher": teacher, "labels": torch.arange(6) % 2})
    arguments["temperature"] = torch.tensor(3.0, device=device)
    loss, gradients = run(partial(dkd, alpha=0.0, backend=backend), arguments)
    assert loss == 0 and all((gradient == 0).all() for gradient in gradients.values())
    with_it, without_it = (run(partial(nkd, gamma=gamma, backend=backend), arguments) for gamma in (5.0, 0.0))
    assert torch.equal(with_it[0], without_it[0])
    for name, gradient in with_it[1].items():
        assert torch.equal(gradient, without_it[1][name]), name
    for soft in ("dkd", "nkd"):
        _, terms = distillation_loss(**arguments, soft=soft, return_terms=True, backend=backend)
        assert terms["non_target"] == 0 and terms["target"] > 0


@pytest.mark.parametrize("name", KINDS)
def test_one_class(backend, name):
    case = CASES[name]
    if case.function is distillation_loss:
        case = Case(distillation_loss, {**case.options, "z_loss": 0.0})
    arguments = to(device_of(backend), batch(case, "plain", (3, 1)))
    for standardize in (False, True):
        loss, gradients = run(partial(case, standardize=standardize, backend=backend), arguments)
        assert loss.abs() < 1e-6
        assert all((gradient.abs() < 1e-6).all() for gradient in gradients.values())


@pytest.mark.parametrize("height", [30.0, 100.0, 1000.0])
@pytest.mark.parametrize("name", ["dkd", "nkd"])
def test_the_label_may_have_all_or_no_mass(backend, name, height):
    """P_y and Q_y near 1 and near 0, together and against each other."""
    signs = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    arguments = batch(CASES[name], "plain", (len(signs), 40), reduction="none", temperature=1.0)
    for row, (of_student, of_teacher) in enumerate(signs):
        arguments["student"][row, arguments["labels"][row]] += of_student * height
        arguments["teacher"][row, arguments["labels"][row]] += of_teacher * height
    check(name, backend, arguments, vacuous=True)


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
def test_the_label_may_have_all_or_no_mass_in_the_textbook_too(backend):
    """In float64, from log-sum-exps with and without the label."""
    for of_student, of_teacher in ((40, 0), (-40, 0), (0, 40), (0, -40), (40, 40), (-40, 40), (-40, -40)):
        arguments = batch(CASES["dkd"], "plain", (4, 9), torch.float64, temperature=1.0, reduction="none")
        labels = arguments["labels"]
        arguments["student"].scatter_add_(1, labels[:, None], torch.full((4, 1), of_student).double())
        arguments["teacher"].scatter_add_(1, labels[:, None], torch.full((4, 1), of_teacher).double())

        def expected(student, teacher, labels=labels):
            def log_b(x):
                others_sum = torch.logsumexp(others(x, labels), -1)
                both = torch.logsumexp(x, -1)
                return x.gather(1, labels[:, None])[:, 0] - both, others_sum - both

            (log_p, log_not_p), (log_q, log_not_q) = log_b(teacher), log_b(student)
            target = log_p.exp() * (log_p - log_q) + log_not_p.exp() * (log_not_p - log_not_q)
            p, q = (torch.softmax(others(x, labels), -1) for x in (teacher, student))
            return target + 8 * kl_of(p, q)

        loss, gradients = run(partial(dkd, backend=backend), arguments, torch.ones(4).double())
        a = leaves({name: arguments[name] for name in ("student", "teacher")})
        truth = expected(**a)
        torch.testing.assert_close(loss, truth, rtol=1e-9, atol=1e-12)
        for name, gradient in zip(a, torch.autograd.grad(truth.sum(), list(a.values()))):
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-12)


def apart(student: Tensor, teacher: Tensor, temperature: float, standardize: bool) -> Tensor:
    """The student without classes where both have as good as the same probability: which of the two is larger, and
    with it the gradient of TV, is a matter of rounding there."""
    step = 1e-3 * (1 - 2 * (torch.arange(student.shape[-1]) % 2))
    for _ in range(50):
        log_q, log_p = (
            torch.log_softmax(textbook_standardized(x.double(), standardize) / temperature, -1)
            for x in (student, teacher)
        )
        close = (log_p - log_q).abs() < 2e-6
        if not close.any():
            return student
        student = torch.where(close, student + step, student)
    raise AssertionError("still close")


NEAR = ["jsd", "jsd-0.1", "skew", "skew-reverse", "tvd", "dkd", "nkd", "kl", "whole-reverse_kl"]


@pytest.mark.parametrize(
    ("name", "standardize"),
    [*((name, False) for name in NEAR), ("jsd", True), ("tvd", True), ("dkd", True), ("kl", True)],
)
def test_near_convergence_is_exact(backend, name, standardize):
    if backend == "reference":
        pytest.skip("the reference differences log-softmaxes; in float64 it is the truth of this test")
    case, classes = CASES[name], 32_000
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(1, classes, generator=generator)
    student = teacher * (1 + 1e-3 * torch.randn(1, classes, generator=generator))
    if name == "tvd":
        student = apart(student, teacher, 2.0, standardize)
    fixed = {"temperature": 2.0, "standardize": standardize}
    if case.function is distillation_loss:
        fixed = {**case.options, **fixed, "hard_weight": 0.0, "z_loss": 0.0}
        case = Case(distillation_loss, {})
    arguments = {"student": student}
    rest = {"teacher": teacher, "labels": teacher.argmax(-1)} if case.takes_labels else {"teacher": teacher}
    truth, true_gradients = run(
        partial(case, **fixed, **{**rest, "teacher": teacher.double()}, backend="reference"),
        arguments,
        dtype=torch.float64,
    )
    device = device_of(backend)
    loss, gradients = run(partial(case, **fixed, **to(device, rest), backend=backend), to(device, arguments))
    gradient, true_gradient = gradients["student"].cpu().double(), true_gradients["student"]
    assert abs(loss.item() / truth.item() - 1) < 1e-4
    difference = gradient - true_gradient
    assert difference.norm() / true_gradient.norm() < 1e-4
    assert difference.abs().max() / true_gradient.abs().max() < 1e-4


@pytest.mark.parametrize("name", ["jsd", "jsd-normalized", "skew", "skew-reverse", "tvd", "dkd", "kl"])
def test_equal_logits_give_exactly_zero(backend, name):
    case = CASES[name]
    arguments = batch(case, "plain", (3, 333), temperature=3.0)
    arguments["student"] = arguments["teacher"]
    loss, gradients = run(partial(case, backend=backend), to(device_of(backend), arguments))
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients.values())


def test_properties(backend):
    """What divergences are bounded by, and what leaves them as they are."""
    device = device_of(backend)
    student, teacher = (x.to(device) for x in logits("plain", (8, 77), torch.float32))
    labels = labels_of((8,), 77).to(device)
    order = torch.randperm(77, generator=torch.Generator().manual_seed(0)).to(device)
    back = order.argsort()
    bounds = {"jsd": math.log(2), "skew": math.log(10), "skew-reverse": -math.log(0.3), "tvd": 1.0}
    for name in KINDS:
        case = CASES[name]
        if case.function is distillation_loss:
            case = Case(distillation_loss, {**case.options, "z_loss": 0.0})  # of the raw logits
        a, b = ({"labels": x} if case.takes_labels else {} for x in (labels, back[labels]))
        rows = case(student=student, teacher=teacher, **a, reduction="none", backend=backend)
        assert (rows >= 0).all() and (rows <= bounds.get(name, math.inf)).all(), name
        moved = case(student=student + 5, teacher=teacher - 7, **a, reduction="none", backend=backend)
        torch.testing.assert_close(moved, rows, rtol=1e-5, atol=1e-4)
        other = case(
            student=student[:, order], teacher=teacher[:, order], **b, reduction="none", backend=backend
        )
        torch.testing.assert_close(other, rows, rtol=1e-5, atol=1e-5)


def test_jsd_ends_in_both_kls(backend):
    device = device_of(backend)
    student, teacher = (x.to(device) for x in logits("plain", (5, 30), torch.float32))
    for options, reverse in (({"beta": 0.0}, False), ({"beta": 1}, True)):
        ours = run(
            partial(jsd, normalize=True, **options, backend=backend), {"student": student, "teacher": teacher}
        )
        plain = run(
            partial(kl_div, reverse=reverse, backend=backend), {"student": student, "teacher": teacher}
        )
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
        loss, gradients = run(
            partial(jsd, **options, backend=backend), {"student": student, "teacher": teacher}
        )
        assert loss == 0 and all((gradient == 0).all() for gradient in gradients.values())
    symmetric = jsd(student, teacher, backend=backend)
    torch.testing.assert_close(jsd(teacher, student, backend=backend), symmetric)


@pytest.mark.parametrize("near", [1e-3, 1e-6])
def test_jsd_is_continuous_in_beta(backend, near):
    device = device_of(backend)
    student, teacher = (x.to(device) for x in logits("near", (4, 50), torch.float32))
    student = student + torch.randn(4, 50, generator=torch.Generator().manual_seed(2)).to(device)
    values = {"student": student, "teacher": teacher}
    for beta, reverse in ((near, False), (1 - near, True)):
        ours = run(partial(jsd, beta=beta, normalize=True, backend=backend), values)
        end = run(partial(kl_div, reverse=reverse, backend=backend), values)
        torch.testing.assert_close(ours, end, rtol=20 * near + 1e-4, atol=20 * near + 1e-5)
        # And right where the weights are large.
        double = {name: x.cpu().double() for name, x in values.items()}
        truth, gradients = run(partial(jsd, beta=beta, normalize=True, backend="reference"), double)
        assert ours[0].item() == pytest.approx(truth.item(), rel=1e-4)
        for name, gradient in gradients.items():
            assert (ours[1][name].cpu() - gradient).abs().max() < 1e-4 * gradient.abs().max(), name


def test_skew_ends(backend):
    device = device_of(backend)
    values = dict(
        zip(("student", "teacher"), (x.to(device) for x in logits("plain", (5, 30), torch.float32)))
    )
    for reverse in (False, True):
        ours = run(partial(skew_kl_div, alpha=0.0, reverse=reverse, backend=backend), values)
        plain = run(partial(kl_div, reverse=reverse, backend=backend), values)
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
        loss, gradients = run(partial(skew_kl_div, alpha=1, reverse=reverse, backend=backend), values)
        assert loss == 0 and all((gradient == 0).all() for gradient in gradients.values())
    # skew reverse KL is skew KL with the sides exchanged
    swapped = {"student": values["teacher"], "teacher": values["student"]}
    torch.testing.assert_close(
        skew_kl_div(**swapped, reverse=True, backend=backend), skew_kl_div(**values, backend=backend)
    )


def test_decoupled_parts_make_up_the_kl(backend):
    """KL = TCKD + (1 − b_T) NCKD, row by row."""
    student, teacher = logits("plain", (30, 25), torch.float32)
    labels, device = labels_of((30,), 25), device_of(backend)
    b = torch.softmax(teacher.double() / 2, -1).gather(1, labels[:, None])[:, 0]
    values = to(device, {"student": student, "teacher": teacher, "labels": labels})
    shared = {"temperature": 2.0, "reduction": "none", "backend": backend}
    target, other = (dkd(**values, alpha=x, beta=1.0 - x, **shared).cpu().double() for x in (1.0, 0.0))
    whole_kl = kl_div(values["student"], values["teacher"], **shared).cpu().double()
    torch.testing.assert_close(target + (1 - b) * other, whole_kl, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("soft", SOFT)
def test_distillation_loss_is_the_sum_of_its_parts(backend, soft):
    device = device_of(backend)
    student, teacher = logits("plain", (6, 40), torch.float32)
    labels = labels_of((6,), 40)
    labels[1] = -100
    mask = torch.tensor([True, True, True, False, True, True])
    a = to(device, {"student": student, "teacher": teacher, "labels": labels, "mask": mask})
    student, teacher, labels, mask = a.values()
    weights = torch.linspace(-0.5, 2.0, 6, device=device)
    counts = mask & (labels != -100)
    own = {
        "kl": partial(kl_div, student, teacher),
        "reverse_kl": partial(kl_div, student, teacher, reverse=True),
        "jsd": partial(jsd, student, teacher, beta=0.2),
        "skew_kl": partial(skew_kl_div, student, teacher, alpha=0.3),
        "skew_reverse_kl": partial(skew_kl_div, student, teacher, alpha=0.3, reverse=True),
        "tvd": partial(tvd, student, teacher),
        "dkd": partial(dkd, student, teacher, labels, alpha=2.0, beta=0.5),
        "nkd": partial(nkd, student, teacher, labels, gamma=2.0),
    }[soft]
    options = {"jsd": {"beta": 0.2}, "skew_kl": {"alpha": 0.3}, "skew_reverse_kl": {"alpha": 0.3}}
    options |= {"dkd": {"alpha": 2.0, "beta": 0.5}, "nkd": {"gamma": 2.0}}
    shared = {"temperature": 3.0, "weights": weights, "reduction": "none", "backend": backend}
    each = {
        "soft": 0.7 * (1 if soft == "nkd" else 9) * own(mask=counts, **shared),
        "hard": 0.4
        * weights
        * counts
        * F.cross_entropy(student, labels, reduction="none", ignore_index=-100, label_smoothing=0.2),
        "z_loss": 0.05 * weights * counts * torch.logsumexp(student, -1) ** 2,
        "logit_mse": 0.3 * weights * counts * F.mse_loss(student, teacher, reduction="none").mean(-1),
    }
    if soft in ("dkd", "nkd"):
        first = {"alpha": 2.0, "beta": 0.0} if soft == "dkd" else {"gamma": 0.0}
        function = dkd if soft == "dkd" else nkd
        scale = 0.7 * (1 if soft == "nkd" else 9)
        each["target"] = scale * function(student, teacher, labels, **first, mask=counts, **shared)
        each["non_target"] = each["soft"] - each["target"]
    student.requires_grad_()
    weights.requires_grad_()
    for reduction in REDUCTIONS:
        loss, terms = distillation_loss(
            student,
            teacher,
            labels,
            soft=soft,
            soft_weight=0.7,
            hard_weight=0.4,
            label_smoothing=0.2,
            z_loss=0.05,
            logit_mse_weight=0.3,
            mask=mask,
            return_terms=True,
            **options.get(soft, {}),
            **{**shared, "reduction": reduction},
        )
        assert terms.keys() == each.keys()
        divisor = counts.sum() if reduction == "batchmean" else 1
        for name, rows in each.items():
            expected = rows if reduction == "none" else rows.sum() / divisor
            torch.testing.assert_close(terms[name], expected, rtol=2e-5, atol=2e-5)
            assert not terms[name].requires_grad and terms[name].dtype == torch.float32
        parts = [terms[name] for name in ("soft", "hard", "z_loss", "logit_mse")]
        torch.testing.assert_close(sum(parts), loss.detach())
        if reduction == "none":
            continue
        plain = distillation_loss(
            student,
            teacher,
            labels,
            soft=soft,
            soft_weight=0.7,
            hard_weight=0.4,
            label_smoothing=0.2,
            z_loss=0.05,
            logit_mse_weight=0.3,
            mask=mask,
            **options.get(soft, {}),
            **{**shared, "reduction": reduction},
        )
        assert torch.equal(plain, loss)
        gradients = [torch.autograd.grad(x.sum(), student)[0] for x in (loss, plain)]
        assert torch.equal(*gradients)


@pytest.mark.parametrize("classes", [1, 9, 257, 1025, 4099, 9000])
def test_logit_mse_alone(backend, classes):
    """Without a soft term and labels: of the raw logits, with gradients for both sides."""
    case = Case(distillation_loss, {"soft_weight": 0.0, "hard_weight": 0.0, "logit_mse_weight": 0.7})
    arguments = batch(case, "plain", (3, classes), labels=None)
    device = device_of(backend)
    upstream = torch.tensor(1.5, device=device)
    for options in (
        {},
        {"standardize": True, "reduction": "sum"},
        {"mask": torch.tensor([True, False, True])},
    ):
        moved = to(device, {**arguments, **options})
        mask = moved.get("mask", torch.ones(3, dtype=torch.bool, device=device))
        loss, gradients = run(partial(case, backend=backend), moved, upstream)
        gaps = (moved["student"] - moved["teacher"]).double() * mask[:, None]
        divisor = 1 if "reduction" in options else mask.sum()
        expected = 0.7 * gaps.square().sum() / classes / divisor
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
        for name, sign in (("student", 1), ("teacher", -1)):
            expected = sign * 1.5 * 2 * 0.7 * gaps / classes / divisor
            torch.testing.assert_close(gradients[name].double(), expected, rtol=1e-6, atol=0)
    if classes > 8:
        columns = {"valid_classes": (2, classes - 1), "teacher_valid_classes": (1, classes - 2)}
        loss, gradients = run(partial(case, **columns, backend=backend), to(device, arguments))
        gaps = (arguments["student"][:, 2:-1] - arguments["teacher"][:, 1:-2]).to(device)
        torch.testing.assert_close(loss, 0.7 * gaps.square().mean(1).mean(), rtol=1e-5, atol=0)
        expected = 2 * 0.7 * gaps / gaps.numel()
        torch.testing.assert_close(gradients["student"], F.pad(expected, (2, 1)), rtol=1e-5, atol=1e-12)
        torch.testing.assert_close(gradients["teacher"], F.pad(-expected, (1, 2)), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("soft_weight", [0.0, 0.5])
@pytest.mark.parametrize("soft", SOFT)
def test_logit_mse_of_masked_classes(backend, soft, soft_weight):
    """−inf in both: equal. In one only: an infinite loss, never NaN, with the difference's sign in the gradient."""
    device = device_of(backend)
    student, teacher = logits("plain", (4, 40), torch.float32)
    student[0, 3:9] = teacher[0, 3:9] = -math.inf
    student[1, 5], teacher[2, 6] = -math.inf, -math.inf
    labels = torch.tensor([0, 1, 2, 39])
    mask = torch.tensor([True, True, True, True])
    a = leaves(to(device, {"student": student, "teacher": teacher, "labels": labels, "mask": mask}))
    options = {"soft": soft, "soft_weight": soft_weight, "hard_weight": 0.1, "label_smoothing": 0.1}
    loss = distillation_loss(**a, **options, logit_mse_weight=0.5, reduction="none", backend=backend)
    without = distillation_loss(**a, **options, reduction="none", backend=backend)
    gaps = torch.where(student == -math.inf, 0, student - teacher)[[0, 3]]
    torch.testing.assert_close(
        (loss - without)[[0, 3]].cpu(), 0.5 * gaps.square().mean(1), rtol=1e-4, atol=1e-4
    )
    assert (loss[1:3] == math.inf).all()
    gradients = torch.autograd.grad(loss[[0, 3]].sum(), (a["student"], a["teacher"]))
    for gradient in gradients:
        assert torch.isfinite(gradient[[0, 3]]).all() and (gradient[0, 3:9] == 0).all()
    if soft_weight == 0:
        for_student, for_teacher = torch.autograd.grad(
            distillation_loss(**a, **options, logit_mse_weight=0.5, reduction="sum", backend=backend),
            (a["student"], a["teacher"]),
        )
        assert for_student[1, 5] == for_teacher[2, 6] == -math.inf
        assert for_student[2, 6] == for_teacher[1, 5] == math.inf
        assert torch.isfinite(for_student).sum() == torch.isfinite(for_teacher).sum() == 158


# The kernels themselves: gradients in the place of the logits, and of another dtype.


def launch(
    backend: str, values: dict[str, Any], divergence: int, grad_input: Tensor, **options: Any
) -> Tensor:
    """Runs the kernel at temperatures 2 and 3 with all parts of the loss; gives the rows' losses."""
    input, target = values["input"], values["target"]
    loss = torch.full((input.shape[0],), math.nan, dtype=statistics_dtype(input.dtype), device=input.device)
    parts = {"hard_weight": 0.4, "label_smoothing": 0.1, "z_loss": 1e-3, "logit_mse": 0.2, **options}
    standardize = parts.pop("standardize", False)
    kernel = kdkernels.backend.launcher(backend, "logit_loss")
    kernel(
        input, target, values["labels"], None, None, 2.0, 3.0, None, 0.9, None, 0.5, values["mask"],
        divergence, 0.6, 1.3, 0.3, standardize, *parts.values(), loss, None, grad_input, None,
    )  # fmt: skip
    return loss


def values_of(rows: int, classes: int, dtype: torch.dtype, backend: str) -> dict[str, Any]:
    input, target = logits("plain", (rows, classes), dtype)
    input[1, ::3] = target[1, ::3] = -math.inf  # the smoothing's share is found late
    labels = labels_of((rows,), classes)
    labels[1] = 2
    mask = torch.ones(rows, dtype=torch.bool)
    mask[2] = False
    return to(device_of(backend), {"input": input, "target": target, "labels": labels, "mask": mask})


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


DIVERGENCES = [
    "none", "kl", "reverse_kl", "mixture", "total_variation", "decoupled", "reverse_decoupled", "normalized",
    "reverse_normalized",
]  # fmt: skip
# Few rows and many, of which the CPU keeps more; rows that a GPU holds in registers, and one that it streams.
SHAPES = {
    "cpu": [(3, 50), (3, 1300), (70, 50), (66, 1300)],
    "triton": [(3, 50), (3, 9100)],
    "cuda": [(3, 50), (3, 1000), (3, 1300)],
}


def is_slow(shape: tuple[int, int], backend: str) -> bool:
    """In Triton's interpreter: what depends on all of a row is then seen in short ones."""
    return backend == "triton" and not GPU and shape[1] > 1000


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_gradient_may_take_the_place_of_the_logits(backend_dtype, divergence):
    """Bit for bit what it is elsewhere."""
    backend, dtype = backend_dtype
    if backend == "reference":
        pytest.skip("has no kernels")
    number = DIVERGENCES.index(divergence)
    without = {"label_smoothing": 0.0, "z_loss": 0.0, "logit_mse": 0.0}
    for shape, options in itertools.product(
        SHAPES[backend], ({}, {"standardize": True}, without, {"hard_weight": 0.0, **without})
    ):
        if is_slow(shape, backend) and (options is without or (options and dtype != torch.float32)):
            continue  # between two others; of halves the first is enough
        values = values_of(*shape, dtype, backend)
        grad = torch.full_like(values["input"], math.nan)
        loss = launch(backend, values, number, grad, **options)
        assert torch.isfinite(grad).all() and torch.isfinite(loss).all()
        assert (grad[0] != 0).any() or (divergence == "none" and "hard_weight" in options)
        input = values["input"].clone()
        assert torch.equal(launch(backend, {**values, "input": input}, number, input, **options), loss)
        assert torch.equal(bits(input), bits(grad)), (shape, options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_gradient_of_float32_logits_may_be_of_halves(backend, divergence, dtype):
    """The float32 gradient, rounded once; at any place, in rows with or without gaps."""
    if backend == "reference" or (backend == "triton" and dtype == torch.bfloat16 and not GPU):
        pytest.skip("no kernels, or an interpreter whose bfloat16 is wrong")
    number = DIVERGENCES.index(divergence)
    every = ({}, {"standardize": True, "label_smoothing": 0.0})
    places = ((0, 0), (4, 8), (1, 3))
    cases = [
        (shape, *case)
        for shape in SHAPES[backend]
        for case in (zip(every, places[1:]) if is_slow(shape, backend) else itertools.product(every, places))
    ]
    for shape, options, (start, padding) in cases:
        values = values_of(*shape, torch.float32, backend)
        rows, classes = shape
        wholes = [
            torch.full((rows, start + classes + padding), math.nan, dtype=x, device=values["input"].device)
            for x in (torch.float32, dtype)
        ]
        # At the same place with respect to 16 bytes the kernel is the same, order of summation included.
        grad, halves = (whole[:, start : start + classes] for whole in wholes)
        losses = [launch(backend, values, number, x, **options) for x in (grad, halves)]
        assert torch.equal(*losses)
        assert torch.equal(bits(halves), bits(grad.to(dtype))), (shape, options)
        for whole in wholes:
            assert torch.isnan(whole[:, :start]).all() and torch.isnan(whole[:, start + classes :]).all()


@pytest.mark.parametrize("name", ["kl", "mixture", "reverse_decoupled", "none"])
def test_both_gradients_may_take_the_place_of_logits(backend, name):
    """The input's is made elsewhere, then the target's in its place; without the target's side also the input's."""
    if backend == "reference":
        pytest.skip("has no kernels")
    values = values_of(4, 300, torch.float32, backend)
    spec = Spec(DIVERGENCES.index(name), 0.6, 1.3, 0.3, False, 0.9, True, 0.4, 0.1, 1e-3, 0.2)
    arguments = (values["labels"], None, None, 2.0, 3.0, None, 0.5, values["mask"], spec, 2, 5, 290, backend)

    def run_kernels(in_place: bool, both: bool) -> list[Tensor | None]:
        input, target = (values[side].clone() for side in ("input", "target"))
        loss = torch.empty(4, device=input.device)
        grad_input = input if in_place and not both else torch.full_like(input, math.nan)
        grad_target = target if in_place else torch.full_like(target, math.nan)
        outputs = [loss, None, grad_input, grad_target if both else None, None, None]
        run_logit_loss_kernels(outputs, input, target, *arguments)
        return outputs

    for both in (False, True):
        for a, b in zip(run_kernels(False, both), run_kernels(True, both)):
            assert (a is None and b is None) or (torch.equal(a, b) and torch.isfinite(a).all())


def test_cross_entropy_alone(backend):
    """soft_weight 0: the teacher and the temperature are not looked at; both may be anything, the teacher None."""
    device = device_of(backend)
    student, _ = logits("plain", (6, 40), torch.float32)
    labels = labels_of((6,), 40)
    labels[2] = 7
    values = to(device, {"student": student, "labels": labels})
    expected, gradients = run(
        lambda student, labels: F.cross_entropy(student, labels, ignore_index=7), values
    )
    temperature = torch.nn.Parameter(torch.tensor(2.0, device=device))
    for teacher in (None, torch.full_like(values["student"], math.nan).requires_grad_()):
        a = leaves(values)
        loss = distillation_loss(
            **a,
            teacher=teacher,
            temperature=temperature,
            soft_weight=0.0,
            hard_weight=1.0,
            ignore_index=7,
            backend=backend,
        )
        torch.testing.assert_close(loss.detach(), expected)
        loss.backward()
        torch.testing.assert_close(a["student"].grad, gradients["student"])
        assert teacher is None or teacher.grad is None or (teacher.grad == 0).all()
        assert temperature.grad is None or temperature.grad == 0
    for zero in (0.0, 0):  # and nothing at all is 0, with a graph
        a = leaves(values)
        loss = distillation_loss(**a, teacher=None, soft_weight=zero, hard_weight=zero, backend=backend)
        loss.backward()
        assert loss == 0 and (a["student"].grad == 0).all()


def test_without_labels(backend):
    device = device_of(backend)
    student, teacher = (x.to(device) for x in logits("plain", (6, 40), torch.float32))
    top = teacher.argmax(-1)
    for function in (dkd, nkd):
        torch.testing.assert_close(
            function(student, teacher, backend=backend), function(student, teacher, top, backend=backend)
        )
    for soft in ("kl", "dkd"):
        options = {"soft": soft, "hard_weight": 0.0, "backend": backend}
        expected = distillation_loss(student, teacher, top, **options)
        torch.testing.assert_close(distillation_loss(student, teacher, **options), expected)
    for dtype in (torch.int32, torch.uint8):
        assert torch.equal(
            dkd(student, teacher, top.to(dtype), backend=backend), dkd(student, teacher, top, backend=backend)
        )


def test_a_label_smoothed_away_may_be_masked(backend):
    """label_smoothing = 1: nothing of the label is left, so its −inf is not seen."""
    student, teacher = (x.to(device_of(backend)) for x in logits("plain", (2, 30), torch.float32))
    student[0, 3] = -torch.inf
    labels = torch.tensor([3, 4], device=student.device)
    options = {"soft_weight": 0.0, "hard_weight": 1.0, "label_smoothing": 1.0, "reduction": "none"}
    loss = distillation_loss(student, teacher, labels, **options, backend=backend)
    live = student > -torch.inf
    mean = torch.where(live, student, 0).sum(-1) / live.sum(-1)
    torch.testing.assert_close(loss, torch.logsumexp(student, -1) - mean)


def test_a_wrong_label_is_named_in_the_callers_numbering(backend):
    if device_of(backend) != "cpu":
        pytest.skip("looking would make a GPU wait")
    student, teacher = logits("plain", (2, 30), torch.float32)
    with pytest.raises(ValueError, match=r"\[10, 25\).*got 7"):
        dkd(student, teacher, torch.tensor([12, 7]), valid_classes=(10, 25), backend=backend)


def test_kl_div_takes_the_familys_options(backend):
    """standardize and valid_classes, which lead it to the family's kernel."""
    student, teacher = logits("plain", (5, 40), torch.float32)
    wider = torch.cat((teacher, torch.full((5, 3), torch.nan)), 1)
    for reverse, soft in ((False, "kl"), (True, "reverse_kl")):
        alone = {
            "soft": soft,
            "soft_weight": 1 / 9,
            "hard_weight": 0.0,
            "temperature": 3.0,
            "backend": backend,
        }
        options = {"reverse": reverse, "temperature": 3.0, "backend": backend}
        moved = [x.to(device_of(backend)) for x in (student, teacher, wider)]
        expected = distillation_loss(moved[0], moved[1], standardize=True, **alone)
        torch.testing.assert_close(kl_div(moved[0], moved[1], standardize=True, **options), expected)
        torch.testing.assert_close(
            kl_div(moved[0], moved[2], valid_classes=40, **options), kl_div(moved[0], moved[1], **options)
        )
        module = kdkernels.KLDivLoss(standardize=True, reverse=reverse, temperature=3.0, backend=backend)
        torch.testing.assert_close(module(moved[0], moved[1]), expected)
        assert module.temperature == 3.0 and module.reduction == "batchmean"


def test_standardize_forgets_scale_and_shift(backend):
    """LSKD: a z + b with a > 0 on either side changes nothing."""
    device = device_of(backend)
    student, teacher = (x.to(device) for x in logits("plain", (6, 40), torch.float32))
    labels = labels_of((6,), 40).to(device)
    for name in KINDS:
        case = CASES[name]
        if case.function is distillation_loss:
            case = Case(distillation_loss, {"soft": case.options["soft"], "hard_weight": 0.0})
        rest = {"labels": labels} if case.takes_labels else {}
        shared = {**rest, "standardize": True, "reduction": "none", "temperature": 2.0, "backend": backend}
        rows = case(student=student, teacher=teacher, **shared)
        moved = case(student=7 * student + 3, teacher=0.2 * teacher - 1, **shared)
        torch.testing.assert_close(moved, rows, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_constant_rows_standardized_are_zeros(backend, name):
    """No spread: z' = 0 and no gradient through it, exactly; the other side stays as it is."""
    case = CASES[name]
    if case.function is distillation_loss:
        case = Case(distillation_loss, {"soft": case.options["soft"], "hard_weight": 0.0})
    arguments = batch(case, "plain", (4, 45))
    arguments["student"][0] = arguments["teacher"][1] = 2.7
    arguments["student"][2] = arguments["teacher"][2] = -1.3
    arguments["student"][3, 2:] = -math.inf  # live are two equal ones
    arguments["student"][3, :2] = 0.1
    if case.takes_labels:
        arguments["labels"][:] = torch.tensor([0, 7, 44, 1])
    arguments["teacher"][3] = arguments["student"][3]
    shared = {"standardize": True, "temperature": 2.0, "reduction": "none"}
    arguments = to(device_of(backend), arguments)
    loss, gradients = run(
        partial(case, **shared, backend=backend), arguments, torch.ones(4, device=device_of(backend))
    )
    zeros = {**arguments, "student": arguments["student"].clone(), "teacher": arguments["teacher"].clone()}
    zeros["student"][[0, 2]] = zeros["teacher"][[1, 2]] = 0.0
    expected = case(**zeros, **shared, backend=backend)
    torch.testing.assert_close(loss, expected)
    assert (gradients["student"][[0, 2, 3]] == 0).all() and (gradients["teacher"][1:] == 0).all()
    if case.function is not nkd:
        assert (loss[2:] == 0).all()
    assert gradients["student"][1].abs().sum() > 0 and gradients["teacher"][0].abs().sum() > 0


def test_temperature_learns_through_the_square(backend):
    """CTKD: d(T² KL)/dT = mean of 2 T KL − Cov_p(z_T, log p − log q) + E_p[z_S] − E_q[z_S]."""
    device = device_of(backend)
    student, teacher = logits("plain", (5, 30), torch.float32)
    s, t, temperature = student.double(), teacher.double(), 3.0
    log_p, log_q = torch.log_softmax(t / temperature, -1), torch.log_softmax(s / temperature, -1)
    p, q = log_p.exp(), log_q.exp()
    delta = log_p - log_q
    kl = (p * delta).sum(-1)
    covariance = (p * t * delta).sum(-1) - (p * t).sum(-1) * kl
    expected = (2 * temperature * kl - covariance + (p * s).sum(-1) - (q * s).sum(-1)).mean()
    T = torch.tensor(temperature, device=device, requires_grad=True)
    loss = distillation_loss(
        student.to(device),
        teacher.to(device),
        temperature=T,
        soft_weight=1.0,
        hard_weight=0.0,
        backend=backend,
    )
    [gradient] = torch.autograd.grad(loss, T)
    assert loss.item() == pytest.approx((9 * kl.mean()).item(), rel=1e-5)
    assert gradient.item() == pytest.approx(expected.item(), rel=1e-4)


# Masked classes.


def with_dead_classes(case: Case, classes: int = 40) -> dict[str, Any]:
    """Rows whose teacher lacks classes, both sides lack some, the teacher has one left, its label is dead."""
    arguments = batch(case, "plain", (5, classes), temperature=1.5, reduction="none")
    student, teacher = arguments["student"], arguments["teacher"]
    teacher[0, 3:8] = -math.inf
    student[1, 7] = teacher[1, 7] = -math.inf
    student[1, -4:] = teacher[1, -4:] = -math.inf
    teacher[2, 1:] = -math.inf
    teacher[3, 5] = -math.inf
    teacher[4, :9] = teacher[4, 10:] = -math.inf
    if case.takes_labels:
        arguments["labels"] = torch.tensor([1, 2, 2, 5, 9])
    return arguments


@pytest.mark.parametrize("name", KINDS)
def test_minus_infinity_is_a_class_without_mass(backend, name):
    for classes, standardize in ((700, False), (40, True)):
        arguments = with_dead_classes(CASES[name], classes)
        if name == "whole-reverse_kl":
            arguments["student"], arguments["teacher"] = arguments["teacher"], arguments["student"]
            arguments["labels"][2:] = torch.tensor([0, 6, 9])  # a hard label is alive
        check(name, backend, {**arguments, "standardize": standardize}, vacuous=True)


@pytest.mark.parametrize("name", ["jsd", "jsd-normalized", "skew", "skew-reverse", "tvd"])
def test_no_common_class(backend, name):
    """Bounded divergences of distributions that share nothing, or next to nothing."""
    bound = {
        "jsd": math.log(2),
        "jsd-normalized": -(0.3 * math.log(0.3) + 0.7 * math.log(0.7)) / 0.21,
        "skew": -math.log(0.1),
        "skew-reverse": -math.log(0.3),
        "tvd": 1.0,
    }[name]
    for gap in (math.inf, 85.0):  # the latter leaves probabilities on both sides of the least normal float
        arguments = batch(CASES[name], "plain", (2, 40), reduction="none")
        arguments["student"][:, 10:] -= gap
        arguments["teacher"][:, :10] -= gap
        check(name, backend, arguments, vacuous=True)
        rows = CASES[name](**to(device_of(backend), arguments), backend=backend)
        torch.testing.assert_close(rows.cpu(), torch.full((2,), bound))


@pytest.mark.parametrize("name", KINDS)
def test_student_without_a_class(backend, name):
    """What the teacher has and the student lacks: +inf as the reference says, or finite; never NaN."""
    case = CASES[name]
    arguments = batch(case, "plain", (4, 50), reduction="none")
    arguments["student"][1, 4] = -math.inf
    if case.takes_labels:
        arguments["labels"] = torch.tensor([0, 1, 2, 49])
        arguments["student"][2, 2] = -math.inf  # the label's
        arguments["student"][3, 49] = arguments["teacher"][3, 49] = -math.inf
    truth = case(
        **{k: x.double() if k in NAMES and isinstance(x, Tensor) else x for k, x in arguments.items()},
        backend="reference",
    )
    device = device_of(backend)
    a = leaves(to(device, arguments))
    loss = case(**a, backend=backend)
    torch.testing.assert_close(loss.detach().cpu().double(), truth, rtol=1e-5, atol=1e-6)
    assert torch.isfinite(truth[0])
    if name in ("dkd", "nkd", "whole-kl"):
        assert truth[1] == math.inf and truth[2] == math.inf
    [gradient] = torch.autograd.grad(loss.sum(), a["student"])
    assert torch.isfinite(gradient).all() and (gradient[0] != 0).any()


@pytest.mark.parametrize("name", KINDS)
def test_nan_in_a_row_that_counts_shows(backend, name):
    """NaN as NaN; +inf, which no distribution has, as what is not finite. At the label too."""
    case = CASES[name]
    wrong = list(itertools.product((math.nan, math.inf), ("student", "teacher"), (280, 299)))
    for more in ({}, {"standardize": True}, {"temperature": torch.full((9,), 2.0)}):
        arguments = batch(case, "plain", (9, 300), reduction="none", **more)
        if case.takes_labels:
            arguments["labels"][:] = 299
        for row, (value, side, place) in enumerate(wrong):
            arguments[side][row, place] = value
        loss = case(**to(device_of(backend), arguments), backend=backend)
        assert torch.isnan(loss[:4]).all() and not torch.isfinite(loss[4:8]).any(), more
        assert torch.isfinite(loss[8])


# Rows that do not count.


@pytest.mark.parametrize("name", ["jsd", "whole-dkd"])
def test_masked_rows_may_hold_anything(backend_dtype, name):
    backend, dtype = backend_dtype
    case, device = CASES[name], device_of(backend)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    arguments = batch(case, "plain", (4, 70), dtype, temperature=torch.full((4,), 2.0, dtype=statistics))
    mask = torch.tensor([True, False, True, False], device=device)
    arguments = to(device, arguments)
    clean = case(**{k: x[mask] for k, x in arguments.items()}, backend=backend)
    for side, first, second in (("student", math.nan, -math.inf), ("teacher", math.inf, math.nan)):
        arguments[side][1], arguments[side][3] = first, second
    if case.takes_labels:
        arguments["labels"][1], arguments["labels"][3] = -5, 70  # nor are these looked at
    weights = torch.tensor([1.0, math.nan, 1.0, math.inf], dtype=statistics, device=device)
    loss, gradients = run(partial(case, mask=mask, backend=backend), {**arguments, "weights": weights})
    torch.testing.assert_close(loss, clean)
    for x in gradients.values():
        assert torch.isfinite(x[mask]).all() and x[mask].abs().sum() > 0
        assert (x[~mask] == 0).all()


@pytest.mark.parametrize("name", ["nkd", "whole-kl"])
def test_ignored_labels_count_for_nothing(backend, name):
    """Not in the sum, not in the denominator, not in the terms; and a mask adds to them."""
    case, device = CASES[name], device_of(backend)
    arguments = to(device, batch(case, "plain", (6, 30)))
    kept = torch.tensor([True, False, True, True, False, True], device=device)
    mask = torch.tensor([True, True, False, True, True, True], device=device)
    some = {k: x[kept & mask] for k, x in arguments.items()}
    arguments["student"][~kept] = math.nan
    arguments["labels"][~kept] = 1_000
    for reduction in ("batchmean", "sum"):
        shared = {"reduction": reduction, "backend": backend}
        expected = case(**some, **shared)
        torch.testing.assert_close(case(**arguments, mask=mask, ignore_index=1_000, **shared), expected)
        if case.function is distillation_loss:
            _, terms = case(**arguments, mask=mask, ignore_index=1_000, return_terms=True, **shared)
            _, expected = case(**some, return_terms=True, **shared)
            for term in terms:
                torch.testing.assert_close(terms[term], expected[term])
    rows = case(**arguments, ignore_index=1_000, reduction="none", backend=backend)
    assert (rows[~kept] == 0).all() and (rows[kept] != 0).all()


@pytest.mark.parametrize("name", ["jsd", "dkd", "whole-nkd"])
def test_nothing_counts(backend, name):
    case, device = CASES[name], device_of(backend)
    arguments = to(device, batch(case, "plain", (3, 40)))
    nobody = [{"mask": torch.zeros(3, dtype=torch.bool, device=device)}]
    if case.takes_labels:
        nobody.append({"labels": torch.full((3,), -100, device=device)})
    for none in nobody:
        for reduction in REDUCTIONS:
            a = leaves({**arguments, **none})
            loss = case(**a, reduction=reduction, backend=backend)
            assert (loss == 0).all() and loss.requires_grad
            for gradient in torch.autograd.grad(loss.sum(), (a["student"], a["teacher"])):
                assert (gradient == 0).all()
            if case.function is distillation_loss:
                _, terms = case(**a, reduction=reduction, return_terms=True, backend=backend)
                assert all((term == 0).all() for term in terms.values())


@pytest.mark.parametrize("name", ["jsd", "nkd", "whole-dkd"])
def test_empty_batch(backend, name):
    case, device = CASES[name], device_of(backend)
    arguments = (
        to(device, batch(case, "plain", (0, 5, 7)))
        if not case.takes_labels
        else {
            "student": torch.zeros(0, 5, 7, device=device),
            "teacher": torch.zeros(0, 5, 7, device=device),
            "labels": torch.zeros(0, 5, dtype=torch.long, device=device),
        }
    )
    for reduction, shape in (("none", (0, 5)), ("sum", ()), ("batchmean", ())):
        a = leaves({**arguments, "temperature": torch.tensor(2.0, device=device)})
        loss = case(**a, reduction=reduction, backend=backend)
        assert loss.shape == shape and (loss == 0).all()
        for argument in ("student", "teacher", "temperature"):
            [gradient] = torch.autograd.grad(loss.sum(), a[argument], retain_graph=True)
            assert gradient.shape == a[argument].shape and (gradient == 0).all()
        if case.function is distillation_loss:
            _, terms = case(**a, reduction=reduction, return_terms=True, backend=backend)
            assert all(term.shape == shape and (term == 0).all() for term in terms.values())
    assert all(x.shape == () and x == 0 for x in kd_statistics(a["student"], a["teacher"], backend=backend))


@pytest.mark.parametrize("name", ["jsd", "whole-dkd", "nkd"])
def test_one_row_and_no_row_dimension(backend, name):
    for reduction in ("batchmean", "none"):
        check(name, backend, batch(CASES[name], "plain", (33,), reduction=reduction))
    if CASES[name].function is distillation_loss:
        arguments = to(device_of(backend), batch(CASES[name], "plain", (33,)))
        loss, terms = CASES[name](**arguments, return_terms=True, backend=backend)
        torch.testing.assert_close(terms["soft"] + terms["hard"] + terms["z_loss"], loss)


@pytest.mark.parametrize(
    "layout", ["columns", "row stride", "transposed", "expanded", "four dimensions", "offset"]
)
@pytest.mark.parametrize("name", ["whole-dkd"])
def test_layouts(backend, name, layout):
    case, device = CASES[name], device_of(backend)
    big = {
        k: x.to(device).requires_grad_() for k, x in zip(NAMES, logits("plain", (8, 6, 99), torch.float32))
    }
    view = {
        "columns": lambda x: x[:, 0, 3:90],
        "row stride": lambda x: x[::2, 1],
        "transposed": lambda x: x[0].T,
        "expanded": lambda x: x[:1, 0].expand(5, 99),
        "four dimensions": lambda x: x.reshape(2, 4, 6, 99)[:, 1:, ::2],
        "offset": lambda x: x.flatten()[1 : 1 + 4 * 99].view(4, 99),
    }[layout]
    results = []
    for dense in (False, True):
        a = {k: view(x).contiguous() if dense else view(x) for k, x in big.items()}
        if case.takes_labels:
            a["labels"] = labels_of(a["student"].shape[:-1], a["student"].shape[-1]).to(device)
            a["labels"] = a["labels"] if dense else a["labels"].repeat_interleave(2, -1)[..., ::2]
        loss = case(**a, temperature=2.0, backend=backend)
        results.append((loss.detach(), *torch.autograd.grad(loss, tuple(big.values()))))
    # Another alignment may take another loop, which adds in another order.
    torch.testing.assert_close(*(result[0] for result in results), rtol=8 * EPS32, atol=0)
    for a, b in zip(*(result[1:] for result in results)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


# Classes that there are.


@pytest.mark.parametrize("name", ["tvd", "nkd", "whole-dkd"])
@pytest.mark.parametrize(
    ("ours", "theirs", "of_student", "of_teacher"),
    [
        (40, None, slice(0, 40), slice(0, 40)),
        ((3, 60), None, slice(3, 60), slice(3, 60)),
        (50, 50, slice(0, 50), slice(0, 50)),
        ((8, 48), (5, 45), slice(8, 48), slice(5, 45)),
        (None, (10, 74), slice(0, 64), slice(10, 74)),
    ],
    ids=["first", "range", "both", "ranges", "teacher's"],
)
def test_valid_classes(backend, name, ours, theirs, of_student, of_teacher):
    """As if the others were not there, whatever they hold; their gradient is exactly 0."""
    case, device = CASES[name], device_of(backend)
    student, teacher = logits("plain", (4, 80), torch.float32)
    a = {"student": student[:, :64].clone(), "teacher": teacher}
    inside = {"student": a["student"][:, of_student], "teacher": teacher[:, of_teacher]}
    if case.takes_labels:
        inside["labels"] = labels_of((4,), of_student.stop - of_student.start)
        a["labels"] = inside["labels"] + of_student.start
    inside = to(device, {key: x.clone() for key, x in inside.items()})
    for side, valid, fill in (("student", of_student, math.nan), ("teacher", of_teacher, math.inf)):
        a[side][:, : valid.start] = a[side][:, valid.stop :] = fill
    a = to(device, a)
    ranges = {"valid_classes": ours, "teacher_valid_classes": theirs}
    for standardize in (False, True) if ours == (8, 48) else (False,):
        shared = {"standardize": standardize, "temperature": 2.0, "backend": backend}
        expected, true_gradients = run(partial(case, **shared), inside)
        loss, gradients = run(partial(case, **ranges, **shared), a)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        for side, valid in (("student", of_student), ("teacher", of_teacher)):
            gradient = gradients[side]
            torch.testing.assert_close(gradient[:, valid], true_gradients[side], rtol=1e-4, atol=2e-6)
            assert (gradient[:, : valid.start] == 0).all() and (gradient[:, valid.stop :] == 0).all()
    if case.function is nkd:  # labels that are the teacher's largest among its valid classes
        expected = nkd(**{**inside, "labels": inside["teacher"].argmax(-1)}, backend=backend)
        found = nkd(a["student"], a["teacher"], **ranges, backend=backend)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# Autograd.


@pytest.mark.parametrize("name", ["jsd", "dkd", "whole-nkd"])
def test_backward_twice_and_no_shared_buffer(backend, name):
    case, device = CASES[name], device_of(backend)
    arguments = to(device, batch(case, "plain", (4, 90)))
    for reduction in ("batchmean", "none"):
        a = leaves({**arguments, "temperature": torch.tensor(2.0, device=device)})
        wanted = [a[x] for x in ("student", "teacher", "temperature")]
        loss = case(**a, reduction=reduction, backend=backend)
        upstream = torch.rand(loss.shape, generator=torch.Generator().manual_seed(0)).to(device) + 0.5
        first = torch.autograd.grad(loss, wanted, upstream, retain_graph=True)
        kept = [gradient.clone() for gradient in first]
        second = torch.autograd.grad(loss, wanted, 2 * upstream, retain_graph=True)
        third = torch.autograd.grad(loss, wanted, upstream)
        for a, copy, b, c in zip(first, kept, second, third):
            assert torch.equal(a, copy), "a later backward wrote into a gradient that was handed out"
            assert len({a.data_ptr(), b.data_ptr(), c.data_ptr()}) == 3
            torch.testing.assert_close(b, 2 * a)
            assert torch.equal(c, a)


WANTED = [
    ("student",),
    ("teacher",),
    ("temperature",),
    ("teacher_temperature",),
    ("weights",),
    ("student", "weights"),
    ("teacher", "temperature"),
]


@pytest.mark.parametrize("wanted", WANTED, ids="+".join)
@pytest.mark.parametrize("name", ["whole-nkd"])
def test_gradients_only_where_required(backend, name, wanted):
    case, device = CASES[name], device_of(backend)
    arguments = batch(case, "plain", (3, 40))
    arguments["temperature"], arguments["teacher_temperature"] = torch.full((3,), 2.0), torch.full((3,), 3.0)
    arguments["weights"] = torch.tensor([0.5, 1.5, -1.0])
    every = leaves(to(device, arguments))
    case(**every, backend=backend).backward()
    some = {key: x.detach().clone().requires_grad_(key in wanted) for key, x in to(device, arguments).items()}
    case(**some, backend=backend).backward()
    for key in NAMES:
        assert (some[key].grad is not None) == (key in wanted)
        if key in wanted:
            torch.testing.assert_close(some[key].grad, every[key].grad)


def test_no_gradient_work_where_none_is_wanted(monkeypatch):
    if kdkernels.available_backends("cpu")["cpu"] != "available":
        pytest.skip("needs the native module")
    asked = []
    monkeypatch.delitem(COMMON, "logit_loss", raising=False)
    original = kdkernels.backend._LAUNCHERS["cpu", "logit_loss"]
    monkeypatch.setitem(
        kdkernels.backend._LAUNCHERS,
        ("cpu", "logit_loss"),
        lambda *a: (asked.append([x is not None for x in a[-4:]]), original(*a)),
    )
    case = CASES["whole-kl"]
    arguments = batch(case, "plain", (4, 40), backend="cpu")
    case(**arguments)
    arguments["student"].requires_grad_()
    with torch.no_grad():
        case(**arguments, return_terms=True)
    case(**arguments).backward()
    arguments["teacher"].requires_grad_()
    case(**arguments)
    # loss, terms, gradient of the first side, of its temperature; the teacher's is a call of its own
    assert asked == [
        [True, False, False, False],
        [True, True, False, False],
        [True, False, True, False],
        [True, False, True, False],
        [False, False, True, False],
    ]


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
@pytest.mark.parametrize("name", [*KINDS, "whole-dkd", "whole-nkd", "mse-kl"])
def test_gradcheck(backend, name):
    case = CASES[name]
    torch.manual_seed(0)
    values = {
        "student": torch.randn(2, 3),
        "teacher": torch.randn(2, 3),
        "temperature": torch.rand(2) + 1,
        "teacher_temperature": torch.rand(1) + 1,
        "weights": torch.rand(2) + 0.5,
    }
    inputs = tuple(values[name].double().requires_grad_() for name in NAMES)
    rest = {"labels": torch.tensor([2, 1])} if case.takes_labels else {}
    mask = torch.tensor([True, False])
    for options in ({"reduction": "none"}, {"mask": mask, "standardize": True}):

        def call(*tensors, options=options):
            return case(**dict(zip(NAMES, tensors)), **rest, **options, backend=backend)

        assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["jsd", "dkd", "whole-kl", "mse-kl"])
def test_double_backward(backend, name):
    """∇(‖∂loss/∂student‖²) in float32 against float64."""
    case, device = CASES[name], device_of(backend)
    arguments = batch(case, "plain", (3, 20), temperature=2.0)

    def penalty(arguments: dict, backend: str) -> tuple[Tensor, Tensor]:
        a = leaves(arguments)
        loss = 3 * case(**a, backend=backend)  # an upstream gradient that must not be lost
        [first] = torch.autograd.grad(loss, a["student"], create_graph=True)
        return torch.autograd.grad(first.square().sum(), (a["student"], a["teacher"]))

    double = {k: x.double() if k in ("student", "teacher") else x for k, x in arguments.items()}
    truth = penalty(double, "reference")
    got = penalty(to(device, arguments), backend)
    for a, b in zip(got, truth):
        assert b.abs().max() > 1e-4
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["tvd", "whole-dkd"])
def test_deterministic(backend, name):
    case = CASES[name]
    arguments = to(device_of(backend), batch(case, "plain", (3, 5000)))
    runs = [run(partial(case, backend=backend), arguments) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(gradient, runs[1][1][key]) for key, gradient in runs[0][1].items())


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_threads_do_not_change_a_bit(backend):
    for name in ("whole-dkd", "jsd"):
        arguments = batch(CASES[name], "plain", (37, 3000))

        def found(function=partial(CASES[name], backend=backend), arguments=arguments):
            loss, gradients = run(function, arguments)
            return loss, *gradients.values()

        assert_same_bits_whatever_the_threads(found)


# The op, captured graphs, modules.


def test_opcheck(backend):
    if backend == "reference":
        pytest.skip("plain PyTorch, no op")
    device = device_of(backend)
    student, teacher = (x.to(device) for x in logits("plain", (3, 20), torch.float32))
    labels = torch.tensor([0, 19, 4], device=device)
    rows = torch.rand(3, device=device) + 0.5
    mask = torch.tensor([True, False, True], device=device)
    whole_range, inner = (0, 0, 20), (1, 2, 15)
    for arguments in (
        (student, teacher, None, None, None, 2.0, 2.0, None, 0.5, None, 3, 0.5, 0.5, 0.5, False, 1.0, False,
         0.0, 0.0, 0.0, 0.0, *whole_range, False, [True, False, False, False], backend),
        (student, teacher, labels % 15, rows, rows, 1.0, 1.0, rows, 1.0, mask, 5, 1.0, 8.0, 0.0, True, 0.9, True,
         0.1, 0.1, 1e-4, 0.5, *inner, True, [True] * 4, backend),
        (student, None, labels, None, None, 1.0, 1.0, None, 1.0, mask, 0, 1.0, 1.0, 0.0, False, 0.0, True,
         1.0, 0.0, 0.0, 0.0, *whole_range, True, [True, False, False, False], backend),
        (student, teacher, None, None, None, 1.0, 1.0, None, 1.0, mask, 0, 1.0, 1.0, 0.0, False, 0.0, True,
         0.0, 0.0, 0.0, 1.0, *inner, True, [True, True, False, False], backend),
    ):  # fmt: skip
        for op in (torch.ops.kdkernels.logit_loss_fwd, torch.ops.kdkernels.logit_loss_bwd):
            torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
@pytest.mark.parametrize(
    ("name", "reduction"), [("whole-dkd", "batchmean"), ("whole-kl", "none"), ("jsd", "batchmean")]
)
def test_compiles_into_one_graph(backend, name, reduction):
    case = CASES[name]
    values = batch(case, "plain", (6, 50))
    values["temperature"], values["weights"] = torch.tensor(2.0), torch.linspace(0.5, 1.5, 6)
    mask = torch.tensor([True, False, True, True, False, True])
    terms = {"return_terms": True} if case.function is distillation_loss else {}

    def call(arguments):
        found = case(**arguments, mask=mask, reduction=reduction, backend=backend, **terms)
        loss, parts = found if terms else (found, {})
        return loss.sum(), {key: part.sum() for key, part in parts.items()}

    graphs = []

    def spy(graph, inputs):
        graphs.append(graph)
        return graph.forward

    eager, compiled = leaves(values), leaves(values)
    expected = call(eager)
    expected[0].backward()
    for how in (spy, "aot_eager"):
        torch._dynamo.reset()
        got = torch.compile(call, fullgraph=True, backend=how)(compiled)
        torch.testing.assert_close(got, expected)
    got[0].backward()
    for key in NAMES:
        if key in eager:
            torch.testing.assert_close(compiled[key].grad, eager[key].grad)
    assert len(graphs) == 1
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(call, fullgraph=True, backend="aot_eager")(compiled), expected
        )


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_inductor_runs_the_op_in_its_graph(backend):
    arguments = batch(CASES["whole-dkd"], "plain", (6, 50))

    def call(student, teacher, labels):
        return 4 * CASES["whole-dkd"](student=2 * student, teacher=teacher, labels=labels, backend=backend)

    expected, true_gradients = run(call, arguments)
    torch._dynamo.reset()
    got, gradients = run(torch.compile(call, fullgraph=True), arguments)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradients, true_gradients)


@pytest.mark.parametrize("name", ["jsd-0.1", "skew-reverse", "tvd", "dkd", "nkd", "whole-skew_kl"])
def test_modules(backend, name):
    case, device = CASES[name], device_of(backend)
    kinds = {
        jsd: kdkernels.JSDLoss,
        skew_kl_div: kdkernels.SkewKLDivLoss,
        tvd: kdkernels.TVDLoss,
        dkd: kdkernels.DKDLoss,
        nkd: kdkernels.NKDLoss,
        distillation_loss: kdkernels.DistillationLoss,
    }
    kind = kinds[case.function]
    arguments = to(device, batch(case, "plain", (4, 30)))
    mask = torch.tensor([True, True, False, True], device=device)
    weights = torch.tensor([1.0, 2.0, 3.0, 0.0], device=device)
    shared = {"temperature": 3.0, "reduction": "sum", "backend": backend}
    module = kind(**case.options, **shared)
    expected = case(**arguments, mask=mask, weights=weights, **shared)
    assert torch.equal(module(*arguments.values(), mask=mask, weights=weights), expected)
    assert "temperature=3.0" in repr(module) and not list(module.parameters())
    learned = kind(
        **case.options, temperature=torch.nn.Parameter(torch.tensor(2.0, device=device)), backend=backend
    )
    learned(*arguments.values()).backward()
    [parameter] = learned.parameters()
    assert parameter.grad is not None and parameter.grad != 0
    assert dict(learned.named_parameters()).keys() == {"temperature"}
    with pytest.raises(TypeError, match=f"{kind.__name__} takes .*temperature.*; got 'temprature'"):
        kind(temprature=2.0)
    with pytest.raises(ValueError, match="reduction must be one of"):
        kind(reduction="mean")
    with pytest.raises(TypeError, match="takes"):
        kind(mask=mask)


# Statistics.


@pytest.mark.parametrize(
    ("regime", "standardize"), [("plain", False), ("far", False), ("ties", False), ("plain", True)]
)
def test_statistics(backend, regime, standardize):
    device = device_of(backend)
    student, teacher = logits(regime, (2, 4, 37), torch.float32)
    student[1, 1, 4:] = teacher[1, 1, 4:] = -math.inf
    mask = torch.tensor([[True, False, True, True], [True, True, True, False]])
    temperature = torch.tensor([[1.0], [2.5]])
    for reduction in REDUCTIONS:
        options = {"standardize": standardize, "reduction": reduction, "teacher_temperature": 2.0}
        rows = {"student": student, "teacher": teacher, "temperature": temperature, "mask": mask}
        double = {k: x.double() if x.is_floating_point() else x for k, x in rows.items()}
        truth = kd_statistics(**double, **options, backend="reference")
        reference = kd_statistics(**rows, **options, backend="reference")
        got = kd_statistics(**to(device, rows), **options, backend=backend)
        logit = max(1.0, student[student > -math.inf].abs().max().item())
        for name, a, b, c in zip(got._fields, got, truth, reference):
            assert_near(a.cpu(), b, c, logit * (8 if reduction == "sum" else 1), name)
            assert not a.requires_grad


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
@pytest.mark.parametrize("standardize", [False, True], ids=["raw", "standardized"])
def test_statistics_of_the_textbook(backend, standardize):
    student, teacher = logits("plain", (3, 4, 9), torch.float64)
    teacher[:2, 0] = student[:2, 0] * 2  # same top
    mask = torch.tensor([[True, False, True, True]]).expand(3, 4)
    T = torch.tensor([[1.5], [2.5], [1.0]], dtype=torch.float64)
    s, t = (textbook_standardized(x, standardize) for x in (student, teacher))
    p, q = torch.softmax(t / 3.0, -1), torch.softmax(s / T[..., None], -1)
    rows = {
        "student_entropy": torch.distributions.Categorical(q).entropy(),
        "teacher_entropy": torch.distributions.Categorical(p).entropy(),
        "kl": kl_of(p, q),
        "agreement": 1 - 0.5 * (p - q).abs().sum(-1),
        "top1_match": (student.argmax(-1) == teacher.argmax(-1)).double(),
    }
    for reduction in REDUCTIONS:
        found = kd_statistics(
            student,
            teacher,
            temperature=T,
            teacher_temperature=3.0,
            standardize=standardize,
            mask=mask,
            reduction=reduction,
            backend=backend,
        )
        for name, row in rows.items():
            row = row * mask
            expected = row if reduction == "none" else row.sum() / (9 if reduction == "batchmean" else 1)
            torch.testing.assert_close(getattr(found, name), expected, rtol=1e-10, atol=1e-10)
    assert 0 < found.top1_match < mask.sum()


@pytest.mark.parametrize("classes", [1, 2, 31, 33, 257, 1000, 4099, 9000])
def test_statistics_of_every_number_of_classes(backend, classes):
    student, teacher = logits("plain", (3, classes), torch.float32)
    student[0, -1] = teacher[0, -1] = 30.0  # the top of both is last
    student[1, 0] = teacher[1, 0] = student[1, -1] = 20.0  # a tie: the first counts
    truth = kd_statistics(student.double(), teacher.double(), reduction="none", backend="reference")
    device = device_of(backend)
    got = kd_statistics(student.to(device), teacher.to(device), reduction="none", backend=backend)
    assert got.top1_match[0] == 1 and got.top1_match[1] == 1
    for name, a, b in zip(got._fields, got, truth):
        torch.testing.assert_close(
            a.cpu().double(), b, rtol=2e-5, atol=2e-5, msg=lambda x, name=name: f"{name}: {x}"
        )


def test_statistics_of_masked_rows_and_classes(backend):
    device = device_of(backend)
    student, teacher = (x.to(device) for x in logits("plain", (4, 30), torch.float32))
    mask = torch.tensor([True, False, True, True], device=device)
    clean = kd_statistics(student[mask][:, 3:20], teacher[mask][:, 5:22], backend=backend)
    student[1], teacher[1] = math.nan, math.inf
    student[:, 20:], teacher[:, :5] = math.inf, math.nan
    ranges = {"valid_classes": (3, 20), "teacher_valid_classes": (5, 22)}
    found = kd_statistics(student.requires_grad_(), teacher, mask=mask, **ranges, backend=backend)
    for a, b in zip(found, clean):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert not a.requires_grad
    none = kd_statistics(student, teacher, mask=torch.zeros_like(mask), backend=backend)
    assert all(x == 0 for x in none)
    one = kd_statistics(student[0, 3:20], teacher[0, 5:22], backend=backend)
    assert all(x.shape == () and torch.isfinite(x) for x in one)


# Bad input.

X, Y = torch.zeros(4, 5), torch.arange(4)


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        (jsd, {"student": [1.0]}, TypeError, "student must be a tensor"),
        (jsd, {"teacher": None}, TypeError, "teacher must be a tensor"),
        (dkd, {"teacher": None, "labels": Y}, TypeError, "teacher must be a tensor"),
        (distillation_loss, {"teacher": None, "labels": Y}, TypeError, "teacher must be a tensor"),
        (kd_statistics, {"teacher": None}, TypeError, "teacher must be a tensor"),
        (tvd, {"student": torch.tensor(1.0)}, ValueError, "student must have shape"),
        (nkd, {"teacher": torch.zeros(4, 6)}, ValueError, r"student's shape \(4, 5\), got \(4, 6\).*valid_classes"),
        (skew_kl_div, {"teacher": X.double()}, TypeError, "teacher must have the student's dtype"),
        (jsd, {"teacher": X.to("meta")}, ValueError, "teacher must be on the student's device"),
        (jsd, {"student": X.long(), "teacher": X.long()}, TypeError, "student must be float64"),
        (jsd, {"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
        (jsd, {"temperature": "4 K"}, TypeError, "temperature must be a float or a tensor"),
        (jsd, {"temperature": torch.ones(3)}, ValueError, "temperature must broadcast to the rows"),
        (dkd, {"teacher_temperature": -1.0}, ValueError, "teacher_temperature must be positive"),
        (jsd, {"mask": torch.ones(4)}, TypeError, "mask must be a bool tensor"),
        (jsd, {"mask": torch.ones(5, dtype=torch.bool)}, ValueError, "mask must broadcast"),
        (jsd, {"weights": Y}, TypeError, "weights must be a floating tensor"),
        (jsd, {"reduction": "mean"}, ValueError, "reduction must be one of none, sum, batchmean, got 'mean'"),
        (kd_statistics, {"reduction": "mean"}, ValueError, "reduction must be one of"),
        (jsd, {"backend": "tpu"}, ValueError, "backend must be None or one of"),
        (jsd, {"beta": 1.5}, ValueError, r"beta must be in \[0, 1\], got 1.5"),
        (jsd, {"beta": math.nan}, ValueError, r"beta must be in \[0, 1\], got nan"),
        (jsd, {"beta": "half"}, TypeError, "beta must be a float, got 'half'"),
        (skew_kl_div, {"alpha": -0.1}, ValueError, r"alpha must be in \[0, 1\], got -0.1"),
        (dkd, {"alpha": "one"}, TypeError, "alpha must be a float, got 'one'"),
        (dkd, {"beta": math.inf}, ValueError, "beta must be finite, got inf"),
        (nkd, {"gamma": torch.ones(())}, TypeError, "gamma must be a float, got a torch.float32 tensor"),
        (distillation_loss, {"labels": Y, "soft": "mse"}, ValueError, "soft must be one of kl, .*nkd, got 'mse'"),
        (distillation_loss, {}, TypeError, "labels must be given where hard_weight is not 0"),
        (distillation_loss, {"labels": Y, "soft_weight": math.nan}, ValueError, "soft_weight must be finite"),
        (distillation_loss, {"labels": Y, "hard_weight": "1"}, TypeError, "hard_weight must be a float"),
        (distillation_loss, {"labels": Y, "z_loss": math.inf}, ValueError, "z_loss must be finite"),
        (distillation_loss, {"labels": Y, "logit_mse_weight": "1"}, TypeError, "logit_mse_weight must be a float"),
        (distillation_loss, {"labels": Y, "label_smoothing": 2}, ValueError, r"label_smoothing must be in \[0, 1\]"),
        (distillation_loss, {"labels": Y, "soft": "jsd", "beta": 3}, ValueError, r"beta must be in \[0, 1\]"),
        (distillation_loss, {"labels": Y, "soft": "dkd", "beta": "x"}, TypeError, "beta must be a float"),
        (distillation_loss, {"labels": Y, "soft": "nkd", "gamma": None}, TypeError, "gamma must be a float, got None"),
        (dkd, {"labels": [0, 1, 2, 3]}, TypeError, "labels must be an integer tensor"),
        (dkd, {"labels": Y.float()}, TypeError, "labels must be an integer tensor, got a torch.float32 tensor"),
        (nkd, {"labels": Y > 1}, TypeError, "labels must be an integer tensor, got a torch.bool tensor"),
        (dkd, {"labels": Y[:3]}, ValueError, r"labels must have the shape of the rows \(4,\), got \(3,\)"),
        (dkd, {"labels": Y.to("meta")}, ValueError, "labels must be on the student's device"),
        (jsd, {"valid_classes": 6}, ValueError, "valid_classes must be inside the student's 5 classes"),
        (jsd, {"valid_classes": 0}, ValueError, "valid_classes must be inside the student's 5 classes"),
        (jsd, {"valid_classes": (3, 2)}, ValueError, r"valid_classes must be inside.*got \(3, 2\)"),
        (jsd, {"valid_classes": (-1, 2)}, ValueError, "valid_classes must be inside the student's 5 classes"),
        (jsd, {"valid_classes": 2.0}, TypeError, "valid_classes must be None, a number of classes or"),
        (jsd, {"valid_classes": (1, 2, 3)}, TypeError, "valid_classes must be None, a number of classes or"),
        (jsd, {"teacher_valid_classes": (1, 9)}, ValueError, "must be inside the teacher's 5 classes"),
        (jsd, {"valid_classes": 4, "teacher_valid_classes": 3}, ValueError, "must be equally long"),
        (jsd, {"teacher": torch.zeros(4, 3), "valid_classes": 4}, ValueError, "must lie in the teacher's 3 classes"),
        (jsd, {"teacher": torch.zeros(3, 5), "valid_classes": 4}, ValueError, "teacher must have the student's"),
        (jsd, {"teacher": None, "valid_classes": 4}, TypeError, "teacher must be a tensor"),
        (kd_statistics, {"valid_classes": 6}, ValueError, "valid_classes must be inside the student's 5 classes"),
    ],
    ids=lambda x: x if isinstance(x, str) else getattr(x, "__name__", None),
)  # fmt: skip
def test_bad_input_says_what_is_wrong(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(**{"student": X, "teacher": X, **arguments})


@pytest.mark.parametrize("function", [dkd, nkd, distillation_loss], ids=lambda x: x.__name__)
def test_labels_out_of_range(backend, function):
    if device_of(backend) != "cpu":
        student, teacher = (x.to(device_of(backend)) for x in (X, X))
        for wrong in (-1, 5):
            labels = Y.masked_fill(Y == 2, wrong).to(student.device)
            rows = function(student, teacher, labels, reduction="none", backend=backend)
            assert torch.isnan(rows[2]) and torch.isfinite(rows[[0, 1, 3]]).all()
        return
    for wrong in (-1, 5, 2**31, -(2**40)):
        labels = Y.masked_fill(Y == 2, wrong)
        with pytest.raises(ValueError, match="label"):
            function(X, X, labels, backend=backend)
        # They are no labels of rows that do not count.
        function(X, X, labels, ignore_index=wrong, backend=backend)
        function(X, X, labels, mask=Y != 2, backend=backend)
    with pytest.raises(ValueError, match="label"):  # in the student's numbering, within its range
        function(X, X, Y, valid_classes=(1, 5), backend=backend)
    function(X, X, Y + 1, valid_classes=(1, 5), backend=backend)
