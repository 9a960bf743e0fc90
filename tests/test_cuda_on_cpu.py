"""The CUDA kernels on CPU memory, against the formulas in float64; and the executor they run on.

Truth is float64 on the same inputs. A computation in float32 may be off by a few roundings of its exponents,
hence `magnitude` = 1 + max|logits| / T in the tolerances, times the terms that each result adds up, plus one
rounding of the output.
"""

import ctypes
import math
import mmap
import subprocess

import pytest
import torch
from cuda_on_cpu.build import HERE, ROOT, build

# The objects are shared with the module that conftest.py builds, and kept from run to run.
CACHE = ROOT / "build" / "cuda_on_cpu"

EPS = torch.finfo(torch.float32).eps
CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OUTPUTS = ["loss", "grad_input", "grad_target", "grad_input_temperature", "grad_target_temperature"]
LAUNCH_FAILURE = 719


def fields(kind, *names):
    return [(name, kind) for name in names]


class KlDivParams(ctypes.Structure):
    _fields_ = (
        *fields(ctypes.c_void_p, "input", "target", "input_temperature", "target_temperature"),
        *fields(ctypes.c_void_p, "row_scale", "mask", *OUTPUTS),
        *fields(ctypes.c_double, "input_temperature_value", "target_temperature_value", "scale"),
        *fields(ctypes.c_int64, "rows", "classes", "input_stride", "target_stride"),
        *fields(ctypes.c_int32, "dtype"),
    )


class ScaleRowsParams(ctypes.Structure):
    _fields_ = (
        *fields(ctypes.c_void_p, "grad", "scale"),
        *fields(ctypes.c_int64, "rows", "classes", "scale_stride"),
        *fields(ctypes.c_int32, "dtype"),
    )


class LogitLossParams(ctypes.Structure):
    _fields_ = (
        *fields(ctypes.c_void_p, "input", "target", "labels", "input_temperature", "target_temperature"),
        *fields(ctypes.c_void_p, "soft_scale", "row_scale", "mask"),
        *fields(ctypes.c_void_p, "loss", "terms", "grad_input", "grad_input_temperature"),
        *fields(ctypes.c_double, "input_temperature_value", "target_temperature_value", "soft_scale_value"),
        *fields(ctypes.c_double, "scale", "first", "second", "mix"),
        *fields(ctypes.c_double, "hard_weight", "label_smoothing", "z_loss", "logit_mse"),
        *fields(ctypes.c_int64, "rows", "classes", "input_stride", "target_stride", "grad_stride"),
        *fields(ctypes.c_int32, "divergence"),
        *fields(ctypes.c_bool, "standardize"),
        *fields(ctypes.c_int32, "dtype", "grad_dtype"),
    )


class TopkKlDivParams(ctypes.Structure):
    _fields_ = (
        *fields(ctypes.c_void_p, "input", "log_probs", "indices", "input_temperature", "row_scale", "mask"),
        *fields(ctypes.c_void_p, "loss", "grad_input", "grad_log_probs", "grad_input_temperature"),
        *fields(ctypes.c_double, "input_temperature_value", "scale"),
        *fields(ctypes.c_int64, "rows", "classes", "k", "input_stride", "grad_stride"),
        *fields(ctypes.c_int32, "tail", "dtype"),
    )


MAX_TEACHERS = 16


class MultiTeacherKlDivParams(ctypes.Structure):
    _fields_ = (
        *fields(ctypes.c_void_p, "input"),
        ("targets", ctypes.c_void_p * MAX_TEACHERS),
        ("target_strides", ctypes.c_int64 * MAX_TEACHERS),
        *fields(ctypes.c_void_p, "temperature", "weight", "teacher_mask", "mask"),
        *fields(ctypes.c_void_p, "loss", "losses", "grad_input"),
        *fields(ctypes.c_double * MAX_TEACHERS, "temperature_values", "weight_values"),
        *fields(ctypes.c_int64 * 2, "temperature_strides", "weight_strides", "teacher_mask_strides"),
        *fields(ctypes.c_int64, "rows", "classes", "teachers", "input_stride"),
        *fields(ctypes.c_int32, "dtype"),
    )


SINKHORN_OUTPUTS = ["loss", "f", "g", "f_self", "g_self", "grad_x", "grad_y", "grad_a", "grad_b"]


class SinkhornParams(ctypes.Structure):
    _fields_ = (
        *fields(ctypes.c_void_p, "x", "y", "a", "b", "extra", "extra_x", "extra_y", *SINKHORN_OUTPUTS),
        *fields(ctypes.c_void_p, "plan", "plan_x", "plan_y", "scratch"),
        *fields(ctypes.c_double, "epsilon", "rho", "tol"),
        *fields(ctypes.c_int64, "problems", "n", "m", "d"),
        *fields(ctypes.c_int32, "iterations", "cost"),
        *fields(ctypes.c_bool, "debias"),
        *fields(ctypes.c_int32, "dtype"),
    )


@pytest.fixture(scope="session")
def kernels():
    sources = [HERE / "executor_kernels.cu", HERE / "shim.cpp"]
    library = ctypes.CDLL(str(build(CACHE, sources=sources)))
    library.kdk_error_string.restype = ctypes.c_char_p
    return library


@pytest.fixture(scope="session")
def program():
    sources = [HERE / "executor_kernels.cu", HERE / "sanitize_main.cpp"]
    return build(CACHE, sources=sources, sanitize=True, program=True)


@pytest.fixture(autouse=True)
def fixed_seed(monkeypatch):
    monkeypatch.setenv("CUDA_ON_CPU_SEED", "0")


def pointer(tensor):
    return None if tensor is None else tensor.data_ptr()


def place(x, *, offset=0, padding=0):
    """A copy of x (M, N) that starts `offset` elements after a 64-byte boundary, rows `padding` apart."""
    rows, classes = x.shape
    stride = classes + padding
    storage = torch.full((offset + rows * stride + 32,), math.nan, dtype=x.dtype)
    offset += (-storage.data_ptr() // x.element_size()) % (64 // x.element_size())
    return storage.as_strided(x.shape, (stride, 1), offset).copy_(x)


class Guarded:
    """An output of NaN between guard elements that nothing may touch."""

    GUARD = 16

    def __init__(self, *shape, dtype=torch.float32, offset=0):
        size = math.prod(shape)
        self.storage = torch.full((size + 2 * self.GUARD + offset + 32,), math.nan, dtype=dtype)
        start = self.GUARD + offset
        start += (-(self.storage.data_ptr() // self.storage.element_size() + self.GUARD)) % 32
        self.span = slice(start, start + size)
        self.value = self.storage[self.span].view(shape)

    def checked(self):
        outside = self.storage.clone()
        outside[self.span] = math.nan
        assert outside.isnan().all(), "wrote outside its output"
        return self.value


def run_kl_div(
    kernels, s, t, *, Tq=1.0, Tp=1.0, scale=1.0, mask=None, outputs=OUTPUTS, offset=0, target_offset=None
):
    """Every output asked for, by name. Temperatures and scale are numbers or tensors (M,)."""
    rows, classes = s.shape
    assert s.stride(1) == t.stride(1) == 1 or classes == 1
    params = KlDivParams(input=pointer(s), target=pointer(t), mask=pointer(mask))
    params.rows, params.classes, params.dtype = rows, classes, CODES[s.dtype]
    params.input_stride, params.target_stride = s.stride(0), t.stride(0)
    for name, value in [("input_temperature", Tq), ("target_temperature", Tp), ("row_scale", scale)]:
        if isinstance(value, torch.Tensor):
            setattr(params, name, pointer(value))
        else:
            setattr(params, "scale" if name == "row_scale" else f"{name}_value", value)
    buffers = {}
    for name in outputs:
        if name in ("grad_input", "grad_target"):
            shift = target_offset if name == "grad_target" and target_offset is not None else offset
            buffers[name] = Guarded(rows, classes, dtype=s.dtype, offset=shift)
        else:
            buffers[name] = Guarded(rows)
        setattr(params, name, pointer(buffers[name].value))
    error = kernels.kdk_kl_div(ctypes.byref(params))
    assert error == 0, kernels.kdk_error_string(error).decode()
    return {name: buffer.checked() for name, buffer in buffers.items()}


def column(x):
    return torch.as_tensor(x, dtype=torch.float64).reshape(-1, 1)


def reference(s, t, *, Tq=1.0, Tp=1.0, scale=1.0, mask=None):
    """name: (value, what the tolerance is proportional to), in float64."""
    s, t, Tq, Tp, scale = s.double(), t.double(), column(Tq), column(Tp), column(scale)
    log_q, log_p = torch.log_softmax(s / Tq, 1), torch.log_softmax(t / Tp, 1)
    q, p = log_q.exp(), log_p.exp()
    delta = log_p - log_q
    no_p = p == 0
    loss = torch.where(no_p, 0, p * delta).sum(1, keepdim=True)
    slope = torch.where(delta == math.inf, math.inf, delta - loss)
    d_q = q - p
    d_p = torch.where(no_p, 0, p * slope)

    def centered(x):
        return x - x.max(1, keepdim=True).values

    def moment(weight, x):
        return torch.where(weight == 0, 0, weight * centered(x)).sum(1, keepdim=True)

    finite = [torch.where(x.isfinite(), x.abs(), 0).amax(1, keepdim=True) for x in (s / Tq, t / Tp)]
    magnitude = 1 + torch.maximum(*finite)
    weight_q = magnitude * (p + q)
    weight_p = magnitude * p * (1 + torch.where(no_p, 0, delta).abs() + loss)
    results = {
        "loss": (scale * loss, scale.abs() * magnitude * (loss + d_q.abs().sum(1, keepdim=True))),
        "grad_input": (scale * d_q / Tq, scale.abs() * weight_q / Tq),
        "grad_target": (scale * d_p / Tp, scale.abs() * weight_p / Tp),
        "grad_input_temperature": (
            -scale / Tq**2 * moment(d_q, s),
            scale.abs() / Tq**2 * moment(-weight_q, s),
        ),
        "grad_target_temperature": (
            -scale / Tp**2 * moment(d_p, t),
            scale.abs() / Tp**2 * moment(-weight_p, t),
        ),
    }
    if mask is not None:
        counted = mask.bool().reshape(-1, 1)
        results = {
            name: (torch.where(counted, value, 0), torch.where(counted, weight, 0))
            for name, (value, weight) in results.items()
        }
    gradients = ("grad_input", "grad_target")
    return {
        name: (value, weight) if name in gradients else (value[:, 0], weight[:, 0])
        for name, (value, weight) in results.items()
    }


def assert_close(got, want):
    for name, value in got.items():
        truth, weight = want[name]
        finite = truth.isfinite()
        assert torch.equal(value.isnan(), truth.isnan()), name
        infinite = truth.isinf()
        assert torch.equal(value[infinite].double(), truth[infinite]), name
        info = torch.finfo(value.dtype)
        # float16 has a fixed spacing below its normal range. Elsewhere probabilities below 2^-126 count as 0,
        # times logits of some thousands.
        smallest = 2.0**-24 if value.dtype == torch.float16 else 1e-30
        tolerance = 8 * EPS * weight + smallest
        if value.dtype != torch.float32:
            tolerance = tolerance + info.eps / 2 * truth.abs() * (1 + 8 * EPS)
        error = (value.double() - truth).abs()
        worst = (error[finite] / tolerance[finite]).max().item() if finite.any() else 0
        assert worst <= 1, f"{name}: {worst:.3g} tolerances off"


def logits(rows, classes, dtype=torch.float32, seed=0, spread=3.0):
    generator = torch.Generator().manual_seed(seed + 1000 * classes)
    return [(torch.randn(rows, classes, generator=generator) * spread).to(dtype) for _ in range(2)]


def check(kernels, s, t, *, Tq=1.0, Tp=1.0, scale=1.0, mask=None, **layout):
    got = run_kl_div(kernels, s, t, Tq=Tq, Tp=Tp, scale=scale, mask=mask, **layout)
    assert_close(got, reference(s, t, Tq=Tq, Tp=Tp, scale=scale, mask=mask))
    return got


SIZES = [1, 2, 7, 8, 31, 32, 33, 100, 127, 128, 253, 256, 257, 1000, 1021, 1024, 1025, 4099, 32000]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", SIZES)
def test_kl_div_sizes(kernels, classes, dtype):
    rows = 1 if classes == 32000 else 5
    s, t = logits(rows, classes, dtype)
    mask = torch.tensor([1, 0, 1, 1, 7], dtype=torch.uint8)[:rows]
    # A warp keeps up to 1024 classes when it needs no target's gradient: both kinds of kernel.
    for outputs in (OUTPUTS[:1], OUTPUTS[:2], OUTPUTS):
        check(kernels, s, t, Tq=2.0, Tp=2.0, scale=0.25, mask=mask, outputs=outputs)
    if classes <= 1025:
        check(kernels, s, t, Tq=2.0, Tp=0.75)


LAYOUTS = {
    "one element off": ({"offset": 1, "padding": 0}, {"offset": 1, "padding": 0}, 1, 1),
    "three elements off": ({"offset": 3, "padding": 8}, {"offset": 3, "padding": 16}, 3, 3),
    "odd strides": ({"offset": 0, "padding": 1}, {"offset": 0, "padding": 3}, 0, 0),
    "input off, target not": ({"offset": 1, "padding": 0}, {"offset": 0, "padding": 0}, 0, 0),
    "outputs off": ({"offset": 0, "padding": 0}, {"offset": 0, "padding": 0}, 1, 0),
    "grad_target off": ({"offset": 0, "padding": 0}, {"offset": 0, "padding": 0}, 0, 5),
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda name: name.replace(" ", "_"))
@pytest.mark.parametrize("classes", [1, 8, 127, 250, 1018, 1024, 2049])
def test_kl_div_layouts(kernels, classes, layout):
    input_place, target_place, offset, target_offset = LAYOUTS[layout]
    for dtype in (torch.float32, torch.bfloat16):
        s, t = logits(3, classes, dtype)
        s, t = place(s, **input_place), place(t, **target_place)
        for outputs in (OUTPUTS[:2], OUTPUTS):
            check(kernels, s, t, Tq=2.0, Tp=3.0, outputs=outputs, offset=offset, target_offset=target_offset)


@pytest.mark.parametrize("classes", [100, 1000, 2049])
def test_kl_div_expanded_rows(kernels, classes):
    s, t = logits(4, classes)
    check(kernels, s, t[:1].expand(4, classes), Tq=2.0, Tp=2.0)
    check(kernels, s[:1].expand(4, classes), t[:1].expand(4, classes), outputs=OUTPUTS[:1])


@pytest.mark.parametrize("classes", [33, 1000, 2049])
def test_kl_div_minus_infinity(kernels, classes):
    s, t = logits(6, classes)
    inf = math.inf
    s[0, ::3] = t[0, ::3] = -inf  # masked in both
    t[1, 1::2] = -inf  # P = 0 < Q
    s[2, 5] = -inf  # Q = 0 < P: an infinite loss
    s[3, :-1] = t[3, :-1] = -inf  # one class left
    s[4] = -inf  # nothing left
    t[5] = -inf
    for dtype in DTYPES:
        for Tp in (2.0, 3.0):
            got = check(kernels, s.to(dtype), t.to(dtype), Tq=2.0, Tp=Tp)
            assert got["loss"].isfinite().tolist() == [True, True, False, True, False, False]
            assert got["loss"][2] == inf
            assert got["grad_input"][2].isfinite().all()
            assert got["loss"][4:].isnan().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("classes", [33, 1000, 2049])
def test_kl_div_nan_and_infinity(kernels, classes, bad):
    s, t = logits(4, classes)
    s[0, 7] = bad
    t[1, classes - 1] = bad
    s[2, 0] = bad
    mask = torch.tensor([1, 1, 0, 1], dtype=torch.uint8)
    got = run_kl_div(kernels, s, t, Tq=2.0, Tp=2.0, mask=mask)
    for value in got.values():
        assert value[:2].isnan().all()
        assert (value[2] == 0).all()
        assert value[3].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [100, 1000, 2049])
def test_kl_div_large_logits(kernels, classes, dtype):
    s, t = logits(3, classes, dtype, spread=1e3)
    check(kernels, s, t, Tq=4.0, Tp=4.0)
    check(kernels, s, t, Tq=4.0, Tp=2.5)
    check(kernels, s + 1000, t - 1000, Tq=1.0, Tp=1.0)


@pytest.mark.parametrize("classes", [100, 1000, 32000])
@pytest.mark.parametrize("T", [2.0, 3.0])  # dividing by 3 rounds
def test_kl_div_near_convergence(kernels, classes, T):
    s, difference = logits(2, classes)
    t = s + 1e-3 / 3 * difference
    for outputs in (OUTPUTS[:2], OUTPUTS[:3]):
        got = run_kl_div(kernels, s, t, Tq=T, Tp=T, outputs=outputs)
        want = reference(s, t, Tq=T, Tp=T)
        for name in outputs:
            truth = want[name][0]
            assert ((got[name] - truth).norm() / truth.norm()) < 1e-4, name
        # Relative to each element's own size, not the row's largest.
        truth = want["grad_input"][0]
        typical = (truth.abs() / (want["grad_input"][1])).mean() * want["grad_input"][1]
        assert ((got["grad_input"] - truth).abs() / typical).max() < 1e-3
    identical = run_kl_div(kernels, s, s.clone(), Tq=T, Tp=T)
    assert all((value == 0).all() for value in identical.values())


@pytest.mark.parametrize("classes", [10, 1000, 2049])
def test_kl_div_per_row_arguments(kernels, classes):
    s, t = logits(5, classes)
    Tq, Tp = torch.tensor([1.0, 2.0, 0.5, 4.0, 3.0]), torch.tensor([1.0, 1.5, 0.5, 2.0, 8.0])
    scale = torch.tensor([0.0, 1.0, -2.0, 0.125, 3.0])
    check(kernels, s, t, Tq=Tq, Tp=Tp, scale=scale)
    check(kernels, s, t, Tq=Tq, Tp=2.0, scale=0.5)
    check(kernels, s, t, Tq=2.0, Tp=Tp, scale=scale, mask=torch.tensor([1, 1, 0, 0, 1], dtype=torch.uint8))


@pytest.mark.parametrize("classes", [100, 1000, 2049])
def test_kl_div_subsets_of_outputs(kernels, classes):
    s, t = logits(3, classes)
    everything = run_kl_div(kernels, s, t, Tq=2.0, Tp=3.0)
    want = reference(s, t, Tq=2.0, Tp=3.0)
    for chosen in range(1 << len(OUTPUTS)):
        outputs = [name for i, name in enumerate(OUTPUTS) if chosen >> i & 1]
        got = run_kl_div(kernels, s, t, Tq=2.0, Tp=3.0, outputs=outputs)
        assert_close(got, want)
        assert list(got) == outputs
    assert_close(everything, want)


@pytest.mark.parametrize("classes", [5, 100, 1000, 2049])
def test_kl_div_does_not_depend_on_the_order_of_threads(kernels, classes, monkeypatch):
    s, t = logits(9, classes)
    first = run_kl_div(kernels, s, t, Tq=2.0, Tp=3.0)
    for seed in range(1, 9):
        monkeypatch.setenv("CUDA_ON_CPU_SEED", str(seed))
        again = run_kl_div(kernels, s, t, Tq=2.0, Tp=3.0)
        for name, value in first.items():
            assert torch.equal(value.view(torch.int32), again[name].view(torch.int32)), name


@pytest.mark.parametrize("classes", [1, 1025])
def test_kl_div_more_rows_than_blocks(kernels, classes):
    # 65536 blocks, of four rows each or of one; nearly all rows are masked to keep this quick.
    rows = 4 * 65536 + 6 if classes == 1 else 65536 + 2
    s = torch.zeros(1, classes)
    t = torch.linspace(0, 1, classes)[None]
    mask = torch.zeros(rows, dtype=torch.uint8)
    counted = [0, 1, rows - 2, rows - 1] if classes == 1 else [0, rows - 1]
    mask[counted] = 1
    outputs = ["loss", "grad_input"] if classes == 1 else ["loss"]
    got = run_kl_div(kernels, s.expand(rows, -1), t.expand(rows, -1), mask=mask, outputs=outputs)
    want, weight = reference(s, t)["loss"]
    assert ((got["loss"][counted] - want).abs() <= 8 * EPS * weight).all()
    assert (got["loss"] != 0).sum() == (0 if classes == 1 else len(counted))
    assert not got["loss"].isnan().any()


def test_kl_div_offsets_beyond_int32(kernels):
    # Row 2 starts 2^31 + 16 elements in; untouched pages of the mapping take no memory.
    stride = 2**30 + 8
    size = 2 * (2 * stride + 64)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    storage = torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=torch.bfloat16)
    x, t = logits(3, 64, torch.bfloat16)
    s = storage.as_strided((3, 64), (stride, 1))
    s.copy_(x)
    check(kernels, s, t)
    check(kernels, t, s)


def test_kl_div_refuses(kernels):
    s, t = logits(2, 8, torch.float64)
    params = KlDivParams(input=pointer(s), target=pointer(t), rows=2, classes=8, dtype=CODES[torch.float64])
    assert kernels.kdk_kl_div(ctypes.byref(params)) == 1
    assert kernels.kdk_error_string(1) == b"invalid argument"
    params.dtype, params.rows = 0, 0
    assert kernels.kdk_kl_div(ctypes.byref(params)) == 0


def guarded(rows, classes, dtype, *, offset=0, padding=0):
    """An output (rows, classes), rows `padding` apart, and a check that nothing beside it was written."""
    whole = Guarded(rows, classes + padding, dtype=dtype, offset=offset)
    view = whole.value[:, :classes]

    def checked():
        assert whole.checked()[:, classes:].isnan().all(), "wrote between its rows"
        return view

    return view, checked


DIVERGENCES = [
    "none", "kl", "reverse_kl", "mixture", "total_variation", "decoupled", "reverse_decoupled", "normalized",
    "reverse_normalized", "statistics",
]  # fmt: skip
FIRST, SECOND, MIX = 0.6, 1.3, 0.3
HARD, SMOOTHING, Z_LOSS, MSE = 0.5, 0.1, 0.01, 0.2
SOFT_SCALE, SCALE = 0.9, 0.7


def run_logit_loss(
    kernels, divergence, s, t, y, *, standardize=False, mask=None, offset=0, padding=0, dtype=None
):
    """Every output, by name, at temperatures 2 and 3, with cross-entropy, z-loss and MSE."""
    rows, classes = s.shape
    params = LogitLossParams(input=pointer(s), labels=pointer(y), mask=pointer(mask))
    params.target, params.target_stride = pointer(t), t.stride(0)
    params.rows, params.classes, params.dtype = rows, classes, CODES[s.dtype]
    params.input_stride, params.grad_stride = s.stride(0), classes + padding
    params.input_temperature_value, params.target_temperature_value = 2.0, 3.0
    params.soft_scale_value, params.scale = SOFT_SCALE, SCALE
    params.first, params.second, params.mix = FIRST, SECOND, MIX
    params.hard_weight, params.label_smoothing, params.z_loss = HARD, SMOOTHING, Z_LOSS
    params.logit_mse = 0 if divergence == "statistics" else MSE
    params.divergence, params.standardize = DIVERGENCES.index(divergence), standardize
    params.grad_dtype = CODES[dtype or s.dtype]
    loss, terms, of_temperature = Guarded(rows), Guarded(5, rows), Guarded(rows)
    params.loss, params.terms = pointer(loss.value), pointer(terms.value)
    params.grad_input_temperature = pointer(of_temperature.value)
    gradient, checked = guarded(rows, classes, dtype or s.dtype, offset=offset, padding=padding)
    params.grad_input = pointer(gradient)
    error = kernels.kdk_logit_loss(ctypes.byref(params))
    assert error == 0, kernels.kdk_error_string(error).decode()
    return {
        "loss": loss.checked(),
        "terms": terms.checked(),
        "grad_input": checked(),
        "grad_input_temperature": of_temperature.checked(),
    }


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(1)


def logit_loss_formula(divergence, s, t, y, *, standardize=False):
    """The same in float64, of finite logits, by the formulas as they are written."""
    s, t, T = s.double().requires_grad_(), t.double(), torch.full((len(s),), 2.0, dtype=torch.float64)
    T.requires_grad_()
    one = [s, t]
    if standardize:
        one = [(x - x.mean(1, keepdim=True)) / (1e-7 + x.std(1, keepdim=True)) for x in one]
    log_q, log_p = torch.log_softmax(one[0] / T[:, None], 1), torch.log_softmax(one[1] / 3, 1)
    if divergence.startswith("reverse"):
        log_p, log_q, one = log_q, log_p, one[::-1]
    kind = divergence.removeprefix("reverse_")
    p, q, label = log_p.exp(), log_q.exp(), y[:, None]
    first = zero = 0 * s.sum(1)
    soft = zero
    if kind in ("kl", "statistics"):
        soft = SOFT_SCALE * kl(log_p, log_q)
    elif kind == "mixture":
        log_m = (MIX * p + (1 - MIX) * q).log()
        soft = SOFT_SCALE * (FIRST * kl(log_p, log_m) + SECOND * kl(log_q, log_m))
    elif kind == "total_variation":
        soft = SOFT_SCALE * (p - q).abs().sum(1) / 2
    elif kind in ("decoupled", "normalized"):
        others = [torch.log_softmax(x.scatter(1, label, -1e9), 1) for x in (log_p, log_q)]
        if kind == "decoupled":
            rest = [1 - x.gather(1, label) for x in (p, q)]
            sides = [
                torch.cat([x.gather(1, label), r.log()], 1) for x, r in zip((log_p, log_q), rest, strict=True)
            ]
            first = SOFT_SCALE * FIRST * kl(*sides)
            soft = first + SOFT_SCALE * SECOND * kl(*others)
        else:
            log_ones = [torch.log_softmax(x, 1).gather(1, label)[:, 0] for x in (one[1], one[0])]
            first = -FIRST * log_ones[0].exp() * log_ones[1]
            soft = first - SOFT_SCALE * SECOND * (others[0].exp() * others[1]).sum(1)
    lse = torch.logsumexp(s, 1)
    hard = HARD * (lse - (1 - SMOOTHING) * s.gather(1, label)[:, 0] - SMOOTHING * s.mean(1))
    z = Z_LOSS * lse.square()
    mse = zero if kind == "statistics" else MSE * (s - t).square().mean(1)
    terms = [soft, hard, z, first, mse]
    if kind == "statistics":
        terms = [-(p * log_p).sum(1), -(q * log_q).sum(1), torch.minimum(p, q).sum(1)]
        terms += [(s.argmax(1) == t.argmax(1)).double(), zero]
    loss = soft + hard + z + mse
    sources = (zero if kind == "statistics" else soft) + hard + z + mse
    of_input, of_temperature = torch.autograd.grad((SCALE * sources).sum(), (s, T), allow_unused=True)
    results = {"loss": loss, "terms": torch.stack(terms)}
    results = {name: (SCALE * value).detach() for name, value in results.items()}
    return {
        **results,
        "grad_input": of_input,
        "grad_input_temperature": torch.zeros(len(s)) if of_temperature is None else of_temperature,
    }


def assert_like(got, want, magnitude):
    """Within 32 roundings of a row's largest value, times the size of the exponents."""
    for name, value in got.items():
        truth = want[name].double()
        size = truth.abs().amax(-1, keepdim=True) if truth.dim() == 2 else truth.abs() + 0.1
        tolerance = 32 * EPS * magnitude * size + 1e-30
        if value.dtype != torch.float32:
            tolerance = tolerance + torch.finfo(value.dtype).eps * 0.51 * truth.abs() + 2.0**-24
        worst = ((value.double() - truth).abs() / tolerance).max().item()
        assert worst <= 1, f"{name}: {worst:.3g} tolerances off"


OTHER_LAYOUTS = {
    "aligned": ((0, 0), (0, 0), (0, 0)),
    "one_element_off": ((1, 0), (1, 0), (1, 0)),
    "three_off_and_apart": ((3, 8), (3, 16), (3, 8)),
    "odd_strides": ((0, 1), (0, 3), (0, 5)),
    "all_different": ((1, 0), (0, 8), (2, 3)),
}


@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_logit_loss_layouts(kernels, divergence, layout):
    (offset, padding), (target_offset, target_padding), (grad_offset, grad_padding) = OTHER_LAYOUTS[layout]
    for classes in (7, 250, 1018, 2049):
        for dtype in (torch.float32, torch.bfloat16):
            s, t = logits(3, classes, dtype, seed=1)
            y = torch.tensor([0, classes - 1, classes // 2])
            s, t = (
                place(s, offset=offset, padding=padding),
                place(t, offset=target_offset, padding=target_padding),
            )
            for standardize in (False, divergence != "none"):
                got = run_logit_loss(
                    kernels,
                    divergence,
                    s,
                    t,
                    y,
                    standardize=standardize,
                    offset=grad_offset,
                    padding=grad_padding,
                )
                assert_like(got, logit_loss_formula(divergence, s, t, y, standardize=standardize), 16)


@pytest.mark.parametrize("classes", [5, 100, 1000, 2049])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_logit_loss_does_not_depend_on_the_order_of_threads(kernels, divergence, classes, monkeypatch):
    s, t = logits(5, classes)
    s[1, ::2] = -math.inf
    y = torch.tensor([0, 1, 2, classes - 1, classes])  # the last is no class
    mask = torch.tensor([1, 1, 0, 1, 1], dtype=torch.uint8)
    for standardize in (False, True):
        monkeypatch.setenv("CUDA_ON_CPU_SEED", "0")
        first = run_logit_loss(kernels, divergence, s, t, y, standardize=standardize, mask=mask)
        assert all((value[..., 2] == 0).all() for name, value in first.items() if name != "grad_input")
        assert (first["grad_input"][2] == 0).all() and first["grad_input"][4].isnan().all()
        assert first["loss"][4].isnan() and first["terms"][:, 4].isnan().all()
        for seed in range(1, 5):
            monkeypatch.setenv("CUDA_ON_CPU_SEED", str(seed))
            again = run_logit_loss(kernels, divergence, s, t, y, standardize=standardize, mask=mask)
            for name, value in first.items():
                assert torch.equal(value.view(torch.int32), again[name].view(torch.int32)), name


def run_topk_kl_div(kernels, s, log_probs, indices, tail, *, offset=0, padding=0):
    rows, classes = s.shape
    params = TopkKlDivParams(input=pointer(s), log_probs=pointer(log_probs), indices=pointer(indices))
    params.rows, params.classes, params.k, params.dtype = rows, classes, indices.shape[1], CODES[s.dtype]
    params.input_stride, params.grad_stride = s.stride(0), classes + padding
    params.input_temperature_value, params.scale, params.tail = 2.0, SCALE, tail
    loss, of_temperature, of_log_probs = Guarded(rows), Guarded(rows), Guarded(*indices.shape)
    params.loss, params.grad_input_temperature = pointer(loss.value), pointer(of_temperature.value)
    params.grad_log_probs = pointer(of_log_probs.value)
    gradient, checked = guarded(rows, classes, s.dtype, offset=offset, padding=padding)
    params.grad_input = pointer(gradient)
    error = kernels.kdk_topk_kl_div(ctypes.byref(params))
    assert error == 0, kernels.kdk_error_string(error).decode()
    return {
        "loss": loss.checked(),
        "grad_input": checked(),
        "grad_log_probs": of_log_probs.checked(),
        "grad_input_temperature": of_temperature.checked(),
    }


def topk_kl_div_formula(s, log_probs, indices, tail):
    s, T = s.double().requires_grad_(), torch.full((len(s),), 2.0, dtype=torch.float64, requires_grad=True)
    log_p = log_probs.double().requires_grad_()
    log_q = torch.log_softmax(s / T[:, None], 1)
    inside, left = log_q.gather(1, indices), 0
    if tail == 0:
        p_rest = 1 - log_p.exp().sum(1)
        left = p_rest * (p_rest.log() - torch.logsumexp(log_q.scatter(1, indices, -math.inf), 1))
    sides = [torch.log_softmax(x, 1) for x in (log_p, inside)] if tail == 1 else [log_p, inside]
    loss = SCALE * (kl(*sides) + left)
    names = ("grad_input", "grad_log_probs", "grad_input_temperature")
    gradients = torch.autograd.grad(loss.sum(), (s, log_p, T))
    return {"loss": loss.detach(), **dict(zip(names, gradients, strict=True))}


def topk(t, k):
    """The k largest log-probabilities of t / 2, shuffled, and their classes."""
    log_probs, indices = torch.log_softmax(t.double() / 2, 1).topk(k, 1)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(k))
    return log_probs[:, order].float(), indices[:, order].contiguous()


@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
@pytest.mark.parametrize("tail", [0, 1, 2], ids=["bucket", "renormalize", "drop"])
def test_topk_kl_div_layouts(kernels, tail, layout):
    (offset, padding), _, (grad_offset, grad_padding) = OTHER_LAYOUTS[layout]
    for classes in (7, 127, 1018, 1024, 2049):
        for k in {5, classes // 2}:
            for dtype in (torch.float32, torch.bfloat16):
                s, t = logits(3, classes, dtype)
                log_probs, indices = topk(t, k)
                s = place(s, offset=offset, padding=padding)
                layout_of_grad = {"offset": grad_offset, "padding": grad_padding}
                got = run_topk_kl_div(kernels, s, log_probs, indices, tail, **layout_of_grad)
                assert_like(got, topk_kl_div_formula(s, log_probs, indices, tail), 16)


def test_topk_kl_div_more_classes_than_marks(kernels):
    # 2^18 classes have a bit of their own; classes beyond share theirs.
    s, t = logits(1, 2**18 + 1000, torch.bfloat16)
    log_probs, indices = topk(t, 40)
    indices[0, :20] = torch.arange(20) * 40  # so that the same bits stand for classes that are not marked
    indices[0, 20:] = 2**18 + 7 + torch.arange(20) * 40
    got = run_topk_kl_div(kernels, s, log_probs, indices, 0)
    assert_like(got, topk_kl_div_formula(s, log_probs, indices, 0), 16)


@pytest.mark.parametrize("classes", [5, 1000, 2049])
@pytest.mark.parametrize("tail", [0, 1, 2], ids=["bucket", "renormalize", "drop"])
def test_topk_kl_div_does_not_depend_on_the_order_of_threads(kernels, tail, classes, monkeypatch):
    s, t = logits(3, classes)
    log_probs, indices = topk(t, classes // 2)
    indices[1, 0] = -1  # no class
    first = run_topk_kl_div(kernels, s, log_probs, indices, tail)
    assert all(value[1].isnan().all() and value[[0, 2]].isfinite().all() for value in first.values())
    for seed in range(1, 9):
        monkeypatch.setenv("CUDA_ON_CPU_SEED", str(seed))
        again = run_topk_kl_div(kernels, s, log_probs, indices, tail)
        for name, value in first.items():
            assert torch.equal(value.view(torch.int32), again[name].view(torch.int32)), name


def run_multi_teacher(kernels, s, teachers, *, offset=0):
    """At temperatures 2, 2.5, ... and weights 1, 1/2, ...; the second teacher does not know row 1."""
    rows, classes = s.shape
    params = MultiTeacherKlDivParams(input=pointer(s))
    unknown = torch.ones(len(teachers), rows, dtype=torch.uint8)
    unknown[1, 1] = 0
    for k, t in enumerate(teachers):
        params.targets[k], params.target_strides[k] = pointer(t), t.stride(0)
        params.temperature_values[k], params.weight_values[k] = 2 + k / 2, 1 / (k + 1)
    params.teacher_mask, params.teacher_mask_strides[:] = pointer(unknown), (rows, 1)
    params.rows, params.classes, params.teachers = rows, classes, len(teachers)
    params.input_stride, params.dtype = s.stride(0), CODES[s.dtype]
    loss, losses = Guarded(rows), Guarded(len(teachers), rows)
    gradient, checked = guarded(rows, classes, s.dtype, offset=offset)
    params.loss, params.losses, params.grad_input = (pointer(x) for x in (loss.value, losses.value, gradient))
    error = kernels.kdk_multi_teacher_kl_div(ctypes.byref(params))
    assert error == 0, kernels.kdk_error_string(error).decode()
    return {"loss": loss.checked(), "losses": losses.checked(), "grad_input": checked()}


def multi_teacher_formula(s, teachers):
    s, losses = s.double().requires_grad_(), []
    loss = 0
    for k, t in enumerate(teachers):
        T = 2 + k / 2
        each = kl(torch.log_softmax(t.double() / T, 1), torch.log_softmax(s / T, 1))
        if k == 1:
            each = each * (torch.arange(len(s)) != 1)
        losses.append(each.detach())
        loss = loss + each / (k + 1)
    (gradient,) = torch.autograd.grad(loss.sum(), s)
    return {"loss": loss.detach(), "losses": torch.stack(losses), "grad_input": gradient}


def several(teachers, rows, classes, dtype=torch.float32):
    return [logits(rows, classes, dtype, seed=7 * k)[1] for k in range(teachers)]


@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
@pytest.mark.parametrize("teachers", [2, 5])
def test_multi_teacher_kl_div_layouts(kernels, teachers, layout):
    (offset, padding), (target_offset, target_padding), (grad_offset, _) = OTHER_LAYOUTS[layout]
    for classes in (7, 250, 1018, 2049):
        for dtype in (torch.float32, torch.bfloat16):
            s = place(logits(3, classes, dtype, seed=1000)[0], offset=offset, padding=padding)
            targets = several(teachers, 3, classes, dtype)
            targets = [place(t, offset=target_offset, padding=target_padding) for t in targets]
            got = run_multi_teacher(kernels, s, targets, offset=grad_offset)
            assert_like(got, multi_teacher_formula(s, targets), 16)


@pytest.mark.parametrize("classes", [100, 2049])
def test_multi_teacher_kl_div_most_teachers(kernels, classes):
    s, targets = logits(2, classes, seed=1000)[0], several(MAX_TEACHERS, 2, classes)
    assert_like(run_multi_teacher(kernels, s, targets), multi_teacher_formula(s, targets), 16)


@pytest.mark.parametrize("classes", [5, 100, 1000, 2049])
def test_multi_teacher_kl_div_does_not_depend_on_the_order_of_threads(kernels, classes, monkeypatch):
    s, targets = logits(5, classes, seed=1000)[0], several(3, 5, classes)
    first = run_multi_teacher(kernels, s, targets)
    for seed in range(1, 9):
        monkeypatch.setenv("CUDA_ON_CPU_SEED", str(seed))
        again = run_multi_teacher(kernels, s, targets)
        for name, value in first.items():
            assert torch.equal(value.view(torch.int32), again[name].view(torch.int32)), name


def transport(problems, n, m, d, *, extra):
    generator = torch.Generator().manual_seed(n + m + d)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    x, y = uniform(problems, n, d), 0.7 * uniform(problems, m, d) + 0.3
    a, b = (w / w.sum(1, keepdim=True) for w in (uniform(problems, n), uniform(problems, m)))
    a[0, n - 1] = 0
    extras = [uniform(problems, *sizes) for sizes in ((n, m), (n, n), (m, m))] if extra else []
    return x, y, a, b, [extras[0], *(z + z.mT for z in extras[1:])] if extra else []


def run_sinkhorn(kernels, x, y, a, b, extras, *, cost, epsilon, rho, iterations, tol, debias):
    """All outputs, in the order of kdkernels::sinkhorn."""
    (problems, n, d), m = x.shape, y.shape[1]
    params = SinkhornParams(x=pointer(x), y=pointer(y), a=pointer(a), b=pointer(b))
    for name, extra in zip(("extra", "extra_x", "extra_y"), extras):
        setattr(params, name, pointer(extra))
    shapes = [(problems,), (n,), (m,), (n,), (m,), (n, d), (m, d), (n,), (m,)]
    buffers = {}
    for name, shape in zip(SINKHORN_OUTPUTS, shapes):
        if debias or not name.endswith("self"):
            buffers[name] = Guarded(*([] if name == "loss" else [problems]), *shape)
    for name, shape in zip(("plan", "plan_x", "plan_y"), [(n, m), (n, n), (m, m)][: max(len(extras), 1)]):
        buffers[name] = Guarded(problems, *shape)
    for name, buffer in buffers.items():
        setattr(params, name, pointer(buffer.value))
    scratch = Guarded(problems * (6 + (n + m) * (d + 1)))
    params.scratch = pointer(scratch.value)
    params.epsilon, params.rho, params.tol = epsilon, rho, tol
    params.problems, params.n, params.m, params.d = problems, n, m, d
    params.iterations, params.cost, params.debias = iterations, cost, debias
    error = kernels.kdk_sinkhorn(ctypes.byref(params))
    assert error == 0, kernels.kdk_error_string(error).decode()
    scratch.checked()
    return {name: buffer.checked() for name, buffer in buffers.items()}


TRANSPORTS = [
    # Problems, n, m, d, iterations; the last ones' kernel values do not fit beside the costs.
    (3, 9, 7, 5, 40),
    (2, 1, 3, 2, 25),
    (1, 33, 40, 20, 30),
    (1, 130, 3, 9, 20),
    (1, 170, 175, 3, 6),
]
TRANSPORT_OPTIONS = [
    {"cost": 0, "extra": False, "debias": True, "rho": math.inf, "tol": -1.0},
    {"cost": 1, "extra": True, "debias": True, "rho": 0.8, "tol": -1.0},
    {"cost": 2, "extra": False, "debias": False, "rho": math.inf, "tol": 1e-4},
    {"cost": 1, "extra": False, "debias": False, "rho": 0.5, "tol": -1.0},
]


@pytest.mark.parametrize("options", TRANSPORT_OPTIONS, ids=str)
@pytest.mark.parametrize("problems, n, m, d, iterations", TRANSPORTS)
def test_sinkhorn(kernels, problems, n, m, d, iterations, options):
    """Against the specification in float64, whatever the order of the threads."""
    import kdkernels  # noqa: F401

    options = {**options, "epsilon": 0.1, "iterations": iterations}
    *inputs, extras = transport(problems, n, m, d, extra=options.pop("extra"))
    if options["cost"] == 2:
        inputs[:2] = (torch.nn.functional.normalize(z, dim=-1) for z in inputs[:2])
    got = run_sinkhorn(kernels, *inputs, extras, **options)
    truth = torch.ops.kdkernels.sinkhorn(
        *(z.double() for z in inputs),
        [z.double() for z in extras],
        ("sqeuclidean", "euclidean", "cosine")[options["cost"]],
        0.1,
        options["rho"],
        iterations,
        options["tol"],
        options["debias"],
        [True] * 5,
        "reference",
    )
    largest = max(1.0, *(z.abs().max().item() for z in truth[:3]))
    for (name, value), expected in zip(got.items(), truth, strict=True):
        assert expected.abs().max() > 0 or n == 1, name
        # Costs and potentials are rounded beside epsilon, in an exponent.
        allowed = 64 * EPS * largest / 0.1 * expected.abs().max().item()
        if name in ("loss", "f", "g", "f_self", "g_self"):
            allowed = 64 * EPS * largest
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=allowed, msg=name)


@pytest.mark.parametrize("problems, n, m, d, iterations", [(2, 9, 7, 5, 40), (1, 33, 40, 20, 24)])
@pytest.mark.parametrize("options", TRANSPORT_OPTIONS[:2], ids=str)
def test_sinkhorn_does_not_depend_on_the_order_of_threads(
    kernels, problems, n, m, d, iterations, options, monkeypatch
):
    options = {**options, "epsilon": 0.005, "iterations": iterations}  # scalings are absorbed
    arguments = transport(problems, n, m, d, extra=options.pop("extra"))
    first = run_sinkhorn(kernels, *arguments, **options)
    for seed in range(1, 7):
        monkeypatch.setenv("CUDA_ON_CPU_SEED", str(seed))
        again = run_sinkhorn(kernels, *arguments, **options)
        for name, value in first.items():
            assert torch.equal(value.view(torch.int32), again[name].view(torch.int32)), name


def test_sinkhorn_refuses(kernels):
    params = SinkhornParams(problems=1, n=8, m=8, d=2, iterations=10, dtype=CODES[torch.float64])
    assert kernels.kdk_sinkhorn(ctypes.byref(params)) == 1
    params.dtype, params.n = 0, 300  # 300 x 8 fits, and the 300 x 300 of a debiased one does not
    params.debias = True
    assert kernels.kdk_sinkhorn(ctypes.byref(params)) == 1
    params.problems = 0
    assert kernels.kdk_sinkhorn(ctypes.byref(params)) == 0


@pytest.mark.parametrize("name", ["logit_loss", "multi_teacher_kl_div", "topk_kl_div"])
def test_others_refuse(kernels, name):
    kind = {"logit_loss": LogitLossParams, "topk_kl_div": TopkKlDivParams}.get(name, MultiTeacherKlDivParams)
    params = kind(rows=2, classes=8, dtype=CODES[torch.float64])
    assert getattr(kernels, f"kdk_{name}")(ctypes.byref(params)) == 1
    if name == "logit_loss":  # a gradient wider than its logits, and one of double
        for dtype, grad_dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.float64)):
            params.dtype, params.grad_dtype = CODES[dtype], CODES[grad_dtype]
            assert kernels.kdk_logit_loss(ctypes.byref(params)) == 1
        params.grad_dtype = 0
    params.dtype, params.rows = 0, 0
    assert getattr(kernels, f"kdk_{name}")(ctypes.byref(params)) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, classes", [(1, 1), (3, 7), (9, 100), (4, 1000), (3, 4099), (1, 70001)])
def test_scale_rows(kernels, rows, classes, dtype):
    values = logits(rows, classes, dtype)[0]
    scale = torch.tensor([0.3, 1.0, -2.0, math.nan, 1.0, 0.0, 7.0, 1.0, 0.1])[:rows]
    for stride, offset in [(1, 0), (1, 1), (0, 0)]:
        grad = Guarded(rows, classes, dtype=dtype, offset=offset)
        grad.value.copy_(values)
        params = ScaleRowsParams(pointer(grad.value), pointer(scale), rows, classes, stride, CODES[dtype])
        assert kernels.kdk_scale_rows(ctypes.byref(params)) == 0
        factor = scale[:, None] if stride else scale[0]
        torch.testing.assert_close(
            grad.checked(), (values.float() * factor).to(dtype), rtol=0, atol=0, equal_nan=True
        )


def test_scale_rows_by_one_touches_nothing(kernels):
    # A mapping without access rights: reading or writing it would end the process.
    memory = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    protect = libc.mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    assert protect(address, 2 * mmap.PAGESIZE, 0) == 0
    try:
        one = torch.ones(1)
        params = ScaleRowsParams(address, pointer(one), 4, 100, 0, 0)
        assert kernels.kdk_scale_rows(ctypes.byref(params)) == 0
    finally:
        protect(address, 2 * mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE)


def test_executor_shows_a_missing_barrier(kernels, monkeypatch):
    want = torch.arange(64.0).flip(0)
    results = {0: [], 1: []}
    for seed in range(4):
        monkeypatch.setenv("CUDA_ON_CPU_SEED", str(seed))
        for barrier, equal in results.items():
            out = torch.empty(64)
            assert kernels.run_reverse(barrier, ctypes.c_void_p(pointer(out))) == 0
            equal.append(torch.equal(out, want))
    assert all(results[1])
    assert not all(results[0])


@pytest.mark.parametrize(
    "kernel, message",
    [
        (
            "half_the_block_at_a_barrier",
            "deadlock; 32 threads have finished; 32 threads wait in __syncthreads",
        ),
        ("two_different_barriers", "where another thread waits in __syncthreads"),
        ("a_lane_missing_from_a_shuffle", "deadlock; 1 threads have finished; 31 threads wait in __shfl_xor"),
        ("a_caller_outside_its_mask", "__syncwarp at .* the caller is not in its mask"),
        ("lanes_with_different_masks", "where a lane of its mask is in __ballot_sync"),
    ],
)
def test_executor_reports_divergence(kernels, kernel, message):
    assert getattr(kernels, f"run_{kernel}")() == LAUNCH_FAILURE
    with pytest.raises(RuntimeError, match=message):
        raise RuntimeError(kernels.kdk_error_string(LAUNCH_FAILURE).decode())
    # A failed launch leaves the executor usable.
    out = torch.empty(64)
    assert kernels.run_reverse(1, ctypes.c_void_p(pointer(out))) == 0


def test_executor_refuses_too_large_a_block(kernels):
    assert kernels.run_too_large_a_block() == 1


def test_executor_warp_operations(kernels):
    out = torch.empty(12, 64, dtype=torch.int64)
    assert kernels.run_warp_operations(ctypes.c_void_p(pointer(out))) == 0
    i = torch.arange(64)
    lane, base = i % 32, i - i % 32
    sources = [
        base + 3,
        base + lane // 8 * 8 + (lane + 9) % 8,
        torch.where(lane >= 2, i - 2, i),
        torch.where(lane % 16 >= 2, i - 2, i),
        torch.where(lane + 5 < 32, i + 5, i),
        torch.where(lane % 8 + 5 < 8, i + 5, i),
        base + (lane ^ 16),
        # Lanes 8 to 15 reach back to 0 to 7, lanes 0 to 7 may not reach ahead; alike in the upper half.
        torch.where((lane ^ 12) < lane, base + (lane ^ 12), i),
    ]
    for row, source in zip(out, sources, strict=False):
        assert torch.equal(row, source + 2**40)
    ballots = [sum(1 << k for k in range(32) if (w * 32 + k) % 3 == 0) for w in range(2)]
    assert out[8].tolist() == [ballots[0]] * 32 + [ballots[1]] * 32
    assert out[9].tolist() == [0] * 32 + [1] * 32
    assert out[10].tolist() == [1] * 32 + [0] * 32
    assert out[11].tolist() == ([0xAAAA] * 16 + [1] * 16) * 2


def test_executor_poisons_shared_memory(kernels):
    out = torch.zeros(32)
    assert kernels.run_uninitialized_shared(ctypes.c_void_p(pointer(out))) == 0
    assert out.isnan().all()


def test_kernels_under_sanitizers(program):
    done = subprocess.run([program, "kernels"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("kernel", ["shared_overflow", "global_overflow"])
def test_sanitizers_stop_an_overflow(program, kernel):
    done = subprocess.run([program, kernel], capture_output=True, text=True)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
