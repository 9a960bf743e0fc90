"""topk_kl_div in every backend, against its reference in float64."""

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
    logits,
)
from torch import Tensor

import kdkernels
from kdkernels import TopKKLDivLoss, kl_div, topk_kl_div, topk_kl_div_reference
from kdkernels.ops.calls import COMMON

NAMES = ("student", "teacher_log_probs", "temperature", "weights")
TAILS = ("bucket", "renormalize", "drop")


def top(teacher: Tensor, k: int, temperature: float = 1.0) -> dict[str, Tensor]:
    """The teacher's top k in a shuffled order: nothing may depend on its being sorted."""
    values, indices = torch.log_softmax(teacher.double() / temperature, -1).topk(k)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(k))
    return {
        "teacher_log_probs": values[..., order].to(
            torch.float64 if teacher.dtype == torch.float64 else torch.float32
        ),
        "teacher_indices": indices[..., order],
    }


def values(
    regime: str, rows: tuple[int, ...], classes: int, k: int, dtype: torch.dtype, temperature: float = 1.0
) -> dict:
    student, teacher = logits(regime, (*rows, classes), dtype)
    return {"student": student, **top(teacher, k, temperature), "temperature": temperature}


def leaves(arguments: dict, dtype: torch.dtype | None = None) -> dict:
    """Copies that require grad where they can, in `dtype` if given."""
    out = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            value = value.detach().to(value.dtype if dtype is None else dtype).clone().requires_grad_()
        out[name] = value
    return out


def run(function, arguments: dict, upstream: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = function(**arguments)
    names = [name for name in NAMES if isinstance(arguments.get(name), Tensor)]
    gradients = torch.autograd.grad(loss, [arguments[name] for name in names], upstream.to(loss))
    return loss.detach(), dict(zip(names, gradients))


def compare(backend: str, arguments: dict, *, vacuous: bool = False, only: tuple[str, ...] = NAMES) -> None:
    """Loss and the gradients named in `only`, against the truth under a random upstream gradient."""
    student, reduction = arguments["student"], arguments.get("reduction", "batchmean")
    rows = student.shape[:-1]
    upstream = 0.5 + torch.rand(
        rows if reduction == "none" else (), generator=torch.Generator().manual_seed(0)
    )
    truth, true_gradients = run(topk_kl_div_reference, leaves(arguments, torch.float64), upstream)
    reference, reference_gradients = run(topk_kl_div_reference, leaves(arguments), upstream)
    device = device_of(backend)
    moved = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in arguments.items()}
    got, gradients = run(lambda **a: topk_kl_div(**a, backend=backend), leaves(moved), upstream.to(device))

    temperature = arguments.get("temperature", 1.0)
    temperature = temperature.min().item() if isinstance(temperature, Tensor) else temperature
    finite = [x[torch.isfinite(x)].double() for x in (student, arguments["teacher_log_probs"])]
    logit = max(1.0, *(x.abs().max().item() if x.numel() else 0.0 for x in finite)) / min(1.0, temperature)
    weight, mask = arguments.get("weights"), arguments.get("mask")
    weight = weight.abs().max().item() if isinstance(weight, Tensor) else 1.0
    count = mask.sum().item() if isinstance(mask, Tensor) else math.prod(rows)
    each = weight * (1 / max(count, 1) if reduction == "batchmean" else 1)
    together = math.prod(rows) if reduction == "sum" else 1
    magnitudes = {
        "student": each * logit / temperature,
        "teacher_log_probs": each * logit,
        "temperature": each * logit * logit / temperature * math.prod(rows),
        "weights": each * logit,
    }
    assert_near(got.cpu(), truth, reference, logit * weight * together, "loss")
    for name in only:
        if name in true_gradients:
            expected, of_reference = true_gradients[name], reference_gradients[name]
            assert_near(gradients[name].cpu(), expected, of_reference, magnitudes[name], name)
            if not vacuous:
                assert_not_vacuous(expected, of_reference, magnitudes[name])
    if not vacuous:
        assert_not_vacuous(truth, reference, logit * weight * together)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("regime", REGIMES)
def test_loss_and_gradients(backend_dtype, regime, tail):
    backend, dtype = backend_dtype
    temperature = {"warm": 4.0, "near": 2.0}.get(regime, 1.0)
    arguments = values(regime, (6,), 100, 7, dtype, temperature)
    # Near convergence a half's output rounding, and far a one-hot side, are all there is to see.
    compare(backend, {**arguments, "tail": tail}, vacuous=regime in ("near", "far"))


@pytest.mark.parametrize(
    "classes", [1, 2, 3, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 257, 1000, 1025, 4099]
)
def test_every_number_of_classes(backend, classes):
    for k in {1, (classes + 1) // 2, classes}:
        # All of k = 1 and renormalize is 0, and so is the rest of k = 1 = classes.
        for tail in TAILS[:: 1 if classes > 1 else 2]:
            arguments = {**values("plain", (3,), classes, k, torch.float32, 2.0), "tail": tail}
            compare(backend, arguments, vacuous=k == 1 or classes <= 2)


@pytest.mark.parametrize("k", [1, 2, 3, 16, 17, 63, 64, 65, 130, 299, 300])
def test_every_number_of_named_classes(backend, k):
    for tail in TAILS:
        compare(backend, {**values("plain", (3,), 300, k, torch.float32), "tail": tail}, vacuous=k == 1)


@pytest.mark.parametrize("classes", [100, 20_000])
@pytest.mark.parametrize("tail", TAILS)
def test_last_class_counts(backend, classes, tail):
    student = torch.zeros(2, classes)
    student[1, -1] = 12.0  # named in one row, in the rest of the other
    indices = torch.tensor([[3, classes - 1, 0], [3, 7, 0]])
    log_probs = torch.tensor([[0.1, 0.6, 0.2], [0.5, 0.1, 0.1]]).log()
    arguments = {"student": student, "teacher_log_probs": log_probs, "teacher_indices": indices}
    compare(backend, {**arguments, "tail": tail, "reduction": "none"})


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean"])
def test_row_arguments_and_reductions(backend_dtype, reduction, tail):
    backend, dtype = backend_dtype
    generator = torch.Generator().manual_seed(3)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    compare(
        backend,
        {
            **values("plain", (2, 4), 50, 5, dtype),
            "temperature": 0.5 + 3 * torch.rand(2, 4, generator=generator, dtype=statistics),
            "mask": torch.tensor([[True, False, True, True], [False, True, True, False]]),
            "weights": torch.rand(2, 4, generator=generator, dtype=statistics) - 0.3,
            "reduction": reduction,
            "tail": tail,
        },
    )


def test_batchmean_divides_by_the_rows_that_count(backend):
    device = device_of(backend)
    student, log_probs, indices = (
        x.to(device) for x in list(values("plain", (6,), 30, 4, torch.float32).values())[:3]
    )
    mask = torch.tensor([True, False, True, True, False, False], device=device)
    kept = topk_kl_div(student[mask], log_probs[mask], indices[mask], reduction="sum", backend=backend) / 3
    torch.testing.assert_close(topk_kl_div(student, log_probs, indices, mask=mask, backend=backend), kept)
    doubled = topk_kl_div(
        student,
        log_probs,
        indices,
        mask=mask,
        weights=torch.full((6,), 2.0, device=device),
        backend=backend,
    )
    torch.testing.assert_close(doubled, 2 * kept)


@pytest.mark.parametrize("tail", TAILS)
def test_masked_rows_may_hold_anything(backend_dtype, tail):
    backend, dtype = backend_dtype
    device = device_of(backend)
    arguments = values("plain", (4,), 70, 5, dtype)
    mask = torch.tensor([True, False, True, False])
    arguments = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in arguments.items()}
    mask = mask.to(device)
    kept = {name: x[mask] if isinstance(x, Tensor) else x for name, x in arguments.items()}
    clean = topk_kl_div(**kept, tail=tail, backend=backend)
    arguments["student"][1], arguments["student"][3] = math.nan, math.inf
    arguments["teacher_log_probs"][1], arguments["teacher_log_probs"][3] = math.nan, math.inf
    arguments["teacher_indices"][1], arguments["teacher_indices"][3] = 10**9, -5
    weights = torch.tensor([1.0, math.nan, 1.0, math.inf], device=device)
    arguments = leaves({**arguments, "weights": weights, "temperature": torch.ones(4, device=device)})
    loss = topk_kl_div(**arguments, tail=tail, mask=mask, backend=backend)
    torch.testing.assert_close(loss, clean)
    for gradient in torch.autograd.grad(loss, [arguments[name] for name in NAMES]):
        assert torch.isfinite(gradient[mask]).all() and gradient[mask].abs().sum() > 0
        assert (gradient[~mask] == 0).all()


def test_nothing_counts(backend):
    device = device_of(backend)
    arguments = leaves(
        {
            name: x.to(device) if isinstance(x, Tensor) else x
            for name, x in values("plain", (3,), 40, 5, torch.float32).items()
        }
    )
    mask = torch.zeros(3, dtype=torch.bool, device=device)
    for reduction in kdkernels.ops.rows.REDUCTIONS:
        loss = topk_kl_div(**arguments, mask=mask, reduction=reduction, backend=backend)
        assert (loss == 0).all() and loss.requires_grad
        for x in torch.autograd.grad(loss.sum(), (arguments["student"], arguments["teacher_log_probs"])):
            assert (x == 0).all()


def test_empty_batch(backend):
    device = device_of(backend)
    student = torch.zeros(0, 5, 7, device=device, requires_grad=True)
    log_probs = torch.zeros(0, 5, 3, device=device, requires_grad=True)
    indices = torch.zeros(0, 5, 3, dtype=torch.int64, device=device)
    for reduction, shape in (("none", (0, 5)), ("sum", ()), ("batchmean", ())):
        loss = topk_kl_div(student, log_probs, indices, reduction=reduction, backend=backend)
        assert loss.shape == shape and (loss == 0).all()
        for x, leaf in zip(torch.autograd.grad(loss.sum(), (student, log_probs)), (student, log_probs)):
            assert x.shape == leaf.shape


def test_no_row_dimension(backend):
    arguments = values("plain", (), 33, 4, torch.float32)
    compare(backend, arguments)
    compare(backend, {**arguments, "reduction": "none"})


@pytest.mark.parametrize("layout", ["columns", "row stride", "transposed", "expanded", "offset"])
def test_layouts(backend_dtype, layout):
    backend, dtype = backend_dtype
    device = device_of(backend)
    big = logits("plain", (8, 6, 99), dtype)[0].to(device).requires_grad_()
    view = {
        "columns": lambda x: x[:, 0, 3:90],
        "row stride": lambda x: x[::2, 1],
        "transposed": lambda x: x[0].T,
        "expanded": lambda x: x[:1, 0].expand(5, 99),
        "offset": lambda x: x.flatten()[1 : 1 + 4 * 99].view(4, 99),
    }[layout]
    student = view(big)
    teacher = torch.randn(student.shape, generator=torch.Generator().manual_seed(1))
    log_probs, indices = (x.to(device) for x in torch.log_softmax(teacher, -1).topk(3))
    strided_values = log_probs.repeat_interleave(2, -1)[:, ::2], indices.int().T.contiguous().T
    strided = topk_kl_div(student, *strided_values, temperature=2.0, backend=backend)
    dense = topk_kl_div(student.contiguous(), log_probs, indices, temperature=2.0, backend=backend)
    # Another alignment may take another loop, which adds in another order.
    torch.testing.assert_close(strided, dense, rtol=4 * EPS32, atol=0)
    a, b = (torch.autograd.grad(loss, big)[0] for loss in (strided, dense))
    torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("valid", [40, (0, 40), (7, 47), (9, 50)])
@pytest.mark.parametrize("tail", TAILS)
def test_padding_columns_do_not_exist(backend_dtype, valid, tail):
    backend, dtype = backend_dtype
    start, stop = (0, valid) if isinstance(valid, int) else valid
    arguments = values("plain", (4,), stop - start, 5, dtype, 1.5)
    whole = torch.full((4, 50), math.nan, dtype=dtype)  # padding may hold anything
    whole[:, start:stop] = arguments["student"]
    padded = {**arguments, "student": whole, "teacher_indices": arguments["teacher_indices"] + start}
    compare(backend, {**padded, "tail": tail, "valid_classes": valid})
    device = device_of(backend)
    moved = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in padded.items()}
    moved["student"].requires_grad_()
    loss = topk_kl_div(**moved, tail=tail, valid_classes=valid, backend=backend)
    [gradient] = torch.autograd.grad(loss, moved["student"])
    outside = torch.ones(50, dtype=torch.bool)
    outside[start:stop] = False
    assert (gradient.cpu()[:, outside] == 0).all() and (gradient.cpu()[:, ~outside] != 0).any()


def test_indices_of_any_integer_and_log_probs_of_any_float(backend):
    device = device_of(backend)
    arguments = values("plain", (3,), 60, 4, torch.float32)
    student, log_probs, indices = (x.to(device) for x in list(arguments.values())[:3])
    expected = topk_kl_div(student, log_probs, indices, backend=backend)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(topk_kl_div(student, log_probs, indices.to(dtype), backend=backend), expected)
    half = log_probs.bfloat16().requires_grad_()
    loss = topk_kl_div(student, half, indices, backend=backend)
    assert torch.equal(loss, topk_kl_div(student, half.detach().float(), indices, backend=backend))
    assert torch.autograd.grad(loss, half)[0].dtype == torch.bfloat16


def test_all_classes_named_is_kl_div(backend_dtype):
    backend, dtype = backend_dtype
    device = device_of(backend)
    student, teacher = (x.to(device) for x in logits("plain", (5, 90), dtype))
    student.requires_grad_()
    expected = kl_div(student, teacher, temperature=2.0, reduction="none", backend=backend)
    [true_gradient] = torch.autograd.grad(expected.sum(), student)
    named = {name: x.to(device) for name, x in top(teacher.cpu(), 90, 2.0).items()}
    for tail in TAILS:
        loss = topk_kl_div(student, **named, temperature=2.0, tail=tail, reduction="none", backend=backend)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        [gradient] = torch.autograd.grad(loss.sum(), student)
        torch.testing.assert_close(gradient, true_gradient, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


def test_bucket_is_kl_div_with_one_class_for_the_rest(backend):
    """A dense computation: the classes that are not named put together on both sides."""
    device = device_of(backend)
    student, teacher = logits("plain", (5, 90), torch.float32)
    named = top(teacher, 6)
    indices = named["teacher_indices"]

    def lumped(x: Tensor) -> Tensor:  # logits of the 6 classes and of the rest
        rest = x.scatter(-1, indices, -math.inf).logsumexp(-1, keepdim=True)
        return torch.cat([x.gather(-1, indices), rest], -1)

    dense = student.double().requires_grad_()
    expected = kl_div(lumped(dense), lumped(teacher.double()), reduction="none", backend="reference")
    [true_gradient] = torch.autograd.grad(expected.sum(), dense)
    leaf = student.to(device).requires_grad_()
    named = {name: x.to(device) for name, x in named.items()}
    loss = topk_kl_div(leaf, **named, reduction="none", backend=backend)
    torch.testing.assert_close(loss.cpu().double(), expected, rtol=1e-5, atol=1e-6)
    [gradient] = torch.autograd.grad(loss.sum(), leaf)
    torch.testing.assert_close(gradient.cpu().double(), true_gradient, rtol=1e-5, atol=1e-6)


def test_closed_forms(backend):
    device = device_of(backend)
    student = torch.zeros(1, 4, device=device)  # q = 1/4 each
    log_probs = torch.tensor([[0.5, 0.25]], device=device).log()
    indices = torch.tensor([[2, 0]], device=device)
    expected = {
        "bucket": 0.5 * math.log(2) + 0.25 * math.log(1) + 0.25 * math.log(0.25 / 0.5),
        "drop": 0.5 * math.log(2),
        "renormalize": 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3),
    }
    for tail, value in expected.items():
        loss = topk_kl_div(student, log_probs, indices, tail=tail, backend=backend)
        assert loss.item() == pytest.approx(value, rel=1e-6)
    # The temperature divides the student's logits, and nothing else.
    random = torch.randn(3, 9, generator=torch.Generator().manual_seed(0)).to(device)
    log_probs = torch.log_softmax(random.flip(-1), -1)[:, :2].contiguous()
    indices = torch.tensor([[1, 8]] * 3, device=device)
    warm = topk_kl_div(random, log_probs, indices, temperature=2.0, backend=backend)
    assert warm.item() == pytest.approx(topk_kl_div(random / 2, log_probs, indices, backend=backend).item())
    # One class of all the mass: the cross-entropy, with its bucket empty.
    target = torch.tensor([1, 0, 4], device=device)
    loss = topk_kl_div(random, torch.zeros(3, 1, device=device), target[:, None], backend=backend)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(random, target))


def test_more_mass_than_one(backend):
    """Values of another temperature, or rounded ones: no rest, and no NaN."""
    log_probs = torch.tensor([[0.7, 0.6], [1.0, 0.0], [0.5, 0.5]]).log()
    arguments = {
        "student": logits("plain", (3, 20), torch.float32)[0],
        "teacher_log_probs": log_probs,
        "teacher_indices": torch.tensor([[0, 1], [19, 3], [5, 6]]),
    }
    compare(backend, {**arguments, "reduction": "none"})
    device = device_of(backend)
    moved = {name: x.to(device) for name, x in arguments.items()}
    bucket, drop = (topk_kl_div(**moved, tail=tail, backend=backend) for tail in ("bucket", "drop"))
    torch.testing.assert_close(bucket, drop)


@pytest.mark.parametrize("tail", TAILS)
def test_minus_infinity_is_a_class_without_mass(backend_dtype, tail):
    backend, dtype = backend_dtype
    for classes in (40, 700):
        arguments = values("plain", (4,), classes, 6, dtype, 1.5)
        named = arguments["teacher_indices"]
        arguments["teacher_log_probs"][0, :2] = -math.inf  # q counts there: p = 0 < q
        arguments["teacher_log_probs"][1, 3] = -math.inf
        arguments["student"][1, named[1, 3]] = -math.inf  # neither has mass
        rest = torch.ones(classes, dtype=torch.bool).index_fill(0, named[2], False).nonzero()[:, 0]
        arguments["student"][2, rest[3:]] = -math.inf  # a few classes left in the rest
        compare(backend, {**arguments, "tail": tail})


@pytest.mark.parametrize("tail", TAILS)
def test_p_without_q_is_infinite(backend_dtype, tail):
    backend, dtype = backend_dtype
    arguments = values("plain", (3,), 50, 6, dtype)
    arguments["student"][1, arguments["teacher_indices"][1, 2]] = -math.inf
    compare(backend, {**arguments, "tail": tail, "reduction": "none"}, vacuous=True, only=("student",))
    device = device_of(backend)
    moved = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in arguments.items()}
    loss = topk_kl_div(**moved, tail=tail, reduction="none", backend=backend)
    assert loss[1] == math.inf and torch.isfinite(loss[[0, 2]]).all()


def test_a_rest_without_q_is_infinite(backend):
    arguments = values("plain", (3,), 300, 6, torch.float32)
    kept = arguments["student"].gather(-1, arguments["teacher_indices"])
    arguments["student"] = torch.full((3, 300), -math.inf).scatter(-1, arguments["teacher_indices"], kept)
    device = device_of(backend)
    moved = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in arguments.items()}
    assert (topk_kl_div(**moved, reduction="none", backend=backend) == math.inf).all()
    compare(backend, {**arguments, "reduction": "none"}, vacuous=True, only=("student",))
    for tail in ("renormalize", "drop"):
        compare(backend, {**arguments, "tail": tail})


@pytest.mark.parametrize("gap", [30.0, 120.0, 1000.0])
def test_a_rest_far_below_the_named_classes(backend, gap):
    """log Q_r where Q_r itself is no float."""
    arguments = values("plain", (3,), 600, 4, torch.float32)
    lifted = arguments["student"].gather(-1, arguments["teacher_indices"]) + gap
    arguments["student"] = arguments["student"].scatter(-1, arguments["teacher_indices"], lifted)
    compare(backend, {**arguments, "reduction": "none"})


@pytest.mark.parametrize("tail", ["bucket", "drop"])
def test_nan_in_a_row_that_counts_shows(backend_dtype, tail):
    backend, dtype = backend_dtype
    device = device_of(backend)
    for side, bad in (("student", math.nan), ("student", math.inf), ("teacher_log_probs", math.nan)):
        arguments = values("plain", (3,), 300, 5, dtype)
        arguments = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in arguments.items()}
        arguments[side][1, -1] = bad
        loss = topk_kl_div(**arguments, tail=tail, reduction="none", backend=backend)
        assert torch.isnan(loss[1]) or bad == math.inf == loss[1], (side, bad)
        assert torch.isfinite(loss[[0, 2]]).all(), (side, bad)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_near_convergence_is_exact(backend, tail):
    if backend == "reference":
        pytest.skip("the reference differences log-softmaxes; in float64 it is the truth of this test")
    device, classes = device_of(backend), 32_000
    teacher = torch.randn(2, classes, generator=torch.Generator().manual_seed(0))
    student = teacher + 1e-3 * torch.randn(2, classes, generator=torch.Generator().manual_seed(1))
    arguments = {"student": student, **top(teacher, 64, 2.0), "temperature": 2.0, "tail": tail}
    one = torch.tensor(1.0)
    truth, true_gradients = run(topk_kl_div_reference, leaves(arguments, torch.float64), one)
    # What the usual form makes of it, so that these data are known to be hard.
    log_q = torch.log_softmax(student / 2, -1).gather(-1, arguments["teacher_indices"])
    log_p = arguments["teacher_log_probs"]
    if tail == "bucket":
        rest = [(1 - x.exp().sum(-1, keepdim=True)).log() for x in (log_p, log_q)]
        log_p, log_q = torch.cat([log_p, rest[0]], -1), torch.cat([log_q, rest[1]], -1)
    else:
        log_p, log_q = torch.log_softmax(log_p, -1), torch.log_softmax(log_q, -1)
    usual = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert abs(usual / truth - 1) > 0.02
    moved = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in arguments.items()}
    loss, gradients = run(lambda **a: topk_kl_div(**a, backend=backend), leaves(moved), one.to(device))
    assert abs(loss.item() / truth.item() - 1) < 1e-4
    for name in ("student", "teacher_log_probs"):
        difference = gradients[name].cpu().double() - true_gradients[name]
        assert difference.norm() / true_gradients[name].norm() < 1e-4, name
        assert difference.abs().max() / true_gradients[name].abs().max() < 1e-4, name


def test_backward_twice_and_no_shared_buffer(backend):
    device = device_of(backend)
    arguments = values("plain", (4,), 88, 5, torch.float32)
    arguments["student"] = torch.nn.functional.pad(arguments["student"], (0, 2))
    arguments = leaves({n: x.to(device) if isinstance(x, Tensor) else x for n, x in arguments.items()})
    sources = (arguments["student"], arguments["teacher_log_probs"])
    for reduction in ("batchmean", "none"):
        loss = topk_kl_div(**arguments, valid_classes=88, reduction=reduction, backend=backend, tail="drop")
        upstream = torch.rand(loss.shape, generator=torch.Generator().manual_seed(0)).to(device) + 0.5
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
    "wanted", [*((name,) for name in NAMES), ("student", "weights"), ("student", "temperature")], ids="+".join
)
def test_gradients_only_where_required(backend, wanted):
    device = device_of(backend)
    arguments = {
        **values("plain", (4,), 40, 5, torch.float32),
        "weights": torch.rand(4) + 0.5,
        "temperature": torch.full((4,), 2.0),
    }
    arguments = {name: x.to(device) for name, x in arguments.items()}
    every = leaves(arguments)
    topk_kl_div(**every, backend=backend).backward()
    some = leaves(arguments)
    for name in NAMES:
        some[name].requires_grad_(name in wanted)
    topk_kl_div(**some, backend=backend).backward()
    for name in NAMES:
        assert (some[name].grad is not None) == (name in wanted)
        if name in wanted:
            torch.testing.assert_close(some[name].grad, every[name].grad)


def test_no_gradient_work_where_none_is_wanted(monkeypatch):
    if kdkernels.available_backends("cpu")["cpu"] != "available":
        pytest.skip("needs the native module")
    monkeypatch.delitem(COMMON, "topk_kl_div", raising=False)  # whose kernel this does not reach
    asked = []
    original = kdkernels.backend._LAUNCHERS["cpu", "topk_kl_div"]
    monkeypatch.setitem(
        kdkernels.backend._LAUNCHERS,
        ("cpu", "topk_kl_div"),
        lambda *a: (asked.append([x is not None for x in a[10:]]), original(*a)),
    )
    arguments = values("plain", (4,), 40, 5, torch.float32)
    topk_kl_div(**arguments, backend="cpu")
    arguments["student"].requires_grad_()
    with torch.no_grad():
        topk_kl_div(**arguments, backend="cpu")
    topk_kl_div(**arguments, backend="cpu").backward()
    assert asked == [[False] * 3, [False] * 3, [True, False, False]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("classes", [65, 512, 1031, 5000])
def test_a_row_of_halves_is_the_same_alone(classes, dtype):
    """Its exponentials stay in the memory of the next row of the gradient, where there is one."""
    for tail in ("bucket", "drop"):
        arguments = values("plain", (5,), classes, 7, dtype)
        mask = torch.tensor([True, True, False, True, True])
        options = {"tail": tail, "reduction": "sum", "backend": "cpu"}
        arguments["student"].requires_grad_()
        topk_kl_div(**arguments, **options, mask=mask).backward()
        for r in range(5):
            row = {
                name: x[r : r + 1].detach() if isinstance(x, Tensor) else x for name, x in arguments.items()
            }
            row["student"].requires_grad_()
            topk_kl_div(**row, **options).backward()
            expected = row["student"].grad[0] * mask[r]
            assert torch.equal(arguments["student"].grad[r], expected), (tail, r)
        assert arguments["student"].grad[0].count_nonzero() > classes / 2


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck(backend, tail):
    torch.manual_seed(0)
    indices = torch.tensor([[4, 0], [1, 2]])
    inputs = (
        torch.randn(2, 5),
        torch.log_softmax(torch.randn(2, 5), -1).gather(-1, indices),
        torch.rand(2) + 1,
        torch.rand(2) + 0.5,
    )
    inputs = tuple(x.double().requires_grad_() for x in inputs)
    mask = torch.tensor([True, False])
    for reduction, rows in (("none", None), ("batchmean", mask)):

        def call(student, log_probs, temperature, weights, reduction=reduction, rows=rows):
            return topk_kl_div(
                student,
                log_probs,
                indices,
                temperature=temperature,
                weights=weights,
                tail=tail,
                mask=rows,
                reduction=reduction,
                backend=backend,
            )

        assert torch.autograd.gradcheck(call, inputs)
        assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def test_double_backward(backend):
    """∇(‖∂loss/∂student‖²) in float32 against float64."""
    arguments = values("plain", (3,), 20, 4, torch.float32, 2.0)

    def penalty(dtype: torch.dtype, device: str, name: str) -> tuple[Tensor, ...]:
        moved = leaves({n: x.to(device) if isinstance(x, Tensor) else x for n, x in arguments.items()}, dtype)
        s, p = moved["student"], moved["teacher_log_probs"]
        # An upstream gradient that must not be lost, and padding.
        loss = 3 * topk_kl_div(**moved, valid_classes=(0, 20), backend=name)
        [first] = torch.autograd.grad(loss, s, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (s, p))

    truth = penalty(torch.float64, "cpu", "reference")
    for a, b in zip(penalty(torch.float32, device_of(backend), backend), truth):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-4, atol=1e-7)


def test_deterministic(backend):
    device = device_of(backend)
    arguments = values("plain", (7,), 5000, 50, torch.float32)
    arguments = leaves({n: x.to(device) if isinstance(x, Tensor) else x for n, x in arguments.items()})
    runs = []
    for _ in range(2):
        loss = topk_kl_div(**arguments, backend=backend)
        sources = (arguments["student"], arguments["teacher_log_probs"])
        runs.append([loss.detach(), *torch.autograd.grad(loss, sources)])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_change_a_bit(dtype):
    arguments = leaves(values("plain", (37,), 3000, 20, dtype))

    def run():
        loss = topk_kl_div(**arguments, backend="cpu")
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
def step(s, p, i): kdkernels.topk_kl_div(s, p, i, valid_classes=s.shape[1] - 5, backend="cpu").backward()
def top(rows): return torch.full((rows, 2), -1.0), torch.tensor([[1, 0]]).repeat(rows, 1)
step(torch.randn(4, 8, dtype=dtype).requires_grad_(), *top(4))  # imports and thread stacks
s, few = torch.randn(128, 64000).to(dtype).requires_grad_(), top(128)
open("/proc/self/clear_refs", "w").write("5")  # the peak starts over
before = peak()
step(s, *few)
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
    arguments = values("plain", (3,), 20, 4, torch.float32)
    student, log_probs, indices = (x.to(device) for x in list(arguments.values())[:3])
    rows = torch.rand(3, device=device) + 0.5
    mask = torch.tensor([True, False, True], device=device)
    start = indices.min().item()
    for rest in (
        (None, 2.0, None, 0.5, None, 0, 0, 20, [True, False, False], backend),
        (rows, 1.0, rows, 1.0, mask, 2, start, 20, [True] * 3, backend),
    ):
        for op in (torch.ops.kdkernels.topk_kl_div_fwd, torch.ops.kdkernels.topk_kl_div_bwd):
            torch.library.opcheck(op.default, (student, log_probs, indices, *rest))


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_compiles_into_one_graph(name, reduction):
    arguments = values("plain", (6,), 50, 4, torch.float32)
    indices = arguments.pop("teacher_indices")
    arguments |= {"temperature": torch.tensor(2.0), "weights": torch.rand(6) + 0.5}
    mask = torch.tensor([True, False, True, True, False, True])

    def call(student, teacher_log_probs, temperature, weights):
        return topk_kl_div(
            student,
            teacher_log_probs,
            indices,
            temperature=temperature,
            weights=weights,
            mask=mask,
            valid_classes=50,
            reduction=reduction,
            backend=name,
        ).sum()

    eager, compiled = leaves(arguments), leaves(arguments)
    expected = call(**eager)
    expected.backward()
    torch._dynamo.reset()
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(**compiled)
    torch.testing.assert_close(got, expected)
    got.backward()
    for key, value in eager.items():
        torch.testing.assert_close(compiled[key].grad, value.grad)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(call, fullgraph=True, backend="aot_eager")(**compiled), expected
        )


def test_module(backend):
    device = device_of(backend)
    arguments = values("plain", (4,), 30, 4, torch.float32)
    inputs = [x.to(device) for x in list(arguments.values())[:3]]
    mask = torch.tensor([True, True, False, True], device=device)
    options = {"temperature": 3.0, "tail": "drop", "reduction": "sum", "valid_classes": (0, 30)}
    module = TopKKLDivLoss(**options, backend=backend)
    assert torch.equal(
        module(*inputs, mask=mask), topk_kl_div(*inputs, **options, mask=mask, backend=backend)
    )
    learned = TopKKLDivLoss(temperature=torch.nn.Parameter(torch.tensor(2.0, device=device)), backend=backend)
    learned(*inputs).backward()
    [parameter] = learned.parameters()
    assert parameter.grad is not None and parameter.grad != 0
    assert "temperature" in repr(module) and "drop" in repr(module)
    with pytest.raises(ValueError, match="tail must be one of"):
        TopKKLDivLoss(tail="ghost")


def bad_indices(*edits: tuple[int, int, int]) -> Tensor:
    indices = torch.tensor([[4, 1, 0]] * 5)
    for row, column, value in edits:
        indices[row, column] = value
    return indices


@pytest.mark.parametrize(
    ("edits", "valid", "message"),
    [
        ([(3, 1, 9)], None, "teacher_indices holds 9 in row 3, a class outside .* from 0 to 8"),
        ([(3, 1, -1), (4, 0, 100)], None, "teacher_indices holds -1 in row 3"),
        ([(2, 2, 4)], None, "teacher_indices holds 4 in row 2, twice"),
        ([(1, 0, 8)], 6, "teacher_indices holds 8 in row 1, a class outside .* from 0 to 5"),
        ([], (1, 6), "teacher_indices holds 0 in row 0, a class outside .* from 1 to 5"),
    ],
    ids=["above", "below", "twice", "in the padding", "before the start"],
)
@pytest.mark.parametrize("check", [None, True])
def test_wrong_indices_are_refused(backend, edits, valid, message, check):
    device = device_of(backend)
    if device == "cuda" and check is None:
        pytest.skip("a GPU would have to wait")
    arguments = (torch.randn(5, 9), torch.full((5, 3), -2.0), bad_indices(*edits))
    arguments = [x.to(device) for x in arguments]
    for tail in TAILS:
        with pytest.raises(ValueError, match=message):
            topk_kl_div(*arguments, tail=tail, valid_classes=valid, check_indices=check, backend=backend)


def test_an_index_outside_that_nothing_looks_for():
    student, log_probs, indices = torch.randn(5, 9), torch.full((5, 3), -2.0), bad_indices((3, 1, 9))
    with pytest.raises(ValueError, match="row 3"):  # the kernel looks whatever Python does
        topk_kl_div(student, log_probs, indices, check_indices=False, backend="cpu")
    many = torch.randn(300, 4000), torch.full((300, 2), -2.0), torch.tensor([[7, 3]]).repeat(300, 1)
    many[2][[290, 17, 150]] = 5
    with pytest.raises(ValueError, match="5 in row 17, twice"):  # the first, in whichever thread
        topk_kl_div(*many, backend="cpu")


def test_indices_are_not_looked_at_where_told_so(backend):
    if backend in ("reference", "cpu"):
        pytest.skip("these cannot but look")
    device = device_of(backend)
    student, log_probs = torch.randn(5, 9, device=device), torch.full((5, 3), -2.0, device=device)
    loss = topk_kl_div(
        student,
        log_probs,
        bad_indices((3, 1, 9)).to(device),
        check_indices=False,
        reduction="none",
        backend=backend,
    )
    assert torch.isnan(loss[3]) and torch.isfinite(loss[[0, 1, 2, 4]]).all()


X, P, I = torch.zeros(4, 5), torch.full((4, 2), -1.0), torch.tensor([[1, 0]] * 4)  # noqa: E741


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"student": [1.0]}, TypeError, "student must be a tensor"),
        ({"student": torch.tensor(1.0)}, ValueError, "student must have shape"),
        ({"student": torch.zeros(4, 0)}, ValueError, "student must have shape"),
        ({"student": X.long()}, TypeError, "student must be float64"),
        ({"teacher_log_probs": None}, TypeError, "teacher_log_probs must be a floating tensor, got None"),
        ({"teacher_log_probs": P.long()}, TypeError, "teacher_log_probs must be a floating tensor"),
        (
            {"teacher_log_probs": P[:3]},
            ValueError,
            r"teacher_log_probs must have shape \(\*rows, k\) with the student's rows \(4,\) and k >= 1, "
            r"got \(3, 2\)",
        ),
        ({"teacher_log_probs": P[:, :0]}, ValueError, "teacher_log_probs must have shape"),
        ({"teacher_log_probs": P[0]}, ValueError, "teacher_log_probs must have shape"),
        ({"teacher_indices": P}, TypeError, "teacher_indices must be an integer tensor"),
        ({"teacher_indices": I.bool()}, TypeError, "teacher_indices must be an integer tensor"),
        (
            {"teacher_indices": I[:, :1]},
            ValueError,
            r"teacher_indices must have the shape of teacher_log_probs \(4, 2\), got \(4, 1\)",
        ),
        (
            {"teacher_log_probs": torch.zeros(4, 6), "teacher_indices": torch.zeros(4, 6).long()},
            ValueError,
            "not have more values in a row than there are classes, 5, got 6",
        ),
        ({"valid_classes": 1}, ValueError, "not have more values in a row than there are classes, 1, got 2"),
        (
            {"teacher_log_probs": P.to("meta")},
            ValueError,
            "teacher_log_probs must be on the student's device",
        ),
        ({"teacher_indices": I.to("meta")}, ValueError, "teacher_indices must be on the student's device"),
        (
            {"tail": "ghost"},
            ValueError,
            "tail must be one of bucket, renormalize, drop, got 'ghost'",
        ),
        ({"valid_classes": 6}, ValueError, "valid_classes must be inside the student's 5 classes"),
        ({"valid_classes": (3, 3)}, ValueError, "valid_classes must be inside the student's 5 classes"),
        ({"valid_classes": (-1, 3)}, ValueError, "valid_classes must be inside the student's 5 classes"),
        ({"valid_classes": 2.0}, TypeError, "valid_classes must be None, a number of classes or"),
        ({"valid_classes": True}, TypeError, "valid_classes must be None, a number of classes or"),
        ({"valid_classes": (1, 2, 3)}, TypeError, "valid_classes must be None, a number of classes or"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
        ({"temperature": torch.ones(3)}, ValueError, "temperature must broadcast to the rows"),
        ({"mask": torch.ones(4)}, TypeError, "mask must be a bool tensor"),
        ({"weights": torch.ones(4, 5)}, ValueError, "weights must broadcast"),
        ({"reduction": "mean"}, ValueError, "reduction must be one of none, sum, batchmean, got 'mean'"),
        ({"backend": "tpu"}, ValueError, "backend must be None or one of"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_bad_input_says_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        topk_kl_div(**{"student": X, "teacher_log_probs": P, "teacher_indices": I, **arguments})
