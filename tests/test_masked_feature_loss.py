"""masked_feature_loss against the formula with its (N, T, C, H, W) tensors."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conftest import GPU, device_of
from distances import assert_equal_up_to_rounding, gradients, moved
from hypothesis import given, settings
from hypothesis import strategies as st

import kdkernels
from kdkernels import MaskedFeatureLoss, masked_feature_loss

BACKENDS = [
    name
    for name in ("reference", "cpu", "triton")
    if kdkernels.available_backends(device_of(name))[name] == "available"
]
over_backends = pytest.mark.parametrize("backend", BACKENDS)


def loss_on(backend):
    return partial(moved, masked_feature_loss, backend)


def formula(student, teacher, masks, mask_weights=None, *, eps=1e-6):
    """As the release has it."""
    masked = masks[:, :, None] * (student - teacher)[:, None]  # (N, T, C, H, W)
    each = masked.square().sum((-2, -1)) / (masks.sum((-2, -1)) + eps)[..., None]
    each = each.mean(-1)
    return (each if mask_weights is None else each * mask_weights).sum(1).mean()


def data(n=2, c=3, t=4, h=5, w=6, dtype=torch.float64, seed=0, backend=None):
    if backend == "triton":
        dtype = torch.float32
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(n, c, h, w, generator=generator).to(dtype) for _ in range(2))
    masks = torch.sigmoid(2 * torch.randn(n, t, h, w, generator=generator)).to(dtype)
    return student, teacher, masks, torch.softmax(torch.randn(n, t, generator=generator), -1).to(dtype)


@over_backends
@pytest.mark.parametrize("eps", [0.0, 1e-6, 1.0])
@pytest.mark.parametrize("weighted", [True, False])
def test_formula(backend, eps, weighted):
    inputs = data(backend=backend)[: 4 if weighted else 3]
    got = gradients(loss_on(backend), *inputs, eps=eps)
    assert got[0] > 0.1
    assert_equal_up_to_rounding(got, gradients(formula, *(z.double() for z in inputs), eps=eps))


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        (backend, dtype)
        for backend in BACKENDS
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        # Triton's interpreter truncates what it stores as bfloat16.
        if GPU or (backend, dtype) != ("triton", torch.bfloat16)
    ],
)
def test_dtypes(backend, dtype):
    inputs = data(dtype=dtype)
    loss, *got = gradients(loss_on(backend), *inputs)
    assert loss.dtype == torch.float32 and all(g.dtype == dtype for g in got)
    assert_equal_up_to_rounding((loss, *got), gradients(formula, *(z.double() for z in inputs)))


# Blocks of 128 positions and one that ends early, all alignments, channels in one piece and in several.
SIZES = [
    (1, 1, 1, 1, 1),
    (2, 5, 3, 7, 19),
    (1, 3, 2, 16, 24),
    (1, 300, 2, 5, 7),
    (2, 129, 1, 12, 12),
    (3, 70, 2, 1, 2),
]


@over_backends
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_sizes(backend, size):
    inputs = data(*size, dtype=torch.float32)
    got = gradients(loss_on(backend), *inputs)
    assert_equal_up_to_rounding(got, gradients(formula, *(z.double() for z in inputs)))


@over_backends
def test_one_mask_of_ones_is_the_mean_square(backend):
    student, teacher, *_ = data(backend=backend)
    ones = torch.ones(2, 1, 5, 6, dtype=torch.bool)
    loss = loss_on(backend)(student, teacher, ones, eps=0)
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(student, teacher))


@over_backends
def test_masked_out_and_empty(backend):
    student, teacher, masks, weights = data(backend=backend)
    masks = masks.round()
    masks[:, :, :2] = 0
    masks[0, 1] = 0  # an empty mask adds 0
    loss, of_student, of_teacher, of_masks, of_weights = gradients(
        loss_on(backend), student, teacher, masks, weights
    )
    assert (of_student[:, :, :2] == 0).all() and (of_teacher[:, :, :2] == 0).all()
    assert of_weights[0, 1] == 0 and torch.isfinite(of_masks).all()
    again, *of_equal = gradients(loss_on(backend), student, student, masks, weights)
    assert again == 0 and loss > 0 and all((g == 0).all() for g in of_equal)
    for some in ((slice(0), ...), (..., slice(0))):
        empty, *none = gradients(loss_on(backend), *(z[some] for z in (student, teacher, masks)))
        assert empty == 0 and all((g == 0).all() for g in none)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])  # float64
def test_gradcheck(backend):
    inputs = [z.requires_grad_() for z in data(2, 2, 2, 2, 3)]
    call = partial(masked_feature_loss, backend=backend)
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_gradients_only_where_required():
    inputs = data()
    every = gradients(masked_feature_loss, *inputs)[1:]
    for wanted in range(4):
        some = [z.clone().requires_grad_(i == wanted) for i, z in enumerate(inputs)]
        loss = masked_feature_loss(*some)
        loss.backward(retain_graph=True)
        assert torch.equal(some[wanted].grad, every[wanted])
        loss.backward()
        assert torch.equal(some[wanted].grad, 2 * every[wanted])
        assert all((z.grad is None) == (i != wanted) for i, z in enumerate(some))


def test_channels_last():
    student, teacher, masks, weights = data()
    last = [z.contiguous(memory_format=torch.channels_last) for z in (student, teacher, masks)]
    got = gradients(masked_feature_loss, *last, weights)
    assert_equal_up_to_rounding(got, gradients(masked_feature_loss, student, teacher, masks, weights))


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, size) for size in (3, 5, 4, 6, 6))),
    seed=st.integers(0, 99),
    weighted=st.booleans(),
)
def test_any_shape(shape, seed, weighted):
    inputs = data(*shape, dtype=torch.float32, seed=seed)[: 4 if weighted else 3]
    got = gradients(masked_feature_loss, *inputs)
    assert_equal_up_to_rounding(got, gradients(formula, *(z.double() for z in inputs)))


def test_memory():
    """No tensor of T times the features: allocations stay below a few of theirs."""
    student, teacher, masks, weights = data(2, 16, 64, 32, 32, dtype=torch.float32)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        gradients(masked_feature_loss, student, teacher, masks, weights)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest <= 4 * max(student.nbytes, masks.nbytes)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_opcheck(backend):
    student, teacher, masks, _ = (z.to(device_of(backend)) for z in data(dtype=torch.float32))
    for needs in ([True, True], [False, True], [True, False]):
        torch.library.opcheck(
            torch.ops.kdkernels.masked_feature_loss.default,
            (student, teacher, masks[:, 0].contiguous(), needs, backend),
        )


@over_backends
def test_float16_under_a_loss_scale(backend):
    """Gradients of which float16 holds a digit, until they meet the loss scale."""
    student, teacher, masks, weights = data(1, 16, 2, 30, 40, dtype=torch.float16)
    inputs, scale = (student, teacher, masks, weights / 1000), torch.tensor(2.0**14)
    got = gradients(loss_on(backend), *inputs, upstream=scale)
    truth = gradients(formula, *(z.double() for z in inputs), upstream=scale)
    held = (truth[1] / scale).half() * scale
    assert (held - truth[1]).norm() / truth[1].norm() > 0.1
    for a, b in zip(got[1:], truth[1:]):
        assert ((a.double() - b).norm() / b.norm()).item() < 5e-4


@over_backends
def test_second_derivatives(backend):
    inputs = data(dtype=torch.float32)

    def slope(loss, *inputs):
        [of_student] = torch.autograd.grad(loss(*inputs), inputs[0], create_graph=True)
        return of_student.square().sum()

    got = gradients(partial(slope, loss_on(backend)), *inputs)
    assert_equal_up_to_rounding(
        got, gradients(partial(slope, formula), *(z.double() for z in inputs)), scale=4
    )


@over_backends
def test_backward_twice_and_no_shared_buffer(backend):
    inputs = [z.requires_grad_() for z in data(2, 3, 2, 20, 30, dtype=torch.float32)]
    loss = loss_on(backend)(*inputs)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(3 * loss, inputs)
    for a, copy, b in zip(first, kept, second):
        assert torch.equal(a, copy) and a.data_ptr() != b.data_ptr()
        torch.testing.assert_close(b, 3 * a)


def test_compile():
    inputs = data(dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(masked_feature_loss, fullgraph=True)
    assert_equal_up_to_rounding(gradients(compiled, *inputs), gradients(masked_feature_loss, *inputs))


def test_module():
    inputs = data()
    assert torch.equal(MaskedFeatureLoss(eps=0.5)(*inputs), masked_feature_loss(*inputs, eps=0.5))
    assert torch.equal(MaskedFeatureLoss()(*inputs[:3]), masked_feature_loss(*inputs[:3]))


def test_bad_input():
    student, teacher, masks, weights = data()
    for wrong, error, message in (
        ((1.0, teacher, masks), TypeError, "student must be a tensor of features"),
        ((student, None, masks), TypeError, "teacher must be a tensor of features"),
        ((student[0], teacher[0], masks), ValueError, r"student must have shape \(N, C, H, W\)"),
        (
            (student, teacher[:, :2], masks),
            ValueError,
            r"teacher must have the student's shape \(2, 3, 5, 6\)",
        ),
        ((student, teacher.float(), masks), TypeError, "teacher must have the student's dtype"),
        ((student, teacher, masks.long()), TypeError, "masks must be a floating or bool tensor"),
        ((student, teacher, masks[..., :3]), ValueError, r"masks must have shape \(2, T, 5, 6\)"),
        ((student, teacher, masks[:, 0]), ValueError, r"masks must have shape \(2, T, 5, 6\)"),
        ((student, teacher, masks, weights.long()), TypeError, "mask_weights must be a floating tensor"),
        (
            (student, teacher, masks, weights[:, :2]),
            ValueError,
            r"mask_weights must have shape \(2, 4\), got \(2, 2\)",
        ),
        ((student, teacher, masks.to("meta")), ValueError, "masks must be on the student's device"),
        ((student.long(), teacher.long(), masks), TypeError, "student must be float64"),
    ):
        with pytest.raises(error, match=message):
            masked_feature_loss(*wrong)
    with pytest.raises(ValueError, match="eps must be finite and at least 0"):
        masked_feature_loss(student, teacher, masks, eps=-1)
    with pytest.raises(ValueError, match="has no backend 'cuda', only reference, cpu, triton"):
        masked_feature_loss(student, teacher, masks, backend="cuda")
