"""linear_distillation_loss, linear_kl_div: against the losses of the products, in every backend."""

from __future__ import annotations

import inspect
import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import _ready, device_of
from testing import (
    assert_near,
    assert_not_vacuous,
    assert_same_bits_whatever_the_threads,
    leaves,
    run,
    three,
    to,
)
from torch import Tensor

import kdkernels
import kdkernels.ops.linear_loss as linear_module
from kdkernels import distillation_loss, kl_div, linear_distillation_loss, linear_kl_div, topk_kl_div
from kdkernels.backend import bf16_linear, has_bf16_linear
from kdkernels.ops import projection
from kdkernels.ops.distillation_loss import SOFT
from kdkernels.ops.linear_loss import Plan, plan_linear_loss
from kdkernels.ops.rows import REDUCTIONS

# What a loss through heads has gradients for.
NAMES = (
    "student",
    "student_weight",
    "student_bias",
    "teacher",
    "teacher_weight",
    "teacher_bias",
    "teacher_log_probs",
    "temperature",
    "teacher_temperature",
    "logit_scale",
    "teacher_logit_scale",
    "weights",
)
FEATURES = NAMES[:6]
HALVES = (torch.float16, torch.bfloat16)
HARD = {"hard_weight": 0.3, "label_smoothing": 0.1, "z_loss": 1e-3}
OPTIONS = {"jsd": {"beta": 0.2, "normalize": True}, "skew_reverse_kl": {"alpha": 0.3}, "dkd": {"beta": 2.0}}
DEFAULTS = {"temperature": 1.0, "soft_weight": 1.0, "hard_weight": 0.0}  # where distillation_loss has others


def batch(
    shape: tuple[int, ...] = (5,),
    classes: int = 37,
    widths: tuple[int, int] = (24, 16),
    dtype: torch.dtype = torch.float32,
    teacher_dtype: torch.dtype | None = None,
    seed: int = 0,
    **more: Any,
) -> dict[str, Any]:
    """Hidden states and heads of both sides, whose logits are of the size of 3, and labels if `hard_weight`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(size, generator=generator, dtype=torch.float64)

    arguments: dict[str, Any] = {}
    for name, width, kind in zip(("student", "teacher"), widths, (dtype, teacher_dtype or dtype)):
        arguments[name] = normal(*shape, width).to(kind)
        arguments[f"{name}_weight"] = normal(classes, width, scale=3 / math.sqrt(width)).to(kind)
        arguments[f"{name}_bias"] = normal(classes).to(kind)
    if more.get("hard_weight") or more.get("soft") in ("dkd", "nkd"):
        arguments["labels"] = (torch.arange(math.prod(shape)) * 7 % classes).view(shape)
    return {**arguments, **more}


# The loss of the products, with nothing of what is tested.


def raw_logits(side: str, arguments: dict[str, Any]) -> Tensor:
    """Before scale and cap."""
    bias = arguments.get(f"{side}_bias")
    x, weight = arguments[side], arguments[f"{side}_weight"]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def transformed(logits: Tensor, side: str, arguments: dict[str, Any]) -> Tensor:
    scale, cap = arguments.get("logit_scale"), arguments.get("softcap")
    if side == "teacher":
        scale = arguments.get("teacher_logit_scale", scale)
        cap = arguments.get("teacher_softcap", cap)
    logits = logits if scale is None else logits * scale
    return logits if cap in (None, math.inf) else cap * torch.tanh(logits / cap)


OF_PROJECTION = (*FEATURES, "softcap", "logit_scale", "teacher_softcap", "teacher_logit_scale")


def of_logits(
    student: Tensor, teacher: Tensor, arguments: dict[str, Any], backend: str = "reference"
) -> Tensor:
    rest = {
        k: v for k, v in arguments.items() if k not in (*OF_PROJECTION, "chunk_rows", "strategy", "backend")
    }
    s, t = transformed(student, "student", arguments), transformed(teacher, "teacher", arguments)
    return distillation_loss(s, t, **{**DEFAULTS, **rest}, backend=backend)


def of_products(**arguments: Any) -> Tensor:
    """The formula that the fused loss has to equal; `backend` is not looked at."""
    return of_logits(raw_logits("student", arguments), raw_logits("teacher", arguments), arguments)


def check(backend: str, arguments: dict[str, Any], **rest: Any) -> None:
    """Loss and gradients against the float64 reference, under a random upstream gradient."""
    check_once(backend, arguments, **rest)
    if backend == "cpu":  # and in chunks what one native call takes
        with mock.patch.object(linear_module, "_is_small", lambda call: False):
            check_once(backend, arguments, **rest)


def check_once(
    backend: str,
    arguments: dict[str, Any],
    *,
    function: Callable[..., Tensor] = linear_distillation_loss,
    factor: float = 0.0,
    vacuous: bool = False,
    wanted: tuple[str, ...] = NAMES,
    chunks: int = 1,
) -> None:
    truth, reference, got, upstream = three(function, backend, arguments, wanted=wanted)
    double = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in arguments.items()
    }
    rows = arguments["student"].shape[:-1]
    counts = torch.ones(rows, dtype=torch.bool)
    if "mask" in arguments:
        counts = counts & arguments["mask"]
    if "labels" in arguments:
        counts = counts & (arguments["labels"] != arguments.get("ignore_index", -100))
    for side in ("student", "teacher"):
        double[side] = torch.where(counts[..., None], double[side], 0)
    raw = {side: raw_logits(side, double).requires_grad_() for side in ("student", "teacher")}
    if function is linear_distillation_loss:
        loss = of_logits(raw["student"], raw["teacher"], double)
    else:
        sides = [transformed(raw[side], side, double) for side in raw]
        rest = {k: v for k, v in double.items() if k not in (*OF_PROJECTION, "chunk_rows", "strategy")}
        loss = kl_div(*sides, **rest, backend="reference")
    grads = dict(zip(raw, torch.autograd.grad((loss * upstream).sum(), list(raw.values()))))
    temperatures = [arguments.get("temperature", 1.0)]
    temperatures.append(arguments.get("teacher_temperature", temperatures[0]))
    t = min(float(x.min() if isinstance(x, Tensor) else x) for x in temperatures)
    largest = max(float(x.max() if isinstance(x, Tensor) else x) for x in temperatures)
    if not factor:
        squared = 1.0 if function is linear_kl_div else max(1.0, largest**2)
        factor = squared * arguments.get("soft_weight", 1.0) + arguments.get("hard_weight", 0.0)
        factor += arguments.get("logit_mse_weight", 0.0)
        factor *= {"jsd": 1 / 0.16, "dkd": 3.0, "nkd": 2.5}.get(arguments.get("soft", "kl"), 1.0)
    # How large the values are that go through the arithmetic: the products' terms, added up, over T.
    terms, scales = {}, {}
    for side in raw:
        scale = arguments.get("logit_scale", 1.0)
        scale = arguments.get("teacher_logit_scale", scale) if side == "teacher" else scale
        scales[side] = abs(float(scale))
        sizes = {k: v.abs() for k, v in double.items() if k in FEATURES and isinstance(v, Tensor)}
        if f"{side}_bias" in sizes:
            sizes[f"{side}_bias"] = torch.where(sizes[f"{side}_bias"].isinf(), 0, sizes[f"{side}_bias"])
        terms[side] = raw_logits(side, sizes)
    logit = max(1.0, *(scales[side] * terms[side].max().item() for side in raw)) / t
    weight = arguments["weights"].abs().max().item() if "weights" in arguments else 1.0
    reduction = arguments.get("reduction", "batchmean")
    each = factor * weight / (max(counts.sum().item(), 1) if reduction == "batchmean" else 1)
    summed = each * max(counts.sum().item(), 1)
    magnitudes = {
        "loss": (each if reduction == "none" else summed) * logit,
        "temperature": summed * logit * logit / t,
        "teacher_temperature": summed * logit * logit / t,
        "weights": each * logit,
    }
    # Half-precision products take their gradient G rounded, once for each step that makes it.
    halves: dict[str, Tensor | float] = {}
    for side in raw:
        w = double[f"{side}_weight"].abs()
        x = double[side].reshape(-1, w.shape[1]).abs()
        g = grads[side].reshape(-1, w.shape[0]).abs()
        flow = logit * logit if side == "teacher" else logit
        magnitude = max(1.0, scales[side]) * flow / t
        magnitudes[side] = each * magnitude * w.max().item()
        magnitudes[f"{side}_weight"] = summed * magnitude * x.max().item()
        magnitudes[f"{side}_bias"] = summed * magnitude
        of_scale = "logit_scale" if side == "student" else "teacher_logit_scale"
        magnitudes[of_scale] = summed * flow / t * logit * t
        dtype = arguments[side].dtype
        u = torch.finfo(dtype).eps / 2 if dtype in HALVES else 0.0
        steps = 1 + (scales[side] != 1) + ("softcap" in arguments)
        halves[side] = steps * u * (g @ w).view(double[side].shape)
        halves[f"{side}_weight"] = (steps + chunks) * u * (g.T @ x)
        halves[f"{side}_bias"] = (steps + chunks) * u * g.sum(0)
        halves[of_scale] = (steps + 1) * u * float((g * terms[side].view_as(g)).sum()) / scales[side]
    if "logit_scale" in arguments and "teacher_logit_scale" not in arguments:  # one for both sides
        halves["logit_scale"] += halves["teacher_logit_scale"]  # type: ignore[operator]
        magnitudes["logit_scale"] += magnitudes["teacher_logit_scale"]
    assert_near(got[0], truth[0], reference[0], magnitudes["loss"], "loss")
    if not vacuous:
        assert_not_vacuous(truth[0], reference[0], magnitudes["loss"])
    for name, true in truth[1].items():
        more = (magnitudes[name], name, halves.get(name, 0.0))
        assert_near(got[1][name], true, reference[1][name], *more)
        if not vacuous:
            assert_not_vacuous(true, reference[1][name], magnitudes[name], halves.get(name, 0.0))


def assert_equal_to_rounding(got: Tensor, expected: Tensor, what: str) -> None:
    assert got.shape == expected.shape, what
    assert (got - expected).abs().max() <= 1e-10 * expected.abs().max(), what


def row_arguments(shape: tuple[int, ...], **more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(shape, generator=generator) < 0.7
    mask.flatten()[0], mask.flatten()[-1] = True, False
    return {
        "temperature": 0.5 + 2 * torch.rand(shape, generator=generator),
        "teacher_temperature": 0.5 + 2 * torch.rand(shape[-1:], generator=generator),
        "weights": torch.rand(shape, generator=generator) - 0.3,
        "mask": mask,
        **more,
    }


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
@pytest.mark.parametrize("soft", SOFT)
def test_formula(backend, soft):
    """The loss of the products, with every argument there is, in float64."""
    arguments = batch((2, 4), 11, (6, 5), torch.float64, soft=soft, **HARD, **OPTIONS.get(soft, {}))
    arguments |= {k: v.double() if k != "mask" else v for k, v in row_arguments((2, 4)).items()}
    arguments["labels"] = arguments["labels"].clone()
    arguments["labels"][0, 1] = -7
    arguments |= {"softcap": 8.0, "logit_scale": torch.tensor(0.7).double(), "ignore_index": -7}
    arguments |= {"teacher_softcap": math.inf, "teacher_logit_scale": torch.tensor(1.3).double()}
    for reduction in REDUCTIONS:
        size = (2, 4) if reduction == "none" else ()
        upstream = torch.rand(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        shared = {**arguments, "reduction": reduction}
        expected, true_gradients = run(of_products, shared, upstream, wanted=NAMES)
        ours = partial(linear_distillation_loss, backend=backend, chunk_rows=3)
        loss, gradients = run(ours, shared, upstream, wanted=NAMES)
        assert_equal_to_rounding(loss, expected, "loss")
        assert gradients.keys() == true_gradients.keys() and len(gradients) == 11
        for name, true in true_gradients.items():
            assert_equal_to_rounding(gradients[name], true, name)


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
def test_formula_of_the_logits_mse(backend):
    arguments = batch((6,), 11, (6, 5), torch.float64, soft_weight=0.4, hard_weight=0.2, temperature=2.0)
    arguments["mask"] = torch.arange(6) != 2
    s, t = raw_logits("student", arguments), raw_logits("teacher", arguments)
    for soft_weight in (0.0, 0.4):
        plain = {**arguments, "soft_weight": soft_weight}

        def with_mse(plain=plain, **a):
            s, t = raw_logits("student", a), raw_logits("teacher", a)
            mse = ((s - t) ** 2).mean(-1)[a["mask"]].mean()
            a["soft_weight"] = plain["soft_weight"]
            return of_logits(s, t, a) + 0.7 * mse

        expected, true_gradients = run(with_mse, plain, wanted=FEATURES)
        ours = partial(linear_distillation_loss, logit_mse_weight=0.7, backend=backend, chunk_rows=4)
        loss, gradients = run(ours, plain, wanted=FEATURES)
        assert_equal_to_rounding(loss, expected, "loss")
        for name, true in true_gradients.items():
            assert_equal_to_rounding(gradients[name], true, name)
    # Alone, it is F.mse_loss of the products.
    alone = linear_distillation_loss(
        **{k: arguments[k] for k in FEATURES}, soft_weight=0.0, logit_mse_weight=1.0, backend=backend
    )
    assert_equal_to_rounding(alone, F.mse_loss(s, t), "alone")


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
def test_formula_of_linear_kl_div(backend, reverse, standardize):
    """No T²."""
    arguments = batch((7,), 12, (6, 5), torch.float64, temperature=3.0, teacher_temperature=2.0)

    def expected(**a):
        s, t = raw_logits("student", a), raw_logits("teacher", a)
        if standardize:
            s, t = ((x - x.mean(-1, keepdim=True)) / (1e-7 + x.std(-1, keepdim=True)) for x in (s, t))
        log_q, log_p = torch.log_softmax(s / 3, -1), torch.log_softmax(t / 2, -1)
        p, q = (log_q, log_p) if reverse else (log_p, log_q)
        return F.kl_div(q, p, reduction="batchmean", log_target=True)

    ours = partial(linear_kl_div, reverse=reverse, standardize=standardize, backend=backend)
    (loss, gradients), (truth, true_gradients) = (
        run(f, arguments, wanted=FEATURES) for f in (ours, expected)
    )
    assert_equal_to_rounding(loss, truth, "loss")
    for name, true in true_gradients.items():
        assert_equal_to_rounding(gradients[name], true, name)


def test_closed_forms(backend):
    device = device_of(backend)
    a = to(device, batch((6,), 9, (9, 9)))
    shared = {"temperature": 2.0, "backend": backend}
    eye = torch.eye(9, device=device)
    # Through the identity, hidden states are logits.
    torch.testing.assert_close(
        linear_kl_div(a["student"], eye, a["teacher"], eye, **shared),
        kl_div(a["student"], a["teacher"], temperature=2.0, backend="reference"),
    )
    # A teacher that knows nothing: log N − H(u, Q).
    nothing = torch.zeros_like(a["teacher"])
    logits = F.linear(a["student"], a["student_weight"], a["student_bias"])
    uniform = linear_kl_div(
        a["student"],
        a["student_weight"],
        nothing,
        a["teacher_weight"],
        student_bias=a["student_bias"],
        **shared,
    )
    expected = -math.log(9) - torch.log_softmax(logits / 2, -1).mean(-1).mean()
    torch.testing.assert_close(uniform, expected)
    # Cross-entropy alone needs no teacher.
    labels = torch.arange(6, device=device)
    student = a["student"].clone().requires_grad_()
    weight = a["student_weight"].clone().requires_grad_()
    hard = linear_distillation_loss(
        student, weight, None, None, labels, soft_weight=0.0, hard_weight=1.0, backend=backend
    )
    hard.backward()
    raw = student.detach() @ weight.detach().T
    torch.testing.assert_close(hard.detach(), F.cross_entropy(raw, labels))
    grad = (torch.softmax(raw, -1) - F.one_hot(labels, 9)) / 6
    torch.testing.assert_close(student.grad, grad @ weight.detach())
    torch.testing.assert_close(weight.grad, grad.T @ student.detach())
    # The gradient of T² KL: T (Q − P).
    student.grad = weight.grad = None
    linear_distillation_loss(student, weight, a["teacher"], a["teacher_weight"], **shared).backward()
    p = torch.softmax(a["teacher"] @ a["teacher_weight"].T / 2, -1)
    grad = 2 * (torch.softmax(raw / 2, -1) - p) / 6
    torch.testing.assert_close(student.grad, grad @ weight.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad, grad.T @ student.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("soft", SOFT)
def test_every_loss(backend, soft):
    arguments = batch((5,), 37, temperature=2.0, soft=soft, **HARD, **OPTIONS.get(soft, {}))
    check(backend, arguments)
    if soft in ("kl", "dkd"):
        check(backend, {**arguments, "chunk_rows": 2, "standardize": True})


def test_kl_div(backend):
    for reverse in (False, True):
        function = partial(linear_kl_div, reverse=reverse)
        arguments = batch((5,), 37, temperature=2.0)
        truth, _, got, _ = three(function, backend, arguments, wanted=FEATURES)
        torch.testing.assert_close(got[0].double(), truth[0], rtol=1e-5, atol=1e-6)
        for name, true in truth[1].items():
            assert (got[1][name] - true).norm() < 1e-5 * true.norm(), name
    check(backend, batch((5,), 37, temperature=2.0), function=linear_kl_div)


@pytest.mark.parametrize("soft", ["kl", "dkd", "tvd"])
def test_every_dtype(backend_dtype, soft):
    backend, dtype = backend_dtype
    check(backend, batch((5,), 37, dtype=dtype, temperature=2.0, soft=soft, **HARD, **OPTIONS.get(soft, {})))


def test_logits_mse(backend_dtype):
    backend, dtype = backend_dtype
    check(backend, batch((5,), 37, dtype=dtype, logit_mse_weight=0.6, hard_weight=0.2, temperature=2.0))
    check(backend, batch((5,), 37, dtype=dtype, logit_mse_weight=0.6, soft_weight=0.0))


def test_row_arguments(backend):
    arguments = batch((2, 4), 21, **HARD) | row_arguments((2, 4))
    arguments["labels"] = arguments["labels"].clone()
    arguments["labels"][0, 2] = -100
    for reduction in REDUCTIONS:
        check(backend, {**arguments, "reduction": reduction})
    check(backend, {**arguments, "chunk_rows": 3, "reduction": "none"})


def test_one_learnable_temperature_for_both(backend):
    """Its derivative goes through both sides, and through T²."""
    check(backend, batch((4,), 30, temperature=torch.tensor(2.5)))
    check(backend, batch((4,), 30, temperature=torch.tensor(2.5), soft="nkd", chunk_rows=3))


def test_scale_and_cap(backend_dtype):
    """Learnt and fixed, one for both sides and one each."""
    backend, dtype = backend_dtype
    scale, other = torch.tensor(0.6), torch.tensor(1.7)
    shared = {"dtype": dtype, "temperature": 1.5, **HARD}
    for options in (
        {"softcap": 4.0, "logit_scale": scale},
        {"softcap": 4.0, "teacher_softcap": 7.0, "logit_scale": scale, "teacher_logit_scale": other},
        {"logit_scale": 0.5, "teacher_softcap": 3.0},
    ):
        check(backend, batch((4,), 19, **shared, **options))
    check(backend, batch((4,), 19, **shared, softcap=4.0, logit_scale=scale, chunk_rows=3), chunks=2)


def test_the_cap_caps(backend):
    """Its derivative is not that of the identity, and far out the gradient is nothing."""
    a = batch((4,), 19)
    a["student"] = 40 * a["student"]
    check(backend, {**a, "softcap": 6.0}, vacuous=True)
    flat, _ = run(partial(linear_distillation_loss, softcap=1e-3, backend=backend), to(device_of(backend), a))
    assert flat.abs() < 1e-4  # both uniform


@pytest.mark.parametrize("regime", ["near", "far", "uniform"])
def test_regimes(backend, regime):
    arguments = batch((4,), 40, (16, 16), temperature=2.0)
    if regime == "near":
        for part in ("", "_weight", "_bias"):
            noise = torch.randn(arguments[f"teacher{part}"].shape, generator=torch.Generator().manual_seed(9))
            arguments[f"student{part}"] = arguments[f"teacher{part}"] * (1 + 1e-3 * noise)
    elif regime == "far":
        for side in ("student", "teacher"):
            arguments[side] = 300 * arguments[side]
    else:
        arguments["teacher"] = torch.zeros_like(arguments["teacher"])
        del arguments["teacher_bias"]
    check(backend, arguments, vacuous=True)
    if regime == "uniform":
        check(backend, arguments, wanted=("student", "student_weight", "student_bias"))


def test_equal_sides_give_exactly_zero(backend):
    a = batch((5,), 33, (16, 16), temperature=3.0)
    for part in ("", "_weight", "_bias"):
        a[f"student{part}"] = a[f"teacher{part}"].clone()
    for chunk_rows in (None, 2):
        ours = partial(linear_distillation_loss, chunk_rows=chunk_rows, backend=backend)
        loss, gradients = run(ours, to(device_of(backend), a), wanted=NAMES)
        if backend != "reference":
            assert loss == 0
            assert all((gradient == 0).all() for gradient in gradients.values())
        assert loss.abs() < 1e-6


def test_rows_that_do_not_count_may_hold_anything(backend):
    arguments = batch((6,), 23, temperature=2.0, soft_weight=0.7, **HARD)
    mask = torch.tensor([True, False, True, True, False, True])
    arguments |= {"mask": mask, "weights": torch.rand(6) + 0.5}
    dirty = {k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    dirty["student"][1], dirty["student"][4] = math.nan, math.inf
    dirty["teacher"][1], dirty["teacher"][4] = -math.inf, math.nan
    dirty["labels"][1], dirty["labels"][4] = 10**6, -5
    dirty["weights"][1] = math.nan
    for reduction in REDUCTIONS:
        for chunk_rows in (None, 2):
            ours = partial(
                linear_distillation_loss, reduction=reduction, chunk_rows=chunk_rows, backend=backend
            )
            size = (6,) if reduction == "none" else ()
            upstream = torch.full(size, 0.5, device=device_of(backend))
            (loss, gradients), (expected, clean) = (
                run(ours, to(device_of(backend), a), upstream, wanted=NAMES) for a in (dirty, arguments)
            )
            assert torch.equal(loss, expected)
            for name, gradient in gradients.items():
                assert torch.equal(gradient, clean[name]), name
                if name in ("student", "teacher", "weights"):
                    assert (gradient[~mask] == 0).all() and (gradient[mask] != 0).any(), name
    # And it is the loss of the other rows alone.
    few = {
        k: v[mask] if k in ("student", "teacher", "labels", "weights") else v for k, v in arguments.items()
    }
    del few["mask"]
    ours = partial(linear_distillation_loss, backend=backend)
    (loss, gradients), (alone, of_few) = (
        run(ours, to(device_of(backend), a), wanted=NAMES) for a in (arguments, few)
    )
    torch.testing.assert_close(loss, alone)
    for name, gradient in of_few.items():
        picked = gradients[name][mask] if name in ("student", "teacher", "weights") else gradients[name]
        torch.testing.assert_close(picked, gradient, rtol=1e-5, atol=1e-6)


def test_ignored_labels(backend):
    """A row whose label is ignored is one that does not count, for the soft term as well."""
    arguments = to(device_of(backend), batch((6,), 23, temperature=2.0, **HARD))
    labels = arguments.pop("labels").clone()
    labels[2] = labels[5] = 4
    with_labels = {**arguments, "labels": labels, "ignore_index": 4}
    masked = {**arguments, "labels": labels.clone(), "mask": labels != 4}
    ours = partial(linear_distillation_loss, backend=backend)
    (loss, gradients), (expected, others) = (run(ours, a, wanted=FEATURES) for a in (with_labels, masked))
    assert torch.equal(loss, expected)
    assert all(torch.equal(gradient, others[name]) for name, gradient in gradients.items())
    assert (gradients["student"][2] == 0).all() and (gradients["student"][1] != 0).any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_ignored(backend, reduction):
    arguments = batch((4,), 23, **HARD, reduction=reduction, temperature=torch.tensor(2.0))
    arguments |= {"weights": torch.ones(4), "logit_scale": torch.tensor(1.5)}
    for none in ({"mask": torch.zeros(4, dtype=torch.bool)}, {"labels": torch.full((4,), -100)}):
        a = leaves(to(device_of(backend), {**arguments, **none}))
        loss = linear_distillation_loss(**a, backend=backend)
        assert (loss == 0).all() and loss.requires_grad
        loss.sum().backward()
        for name in NAMES:
            if name in a:
                assert a[name].grad is not None and (a[name].grad == 0).all(), name


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_twice_is_the_same_twice(backend, reduction):
    """And nothing that the first backward gave is written by the second."""
    arguments = batch((5,), 23, temperature=torch.tensor(2.0), **HARD, reduction=reduction, chunk_rows=2)
    a = leaves(to(device_of(backend), arguments))
    inputs = [a[name] for name in NAMES if name in a]
    loss = linear_distillation_loss(**a, backend=backend)
    upstream = torch.full_like(loss, 0.75)
    found = [torch.autograd.grad(loss, inputs, upstream, retain_graph=True) for _ in range(3)]
    kept = [x.clone() for x in found[0]]
    doubled = torch.autograd.grad(loss, inputs, 2 * upstream)
    for one, two, three_, copy, twice in zip(*found, kept, doubled):
        assert torch.equal(one, two) and torch.equal(one, three_) and torch.equal(one, copy)
        assert (one != 0).any()
        torch.testing.assert_close(twice, 2 * one, rtol=1e-5, atol=1e-7)


def test_upstream_gradient(backend):
    """The loss times a number, and each row's times its own."""
    a = to(device_of(backend), batch((5,), 23, temperature=2.0, **HARD))
    rows = torch.tensor([0.5, -2.0, 0.0, 1.0, 3.0], device=device_of(backend))
    ours = partial(linear_distillation_loss, **a, backend=backend)

    def gradients(loss):
        return torch.autograd.grad(loss, inputs)

    inputs = [a[name].requires_grad_() for name in FEATURES]
    for got, expected in zip(gradients(-3 * ours()), gradients(ours())):
        torch.testing.assert_close(got, -3 * expected)
    each = gradients((ours(reduction="none") * rows).sum())
    weighted = gradients(ours(weights=rows, reduction="sum"))
    for name, got, expected in zip(FEATURES, each, weighted):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, msg=name)
    assert (each[0][2] == 0).all() and (each[0][1] != 0).any()


SUBSETS = [
    *((name,) for name in (*FEATURES, "temperature", "logit_scale", "weights")),
    ("student", "teacher"),
    ("student_weight", "teacher_bias"),
]


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_only_what_requires_grad(backend, reduction):
    """Each input alone gets the gradient that it gets among all, and the others none."""
    arguments = batch((4,), 17, temperature=torch.tensor(2.0), logit_scale=torch.tensor(0.8), **HARD)
    arguments |= {"weights": torch.rand(4) + 0.5, "reduction": reduction, "chunk_rows": 3}
    arguments = to(device_of(backend), arguments)
    ours = partial(linear_distillation_loss, backend=backend)
    upstream = torch.full((4,) if reduction == "none" else (), 0.5, device=device_of(backend))
    loss, every = run(ours, arguments, upstream, wanted=NAMES)
    for wanted in SUBSETS:
        a = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}
        for name in wanted:
            a[name].requires_grad_()
        some = ours(**a)
        some.backward(upstream)
        torch.testing.assert_close(some.detach(), loss)
        for name in NAMES:
            if name in wanted:
                torch.testing.assert_close(a[name].grad, every[name], rtol=1e-5, atol=1e-6)
            elif name in a:
                assert a[name].grad is None


class Products:
    """How many products there were, and of how many rows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: dict[str, list[int]] = {}
        for name in ("logits", "grad_features", "add_grad_weight_"):
            monkeypatch.setattr(projection, name, self.counted(name, getattr(projection, name)))

    def counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            x = arguments[1] if name == "add_grad_weight_" else arguments[0]
            self.rows.setdefault(name, []).append(x.shape[0])
            return function(*arguments, **options)

        return call

    def taken(self) -> tuple[int, int, int]:
        names = ("logits", "grad_features", "add_grad_weight_")
        found = tuple(len(self.rows.get(name, [])) for name in names)
        self.rows.clear()
        return found


@pytest.fixture
def products(monkeypatch):
    _ready_cpu()
    return Products(monkeypatch)


def _ready_cpu() -> None:
    if kdkernels.available_backends("cpu")["cpu"] != "available":
        pytest.skip(kdkernels.available_backends("cpu")["cpu"])


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (("student",), (2, 1, 0)),
        (("student", "student_weight"), (2, 1, 1)),
        (("student", "student_weight", "student_bias"), (2, 1, 1)),
        (("student_weight",), (2, 0, 1)),
        (("student_bias",), (2, 0, 0)),
        (("teacher",), (2, 1, 0)),
        (("teacher_weight",), (2, 0, 1)),
        (("student", "teacher"), (2, 2, 0)),
        (FEATURES, (2, 2, 2)),
        (("temperature",), (2, 0, 0)),
    ],
    ids=lambda x: "-".join(x) if isinstance(x[0], str) else "",
)
def test_what_is_frozen_costs_no_product(products, wanted, expected):
    arguments = batch((4,), 17, temperature=torch.tensor(2.0))
    for chunk_rows, chunks in ((4, 1), (2, 2)):
        a = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}
        for name in wanted:
            a[name].requires_grad_()
        loss = linear_distillation_loss(**a, chunk_rows=chunk_rows, backend="cpu")
        assert products.taken() == tuple(chunks * x for x in expected)
        loss.backward(retain_graph=True)
        assert products.taken() == (0, 0, 0)  # the forward had them
        loss.backward()
        assert products.taken() == tuple(chunks * x for x in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "classes", "widths"),
    [(1, 1, (1, 1)), (9, 17, (520, 1030)), (37, 100, (64, 48)), (70, 49, (17, 32))],
)
def test_one_native_call(products, rows, classes, widths, dtype):
    """Sizes that do not fill the registers and blocks of the kernel, and that do."""
    _ready("cpu", {"dtype": dtype})
    arguments = batch((rows,), classes, widths, dtype, temperature=2.0, **HARD)
    check_once("cpu", arguments, vacuous=classes == 1)
    assert products.taken() == (0, 0, 0)


def test_one_native_call_whatever_the_threads(products):
    arguments = batch((70,), 100, (128, 64), temperature=2.0, **HARD)

    def found():
        loss, gradients = run(partial(linear_distillation_loss, backend="cpu"), arguments, torch.tensor(1.0))
        return loss, *gradients.values()

    assert_same_bits_whatever_the_threads(found)
    assert products.taken() == (0, 0, 0)


def test_one_native_call_refuses_a_label_that_is_no_class(products):
    arguments = batch((5,), 17, **HARD)
    arguments["labels"][3] = 17
    with pytest.raises(ValueError, match=r"labels must be in \[0, 17\) where they count, got 17"):
        linear_distillation_loss(**arguments, backend="cpu")
    assert products.taken() == (0, 0, 0)


def test_no_gradient_no_product(products):
    a = batch((4,), 17, **HARD)
    options = {"chunk_rows": 4, "backend": "cpu"}
    linear_distillation_loss(**a, **options)
    assert products.taken() == (2, 0, 0)
    with torch.no_grad():
        linear_distillation_loss(**leaves(a), **options)
    assert products.taken() == (2, 0, 0)
    linear_distillation_loss(**a, **options, soft_weight=0.0)  # a teacher that is not looked at
    assert products.taken() == (1, 0, 0)
    log_probs = torch.randn(4, 17)
    linear_kl_div(a["student"], a["student_weight"], teacher_log_probs=log_probs, **options)
    assert products.taken() == (1, 0, 0)
    # With reduction "none" the backward forms the logits again.
    loss = linear_distillation_loss(**leaves(a), **options, reduction="none")
    assert products.taken() == (2, 0, 0)
    loss.sum().backward()
    assert products.taken() == (2, 2, 2)


def test_rows_that_do_not_count_are_not_projected(products):
    a = batch((8,), 17)
    mask = torch.tensor([True, False, False, True, False, False, True, False])
    a["student"].requires_grad_()
    linear_distillation_loss(**a, mask=mask, chunk_rows=8, backend="cpu").backward()
    assert products.rows == {"logits": [3, 3], "grad_features": [3]}


def test_one_head_is_read_once(products):
    a = batch((4,), 17, (24, 24))
    linear_kl_div(
        a["student"], a["student_weight"], a["teacher"], a["student_weight"], chunk_rows=4, backend="cpu"
    )
    assert products.rows == {"logits": [8]}


@pytest.mark.parametrize("biases", ["shared", "separate", "none"])
@pytest.mark.parametrize("frozen", [False, True])
def test_one_head_for_both(backend, biases, frozen):
    """student_weight is teacher_weight: its gradient is that of both sides."""
    arguments = batch((5,), 23, (24, 24), temperature=2.0, **HARD)
    del arguments["teacher_weight"]
    if biases != "separate":
        del arguments["teacher_bias"]
    if biases == "none":
        del arguments["student_bias"]

    def both(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(student_weight: Tensor, **a: Any) -> Tensor:
            if biases == "shared":
                a["teacher_bias"] = a["student_bias"]
            return function(student_weight=student_weight, teacher_weight=student_weight, **a)

        return call

    wanted = ("student", "teacher") if frozen else FEATURES
    for more in ({}, {"chunk_rows": 2}, {"reduction": "none"}, {"softcap": 5.0, "logit_scale": 0.7}):
        a = {**arguments, **more}
        truth, _, got, upstream = three(both(linear_distillation_loss), backend, a, wanted=wanted)
        # What the formula has, where autograd adds up both sides.
        formula, of_formula = run(both(of_products), a, upstream, torch.float64, wanted)
        torch.testing.assert_close(truth[0], formula, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(got[0].double(), formula, rtol=1e-5, atol=1e-6)
        assert got[1].keys() == of_formula.keys()
        for name, true in of_formula.items():
            torch.testing.assert_close(truth[1][name], true, rtol=1e-9, atol=1e-12)
            assert (got[1][name] - true).norm() < 1e-5 * true.norm(), name


def test_one_head_of_which_only_the_bias_learns(backend):
    arguments = batch((5,), 23, (24, 24), temperature=2.0)
    weight = arguments.pop("teacher_weight"), arguments.pop("teacher_bias")
    del weight

    def call(function, student_bias, **a):
        heads = {"teacher_weight": a["student_weight"], "teacher_bias": student_bias}
        return function(student_bias=student_bias, **a, **heads)

    for wanted in (("student_bias",), ("student_weight",)):
        _, _, got, upstream = three(
            partial(call, linear_distillation_loss), backend, arguments, wanted=wanted
        )
        _, true = run(partial(call, of_products), arguments, upstream, torch.float64, wanted)
        for name in wanted:
            assert (got[1][name] - true[name]).norm() < 1e-5 * true[name].norm(), name


@pytest.mark.parametrize("pair", [(torch.float32, torch.float16), (torch.float16, torch.float32)], ids=str)
def test_sides_of_two_dtypes(backend, pair):
    dtype, teacher_dtype = pair
    check(backend, batch((5,), 37, dtype=dtype, teacher_dtype=teacher_dtype, temperature=2.0))


def test_sides_of_bfloat16_and_float32_on_the_cpu():
    _ready_cpu()
    for dtype, teacher_dtype in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        check("cpu", batch((5,), 37, dtype=dtype, teacher_dtype=teacher_dtype, temperature=2.0, **HARD))
        check("cpu", batch((5,), 37, (16, 16), dtype=dtype, teacher_dtype=teacher_dtype))


@pytest.mark.parametrize(
    ("ranges", "start", "teacher_start", "count"),
    [
        ({"valid_classes": 20}, 0, 0, 20),
        ({"valid_classes": (3, 20)}, 3, 3, 17),
        ({"valid_classes": (3, 20), "teacher_valid_classes": (1, 18)}, 3, 1, 17),
        ({"teacher_valid_classes": (2, 25), "valid_classes": 23}, 0, 2, 23),
    ],
    ids=str,
)
def test_valid_classes(backend, ranges, start, teacher_start, count):
    """The loss of the classes that there are; the others' weights get exactly 0."""
    arguments = batch((5,), 25, temperature=2.0, **HARD)
    arguments["labels"] = start + arguments["labels"] % count

    def sliced(**a):
        begins = {"student": start, "teacher": teacher_start}
        for side, begin in begins.items():
            for part in ("weight", "bias"):
                a[f"{side}_{part}"] = a[f"{side}_{part}"][begin : begin + count]
        return of_products(**{**a, "labels": a["labels"] - start})

    for side, begin in (
        ("student", start),
        ("teacher", teacher_start),
    ):  # what is not there may hold anything
        arguments[f"{side}_weight"][:begin] = arguments[f"{side}_weight"][begin + count :] = math.nan
        arguments[f"{side}_bias"][begin + count :] = math.inf
    for more in ({}, {"chunk_rows": 2}):
        ours = partial(linear_distillation_loss, **ranges, **more)
        truth, _, got, upstream = three(ours, backend, arguments, wanted=FEATURES)
        formula, of_formula = run(sliced, arguments, upstream, torch.float64, FEATURES)
        torch.testing.assert_close(truth[0], formula, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(got[0].double(), formula, rtol=1e-5, atol=1e-6)
        for name, true in of_formula.items():
            torch.testing.assert_close(truth[1][name], true, rtol=1e-9, atol=1e-12)
            assert (got[1][name] - true).norm() < 1e-5 * true.norm(), name
        for side, begin in (("student", start), ("teacher", teacher_start)):
            padding = torch.ones(25, dtype=torch.bool)
            padding[begin : begin + count] = False
            for part in ("weight", "bias"):
                assert (got[1][f"{side}_{part}"][padding] == 0).all()
                assert (got[1][f"{side}_{part}"][~padding] != 0).any()


def test_heads_of_different_sizes(backend):
    """A teacher with a padded head."""
    arguments = batch((4,), 30, temperature=2.0)
    for part in ("weight", "bias"):
        arguments[f"student_{part}"] = arguments[f"student_{part}"][:21].clone()
    ours = partial(linear_distillation_loss, valid_classes=21)
    truth, _, got, upstream = three(ours, backend, arguments, wanted=FEATURES)

    def sliced(teacher_weight, teacher_bias, **a):
        return of_products(teacher_weight=teacher_weight[:21], teacher_bias=teacher_bias[:21], **a)

    formula, of_formula = run(sliced, arguments, upstream, torch.float64, FEATURES)
    torch.testing.assert_close(got[0].double(), formula, rtol=1e-5, atol=1e-6)
    for name, true in of_formula.items():
        torch.testing.assert_close(truth[1][name], true, rtol=1e-9, atol=1e-12)
        assert (got[1][name] - true).norm() < 1e-5 * true.norm(), name


def test_minus_infinity(backend):
    """Classes of no mass: on both sides, on the teacher's, and (the loss is then infinite) on the student's."""
    arguments = batch((4,), 25, temperature=2.0, **HARD)
    arguments["labels"] = arguments["labels"] % 20
    arguments["student_bias"][22:] = -math.inf
    arguments["teacher_bias"][20:] = -math.inf
    for more in ({}, {"logit_scale": 0.5, "chunk_rows": 3}):
        _, _, (loss, gradients), _ = three(
            linear_distillation_loss, backend, {**arguments, **more}, wanted=FEATURES
        )
        assert loss.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        for name in ("student_weight", "student_bias"):
            assert (gradients[name][22:] == 0).all() and (gradients[name][:22] != 0).any(), name
        check(backend, {**arguments, **more})
    arguments["teacher_bias"][23] = 1.0
    loss = linear_distillation_loss(**to(device_of(backend), arguments), backend=backend)
    assert loss == math.inf


def test_minus_infinity_and_a_learnt_scale(backend):
    """u ∂/∂u is 0 for a class of no mass: 0 · ∞ = 0."""
    arguments = batch((4,), 25, temperature=2.0, logit_scale=torch.tensor(0.8))
    arguments["student_bias"][22:] = -math.inf
    arguments["teacher_bias"][22:] = -math.inf
    few = {
        k: v[:22] if k in FEATURES and k not in ("student", "teacher") else v for k, v in arguments.items()
    }
    _, _, got, upstream = three(
        linear_distillation_loss, backend, arguments, wanted=("student", "logit_scale")
    )
    loss, true = run(linear_distillation_loss, few, upstream, torch.float64, ("student", "logit_scale"))
    torch.testing.assert_close(got[0].double(), loss, rtol=1e-5, atol=1e-6)
    for name, gradient in true.items():
        torch.testing.assert_close(got[1][name].double(), gradient, rtol=1e-4, atol=1e-5)


def test_a_scale_of_zero(backend):
    """Equal logits on that side; the scale's gradient is not divided by it."""
    arguments = batch((4,), 25, logit_scale=torch.tensor(0.0), teacher_logit_scale=torch.tensor(1.0))
    wanted = ("student", "student_weight", "logit_scale")
    _, _, got, upstream = three(linear_distillation_loss, backend, arguments, wanted=wanted)
    specification = partial(linear_distillation_loss, backend="reference")
    loss, true = run(specification, arguments, upstream, torch.float64, wanted)
    torch.testing.assert_close(got[0].double(), loss, rtol=1e-5, atol=1e-6)
    for name, gradient in true.items():
        torch.testing.assert_close(got[1][name].double(), gradient, rtol=1e-4, atol=1e-5)
    assert true["logit_scale"] != 0


TILED = {
    "kl": HARD,
    "one head": {**HARD, "shared": True},
    "reverse_kl, rows": {"soft": "reverse_kl", "reduction": "none", "temperature": torch.tensor(1.5)},
    "jsd, ranges": {"soft": "jsd", "valid_classes": (0, 30), "teacher_valid_classes": (4, 34)},
    "tvd, weights": {"soft": "tvd", "weights": torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0])},
    "mask": {"mask": torch.tensor([True, False, True, True, False])},
    "cap and scale": {"softcap": 5.0, "logit_scale": 1.3, "logit_mse_weight": 0.3},
}


@pytest.mark.parametrize("case", TILED)
def test_tiles(case, request):
    """strategy="tiles" through the op: what the chunks give, with every gradient."""
    backend = _ready("triton", request)
    more = dict(TILED[case])
    shared = more.pop("shared", False)
    arguments = batch((5,), 37, (24, 24) if shared else (24, 16), **more)
    if shared:
        for name in ("weight", "bias"):
            arguments[f"teacher_{name}"] = arguments[f"student_{name}"]
    found = []
    for name, options in (("reference", {}), (backend, {"strategy": "tiles"})):
        given = to(device_of(name), arguments)
        given = {
            k: v.requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in given.items()
        }
        if shared:
            given |= {f"teacher_{name}": given[f"student_{name}"] for name in ("weight", "bias")}
        loss, terms = linear_distillation_loss(**given, return_terms=True, backend=name, **options)
        leaf = {k: v for k, v in given.items() if isinstance(v, Tensor) and v.requires_grad}
        leaf = {id(v): v for v in leaf.values()}
        upstream = torch.linspace(0.5, 2.0, max(loss.numel(), 1), device=loss.device).view(loss.shape)
        gradients = torch.autograd.grad(loss, list(leaf.values()), upstream)
        found.append([loss, *terms.values(), *gradients])
    for want, got in zip(*found):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-5)
        assert want.shape == got.shape
    assert all(gradient.abs().max() > 1e-3 for gradient in found[0][-len(gradients) :])


@pytest.mark.parametrize("options", [{"backend": "cpu"}, {"soft": "dkd"}, {"standardize": True}])
def test_tiles_that_there_are_not(options, request):
    options = {"backend": _ready("triton", request), **options}
    with pytest.raises(ValueError, match="strategy must be"):
        linear_distillation_loss(**to(device_of(options["backend"]), batch()), strategy="tiles", **options)


# A teacher known by log-probabilities.


def with_log_probs(k: int | None, **more: Any) -> dict[str, Any]:
    arguments = batch((5,), 31, **more)
    t = arguments.get("temperature", 1.0)
    log_probs = torch.log_softmax(raw_logits("teacher", arguments) / (1 if k is None else t), -1)
    for name in ("teacher", "teacher_weight", "teacher_bias"):
        del arguments[name]
    arguments["teacher_log_probs"] = log_probs.detach()
    if k is not None:
        arguments["teacher_log_probs"], arguments["teacher_indices"] = log_probs.topk(k)
    return arguments


def of_log_probs(student, student_weight, student_bias, teacher_log_probs, labels=None, **a):
    a.pop("backend", None)
    s = raw_logits(
        "student", {"student": student, "student_weight": student_weight, "student_bias": student_bias}
    )
    indices, tail = a.pop("teacher_indices", None), a.pop("tail", "bucket")
    if indices is None:
        rest = {**DEFAULTS, **a}
        return distillation_loss(s, teacher_log_probs, labels, **rest, backend="reference")
    t, mask, soft_weight = a.get("temperature", 1.0), a.get("mask"), a.get("soft_weight", 1.0)
    if labels is not None:
        labelled = labels != -100
        mask = labelled if mask is None else mask & labelled
    soft = topk_kl_div(
        s,
        teacher_log_probs,
        indices,
        temperature=t,
        tail=tail,
        mask=mask,
        reduction="none",
        backend="reference",
    )
    rows = soft_weight * t**2 * soft
    if labels is not None:
        hard = F.cross_entropy(s, labels, reduction="none", label_smoothing=a.get("label_smoothing", 0.0))
        rows = rows + torch.where(mask, a["hard_weight"] * hard, 0)
    z = a.get("z_loss", 0.0) * torch.logsumexp(s, -1) ** 2
    rows = rows + (z if mask is None else torch.where(mask, z, 0))
    rows = rows * a["weights"] if "weights" in a else rows
    return rows.sum() / (len(rows) if mask is None else mask.sum())


OF_LOG_PROBS = ("student", "student_weight", "student_bias", "teacher_log_probs", "temperature", "weights")


@pytest.mark.parametrize("case", ["dense", "bucket", "renormalize", "drop"])
def test_log_probs(backend, case):
    shared = {"temperature": torch.tensor(2.0), "soft_weight": 0.8, **HARD}
    arguments = with_log_probs(None if case == "dense" else 6, **shared)
    arguments |= {"mask": torch.tensor([True, True, False, True, True]), "weights": torch.rand(5) + 0.5}
    arguments["labels"][1] = -100
    if case != "dense":
        arguments["tail"] = case
    for chunk_rows in (None, 2):
        ours = partial(linear_distillation_loss, chunk_rows=chunk_rows)
        truth, _, got, upstream = three(ours, backend, arguments, wanted=OF_LOG_PROBS)
        formula, of_formula = run(of_log_probs, arguments, upstream, torch.float64, OF_LOG_PROBS)
        torch.testing.assert_close(truth[0], formula, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(got[0].double(), formula, rtol=1e-5, atol=1e-6)
        assert len(of_formula) == 6
        for name, true in of_formula.items():
            torch.testing.assert_close(truth[1][name], true, rtol=1e-8, atol=1e-12)
            assert (got[1][name] - true).norm() < 2e-5 * true.norm(), name
    if case != "dense":  # nothing but the soft part
        arguments = with_log_probs(6, temperature=2.0) | {"tail": case}
        _, _, got, upstream = three(linear_distillation_loss, backend, arguments, wanted=OF_LOG_PROBS)
        formula, of_formula = run(of_log_probs, arguments, upstream, torch.float64, OF_LOG_PROBS)
        torch.testing.assert_close(got[0].double(), formula, rtol=1e-5, atol=1e-6)
        for name, true in of_formula.items():
            assert (got[1][name] - true).norm() < 2e-5 * true.norm(), name


def test_log_probs_in_a_range_of_classes(backend):
    """Indices are the student's; dense log-probabilities have a range of their own."""
    arguments = with_log_probs(None, temperature=2.0)
    arguments["teacher_log_probs"] = arguments["teacher_log_probs"][:, :29].clone()
    ranges = {"valid_classes": (4, 30), "teacher_valid_classes": (1, 27)}
    wanted = OF_LOG_PROBS[:4]
    _, _, got, upstream = three(
        partial(linear_distillation_loss, **ranges), backend, arguments, wanted=wanted
    )

    def dense(student_weight, student_bias, teacher_log_probs, **a):
        heads = {"student_weight": student_weight[4:30], "student_bias": student_bias[4:30]}
        return of_log_probs(teacher_log_probs=teacher_log_probs[:, 1:27], **heads, **a)

    sparse = with_log_probs(5, temperature=2.0)
    sparse["teacher_indices"] = 4 + sparse["teacher_indices"] % 5 + 5 * torch.arange(5)

    def topk(student_weight, student_bias, teacher_indices, **a):
        heads = {"student_weight": student_weight[4:30], "student_bias": student_bias[4:30]}
        return of_log_probs(teacher_indices=teacher_indices - 4, **heads, **a)

    _, _, of_sparse, _ = three(
        partial(linear_distillation_loss, valid_classes=(4, 30)), backend, sparse, wanted=wanted
    )
    for found, formula, a in ((got, dense, arguments), (of_sparse, topk, sparse)):
        loss, true = run(formula, a, upstream, torch.float64, wanted)
        torch.testing.assert_close(found[0].double(), loss, rtol=1e-5, atol=1e-6)
        for name, gradient in true.items():
            assert (found[1][name] - gradient).norm() < 2e-5 * gradient.norm(), name
            if name != "teacher_log_probs":
                assert (found[1]["student_weight"][:4] == 0).all()
    assert (got[1]["teacher_log_probs"][:, 27:] == 0).all() and (got[1]["teacher_log_probs"][:, 0] == 0).all()


@pytest.mark.parametrize("k", [None, 6])
def test_log_probs_of_half_precision(backend_dtype, k):
    backend, dtype = backend_dtype
    arguments = with_log_probs(k, dtype=dtype, temperature=2.0)
    for kind in (torch.float32, dtype):
        arguments["teacher_log_probs"] = arguments["teacher_log_probs"].to(kind)
        truth, reference, got, _ = three(
            linear_distillation_loss, backend, arguments, wanted=("student", "student_weight", "student_bias")
        )
        assert (got[0] - truth[0]).abs() <= 1e-5 * truth[0].abs() + 2 * (reference[0] - truth[0]).abs()
        for name, true in truth[1].items():
            assert got[1][name].dtype == dtype
            assert (got[1][name] - true).norm() < max(2 * torch.finfo(dtype).eps, 1e-5) * true.norm(), name


# Chunks.


@pytest.mark.parametrize("chunk_rows", [1, 3, 16, 20, 1000])
def test_the_size_of_a_chunk_does_not_matter(backend, chunk_rows):
    arguments = batch((20,), 19, temperature=torch.tensor(2.0), logit_scale=torch.tensor(0.9), **HARD)
    arguments["mask"] = torch.arange(20) % 7 != 3
    arguments["chunk_rows"] = chunk_rows
    check(backend, arguments)
    check(backend, {**arguments, "mask": torch.ones(20, dtype=torch.bool)})


def test_a_chunk_is_where_it_should_be(backend):
    """Rows' losses and gradients are those of the rows on their own."""
    a = to(device_of(backend), batch((7,), 19, temperature=2.0, **HARD))
    ours = partial(linear_distillation_loss, chunk_rows=3, backend=backend)
    a["student"].requires_grad_()
    rows = ours(**a, reduction="none")
    rows.sum().backward()
    for i in range(7):
        one = {k: v.detach()[i : i + 1] if k in ("student", "teacher", "labels") else v for k, v in a.items()}
        one["student"].requires_grad_()
        loss = ours(**one)
        loss.backward()
        torch.testing.assert_close(loss.detach(), rows[i].detach())
        torch.testing.assert_close(one["student"].grad[0], a["student"].grad[i], rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not has_bf16_linear(), reason="this CPU does not multiply bfloat16")
# Tiles of 16 rows, 32 features and 64 classes where the CPU has them; panels of 256 features; and what is left over.
@pytest.mark.parametrize(("rows", "features"), [(16, 32), (35, 65), (5, 64), (17, 31), (48, 600), (100, 257)])
@pytest.mark.parametrize("classes", [1, 64, 77, 200])
@pytest.mark.parametrize("with_bias", [False, True])
def test_product_of_bfloat16_into_float32(rows, features, classes, with_bias):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, features + 3, generator=generator).bfloat16()[:, :features]
    weight = torch.randn(classes, features + 1, generator=generator).bfloat16()[:, 1:]
    bias = torch.randn(classes, generator=generator).bfloat16() if with_bias else None
    out = torch.full((rows + 1, classes + 2), torch.nan)
    bf16_linear(x, weight, bias, out[:rows, :classes])
    truth = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    magnitude = x.double().abs() @ weight.double().abs().T + 1
    error = ((out[:rows, :classes] - truth).abs() / magnitude).max()
    assert error < 8 * torch.finfo(torch.float32).eps
    assert out[rows].isnan().all() and out[:, classes:].isnan().all()  # and nothing beside it


def test_many_chunks_of_bfloat16():
    """Sums over more chunks than a few are kept in float32: they are as good as those of one chunk."""
    _ready_cpu()
    arguments = batch((200,), 21, dtype=torch.bfloat16, temperature=2.0, **HARD)
    truth, reference, _, upstream = three(linear_distillation_loss, "cpu", arguments, wanted=FEATURES)
    for chunk_rows in (2, 10, 30, 200):
        ours = partial(linear_distillation_loss, chunk_rows=chunk_rows, backend="cpu")
        _, gradients = run(ours, arguments, upstream.float(), wanted=FEATURES)
        for name, true in truth[1].items():
            error, own = (x.norm() / true.norm() for x in (gradients[name] - true, reference[1][name] - true))
            assert own < 4e-3 and error < 2 * own + 4e-3, (
                f"{name}, {chunk_rows} rows a chunk: {error:.1e}, {own:.1e}"
            )
            assert gradients[name].dtype == torch.bfloat16
    check("cpu", {**arguments, "chunk_rows": 2}, chunks=1)
    check("cpu", {**arguments, "chunk_rows": 30}, chunks=7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("noise", [1e-2, 1e-3])
@pytest.mark.parametrize("small", [True, False], ids=["one call", "chunks"])
def test_near_convergence(small, dtype, noise, monkeypatch):
    """Where logits of half precision would cost 5 to 14 % of the gradient."""
    _ready_cpu()
    if not small:
        monkeypatch.setattr(linear_module, "_is_small", lambda call: False)
    generator = torch.Generator().manual_seed(0)
    a = batch((16,), 2000, (64, 64), dtype=dtype, temperature=2.0)
    a["student_weight"], a["student_bias"] = a["teacher_weight"].clone(), a["teacher_bias"].clone()
    a["student"] = (
        a["teacher"].double() * (1 + noise * torch.randn(16, 64, generator=generator, dtype=torch.float64))
    ).to(dtype)
    truth, _, got, upstream = three(linear_distillation_loss, "cpu", a, wanted=("student", "student_weight"))
    limit = 1e-2 if dtype == torch.bfloat16 else 1e-3
    assert truth[0] > 0 and abs(got[0].double() / truth[0] - 1) < 1e-3
    for name, true in truth[1].items():
        error = (got[1][name].double() - true).norm() / true.norm()
        assert error < limit, f"{name}: {error:.1e}"
    if dtype == torch.bfloat16:  # and the data show what they are meant to show

        def cast_after(**x):
            s, t = (F.linear(x[n], x[f"{n}_weight"], x[f"{n}_bias"]) for n in ("student", "teacher"))
            return of_logits(s.float(), t.float(), x)

        _, eager = run(cast_after, a, upstream.float(), wanted=("student",))
        assert (eager["student"].double() - truth[1]["student"]).norm() > 0.02 * truth[1]["student"].norm()


def test_float16_under_a_loss_scale(backend):
    """Gradients far below what float16 holds, until they meet the loss scale."""
    if backend == "reference":
        pytest.skip("autograd of the reference casts as it goes")
    a = batch((6,), 40, (16, 16), dtype=torch.float16)
    for part in ("_weight", "_bias"):
        a[f"student{part}"] = a[f"teacher{part}"].clone()
    a["student"] = a["teacher"] * (1 + 2e-3)
    a["weights"] = torch.full((6,), 1e-4)
    wanted = FEATURES
    ours = partial(linear_distillation_loss, backend=backend)
    device, scale = device_of(backend), torch.tensor(65536.0)
    _, gradients = run(ours, to(device, a), scale.to(device), wanted=wanted)
    _, unscaled = run(ours, to(device, a), wanted=wanted)
    _, truth = run(
        partial(linear_distillation_loss, backend="reference"), a, scale.double(), torch.float64, wanted
    )
    # A gradient that is rounded to float16 first has lost most of itself.
    lost = (unscaled["student"].cpu().double() * 65536 - truth["student"]).norm() / truth["student"].norm()
    assert lost > 0.02
    for name, true in truth.items():
        found = gradients[name].cpu()
        assert found.dtype == torch.float16
        assert (found.double() - true).norm() < 5e-3 * true.norm(), name


# Shapes.


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_no_rows(backend, shape, reduction):
    arguments = batch(shape, 9, temperature=torch.tensor(2.0), **HARD, reduction=reduction)
    a = leaves(to(device_of(backend), arguments))
    loss = linear_distillation_loss(**a, backend=backend)
    assert loss.shape == (shape if reduction == "none" else ()) and loss.sum() == 0
    loss.sum().backward()
    for name in NAMES:
        if name in a:
            assert a[name].grad.shape == a[name].shape and (a[name].grad == 0).all(), name
    chunked = linear_distillation_loss(**a, chunk_rows=4, backend=backend)
    assert torch.equal(chunked, loss)


@pytest.mark.parametrize("classes", [1, 2, 3])
@pytest.mark.parametrize("widths", [(1, 1), (1, 5), (7, 1)])
def test_small_sizes(backend, classes, widths):
    for shape in ((1,), (3,), ()):
        arguments = batch(shape, classes, widths, temperature=2.0)
        check(backend, arguments, vacuous=True)
    if classes == 1:
        loss, gradients = run(
            partial(linear_distillation_loss, backend=backend),
            to(device_of(backend), arguments),
            wanted=NAMES,
        )
        assert loss.abs() < 1e-6 and all((x.abs() < 1e-6).all() for x in gradients.values())
    for soft in ("dkd", "nkd"):
        check(backend, batch((3,), classes, widths, soft=soft, **OPTIONS.get(soft, {})), vacuous=True)


@pytest.mark.parametrize("classes", [15, 16, 17, 64, 129, 1000])
def test_every_number_of_classes(backend, classes):
    """The last class counts."""
    arguments = batch((2,), classes, (8, 8), temperature=2.0)
    arguments["student_bias"][-1] += 4
    check(backend, arguments)


def test_more_than_two_dimensions(backend):
    a = to(device_of(backend), batch((2, 3, 2), 13, temperature=2.0, **HARD))
    flat = {k: v.flatten(0, 2) if k in ("student", "teacher", "labels") else v for k, v in a.items()}
    ours = partial(linear_distillation_loss, reduction="none", backend=backend)
    loss, expected = ours(**a), ours(**flat)
    assert loss.shape == (2, 3, 2) and torch.equal(loss.flatten(), expected)
    _, gradients = run(partial(linear_distillation_loss, backend=backend), a, wanted=FEATURES)
    _, others = run(partial(linear_distillation_loss, backend=backend), flat, wanted=FEATURES)
    assert gradients["student"].shape == a["student"].shape
    for name, gradient in gradients.items():
        assert torch.equal(gradient.reshape(others[name].shape), others[name]), name


def test_strides(backend):
    """Transposed heads and hidden states, every other row, expanded rows."""
    a = to(device_of(backend), batch((6,), 13, (8, 8), temperature=2.0, **HARD))
    views = dict(a)
    for name in ("student", "teacher", "student_weight", "teacher_weight"):
        views[name] = a[name].T.contiguous().T
        assert not views[name].is_contiguous()
    views["student_bias"] = torch.stack((a["student_bias"],) * 2, 1)[:, 0]
    views["labels"] = torch.stack((a["labels"],) * 2, 1)[:, 0]
    ours = partial(linear_distillation_loss, backend=backend, chunk_rows=4)
    expected, gradients = run(ours, a, wanted=FEATURES)
    held = {k: v.detach().requires_grad_() if k in FEATURES else v for k, v in views.items()}
    loss = ours(**held)
    torch.testing.assert_close(loss.detach(), expected)
    for name, gradient in zip(FEATURES, torch.autograd.grad(loss, [held[name] for name in FEATURES])):
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-5, atol=1e-6)
    twice = {k: torch.cat((v, v)) if k in ("student", "teacher", "labels") else v for k, v in a.items()}
    for name in ("student", "teacher", "labels"):
        twice[name] = twice[name].view(2, *a[name].shape).transpose(0, 1).flatten(0, 1)[::2]
    torch.testing.assert_close(ours(**twice), expected)
    one = {
        k: v[:1].expand(6, *v.shape[1:]) if k in ("student", "teacher", "labels") else v for k, v in a.items()
    }
    single = {k: v[:1] if k in ("student", "teacher", "labels") else v for k, v in a.items()}
    torch.testing.assert_close(ours(**one), ours(**single))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_strides_of_large_products(dtype):
    """Large enough for whatever library the CPU's products go through."""
    _ready_cpu()
    a = batch((64,), 700, (64, 48), dtype=dtype, temperature=2.0)
    ours = partial(linear_distillation_loss, backend="cpu", chunk_rows=48)
    expected, gradients = run(ours, a, wanted=FEATURES)
    for name in FEATURES:
        for axis in range(a[name].dim()):
            view = torch.stack((a[name], 7 + a[name]), -1)[..., 0]  # every other element
            view = view.movedim(axis, 0).contiguous().movedim(0, axis) if axis == 1 else view
            held = {k: v.detach().requires_grad_() for k, v in {**a, name: view}.items() if k in FEATURES}
            loss = ours(**held, temperature=2.0)
            torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-5)
            found = torch.autograd.grad(loss, list(held.values()))
            for other, gradient in zip(held, found):
                assert (gradient - gradients[other]).norm() <= 1e-4 * gradients[other].norm(), (name, other)


def test_inputs_are_left_alone(backend):
    arguments = to(device_of(backend), with_log_probs(None, **HARD)) | {"softcap": 5.0}
    for a in (to(device_of(backend), batch((5,), 31, (8, 8), **HARD)), arguments):
        before = {k: v.clone() if isinstance(v, Tensor) else v for k, v in a.items()}
        held = {
            k: v.requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in a.items()
        }
        loss = linear_distillation_loss(**held, chunk_rows=2, backend=backend)
        loss.backward(retain_graph=True)
        loss.backward()
        for name, value in before.items():
            assert not isinstance(value, Tensor) or torch.equal(value, a[name].detach()), name


# Around it.


def test_autocast(backend):
    """Casts as F.linear would; everything else stays in float32."""
    device = device_of(backend)
    dtype = torch.bfloat16 if backend in ("reference", "cpu") or device == "cuda" else torch.float16
    a = leaves(to(device, batch((5,), 31, temperature=2.0, **HARD)))
    hidden = a["student"].detach().to(dtype).requires_grad_()
    for student in (hidden, a["student"]):
        inputs = [student, *(a[name] for name in FEATURES[1:])]
        with torch.autocast(device, dtype):
            loss = linear_distillation_loss(**{**a, "student": student}, backend=backend)
            assert loss.dtype == torch.float32
        gradients = torch.autograd.grad(loss, inputs)
        by_hand = {**a, "student": student, **{n: a[n].to(dtype) for n in FEATURES[1:]}}
        by_hand["student"] = student.to(dtype)
        expected = linear_distillation_loss(**by_hand, backend=backend)
        assert torch.equal(loss, expected)
        for x, gradient, other in zip(inputs, gradients, torch.autograd.grad(expected, inputs)):
            assert gradient.dtype == x.dtype and torch.equal(gradient, other) and (gradient != 0).any()
        # A later backward, and one under autocast, are the same.
        with torch.autocast(device, dtype):
            again = linear_distillation_loss(**{**a, "student": student}, backend=backend, reduction="none")
            late = torch.autograd.grad(again.mean(), inputs)
        for gradient, other in zip(late, gradients):
            torch.testing.assert_close(gradient, other, rtol=4 * torch.finfo(dtype).eps, atol=1e-3)
    with torch.autocast(device, dtype):  # a head of both sides stays one
        weight = a["student_weight"]
        tied = linear_kl_div(a["student"], weight, a["student"] * 0.5, weight, backend=backend)
    (gradient,) = torch.autograd.grad(tied, weight)
    cast = weight.detach().to(dtype).requires_grad_()
    x = a["student"].detach().to(dtype)
    expected = linear_kl_div(x, cast, (a["student"].detach() * 0.5).to(dtype), cast, backend=backend)
    assert torch.equal(tied, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, cast)[0].float())


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
@pytest.mark.parametrize("case", ["whole", "none", "tied", "log-probs", "topk", "dkd"])
def test_gradcheck(backend, case):
    if case in ("log-probs", "topk"):
        arguments = with_log_probs(3 if case == "topk" else None, dtype=torch.float64)
        few = {"student_weight": 7, "student_bias": 7}
        arguments = {k: v[:2] if k not in few else v for k, v in arguments.items()}
    else:
        arguments = batch((3,), 5, (3, 3 if case == "tied" else 2), torch.float64)
    options: dict[str, Any] = {"softcap": 6.0, "chunk_rows": 2, "backend": backend}
    if case == "none":
        options["reduction"] = "none"
    if case in ("whole", "none"):
        options |= {**HARD, "labels": torch.tensor([0, 4, 2]), "mask": torch.tensor([True, False, True])}
    if case == "dkd":
        options |= {"soft": "dkd", "labels": torch.tensor([0, 4, 2])}
    if case != "topk":
        arguments["logit_scale"] = torch.tensor(0.8).double()
    arguments["temperature"] = torch.tensor(1.7).double()
    if case == "whole":
        arguments["weights"] = torch.tensor([0.5, 1.0, -0.7]).double()
    if case == "tied":
        del arguments["teacher_weight"], arguments["teacher_bias"]
    indices = arguments.pop("teacher_indices", None)
    if indices is not None:
        options["teacher_indices"] = indices
        options["softcap"] = None
    names = list(arguments)

    def function(*tensors: Tensor) -> Tensor:
        a = dict(zip(names, tensors))
        if case == "tied":
            a |= {"teacher_weight": a["student_weight"], "teacher_bias": a["student_bias"]}
        return linear_distillation_loss(**a, **options)

    inputs = [x.detach().double().clone().requires_grad_() for x in arguments.values()]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_double_backward(backend):
    """create_graph: a gradient penalty has the reference's gradient."""
    arguments = to(device_of(backend), batch((4,), 13, (6, 6), temperature=2.0, **HARD))
    found = []
    for name in (backend, "reference"):
        a = leaves(arguments)
        loss = 3 * linear_distillation_loss(**a, backend=name)
        inputs = [a[n] for n in FEATURES]
        first = torch.autograd.grad(loss, inputs[:2], create_graph=True)
        found.append(torch.autograd.grad(sum((x**2).sum() for x in first), inputs))
    for name, got, expected in zip(FEATURES, *found):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6, msg=name)
        assert (got != 0).any()


def test_terms(backend):
    arguments = to(device_of(backend), batch((6,), 21, temperature=2.0, soft_weight=0.6, **HARD))
    arguments |= to(device_of(backend), {"mask": torch.arange(6) != 1, "weights": torch.linspace(-0.5, 2, 6)})
    products_of = {side: raw_logits(side, arguments) for side in ("student", "teacher")}
    for soft in ("kl", "dkd"):
        a = {**arguments, "soft": soft}
        for reduction in REDUCTIONS:
            plain = linear_distillation_loss(**a, reduction=reduction, backend=backend)
            for grad in (False, True):
                held = leaves(a) if grad else a
                loss, terms = linear_distillation_loss(
                    **held, reduction=reduction, return_terms=True, chunk_rows=4, backend=backend
                )
                torch.testing.assert_close(loss.detach(), plain)
                parts = terms["soft"] + terms["hard"] + terms["z_loss"] + terms["logit_mse"]
                torch.testing.assert_close(parts, loss.detach())
                assert not any(x.requires_grad for x in terms.values())
                rest = {k: v for k, v in a.items() if k not in FEATURES}
                _, expected = distillation_loss(
                    **products_of, **rest, reduction=reduction, return_terms=True, backend="reference"
                )
                assert terms.keys() == expected.keys()
                for name, value in expected.items():
                    torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=1e-5)
    top = to(device_of(backend), with_log_probs(4, temperature=2.0, **HARD))
    loss, terms = linear_distillation_loss(**leaves(top), return_terms=True, chunk_rows=2, backend=backend)
    torch.testing.assert_close(terms["soft"] + terms["hard"] + terms["z_loss"], loss.detach())
    assert terms["soft"] > 0 and terms["hard"] > 0 and terms["z_loss"] > 0


def test_two_runs_are_bit_equal(backend):
    arguments = to(device_of(backend), batch((9,), 33, temperature=torch.tensor(2.0), chunk_rows=4, **HARD))
    runs = [
        run(partial(linear_distillation_loss, backend=backend), arguments, wanted=NAMES) for _ in range(3)
    ]
    for loss, gradients in runs[1:]:
        assert torch.equal(loss, runs[0][0])
        assert all(torch.equal(x, runs[0][1][name]) for name, x in gradients.items())


def op_arguments(backend: str, **changes: Any) -> list[Any]:
    """What the registered op takes, in the order of its schema."""
    a = to(device_of(backend), batch((3,), 8, (4, 5)))
    values: dict[str, Any] = {name: None for name in kdkernels.ops.linear_loss.Call._fields}
    values |= {"input": a["student"], "weight": a["student_weight"], "bias": a["student_bias"]}
    values |= {"target": a["teacher"], "target_weight": a["teacher_weight"], "target_bias": a["teacher_bias"]}
    values |= {"input_temperature_value": 2.0, "target_temperature_value": 2.0}
    values |= {"scale_value": 1.0, "target_scale_value": 1.0, "cap": 0.0, "target_cap": 0.0}
    values |= {"row_scale_value": 0.5, "spec": kdkernels.ops.divergences.Spec(squared=True), "kind": 1}
    values |= {"tied": False, "tail": 0, "start": 0, "target_start": 0, "classes": 8, "chunk_rows": 2}
    values |= {"with_terms": False, "needs": [True] * 6 + [False] * 4, "backend": backend}
    return kdkernels.ops.linear_loss.Call(**{**values, **changes}).arguments()


def test_opcheck(backend):
    if backend == "reference":
        pytest.skip("plain PyTorch, no op")
    device = device_of(backend)
    spec = kdkernels.ops.divergences.Spec(squared=True, hard_weight=0.5, z_loss=1e-3)
    rows = torch.rand(3, device=device) + 0.5
    everything = {
        "labels": torch.tensor([0, 4, 2], device=device),
        "input_temperature": rows,
        "target_temperature": rows + 1,
        "scale": torch.tensor(0.7, device=device),
        "target_scale": torch.tensor(0.7, device=device),
        "row_scale": rows,
        "mask": torch.tensor([True, False, True], device=device),
        "spec": spec,
        "start": 1,
        "target_start": 2,
        "classes": 5,
        "cap": 4.0,
        "with_terms": True,
        "needs": [True] * 10,
    }
    half = {
        name: value.to(torch.float16)
        for name, value in zip(kdkernels.ops.linear_loss.Call._fields, op_arguments(backend)[:6])
    }
    for arguments in (
        op_arguments(backend),
        op_arguments(backend, **everything),
        op_arguments(backend, **half),
    ):
        for op in (torch.ops.kdkernels.linear_loss_fwd, torch.ops.kdkernels.linear_loss_bwd):
            torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("tied", [False, True])
def test_compiles_into_one_graph(backend, reduction, tied):
    values = batch((6,), 25, temperature=torch.tensor(2.0), logit_scale=torch.tensor(0.9), **HARD)
    values["weights"] = torch.linspace(0.5, 1.5, 6)
    mask = torch.tensor([True, False, True, True, False, True])
    if tied:  # the same tensor twice, with biases of their own
        values["teacher_bias"] = torch.randn(25)
        values["teacher"] = torch.randn(6, 24)
        del values["teacher_weight"]

    def call(arguments):
        if tied:
            arguments = {**arguments, "teacher_weight": arguments["student_weight"]}
        loss, parts = linear_distillation_loss(
            **arguments, mask=mask, reduction=reduction, return_terms=True, softcap=9.0, backend=backend
        )
        return loss.sum(), {key: part.sum() for key, part in parts.items()}

    graphs = []

    def spy(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    eager, compiled = leaves(values), leaves(values)
    loss, parts = call(eager)
    loss.backward()
    got, terms = torch.compile(call, backend=spy, fullgraph=True)(compiled)
    assert len(graphs) == 1
    got.backward()
    torch.testing.assert_close(got, loss)
    torch.testing.assert_close(terms, parts)
    for name in NAMES:
        if name in values:
            torch.testing.assert_close(compiled[name].grad, eager[name].grad, rtol=1e-5, atol=1e-6)
    assert (compiled["student"].grad != 0).any()


def test_compiled_with_aot_autograd():
    """Through the registered ops' fakes, forward and backward."""
    _ready_cpu()
    values = batch((6,), 25, temperature=2.0, chunk_rows=4, **HARD)
    torch._dynamo.reset()
    eager, compiled = leaves(values), leaves(values)
    loss = linear_distillation_loss(**eager, backend="cpu")
    loss.backward()
    call = torch.compile(
        partial(linear_distillation_loss, backend="cpu"), backend="aot_eager", fullgraph=True
    )
    got = call(**compiled)
    got.backward()
    torch.testing.assert_close(got, loss)
    for name in FEATURES:
        torch.testing.assert_close(compiled[name].grad, eager[name].grad, rtol=1e-5, atol=1e-6)


def test_modules(backend):
    a = to(device_of(backend), batch((4,), 11, temperature=2.0, **HARD))
    biases = {k: a[k] for k in ("student_bias", "teacher_bias")}
    sides = [a[k] for k in ("student", "student_weight", "teacher", "teacher_weight")]
    options = {k: a[k] for k in ("temperature", "hard_weight", "label_smoothing", "z_loss")}
    module = kdkernels.LinearDistillationLoss(**options, backend=backend)
    assert torch.equal(module(*sides, a["labels"], **biases), linear_distillation_loss(**a, backend=backend))
    assert "temperature=2.0" in repr(module)
    plain = kdkernels.LinearKLDivLoss(temperature=2.0, reverse=True, backend=backend)
    expected = linear_kl_div(*sides, **biases, temperature=2.0, reverse=True, backend=backend)
    assert torch.equal(plain(*sides, **biases), expected)
    top = to(device_of(backend), with_log_probs(4))
    known = {k: top[k] for k in ("teacher_log_probs", "teacher_indices")}
    assert torch.equal(
        kdkernels.LinearKLDivLoss(backend=backend)(top["student"], top["student_weight"], **known),
        linear_kl_div(top["student"], top["student_weight"], **known, backend=backend),
    )


def test_references_are_the_reference_backend():
    a = batch((4,), 11)
    for function, name in ((linear_distillation_loss, "distillation_loss"), (linear_kl_div, "kl_div")):
        reference = getattr(kdkernels, f"linear_{name}_reference")
        assert torch.equal(reference(**a), function(**a, backend="reference"))


# Each: what is changed, and what the message says: the argument, what it got, what it takes.
X, W = torch.randn(3, 4), torch.randn(7, 4)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"student": 3}, TypeError, "student must be a floating tensor, got 3"),
    ({"student": torch.ones(3, 4, dtype=torch.long)}, TypeError, "student must be a floating tensor, got a torch"),
    ({"student": torch.tensor(1.0)}, ValueError, r"student must have shape \(..., D\), got \(\)"),
    ({"student_weight": None}, TypeError, "student_weight must be a floating tensor, got None"),
    ({"student_weight": torch.randn(7, 5)}, ValueError, r"student_weight must have shape \(N, D\) .*\(7, 5\)"),
    ({"student_weight": torch.randn(4)}, ValueError, r"student_weight must have shape .* got \(4,\)"),
    ({"student_weight": torch.randn(0, 4)}, ValueError, r"student_weight must have shape .* got \(0, 4\)"),
    ({"student_weight": W.double()}, TypeError, "student_weight must have the dtype .*32 of student, got .*64"),
    ({"student_bias": torch.randn(6)}, ValueError, r"student_bias must have shape \(7,\), got \(6,\)"),
    ({"student_bias": 1.0}, TypeError, "student_bias must be a floating tensor, got 1.0"),
    ({"student_bias": torch.randn(7).half()}, TypeError, "student_bias must have the dtype .* got torch.float16"),
    ({"teacher": None}, TypeError, "teacher must be a floating tensor, got None"),
    ({"teacher": torch.randn(2, 5)}, ValueError, r"teacher must have the student's rows \(3,\), got \(2,\)"),
    ({"teacher": torch.randn(3, 6)}, ValueError, r"teacher_weight must have shape .* D = 6, the width of teacher"),
    ({"teacher_weight": None}, TypeError, "teacher_weight must be a floating tensor, got None"),
    ({"teacher_weight": torch.randn(8, 5)}, ValueError, "teacher_weight must have the student's 7 classes, got 8"),
    ({"teacher_bias": torch.randn(8)}, ValueError, r"teacher_bias must have shape \(7,\), got \(8,\)"),
    (
        {"teacher": torch.randn(3, 5).double(), "teacher_weight": torch.randn(7, 5).double()},
        TypeError,
        "teacher must be float64 where student is, and only there, got torch.float64",
    ),
    ({"teacher_log_probs": torch.randn(3, 7)}, TypeError, "teacher must be None where teacher_log_probs is given"),
    ({"teacher_indices": torch.ones(3, 2).long()}, TypeError, "teacher must be None where"),
    ({"soft": "hinge"}, ValueError, "soft must be one of kl, reverse_kl.*got 'hinge'"),
    ({"hard_weight": 1.0}, TypeError, "labels must be given where hard_weight is not 0"),
    ({"hard_weight": "much"}, TypeError, "hard_weight must be a float, got 'much'"),
    ({"soft_weight": math.inf}, ValueError, "soft_weight must be finite, got inf"),
    ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
    ({"z_loss": math.nan}, ValueError, "z_loss must be finite, got nan"),
    ({"logit_mse_weight": None}, TypeError, "logit_mse_weight must be a float, got None"),
    ({"labels": torch.ones(3)}, TypeError, "labels must be an integer tensor, got a torch.float32"),
    ({"labels": torch.ones(4).long()}, ValueError, r"labels must have the shape of the rows \(3,\), got \(4,\)"),
    ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
    ({"temperature": "warm"}, TypeError, "temperature must be a float or a tensor, got 'warm'"),
    ({"temperature": torch.ones(4)}, ValueError, r"temperature must broadcast to the rows \(3,\), got shape \(4,\)"),
    ({"teacher_temperature": -1.0}, ValueError, "teacher_temperature must be positive and finite, got -1.0"),
    ({"softcap": 0.0}, ValueError, "softcap must be positive, got 0.0"),
    ({"softcap": "soft"}, TypeError, "softcap must be a float, got 'soft'"),
    ({"teacher_softcap": -3.0}, ValueError, "teacher_softcap must be positive, got -3.0"),
    ({"logit_scale": torch.ones(2)}, TypeError, "logit_scale must be a float or a floating tensor of one value"),
    ({"logit_scale": torch.ones(1).long()}, TypeError, "logit_scale must be a float or a floating tensor of one"),
    ({"teacher_logit_scale": math.nan}, ValueError, "teacher_logit_scale must be finite, got nan"),
    ({"mask": torch.ones(3)}, TypeError, "mask must be a bool tensor, got a torch.float32"),
    ({"mask": torch.ones(4) > 0}, ValueError, r"mask must broadcast to the rows \(3,\), got shape \(4,\)"),
    ({"weights": torch.ones(3).long()}, TypeError, "weights must be a floating tensor, got a torch.int64"),
    ({"weights": torch.ones(2)}, ValueError, r"weights must broadcast to the rows \(3,\), got shape \(2,\)"),
    ({"reduction": "mean"}, ValueError, "reduction must be one of none, sum, batchmean, got 'mean'"),
    ({"valid_classes": 8}, ValueError, "valid_classes must be inside the student's 7 classes.*got 8"),
    ({"valid_classes": "all"}, TypeError, "valid_classes must be None, a number of classes"),
    ({"valid_classes": (2, 6), "teacher_valid_classes": 3}, ValueError, "must be equally long"),
    ({"teacher_valid_classes": (0, 9)}, ValueError, "teacher_valid_classes must be inside the teacher's 7 classes"),
    ({"strategy": "magic"}, ValueError, "strategy must be None or one of chunks, tiles, got 'magic'"),
    ({"chunk_rows": 0}, ValueError, "chunk_rows must be None or a positive int, got 0"),
    ({"chunk_rows": 2.5}, ValueError, "chunk_rows must be None or a positive int, got 2.5"),
    ({"chunk_rows": True}, ValueError, "chunk_rows must be None or a positive int, got True"),
    ({"chunk_rows": 2, "strategy": "tiles"}, ValueError, "chunk_rows must be None where strategy is 'tiles'"),
    ({"tail": "bushy"}, ValueError, "tail must be one of .*got 'bushy'"),
    ({"backend": "tpu"}, ValueError, "backend must be None or one of reference, cpu, triton, cuda, got 'tpu'"),
    ({"backend": 1}, TypeError, "backend must be None or a name, got 1"),
]  # fmt: skip
GIVEN = {"teacher": None, "teacher_weight": None}
BAD += [
    ({**GIVEN, "teacher_log_probs": torch.ones(3, 7).long()}, TypeError, "teacher_log_probs must be a floating tensor"),
    ({**GIVEN, "teacher_log_probs": torch.ones(2, 7)}, ValueError, r"teacher_log_probs must have shape \(\*rows, N\)"),
    ({**GIVEN, "teacher_log_probs": torch.ones(3, 6)}, ValueError, "teacher_log_probs must have .* 7 classes, got 6"),
    ({**GIVEN, "teacher_indices": torch.ones(3, 2).long()}, TypeError, "log_probs must be a"),
    (
        {**GIVEN, "teacher_log_probs": torch.ones(3, 2), "teacher_indices": torch.ones(3, 3).long()},
        ValueError,
        r"indices must have",
    ),
    (
        {**GIVEN, "teacher_log_probs": torch.ones(3, 2), "teacher_indices": torch.ones(3, 2).long(), "soft": "jsd"},
        ValueError,
        "teacher_indices must be None unless soft is 'kl'",
    ),
    (
        {**GIVEN, "teacher_log_probs": torch.ones(3, 2), "teacher_indices": torch.tensor([[0, 9]] * 3)},
        ValueError,
        r"outside \[0, 7\)",
    ),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(BAD)), ids=lambda i: f"{'-'.join(BAD[i][0])}-{i}")
def test_bad_input(number):
    changes, error, message = BAD[number]
    arguments = {
        "student": X,
        "student_weight": W,
        "teacher": torch.randn(3, 5),
        "teacher_weight": torch.randn(7, 5),
    }
    with pytest.raises(error, match=message):
        linear_distillation_loss(**{**arguments, **changes})
    plain = inspect.signature(linear_kl_div).parameters
    if set(changes) <= set(plain):
        with pytest.raises(error, match=message):
            linear_kl_div(**{**arguments, **changes})


def test_a_teacher_that_is_not_looked_at(backend):
    """soft_weight 0: it may be anything, and has no gradient, or one of 0."""
    a = leaves(to(device_of(backend), batch((4,), 9, **HARD)))
    none = {k: v for k, v in a.items() if not k.startswith("teacher")}
    plain = linear_distillation_loss(**none, soft_weight=0.0, backend=backend)
    for weight in (a["teacher_weight"], a["student_weight"]):
        known = {**a, "teacher_weight": weight, "teacher": a["teacher"]}
        loss = linear_distillation_loss(**known, soft_weight=0.0, chunk_rows=3, backend=backend)
        torch.testing.assert_close(loss, plain)
        for x in a.values():
            if isinstance(x, Tensor):
                x.grad = None
        loss.backward()
        for name in ("teacher", "teacher_bias", "teacher_weight"):
            assert a[name].grad is None or (a[name].grad == 0).all(), name
        (expected,) = torch.autograd.grad(plain, a["student_weight"], retain_graph=True)
        torch.testing.assert_close(a["student_weight"].grad, expected)
        assert (expected != 0).any()


def test_a_wrong_label_is_named(backend):
    a = to(device_of(backend), batch((3,), 9, **HARD))
    for wrong in (9, -1):
        a["labels"] = torch.tensor([0, wrong, 1], device=device_of(backend))
        if a["labels"].device.type == "cpu":
            with pytest.raises(ValueError, match=rf"labels must be .*got {wrong}"):
                linear_distillation_loss(**a, backend=backend)
        else:
            assert linear_distillation_loss(**a, backend=backend).isnan()


def test_backends_take_their_dtypes(backend):
    if torch.float64 in kdkernels.backend.DTYPES[backend]:
        return
    a = to(device_of(backend), batch((3,), 9, dtype=torch.float64))
    with pytest.raises(TypeError, match=f"backend '{backend}' takes .*student is float64"):
        linear_kl_div(**a, backend=backend)


# Memory and plan.

PEAK = """
import re, sys, torch
import torch.nn.functional as F
import kdkernels
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
rows, width, classes, dtype = *map(int, sys.argv[2:5]), getattr(torch, sys.argv[5])
torch.manual_seed(0)
def inputs(classes):
    return [torch.randn(rows, width).to(dtype).requires_grad_(), (torch.randn(classes, width) / 16).to(dtype),
            torch.randn(rows, width).to(dtype), (torch.randn(classes, width) / 16).to(dtype)]
def eager(x, w, y, v):
    q, p = (torch.log_softmax(F.linear(*side).float() / 2, -1) for side in ((x, w), (y, v)))
    return 4 * F.kl_div(q, p, reduction="batchmean", log_target=True)
def ours(x, w, y, v):
    return kdkernels.linear_distillation_loss(x, w, y, v, temperature=2.0, backend="cpu")
loss = {"eager": eager, "ours": ours}[sys.argv[1]]
loss(*inputs(64)).backward()  # threads and libraries have their memory
some = inputs(classes)
open("/proc/self/clear_refs", "w").write("5")  # the peak starts over
before = int(open("/proc/self/statm").read().split()[1]) * 4096
value = loss(*some)
value.backward()
print(peak() - before, value.item())
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory(dtype):
    """Of a step with frozen heads, above its inputs: at most an eighth of what eager takes; a seventh in bfloat16,
    where eager's logits are half as large, and ours float32 all the same."""
    _ready_cpu()
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc")
    peaks, values = {}, {}
    for who in ("eager", "ours"):
        command = [sys.executable, "-c", PEAK, who, "512", "512", "32000", dtype]
        # Memory that is freed goes back to the system: what was there before cannot be used again unseen.
        returned = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=Path(__file__).resolve().parents[1],
            env={**os.environ, **returned},
        )
        assert done.returncode == 0, done.stderr
        peaks[who], values[who] = map(float, done.stdout.split())
    assert peaks["eager"] > 2 * 512 * 32000 * 4  # it really has the logits of both sides
    assert peaks["ours"] <= peaks["eager"] / (8 if dtype == "float32" else 7), peaks
    assert values["ours"] == pytest.approx(values["eager"], rel=0.05)


@pytest.mark.parametrize(
    ("rows", "classes", "on_cpu", "on_cuda"),
    [
        (128, 100, 128, 128),
        (256, 1000, 256, 256),
        (512, 32_000, 128, 512),
        (256, 128_256, 32, 128),
        (8192, 128_256, 32, 128),
    ],
)
def test_plan(rows, classes, on_cpu, on_cuda):
    """Pinned: the named shapes on a CPU with 32 MiB of cache, and on a GPU with 132 multiprocessors."""
    assert plan_linear_loss(rows, classes, cores=8) == Plan("chunks", on_cpu)
    gpu = plan_linear_loss(rows, classes, device="cuda", cores=132)
    assert gpu == Plan("chunks", on_cuda)
    tiled = plan_linear_loss(rows, classes, device="cuda", cores=132, tiled=True)
    assert tiled == (Plan("tiles", 0) if classes <= 4096 else gpu)


def test_plan_keeps_its_promises():
    for tiled, classes, expected in ((True, 4096, "tiles"), (True, 4097, "chunks"), (False, 10, "chunks")):
        assert plan_linear_loss(64, classes, tiled=tiled).strategy == expected
    for rows in (1, 2, 15, 16, 17, 100, 1000, 4096, 100_000):
        for classes in (1, 10, 1000, 32_000, 256_000):
            for device, step in (("cpu", 16), ("cuda", 128)):
                for itemsize in (4, 8):
                    strategy, chunk = plan_linear_loss(
                        rows, classes, itemsize=itemsize, device=device, cores=132
                    )
                    assert strategy == "chunks" and 1 <= chunk <= rows
                    assert chunk == rows or chunk % step == 0
                    if device == "cpu":  # both sides' logits
                        assert chunk <= 16 or chunk * 2 * itemsize * classes <= 32 << 20
                    else:
                        assert chunk <= 128 or (chunk // 128) * -(-classes // 128) <= 2 * 8 * 132
                    if chunk < rows:  # equally long: the last chunk is no remainder
                        chunks = -(-rows // chunk)
                        assert chunk - -(-rows // chunks) < step
    assert plan_linear_loss(0, 10).chunk_rows >= 1
    # A larger cache makes larger chunks, up to 32 MiB of logits.
    sizes = [plan_linear_loss(4096, 32_000, cache=c << 20).chunk_rows for c in (1, 8, 16, 32, 512)]
    assert sizes == sorted(sizes) and sizes[0] == sizes[1] and sizes[3] == sizes[4] > sizes[0]
