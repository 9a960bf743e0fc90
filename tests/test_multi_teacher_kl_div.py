"""multi_teacher_kl_div in every backend, against its reference in float64."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from conftest import device_of
from testing import (
    EPS32,
    REGIMES,
    assert_near,
    assert_not_vacuous,
    assert_same_bits_whatever_the_threads,
    assert_shifts_do_not_show,
    logits,
)
from torch import Tensor

import kdkernels
from kdkernels import MultiTeacherKLDivLoss, kl_div, multi_teacher_kl_div, multi_teacher_kl_div_reference
from kdkernels.ops.calls import COMMON

NAMES = ("student", "teachers", "weights", "temperatures", "row_weights")


def values(regime: str, shape: tuple[int, ...], dtype: torch.dtype, teachers: int = 3) -> dict:
    """A student, and as `teachers` one tensor (K, ...)."""
    student = logits(regime, shape, dtype)[0]
    if regime == "near":  # one student near them all
        teacher = logits("plain", shape, dtype)[1]
        noise = [logits("plain", shape, torch.float64, seed=k)[0] for k in range(teachers + 1)]
        student, *rest = ((teacher.double() * (1 + 3e-4 * x)).to(dtype) for x in noise)
        return {"student": student, "teachers": torch.stack(rest)}
    return {
        "student": student,
        "teachers": torch.stack([logits(regime, shape, dtype, k)[1] for k in range(teachers)]),
    }


def leaves(arguments: dict, dtype: torch.dtype | None = None) -> dict:
    """Copies that require grad where they can, in `dtype` if given."""
    out = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            value = value.detach().to(value.dtype if dtype is None else dtype).clone().requires_grad_()
        out[name] = value
    return out


def to(arguments: dict, device: str) -> dict:
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in arguments.items()}


def run(function, arguments: dict, upstream: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = function(**arguments)
    names = [name for name in NAMES if isinstance(arguments.get(name), Tensor)]
    gradients = torch.autograd.grad(loss, [arguments[name] for name in names], upstream.to(loss))
    return loss.detach(), dict(zip(names, gradients))


def compare(backend: str, arguments: dict, *, vacuous: bool = False) -> None:
    """Loss and all gradients of `backend` against the truth, under a random upstream gradient."""
    student, teachers = arguments["student"], arguments["teachers"]
    rows, count = student.shape[:-1], len(teachers)
    reduction = arguments.get("reduction", "batchmean")
    upstream = 0.5 + torch.rand(
        rows if reduction == "none" else (), generator=torch.Generator().manual_seed(0)
    )
    truth, true_gradients = run(multi_teacher_kl_div_reference, leaves(arguments, torch.float64), upstream)
    reference, reference_gradients = run(multi_teacher_kl_div_reference, leaves(arguments), upstream)
    device = device_of(backend)
    got, gradients = run(
        lambda **a: multi_teacher_kl_div(**a, backend=backend),
        leaves(to(arguments, device)),
        upstream.to(device),
    )

    def extreme(name: str, largest: bool) -> float:
        x = arguments.get(name)
        if x is None:
            return 1.0
        x = torch.as_tensor(x, dtype=torch.float64).abs()
        return (x.max() if largest else x.min()).item()

    finite = torch.cat([student.double().flatten(), teachers.double().flatten()])
    finite = finite[torch.isfinite(finite)].abs()
    temperature = extreme("temperatures", False)
    logit = max(1.0, (finite.max().item() if len(finite) else 0.0) / temperature)
    weight, row_weight = extreme("weights", True), extreme("row_weights", True)
    mask = arguments.get("mask")
    counting = mask.sum().item() if isinstance(mask, Tensor) else math.prod(rows)
    each = row_weight * (1 / max(counting, 1) if reduction == "batchmean" else 1)
    together = math.prod(rows)
    of_loss = logit * weight * row_weight * count * (together if reduction == "sum" else 1)
    magnitudes = {
        "student": each * weight * count * logit / temperature,
        "teachers": each * weight * logit * logit / temperature,
        "temperatures": each * weight * logit * logit / temperature * together,
        "weights": each * logit * together,
        "row_weights": each / row_weight * weight * count * logit,
    }
    assert_near(got.cpu(), truth, reference, of_loss, "loss")
    for name, expected in true_gradients.items():
        of_reference = reference_gradients[name]
        assert_near(gradients[name].cpu(), expected, of_reference, magnitudes[name], name)
        if not vacuous:
            assert_not_vacuous(expected, of_reference, magnitudes[name])
    if not vacuous:
        assert_not_vacuous(truth, reference, of_loss)


@pytest.mark.parametrize("rows", [6, 130], ids=["few rows", "many rows"])
@pytest.mark.parametrize("regime", REGIMES)
def test_loss_and_gradients(backend_dtype, regime, rows):
    backend, dtype = backend_dtype
    if rows > 6 and backend != "cpu":
        pytest.skip("nothing there depends on the number of rows")
    temperature = {"warm": 4.0, "near": 2.0}.get(regime, 1.0)
    arguments = {**values(regime, (rows, 100), dtype), "temperatures": temperature}
    # Near convergence a half's output rounding, and far a one-hot side, are all there is to see.
    compare(backend, arguments, vacuous=regime in ("near", "far"))


@pytest.mark.parametrize("shape", [(3, 60), (3, 600), (130, 600), (2, 9000)], ids=str)
def test_sides_far_from_each_other(shape, backend):
    if backend != "cpu" and shape[0] > 3:
        pytest.skip("nothing there depends on the number of rows")
    student, teacher = (x.to(device_of(backend)) for x in logits("plain", shape, torch.float32))

    def two(student, teacher):
        return multi_teacher_kl_div(student, [teacher, teacher + student.detach() / 2], backend=backend)

    assert_shifts_do_not_show(two, {"student": student, "teacher": teacher})


@pytest.mark.parametrize("classes", [1, 2, 3, 7, 8, 9, 31, 32, 33, 127, 128, 255, 256, 257, 1000, 1025, 4099])
def test_every_number_of_classes(backend, classes):
    for rows in (3, 70) if backend == "cpu" else (3,):
        arguments = {**values("plain", (rows, classes), torch.float32, 2), "temperatures": 2.0}
        compare(backend, arguments, vacuous=classes == 1)


@pytest.mark.parametrize("teachers", [1, 2, 5, 16])
def test_every_number_of_teachers(backend, teachers):
    compare(backend, {**values("plain", (5, 70), torch.float32, teachers), "temperatures": 3.0})


@pytest.mark.parametrize("rows", [2, 66])
@pytest.mark.parametrize("classes", [100, 20_000])
def test_last_class_counts(backend, classes, rows):
    if rows > 2 and backend != "cpu":
        pytest.skip("nothing there depends on the number of rows")
    student, teachers = torch.zeros(rows, classes), torch.zeros(2, rows, classes)
    teachers[1, :, -1] = 12.0
    compare(backend, {"student": student, "teachers": teachers, "reduction": "none"})


@pytest.mark.parametrize("height", [3.0, 12.0, 40.0, 200.0])
@pytest.mark.parametrize("rows", [5, 65])
def test_mass_may_lie_anywhere_in_a_long_row(backend, height, rows):
    """Peaks of either side in the first, a middle and the last block: guesses made early must not show."""
    if rows > 5 and backend != "cpu":
        pytest.skip("nothing there depends on the number of rows")
    places = [(3, 900), (900, 3), (900, 900), (3, 3), (500, 999)] * (rows // 5)
    arguments = values("plain", (rows, 1000), torch.float32, 2)
    for row, (of_student, of_teacher) in enumerate(places):
        arguments["student"][row, of_student] += height
        arguments["teachers"][1, row, of_teacher] += height
    compare(backend, {**arguments, "reduction": "none"}, vacuous=True)
    arguments["teachers"][0, :, 600:] += height  # and all of a side moves
    compare(backend, {**arguments, "temperatures": 2.0}, vacuous=True)
    arguments["student"][:, 600:] += height
    compare(backend, arguments, vacuous=True)


def over_rows(kind: str, rows: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    shape = {"one each": (3,), "each row": (3, *rows), "rows alike": (3, *(1,) * len(rows))}[kind]
    return 0.5 + 2 * torch.rand(shape, generator=generator, dtype=dtype)


@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean"])
@pytest.mark.parametrize("kind", ["one each", "each row", "rows alike"])
def test_row_arguments_and_reductions(backend_dtype, reduction, kind):
    backend, dtype = backend_dtype
    generator = torch.Generator().manual_seed(3)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    mask = torch.tensor([[True, False, True, True], [False, True, True, False]])
    teacher_mask = torch.rand(3, 2, 4, generator=generator) > 0.4
    teacher_mask[:, 0, 0] = False  # a row that every teacher is left out of
    compare(
        backend,
        {
            **values("plain", (2, 4, 50), dtype),
            "weights": over_rows(kind, (2, 4), statistics, generator) - 1,
            "temperatures": over_rows(kind, (2, 4), statistics, generator),
            "mask": mask,
            "teacher_mask": teacher_mask,
            "row_weights": torch.rand(2, 4, generator=generator, dtype=statistics) - 0.3,
            "reduction": reduction,
        },
    )


def test_lists_of_floats_and_one_teacher_mask_each(backend_dtype):
    backend, dtype = backend_dtype
    for options in (
        {"weights": [0.5, -2.0, 1.0], "temperatures": [1.0, 4.0, 2.5]},
        {"teacher_mask": torch.tensor([True, False, True])},
        {"weights": (0.5, 2.0, 1.0), "mask": torch.tensor([True, True, False, True])},
    ):
        compare(backend, {**values("plain", (4, 60), dtype), **options})


def test_a_list_and_a_tensor_of_teachers_are_one(backend):
    arguments = to(values("plain", (4, 60), torch.float32), device_of(backend))
    student = arguments["student"].requires_grad_()
    losses = [
        multi_teacher_kl_div(student, teachers, backend=backend)
        for teachers in (arguments["teachers"], list(arguments["teachers"]), tuple(arguments["teachers"]))
    ]
    gradients = [torch.autograd.grad(loss, student)[0] for loss in losses]
    assert all(torch.equal(x, losses[0]) for x in losses)
    assert all(torch.equal(x, gradients[0]) for x in gradients)


def test_many_temperatures_over_many_rows(backend):
    rows = 70 if backend == "cpu" else 5
    temperatures = 1 + torch.rand(3, rows, generator=torch.Generator().manual_seed(0))
    compare(backend, {**values("plain", (rows, 300), torch.float32), "temperatures": temperatures})


def test_one_learnable_temperature_for_all(backend):
    arguments = values("plain", (4, 60), torch.float32)
    compare(backend, {**arguments, "temperatures": torch.tensor(2.5)})


def test_one_teacher_is_kl_div(backend_dtype):
    backend, dtype = backend_dtype
    device = device_of(backend)
    for rows in (5, 130):
        student, teacher = (x.to(device).requires_grad_() for x in logits("plain", (rows, 90), dtype))
        expected = kl_div(student, teacher, temperature=2.0, backend=backend)
        loss = multi_teacher_kl_div(student, [teacher], temperatures=2.0, backend=backend)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
        pairs = zip(*(torch.autograd.grad(x, (student, teacher)) for x in (loss, expected)))
        for got, true in pairs:
            torch.testing.assert_close(got, true, rtol=4 * torch.finfo(dtype).eps, atol=1e-7)


def test_linear_in_the_weights(backend):
    arguments = to(values("plain", (6, 80), torch.float32), device_of(backend))
    each = [kl_div(arguments["student"], teacher, backend=backend) for teacher in arguments["teachers"]]
    weights = [0.3, -1.5, 2.0]
    expected = sum(weight * one for weight, one in zip(weights, each))
    torch.testing.assert_close(multi_teacher_kl_div(**arguments, weights=weights, backend=backend), expected)
    doubled = multi_teacher_kl_div(**arguments, weights=[2 * x for x in weights], backend=backend)
    torch.testing.assert_close(doubled, 2 * expected)


def test_closed_form(backend):
    device = device_of(backend)
    student = torch.zeros(1, 2, device=device)  # q = 1/2, 1/2
    sharp = torch.tensor([[0.0, math.log(3.0)]], device=device)  # p = 1/4, 3/4
    one = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    loss = multi_teacher_kl_div(
        student, [sharp, student, 2 * sharp], weights=[2.0, 5.0, 3.0], temperatures=[1, 1, 2], backend=backend
    )
    assert loss.item() == pytest.approx(5 * one, rel=1e-6)


@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean"])
def test_terms(backend, reduction):
    device = device_of(backend)
    generator = torch.Generator().manual_seed(1)
    arguments = values("plain", (2, 5, 40), torch.float32)
    arguments |= {
        "mask": torch.rand(2, 5, generator=generator) > 0.3,
        "teacher_mask": torch.rand(3, 2, 5, generator=generator) > 0.3,
        "row_weights": torch.rand(2, 5, generator=generator),
        "temperatures": 2.0,
        "reduction": reduction,
    }
    weights = torch.tensor([0.5, 2.0, -1.0])
    arguments = leaves(to({**arguments, "weights": weights}, device))
    plain = multi_teacher_kl_div(**arguments, backend=backend)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            loss, terms = multi_teacher_kl_div(**arguments, return_terms=True, backend=backend)
        assert loss.requires_grad == grad and not terms.requires_grad
        assert terms.shape == ((3, 2, 5) if reduction == "none" else (3,))
        torch.testing.assert_close(loss, plain)
        shape = (3, 1, 1) if reduction == "none" else (3,)
        torch.testing.assert_close((arguments["weights"].view(shape) * terms).sum(0), plain)
    expected = multi_teacher_kl_div_reference(**arguments, return_terms=True)[1]
    torch.testing.assert_close(terms, expected, rtol=1e-5, atol=1e-6)
    loss, _ = multi_teacher_kl_div(**arguments, return_terms=True, backend=backend)
    sources = (arguments["student"], arguments["weights"])
    for a, b in zip(*(torch.autograd.grad(x.sum(), sources) for x in (loss, plain))):
        torch.testing.assert_close(a, b)


def test_masked_rows_and_dropped_teachers_may_hold_anything(backend_dtype):
    backend, dtype = backend_dtype
    device = device_of(backend)
    arguments = values("plain", (4, 70), dtype)
    mask = torch.tensor([True, False, True, False])
    teacher_mask = torch.tensor([[True] * 4, [False] * 4, [True, True, False, True]])
    weights, temperatures = torch.rand(3, 4) + 0.5, torch.rand(3, 4) + 1
    clean = {**arguments, "weights": weights, "temperatures": temperatures}
    clean = leaves(to({**clean, "mask": mask, "teacher_mask": teacher_mask}, device))
    dirty = {name: x.detach().clone() for name, x in clean.items()}
    dirty["student"][1], dirty["student"][3] = math.nan, -math.inf
    dirty["teachers"][:, ~mask] = math.nan
    dirty["teachers"][~teacher_mask.to(device)] = math.nan
    dirty["weights"][:, ~mask] = math.inf
    dirty["weights"][~teacher_mask.to(device)] = math.nan
    dirty["row_weights"] = torch.tensor([1.0, math.nan, 1.0, math.inf], device=device)
    dirty = leaves(dirty)
    losses = [multi_teacher_kl_div(**x, backend=backend) for x in (clean, dirty)]
    torch.testing.assert_close(*losses)
    names = ("student", "teachers", "weights", "temperatures")
    gradients = [
        torch.autograd.grad(loss, [x[name] for name in names], retain_graph=True)
        for loss, x in zip(losses, (clean, dirty))
    ]
    for name, true, got in zip(names, *gradients):
        torch.testing.assert_close(got, true)
        assert true.abs().sum() > 0
        rows = got if name == "student" else got.transpose(0, 1)
        assert (rows[~mask.to(device)] == 0).all()
        assert name == "student" or (got[~teacher_mask.to(device)] == 0).all()
    [of_rows] = torch.autograd.grad(losses[1], dirty["row_weights"])
    assert torch.isfinite(of_rows).all() and (of_rows[~mask.to(device)] == 0).all()


def test_a_row_without_teachers_counts(backend):
    device = device_of(backend)
    arguments = to(values("plain", (4, 30), torch.float32), device)
    teacher_mask = torch.ones(3, 4, dtype=torch.bool, device=device)
    teacher_mask[:, 1] = False
    rows = multi_teacher_kl_div(**arguments, reduction="none", backend=backend)
    dropped = multi_teacher_kl_div(**arguments, teacher_mask=teacher_mask, reduction="none", backend=backend)
    assert dropped[1] == 0
    torch.testing.assert_close(dropped[[0, 2, 3]], rows[[0, 2, 3]])
    torch.testing.assert_close(
        multi_teacher_kl_div(**arguments, teacher_mask=teacher_mask, backend=backend), dropped.sum() / 4
    )
    mask = torch.tensor([True, True, False, True], device=device)
    torch.testing.assert_close(
        multi_teacher_kl_div(**arguments, mask=mask, teacher_mask=teacher_mask, backend=backend),
        dropped[mask].sum() / 3,
    )
    nobody = torch.zeros(3, dtype=torch.bool, device=device)
    leaf = arguments["student"].requires_grad_()
    loss = multi_teacher_kl_div(leaf, arguments["teachers"], teacher_mask=nobody, backend=backend)
    assert loss == 0 and (torch.autograd.grad(loss, leaf)[0] == 0).all()


def test_nothing_counts(backend):
    arguments = leaves(to(values("plain", (3, 40), torch.float32), device_of(backend)))
    mask = torch.zeros(3, dtype=torch.bool, device=device_of(backend))
    for reduction in kdkernels.ops.rows.REDUCTIONS:
        loss = multi_teacher_kl_div(**arguments, mask=mask, reduction=reduction, backend=backend)
        assert (loss == 0).all() and loss.requires_grad
        for x in torch.autograd.grad(loss.sum(), (arguments["student"], arguments["teachers"])):
            assert (x == 0).all()


def test_empty_batch(backend):
    device = device_of(backend)
    student = torch.zeros(0, 5, 7, device=device, requires_grad=True)
    teachers = torch.zeros(2, 0, 5, 7, device=device, requires_grad=True)
    weights = torch.ones(2, device=device, requires_grad=True)
    for reduction, shape in (("none", (0, 5)), ("sum", ()), ("batchmean", ())):
        loss, terms = multi_teacher_kl_div(
            student, teachers, weights=weights, reduction=reduction, return_terms=True, backend=backend
        )
        assert loss.shape == shape and (loss == 0).all() and terms.shape == (2, *shape)
        sources = (student, teachers, weights)
        for x, leaf in zip(torch.autograd.grad(loss.sum(), sources), sources):
            assert x.shape == leaf.shape and (x == 0).all()


def test_no_row_dimension(backend):
    for options in ({}, {"reduction": "none"}, {"weights": torch.tensor([1.0, 2.0, 0.5])}):
        compare(backend, {**values("plain", (33,), torch.float32), **options})


@pytest.mark.parametrize("layout", ["columns", "row stride", "transposed", "expanded", "offset"])
def test_layouts(backend_dtype, layout):
    backend, dtype = backend_dtype
    device = device_of(backend)
    big_student, big_teacher = (x.to(device).requires_grad_() for x in logits("plain", (8, 6, 99), dtype))
    view = {
        "columns": lambda x: x[:, 0, 3:90],
        "row stride": lambda x: x[::2, 1],
        "transposed": lambda x: x[0].T,
        "expanded": lambda x: x[:1, 0].expand(5, 99),
        "offset": lambda x: x.flatten()[1 : 1 + 4 * 99].view(4, 99),
    }[layout]
    student, teacher = view(big_student), view(big_teacher)
    other = teacher.detach().contiguous().flip(0)  # a second one, of another stride
    strided = multi_teacher_kl_div(student, [teacher, other], temperatures=2.0, backend=backend)
    dense = multi_teacher_kl_div(
        student.contiguous(), [teacher.contiguous(), other], temperatures=2.0, backend=backend
    )
    # Another alignment may take another loop, which adds in another order.
    torch.testing.assert_close(strided, dense, rtol=4 * EPS32, atol=0)
    for a, b in zip(*(torch.autograd.grad(x, (big_student, big_teacher)) for x in (strided, dense))):
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_minus_infinity_is_a_class_without_mass(backend_dtype):
    backend, dtype = backend_dtype
    for rows, classes in ((4, 40), (4, 700), (130, 40)):
        if rows > 4 and backend != "cpu":
            continue
        arguments = values("plain", (rows, classes), dtype)
        arguments["teachers"][0, 0, :5] = -math.inf  # q counts there: p = 0 < q
        arguments["student"][1, 7] = -math.inf  # none has mass
        arguments["teachers"][:, 1, 7] = -math.inf
        arguments["teachers"][1, 2, 1:] = -math.inf  # one class left
        arguments["teachers"][2, 3, : classes // 2] = -math.inf
        compare(backend, {**arguments, "temperatures": 1.5})


def test_p_without_q_is_infinite(backend_dtype):
    backend, dtype = backend_dtype
    for rows in (3, 130) if backend == "cpu" else (3,):
        student, teachers = values("plain", (rows, 50), dtype).values()
        student[1, 4] = -math.inf
        teachers[1, 1, 4] = -math.inf
        student, teachers = student.to(device_of(backend)).requires_grad_(), teachers.to(device_of(backend))
        loss = multi_teacher_kl_div(student, teachers, reduction="none", backend=backend)
        others = torch.arange(rows) != 1
        assert loss[1] == math.inf and torch.isfinite(loss[others]).all()
        [gradient] = torch.autograd.grad(loss.sum(), student)
        p, q = torch.softmax(teachers.double(), -1), torch.softmax(student.detach().double(), -1)
        eps = max(torch.finfo(dtype).eps, EPS32)
        torch.testing.assert_close(gradient.double(), (q - p).sum(0), rtol=eps, atol=24 * eps)


def test_nan_in_a_row_that_counts_shows(backend_dtype):
    backend, dtype = backend_dtype
    for rows in (3, 130) if backend == "cpu" else (3,):
        for side in ("student", "teachers"):
            for bad in (math.nan, math.inf):
                arguments = to(values("plain", (rows, 300), dtype, 2), device_of(backend))
                arguments[side][..., 1, 280] = bad
                loss = multi_teacher_kl_div(**arguments, reduction="none", backend=backend)
                others = torch.arange(rows) != 1
                assert torch.isnan(loss[1]) and torch.isfinite(loss[others]).all(), (side, bad)


@pytest.mark.parametrize("rows", [2, 64])
def test_near_convergence_is_exact(backend, rows):
    if backend == "reference":
        pytest.skip("the reference differences log-softmaxes; in float64 it is the truth of this test")
    if rows > 2 and backend != "cpu":
        pytest.skip("nothing there depends on the number of rows")
    device, classes = device_of(backend), 32_000
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(rows, classes, generator=generator)
    student, *teachers = (teacher + 1e-3 * torch.randn(rows, classes, generator=generator) for _ in range(3))
    arguments = {"student": student, "teachers": torch.stack(teachers)}
    one = torch.tensor(1.0)
    options = {"temperatures": 2.0, "weights": [1.0, 0.5]}
    truth, true_gradients = run(
        lambda **a: multi_teacher_kl_div_reference(**a, **options), leaves(arguments, torch.float64), one
    )
    # What the usual form makes of it, so that these data are known to be hard.
    log_q = torch.log_softmax(student / 2, -1)
    usual = torch.zeros(())
    for weight, x in zip(options["weights"], teachers):
        log_p = torch.log_softmax(x / 2, -1)
        usual = usual + weight * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert abs(usual / truth - 1) > 0.02
    loss, gradients = run(
        lambda **a: multi_teacher_kl_div(**a, **options, backend=backend),
        leaves(to(arguments, device)),
        one.to(device),
    )
    bound = 1e-6 if backend == "cpu" else 1e-4
    assert abs(loss.item() / truth.item() - 1) < bound
    for name, true_gradient in true_gradients.items():
        difference = gradients[name].cpu().double() - true_gradient
        assert difference.norm() / true_gradient.norm() < bound, name
        assert difference.abs().max() / true_gradient.abs().max() < bound, name


def test_equal_logits_give_exactly_zero(backend_dtype):
    backend, dtype = backend_dtype
    for rows in (4, 130) if backend == "cpu" else (4,):
        student = logits("plain", (rows, 333), dtype)[0].to(device_of(backend)).requires_grad_()
        teachers = [student.detach().clone()] * 2
        loss = multi_teacher_kl_div(student, teachers, temperatures=3.0, backend=backend)
        assert loss == 0
        assert (torch.autograd.grad(loss, student)[0] == 0).all()


def test_backward_twice_and_no_shared_buffer(backend):
    arguments = leaves(to(values("plain", (4, 90), torch.float32), device_of(backend)))
    sources = (arguments["student"], arguments["teachers"])
    for reduction in ("batchmean", "none"):
        loss = multi_teacher_kl_div(**arguments, reduction=reduction, backend=backend)
        upstream = torch.rand(loss.shape, generator=torch.Generator().manual_seed(0)).to(loss) + 0.5
        first = torch.autograd.grad(loss, sources, upstream, retain_graph=True)
        kept = [gradient.clone() for gradient in first]
        second = torch.autograd.grad(loss, sources, 2 * upstream, retain_graph=True)
        third = torch.autograd.grad(loss, sources, upstream)
        for a, copy, b, c in zip(first, kept, second, third):
            assert torch.equal(a, copy), "a later backward wrote into a gradient that was handed out"
            assert len({a.data_ptr(), b.data_ptr(), c.data_ptr()}) == 3
            torch.testing.assert_close(b, 2 * a)
            torch.testing.assert_close(c, a)


@pytest.mark.parametrize(
    "wanted",
    [*((name,) for name in NAMES), ("student", "weights"), ("student", "temperatures")],
    ids="+".join,
)
def test_gradients_only_where_required(backend, wanted):
    arguments = {
        **values("plain", (4, 40), torch.float32),
        "weights": torch.rand(3) + 0.5,
        "temperatures": torch.rand(3, 4) + 1,
        "row_weights": torch.rand(4) + 0.5,
    }
    arguments = to(arguments, device_of(backend))
    every, some = leaves(arguments), leaves(arguments)
    multi_teacher_kl_div(**every, backend=backend).backward()
    for name in NAMES:
        some[name].requires_grad_(name in wanted)
    multi_teacher_kl_div(**some, backend=backend).backward()
    for name in NAMES:
        assert (some[name].grad is not None) == (name in wanted)
        if name in wanted:
            torch.testing.assert_close(some[name].grad, every[name].grad)


def test_gradients_of_some_of_the_teachers(backend):
    student, teachers = to(values("plain", (4, 40), torch.float32), device_of(backend)).values()
    teachers = [x.clone().requires_grad_(k != 1) for k, x in enumerate(teachers)]
    loss = multi_teacher_kl_div(student, teachers, weights=[1.0, 2.0, 3.0], backend=backend)
    loss.backward()
    assert teachers[1].grad is None
    for k, weight in ((0, 1.0), (2, 3.0)):
        leaf = teachers[k].detach().requires_grad_()
        (weight * kl_div(student, leaf, backend=backend)).backward()
        torch.testing.assert_close(teachers[k].grad, leaf.grad)


def test_no_gradient_work_where_none_is_wanted(monkeypatch):
    if kdkernels.available_backends("cpu")["cpu"] != "available":
        pytest.skip("needs the native module")
    asked = []
    monkeypatch.delitem(COMMON, "multi_teacher_kl_div", raising=False)
    original = kdkernels.backend._LAUNCHERS["cpu", "multi_teacher_kl_div"]
    monkeypatch.setitem(
        kdkernels.backend._LAUNCHERS,
        ("cpu", "multi_teacher_kl_div"),
        lambda *a: (asked.append([x is not None for x in a[9:]]), original(*a)),
    )
    student, teachers = values("plain", (4, 40), torch.float32).values()
    multi_teacher_kl_div(student, teachers, backend="cpu")
    student.requires_grad_()
    with torch.no_grad():
        multi_teacher_kl_div(student, teachers, backend="cpu")
    multi_teacher_kl_div(student, teachers, backend="cpu").backward()
    assert asked == [[False, False], [False, False], [False, True]]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck(backend):
    torch.manual_seed(0)
    inputs = (
        torch.randn(2, 3),
        torch.randn(2, 2, 3),
        torch.rand(2) + 0.5,
        torch.rand(2, 2) + 1,
        torch.rand(2) + 0.5,
    )
    inputs = tuple(x.double().requires_grad_() for x in inputs)
    teacher_mask = torch.tensor([[True, True], [False, True]])
    for reduction, mask in (("none", None), ("batchmean", torch.tensor([True, False]))):

        def call(*tensors, reduction=reduction, mask=mask):
            return multi_teacher_kl_div(
                **dict(zip(NAMES, tensors)),
                mask=mask,
                teacher_mask=teacher_mask,
                reduction=reduction,
                backend=backend,
            )

        assert torch.autograd.gradcheck(call, inputs)
        assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def test_double_backward(backend):
    """∇(‖∂loss/∂student‖²) in float32 against float64."""
    arguments = values("plain", (3, 20), torch.float32)

    def penalty(dtype: torch.dtype, device: str, name: str) -> tuple[Tensor, ...]:
        s, t = (x.to(device, dtype).requires_grad_() for x in arguments.values())
        # An upstream gradient that must not be lost.
        loss = 3 * multi_teacher_kl_div(s, t, weights=[1.0, 2.0, 0.5], temperatures=2.0, backend=name)
        [first] = torch.autograd.grad(loss, s, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (s, t))

    truth = penalty(torch.float64, "cpu", "reference")
    for a, b in zip(penalty(torch.float32, device_of(backend), backend), truth):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-4, atol=1e-7)


def test_deterministic(backend):
    arguments = leaves(to(values("plain", (7, 5000), torch.float32), device_of(backend)))
    runs = []
    for _ in range(2):
        loss = multi_teacher_kl_div(**arguments, backend=backend)
        runs.append([loss.detach(), *torch.autograd.grad(loss, tuple(arguments.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [37, 131])
def test_threads_do_not_change_a_bit(dtype, rows):
    arguments = values("plain", (rows, 1500), dtype)
    arguments["student"].requires_grad_()

    def run():
        loss = multi_teacher_kl_div(**arguments, backend="cpu")
        return loss.detach(), *torch.autograd.grad(loss, arguments["student"])

    assert_same_bits_whatever_the_threads(run)


def test_peak_memory_is_one_gradient():
    """Peak resident memory of a forward + backward above its inputs, in a process of its own."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    script = """
import re, sys, torch, kdkernels
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
dtype = getattr(torch, sys.argv[1])
def step(s, t): kdkernels.multi_teacher_kl_div(s, t, temperatures=4.0, backend="cpu").backward()
small = torch.randn(4, 8, dtype=dtype)
step(small.clone().requires_grad_(), [small, small])  # imports and thread stacks
torch.set_num_threads(2)
s, t = torch.randn(256, 32000).to(dtype).requires_grad_(), torch.randn(2, 256, 32000).to(dtype)
open("/proc/self/clear_refs", "w").write("5")  # the peak starts over
before = peak()
step(s, t)
print((peak() - before) / (s.numel() * s.element_size()))
"""
    for dtype in ("float32", "bfloat16"):
        done = subprocess.run(
            [sys.executable, "-c", script, dtype], capture_output=True, text=True, check=True
        )
        assert 0.9 < float(done.stdout) < 1.15, done.stdout


def test_opcheck(backend):
    if backend == "reference":
        pytest.skip("plain PyTorch, no op")
    device = device_of(backend)
    student, teachers = to(values("plain", (3, 20), torch.float32, 2), device).values()
    each = torch.rand(2, 3, device=device) + 0.5
    mask = torch.tensor([True, False, True], device=device)
    teacher_mask = torch.tensor([True, False], device=device)[:, None].expand(2, 3)
    numbers = [1.0, 2.0]
    for rest in (
        (None, numbers, None, numbers, None, None, [False, True], backend),
        (each, numbers, each, numbers, teacher_mask, mask, [True, True], backend),
    ):
        ops = torch.ops.kdkernels
        for op in (ops.multi_teacher_kl_div_fwd, ops.multi_teacher_kl_div_bwd):
            torch.library.opcheck(op.default, (student, list(teachers), *rest))


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_compiles_into_one_graph(name, reduction):
    arguments = {
        **values("plain", (6, 50), torch.float32),
        "weights": torch.tensor([0.5, 1.0, 2.0]),
        "temperatures": torch.tensor([[2.0], [1.0], [3.0]]),
    }
    mask = torch.tensor([True, False, True, True, False, True])
    teacher_mask = torch.tensor([True, True, False])

    def call(student, teachers, weights, temperatures):
        loss, terms = multi_teacher_kl_div(
            student,
            list(teachers),
            weights=weights,
            temperatures=temperatures,
            mask=mask,
            teacher_mask=teacher_mask,
            reduction=reduction,
            return_terms=True,
            backend=name,
        )
        return loss.sum(), terms

    eager, compiled = leaves(arguments), leaves(arguments)
    expected, terms = call(**eager)
    expected.backward()
    torch._dynamo.reset()
    got, of_teachers = torch.compile(call, fullgraph=True, backend="aot_eager")(**compiled)
    torch.testing.assert_close((got, of_teachers), (expected, terms))
    got.backward()
    for key, value in eager.items():
        torch.testing.assert_close(compiled[key].grad, value.grad)
    with torch.no_grad():
        again = torch.compile(call, fullgraph=True, backend="aot_eager")(**compiled)
        torch.testing.assert_close(again[0], expected)


def test_module(backend):
    device = device_of(backend)
    student, teachers = to(values("plain", (4, 30), torch.float32), device).values()
    mask = torch.tensor([True, True, False, True], device=device)
    options = {"weights": [1.0, 0.5, 2.0], "temperatures": 3.0, "reduction": "sum"}
    module = MultiTeacherKLDivLoss(**options, backend=backend)
    expected = multi_teacher_kl_div(student, teachers, **options, mask=mask, backend=backend)
    assert torch.equal(module(student, teachers, mask=mask), expected)
    learned = MultiTeacherKLDivLoss(
        weights=torch.nn.Parameter(torch.ones(3, device=device)),
        temperatures=torch.nn.Parameter(torch.tensor(2.0, device=device)),
        backend=backend,
    )
    learned(student, list(teachers)).backward()
    assert len(list(learned.parameters())) == 2
    assert all((parameter.grad != 0).all() for parameter in learned.parameters())
    assert "temperatures" in repr(module)
    _, terms = MultiTeacherKLDivLoss(return_terms=True, backend=backend)(student, teachers)
    assert terms.shape == (3,)


X = torch.zeros(4, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"student": [1.0]}, TypeError, "student must be a tensor"),
        ({"student": torch.tensor(1.0)}, ValueError, "student must have shape"),
        ({"student": X.long(), "teachers": [X.long()]}, TypeError, "student must be float64"),
        ({"teachers": None}, TypeError, "teachers must be a sequence of tensors or one tensor, got None"),
        ({"teachers": []}, ValueError, "teachers must hold 1 to 16 teachers, got 0"),
        ({"teachers": [X] * 17}, ValueError, "teachers must hold 1 to 16 teachers, got 17"),
        ({"teachers": X}, ValueError, r"or one tensor \(K, \*that\), got one of shape \(4, 5\)"),
        ({"teachers": [X, 1.0]}, TypeError, r"teachers\[1\] must be a tensor of logits, got 1.0"),
        (
            {"teachers": [X, torch.zeros(4, 6)]},
            ValueError,
            r"teachers\[1\] must have the student's shape \(4, 5\), got \(4, 6\)",
        ),
        ({"teachers": torch.zeros(2, 4, 6)}, ValueError, r"teachers\[0\] must have the student's shape"),
        ({"teachers": [X, X.double()]}, TypeError, r"teachers\[1\] must have the student's dtype"),
        ({"teachers": [X, X.to("meta")]}, ValueError, r"teachers\[1\] must be on the student's device"),
        ({"weights": [1.0]}, ValueError, "weights must have one value for each of the 2 teachers, got 1"),
        ({"weights": 1.0}, TypeError, "weights must be None, a sequence of floats or a tensor, got 1.0"),
        ({"weights": "12"}, TypeError, "weights must be None, a sequence of floats or a tensor"),
        ({"weights": [1.0, "much"]}, TypeError, r"weights\[1\] must be a float, got 'much'"),
        (
            {"weights": [1.0, torch.tensor(1.0)]},
            TypeError,
            r"weights\[1\] must be a float, got a torch.float32 tensor: give all in one tensor",
        ),
        ({"weights": torch.ones(2).long()}, TypeError, "weights must be floats or a floating tensor"),
        (
            {"weights": torch.ones(4)},
            ValueError,
            r"weights must have shape \(2,\), or broadcast to \(teachers, \*rows\) = \(2, 4\) with as many "
            r"dimensions, got shape \(4,\)",
        ),
        ({"weights": torch.ones(())}, ValueError, r"weights must have shape \(2,\)"),
        ({"weights": torch.ones(2, 4, 1)}, ValueError, r"weights must have shape \(2,\)"),
        ({"weights": torch.ones(2, device="meta")}, ValueError, "weights must be on the student's device"),
        ({"temperatures": 0.0}, ValueError, "temperatures must be positive and finite, got 0.0"),
        ({"temperatures": "hot"}, TypeError, "temperatures must be a float or a tensor"),
        (
            {"temperatures": [1.0, -1.0]},
            ValueError,
            r"temperatures\[1\] must be positive and finite, got -1.0",
        ),
        ({"temperatures": [1.0]}, ValueError, "temperatures must have one value for each of the 2 teachers"),
        ({"temperatures": torch.zeros(2)}, ValueError, "temperatures must be positive and finite, got 0.0"),
        ({"temperatures": torch.ones(3)}, ValueError, r"temperatures must have shape \(2,\)"),
        (
            {"temperatures": torch.ones(2).long()},
            TypeError,
            "temperatures must be a float or a floating tensor",
        ),
        ({"mask": torch.ones(4)}, TypeError, "mask must be a bool tensor"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, "mask must broadcast"),
        ({"teacher_mask": torch.ones(2)}, TypeError, "teacher_mask must be a bool tensor"),
        ({"teacher_mask": [True, False]}, TypeError, "teacher_mask must be a bool tensor"),
        (
            {"teacher_mask": torch.ones(4, dtype=torch.bool)},
            ValueError,
            r"teacher_mask must have shape \(2,\)",
        ),
        ({"row_weights": torch.ones(5)}, ValueError, "row_weights must broadcast to the rows"),
        ({"row_weights": [1.0] * 4}, TypeError, "row_weights must be a floating tensor"),
        ({"reduction": "mean"}, ValueError, "reduction must be one of none, sum, batchmean, got 'mean'"),
        ({"backend": "tpu"}, ValueError, "backend must be None or one of"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_bad_input_says_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        multi_teacher_kl_div(**{"student": X, "teachers": [X, X], **arguments})
