"""The common calls in C++ (python/calls.cpp) against the way through Python, whose kernels they share."""

import gc
import os
import subprocess
import sys
import threading
import weakref
from functools import partial
from unittest import mock

import pytest
import torch
from conftest import missing
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kdkernels
from kdkernels import backend as kd
from kdkernels.backend import statistics_dtype
from kdkernels.ops import kl_div
from kdkernels.ops.calls import COMMON

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
LABELS = torch.tensor([0, 4, 2, 6, 1])

LOSSES = {
    "kl_div": partial(kdkernels.kl_div),
    "kl_div, options": partial(
        kdkernels.kl_div, temperature=2, teacher_temperature=3.5, reverse=True, reduction="sum"
    ),
    "kl_div, rows": partial(kdkernels.kl_div, temperature=0.7, reduction="none"),
    "jsd": partial(kdkernels.jsd, beta=0.3, temperature=2.0),
    "tvd": partial(kdkernels.tvd, reduction="none"),
    "skew": partial(kdkernels.skew_kl_div, reduction="sum"),
    "standardize": partial(kdkernels.kl_div, standardize=True, temperature=2.0, teacher_temperature=3.0),
    "dkd": partial(kdkernels.dkd, labels=LABELS),
    "nkd": partial(kdkernels.nkd, labels=LABELS, reduction="none"),
    "distillation_loss": partial(
        kdkernels.distillation_loss, labels=LABELS, label_smoothing=0.1, z_loss=0.01, logit_mse_weight=0.2
    ),
}
THIRD = torch.randn(5, 7, generator=torch.Generator().manual_seed(9))


def several(x, y, **options):
    return kdkernels.multi_teacher_kl_div(x, [y, THIRD.to(y.dtype)], **options)


def of_top(x, y, **options):
    log_probs, indices = torch.log_softmax(y.to(statistics_dtype(y.dtype)), -1).topk(3)
    return kdkernels.topk_kl_div(x, log_probs, indices, **options)


LOSSES |= {
    "topk_kl_div": partial(of_top, temperature=2),
    "topk_kl_div, renormalize": partial(of_top, tail="renormalize", reduction="sum"),
    "topk_kl_div, drop": partial(of_top, tail="drop", reduction="none", backend="cpu"),
    "several teachers": partial(several, weights=(0.3, 2), temperatures=[2.0, 0.5]),
    "several teachers, rows": partial(several, temperatures=3, reduction="none"),
}
DISTANCES = {
    "gaussian_wasserstein": kdkernels.gaussian_wasserstein,
    "gaussian_kl": partial(kdkernels.gaussian_kl, eps=0.1),
    "coral": kdkernels.coral,
    "mmd": partial(kdkernels.mmd, bandwidths=[0.5, 3.0]),
    "mmd, unbiased": partial(kdkernels.mmd, kernel="laplacian", estimator="unbiased"),
    "energy_distance": kdkernels.energy_distance,
}
OF_CLASSES = {
    f"{name}, classes": partial(DISTANCES[name], labels=torch.tensor([1, 0, 1, 1, 0]))
    for name in ("gaussian_wasserstein", "gaussian_kl", "coral", "mmd", "energy_distance")
}
ALL = {**LOSSES, **DISTANCES, **OF_CLASSES}


@pytest.fixture(autouse=True)
def built():
    if kd.CALLS is None:
        missing("the calls were not compiled for this torch, which is to be installed before kdkernels")


def in_python(function):
    """The same function without the calls in C++."""

    def run(*arguments, **options):
        with mock.patch.dict(COMMON, clear=True):
            return function(*arguments, **options)

    return run


def is_common(loss: Tensor) -> bool:
    return type(loss.grad_fn).__name__ == "CppFunction"


def batch(dtype=torch.float32, shape=(5, 7), seed=0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for _ in range(2))


def found(function, x: Tensor, y: Tensor, needs=(True, False), upstream=None, times=1):
    x, y = (z.detach().requires_grad_(need) for z, need in zip((x, y), needs))
    loss = function(x, y)
    if upstream is None:
        upstream = torch.linspace(0.5, 2, max(loss.numel(), 1), dtype=loss.dtype).reshape(loss.shape)
    wanted = [z for z in (x, y) if z.requires_grad]
    grads = [torch.autograd.grad(loss, wanted, upstream, retain_graph=True) for _ in range(times)]
    return loss, grads


def assert_same(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_equal_to_the_way_through_python(name, dtype):
    function, (x, y) = ALL[name], batch(dtype)
    of_distances = name in DISTANCES or name in OF_CLASSES
    both = of_distances or name.startswith(("kl_div", "topk"))
    for needs in [(True, False), (False, True), (True, True)] if both else [(True, False)]:
        loss, grads = found(function, x, y, needs, times=2)
        expected, [grads_of_python] = found(in_python(function), x, y, needs)
        assert is_common(loss) is not (of_distances and dtype == torch.float16)
        assert not is_common(expected)
        assert loss.dtype == expected.dtype and torch.equal(loss, expected)
        for each in grads:  # what the forward computed, and what is computed again
            assert_same(each, grads_of_python)
    assert torch.equal(function(x, y), in_python(function)(x, y)) and not function(x, y).requires_grad


LINEAR = {
    "kl": partial(kdkernels.linear_kl_div, temperature=2.0, teacher_temperature=3.0),
    "reverse, sum": partial(kdkernels.linear_kl_div, reverse=True, reduction="sum"),
    "standardize": partial(kdkernels.linear_kl_div, standardize=True, temperature=2),
    "whole": partial(
        kdkernels.linear_distillation_loss,
        labels=LABELS,
        temperature=3.0,
        teacher_temperature=2.0,
        soft_weight=0.7,
        hard_weight=0.4,
        label_smoothing=0.1,
        z_loss=0.01,
        logit_mse_weight=0.2,
    ),
    "jsd": partial(kdkernels.linear_distillation_loss, labels=LABELS, soft="jsd", beta=0.3, hard_weight=0.1),
    "dkd": partial(kdkernels.linear_distillation_loss, labels=LABELS, soft="dkd"),
    "nkd": partial(kdkernels.linear_distillation_loss, labels=LABELS, soft="nkd"),
}


def heads(dtype=torch.float32, biases=(True, True)) -> list[Tensor | None]:
    """Student, its head and bias; teacher, its head and bias."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(5, 8), (7, 8), (7,), (5, 6), (7, 6), (7,)]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [None if i % 3 == 2 and not biases[i // 3] else x for i, x in enumerate(tensors)]


def linear(function, tensors):
    x, weight, bias, y, teacher_weight, teacher_bias = tensors
    return function(x, weight, y, teacher_weight, student_bias=bias, teacher_bias=teacher_bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LINEAR)
def test_linear_losses(name, dtype):
    for biases in [(True, True), (False, True), (True, False)]:
        for needs in [(1, 1, 1, 1, 1, 1), (1, 0, 0, 0, 0, 0), (0, 1, 1, 0, 0, 0), (1, 0, 0, 0, 1, 1)]:
            tensors = [
                None if x is None else x.requires_grad_(bool(need))
                for x, need in zip(heads(dtype, biases), needs)
            ]
            wanted = [x for x in tensors if x is not None and x.requires_grad]
            loss = linear(LINEAR[name], tensors)
            expected = in_python(linear)(LINEAR[name], tensors)
            assert is_common(loss) is (dtype != torch.float16) and not is_common(expected)
            assert loss.dtype == expected.dtype and torch.equal(loss, expected)
            upstream = torch.tensor(1.7, dtype=loss.dtype)
            grads = [torch.autograd.grad(loss, wanted, upstream, retain_graph=True) for _ in range(2)]
            for each in grads:
                assert_same(each, torch.autograd.grad(expected, wanted, upstream, retain_graph=True))
    with torch.no_grad():
        assert torch.equal(linear(LINEAR[name], tensors), in_python(linear)(LINEAR[name], tensors))


@pytest.mark.parametrize("name", LINEAR)
def test_double_backward_of_linear_losses(name):
    def penalty(run):
        tensors = [x.requires_grad_() for x in heads(torch.float64)]
        grads = torch.autograd.grad(run(LINEAR[name], tensors), tensors, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), tensors)

    assert_same(penalty(linear), penalty(in_python(linear)))


def test_linear_losses_that_are_left_to_python():
    x, weight, bias, y, teacher_weight, _ = heads()
    x.requires_grad_()
    for options in (
        {"mask": torch.ones(5, dtype=torch.bool)},
        {"weights": torch.ones(5)},
        {"temperature": torch.tensor(1.0)},
        {"softcap": 1e6},
        {"logit_scale": 1.0},
        {"chunk_rows": 2},
        {"strategy": "chunks"},
        {"valid_classes": 7},
        {"backend": "reference"},
    ):
        loss = kdkernels.linear_kl_div(x, weight, y, teacher_weight, **options)
        assert not is_common(loss), options
        plain = kdkernels.linear_kl_div(x, weight, y, teacher_weight)
        assert is_common(plain)
        torch.testing.assert_close(loss, plain, rtol=1e-4, atol=1e-5)
    z = torch.randn(5, 8)
    one = kdkernels.linear_kl_div(x, weight.requires_grad_(), z, weight)
    assert not is_common(one)
    many = kdkernels.linear_kl_div(
        torch.ones(4096, 64, requires_grad=True), torch.ones(64, 64), torch.ones(4096, 64), torch.ones(64, 64)
    )
    assert not is_common(many)
    ignored = torch.where(LABELS == 4, -100, LABELS)
    loss = kdkernels.linear_distillation_loss(x, weight, y, teacher_weight, ignored)
    assert not is_common(loss)
    for arguments in (
        (x, weight, y, weight),
        (x, weight.double(), y, teacher_weight),
        (x, weight, y[:4], teacher_weight),
    ):
        with pytest.raises((ValueError, TypeError)):
            kdkernels.linear_kl_div(*arguments)
    for bad in (bias[:6], bias.double()):
        with pytest.raises((ValueError, TypeError)):
            kdkernels.linear_kl_div(x, weight, y, teacher_weight, student_bias=bad)
    with pytest.raises(ValueError, match="labels must be in"):
        kdkernels.linear_distillation_loss(x, weight, y, teacher_weight, LABELS + 1, hard_weight=0.5)


@pytest.mark.parametrize("shape", [(7,), (2, 3, 7), (1, 7), (3, 2, 2, 7)], ids=str)
def test_shapes(shape):
    x, y = batch(shape=shape)
    for reduction in ("none", "batchmean"):
        function = partial(kdkernels.kl_div, reduction=reduction)
        (loss, [grads]), (expected, [expected_grads]) = (
            found(f, x, y) for f in (function, in_python(function))
        )
        assert is_common(loss)
        assert_same((loss, *grads), (expected, *expected_grads))
        assert loss.shape == (shape[:-1] if reduction == "none" else ())


@pytest.mark.parametrize("shape", [(3, 6, 4), (2, 3, 6, 4)], ids=str)
@pytest.mark.parametrize("name", DISTANCES)
def test_batches_of_problems(name, shape):
    x, y = batch(shape=shape)
    y = y[..., :5, :]
    (loss, [grads]), (expected, [expected_grads]) = (
        found(f, x, y, (True, True)) for f in (DISTANCES[name], in_python(DISTANCES[name]))
    )
    assert_same((loss, *grads), (expected, *expected_grads))
    assert loss.shape == shape[:-2] and is_common(loss) is (len(shape) == 3)


def test_rows_apart():
    x, y = (torch.cat((z, z), 1)[:, :7] for z in batch())
    assert x.stride() == (14, 1)
    for name, function in ALL.items():
        loss, [grads] = found(function, x, y)
        expected, [expected_grads] = found(in_python(function), x, y)
        assert is_common(loss), name
        assert_same((loss, *grads), (expected, *expected_grads))


def test_two_classes_and_ignored_rows():
    x, y = batch(shape=(5, 2))
    for first in (0, -100):
        labels = torch.tensor([first, 1, 1, first, 1])
        for function in (kdkernels.dkd, kdkernels.nkd):
            loss, [grads] = found(partial(function, labels=labels), x, y)
            expected, [expected_grads] = found(in_python(partial(function, labels=labels)), x, y)
            assert is_common(loss) is not bool((labels == -100).any())
            assert_same((loss, *grads), (expected, *expected_grads))


class Watching(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class Subclass(Tensor):
    pass


def test_what_is_left_to_python():
    x, y = batch()
    x.requires_grad_()
    assert is_common(kdkernels.kl_div(x, y)) and is_common(kdkernels.kl_div(torch.nn.Parameter(x), y))
    for options in (
        {"mask": torch.ones(5, dtype=torch.bool)},
        {"weights": torch.ones(5)},
        {"temperature": torch.tensor(1.0)},
        {"backend": "reference"},
    ):
        loss = kdkernels.kl_div(x, y, **options)
        assert not is_common(loss)
        torch.testing.assert_close(loss, kdkernels.kl_div(x, y), rtol=1e-5, atol=1e-6)
    for a, b in ((x.as_subclass(Subclass), y), (x, y.as_subclass(Subclass)), (x.T.contiguous().T, y)):
        assert not is_common(kdkernels.kl_div(a, b))
    assert not is_common(kdkernels.dkd(x, y, None)) and not is_common(
        kdkernels.dkd(x, y.requires_grad_(), LABELS)
    )
    several = kdkernels.multi_teacher_kl_div
    z = y.detach()
    for teachers, options in (
        ([z, y], {}),  # one that wants a gradient
        (torch.stack([z, z]), {}),
        ([z, z], {"weights": torch.ones(2)}),
        ([z, z], {"temperatures": torch.ones(2)}),
        ([z, z], {"return_terms": True}),
        ([z, z], {"teacher_mask": torch.tensor([True, True])}),
    ):
        loss = several(x, teachers, **options)
        loss = loss[0] if options.get("return_terms") else loss
        assert not is_common(loss)
        torch.testing.assert_close(loss, 2 * kdkernels.kl_div(x, z), rtol=1e-5, atol=1e-6)
    log_probs, indices = torch.log_softmax(z, -1).topk(3)
    top = partial(kdkernels.topk_kl_div, x)
    for options in (
        {"mask": torch.ones(5, dtype=torch.bool)},
        {"weights": torch.ones(5)},
        {"temperature": torch.tensor(1.0)},
        {"valid_classes": 7},
        {"check_indices": True},
        {"backend": "reference"},
    ):
        loss = top(log_probs, indices, **options)
        assert not is_common(loss) and is_common(top(log_probs, indices)), options
        torch.testing.assert_close(loss, top(log_probs, indices), rtol=1e-5, atol=1e-6)
    indices = torch.arange(7).repeat(3)[:15].view(5, 3)  # good ones in whatever order they are read
    for given in (
        (log_probs.double(), indices),
        (log_probs, indices.int()),
        (log_probs, indices.T.contiguous().T),
    ):
        assert not is_common(top(*given))
        torch.testing.assert_close(top(*given), top(log_probs, indices))
    for given in ((log_probs[:4], indices[:4]), (log_probs, indices[:, :2]), (log_probs[0], indices[0])):
        with pytest.raises(ValueError, match="must have"):
            top(*given)
    with pytest.raises(ValueError, match="holds 9 in row 0"):
        top(log_probs, indices.new_tensor([[9, 1, 2]] * 5))
    with pytest.raises(ValueError, match="tail must be"):
        top(log_probs, indices, tail="none")
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_common(kdkernels.kl_div(x, y))
    with Watching() as mode:
        kdkernels.kl_div(x, y)
    assert any("kl_div_fwd" in name for name in mode.seen)


def test_transforms():
    x, y = batch()

    def loss(z):
        return kdkernels.kl_div(z, y)

    expected = found(kdkernels.kl_div, x, y, upstream=torch.tensor(1.0))[1][0][0]
    with pytest.raises(RuntimeError, match=r"functorch|setup_context"):  # as the Function in Python says
        torch.func.grad(loss)(x)
    compiled = torch.compile(kdkernels.kl_div, fullgraph=True, backend="eager")
    x.requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(compiled(x, y), x)[0], expected)


@pytest.mark.parametrize("name", ALL)
def test_double_backward(name):
    x, y = (z.double() for z in batch())

    def penalty(function):
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_(name not in LOSSES)
        loss = function(a, b).sum()
        wanted = [z for z in (a, b) if z.requires_grad]
        grads = torch.autograd.grad(loss, wanted, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), wanted)

    assert_same(penalty(ALL[name]), penalty(in_python(ALL[name])))
    a, b = (z.requires_grad_() for z in (x.clone(), y.clone()))
    grad = torch.autograd.grad(kdkernels.kl_div(a, b), a, create_graph=True)[
        0
    ]  # the teacher has its part in it
    assert torch.autograd.grad(grad.square().sum(), b)[0].abs().sum() > 0


def test_a_second_backward_without_its_graph_raises():
    x, y = batch()
    loss = kdkernels.kl_div(x.requires_grad_(), y)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_inputs_that_were_written_to():
    x, y = batch()
    x = x.requires_grad_().clone()
    loss = kdkernels.kl_div(x, y)
    loss.backward(retain_graph=True)
    y.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_hooks_run_once():
    x, y = batch()
    x.requires_grad_()
    z = x * 1
    seen = []
    z.register_hook(lambda grad: seen.append(grad) or 2 * grad)
    loss = kdkernels.kl_div(z, y)
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    again = torch.autograd.grad(loss, x, create_graph=True)[0]
    assert len(seen) == 2
    torch.testing.assert_close(first, again)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        kdkernels.dkd(x, y, LABELS)
    assert len(packed) == 3


def test_errors():
    x, y = batch()
    with pytest.raises(ValueError, match=r"labels must be in \[0, 7\) where they count, got 7"):
        kdkernels.dkd(x, y, LABELS + 1)
    for arguments, error in (
        ((x, y[:4]), ValueError),
        ((x, y.double()), TypeError),
        ((x, None), TypeError),
        ((None, y), TypeError),
    ):
        with pytest.raises(error):
            kdkernels.kl_div(*arguments)
    for options in (
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"reduction": "mean"},
        {"backend": "gpu"},
    ):
        with pytest.raises(ValueError):
            kdkernels.kl_div(x, y, **options)
    for options in ({"weights": [1.0]}, {"temperatures": [1.0, 0.0]}, {"temperatures": (1.0,)}):
        with pytest.raises(ValueError):
            kdkernels.multi_teacher_kl_div(x, [y, y], **options)
    with pytest.raises(ValueError, match="positive"):
        kdkernels.kl_div(x, y, teacher_temperature=-1)


def test_what_python_raises_in_a_backward(monkeypatch):
    x, y = batch()
    loss = kdkernels.kl_div(x.requires_grad_(), y)
    monkeypatch.setattr(kl_div, "run_kl_div", None)
    loss.backward(retain_graph=True)
    with pytest.raises(TypeError, match="not callable"):
        loss.backward()


def test_nothing_stays():
    x, y = batch()
    x.requires_grad_()

    reduction = "".join(["s", "um"])
    loss = kdkernels.kl_div(x, y, reduction=reduction)
    teacher = weakref.ref(y)
    loss.backward(retain_graph=True)
    del y
    gc.collect()
    assert teacher() is not None  # for the next backward
    del loss
    gc.collect()
    assert teacher() is None
    y = batch()[1]
    before = [sys.getrefcount(z) for z in (x, y, reduction, kl_div._again)]
    for _ in range(20):
        kdkernels.kl_div(x, y, reduction=reduction).backward()
    assert [sys.getrefcount(z) for z in (x, y, reduction, kl_div._again)] == before


class Stop(torch.autograd.Function):
    """Has no gradient to give to what comes before it."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad_output):
        return None


def test_inputs_are_freed_with_the_graph_and_no_gradient_is_zero():
    x, y = batch()
    loss = kdkernels.kl_div(x.requires_grad_(), y)
    teacher = weakref.ref(y)
    del y
    loss.backward()
    gc.collect()
    assert teacher() is None and loss.grad_fn.name() == "KDKernelsLossBackward"
    y = batch()[1]
    for run in (kdkernels.kl_div, in_python(kdkernels.kl_div)):
        x.grad = None
        Stop.apply(run(x, y)).backward()
        assert x.grad is not None and not x.grad.any()


def test_forward_mode_is_refused():
    x, y = batch()
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(x.requires_grad_(), torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="forward mode"):
            kdkernels.kl_div(x, y)


def test_a_backward_in_another_thread():
    x, y = batch()
    loss = kdkernels.kl_div(x.requires_grad_(), y)
    thread = threading.Thread(target=lambda: [loss.backward(retain_graph=True) for _ in range(2)])
    thread.start()
    thread.join()
    torch.testing.assert_close(x.grad, 2 * found(kdkernels.kl_div, x, y, upstream=torch.tensor(1.0))[1][0][0])


def test_no_gradient_is_made_where_none_is_wanted():
    x, y = batch(shape=(64, 1024))

    def allocated(function, *arguments) -> int:
        with torch.profiler.profile(profile_memory=True) as profile:
            function(*arguments)
        return max(event.cpu_memory_usage for event in profile.key_averages())

    plain = allocated(kdkernels.kl_div, x, y)
    with torch.no_grad():
        assert allocated(kdkernels.kl_div, x.clone().requires_grad_(), y) <= plain + 64
    one = allocated(kdkernels.kl_div, x.clone().requires_grad_(), y)
    assert plain < x.nbytes <= one < 2 * x.nbytes


@pytest.mark.parametrize("name", DISTANCES)
def test_a_dimension_of_one_has_any_stride(name):
    x, y = (z.transpose(0, 1) for z in batch(shape=(1, 3, 6, 4)))
    assert x.is_contiguous() and x.stride(1) == 72
    (loss, [grads]), (expected, [expected_grads]) = (
        found(f, x, y, (True, True)) for f in (DISTANCES[name], in_python(DISTANCES[name]))
    )
    assert is_common(loss)
    assert_same((loss, *grads), (expected, *expected_grads))


def test_an_upstream_gradient_that_is_marked_as_negative():
    x, y = batch()
    for function in (kdkernels.kl_div, in_python(kdkernels.kl_div)):
        for reduction in ("none", "sum"):
            z = x.clone().requires_grad_()
            rows = function(z, y, reduction=reduction)
            torch.complex(torch.ones_like(rows.detach()), rows).conj().sum().imag.backward()
            expected = found(kdkernels.kl_div, x, y, upstream=torch.tensor(-5.0))[1][0][0]
            torch.testing.assert_close(z.grad, expected)


def test_a_leaf_that_is_frozen_after_the_forward():
    x, weight, bias, y, teacher_weight, _ = (z.requires_grad_() for z in heads())
    loss = kdkernels.linear_kl_div(x, weight, y, teacher_weight, student_bias=bias)
    first = torch.autograd.grad(loss, [x, weight, y], retain_graph=True)
    weight.requires_grad_(False)
    loss.backward()
    assert_same((x.grad, y.grad), (first[0], first[2]))


def test_a_teacher_that_is_not_read_is_not_kept():
    x, y = batch()
    hard = partial(kdkernels.distillation_loss, labels=LABELS, soft_weight=0.0, hard_weight=1.0)
    spec = torch.nn.functional.cross_entropy(x, LABELS)
    with torch.inference_mode():
        made_there = y.clone()
    for function in (hard, in_python(hard)):
        loss = function(x.requires_grad_(), made_there)
        torch.testing.assert_close(loss, spec)
        loss.backward(retain_graph=True)
        loss.backward()


def test_a_later_backward_keeps_its_precision():
    tensors = [z.requires_grad_() for z in heads()]
    loss = linear(LINEAR["kl"], tensors)
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(torch.autograd.grad(loss, tensors, retain_graph=True), first)
        twice = torch.autograd.grad(loss, tensors, create_graph=True)
    for a, b in zip(twice, first):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"standardize": None}, {"temperature": True}], ids=str)
def test_values_of_other_types(options):
    x, y = batch()
    function = partial(kdkernels.dkd, labels=LABELS, **options)
    assert torch.equal(function(x, y), in_python(function)(x, y))


def test_an_ignore_index_beyond_int64():
    x, y = batch()
    for function in (kdkernels.distillation_loss, in_python(kdkernels.distillation_loss)):
        with pytest.raises((TypeError, RuntimeError)):
            function(x, y, LABELS, ignore_index=2**70)


def test_a_switch_leaves_all_to_python():
    script = "import kdkernels.backend as b; print(b.CALLS, b.available_backends()['cpu'])"
    environment = {**os.environ, "KDKERNELS_CALLS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["None", "available"]
