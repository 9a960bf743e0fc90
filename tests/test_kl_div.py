"""kl_div in every backend, against its reference in float64."""

from __future__ import annotations

import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import testing
import torch
import torch.nn.functional as F
from conftest import device_of
from testing import EPS32, NAMES, REGIMES, assert_same_bits_whatever_the_threads, leaves, logits, run
from torch import Tensor

import kdkernels
from kdkernels import KLDivLoss, kl_div, kl_div_reference
from kdkernels.ops.calls import COMMON

compare = partial(testing.compare, kl_div)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("regime", REGIMES)
def test_loss_and_gradients(backend_dtype, regime, reverse):
    backend, dtype = backend_dtype
    student, teacher = logits(regime, (6, 100), dtype)
    temperature = {"warm": 4.0, "near": 2.0}.get(regime, 1.0)
    arguments = {"student": student, "teacher": teacher, "temperature": temperature, "reverse": reverse}
    # Near convergence a half's output rounding, and far a one-hot side, are all there is to see.
    compare(backend, arguments, vacuous=regime in ("near", "far"))


@pytest.mark.parametrize(
    "classes", [1, 2, 3, 7, 8, 9, 31, 32, 33, 127, 128, 255, 256, 257, 1000, 1023, 1025, 4099]
)
def test_every_number_of_classes(backend, classes):
    student, teacher = logits("plain", (3, classes), torch.float32)
    compare(backend, {"student": student, "teacher": teacher, "temperature": 2.0}, vacuous=classes == 1)


@pytest.mark.parametrize("classes", [100, 20_000])
def test_last_class_counts(backend, classes):
    student, teacher = torch.zeros(2, classes), torch.zeros(2, classes)
    for height in (8.0, 200.0):  # which e^x has no number for
        teacher[:, -1] = height
        compare(backend, {"student": student, "teacher": teacher}, vacuous=height > 100)


@pytest.mark.parametrize("height", [3.0, 12.0, 40.0, 200.0])
def test_mass_may_lie_anywhere_in_a_long_row(backend, height):
    """Peaks of either side in the first, a middle and the last block: guesses made early must not show."""
    places = [(3, 900), (900, 3), (900, 900), (3, 3), (500, 999)]
    student, teacher = logits("plain", (len(places), 1000), torch.float32)
    for row, (of_student, of_teacher) in enumerate(places):
        student[row, of_student] += height
        teacher[row, of_teacher] += height
    compare(backend, {"student": student, "teacher": teacher, "reduction": "none"}, vacuous=True)
    teacher[:, 600:] += height  # and all of a side moves
    compare(backend, {"student": student, "teacher": teacher, "temperature": 2.0}, vacuous=True)
    student[:, 600:] += height
    compare(backend, {"student": student, "teacher": teacher}, vacuous=True)


@pytest.mark.parametrize("classes", [60, 600, 9000])
@pytest.mark.parametrize("teacher_temperature", [None, 4.0])
def test_sides_far_from_each_other(backend, classes, teacher_temperature):
    student, teacher = (x.to(device_of(backend)) for x in logits("plain", (5, classes), torch.float32))
    arguments = {"student": student, "teacher": teacher, "temperature": 2.0}
    arguments["teacher_temperature"] = teacher_temperature
    testing.assert_shifts_do_not_show(partial(kl_div, backend=backend), arguments)


def test_different_temperatures(backend_dtype):
    backend, dtype = backend_dtype
    student, teacher = logits("plain", (5, 130), dtype)
    for reverse in (False, True):
        compare(
            backend,
            {
                "student": student,
                "teacher": teacher,
                "temperature": 1.5,
                "teacher_temperature": 3.0,
                "reverse": reverse,
            },
        )


@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_row_arguments_and_reductions(backend_dtype, reduction, reverse):
    backend, dtype = backend_dtype
    student, teacher = logits("plain", (2, 4, 50), dtype)
    generator = torch.Generator().manual_seed(3)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    compare(
        backend,
        {
            "student": student,
            "teacher": teacher,
            "temperature": 0.5 + 3 * torch.rand(2, 4, generator=generator, dtype=statistics),
            "teacher_temperature": 0.5 + 3 * torch.rand(2, 1, generator=generator, dtype=statistics),
            "mask": torch.tensor([[True, False, True, True], [False, True, True, False]]),
            "weights": torch.rand(2, 4, generator=generator, dtype=statistics) - 0.3,
            "reduction": reduction,
            "reverse": reverse,
        },
    )


def test_one_learnable_temperature_for_both(backend):
    student, teacher = logits("plain", (4, 60), torch.float32)
    compare(backend, {"student": student, "teacher": teacher, "temperature": torch.tensor(2.5)})


def test_batchmean_divides_by_the_rows_that_count(backend):
    device = device_of(backend)
    student, teacher = (x.to(device) for x in logits("plain", (6, 30), torch.float32))
    mask = torch.tensor([True, False, True, True, False, False], device=device)
    kept = kl_div(student[mask], teacher[mask], reduction="sum", backend=backend) / 3
    torch.testing.assert_close(kl_div(student, teacher, mask=mask, backend=backend), kept)
    weights = torch.full((6,), 2.0, device=device)
    torch.testing.assert_close(
        kl_div(student, teacher, mask=mask, weights=weights, backend=backend), 2 * kept
    )


def test_masked_rows_may_hold_anything(backend_dtype):
    backend, dtype = backend_dtype
    device = device_of(backend)
    student, teacher = (x.to(device) for x in logits("plain", (4, 70), dtype))
    mask = torch.tensor([True, False, True, False], device=device)
    clean = kl_div(student[mask], teacher[mask], backend=backend)
    student[1], teacher[1], student[3], teacher[3] = math.nan, math.inf, -math.inf, math.nan
    weights = torch.tensor([1.0, math.nan, 1.0, math.inf], device=device)
    arguments = leaves(
        {
            "student": student,
            "teacher": teacher,
            "weights": weights,
            "temperature": torch.ones(4, device=device),
        }
    )
    loss = kl_div(**arguments, mask=mask, backend=backend)
    torch.testing.assert_close(loss, clean)
    for x in torch.autograd.grad(
        loss, [arguments[n] for n in ("student", "teacher", "temperature", "weights")]
    ):
        assert torch.isfinite(x[mask]).all() and x[mask].abs().sum() > 0
        assert (x[~mask] == 0).all()


def test_nothing_counts(backend):
    device = device_of(backend)
    student, teacher = (x.to(device).requires_grad_() for x in logits("plain", (3, 40), torch.float32))
    mask = torch.zeros(3, dtype=torch.bool, device=device)
    for reduction in kdkernels.ops.rows.REDUCTIONS:
        loss = kl_div(student, teacher, mask=mask, reduction=reduction, backend=backend)
        assert (loss == 0).all() and loss.requires_grad
        for gradient in torch.autograd.grad(loss.sum(), (student, teacher)):
            assert (gradient == 0).all()


def test_empty_batch(backend):
    student = torch.zeros(0, 5, 7, device=device_of(backend), requires_grad=True)
    for reduction, shape in (("none", (0, 5)), ("sum", ()), ("batchmean", ())):
        loss = kl_div(student, student.detach(), reduction=reduction, backend=backend)
        assert loss.shape == shape and (loss == 0).all()
        [gradient] = torch.autograd.grad(loss.sum(), student)
        assert gradient.shape == student.shape


def test_one_row_and_no_row_dimension(backend):
    student, teacher = logits("plain", (33,), torch.float32)
    compare(backend, {"student": student, "teacher": teacher})
    compare(backend, {"student": student, "teacher": teacher, "reduction": "none"})


@pytest.mark.parametrize(
    "layout", ["columns", "row stride", "transposed", "expanded", "four dimensions", "offset"]
)
def test_layouts(backend_dtype, layout):
    backend, dtype = backend_dtype
    device = device_of(backend)
    big_student, big_teacher = (x.to(device) for x in logits("plain", (8, 6, 99), dtype))
    view = {
        "columns": lambda x: x[:, 0, 3:90],
        "row stride": lambda x: x[::2, 1],
        "transposed": lambda x: x[0].T,
        "expanded": lambda x: x[:1, 0].expand(5, 99),
        "four dimensions": lambda x: x.reshape(2, 4, 6, 99)[:, 1:, ::2],
        "offset": lambda x: x.flatten()[1 : 1 + 4 * 99].view(4, 99),
    }[layout]
    student, teacher = big_student.requires_grad_(), big_teacher.requires_grad_()
    strided = kl_div(view(student), view(teacher), temperature=2.0, backend=backend)
    dense = kl_div(view(student).contiguous(), view(teacher).contiguous(), temperature=2.0, backend=backend)
    # Another alignment may take another loop, which adds in another order.
    torch.testing.assert_close(strided, dense, rtol=4 * EPS32, atol=0)
    for a, b in zip(*(torch.autograd.grad(loss, (student, teacher)) for loss in (strided, dense))):
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_minus_infinity_is_a_class_without_mass(backend_dtype):
    backend, dtype = backend_dtype
    for classes in (40, 700):
        student, teacher = logits("plain", (4, classes), dtype)
        teacher[0, :5] = -math.inf  # q counts there: p = 0 < q
        student[1, 7], teacher[1, 7] = -math.inf, -math.inf  # neither has mass
        teacher[2, 1:] = -math.inf  # one class left
        compare(backend, {"student": student, "teacher": teacher, "temperature": 1.5})
        reverse = {"student": teacher, "teacher": student, "temperature": 1.5, "reverse": True}
        compare(backend, reverse)


def test_p_without_q_is_infinite(backend_dtype):
    backend, dtype = backend_dtype
    student, teacher = logits("plain", (3, 50), dtype)
    student[1, 4] = -math.inf
    student, teacher = student.to(device_of(backend)).requires_grad_(), teacher.to(device_of(backend))
    loss = kl_div(student, teacher, reduction="none", backend=backend)
    assert loss[1] == math.inf and torch.isfinite(loss[[0, 2]]).all()
    [gradient] = torch.autograd.grad(loss.sum(), student)
    p, q = torch.softmax(teacher.double(), -1), torch.softmax(student.detach().double(), -1)
    torch.testing.assert_close(gradient.double(), q - p, rtol=0, atol=8 * max(torch.finfo(dtype).eps, EPS32))


def test_nan_in_a_row_that_counts_shows(backend_dtype):
    backend, dtype = backend_dtype
    for side in ("student", "teacher"):
        for bad in (math.nan, math.inf):
            both = dict(
                zip(
                    ("student", "teacher"),
                    (x.to(device_of(backend)) for x in logits("plain", (3, 300), dtype)),
                )
            )
            both[side][1, 280] = bad
            loss = kl_div(**both, reduction="none", backend=backend)
            assert torch.isnan(loss[1]) and torch.isfinite(loss[[0, 2]]).all(), (side, bad)


def test_near_convergence_is_exact(backend):
    if backend == "reference":
        pytest.skip("the reference differences log-softmaxes; in float64 it is the truth of this test")
    device, classes = device_of(backend), 32_000
    teacher = torch.randn(2, classes, generator=torch.Generator().manual_seed(0))
    student = teacher + 1e-3 * torch.randn(2, classes, generator=torch.Generator().manual_seed(1))
    values = {"student": student, "teacher": teacher, "temperature": torch.full((2,), 2.0)}
    values["teacher_temperature"] = values["temperature"]
    truth, true_gradients = run(kl_div_reference, values, dtype=torch.float64)
    # What the usual form makes of it, so that these data are known to be hard.
    log_q, log_p = (torch.log_softmax(x / 2, -1) for x in (student, teacher))
    usual = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert abs(usual / truth - 1) > 0.25
    moved = {name: x.to(device) for name, x in values.items()}
    loss, gradients = run(lambda **a: kl_div(**a, backend=backend), moved)
    bound = 1e-6 if backend == "cpu" else 1e-4
    assert abs(loss.item() / truth.item() - 1) < bound
    for name, true_gradient in true_gradients.items():
        difference = gradients[name].cpu().double() - true_gradient
        # A temperature's gradient sums 32,000 of the logits' with both signs.
        allowed = bound if name in ("student", "teacher") else 1e-4
        assert difference.norm() / true_gradient.norm() < allowed, name
        assert difference.abs().max() / true_gradient.abs().max() < allowed, name


def test_equal_logits_give_exactly_zero(backend_dtype):
    backend, dtype = backend_dtype
    student, teacher = logits("plain", (4, 333), dtype)
    teacher = teacher.to(device_of(backend)).requires_grad_()
    student = teacher.detach().clone().requires_grad_()
    loss = kl_div(student, teacher, temperature=3.0, backend=backend)
    assert loss == 0
    for gradient in torch.autograd.grad(loss, (student, teacher)):
        assert (gradient == 0).all()


def test_closed_forms(backend):
    device = device_of(backend)
    teacher = torch.tensor([[0.0, math.log(3.0)]], device=device)  # p = 1/4, 3/4
    student = torch.zeros(1, 2, device=device)  # q = 1/2, 1/2
    forward = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert kl_div(student, teacher, backend=backend).item() == pytest.approx(forward, rel=1e-6)
    backward = 0.5 * math.log(2.0) + 0.5 * math.log(2 / 3)
    assert kl_div(student, teacher, reverse=True, backend=backend).item() == pytest.approx(backward, rel=1e-6)
    # No T² factor: at temperature T the value is that of the divided logits.
    divided = kl_div(student / 2, teacher / 2, backend=backend)
    assert kl_div(student, teacher, temperature=2.0, backend=backend).item() == pytest.approx(
        divided.item(), rel=1e-6
    )
    # A one-hot teacher makes it the cross-entropy.
    hot = torch.full((3, 5), -math.inf, device=device).scatter(
        1, torch.tensor([[1], [0], [4]], device=device), 0.0
    )
    random = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(device)
    expected = F.cross_entropy(random, torch.tensor([1, 0, 4], device=device))
    torch.testing.assert_close(kl_div(random, hot, backend=backend), expected)


def test_properties(backend):
    device = device_of(backend)
    student, teacher = (x.to(device) for x in logits("plain", (20, 77), torch.float32))
    rows = kl_div(student, teacher, reduction="none", backend=backend)
    assert (rows >= 0).all()
    torch.testing.assert_close(
        kl_div(student + 5, teacher - 7, reduction="none", backend=backend), rows, rtol=1e-5, atol=1e-5
    )
    order = torch.randperm(77, generator=torch.Generator().manual_seed(0)).to(device)
    permuted = kl_div(student[:, order], teacher[:, order], reduction="none", backend=backend)
    torch.testing.assert_close(permuted, rows, rtol=1e-5, atol=1e-6)
    swapped = kl_div(teacher, student, reverse=True, reduction="none", backend=backend)
    assert torch.equal(swapped, rows)


def test_agrees_with_torch(backend):
    device = device_of(backend)
    student, teacher = (x.to(device) for x in logits("plain", (9, 45), torch.float32))
    expected = F.kl_div(
        F.log_softmax(student / 4, -1), F.log_softmax(teacher / 4, -1), reduction="batchmean", log_target=True
    )
    torch.testing.assert_close(kl_div(student, teacher, temperature=4.0, backend=backend), expected)


def test_backward_twice_and_no_shared_buffer(backend):
    device = device_of(backend)
    student, teacher = (x.to(device).requires_grad_() for x in logits("plain", (4, 90), torch.float32))
    for reduction in ("batchmean", "none"):
        loss = kl_div(student, teacher, reduction=reduction, backend=backend)
        upstream = torch.rand(loss.shape, generator=torch.Generator().manual_seed(0)).to(device) + 0.5
        first = torch.autograd.grad(loss, (student, teacher), upstream, retain_graph=True)
        kept = [gradient.clone() for gradient in first]
        second = torch.autograd.grad(loss, (student, teacher), 2 * upstream, retain_graph=True)
        third = torch.autograd.grad(loss, (student, teacher), upstream)
        for a, copy, b, c in zip(first, kept, second, third):
            assert torch.equal(a, copy), "a later backward wrote into a gradient that was handed out"
            assert len({a.data_ptr(), b.data_ptr(), c.data_ptr()}) == 3
            torch.testing.assert_close(b, 2 * a)
            torch.testing.assert_close(c, a)


def test_accumulates_into_grad(backend):
    student, teacher = (x.to(device_of(backend)) for x in logits("plain", (4, 90), torch.float32))
    student.requires_grad_()
    kl_div(student, teacher, backend=backend).backward()
    once = student.grad.clone()
    kl_div(student, teacher, backend=backend).backward()
    torch.testing.assert_close(student.grad, 2 * once)


@pytest.mark.parametrize(
    "wanted",
    [
        ("student",),
        ("teacher",),
        ("temperature",),
        ("teacher_temperature",),
        ("weights",),
        ("student", "weights"),
        ("teacher", "temperature"),
    ],
    ids="+".join,
)
def test_gradients_only_where_required(backend, wanted):
    device = device_of(backend)
    student, teacher = (x.to(device) for x in logits("plain", (4, 40), torch.float32))
    values = {
        "student": student,
        "teacher": teacher,
        "weights": torch.rand(4, device=device) + 0.5,
        "temperature": torch.full((4,), 2.0, device=device),
        "teacher_temperature": torch.full((4,), 3.0, device=device),
    }
    every = leaves(values)
    kl_div(**every, backend=backend).backward()
    some = {name: x.detach().clone().requires_grad_(name in wanted) for name, x in values.items()}
    kl_div(**some, backend=backend).backward()
    for name, x in some.items():
        assert (x.grad is not None) == (name in wanted)
        if name in wanted:
            torch.testing.assert_close(x.grad, every[name].grad)


def test_no_gradient_work_where_none_is_wanted(monkeypatch):
    if kdkernels.available_backends("cpu")["cpu"] != "available":
        pytest.skip("needs the native module")
    asked = []
    monkeypatch.delitem(COMMON, "kl_div", raising=False)
    original = kdkernels.backend._LAUNCHERS["cpu", "kl_div"]
    monkeypatch.setitem(
        kdkernels.backend._LAUNCHERS,
        ("cpu", "kl_div"),
        lambda *a: (asked.append([x is not None for x in a[10:]]), original(*a)),
    )
    student, teacher = logits("plain", (4, 40), torch.float32)
    kl_div(student, teacher, backend="cpu")
    student.requires_grad_()
    with torch.no_grad():
        kl_div(student, teacher, backend="cpu")
    kl_div(student, teacher, backend="cpu").backward()
    assert asked == [[False] * 4, [False] * 4, [True, False, False, False]]


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck(backend, reverse):
    torch.manual_seed(0)
    values = {
        "student": torch.randn(2, 3),
        "teacher": torch.randn(2, 3),
        "temperature": torch.rand(2) + 1,
        "teacher_temperature": torch.rand(1) + 1,
        "weights": torch.rand(2) + 0.5,
    }
    inputs = tuple(values[name].double().requires_grad_() for name in NAMES)
    mask = torch.tensor([True, False])
    for reduction, rows in (("none", None), ("batchmean", mask)):

        def call(*tensors, reduction=reduction, rows=rows):
            arguments = dict(zip(NAMES, tensors))
            return kl_div(**arguments, mask=rows, reverse=reverse, reduction=reduction, backend=backend)

        assert torch.autograd.gradcheck(call, inputs)
        assert torch.autograd.gradgradcheck(call, inputs)


def test_double_backward(backend):
    """∇(‖∂loss/∂student‖²) in float32 against float64."""
    device = device_of(backend)
    student, teacher = logits("plain", (3, 20), torch.float32)

    def penalty(s: Tensor, t: Tensor, name: str) -> tuple[Tensor, Tensor]:
        s, t = s.detach().requires_grad_(), t.detach().requires_grad_()
        loss = 3 * kl_div(s, t, temperature=2.0, backend=name)  # an upstream gradient that must not be lost
        [first] = torch.autograd.grad(loss, s, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (s, t))

    truth = penalty(student.double(), teacher.double(), "reference")
    got = penalty(student.to(device), teacher.to(device), backend)
    for a, b in zip(got, truth):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-4, atol=1e-7)


def test_deterministic(backend):
    student, teacher = (
        x.to(device_of(backend)).requires_grad_() for x in logits("plain", (7, 5000), torch.float32)
    )
    runs = []
    for _ in range(2):
        loss = kl_div(student, teacher, backend=backend)
        runs.append([loss.detach(), *torch.autograd.grad(loss, (student, teacher))])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_threads_do_not_change_a_bit():
    student, teacher = (x.requires_grad_() for x in logits("plain", (37, 3000), torch.float32))

    def run():
        loss = kl_div(student, teacher, backend="cpu")
        return loss.detach(), *torch.autograd.grad(loss, (student, teacher))

    assert_same_bits_whatever_the_threads(run)


def test_one_openmp_pool_in_the_process():
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc")
    script = """
import torch, kdkernels
kdkernels.kl_div(torch.zeros(64, 4000), torch.zeros(64, 4000), backend="cpu")
print({line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line or "libiomp" in line})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert len(eval(done.stdout)) == 1, done.stdout


def test_peak_memory_is_one_gradient():
    """Peak resident memory of a forward + backward above its inputs, in a process of its own."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    script = """
import re, sys, torch, kdkernels
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
dtype = getattr(torch, sys.argv[1])
def step(s, t): kdkernels.kl_div(s, t, temperature=4.0, backend="cpu").backward()
small = torch.randn(4, 8, dtype=dtype)
step(small.clone().requires_grad_(), small)  # imports and thread stacks
s, t = torch.randn(256, 64000).to(dtype).requires_grad_(), torch.randn(256, 64000).to(dtype)
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
    student, teacher = (x.to(device) for x in logits("plain", (3, 20), torch.float32))
    rows = torch.rand(3, device=device) + 0.5
    mask = torch.tensor([True, False, True], device=device)
    for arguments in (
        (student, teacher, None, None, 2.0, 2.0, None, 0.5, None, [True, False, False, False], backend),
        (student, teacher, rows, rows, 1.0, 1.0, rows, 1.0, mask, [True] * 4, backend),
    ):
        for op in (torch.ops.kdkernels.kl_div_fwd, torch.ops.kdkernels.kl_div_bwd):
            torch.library.opcheck(op.default, arguments)
    torch.library.opcheck(torch.ops.kdkernels.scale_rows_.default, (student, rows, backend))


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_compiles_into_one_graph(name, reduction):
    student, teacher = logits("plain", (6, 50), torch.float32)
    mask = torch.tensor([True, False, True, True, False, True])
    values = {
        "student": student,
        "teacher": teacher,
        "temperature": torch.tensor(2.0),
        "weights": torch.rand(6) + 0.5,
    }

    def call(student, teacher, temperature, weights):
        return kl_div(
            student,
            teacher,
            temperature=temperature,
            weights=weights,
            mask=mask,
            reduction=reduction,
            backend=name,
        ).sum()

    graphs = []

    def spy(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    eager, compiled = leaves(values), leaves(values)
    expected = call(**eager)
    expected.backward()
    for how in (spy, "aot_eager"):
        torch._dynamo.reset()
        got = torch.compile(call, fullgraph=True, backend=how)(**compiled)
        torch.testing.assert_close(got, expected)
    got.backward()
    for key, value in eager.items():
        torch.testing.assert_close(compiled[key].grad, value.grad)
    assert len(graphs) == 1
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(call, fullgraph=True, backend="aot_eager")(**compiled), expected
        )


def test_inductor_runs_the_op_in_its_graph():
    student, teacher = logits("plain", (6, 50), torch.float32)
    student.requires_grad_()
    expected = 4 * kl_div(2 * student, teacher, backend="cpu")
    [true_gradient] = torch.autograd.grad(expected, student)
    torch._dynamo.reset()
    got = torch.compile(lambda s, t: 4 * kl_div(2 * s, t, backend="cpu"), fullgraph=True)(student, teacher)
    [gradient] = torch.autograd.grad(got, student)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradient, true_gradient)


def test_module(backend):
    device = device_of(backend)
    student, teacher = (x.to(device) for x in logits("plain", (4, 30), torch.float32))
    module = KLDivLoss(temperature=3.0, reverse=True, reduction="sum", backend=backend)
    mask = torch.tensor([True, True, False, True], device=device)
    expected = kl_div(
        student, teacher, temperature=3.0, reverse=True, reduction="sum", mask=mask, backend=backend
    )
    assert torch.equal(module(student, teacher, mask=mask), expected)
    learned = KLDivLoss(temperature=torch.nn.Parameter(torch.tensor(2.0, device=device)), backend=backend)
    learned(student, teacher).backward()
    [parameter] = learned.parameters()
    assert parameter.grad is not None and parameter.grad != 0
    assert "temperature" in repr(module)


X = torch.zeros(4, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"student": [1.0]}, TypeError, "student must be a tensor"),
        ({"teacher": None}, TypeError, "teacher must be a tensor"),
        ({"student": torch.tensor(1.0)}, ValueError, "student must have shape"),
        ({"student": torch.zeros(4, 0), "teacher": torch.zeros(4, 0)}, ValueError, "student must have shape"),
        (
            {"teacher": torch.zeros(4, 6)},
            ValueError,
            r"teacher must have the student's shape \(4, 5\), got \(4, 6\)",
        ),
        ({"teacher": X.double()}, TypeError, "teacher must have the student's dtype"),
        ({"teacher": X.to("meta")}, ValueError, "teacher must be on the student's device"),
        ({"student": X.long(), "teacher": X.long()}, TypeError, "student must be float64"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
        ({"temperature": -1}, ValueError, "temperature must be positive"),
        ({"temperature": math.nan}, ValueError, "temperature must be positive and finite, got nan"),
        ({"temperature": math.inf}, ValueError, "temperature must be positive"),
        ({"temperature": "4 K"}, TypeError, "temperature must be a float or a tensor"),
        ({"temperature": torch.tensor([1.0, 0.0, 1.0, 1.0])}, ValueError, "temperature must be positive"),
        ({"temperature": torch.tensor(math.nan)}, ValueError, "temperature must be positive"),
        (
            {"temperature": torch.ones(3)},
            ValueError,
            r"temperature must broadcast to the rows \(4,\), got shape \(3,\)",
        ),
        ({"temperature": torch.ones(4, 1)}, ValueError, "temperature must broadcast"),
        (
            {"temperature": torch.ones(4).long()},
            TypeError,
            "temperature must be a float or a floating tensor",
        ),
        ({"teacher_temperature": 0}, ValueError, "teacher_temperature must be positive"),
        (
            {"teacher_temperature": torch.ones((), device="meta")},
            ValueError,
            "teacher_temperature must be on",
        ),
        ({"mask": torch.ones(4)}, TypeError, "mask must be a bool tensor, got a torch.float32 tensor"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, ValueError, "mask must broadcast"),
        ({"mask": [True] * 4}, TypeError, "mask must be a bool tensor"),
        ({"weights": torch.ones(4, dtype=torch.int64)}, TypeError, "weights must be a floating tensor"),
        ({"weights": torch.ones(4, 5)}, ValueError, "weights must broadcast"),
        ({"reduction": "mean"}, ValueError, "reduction must be one of none, sum, batchmean, got 'mean'"),
        (
            {"backend": "tpu"},
            ValueError,
            "backend must be None or one of reference, cpu, triton, cuda, got 'tpu'",
        ),
        (
            {"student": X.to("meta"), "teacher": X.to("meta"), "backend": "cpu"},
            RuntimeError,
            "backend 'cpu' is not available",
        ),
        (
            {"student": X.double(), "teacher": X.double(), "backend": "triton"},
            TypeError,
            "takes float32, float16, bfloat16",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_bad_input_says_what_is_wrong(arguments, error, message):
    if arguments.get("backend") == "triton" and kdkernels.available_backends("cpu")["triton"] != "available":
        pytest.skip("needs triton")
    with pytest.raises(error, match=message):
        kl_div(**{"student": X, "teacher": X, **arguments})


def test_unavailable_backend_raises_and_nothing_is_replaced(request, monkeypatch):
    monkeypatch.delitem(COMMON, "kl_div", raising=False)
    monkeypatch.setitem(kdkernels.backend._DEVICES, "cpu", {"cpu": "the native module was not built"})
    kdkernels.backend._resolve.cache_clear()
    request.addfinalizer(kdkernels.backend._resolve.cache_clear)
    with pytest.raises(
        RuntimeError, match="'cpu' is not available for student on cpu: the native module was not built"
    ):
        kl_div(X, X, backend="cpu")
    assert kl_div(X, X) == 0  # no name: the reference


def test_pure_python_install(tmp_path):
    """Without the native module the package imports, says so, and computes."""
    package = Path(kdkernels.__file__).parent
    for source in package.rglob("*.py"):
        target = tmp_path / "kdkernels" / source.relative_to(package)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    script = (
        # An editable install finds its modules wherever Python runs.
        "import sys; sys.meta_path = [x for x in sys.meta_path if 'Editable' not in getattr(x, '__name__', '')]; "
        "import torch, kdkernels; x = torch.randn(3, 5); print(kdkernels.__file__); "
        "print(kdkernels.available_backends()['cpu']); print(kdkernels.kl_div(x, x).item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    where, reason, loss = done.stdout.splitlines()
    assert where.startswith(str(tmp_path)) and "native module was not built" in reason and float(loss) == 0


def test_half_statistics_are_float32(backend_dtype):
    backend, dtype = backend_dtype
    student, teacher = (x.to(device_of(backend)) for x in logits("plain", (2, 9), dtype))
    student.requires_grad_()
    loss = kl_div(student, teacher, backend=backend)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    [gradient] = torch.autograd.grad(loss, student)
    assert gradient.dtype == dtype
