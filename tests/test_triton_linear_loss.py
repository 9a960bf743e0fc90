"""The losses from hidden states in tiles: the launcher of the Triton kernels against the formula in float64."""

from __future__ import annotations

from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from conftest import GPU
from testing import assert_near, assert_not_vacuous
from torch import Tensor

from kdkernels.ops.divergences import KL, MIXTURE, NONE, REVERSE_KL, TOTAL_VARIATION, Spec
from kdkernels.ops.logit_loss import logit_loss_reference

pytest.importorskip("triton")

from triton_counter import count_traffic, is_interpreted

from kdkernels._triton import linear_loss as tiled

DEVICE = "cuda" if GPU else "cpu"
# (rows, classes, student_width, teacher_width): less than a block, and not multiples of one.
SIZES = [(1, 10, 24, 24), (37, 100, 64, 200), (37, 300, 24, 64)]
SIDES = ("input", "input_weight", "input_bias", "target", "target_weight", "target_bias")
TEMPERATURES = ("input_temperature", "target_temperature")
NAMES = SIDES + TEMPERATURES


class Problem(NamedTuple):
    """A call of the launcher, on the CPU."""

    tensors: dict[str, Tensor | None]  # SIDES, labels, the temperatures, soft_scale, row_scale, mask
    spec: Spec
    logit_mse: float = 0.0
    softcaps: tuple[float, float] = (0.0, 0.0)
    logit_scales: tuple[float, float] = (1.0, 1.0)
    temperatures: tuple[float, float] = (2.0, 3.0)  # where there are no tensors of them
    soft_scale: float = 4.0
    scale: float = 0.25

    @property
    def paired(self) -> bool:
        return self.spec.divergence != NONE or self.logit_mse != 0


def problem(
    sizes: tuple[int, int, int, int],
    spec: Spec,
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = True,
    seed: int = 0,
    **options: Any,
) -> Problem:
    """Logits with a spread of about 3."""
    rows, classes, student_width, teacher_width = sizes
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tensors: dict[str, Tensor | None] = {}
    for side, width in (("input", student_width), ("target", teacher_width)):
        tensors[side] = normal(rows, width).to(dtype)
        tensors[f"{side}_weight"] = (3 * normal(classes, width) / width**0.5).to(dtype)
        tensors[f"{side}_bias"] = normal(classes).to(dtype) if bias else None
    tensors["labels"] = torch.randint(classes, (rows,), generator=generator)
    tensors |= dict.fromkeys((*TEMPERATURES, "soft_scale", "row_scale", "mask"))
    call = Problem(tensors, spec, **options)
    if not call.paired:
        tensors |= dict.fromkeys(("target", "target_weight", "target_bias"))
    return call


def launch(
    call: Problem, names: tuple[str, ...] = NAMES, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """loss, terms and the gradients of `names` by two calls of the launcher, from poisoned memory."""
    given = {name: None if x is None else x.to(DEVICE) for name, x in call.tensors.items()}
    if call.tensors["target_weight"] is call.tensors["input_weight"]:
        given["target_weight"] = given["input_weight"]
    spec, (rows, *_) = call.spec, call.tensors["input"].shape

    def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)

    loss, terms, statistics = poisoned(rows), poisoned(5, rows), poisoned(tiled.STATISTICS_ROWS, rows)
    common = (
        *(given[name] for name in (*SIDES, "labels", *TEMPERATURES)),
        *call.temperatures,
        given["soft_scale"],
        call.soft_scale,
        given["row_scale"],
        call.scale,
        given["mask"],
        *(spec.divergence, spec.first, spec.second, spec.mix),
        *(spec.hard_weight, spec.label_smoothing, spec.z_loss, call.logit_mse),
        *call.softcaps,
        *call.logit_scales,
    )
    grads = {
        name: poisoned(*given[name].shape, dtype=dtype or given[name].dtype)
        for name in SIDES
        if name in names and given[name] is not None
    }
    grads |= {name: poisoned(rows) for name in TEMPERATURES if name in names}
    with count_traffic() as forward:
        tiled.linear_loss(*common, loss, terms, statistics, *[None] * 8)
    with count_traffic() as backward:
        tiled.linear_loss(*common, None, None, statistics, *(grads.get(name) for name in NAMES))
    if is_interpreted(tiled.linear_loss_fwd_kernel):
        assert forward.launches == backward.launches == 1
    return {name: x.cpu() for name, x in {"loss": loss, "terms": terms, **grads}.items()}


def formula(call: Problem, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same in plain PyTorch; and how much, at most, a relative change of the logits' gradients by 1 changes."""

    def leaf(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().to(dtype, copy=True).requires_grad_()

    given = {name: leaf(call.tensors[name]) for name in SIDES}
    mask, rows = call.tensors["mask"], call.tensors["input"].shape[0]
    temperatures = []
    for name, value in zip(TEMPERATURES, call.temperatures):
        x = call.tensors[name]
        temperatures.append(leaf(torch.full((rows,), value) if x is None else x))
    features, products, logits = {}, {}, []
    for side, cap, factor in zip(("input", "target"), call.softcaps, call.logit_scales):
        if given[side] is None:
            continue
        x = given[side] if mask is None else torch.where(mask[:, None], given[side], 0)
        u = torch.nn.functional.linear(x, given[f"{side}_weight"], given[f"{side}_bias"])
        features[side], products[side] = x.detach(), u
        u = u * factor
        logits.append(cap * torch.tanh(u / cap) if cap else u)
    student, teacher = logits if call.paired else (logits[0], None)
    weights = call.tensors["row_scale"]
    weights = torch.full((rows,), call.scale, dtype=dtype) if weights is None else weights.to(dtype)
    soft_scale = call.tensors["soft_scale"]
    soft_scale = call.soft_scale if soft_scale is None else soft_scale.to(dtype)
    needs_labels = call.tensors["labels"] if call.spec.hard_weight else None

    def of(spec: Spec) -> Tensor:
        labels = needs_labels if spec.hard_weight else None
        return logit_loss_reference(student, teacher, labels, *temperatures, weights, mask, spec, "none")[0]

    spec, nothing = call.spec, {"divergence": NONE, "hard_weight": 0.0, "z_loss": 0.0}
    parts = [
        of(spec._replace(hard_weight=0.0, z_loss=0.0)) * soft_scale,
        of(spec._replace(**nothing | {"hard_weight": spec.hard_weight})),
        of(spec._replace(**nothing | {"z_loss": spec.z_loss})),
        torch.zeros(rows, dtype=dtype),
        torch.zeros(rows, dtype=dtype),
    ]
    if call.logit_mse:
        both = (student == -torch.inf) & (teacher == -torch.inf)
        apart = torch.where(both, 0, student - teacher).square().mean(1)
        parts[4] = call.logit_mse * weights * (apart if mask is None else torch.where(mask, apart, 0))
    loss = sum(parts)
    out = {"loss": loss.detach(), "terms": torch.stack(parts).detach()}
    sources = [*products.values(), *temperatures]
    found = torch.autograd.grad(loss.sum(), sources, allow_unused=True)
    found = [torch.zeros_like(x) if grad is None else grad for x, grad in zip(sources, found)]
    bounds = {}
    for side, grad in zip(products, found):
        weight, x = given[f"{side}_weight"].detach(), features[side]
        out |= {side: grad @ weight, f"{side}_weight": grad.T @ x, f"{side}_bias": grad.sum(0)}
        bounds |= {side: grad.abs() @ weight.abs(), f"{side}_weight": grad.abs().T @ x.abs()}
    return out | dict(zip(TEMPERATURES, found[-2:])), bounds


def check(
    call: Problem, names: tuple[str, ...] = NAMES, vacuous: bool = False, dtype: torch.dtype | None = None
) -> None:
    """Every output against float64: what float32, and rounding the logits' gradients to the inputs' dtype, allow."""
    got = launch(call, names, dtype)
    of = call.tensors["input"].dtype
    (truth, bounds), (reference, _) = formula(call, torch.float64), formula(call, torch.float32)
    unit = 0.0 if of == torch.float32 else torch.finfo(of).eps / 2
    with torch.no_grad():
        largest = 1.0
        for side in ("input", "target"):
            if call.tensors[side] is not None:
                x, w = (call.tensors[name].double() for name in (side, f"{side}_weight"))
                products = x.nan_to_num() @ w.T
                largest = max(largest, products.abs().max().item() * max(1.0, *call.logit_scales))
    cold = min(1.0, *call.temperatures)
    weights = call.tensors["row_scale"]
    factor = call.scale if weights is None else weights.abs().max().item()
    soft = call.tensors["soft_scale"]
    factor *= (call.soft_scale if soft is None else soft.abs().max().item()) + 1
    for name, x in got.items():
        expected, allowed = truth[name], reference[name]
        magnitude = factor * largest / cold
        if name in SIDES:
            # A gradient is a sum of products of the other factor with what is at most 1.
            magnitude *= expected.abs().max().item() / max(factor, 1e-30) if factor else 1.0
        elif name in TEMPERATURES:
            magnitude *= largest
        halves = unit * bounds[name] if name in bounds else 0.0
        assert_near(x, expected.to(torch.float64), allowed.to(x.dtype), magnitude, name, halves)
        if not vacuous and name not in ("terms", *TEMPERATURES):
            assert_not_vacuous(expected, allowed.to(x.dtype), magnitude, halves)


EVERYTHING = {"hard_weight": 0.5, "label_smoothing": 0.1, "z_loss": 1e-2}


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("divergence", [NONE, KL, REVERSE_KL, MIXTURE, TOTAL_VARIATION])
def test_divergences(divergence: int, sizes: tuple[int, int, int, int]) -> None:
    spec = Spec(divergence, first=0.7, second=0.4, mix=0.3, **(EVERYTHING if divergence == NONE else {}))
    check(problem(sizes, spec))


@pytest.mark.parametrize("divergence", [KL, REVERSE_KL, MIXTURE, TOTAL_VARIATION])
def test_every_term_at_once(divergence: int) -> None:
    spec = Spec(divergence, first=0.7, second=0.4, mix=0.3, **EVERYTHING)
    options = {"logit_mse": 0.3, "softcaps": (5.0, 7.0), "logit_scales": (0.8, 1.2)}
    call = problem((37, 300, 64, 24), spec, **options)
    generator = torch.Generator().manual_seed(1)
    for name in (*TEMPERATURES, "soft_scale", "row_scale"):
        call.tensors[name] = 0.5 + torch.rand(37, generator=generator)
    check(call)


PLAIN = Spec(KL)
SMALL = (20, 40, 24, 40)


@pytest.mark.parametrize(
    "options",
    [
        {"spec": Spec(NONE, hard_weight=1.0)},
        {"spec": Spec(NONE, z_loss=0.1)},
        {"spec": Spec(KL, hard_weight=0.5, label_smoothing=1.0)},
        {"spec": Spec(NONE), "logit_mse": 0.5},
        {"spec": PLAIN, "softcaps": (5.0, 0.0)},
        {"spec": PLAIN, "softcaps": (0.0, 3.0), "logit_scales": (1.5, 0.5)},
        {"spec": PLAIN, "bias": False},
        {"spec": PLAIN, "temperatures": (0.5, 0.25)},
    ],
    ids=["hard", "z_loss", "uniform", "mse", "softcap", "target_softcap", "no_bias", "cold"],
)
def test_options(options: dict[str, Any]) -> None:
    check(problem(SMALL, **options))


@pytest.mark.parametrize("divergence", [KL, MIXTURE])
def test_float16(divergence: int) -> None:
    spec = Spec(divergence, first=0.7, second=0.4, mix=0.3, **EVERYTHING)
    call = problem((37, 100, 64, 24), spec, torch.float16, logit_mse=0.3)
    check(call)
    check(call, dtype=torch.float32)  # gradients are stored as what they are given


@pytest.mark.parametrize("scale", [2.0**-30, 2.0**20])
def test_float16_gradients_keep_their_digits(scale: float) -> None:
    # Beyond float16's range, were they rounded as they are.
    got = launch(problem(SMALL, PLAIN, torch.float16, scale=scale), dtype=torch.float32)
    one = launch(problem(SMALL, PLAIN, torch.float16, scale=1.0), dtype=torch.float32)
    for name in SIDES:
        assert torch.equal(got[name], one[name] * scale), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_head_for_both(dtype: torch.dtype) -> None:
    spec = Spec(KL, hard_weight=0.5)
    call = problem((20, 200, 40, 40), spec, dtype)
    apart = dict(call.tensors, target_weight=call.tensors["input_weight"].clone())
    call.tensors["target_weight"] = call.tensors["input_weight"]
    check(call)
    # Each weight is loaded once, and nothing else is different.
    got, other = launch(call), launch(call._replace(tensors=apart))
    assert all(torch.equal(got[name], other[name]) for name in got)


def test_what_is_asked_for() -> None:
    spec = Spec(MIXTURE, first=0.7, second=0.4, mix=0.3, **EVERYTHING)
    call = problem(SMALL, spec)
    every = launch(call)
    for name in NAMES:
        got = launch(call, (name,))
        assert set(got) == {"loss", "terms", name}
        assert torch.equal(got[name], every[name]), name


def test_two_runs_are_equal() -> None:
    call = problem((37, 100, 24, 40), Spec(REVERSE_KL, **EVERYTHING))
    first, second = launch(call), launch(call)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("divergence", [KL, REVERSE_KL, MIXTURE])
def test_near_convergence(divergence: int) -> None:
    """In float32 the loss keeps three digits where it is a millionth: its terms are of second order."""
    spec = Spec(divergence, first=0.7, second=0.4, mix=0.3)
    call = problem((37, 300, 64, 64), spec, temperatures=(2.0, 2.0))
    generator = torch.Generator().manual_seed(3)
    for name in ("weight", "bias"):
        call.tensors[f"target_{name}"] = call.tensors[f"input_{name}"].clone()
    noise = torch.randn(37, 64, generator=generator) / 3  # logits differ by 1e-3
    call.tensors["target"] = call.tensors["input"] + 1e-3 * noise
    got, (truth, _) = launch(call), formula(call, torch.float64)
    assert truth["loss"].max() < 1e-5
    error = (got["loss"] - truth["loss"]).abs() / truth["loss"]
    assert error.max() < 1e-3
    for name in ("input", "input_weight", "target", "target_weight"):
        assert (got[name] - truth[name]).norm() < 2e-3 * truth[name].norm(), name


def masked_rows() -> Tensor:
    return torch.arange(SMALL[0]) % 3 != 0


def test_masked_rows_are_not_read() -> None:
    spec = Spec(KL, **EVERYTHING)
    call = problem(SMALL, spec, logit_mse=0.2)
    mask = call.tensors["mask"] = masked_rows()
    call.tensors["labels"][~mask] = -100
    check(call)
    clean = launch(call)
    for name, x in (("input", float("nan")), ("target", float("inf"))):
        call.tensors[name][~mask] = x
    got = launch(call)
    assert all(torch.equal(got[name], clean[name]) for name in got)
    for name in ("loss", "input", "target", *TEMPERATURES):
        assert not got[name][~mask].any(), name
    call.tensors["mask"] = torch.zeros_like(mask)
    assert not any(x.any() for x in launch(call).values())


@pytest.mark.parametrize("divergence", [NONE, KL, REVERSE_KL, MIXTURE, TOTAL_VARIATION])
@pytest.mark.parametrize("classes", [40, 200])  # the first tile of a head can be masked altogether
def test_masked_classes(classes: int, divergence: int) -> None:
    spec = Spec(divergence, first=0.7, second=0.4, mix=0.3, **EVERYTHING)
    call = problem((20, classes, 24, 40), spec, logit_mse=0.0 if divergence == NONE else 0.2)
    masked = torch.arange(classes) < (130 if classes == 200 else 5)
    for side in ("input", "target"):
        if call.tensors[side] is not None:
            call.tensors[f"{side}_bias"][masked] = -torch.inf
    call.tensors["labels"] = call.tensors["labels"] % 30 + (160 if classes == 200 else 5)
    check(call)
    got = launch(call)
    assert not any(x.isnan().any() for x in got.values())
    assert not got["input_weight"][masked].any()


@pytest.mark.parametrize("divergence", [KL, REVERSE_KL, MIXTURE, TOTAL_VARIATION])
def test_a_class_masked_on_one_side(divergence: int) -> None:
    spec = Spec(divergence, first=0.7, second=0.4, mix=0.3)
    call = problem(SMALL, spec)
    # Where the loss stays finite.
    call.tensors["input_bias" if divergence == REVERSE_KL else "target_bias"][3] = -torch.inf
    check(call, (*SIDES, "input_temperature"))
    call = problem(SMALL, spec._replace(divergence=KL))
    call.tensors["input_bias"][3] = -torch.inf
    got = launch(call)
    assert (got["loss"] == torch.inf).all()
    assert got["input"].isfinite().all()
    assert torch.equal(got["input_temperature"].isnan(), torch.zeros(SMALL[0], dtype=torch.bool))


def test_a_wrong_label_makes_its_row_nan() -> None:
    call = problem(SMALL, Spec(KL, hard_weight=0.5))
    call.tensors["labels"][2], call.tensors["labels"][5] = -1, SMALL[1]
    got = launch(call)
    wrong = torch.zeros(SMALL[0], dtype=torch.bool)
    wrong[[2, 5]] = True
    assert torch.equal(got["loss"].isnan(), wrong)
    assert torch.equal(got["input"].isnan().all(1), wrong)


def test_rows_with_a_stride() -> None:
    call = problem(SMALL, Spec(KL, **EVERYTHING))
    plain = launch(call)
    for name in ("input", "input_weight", "target", "target_weight"):
        x = call.tensors[name]
        wide = torch.full((x.shape[0], x.shape[1] + 3), float("nan"))
        wide[:, : x.shape[1]] = x
        call.tensors[name] = wide[:, : x.shape[1]]
    got = launch(call)
    assert all(torch.equal(got[name], plain[name]) for name in got)


@pytest.mark.parametrize(
    "cut", [(16, 16, 16, 16, 16, 16), (32, 64, 32, 16, 32, 32), (16, 32, 32, 64, 64, 64)], ids=str
)
def test_sizes_of_tiles_do_not_matter(cut: tuple[int, ...]) -> None:
    call = problem((20, 70, 40, 24), Spec(MIXTURE, first=0.7, second=0.4, mix=0.3, **EVERYTHING))
    with mock.patch.object(tiled, "tiles", lambda *_: tiled.Tiles(*cut, 4, 4)):
        check(call)


def test_tiles() -> None:
    for itemsize in (2, 4):
        for rows in (1, 100, 5000, 10**6):
            for width in (1, 24, 512, 2048):
                cut = tiled.tiles(rows, 1000, width, 2 * width, itemsize)
                assert min(cut[:6]) >= 16  # what tl.dot takes
                assert all(size & (size - 1) == 0 for size in cut)
                assert cut == tiled.tiles(rows, 1000, width, 2 * width, itemsize)
