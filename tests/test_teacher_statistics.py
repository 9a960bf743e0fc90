"""precompute_teacher: a step with what was kept of a frozen teacher is a step with the teacher."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import device_of
from test_linear_loss import HARD, Products, batch, row_arguments
from testing import EPS32, run, to
from torch import Tensor

import kdkernels
from kdkernels import (
    linear_distillation_loss,
    linear_kl_div,
    precompute_teacher,
    shared_classifier_loss,
    topk_kl_div,
)
from kdkernels.backend import DTYPES

T = 2.0


def shared_head(
    shape: tuple[int, ...] = (6,), classes: int = 31, width: int = 16, bias: bool = True, **more: Any
) -> dict[str, Any]:
    """Two rows of hidden states, and the frozen head of both."""
    a = batch(shape, classes, (width, width), **more)
    del a["teacher_weight"], a["teacher_bias"]
    if not bias:
        del a["student_bias"]
    return a


def full_form(a: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the loss with the teacher's hidden states."""
    return {**a, "teacher_weight": a["student_weight"], "teacher_bias": a.get("student_bias")}


def keep(a: dict[str, Any], **options: Any) -> kdkernels.TeacherStatistics:
    temperature = a.get("temperature", 1.0)
    return precompute_teacher(
        a["teacher"], a["student_weight"], a.get("student_bias"), temperature=temperature, **options
    )


def step(function: Any, a: dict[str, Any], upstream: Tensor | None = None, **options: Any) -> tuple:
    """The loss and the student's gradient."""
    student = a["student"].detach().clone().requires_grad_()
    loss = function(**{**a, "student": student}, **options)
    (gradient,) = torch.autograd.grad(loss, student, upstream)
    return loss.detach(), gradient


def dtypes_of(backend: str) -> list[torch.dtype]:
    return [x for x in (torch.float64, torch.float32) if x in DTYPES[backend]]


def assert_close(got: tuple, expected: tuple, dtype: torch.dtype) -> None:
    """Of data where student and teacher are far apart, so that little cancels."""
    eps = torch.finfo(dtype).eps
    (loss, gradient), (true_loss, true_gradient) = got, expected
    assert loss.dtype == true_loss.dtype and loss.shape == true_loss.shape
    assert ((loss - true_loss).abs() <= 200 * eps * true_loss.abs().max()).all()
    assert (gradient - true_gradient).norm() <= 200 * eps * true_gradient.norm()
    assert (true_loss.abs().max() > 0) and (true_gradient != 0).any()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
def test_equals_the_full_form(backend, bias, reduction):
    for dtype in dtypes_of(backend):
        a = to(device_of(backend), shared_head(dtype=dtype, bias=bias, temperature=T))
        known = {**a, "teacher": keep(a)}
        upstream = torch.linspace(0.5, 2, 6, dtype=dtype) if reduction == "none" else torch.tensor(0.7)
        upstream = upstream.to(device_of(backend), dtype)
        for function in (linear_distillation_loss, linear_kl_div):
            options = {"reduction": reduction, "backend": backend}
            expected = step(function, full_form(a), upstream, **options)
            assert_close(step(function, known, upstream, **options), expected, dtype)


def test_with_all_that_a_row_may_have(backend):
    """T², the hard part, a mask over garbage, ignored labels, weights; in one chunk and in several."""
    for dtype in dtypes_of(backend):
        a = shared_head((2, 4), dtype=dtype, temperature=T, soft_weight=0.8, **HARD)
        rows = row_arguments((2, 4))
        a |= {"mask": rows["mask"], "weights": rows["weights"].to(dtype)}
        a["labels"] = a["labels"].clone()
        a["labels"][0, 0] = -100
        a = to(device_of(backend), a)
        dirty = {k: v.clone() if isinstance(v, Tensor) else v for k, v in a.items()}
        for side in ("student", "teacher"):
            dirty[side][~dirty["mask"]] = math.nan
        for more in ({}, {"chunk_rows": 3}, {"reduction": "sum"}):
            options = {**more, "backend": backend}
            expected = step(linear_distillation_loss, full_form(a), **options)
            for these in (a, dirty):
                known = {**these, "teacher": keep(these)}
                assert_close(step(linear_distillation_loss, known, **options), expected, dtype)
        found, terms = linear_distillation_loss(**known, return_terms=True, backend=backend)
        _, expected_terms = linear_distillation_loss(**full_form(a), return_terms=True, backend=backend)
        assert terms.keys() == expected_terms.keys()
        for name, value in expected_terms.items():
            torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(terms["soft"] + terms["hard"] + terms["z_loss"], found)


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
def test_gradients_of_the_rows_weights_and_of_the_penalty(backend):
    a = shared_head(dtype=torch.float64, temperature=T, **HARD)
    a["weights"] = torch.linspace(0.2, 1.4, 6).double()
    known = {**a, "teacher": keep(a)}
    ours, truth = (
        run(
            partial(linear_distillation_loss, backend=backend),
            x,
            torch.tensor(1.3).double(),
            wanted=("student", "weights"),
        )
        for x in (known, full_form(a))
    )
    for name, gradient in truth[1].items():
        torch.testing.assert_close(ours[1][name], gradient, rtol=1e-9, atol=1e-12)

    def function(student):
        return linear_distillation_loss(**{**known, "student": student}, backend=backend)

    inputs = a["student"][:, :3].clone().requires_grad_()
    few = {
        **a,
        "student": inputs,
        "teacher": a["teacher"][:, :3],
        "student_weight": a["student_weight"][:, :3],
    }
    known = {**few, "teacher": keep(few)}
    assert torch.autograd.gradcheck(function, (inputs,), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (inputs,), fast_mode=True)


def test_is_what_it_says():
    """m = Wᵀ(p − e_r), c = b·(p − e_r), H(p), and the k largest log-probabilities: textbook."""
    a = shared_head((2, 3), dtype=torch.float64, temperature=T)
    for chunk_rows in (None, 1, 4):
        kept = keep(a, logit_scale=0.7, k=5, chunk_rows=chunk_rows)
        weight, bias = a["student_weight"], a["student_bias"]
        log_p = torch.log_softmax(0.7 * F.linear(a["teacher"], weight, bias) / T, -1)
        p = log_p.exp()
        top = p.argmax(-1)
        difference = p - F.one_hot(top, 31)
        assert torch.equal(kept.top, top)
        torch.testing.assert_close(kept.direction, difference @ weight, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(kept.offset, difference @ bias, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(kept.entropy, -(p * log_p).sum(-1), rtol=1e-10, atol=1e-12)
        expected, indices = log_p.topk(5)
        torch.testing.assert_close(kept.log_probs, expected)
        assert torch.equal(kept.indices, indices)
        assert torch.equal(kept.features, a["teacher"])
        assert (kept.temperature, kept.logit_scale, kept.precision) == (T, 0.7, None)
        assert len(kept) == 2
        assert not any(
            getattr(kept, n).requires_grad for n in ("direction", "offset", "entropy", "log_probs")
        )
    without = keep(a, keep_features=False)
    assert without.features is None and without.log_probs is None and without.indices is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_is_kept_is_float32(dtype):
    a = shared_head(dtype=dtype, temperature=T)
    kept = keep(a, k=3)
    double = {k: v.double() if isinstance(v, Tensor) else v for k, v in a.items()}
    truth = keep(double, k=3)
    for name in ("direction", "offset", "entropy", "log_probs"):
        got, true = getattr(kept, name), getattr(truth, name)
        assert got.dtype == torch.float32 and (got - true).abs().max() <= 100 * EPS32 * true.abs().max(), name
    assert kept.features.dtype == dtype and torch.equal(kept.indices, truth.indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_strides(dtype):
    """Hidden states and heads that are transposed, a bias with a stride."""
    a = shared_head((64,), 700, 64, dtype=dtype, temperature=T)
    expected = keep(a)
    views = {
        "teacher": a["teacher"].T.contiguous().T,
        "student_weight": a["student_weight"].T.contiguous().T,
        "student_bias": torch.stack((a["student_bias"], a["student_bias"] + 3), 1)[:, 0],
    }
    for name, view in views.items():
        kept = keep({**a, name: view})
        for part in ("direction", "offset", "entropy"):
            got, true = getattr(kept, part), getattr(expected, part)
            assert (got - true).abs().max() <= 100 * EPS32 * true.abs().max(), (name, part)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision(backend, dtype):
    if dtype not in DTYPES[backend] or (backend == "triton" and dtype == torch.bfloat16):
        return  # the interpreter truncates what it stores as bfloat16
    a = to(device_of(backend), shared_head(dtype=dtype, temperature=T, **HARD))
    double = {
        k: v.double().cpu() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in a.items()
    }
    double["labels"] = double["labels"].cpu()
    truth, true_gradient = step(linear_distillation_loss, full_form(double), backend="reference")
    loss, gradient = step(linear_distillation_loss, {**a, "teacher": keep(a)}, backend=backend)
    assert loss.dtype == torch.float32 and abs(loss.item() / truth.item() - 1) < 100 * EPS32
    assert gradient.dtype == dtype
    assert (gradient.cpu().double() - true_gradient).norm() < 2 * torch.finfo(
        dtype
    ).eps * true_gradient.norm()


def test_a_sure_teacher_does_not_cancel(backend):
    """p − e_r is small where p is nearly one-hot, and is kept as such."""
    dtype = torch.float32
    a = shared_head(dtype=dtype, temperature=T)
    a["student_bias"] = a["student_bias"] + 30 * F.one_hot(torch.tensor(4), 31)
    a = to(device_of(backend), a)
    double = {k: v.double().cpu() if isinstance(v, Tensor) else v for k, v in a.items()}
    truth, true_gradient = step(linear_kl_div, full_form(double), backend="reference")
    kept = keep(a)
    loss, gradient = step(linear_kl_div, {**a, "teacher": kept}, backend=backend)
    logit = F.linear(double["student"], double["student_weight"], double["student_bias"]).abs().max() / T
    assert 1e-3 < truth < 5e-2
    assert abs(loss.item() - truth.item()) < 8 * EPS32 * logit
    assert (gradient.cpu().double() - true_gradient).norm() < 1e-3 * true_gradient.norm()
    torch.testing.assert_close(kept.direction.cpu().double(), keep(double).direction, rtol=1e-3, atol=1e-9)


def test_minus_infinity(backend):
    """Classes that neither side has."""
    a = shared_head(temperature=T)
    a["student_bias"][25:] = -math.inf
    a = to(device_of(backend), a)
    expected = step(linear_kl_div, full_form(a), backend=backend)
    kept = keep(a)
    assert kept.offset.isfinite().all() and kept.direction.isfinite().all() and kept.entropy.isfinite().all()
    assert_close(step(linear_kl_div, {**a, "teacher": kept}, backend=backend), expected, torch.float32)


def test_logit_scale(backend):
    a = to(device_of(backend), shared_head(temperature=T, logit_scale=0.6))
    known = {**a, "teacher": keep(a, logit_scale=0.6)}
    expected = step(linear_kl_div, full_form(a), backend=backend)
    assert_close(step(linear_kl_div, known, backend=backend), expected, torch.float32)


def test_all_ignored(backend):
    a = to(device_of(backend), shared_head(temperature=T, **HARD))
    none = {"mask": torch.zeros(6, dtype=torch.bool, device=device_of(backend))}
    for more in (none, {"labels": torch.full_like(a["labels"], -100)}):
        loss, gradient = step(linear_distillation_loss, {**a, **more, "teacher": keep(a)}, backend=backend)
        assert loss == 0 and (gradient == 0).all()


def test_no_rows(backend):
    a = to(device_of(backend), shared_head((0,), temperature=T))
    kept = keep(a)
    assert len(kept) == 0 and kept.direction.shape == (0, 16)
    loss, gradient = step(linear_kl_div, {**a, "teacher": kept}, backend=backend)
    assert loss == 0 and gradient.shape == (0, 16)


def test_log_probs_for_a_student_with_a_head_of_its_own(backend):
    """k of them: topk_kl_div's."""
    a = batch((5,), 31, (12, 16), temperature=T)
    a = to(device_of(backend), a)
    kept = precompute_teacher(a["teacher"], a["teacher_weight"], a["teacher_bias"], temperature=T, k=6)
    heads = {k: a[k] for k in ("student_weight", "student_bias")}
    known = {"teacher_log_probs": kept.log_probs, "teacher_indices": kept.indices, "temperature": T}
    loss, gradient = step(linear_kl_div, {"student": a["student"], **heads, **known}, backend=backend)

    def products(student, student_weight, student_bias, backend):
        logits = F.linear(student, student_weight, student_bias)
        return topk_kl_div(logits, kept.log_probs, kept.indices, temperature=T, backend="reference")

    expected = step(products, {"student": a["student"], **heads}, backend=backend)
    assert_close((loss, gradient), expected, torch.float32)


def test_rows_can_be_picked(backend):
    a = to(device_of(backend), shared_head((8,), temperature=T))
    kept = keep(a, k=3)
    whole = linear_kl_div(**{**a, "teacher": kept}, reduction="none", backend=backend)
    order = torch.tensor([5, 0, 3], device=device_of(backend))
    mask = torch.arange(8, device=device_of(backend)) % 3 == 1
    for rows in (slice(2, 6), order, mask):
        some = kept[rows]
        assert len(some) == len(a["student"][rows])
        for name in ("top", "direction", "offset", "entropy", "log_probs", "indices", "features"):
            assert torch.equal(getattr(some, name), getattr(kept, name)[rows]), name
        loss = linear_kl_div(
            **{**a, "student": a["student"][rows], "teacher": some}, reduction="none", backend=backend
        )
        torch.testing.assert_close(loss, whole[rows], rtol=1e-5, atol=1e-5)
    one = linear_kl_div(**{**a, "student": a["student"][3], "teacher": kept[3]}, backend=backend)
    torch.testing.assert_close(one, whole[3], rtol=1e-5, atol=1e-5)


def test_to_and_pickling(tmp_path):
    kept = keep(shared_head(temperature=T), k=3, precision=0.1)
    moved = kept.to("meta")
    assert moved.direction.device.type == "meta" and moved.features.device.type == "meta"
    assert (moved.temperature, moved.precision) == (T, 0.1) and kept.direction.device.type == "cpu"
    torch.save(kept, tmp_path / "teacher.pt")
    again = torch.load(tmp_path / "teacher.pt", weights_only=False)
    assert torch.equal(again.direction, kept.direction) and again.temperature == kept.temperature
    with pytest.raises(AttributeError):
        kept.temperature = 3.0  # it holds for one


# Products, and from where on the full form is taken.


@pytest.fixture
def products(monkeypatch):
    if kdkernels.available_backends("cpu")["cpu"] != "available":
        pytest.skip(kdkernels.available_backends("cpu")["cpu"])
    return Products(monkeypatch)


def test_two_products_a_step(products):
    a = shared_head(temperature=T, **HARD)
    kept = keep(a)
    assert products.taken() == (1, 1, 0)
    step(linear_distillation_loss, {**a, "teacher": kept}, chunk_rows=6, backend="cpu")
    assert products.taken() == (1, 1, 0)
    step(linear_distillation_loss, full_form(a), chunk_rows=6, backend="cpu")
    assert products.taken() == (1, 1, 0)  # one for both sides, of twice the rows
    with torch.no_grad():
        linear_distillation_loss(**{**a, "teacher": kept}, chunk_rows=6, backend="cpu")
    assert products.taken() == (1, 0, 0)


def test_precision_chooses_the_form(products):
    """Far apart, and near: only there the full form is taken, and it is then as exact as that."""
    a = shared_head((6,), 400, 32, temperature=T)
    options = {"chunk_rows": 6, "backend": "cpu"}
    logits = []
    for noise, full in ((1.0, False), (1e-4, True)):
        generator = torch.Generator().manual_seed(5)
        near = {**a, "student": a["teacher"] + noise * torch.randn(6, 32, generator=generator)}
        double = {k: v.double() if isinstance(v, Tensor) else v for k, v in near.items()}
        truth, true_gradient = step(linear_kl_div, full_form(double), backend="reference")
        own, own_gradient = step(linear_kl_div, full_form(near), **options)
        without, careful = keep(a), keep(a, precision=1e-3)
        products.rows.clear()
        loss, gradient = step(linear_kl_div, {**near, "teacher": careful}, **options)
        logits.append(list(products.rows["logits"]))
        assert (12 in products.rows["logits"]) == full  # both sides at once
        assert abs(loss.item() / truth.item() - 1) < 1e-3
        if full:
            assert torch.equal(loss, own) and torch.equal(gradient, own_gradient)
        else:
            assert (gradient.double() - true_gradient).norm() < 1e-3 * true_gradient.norm()
        rough, _ = step(linear_kl_div, {**near, "teacher": without}, **options)
        # This is what it is for.
        assert (abs(rough.item() / truth.item() - 1) > 1e-3) == full
    assert logits[0] == [6]


@pytest.mark.parametrize("noise", [1.0, 0.1, 1e-2, 1e-3])
def test_the_estimate_holds(backend, noise):
    """A loss within `precision` where that form is taken, however near."""
    generator = torch.Generator().manual_seed(3)
    a = shared_head((8,), 100, temperature=T)
    a["student"] = a["teacher"] + noise * torch.randn(8, 16, generator=generator)
    double = {k: v.double() if isinstance(v, Tensor) else v for k, v in a.items()}
    truth, true_gradient = step(linear_kl_div, full_form(double), backend="reference")
    a = to(device_of(backend), a)
    for precision in (1e-2, 1e-4):
        known = {**a, "teacher": keep(a, precision=precision)}
        loss, gradient = step(linear_kl_div, known, backend=backend)
        # The reference's full form has an error of its own.
        own = step(linear_kl_div, full_form(a), backend=backend)
        slack = abs(own[0].item() / truth.item() - 1)
        assert abs(loss.item() / truth.item() - 1) <= 2 * precision + 2 * slack
        slack = (own[1].cpu().double() - true_gradient).norm() / true_gradient.norm()
        error = (gradient.cpu().double() - true_gradient).norm() / true_gradient.norm()
        assert error <= 2 * precision + 2 * slack


def test_the_full_form_with_everything(backend):
    """Where precision asks for it, with labels, masks and terms: it is that loss."""
    a = to(device_of(backend), shared_head(temperature=T, soft_weight=0.5, **HARD))
    a["mask"] = torch.arange(6, device=device_of(backend)) != 2
    a["student"] = a["teacher"] * (1 + 1e-4)
    known = {**a, "teacher": keep(a, precision=1e-7)}
    expected = step(linear_distillation_loss, full_form(a), backend=backend)
    got = step(linear_distillation_loss, known, backend=backend)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    _, terms = linear_distillation_loss(**known, return_terms=True, backend=backend)
    _, others = linear_distillation_loss(**full_form(a), return_terms=True, backend=backend)
    assert all(torch.equal(terms[name], others[name]) for name in others)


def test_in_shared_classifier_loss(backend):
    """SimKD's features, and a soft term without the teacher's logits."""
    a = to(device_of(backend), shared_head(temperature=T, hard_weight=0.4))
    head = {"weight": a["student_weight"], "bias": a["student_bias"], "labels": a["labels"]}
    options = {"soft_weight": 0.7, "hard_weight": 0.4, "logit_mse_weight": 0.0, "temperature": T}
    shared = {**head, **options, "student": a["student"]}
    for more in ({}, {"feature_mse_weight": 0.0}):
        expected = step(shared_classifier_loss, {**shared, **more, "teacher": a["teacher"]}, backend=backend)
        got = step(shared_classifier_loss, {**shared, **more, "teacher": keep(a)}, backend=backend)
        assert_close(got, expected, torch.float32)
    bare = keep(a, keep_features=False)
    got = step(
        shared_classifier_loss, {**shared, "feature_mse_weight": 0.0, "teacher": bare}, backend=backend
    )
    assert_close(got, expected, torch.float32)
    with pytest.raises(ValueError, match=r"teacher must hold its features \(keep_features=True\)"):
        shared_classifier_loss(**shared, teacher=bare, backend=backend)


# Errors.

KEEP_BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"teacher": 1}, TypeError, "teacher must be a floating tensor, got 1"),
    ({"weight": torch.randn(5, 3)}, ValueError, r"weight must have shape \(N, D\) with D = 4.*got \(5, 3\)"),
    ({"weight": torch.randn(5, 4).half()}, TypeError, "weight must have the dtype torch.float32 of teacher"),
    ({"bias": torch.randn(4)}, ValueError, r"bias must have shape \(5,\), got \(4,\)"),
    ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
    (
        {"temperature": torch.tensor(2.0)},
        TypeError,
        "temperature must be a float: the statistics hold for one",
    ),
    ({"logit_scale": math.inf}, ValueError, "logit_scale must be finite, got inf"),
    ({"k": 0}, ValueError, "k must be None or from 1 to the 5 classes, got 0"),
    ({"k": 6}, ValueError, "k must be None or from 1 to the 5 classes, got 6"),
    ({"k": 2.5}, ValueError, "k must be None or from 1 to the 5 classes, got 2.5"),
    ({"precision": 0.0}, ValueError, "precision must be positive, got 0.0"),
    ({"precision": "high"}, TypeError, "precision must be a float, got 'high'"),
    (
        {"precision": 0.1, "keep_features": False},
        ValueError,
        "keep_features must be True where precision is given",
    ),
    ({"chunk_rows": 0}, ValueError, "chunk_rows must be None or a positive int, got 0"),
]


@pytest.mark.parametrize("number", range(len(KEEP_BAD)), ids=lambda i: f"{'-'.join(KEEP_BAD[i][0])}-{i}")
def test_bad_input_of_precompute_teacher(number):
    changes, error, message = KEEP_BAD[number]
    arguments = {"teacher": torch.randn(3, 4), "weight": torch.randn(5, 4), "bias": torch.randn(5)}
    with pytest.raises(error, match=message):
        precompute_teacher(**{**arguments, **changes})


STEP_BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"temperature": 3.0}, ValueError, "temperature must be 2.0, for which the TeacherStatistics hold, got 3.0"),
    ({"temperature": torch.tensor(2.0)}, ValueError, "temperature must be 2.0, for which the TeacherStatistics hold"),
    ({"teacher_temperature": 1.0}, ValueError, "teacher_temperature must be 2.0, for which"),
    ({"logit_scale": 2.0}, ValueError, "logit_scale must be 1.0, for which"),
    ({"softcap": 5.0}, ValueError, "softcap must be None with TeacherStatistics, got 5.0"),
    ({"valid_classes": 3}, ValueError, "valid_classes must be None with TeacherStatistics, got 3"),
    ({"teacher_logit_scale": 1.0}, ValueError, "teacher_logit_scale must be None with TeacherStatistics, got 1.0"),
    ({"teacher_weight": torch.randn(31, 16)}, ValueError, "teacher_weight must be None or student_weight with Teach"),
    ({"soft": "jsd"}, ValueError, "teacher must be hidden states unless soft is 'kl'"),
    ({"standardize": True}, ValueError, "teacher must be hidden states unless soft is 'kl' without standardize"),
    ({"logit_mse_weight": 1.0}, ValueError, "teacher must be hidden states unless soft is 'kl'"),
    ({"student": torch.randn(5, 16)}, ValueError, r"teacher must have the student's rows \(5,\), got \(6,\)"),
    (
        {"student_weight": torch.randn(31, 16).requires_grad_()},
        ValueError,
        "student_weight must not require grad: TeacherStatistics hold for one frozen head",
    ),
    ({"student_bias": torch.randn(31).requires_grad_()}, ValueError, "student_bias must not require grad"),
    ({"teacher_log_probs": torch.randn(6, 31)}, ValueError, "log_probs must be None with TeacherStatistics"),
    ({"mask": torch.ones(6)}, TypeError, "mask must be a bool tensor, got a torch.float32"),
    ({"weights": torch.ones(5)}, ValueError, "weights must broadcast to the rows"),
    ({"student": torch.randn(6, 15)}, ValueError, "student_weight must have shape .* D = 15"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(STEP_BAD)), ids=lambda i: f"{'-'.join(STEP_BAD[i][0])}-{i}")
def test_bad_input_of_a_step(number):
    changes, error, message = STEP_BAD[number]
    a = shared_head(temperature=T)
    with pytest.raises(error, match=message):
        linear_distillation_loss(**{**a, "teacher": keep(a), **changes})


def test_without_a_soft_term_statistics_are_not_looked_at(backend):
    a = to(device_of(backend), shared_head(temperature=T, soft_weight=0.0, **HARD))
    expected = step(linear_distillation_loss, {**a, "teacher": None}, backend=backend)
    got = step(linear_distillation_loss, {**a, "teacher": keep(a)}, backend=backend)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
