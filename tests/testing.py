"""What the tests share: the tolerance rule, a loss of rows of logits against its truth, and each regime's data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from conftest import device_of
from torch import Tensor

EPS32 = torch.finfo(torch.float32).eps
# What a loss of rows of logits has gradients for.
NAMES = ("student", "teacher", "temperature", "teacher_temperature", "weights")


def assert_near(
    got: Tensor,
    truth: Tensor,
    reference: Tensor,
    magnitude: float,
    what: str,
    halves: Tensor | float = 0.0,
) -> None:
    """`got` against the float64 `truth`, without a hand-tuned number.

    Allowed is twice the error of the `reference` in the same dtype, one rounding of the output, and 8 eps of
    `magnitude`: how large the values are that the op's arithmetic goes through (eps of float32, or of float64
    where that is the dtype). `halves` is what roundings to half precision inside the op may add.
    """
    assert got.shape == truth.shape and got.dtype == reference.dtype, f"{what}: {got.shape}, {got.dtype}"
    finite = torch.isfinite(truth)
    assert torch.equal(torch.isnan(got), torch.isnan(truth)), f"{what}: NaN elsewhere"
    assert torch.equal(got.double()[~finite], truth[~finite]) or torch.isnan(truth).any(), (
        f"{what}: {got} {truth}"
    )
    information = torch.finfo(got.dtype)
    own = information.eps if got.dtype == torch.float64 else EPS32
    halves = halves[finite] if isinstance(halves, Tensor) else halves
    got, truth, reference = got.double()[finite], truth[finite], reference.double()[finite]
    rounding = information.eps * truth.abs() + information.smallest_normal * information.eps
    allowed = 2 * (reference - truth).abs().nan_to_num(0, 0, 0) + rounding + 8 * own * magnitude + halves
    worst = ((got - truth).abs() / allowed).max().item() if truth.numel() else 0.0
    assert worst <= 1, f"{what}: error {worst:.2f} of what is allowed"


def assert_not_vacuous(
    truth: Tensor, reference: Tensor, magnitude: float, halves: Tensor | float = 0.0
) -> None:
    """Zeros in place of `truth` would not pass `assert_near`."""
    try:
        assert_near(torch.zeros_like(reference), truth, reference, magnitude, "zeros", halves)
    except AssertionError:
        return
    raise AssertionError("these data would let a result of zero pass")


def leaves(arguments: dict, dtype: torch.dtype | None = None) -> dict:
    """Copies that require grad where they can, in `dtype` if given."""
    out = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            wanted = value.dtype if dtype is None else dtype
            value = value.detach().to(wanted).clone().requires_grad_()
        out[name] = value
    return out


def to(device: str, arguments: dict) -> dict:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}


def run(
    function: Callable[..., Tensor],
    arguments: dict,
    upstream: Tensor | None = None,
    dtype: torch.dtype | None = None,
    wanted: Sequence[str] = NAMES,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and its gradients by name where `wanted`, of arguments that are cast to `dtype` if given."""
    arguments = leaves(arguments, dtype)
    names = [name for name in wanted if isinstance(arguments.get(name), Tensor)]
    for name in set(arguments).difference(names):
        if isinstance(arguments[name], Tensor):
            arguments[name].requires_grad_(False)
    loss = function(**arguments)
    gradients = torch.autograd.grad(loss, [arguments[name] for name in names], upstream)
    return loss.detach(), dict(zip(names, gradients))


Found = tuple[Tensor, dict[str, Tensor]]  # a loss, and its gradients by name


def three(
    function: Callable[..., Tensor],
    backend: str,
    arguments: dict,
    *,
    seed: int = 0,
    wanted: Sequence[str] = NAMES,
    rows: tuple[int, ...] | None = None,
) -> tuple[Found, Found, Found, Tensor]:
    """The float64 reference, the reference in the arguments' dtypes, the backend; and their upstream gradient.

    `rows` is the shape of the rows' losses, where it is not the student's without its last dimension.
    """
    student = arguments["student"]
    rows = student.shape[:-1] if rows is None else rows
    shape = rows if arguments.get("reduction", "batchmean") == "none" else ()
    upstream = 0.5 + torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    upstream = upstream.float()  # a number that both dtypes hold
    statistics = torch.float64 if student.dtype == torch.float64 else torch.float32
    specification = partial(function, backend="reference")
    truth = run(specification, arguments, upstream.double(), torch.float64, wanted)
    reference = run(specification, arguments, upstream.to(statistics), None, wanted)
    device = device_of(backend)
    moved, there = to(device, arguments), upstream.to(statistics).to(device)
    loss, gradients = run(partial(function, backend=backend), moved, there, None, wanted)
    return truth, reference, (loss.cpu(), {k: x.cpu() for k, x in gradients.items()}), upstream.double()


def compare(
    function: Callable[..., Tensor],
    backend: str,
    arguments: dict,
    *,
    factor: float = 1.0,
    vacuous: bool = False,
    seed: int = 0,
    wanted: Sequence[str] = NAMES,
) -> None:
    """Loss and gradients of `backend` against the float64 reference, under a random upstream gradient.

    `factor` is what the loss has for factors: of its parts, and T² where it multiplies by that.
    """
    (truth, true_gradients), (reference, reference_gradients), (got, gradients), _ = three(
        function, backend, arguments, seed=seed, wanted=wanted
    )
    reduction, rows = arguments.get("reduction", "batchmean"), arguments["student"].shape[:-1]

    def smallest(name: str) -> float:
        t = arguments.get(name)
        t = arguments.get("temperature", 1.0) if t is None else t
        return t.min().item() if isinstance(t, Tensor) else float(t)

    finite = torch.cat([arguments["student"].double().flatten(), arguments["teacher"].double().flatten()])
    finite = finite[torch.isfinite(finite)]
    temperature = min(smallest("temperature"), smallest("teacher_temperature"))
    logit = max(1.0, finite.abs().max().item() / temperature)
    weight = arguments["weights"].abs().max().item() if isinstance(arguments.get("weights"), Tensor) else 1.0
    counts = torch.ones(rows, dtype=torch.bool)
    if isinstance(arguments.get("mask"), Tensor):
        counts = counts & arguments["mask"]
    if isinstance(arguments.get("labels"), Tensor):
        counts = counts & (arguments["labels"] != arguments.get("ignore_index", -100))
    each = factor * weight * (1 / max(counts.sum().item(), 1) if reduction == "batchmean" else 1)
    summed = math.prod(rows) if reduction == "sum" else 1
    magnitudes = {
        "loss": factor * logit * weight * summed,
        "student": each * logit / temperature,
        "teacher": each * logit * logit / temperature,
        "temperature": each * logit * logit / temperature * summed,
        "teacher_temperature": each * logit * logit / temperature * summed,
        "weights": each * logit,
    }
    assert_near(got, truth, reference, magnitudes["loss"], "loss")
    for name, true_gradient in true_gradients.items():
        assert_near(gradients[name], true_gradient, reference_gradients[name], magnitudes[name], name)
        if not vacuous:
            assert_not_vacuous(true_gradient, reference_gradients[name], magnitudes[name])
    if not vacuous:
        assert_not_vacuous(truth, reference, magnitudes["loss"])


def assert_same_bits_whatever_the_threads(run: Callable[[], Iterable[Tensor]]) -> None:
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(list(run()))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


REGIMES = ("plain", "warm", "near", "far", "ties", "uniform")


def assert_shifts_do_not_show(function: Callable[..., Tensor], arguments: dict) -> None:
    """All of the student's or the teacher's logits may lie high or low: a softmax does not know."""

    def moved(student: float, teacher: float) -> dict:
        # Sums with 512 are exact then, but the differences of those are not.
        grid = {name: arguments[name].mul(2**14).round().div(2**14) for name in ("student", "teacher")}
        return {**arguments, "student": grid["student"] + student, "teacher": grid["teacher"] + teacher}

    loss, gradients = run(function, moved(0, 0), wanted=("student",))
    far_loss, far_gradients = run(function, moved(512, -512), wanted=("student",))
    torch.testing.assert_close(far_loss, loss, rtol=2e-6, atol=0)
    off = (far_gradients["student"] - gradients["student"]).norm() / gradients["student"].norm()
    assert off < 3e-6


def logits(regime: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(student, teacher) of one regime; "warm" is plain data meant for a temperature of 4."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    teacher = 3 * normal()
    if regime == "near":
        # Held in the dtype first, so that the noise is the difference that the op really sees.
        student = teacher.to(dtype).double() * (1 + 1e-3 * normal())
    elif regime == "far":
        teacher, student = 1e3 * normal(), 1e3 * normal()
    elif regime == "ties":
        teacher = teacher.round()
        student = teacher.flip(-1)
    elif regime == "uniform":
        teacher, student = torch.zeros(shape, dtype=torch.float64), 3 * normal()
    else:
        student = 3 * normal()
    return student.to(dtype), teacher.to(dtype)
