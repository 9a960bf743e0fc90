"""pool_mse in every backend, against its reference in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

import pytest
import torch
from conftest import device_of
from testing import assert_near, assert_not_vacuous, assert_same_bits_whatever_the_threads
from torch import Tensor

import kdkernels.ops.pool_mse as op
from kdkernels import pool_mse, pool_mse_reference

OUTPUTS = ("pooled student", "pooled teacher", "mse")
SIDES = ("student", "teacher")
LAYOUTS = ("contiguous", "channels last")


def lay(x: Tensor, layout: str) -> Tensor:
    """A copy of x whose positions, or channels, lie side by side."""
    if layout == "contiguous":
        return x.contiguous()
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def maps(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5
    teacher = torch.randn(shape, generator=generator, dtype=torch.float64) - 0.25
    return student.to(dtype), teacher.to(dtype)


def gradients_of(outputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Random upstream gradients that all dtypes hold, of about the size that the loss of a batch has."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(x.shape, generator=generator).to(dtype).to(x) for x in outputs]


def run(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    backend: str,
    used: Sequence[int] = (0, 1, 2),
    upstream_dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The outputs, and the gradients from those `used`."""
    leaves = [x.detach().requires_grad_() for x in (student, teacher)]
    outputs = pool_mse(*leaves, mask=mask, backend=backend)
    upstream = gradients_of(outputs, upstream_dtype or student.dtype)
    gradients = torch.autograd.grad(
        [outputs[k] for k in used], leaves, [upstream[k] for k in used], allow_unused=True
    )
    return [x.detach() for x in outputs], list(gradients)


def compare(
    backend: str,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    used: Sequence[int] = (0, 1, 2),
    vacuous: bool = False,
) -> None:
    """Outputs and gradients of `backend` against the truth, under random upstream gradients."""
    dtype, device = student.dtype, device_of(backend)
    exact = [x.double() for x in (student, teacher)]
    truth, true_gradients = run(*exact, mask, "reference", used, dtype)
    reference, reference_gradients = run(student, teacher, mask, "reference", used)
    moved = [x.to(device) for x in (student, teacher)]
    got, gradients = run(*moved, None if mask is None else mask.to(device), backend, used)

    largest = max(x.abs().max().item() for x in exact)
    difference = (exact[0] - exact[1]).abs().max().item()
    positions, elements = math.prod(student.shape[2:]), math.prod(student.shape[1:])
    slope = 2 * difference / elements * (2 in used) + 1 / positions * bool({0, 1} & set(used))
    checks = [
        (*one, magnitude, name)
        for *one, magnitude, name in zip(got, truth, reference, (largest, largest, difference**2), OUTPUTS)
    ]
    for side, *one in zip(SIDES, gradients, true_gradients, reference_gradients):
        if one[1] is None:
            assert one[0] is None
        else:
            checks.append((*one, 3 * slope, f"gradient of the {side}"))
    for value, true, by_reference, magnitude, name in checks:
        assert_near(value.cpu(), true, by_reference, magnitude, name)
        if not vacuous:
            assert_not_vacuous(true, by_reference, magnitude)


SHAPES = [(3, 5, 7, 7), (2, 70, 3, 3), (5, 24), (2, 6, 9, 130), (3, 40, 17), (2, 9, 2, 3, 4)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients(backend_dtype, shape, layout):
    backend, dtype = backend_dtype
    compare(backend, *(lay(x, layout) for x in maps(shape, dtype)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 3, 8, 17, 512])
@pytest.mark.parametrize("positions", [1, 2, 4, 7, 16, 49, 64])
def test_every_size(backend, channels, positions, layout):
    if positions in (2, 4, 16) and backend in ("triton", "cuda"):
        pytest.skip("nothing there depends on it")
    compare(backend, *(lay(x, layout) for x in maps((2, channels, positions), torch.float32)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("batch", "channels", "positions"), [(1, 40, 3136), (2, 2048, 49), (1, 3, 40_000)])
def test_long_sums_are_accurate(backend, batch, channels, positions, layout):
    if batch * positions * channels > 130_000 and backend in ("triton", "cuda"):
        pytest.skip("slow where a GPU is only played")
    student, teacher = maps((batch, channels, positions), torch.float32)
    compare(backend, *(lay(x, layout) for x in (student, teacher)))
    # Of equal terms the roundings all go one way.
    student, teacher = torch.full_like(student, 1.1), torch.full_like(teacher, -0.7)
    outputs = pool_mse(*(lay(x, layout).to(device_of(backend)) for x in (student, teacher)), backend=backend)
    for got, true in zip(outputs, (1.1, -0.7, 1.8**2)):
        assert (got / true - 1).abs().max() < 4e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_last_position_and_channel_count(backend, layout):
    for shape in ((2, 5, 49), (2, 130, 9), (2, 3, 1500), (2, 1100), (2, 600, 3)):
        student, teacher = torch.zeros(shape), torch.zeros(shape)
        student.view(2, -1)[0, -1], teacher.view(2, -1)[1, -1] = 8.0, 4.0
        compare(backend, lay(student, layout), lay(teacher, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_that_do_not_count_may_hold_anything(backend_dtype, layout):
    backend, dtype = backend_dtype
    device = device_of(backend)
    mask = torch.tensor([True, False, True, False])
    for shape in ((4, 6, 5, 5), (4, 30)):
        student, teacher = (lay(x, layout) for x in maps(shape, dtype))
        compare(backend, student, teacher, mask)
        got = run(student.to(device), teacher.to(device), mask.to(device), backend)
        student[1], student[3], teacher[~mask] = math.nan, math.inf, math.nan
        dirty = run(student.to(device), teacher.to(device), mask.to(device), backend)
        for before, after in zip((*got[0], *got[1]), (*dirty[0], *dirty[1])):
            assert torch.equal(before, after)
            assert (after[~mask.to(device)] == 0).all()


def test_nobody_counts(backend):
    device = device_of(backend)
    student = torch.full((3, 4, 5), math.nan, device=device)
    outputs, gradients = run(student, student, torch.zeros(3, dtype=torch.bool, device=device), backend)
    assert all((x == 0).all() for x in (*outputs, *gradients))


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
def test_unused_outputs(backend, used):
    for layout in LAYOUTS:
        compare(backend, *(lay(x, layout) for x in maps((3, 6, 7, 7), torch.float32)), used=used)
    mask = torch.tensor([True, False, True])
    compare(backend, *maps((3, 6, 40, 30), torch.float32), mask, used=used)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wanted", [("student",), ("teacher",), ()], ids=str)
def test_gradients_only_where_required(backend, wanted, layout):
    device = device_of(backend)
    student, teacher = (lay(x, layout).to(device) for x in maps((3, 6, 7, 7), torch.float32))
    outputs, expected = run(student, teacher, None, backend)
    leaves = [x.clone().requires_grad_(name in wanted) for name, x in zip(SIDES, (student, teacher))]
    found = pool_mse(*leaves, backend=backend)
    assert all(torch.equal(a.detach(), b) for a, b in zip(found, outputs))
    if not wanted:
        assert not any(x.requires_grad for x in found)
        return
    upstream = gradients_of(found, torch.float32)
    used = [k for k in range(3) if found[k].requires_grad]
    torch.autograd.backward([found[k] for k in used], [upstream[k] for k in used])
    for name, leaf, true in zip(SIDES, leaves, expected):
        assert torch.equal(leaf.grad, true) if name in wanted else leaf.grad is None


def test_the_backward_does_only_what_is_asked(monkeypatch):
    """The launcher's calls: upstream gradients that there are, gradients that are wanted."""
    calls = []
    run_backward = op._run_bwd
    monkeypatch.setattr(op, "_run_bwd", lambda *a: (calls.append(a), run_backward(*a))[1])
    student, teacher = (x.requires_grad_() for x in maps((2, 3, 4), torch.float32))
    for k, needs in ((0, [True, False]), (1, [False, True]), (2, [True, True])):
        pool_mse(student, teacher, backend="cpu")[k].sum().backward()
        *_, of_student, of_teacher, of_mse, got, _ = calls.pop()
        assert [x is not None for x in (of_student, of_teacher, of_mse)] == [k == j for j in range(3)]
        assert got == needs and not calls
    outputs = pool_mse(student, teacher.detach(), backend="cpu")
    torch.autograd.backward(outputs[1], torch.ones(2, 3))  # the teacher's features alone: nothing to do
    assert not calls


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_maps_are_at_no_distance(backend_dtype, layout):
    backend, dtype = backend_dtype
    x = lay(maps((3, 20, 7, 7), dtype)[0], layout).to(device_of(backend))
    outputs, gradients = run(x, x.clone(), None, backend)
    assert torch.equal(outputs[0], outputs[1]) and (outputs[2] == 0).all()
    assert all(torch.isfinite(g).all() for g in gradients)
    _, gradients = run(x, x.clone(), None, backend, used=(2,))
    assert all((g == 0).all() for g in gradients)


def test_nan_and_infinity_show(backend):
    student, teacher = (x.to(device_of(backend)) for x in maps((3, 9, 10), torch.float32))
    student[1, 2, 3], teacher[2, 8, 9] = math.nan, math.inf
    (pooled, target, mse), (of_student, _) = run(student, teacher, None, backend)
    assert pooled.isnan().nonzero().tolist() == [[1, 2]]
    assert target.isinf().nonzero().tolist() == [[2, 8]]
    assert mse[0].isfinite() and mse[1].isnan() and mse[2] == math.inf
    assert of_student[0].isfinite().all() and of_student[1, 2, 3].isnan()


STRIDED = {
    "channels": lambda x: x[:, 1:6],
    "samples": lambda x: x[::2],
    "positions": lambda x: x[..., 1:],
    "transposed": lambda x: x.transpose(2, 3),
    "expanded": lambda x: x[:1].expand(4, 8, 6, 5),
    "offset": lambda x: x.flatten()[1 : 1 + 3 * 8 * 6 * 5].view(3, 8, 6, 5),
}


@pytest.mark.parametrize("view", STRIDED)
def test_layouts(backend_dtype, view):
    backend, dtype = backend_dtype
    student, teacher = (x.to(device_of(backend)) for x in maps((4, 8, 6, 5), dtype))
    pairs = [
        (STRIDED[view](student), STRIDED[view](teacher)),
        (STRIDED[view](student), STRIDED[view](teacher).contiguous()),
        (STRIDED[view](student).contiguous(), STRIDED[view](teacher)),
        (STRIDED[view](student), lay(STRIDED[view](teacher), "channels last")),
        (lay(STRIDED[view](student), "channels last"), STRIDED[view](teacher)),
    ]
    for pair in pairs:
        compare(backend, *(x.cpu() if x.device.type != "cpu" else x for x in pair))


def test_one_alignment_for_each_map(backend):
    """Maps whose rows do not start alike with respect to 16 bytes."""
    device = device_of(backend)
    storage = [x.to(device) for x in maps((2 * 8 * 49 + 8,), torch.float32)]
    for at, other in ((0, 1), (1, 1), (3, 2)):
        views = [x[k : k + 2 * 8 * 49].view(2, 8, 49) for x, k in zip(storage, (at, other))]
        outputs, gradients = run(*views, None, backend)
        expected = run(*(x.clone() for x in views), None, "reference")
        for got, true in zip((*outputs, *gradients), (*expected[0], *expected[1])):
            torch.testing.assert_close(got, true, rtol=1e-5, atol=1e-6)


def test_gradients_lie_as_the_maps_do(backend):
    if backend == "reference":
        pytest.skip("lays them as autograd does")
    student, teacher = (lay(x, "channels last") for x in maps((2, 8, 3, 3), torch.float32))
    student, teacher = (x.to(device_of(backend)).requires_grad_() for x in (student, teacher))
    assert student.is_contiguous(memory_format=torch.channels_last)
    for gradient in torch.autograd.grad(
        [x.sum() for x in pool_mse(student, teacher, backend=backend)], (student, teacher)
    ):
        assert gradient.is_contiguous(memory_format=torch.channels_last)


def test_maps_are_not_copied():
    for layout in LAYOUTS:
        pair = [lay(x, layout) for x in maps((2, 8, 3, 3), torch.float32)]
        assert all(a is b or a.data_ptr() == b.data_ptr() for a, b in zip(op._alike(*pair), pair))
        other = lay(pair[1], next(x for x in LAYOUTS if x != layout))
        student, teacher = op._alike(pair[0], other)
        assert student is pair[0] and teacher.stride() == student.stride()


def test_backward_twice(backend):
    student, teacher = (x.to(device_of(backend)).requires_grad_() for x in maps((2, 5, 7), torch.float32))
    outputs = pool_mse(student, teacher, backend=backend)
    upstream = gradients_of(outputs, torch.float32)
    first = torch.autograd.grad(outputs, (student, teacher), upstream, retain_graph=True)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(outputs, (student, teacher), [2 * x for x in upstream], retain_graph=True)
    for a, b, c in zip(first, kept, second):
        assert torch.equal(a, b) and a.data_ptr() != c.data_ptr()
        torch.testing.assert_close(c, 2 * a)


def test_empty_batch(backend):
    for shape in ((0, 4, 3, 3), (0, 5)):
        leaves = [torch.zeros(shape, device=device_of(backend), requires_grad=True) for _ in range(2)]
        outputs = pool_mse(*leaves, backend=backend)
        assert [tuple(x.shape) for x in outputs] == [(0, shape[1]), (0, shape[1]), (0,)]
        for gradient in torch.autograd.grad([x.sum() for x in outputs], leaves):
            assert gradient.shape == shape


def test_closed_form(backend):
    device = device_of(backend)
    student = torch.tensor([[[1.0, 3.0], [0.0, 2.0]]], device=device, requires_grad=True)
    teacher = torch.tensor([[[2.0, 3.0], [4.0, 0.0]]], device=device, requires_grad=True)
    pooled, target, mse = pool_mse(student, teacher, backend=backend)
    assert pooled.tolist() == [[2.0, 1.0]] and target.tolist() == [[2.5, 2.0]]
    assert mse.tolist() == [(1 + 0 + 16 + 4) / 4]
    of_student, of_teacher = torch.autograd.grad((mse.sum(), pooled[0, 1]), (student, teacher))
    assert of_student.tolist() == [[[-0.5, 0.0], [-2.0 + 0.5, 1.0 + 0.5]]]
    assert of_teacher.tolist() == [[[0.5, 0.0], [2.0, -1.0]]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout):
    mask = torch.tensor([True, False, True])
    for backend in ("reference", "cpu"):
        leaves = [lay(x, layout).requires_grad_() for x in maps((3, 2, 3, 2), torch.float64)]
        for option in (None, mask):

            def function(student: Tensor, teacher: Tensor, option=option, backend=backend) -> tuple:
                return pool_mse(student, teacher, mask=option, backend=backend)

            assert torch.autograd.gradcheck(function, leaves)
            assert torch.autograd.gradgradcheck(function, leaves)


def test_double_backward(backend):
    student, teacher = (x.to(device_of(backend)).requires_grad_() for x in maps((2, 3, 5), torch.float32))

    def penalty(function) -> list[Tensor]:
        pooled, _, mse = function(student, teacher)
        loss = pooled.square().sum() + mse.square().sum()
        [gradient] = torch.autograd.grad(loss, student, create_graph=True)
        return list(torch.autograd.grad(gradient.square().sum(), (student, teacher)))

    found = penalty(lambda s, t: pool_mse(s, t, backend=backend))
    for got, true in zip(found, penalty(pool_mse_reference)):
        torch.testing.assert_close(got, true, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_do_not_change_a_bit(layout):
    student, teacher = (lay(x, layout) for x in maps((7, 40, 15, 11), torch.float32))
    assert_same_bits_whatever_the_threads(lambda: chain(*run(student, teacher, None, "cpu")))


# Several pieces of a sample; several tiles of channels in a piece.
@pytest.mark.parametrize("shape", [(2, 100, 83), (2, 700, 3)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_deterministic(backend, layout, shape, monkeypatch):
    student, teacher = (lay(x, layout).to(device_of(backend)) for x in maps(shape, torch.float32))
    runs = []
    for seed in range(3):  # where a GPU is only played, it runs its threads in another order each time
        monkeypatch.setenv("CUDA_ON_CPU_SEED", str(seed))
        runs.append(run(student, teacher, None, backend))
    for outputs, gradients in runs[1:]:
        for a, b in zip((*outputs, *gradients), (*runs[0][0], *runs[0][1])):
            assert torch.equal(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(backend, layout):
    if backend == "reference":
        pytest.skip("has no registered op")
    student, teacher = (lay(x, layout).to(device_of(backend)) for x in maps((3, 4, 5, 5), torch.float32))
    mask = torch.tensor([True, False, True], device=student.device)
    pooled, mse = torch.randn(2, 3, 4, device=student.device), torch.randn(3, device=student.device)
    checks = ("test_schema", "test_faketensor")
    ops = torch.ops.kdkernels
    for option in (None, mask):
        torch.library.opcheck(ops.pool_mse_fwd, (student, teacher, option, backend), test_utils=checks)
        for upstream in ((*pooled, mse), (None, None, mse), (pooled[0], None, None)):
            for needs in ((True, True), (True, False), (False, True)):
                arguments = (student, teacher, option, *upstream, needs, backend)
                torch.library.opcheck(ops.pool_mse_bwd, arguments, test_utils=checks)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("used", [(0, 1, 2), (0, 2), (2,), (0,)], ids=str)
def test_compiles_into_one_graph(used, layout):
    student, teacher = (lay(x, layout) for x in maps((2, 4, 6, 6), torch.float32))
    mask = torch.tensor([True, False])

    def step(student: Tensor, teacher: Tensor) -> Tensor:
        outputs = pool_mse(student.sin(), teacher, mask=mask)
        return sum((outputs[k].square().sum() for k in used), start=torch.zeros(()))

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in (student, teacher)]
        loss = function(*leaves)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves, allow_unused=True)])
    for a, b in zip(*results):
        if a is None or b is None:  # a graph may give zeros for what nothing depends on
            assert all(x is None or (x == 0).all() for x in (a, b))
        else:
            torch.testing.assert_close(a, b)


def test_compiles_through_inductor():
    """Whatever layout its own code would choose for them, the op gets maps that lie alike."""
    student, teacher = maps((2, 8, 6, 6), torch.float32)
    student = lay(student, "channels last")

    def step(student: Tensor, teacher: Tensor) -> Tensor:
        pooled, _, mse = pool_mse(student * 2, teacher + 1)
        return pooled.square().sum() + mse.sum()

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        leaf = student.clone(memory_format=torch.preserve_format).requires_grad_()
        loss = function(leaf, teacher)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


X = torch.zeros(2, 3, 4)
MASK = torch.ones(2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"student": [1.0]}, TypeError, r"student must be a tensor of features, got \[1.0\] \(list\)"),
        ({"teacher": None}, TypeError, r"teacher must be a tensor of features, got None \(NoneType\)"),
        ({"student": X[0, 0], "teacher": X[0, 0]}, ValueError, r"student must have shape .*, got \(4,\)"),
        ({"student": X[:, :0], "teacher": X[:, :0]}, ValueError, r"at least one channel .*, got \(2, 0, 4\)"),
        ({"student": X[..., :0], "teacher": X[..., :0]}, ValueError, r"position, got \(2, 3, 0\)"),
        (
            {"teacher": X[:, :2]},
            ValueError,
            r"teacher must have the student's shape \(2, 3, 4\), got \(2, 2, 4\)",
        ),
        ({"teacher": X.half()}, TypeError, r"the student's dtype torch.float32, got torch.float16"),
        ({"teacher": X.to("meta")}, ValueError, r"teacher must be on the student's device cpu, got meta"),
        ({"student": X.long(), "teacher": X.long()}, TypeError, r"student must be float64, .*, got int64"),
        ({"mask": MASK.float()}, TypeError, r"mask must be a bool tensor, got a torch.float32 tensor"),
        ({"mask": [True, False]}, TypeError, r"mask must be a bool tensor, got \[True, False\] \(list\)"),
        (
            {"mask": MASK[:1]},
            ValueError,
            r"mask must have one value for each sample, shape \(2,\), got \(1,\)",
        ),
        ({"mask": MASK.to("meta")}, ValueError, r"mask must be on the student's device cpu, got meta"),
        ({"backend": "gpu"}, ValueError, r"backend must be None or one of .*, got 'gpu'"),
        ({"backend": 3}, TypeError, r"backend must be None or a name, got 3"),
        (
            {"student": X.double(), "teacher": X.double(), "backend": "triton"},
            TypeError,
            r"takes float32, .*",
        ),
    ],
)
def test_bad_input_says_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        pool_mse(**{"student": X, "teacher": X, **arguments})
