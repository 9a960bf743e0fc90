"""shared_classifier_loss: against the block as the papers' code has it, layer by layer."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import device_of
from testing import EPS32, leaves, run, three, to
from torch import Tensor

import kdkernels
import kdkernels.ops.linear_loss as linear_module
from kdkernels import shared_classifier_loss
from kdkernels.ops.rows import REDUCTIONS

NAMES = (
    "student",
    "teacher",
    "weight",
    "bias",
    "projector_weight",
    "projector_bias",
    "weights",
    "temperature",
)
LEARNT = NAMES[:6]
WHOLE = {
    "soft_weight": 0.7,
    "hard_weight": 0.4,
    "logit_mse_weight": 0.3,
    "feature_mse_weight": 0.6,
    "temperature": 2.0,
}


def batch(
    size: tuple[int, ...] = (),
    teacher_size: tuple[int, ...] | None = None,
    widths: tuple[int, int] = (6, 6),
    *,
    projector: bool = False,
    classes: int = 9,
    rows: int = 5,
    dtype: torch.dtype = torch.float32,
    **more: Any,
) -> dict[str, Any]:
    """Features (B, D), or maps of `size`, and one head; labels."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    width, teacher_width = widths
    arguments: dict[str, Any] = {
        "student": 1 + normal(rows, width, *size),
        "teacher": normal(rows, teacher_width, *(size if teacher_size is None else teacher_size)) - 0.5,
        "weight": normal(classes, teacher_width),
        "bias": normal(classes),
        "labels": torch.arange(rows) * 4 % classes,
    }
    if projector:
        arguments["projector_weight"] = normal(teacher_width, width, scale=0.5)
        arguments["projector_bias"] = normal(teacher_width)
    return {**arguments, **more}


def pooled(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.flatten(2).mean(-1)


def eager(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    projector_weight: Tensor | None = None,
    projector_bias: Tensor | None = None,
    soft_weight: float = 0.0,
    hard_weight: float = 1.0,
    logit_mse_weight: float = 1.0,
    feature_mse_weight: float = 1.0,
    temperature: Any = 1.0,
    feature_match: str | None = None,
    detach_teacher: bool = False,
    label_smoothing: float = 0.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "batchmean",
    ignore_index: int = -100,
    backend: str = "",
) -> Tensor:
    """Projector, pool, classifier, and torch's losses of each sample."""
    if projector_weight is not None:
        if student.dim() == 4:
            student = F.conv2d(student, projector_weight[:, :, None, None], projector_bias)
        else:
            student = F.linear(student, projector_weight, projector_bias)
    s = F.linear(pooled(student), weight, bias)
    t = F.linear(pooled(teacher), weight, bias)
    t = t.detach() if detach_teacher else t
    rows = torch.zeros(len(student), dtype=student.dtype)
    counts = torch.ones(len(student), dtype=torch.bool) if mask is None else mask
    if labels is not None:
        counts = counts & (labels != ignore_index)
    if hard_weight:
        rows = rows + hard_weight * F.cross_entropy(
            s, labels, reduction="none", ignore_index=ignore_index, label_smoothing=label_smoothing
        )
    log_q, p = torch.log_softmax(s / temperature, -1), torch.softmax(t / temperature, -1)
    rows = rows + soft_weight * temperature**2 * F.kl_div(log_q, p, reduction="none").sum(-1)
    rows = rows + logit_mse_weight * F.mse_loss(s, t, reduction="none").mean(-1)
    if student.dim() == 2 or teacher.dim() == 2 or feature_match == "pooled":
        student, teacher = pooled(student), pooled(teacher)
    elif student.shape[2] > teacher.shape[2]:
        student = F.adaptive_avg_pool2d(student, teacher.shape[2:])
    elif student.shape[2] < teacher.shape[2]:
        teacher = F.adaptive_avg_pool2d(teacher, student.shape[2:])
    if feature_mse_weight:
        rows = rows + feature_mse_weight * F.mse_loss(student, teacher, reduction="none").flatten(1).mean(-1)
    rows = torch.where(counts, rows, 0)
    rows = rows if weights is None else rows * weights
    if reduction == "none":
        return rows
    return rows.sum() / (counts.sum().clamp(min=1) if reduction == "batchmean" else 1)


def equal(backend: str, arguments: dict[str, Any], wanted: tuple[str, ...] = NAMES, **options: Any) -> None:
    """Loss and gradients of `backend`, and of the reference in float64, against the formula in float64.

    Allowed is twice what the reference loses in the same dtype, one rounding, and 8 eps32 of the whole.
    """
    arguments = {**arguments, **options}
    rows = arguments["student"].shape[:1]
    truth, reference, got, upstream = three(
        shared_classifier_loss, backend, arguments, wanted=wanted, rows=rows
    )
    formula, of_formula = run(eager, arguments, upstream, torch.float64, wanted)
    torch.testing.assert_close(truth[0], formula, rtol=1e-9, atol=1e-12)
    found_of = {"loss": (got[0], formula, reference[0])}
    assert got[1].keys() == of_formula.keys() and of_formula
    for name, true in of_formula.items():
        torch.testing.assert_close(truth[1][name], true, rtol=1e-8, atol=1e-11)
        assert true.norm() > 1e-4, f"{name}: these data would let a result of zero pass"
        found_of[name] = (got[1][name], true, reference[1][name])
    largest = (
        F.linear(pooled(arguments["teacher"]), arguments["weight"], arguments["bias"]).abs().max().item()
    )
    for name, (found, true, own) in found_of.items():
        eps = torch.finfo(found.dtype).eps
        assert found.dtype == own.dtype and found.shape == true.shape
        allowed = 2 * (own.double() - true).norm() + (2 * eps + 64 * EPS32) * true.norm()
        if name == "temperature":  # a sum of terms of either sign
            allowed = allowed + 8 * EPS32 * largest**2
        assert (found.double() - true).norm() <= allowed, name


SHAPES = {
    "vectors": {},
    "maps": {"size": (4, 3)},
    "smaller maps of the student": {"size": (3, 3), "teacher_size": (6, 6)},
    "larger maps of the student": {"size": (6, 6), "teacher_size": (4, 4)},
    "vectors, projected": {"widths": (4, 6), "projector": True},
    "maps, projected": {"size": (2, 4), "widths": (4, 6), "projector": True},
    "larger maps, projected": {"size": (6, 6), "teacher_size": (3, 3), "widths": (4, 6), "projector": True},
    "maps and vectors": {"size": (3, 2), "teacher_size": ()},
    "vectors and maps": {"size": (), "teacher_size": (3, 2)},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_formula(backend, shape):
    """ATSC's case: the teacher's features and the head learn too."""
    equal(backend, batch(**SHAPES[shape], **WHOLE))


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
@pytest.mark.parametrize("shape", SHAPES)
def test_formula_in_float64(backend, shape):
    a = batch(**SHAPES[shape], dtype=torch.float64, **WHOLE)
    a["temperature"] = torch.tensor(2.0).double()
    a["weights"] = torch.linspace(-0.3, 1.5, 5).double()
    for reduction in REDUCTIONS:
        equal(backend, a, reduction=reduction)


@pytest.mark.parametrize("part", ["soft_weight", "hard_weight", "logit_mse_weight", "feature_mse_weight"])
def test_each_part_alone(backend, part):
    """And the others cost nothing: not even labels."""
    none = {name: 0.0 for name in WHOLE if name != "temperature"}
    for shape in ("vectors", "maps", "maps, projected"):
        a = batch(**SHAPES[shape], **{**none, part: 0.8, "temperature": 3.0})
        if part != "hard_weight":
            del a["labels"]
        wanted = {
            "feature_mse_weight": ("student", "teacher"),
            "hard_weight": ("student", "weight", "bias"),
            "logit_mse_weight": ("student", "teacher", "weight"),  # the bias is in both logits
        }.get(part, ("student", "teacher", "weight", "bias"))
        equal(backend, a, wanted)


def test_logits_mse_does_not_see_the_bias(backend):
    a = to(device_of(backend), batch(soft_weight=0.0, hard_weight=0.0, feature_mse_weight=0.0))
    _, gradients = run(partial(shared_classifier_loss, backend=backend), a, wanted=NAMES)
    assert gradients["bias"].abs().max() < 1e-5 and gradients["weight"].norm() > 0.1


@pytest.mark.parametrize("match", ["pooled", "map", None])
def test_feature_match(backend, match):
    a = batch((4, 3), **WHOLE)
    equal(backend, a, feature_match=match)
    values = [
        shared_classifier_loss(**to(device_of(backend), a), feature_match=m, backend=backend)
        for m in (match, "pooled")
    ]
    assert (values[0] == values[1]) == (match == "pooled")


@pytest.mark.parametrize("shape", ["vectors", "maps", "maps, projected"])
def test_detached_teacher(backend, shape):
    """Its logits are constants; the features' MSE still has its gradient to both sides."""
    a = batch(**SHAPES[shape], **WHOLE)
    equal(backend, a, detach_teacher=True)
    learnt = ("student", "weight", "bias", *(("projector_weight",) if "projector_weight" in a else ()))
    equal(backend, {**a, "feature_mse_weight": 0.0}, learnt, detach_teacher=True)
    held = leaves(to(device_of(backend), a))
    loss = shared_classifier_loss(**{**held, "feature_mse_weight": 0.0}, detach_teacher=True, backend=backend)
    loss.backward()
    assert held["teacher"].grad is None or (held["teacher"].grad == 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", ["vectors", "maps", "maps, projected"])
def test_row_arguments(backend, shape, reduction):
    a = batch(**SHAPES[shape], **WHOLE, label_smoothing=0.1)
    a["weights"] = torch.linspace(-0.3, 1.5, 5)
    a["temperature"] = torch.tensor([2.5])
    a["mask"] = torch.tensor([True, True, False, True, True])
    a["labels"][1] = -7
    equal(backend, {k: v for k, v in a.items() if k != "temperature"}, ignore_index=-7, reduction=reduction)
    a["temperature"] = torch.tensor(2.5)
    equal(backend, a, ignore_index=-7, reduction=reduction)


@pytest.mark.parametrize("shape", ["vectors", "maps", "maps, projected", "larger maps, projected"])
def test_samples_that_do_not_count_may_hold_anything(backend, shape):
    a = batch(**SHAPES[shape], **WHOLE)
    a["mask"] = torch.tensor([True, False, True, True, True])
    a["labels"][3] = -100
    dirty = {k: v.clone() if isinstance(v, Tensor) else v for k, v in a.items()}
    dirty["student"][1], dirty["teacher"][1] = math.nan, math.inf
    dirty["student"][3], dirty["teacher"][3] = -math.inf, math.nan
    dirty["labels"][1] = 10**6
    ours = partial(shared_classifier_loss, backend=backend)
    (loss, gradients), (expected, clean) = (
        run(ours, to(device_of(backend), x), wanted=LEARNT) for x in (dirty, a)
    )
    assert loss.isfinite() and torch.equal(loss, expected)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, clean[name]), name
        if name in ("student", "teacher"):
            assert (gradient[1] == 0).all() and (gradient[3] == 0).all() and (gradient[0] != 0).any()


def test_all_ignored(backend):
    for shape in ("vectors", "maps, projected"):
        a = batch(**SHAPES[shape], **WHOLE)
        for more in ({"labels": torch.full((5,), -100)}, {"mask": torch.zeros(5, dtype=torch.bool)}):
            for reduction in REDUCTIONS:
                held = leaves(to(device_of(backend), {**a, **more}))
                loss = shared_classifier_loss(**held, reduction=reduction, backend=backend)
                assert (loss == 0).all() and loss.requires_grad
                loss.sum().backward()
                for name in LEARNT:
                    if name in held:
                        assert held[name].grad is None or (held[name].grad == 0).all(), name


def test_no_samples(backend):
    for shape in ("vectors", "maps, projected"):
        a = leaves(to(device_of(backend), batch(**SHAPES[shape], rows=0, **WHOLE)))
        loss = shared_classifier_loss(**a, backend=backend)
        assert loss == 0
        loss.backward()
        assert (a["weight"].grad == 0).all() and a["student"].grad.shape == a["student"].shape


@pytest.mark.parametrize("shape", ["vectors", "maps, projected"])
def test_every_dtype(backend_dtype, shape):
    backend, dtype = backend_dtype
    equal(backend, batch(**SHAPES[shape], dtype=dtype, **WHOLE))


@pytest.mark.parametrize("shape", ["vectors", "maps", "maps, projected"])
def test_terms_add_up(backend, shape):
    a = to(device_of(backend), batch(**SHAPES[shape], **WHOLE))
    for reduction in REDUCTIONS:
        plain = shared_classifier_loss(**a, reduction=reduction, backend=backend)
        loss, terms = shared_classifier_loss(
            **leaves(a), reduction=reduction, return_terms=True, backend=backend
        )
        torch.testing.assert_close(loss.detach(), plain)
        assert terms.keys() == {"soft", "hard", "z_loss", "logit_mse", "feature_mse"}
        assert not any(x.requires_grad for x in terms.values())
        torch.testing.assert_close(sum(terms.values()), plain)
        double = {
            k: v.double().cpu() if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in a.items()
        }
        double["labels"] = double["labels"].cpu()
        for name in ("soft", "hard", "logit_mse", "feature_mse"):
            others = {key: 0.0 for key in WHOLE if key not in (f"{name}_weight", "temperature")}
            expected = eager(**{**double, **others}, reduction=reduction)
            torch.testing.assert_close(
                terms[name].cpu().double(), expected, rtol=1e-4, atol=1e-5, msg=f"{name}, {reduction}"
            )
            assert (terms[name] > 0).all()
    _, terms = shared_classifier_loss(**{**a, "feature_mse_weight": 0.0}, return_terms=True, backend=backend)
    assert terms["feature_mse"] == 0


def test_other_divergences(backend):
    """The soft term is any of distillation_loss's."""
    for soft in ("reverse_kl", "tvd", "dkd"):
        a = to(device_of(backend), batch(hard_weight=0.2, logit_mse_weight=0.0, feature_mse_weight=0.0))
        a |= {"soft": soft, "soft_weight": 0.5, "temperature": 2.0}
        found = shared_classifier_loss(**a, backend=backend)
        s, t = (F.linear(a[side], a["weight"], a["bias"]) for side in ("student", "teacher"))
        expected = kdkernels.distillation_loss(
            s,
            t,
            a["labels"],
            soft=soft,
            soft_weight=0.5,
            hard_weight=0.2,
            temperature=2.0,
            backend="reference",
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_papers(backend):
    """SimKD, SRRL and IJCKD as their code has them, in its own words."""
    device = device_of(backend)
    a = to(device, batch((4, 4)))
    student, teacher, weight, bias, labels = (
        a[k] for k in ("student", "teacher", "weight", "bias", "labels")
    )
    s, t = (F.linear(x.mean((2, 3)), weight, bias) for x in (student, teacher))
    ours = partial(shared_classifier_loss, student, teacher, weight, bias, labels, backend=backend)
    torch.testing.assert_close(ours(hard_weight=0.0, logit_mse_weight=0.0), F.mse_loss(student, teacher))
    torch.testing.assert_close(
        ours(hard_weight=0.0, feature_match="pooled"),
        F.mse_loss(student.mean((2, 3)), teacher.mean((2, 3))) + F.mse_loss(s, t),
    )
    torch.testing.assert_close(
        ours(), F.cross_entropy(s, labels) + F.mse_loss(s, t) + F.mse_loss(student, teacher)
    )


@pytest.mark.parametrize("dimensions", [1, 3])
def test_maps_of_other_dimensions(backend, dimensions):
    """Sequences and volumes; also where they differ in size."""
    size = (4, 2, 6)[:dimensions]
    a = batch(size, widths=(4, 6), projector=True, dtype=torch.float32, **WHOLE)
    held = to(device_of(backend), a)
    found = shared_classifier_loss(**held, backend=backend)
    flat = {**a, "student": a["student"].flatten(2)[..., None], "teacher": a["teacher"].flatten(2)[..., None]}
    torch.testing.assert_close(found.cpu(), eager(**flat), rtol=1e-5, atol=1e-5)
    smaller = torch.randn(5, 6, *(x // 2 for x in size))
    pool = (F.adaptive_avg_pool1d, None, F.adaptive_avg_pool3d)[dimensions - 1]
    none = {name: 0.0 for name in WHOLE if name != "temperature"}
    found = shared_classifier_loss(
        **to(device_of(backend), {**a, **none, "feature_mse_weight": 1.0, "teacher": smaller}),
        backend=backend,
    )
    projected = F.linear(a["student"].movedim(1, -1), a["projector_weight"], a["projector_bias"])
    expected = F.mse_loss(pool(projected.movedim(-1, 1), smaller.shape[2:]), smaller)
    torch.testing.assert_close(found.cpu(), expected)


def test_strides(backend):
    """Maps in channels_last, heads transposed."""
    a = to(device_of(backend), batch((4, 4), widths=(4, 6), projector=True, **WHOLE))
    ours = partial(shared_classifier_loss, backend=backend)
    loss, gradients = run(ours, a, wanted=LEARNT)
    views = {
        k: v.contiguous(memory_format=torch.channels_last) if isinstance(v, Tensor) and v.dim() == 4 else v
        for k, v in a.items()
    }
    for name in ("weight", "projector_weight"):
        views[name] = a[name].T.contiguous().T
    views = {k: v.detach().requires_grad_() if k in LEARNT else v for k, v in views.items()}
    found = ours(**views)
    torch.testing.assert_close(found.detach(), loss)
    for name, gradient in zip(LEARNT, torch.autograd.grad(found, [views[name] for name in LEARNT])):
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-4, atol=1e-5)


def test_backward_twice_is_the_same_twice(backend):
    for shape in ("vectors", "maps, projected"):
        a = leaves(to(device_of(backend), batch(**SHAPES[shape], **WHOLE)))
        inputs = [a[name] for name in LEARNT if name in a]
        loss = shared_classifier_loss(**a, backend=backend)
        first = torch.autograd.grad(loss, inputs, retain_graph=True)
        kept = [x.clone() for x in first]
        second = torch.autograd.grad(loss, inputs)
        for one, two, copy in zip(first, second, kept):
            assert torch.equal(one, two) and torch.equal(one, copy)


@pytest.mark.parametrize(
    "wanted", [("student",), ("teacher",), ("weight",), ("bias",), ("projector_weight",)]
)
def test_only_what_requires_grad(backend, wanted):
    a = to(device_of(backend), batch(**SHAPES["maps, projected"], **WHOLE))
    ours = partial(shared_classifier_loss, backend=backend)
    _, every = run(ours, a, wanted=LEARNT)
    held = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in a.items()}
    for name in wanted:
        held[name].requires_grad_()
    ours(**held).backward()
    for name in LEARNT:
        if name in wanted:
            torch.testing.assert_close(held[name].grad, every[name], rtol=1e-5, atol=1e-6)
        else:
            assert held[name].grad is None


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
@pytest.mark.parametrize("shape", ["vectors", "maps, projected", "smaller maps of the student"])
def test_gradcheck(backend, shape):
    a = batch(**SHAPES[shape], rows=2, classes=4, dtype=torch.float64, **WHOLE)
    names = [name for name in LEARNT if name in a]
    rest = {k: v for k, v in a.items() if k not in names}

    def function(*tensors: Tensor) -> Tensor:
        return shared_classifier_loss(**dict(zip(names, tensors)), **rest, backend=backend)

    inputs = [a[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
@pytest.mark.parametrize("shape", ["vectors", "maps, projected"])
def test_compiles_into_one_graph(backend, shape):
    values = batch(**SHAPES[shape], **WHOLE)
    torch._dynamo.reset()
    eager_, compiled = leaves(values), leaves(values)
    loss = shared_classifier_loss(**eager_, backend=backend)
    loss.backward()
    got = torch.compile(
        partial(shared_classifier_loss, backend=backend), backend="aot_eager", fullgraph=True
    )(**compiled)
    got.backward()
    torch.testing.assert_close(got, loss)
    for name in LEARNT:
        if name in values:
            torch.testing.assert_close(compiled[name].grad, eager_[name].grad, rtol=1e-4, atol=1e-5)


def test_module(backend):
    a = to(device_of(backend), batch(**SHAPES["maps, projected"], **WHOLE))
    module = kdkernels.SharedClassifierLoss(**WHOLE, backend=backend)
    call = [a[k] for k in ("student", "teacher", "weight", "bias", "labels")]
    projector = {k: a[k] for k in ("projector_weight", "projector_bias")}
    assert torch.equal(module(*call, **projector), shared_classifier_loss(**a, backend=backend))
    reference = kdkernels.shared_classifier_loss_reference(**a)
    assert torch.equal(reference, shared_classifier_loss(**a, backend="reference"))


MAPS, P = torch.randn(3, 4, 2, 2), torch.randn(5, 4)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"student": 1}, TypeError, "student must be a floating tensor of features, got 1"),
    ({"student": torch.ones(3, 4).long()}, TypeError, "student must be a floating tensor of features, got a"),
    ({"student": torch.randn(3)}, ValueError, r"student must have shape \(B, D\) or \(B, C, ...\), got \(3,\)"),
    ({"teacher": None}, TypeError, "teacher must be a floating tensor of features, got None"),
    ({"teacher": torch.randn(3)}, ValueError, r"teacher must have shape \(B, D\) or \(B, C, ...\), got \(3,\)"),
    ({"teacher": torch.randn(2, 4)}, ValueError, "teacher must have the student's 3 samples, got 2"),
    ({"teacher": torch.randn(3, 4).half()}, TypeError, "teacher must have the student's dtype .*32, got .*16"),
    ({"weight": torch.randn(6, 5)}, ValueError, r"weight must have shape \(N, D\) with D = 4.*got \(6, 5\)"),
    ({"weight": torch.randn(6, 4).half()}, TypeError, "weight must have the dtype torch.float32"),
    ({"bias": torch.randn(5)}, ValueError, r"bias must have shape \(6,\), got \(5,\)"),
    ({"labels": None}, TypeError, "labels must be given where hard_weight is not 0"),
    ({"labels": torch.ones(3)}, TypeError, "labels must be an integer tensor, got a torch.float32"),
    ({"labels": torch.ones(2).long()}, ValueError, r"labels must have the shape of the rows \(3,\), got \(2,\)"),
    ({"labels": torch.tensor([0, 6, 1])}, ValueError, "labels must be .*got 6"),
    ({"projector_bias": torch.randn(4)}, TypeError, "projector_bias must be None where projector_weight is"),
    ({"projector_weight": torch.randn(4, 3)}, ValueError, r"projector_weight must have shape .* D = 4.*got \(4, 3\)"),
    (
        {"projector_weight": torch.randn(4, 4), "projector_bias": torch.randn(3)},
        ValueError,
        r"projector_bias must have shape \(4,\), got \(3,\)",
    ),
    ({"projector_weight": torch.randn(4, 4).half()}, TypeError, "projector_weight must have the dtype torch.float32"),
    ({"projector_weight": P}, ValueError, "student must have the teacher's 4 features for a feature MSE, got 5"),
    ({"soft": "hinge"}, ValueError, "soft must be one of kl"),
    ({"soft_weight": "some"}, TypeError, "soft_weight must be a float, got 'some'"),
    ({"feature_mse_weight": math.inf}, ValueError, "feature_mse_weight must be finite, got inf"),
    ({"logit_mse_weight": math.nan}, ValueError, "logit_mse_weight must be finite, got nan"),
    ({"label_smoothing": -0.1}, ValueError, r"label_smoothing must be in \[0, 1\], got -0.1"),
    ({"temperature": 0}, ValueError, "temperature must be positive and finite, got 0"),
    ({"feature_match": "both"}, ValueError, "feature_match must be None or one of map, pooled, got 'both'"),
    ({"feature_match": "map"}, ValueError, "feature_match must be 'pooled' or None where student and"),
    ({"student": MAPS, "teacher": torch.randn(3, 4, 3)}, ValueError, "as many spatial dimensions"),
    ({"mask": torch.ones(3)}, TypeError, "mask must be a bool tensor, got a torch.float32"),
    ({"mask": torch.ones(2) > 0}, ValueError, "mask must broadcast to the rows"),
    ({"weights": torch.ones(2)}, ValueError, "weights must broadcast to the rows"),
    ({"weights": torch.ones(3).long()}, TypeError, "weights must be a floating tensor"),
    ({"reduction": "mean"}, ValueError, "reduction must be one of none, sum, batchmean, got 'mean'"),
    ({"backend": "tpu"}, ValueError, "backend must be None or one of reference"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(BAD)), ids=lambda i: f"{'-'.join(BAD[i][0])}-{i}")
def test_bad_input(number):
    changes, error, message = BAD[number]
    arguments = {"student": torch.randn(3, 4), "teacher": torch.randn(3, 4), "weight": torch.randn(6, 4)}
    arguments |= {"bias": torch.randn(6), "labels": torch.arange(3), "soft_weight": 0.5, "temperature": 2.0}
    with pytest.raises(error, match=message):
        shared_classifier_loss(**{**arguments, **changes})


def test_no_logits_where_no_part_needs_them(backend, monkeypatch):
    """SimKD: the classifier is not multiplied with; what requires a gradient has one that is 0."""
    runs = []
    execute = linear_module._execute
    monkeypatch.setattr(linear_module, "_execute", lambda *a: runs.append(a) or execute(*a))
    simkd = {"hard_weight": 0.0, "logit_mse_weight": 0.0}
    for shape in ("vectors", "maps", "larger maps of the student"):
        a = to(device_of(backend), batch(**SHAPES[shape]))
        held = leaves(a)
        loss, terms = shared_classifier_loss(**held, **simkd, return_terms=True, backend=backend)
        loss.backward()
        assert not runs
        torch.testing.assert_close(terms["feature_mse"], loss.detach())
        assert all(terms[name] == 0 for name in ("soft", "hard", "logit_mse", "z_loss"))
        assert held["student"].grad.norm() > 0.01
        assert (held["weight"].grad == 0).all() and (held["bias"].grad == 0).all()
        rows = shared_classifier_loss(**a, **simkd, reduction="none", backend=backend)
        torch.testing.assert_close(rows.mean(), loss.detach())
    nothing = shared_classifier_loss(**held, **simkd, feature_mse_weight=0.0, backend=backend)
    assert nothing == 0 and torch.autograd.grad(nothing, held["student"])[0].abs().max() == 0
