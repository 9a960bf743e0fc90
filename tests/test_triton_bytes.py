"""Bytes that the Triton kernels move, counted in the interpreter, against the formula beside the launcher."""

import os
import sys

import pytest
import torch

if "triton" not in sys.modules and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read once, when a kernel is defined

pytest.importorskip("triton")

from triton_counter import count_traffic, is_interpreted

from kdkernels._triton import coral as triton_coral
from kdkernels._triton import gaussian as triton_gaussian
from kdkernels._triton import kl_div as triton_kl_div
from kdkernels._triton import linear_loss as triton_linear
from kdkernels._triton import logit_loss as triton_logit_loss
from kdkernels._triton import masked_feature_loss as triton_masked
from kdkernels._triton import mmd as triton_mmd
from kdkernels._triton import multi_teacher_kl_div as triton_multi_teacher
from kdkernels._triton import pool_mse as triton_pool_mse
from kdkernels._triton import scale_rows as triton_scale_rows
from kdkernels._triton import sinkhorn as triton_sinkhorn
from kdkernels._triton import sliced_wasserstein as triton_sliced
from kdkernels._triton import topk_kl_div as triton_topk

pytestmark = [
    pytest.mark.skipif(
        not is_interpreted(triton_kl_div.kl_div_fwd_kernel), reason="kernels were defined for the GPU"
    ),
    # A padded lane is -inf, and numpy reports what the hardware does silently.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

ROWS = 6
DTYPES = [torch.float32, torch.float16]
# (classes, passes over the rows for loss and grad_input)
LENGTHS = [
    pytest.param(100, 3, id="small"),
    pytest.param(1000, 3, id="one-tile"),
    pytest.param(12000, 5, id="streamed"),
]


def logits(classes: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(classes)
    input, target = torch.randn(2, ROWS, classes, generator=generator)
    return input.to(dtype), target.to(dtype)


def forward(
    input: torch.Tensor, target: torch.Tensor, *names: str, mask: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Run the launcher for the outputs named, from poisoned memory."""
    rows = input.shape[0]
    outputs = {
        name: torch.full_like(input, float("nan"))
        if name in ("grad_input", "grad_target")
        else torch.full((rows,), float("nan"))
        for name in names
    }
    order = ("loss", "grad_input", "grad_target", "grad_input_temperature", "grad_target_temperature")
    triton_kl_div.kl_div(
        input, target, None, None, 2.0, 2.0, None, 0.25, mask, *(outputs.get(name) for name in order)
    )
    return outputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("classes", "passes"), LENGTHS)
@pytest.mark.parametrize("upstream", [torch.ones(()), torch.ones(ROWS)], ids=["scalar", "per-row"])
def test_forward_and_backward(classes: int, passes: int, dtype: torch.dtype, upstream: torch.Tensor) -> None:
    input, target = logits(classes, dtype)
    with count_traffic() as forward_traffic:
        outputs = forward(input, target, "loss", "grad_input")
    grad = outputs["grad_input"].clone()
    with count_traffic() as backward_traffic:
        triton_scale_rows.scale_rows(outputs["grad_input"], upstream)

    elements = ROWS * classes * dtype.itemsize
    claimed = triton_kl_div.bytes_moved(ROWS, classes, dtype.itemsize)
    assert claimed == passes * elements + 4 * ROWS
    assert forward_traffic.loaded == (passes - 1) * elements
    assert forward_traffic.stored == elements + 4 * ROWS
    assert forward_traffic.launches == backward_traffic.launches == 1
    assert backward_traffic.stored == 0
    assert backward_traffic.total <= 4 * ROWS
    assert forward_traffic.total + backward_traffic.total <= 1.05 * claimed

    assert torch.equal(grad, outputs["grad_input"])
    reference = (torch.softmax(input.double() / 2, 1) - torch.softmax(target.double() / 2, 1)) * 0.125
    assert (grad - reference).abs().max() < 0.01 * reference.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("classes", "passes"), LENGTHS)
def test_loss_only(classes: int, passes: int, dtype: torch.dtype) -> None:
    input, target = logits(classes, dtype)
    with count_traffic() as traffic:
        forward(input, target, "loss")
    assert traffic.total == triton_kl_div.bytes_moved(ROWS, classes, dtype.itemsize, grads=())
    assert traffic.loaded == (passes - 1) * ROWS * classes * dtype.itemsize
    assert traffic.stored == 4 * ROWS


@pytest.mark.parametrize(("classes", "passes"), LENGTHS)
def test_every_gradient(classes: int, passes: int) -> None:
    names = ("grad_input", "grad_target", "grad_input_temperature", "grad_target_temperature")
    input, target = logits(classes, torch.float32)
    with count_traffic() as traffic:
        forward(input, target, "loss", *names)
    assert traffic.total == triton_kl_div.bytes_moved(ROWS, classes, 4, grads=names)
    # The target's side costs a streamed row one more sweep, and a row in registers only the store.
    sweeps = {3: 1, 5: 3}[passes]
    assert traffic.total == (2 * sweeps + 2) * ROWS * classes * 4 + 3 * ROWS * 4


@pytest.mark.parametrize(("classes", "passes"), LENGTHS)
def test_masked_rows_are_not_read(classes: int, passes: int) -> None:
    input, target = logits(classes, torch.float32)
    mask = torch.arange(ROWS) % 3 == 0
    input[~mask] = float("nan")
    with count_traffic() as traffic:
        outputs = forward(input, target, "loss", "grad_input", mask=mask)
    assert traffic.loaded == int(mask.sum()) * classes * 4 * (passes - 1) + ROWS
    assert not outputs["loss"][~mask].any()
    assert not outputs["grad_input"][~mask].any()
    assert (outputs["loss"][mask] > 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [100, 1000, 12000])
def test_scaling_touches_only_rows_that_change(classes: int, dtype: torch.dtype) -> None:
    grad, _ = logits(classes, dtype)
    scale = torch.where(torch.arange(ROWS) % 4 == 0, -0.5, 1.0)
    expected = (grad.float() * scale[:, None]).to(dtype)
    with count_traffic() as traffic:
        triton_scale_rows.scale_rows(grad, scale)
    assert torch.equal(grad, expected)
    changed = int((scale != 1).sum())
    assert traffic.loaded == changed * classes * dtype.itemsize + 4 * ROWS
    assert traffic.stored == changed * classes * dtype.itemsize


def new_outputs(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Poisoned memory for each name."""
    return {
        name: torch.full(shape, float("nan"), dtype=dtype if name == "grad_input" else torch.float32)
        for name, shape in shapes.items()
    }


def run_logit_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    divergence: int,
    *names: str,
    mask: torch.Tensor | None = None,
    grad_dtype: torch.dtype | None = None,
    **options: float,
) -> dict[str, torch.Tensor]:
    rows = input.shape[0]
    order = {
        "loss": (rows,),
        "terms": (5, rows),
        "grad_input": tuple(input.shape),
        "grad_input_temperature": (rows,),
    }
    outputs = new_outputs({name: order[name] for name in names}, grad_dtype or input.dtype)
    hard = [options.get(name, 0.0) for name in ("hard_weight", "label_smoothing", "z_loss", "logit_mse")]
    labels = torch.arange(rows) if divergence in (5, 6, 7, 8) or hard[0] else None
    scales = (None, None, 2.0, 2.0, None, 4.0, None, 0.25, mask)
    weights = (divergence, 0.5, 1.5, 0.5, bool(options.get("standardize", False)), *hard)
    triton_logit_loss.logit_loss(
        input, target if divergence or hard[3] else None, labels, *scales, *weights, *map(outputs.get, order)
    )
    return outputs


# (divergence, options, sweeps over a streamed row for loss and grad_input)
LOGIT_LOSSES = [
    pytest.param(0, {"hard_weight": 1.0, "z_loss": 1e-3}, 2, id="cross-entropy"),
    pytest.param(1, {"hard_weight": 0.5, "label_smoothing": 0.1}, 2, id="kl-hard"),
    pytest.param(2, {}, 3, id="reverse-kl"),
    pytest.param(3, {}, 3, id="mixture"),
    pytest.param(4, {}, 3, id="total-variation"),
    pytest.param(5, {}, 2, id="decoupled"),
    pytest.param(5, {"standardize": True, "hard_weight": 1.0}, 4, id="decoupled-standardized-hard"),
    pytest.param(6, {}, 3, id="reverse-decoupled"),
    pytest.param(7, {}, 2, id="normalized"),
    pytest.param(8, {"standardize": True}, 4, id="reverse-normalized-standardized"),
    pytest.param(0, {"logit_mse": 1.0}, 1, id="mse"),
    pytest.param(2, {"logit_mse": 1.0, "hard_weight": 0.5}, 3, id="reverse-kl-mse-hard"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [100, 12000])
@pytest.mark.parametrize(("divergence", "options", "sweeps"), LOGIT_LOSSES)
def test_logit_loss(
    divergence: int, options: dict[str, float], sweeps: int, classes: int, dtype: torch.dtype
) -> None:
    input, target = logits(classes, dtype)
    with count_traffic() as traffic:
        outputs = run_logit_loss(input, target, divergence, "loss", "grad_input", **options)
    sides = 2 if divergence or "logit_mse" in options else 1
    # A label, and its logits.
    labels = {True: 8 + sides * dtype.itemsize, False: 0}[divergence in (5, 6, 7, 8)]
    if not labels and options.get("hard_weight"):
        labels = 8 + dtype.itemsize
    claimed = triton_logit_loss.bytes_moved(
        ROWS,
        classes,
        dtype.itemsize,
        divergence,
        standardize=bool(options.get("standardize")),
        hard=bool(options.get("hard_weight")),
        mse=bool(options.get("logit_mse")),
    )
    passes = sides * (sweeps if classes == 12000 else 1) + 1
    assert claimed == ROWS * (passes * classes * dtype.itemsize + labels + 4)
    assert traffic.total == claimed
    assert traffic.stored == ROWS * (classes * dtype.itemsize + 4)
    assert traffic.launches == 1
    assert (outputs["loss"] > 0).all()
    assert outputs["grad_input"].abs().max() > 0


@pytest.mark.parametrize("classes", [100, 12000])
@pytest.mark.parametrize("divergence", [2, 9])
def test_logit_loss_without_gradient(divergence: int, classes: int) -> None:
    input, target = logits(classes, torch.float32)
    with count_traffic() as traffic:
        run_logit_loss(input, target, divergence, "loss", "terms")
    sweeps = 2 if classes == 12000 else 1
    claimed = triton_logit_loss.bytes_moved(ROWS, classes, 4, divergence, outputs=("loss", "terms"))
    assert traffic.total == claimed == ROWS * (2 * sweeps * classes * 4 + 24)


@pytest.mark.parametrize("classes", [100, 12000])
def test_logit_loss_with_a_gradient_of_halves(classes: int) -> None:
    """Two reads of float32, one write of half as much; cross-entropy with MSE takes the target in its second sweep."""
    input, target = logits(classes, torch.float32)
    for divergence, reads in ((1, 4), (0, 3)):
        with count_traffic() as traffic:
            run_logit_loss(
                input,
                target,
                divergence,
                "grad_input",
                grad_dtype=torch.float16,
                hard_weight=1.0,
                logit_mse=1.0,
            )
        claimed = triton_logit_loss.bytes_moved(
            ROWS, classes, 4, divergence, hard=True, mse=True, grad_itemsize=2, outputs=("grad_input",)
        )
        moved = 4 * (reads if classes == 12000 else 2) + 2
        assert traffic.total == claimed == ROWS * (moved * classes + 12)
        assert traffic.stored == ROWS * classes * 2


@pytest.mark.parametrize("classes", [100, 12000])
@pytest.mark.parametrize("divergence", [1, 5])
def test_logit_loss_does_not_read_masked_rows(divergence: int, classes: int) -> None:
    input, target = logits(classes, torch.float32)
    mask = torch.arange(ROWS) % 3 == 0
    input[~mask] = target[~mask] = float("nan")
    with count_traffic() as traffic:
        outputs = run_logit_loss(
            input, target, divergence, "loss", "terms", "grad_input", "grad_input_temperature", mask=mask
        )
    names = tuple(outputs)
    stored = ROWS * (classes * 4 + 28)
    read = triton_logit_loss.bytes_moved(1, classes, 4, divergence, outputs=names) - (classes * 4 + 28)
    assert traffic.stored == stored
    assert traffic.loaded == int(mask.sum()) * read + ROWS
    for output in outputs.values():
        assert not output.T[~mask].any() if output.shape[0] == 5 else not output[~mask].any()
    assert (outputs["loss"][mask] > 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("classes", "teachers"), [(100, 3), (1000, 2), (12000, 1), (12000, 6)])
def test_multi_teacher(classes: int, teachers: int, dtype: torch.dtype) -> None:
    input, target = logits(classes, dtype)
    targets = [target + k for k in range(teachers)]
    shapes = {"loss": (ROWS,), "losses": (teachers, ROWS), "grad_input": tuple(input.shape)}

    def run(teacher_mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
        outputs = new_outputs(shapes, dtype)
        values = ([2.0] * teachers, None, [0.5] * teachers, teacher_mask, None)
        triton_multi_teacher.multi_teacher_kl_div(input, targets, None, *values, *outputs.values())
        return outputs

    with count_traffic() as traffic:
        outputs = run(None)
    claimed = triton_multi_teacher.bytes_moved(ROWS, classes, dtype.itemsize, teachers, outputs=shapes)
    # The input goes with each four of the teachers where a row is streamed, and with all of them at the end.
    reads = 2 * teachers + 1 + -(-teachers // 4) if classes == 12000 else teachers + 1
    assert claimed == ROWS * ((reads + 1) * classes * dtype.itemsize + 4 + 4 * teachers)
    assert traffic.total == claimed
    assert traffic.launches == 1
    assert (outputs["loss"] > 0).all()

    # A teacher that does not count is not read.
    teacher_mask = torch.ones(teachers, ROWS, dtype=torch.bool)
    teacher_mask[0, ::2] = False
    targets[0][::2] = float("nan")
    with count_traffic() as fewer:
        outputs = run(teacher_mask)
    each = (2 if classes == 12000 else 1) * classes * dtype.itemsize
    assert traffic.loaded - fewer.loaded == int((~teacher_mask).sum()) * each - teacher_mask.numel()
    assert not outputs["losses"][~teacher_mask].any()
    assert outputs["grad_input"].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("classes", "k"), [(100, 5), (1000, 20), (12000, 20)])
@pytest.mark.parametrize("tail", [0, 1, 2], ids=["bucket", "renormalize", "drop"])
def test_topk(tail: int, classes: int, k: int, dtype: torch.dtype) -> None:
    input, target = logits(classes, dtype)
    log_probs, indices = torch.log_softmax(target.float(), 1).topk(k)
    shapes = {"loss": (ROWS,), "grad_input": tuple(input.shape)}

    def run(mask: torch.Tensor | None, *names: str) -> dict[str, torch.Tensor]:
        outputs = new_outputs({name: shapes[name] for name in names}, dtype)
        given = (input, log_probs.contiguous(), indices.contiguous(), None, 2.0, None, 1.0, mask, tail)
        triton_topk.topk_kl_div(*given, outputs.get("loss"), outputs.get("grad_input"), None, None)
        return outputs

    for names in (("loss",), ("loss", "grad_input")):
        with count_traffic() as traffic:
            outputs = run(None, *names)
        claimed = triton_topk.bytes_moved(ROWS, classes, dtype.itemsize, k, tail, outputs=names)
        grad = len(names) - 1
        passes = grad + (0 if tail == 1 else 1 + grad if classes == 12000 else 1)
        steps = 0 if tail else -(-classes * dtype.itemsize // 4096) if classes == 12000 else 1
        of_k = 4 + 8 * (1 + steps) + dtype.itemsize * (1 + grad)
        assert claimed == ROWS * (passes * classes * dtype.itemsize + of_k * k + 4)
        assert traffic.total == claimed
        assert traffic.launches == 1
    assert (outputs["grad_input"] != 0).sum(1).min() >= (k if tail == 1 else classes // 2)

    mask = torch.arange(ROWS) % 3 == 0
    input[~mask] = log_probs[~mask] = float("nan")
    indices[~mask] = -1
    with count_traffic() as masked:
        outputs = run(mask, "loss", "grad_input")
    assert masked.loaded == traffic.loaded * int(mask.sum()) // ROWS + ROWS
    assert not outputs["loss"][~mask].any()
    assert not outputs["grad_input"][~mask].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize(("channels", "positions"), [(40, 49), (24, 64), (5, 1500), (1100, 1)])
def test_pool_mse(channels: int, positions: int, channels_last: bool, dtype: torch.dtype) -> None:
    student, teacher = (x.view(ROWS, channels, positions) for x in logits(channels * positions, dtype))
    if channels_last:
        student, teacher = (x.mT.contiguous().mT for x in (student, teacher))
    last = channels_last or positions == 1
    sizes, maps = (ROWS, channels, positions, dtype.itemsize), ROWS * channels * positions * dtype.itemsize
    pooled = [torch.full((ROWS, channels), float("nan"), dtype=dtype) for _ in range(2)]

    def forward(mask: torch.Tensor | None, pieces: int) -> torch.Tensor:
        mse = torch.full((ROWS, pieces), float("nan"))
        outputs = (*pooled, mse, None, None)
        triton_pool_mse.pool_mse(student, teacher, mask, None, None, None, *outputs)
        return mse

    for pieces in (1, 3):
        with count_traffic() as traffic:
            mse = forward(None, pieces)
        claimed = triton_pool_mse.bytes_moved(*sizes, pieces=pieces)
        assert claimed == 2 * maps + ROWS * (2 * channels * dtype.itemsize + 4 * pieces)
        assert traffic.total == claimed
        assert traffic.launches == 1
        assert (mse.sum(1) > 0).all()

    upstream = {
        "grad_pooled_student": torch.ones(ROWS, channels, dtype=dtype),
        "grad_pooled_teacher": torch.ones(ROWS, channels, dtype=dtype),
        "grad_mse": torch.ones(ROWS),
    }

    def backward(
        mask: torch.Tensor | None, given: tuple[str, ...], wanted: tuple[str, ...]
    ) -> list[torch.Tensor]:
        outputs = [torch.full_like(student, float("nan")) if k in wanted else None for k in names]
        grads = [upstream[k] if k in given else None for k in upstream]
        triton_pool_mse.pool_mse(student, teacher, mask, *grads, None, None, None, *outputs)
        return [x for x in outputs if x is not None]

    names, every = ("grad_student", "grad_teacher"), tuple(upstream)
    for given, wanted, passes in (
        (("grad_mse",), names[:1], 3),
        (every, names[:1], 3),
        (every, names, 4),
        (every[:2], names[1:], 1),
        (every[:2], names, 2),
    ):
        with count_traffic() as traffic:
            outputs = backward(None, given, wanted)
        assert traffic.total == triton_pool_mse.bytes_moved(
            *sizes, outputs=wanted, upstream=given, channels_last=last
        )
        # Beside the maps: a value a channel and side, one a program.
        assert passes * maps <= traffic.total <= passes * maps + ROWS * channels * (2 * dtype.itemsize + 4)
        assert traffic.stored == len(wanted) * maps
        assert traffic.launches == 1
        assert all((x != 0).any() for x in outputs)

    # A sample that does not count is not read.
    mask = torch.arange(ROWS) % 3 == 0
    student[~mask] = teacher[~mask] = float("nan")
    with count_traffic() as traffic:
        mse = forward(mask, 2)
    assert traffic.loaded == 2 * maps * int(mask.sum()) // ROWS + 2 * ROWS
    assert not mse[~mask].any() and not pooled[0][~mask].any() and (mse[mask].sum(1) > 0).all()
    with count_traffic() as traffic:
        outputs = backward(mask, every, names)
    assert traffic.loaded <= (2 * maps + 3 * ROWS * channels * 4) * int(mask.sum()) // ROWS + ROWS * channels
    assert all(not x[~mask].any() and x[mask].any() for x in outputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("channels", "positions", "pieces"), [(40, 49, 1), (24, 64, 1), (9, 700, 1), (600, 130, 9)]
)
def test_masked_feature_loss(channels: int, positions: int, pieces: int, dtype: torch.dtype) -> None:
    student, teacher = (x.view(ROWS, channels, 1, positions) for x in logits(channels * positions, dtype))
    weight_map = torch.rand(ROWS, 1, positions)
    features = ROWS * channels * positions * dtype.itemsize
    for names in (("loss",), ("loss", "grad_student"), ("loss", "squares"), triton_masked.OUTPUTS):
        fresh = {
            "grad_student": torch.full_like(student, float("nan")),
            "squares": torch.full_like(weight_map, float("nan")),
        }
        outputs = [fresh[name] if name in names else None for name in fresh]
        loss = torch.tensor(float("nan"))
        with count_traffic() as traffic:
            triton_masked.masked_feature_loss(student, teacher, weight_map, loss, *outputs)
        claimed = triton_masked.bytes_moved(ROWS, channels, positions, dtype.itemsize, outputs=names)
        # Beside the features: the weights, the map's gradient, and one share a program.
        maps = weight_map.nbytes * pieces * (2 if "squares" in names else 1)
        shares = 4 * ROWS * -(-positions // min(128, 1 << (positions - 1).bit_length())) * pieces
        assert claimed == features * (3 if "grad_student" in names else 2) + maps + shares
        assert traffic.total == claimed
        assert traffic.stored == claimed - 2 * features - weight_map.nbytes * pieces
        assert traffic.launches == 1
        assert loss > 0 and all(x is None or (x.isfinite().all() and (x != 0).any()) for x in outputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distance", [0, 1], ids=["wasserstein", "kl"])
@pytest.mark.parametrize(
    ("x_samples", "y_samples", "features", "splits"), [(9, 14, 7, 1), (70, 33, 140, 1), (600, 1100, 12, 4)]
)
def test_gaussian(
    x_samples: int, y_samples: int, features: int, splits: int, distance: int, dtype: torch.dtype
) -> None:
    problems, generator = 2, torch.Generator().manual_seed(features)
    x, y = (
        torch.randn(problems, samples, features, generator=generator).to(dtype)
        for samples in (x_samples, y_samples)
    )
    x_weights, y_weights = (torch.rand(z.shape[:2], generator=generator) + 0.1 for z in (x, y))
    blocks = -(-features // 64)
    for grads in ((), ("grad_x",), ("grad_x", "grad_y")):
        for weighted in ((), ("x", "y")):
            outputs = [
                torch.full_like(z, float("nan")) if k in grads else None
                for k, z in (("grad_x", x), ("grad_y", y))
            ]
            loss = torch.full((problems,), float("nan"))
            weights = (x_weights, y_weights) if weighted else (None, None)
            with count_traffic() as traffic:
                triton_gaussian.gaussian(x, y, None, *weights, distance, 1e-6, 1, loss, *outputs)
            sizes = (problems, x_samples, y_samples, features, dtype.itemsize)
            claimed = triton_gaussian.bytes_moved(*sizes, weighted=weighted, outputs=("loss", *grads))
            # 1 read of each side, 1 read and 1 write of a side for its gradient; a weight goes with each block.
            moved = x.nbytes + y.nbytes + 2 * sum(z.nbytes for z in outputs if z is not None)
            if weighted:
                moved += blocks * (x_weights.nbytes + y_weights.nbytes)
                moved += blocks * sum(4 * z[..., 0].numel() for z in outputs if z is not None)
            assert traffic.total == claimed
            # Beside that the first samples, the blocks' losses, and what parts leave behind.
            first = 2 * problems * features * dtype.itemsize
            parts = 2 * problems * splits * (8 * features + 4 * blocks)
            programs = splits if grads else 1
            rest = first * splits + 4 * problems * blocks
            if splits > 1:
                rest += parts - 2 * problems * splits * 4 * (blocks - 1) + programs * (parts + first)
            assert claimed == moved + rest
            assert traffic.launches == (1 if splits == 1 else 3)
            assert (loss > 0).all()
            assert all(z is None or (z.isfinite().all() and (z != 0).any()) for z in outputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gaussian_of_classes(dtype: torch.dtype) -> None:
    """Each sample is read by the program of its class alone: as often as without labels."""
    problems, samples, features = 2, 20, 140
    x, y = torch.randn(2, problems, samples, features, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels = (torch.arange(samples) % 6).expand(problems, -1).contiguous()
    outputs, loss = [torch.full_like(z, float("nan")) for z in (x, y)], torch.full((problems,), float("nan"))
    with count_traffic() as traffic:
        triton_gaussian.gaussian(x, y, labels, None, None, 0, 0.0, 2, loss, *outputs)
    blocks, classes = -(-features // 128), 6 * problems
    moved = 6 * x.nbytes + 2 * classes * features * dtype.itemsize
    # Where a class starts and ends, and which its samples are; a loss a block and class that there could be.
    places = 8 * blocks * (2 * problems * samples + 2 * classes + 4 * problems * samples)
    assert traffic.total == moved + places + 4 * blocks * problems * samples
    assert traffic.launches == 1
    assert (loss > 0).all() and all(z.isfinite().all() and (z != 0).any() for z in outputs)


@pytest.mark.parametrize(
    ("n", "m", "features", "block_m", "blocks", "dtype", "mean_distance", "grads"),
    [
        (40, 70, 140, 32, 1, torch.float32, False, ("grad_x", "grad_y")),
        (70, 40, 140, 32, 1, torch.float16, True, ("grad_x",)),
        # More than one block of features to a program: sums in memory.
        (70, 33, 150, 32, 2, torch.float32, True, ("grad_x", "grad_y")),
        (33, 50, 150, 32, 3, torch.float16, False, ("grad_y",)),
        (150, 40, 64, 64, 1, torch.float32, False, ()),
    ],
)
def test_mmd(
    n: int,
    m: int,
    features: int,
    block_m: int,
    blocks: int,
    dtype: torch.dtype,
    mean_distance: bool,
    grads: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Samples and gradients, and nothing of the size of the pairs: what the formula leaves out is under 5 %."""
    monkeypatch.setattr(triton_mmd, "tile", lambda *sizes: triton_mmd.Tile(block_m, 32, 16, 64, blocks))
    generator = torch.Generator().manual_seed(features)
    x, y = (torch.randn(1, k, features, generator=generator).to(dtype) for k in (n, m))
    outputs = [
        torch.full_like(z, float("nan")) if k in grads else None for k, z in (("grad_x", x), ("grad_y", y))
    ]
    loss, bandwidths = torch.full((1,), float("nan")), None if mean_distance else torch.tensor([10.0])
    with count_traffic() as traffic:
        triton_mmd.mmd(x, y, None, None, None, bandwidths, 1, False, loss, *outputs)
    sizes = (1, n, m, features, dtype.itemsize)
    claimed = triton_mmd.bytes_moved(*sizes, mean_distance=mean_distance, grads=grads)
    assert claimed < traffic.total <= 1.05 * claimed
    assert traffic.launches == (5 if mean_distance else 3)
    assert (loss > 0).all()
    assert all(z is None or (z.isfinite().all() and (z != 0).any()) for z in outputs)


@pytest.mark.parametrize(
    ("n", "m", "iterations", "cost", "debias", "extra", "grads", "plans"),
    [
        (40, 70, 2, "euclidean", True, False, ("grad_x", "grad_y"), 0),
        (70, 40, 1, "cosine", True, True, ("grad_y",), 3),
        # Those after the 16th may alternate.
        (20, 17, 18, "sqeuclidean", False, True, (), 1),
    ],
)
def test_sinkhorn(
    n: int,
    m: int,
    iterations: int,
    cost: str,
    debias: bool,
    extra: bool,
    grads: tuple[str, ...],
    plans: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Samples as often as there are iterations, and nothing of the size of the pairs but what is given or asked for."""
    tile = triton_sinkhorn.Tile(32, 32, 16, 64, 8)
    monkeypatch.setattr(triton_sinkhorn, "tile", lambda *sizes, extra: tile)
    features, generator = 140, torch.Generator().manual_seed(n)

    def new(*shape: int) -> torch.Tensor:
        return torch.full((1, *shape), float("nan"))

    x, y = (torch.randn(1, k, features, generator=generator) / features**0.5 for k in (n, m))
    a, b = (torch.full((1, k), 1 / k) for k in (n, m))
    shapes = ((n, m), (n, n), (m, m))[: 3 if debias else 1]
    added = [torch.rand(1, *shape, generator=generator) for shape in shapes] if extra else []
    own = [new(n), new(m)] if debias else [None, None]
    outputs = [new(*z.shape[1:]) if k in grads else None for k, z in (("grad_x", x), ("grad_y", y))]
    found = [new(*shape) for shape in shapes[:plans]]
    loss = torch.full((1,), float("nan"))
    options = (cost, 0.5, float("inf"), iterations, -1.0, debias)
    with count_traffic() as traffic:
        triton_sinkhorn.sinkhorn(
            x, y, a, b, added, *options, loss, new(n), new(m), *own, *outputs, None, None, found
        )
    claimed = triton_sinkhorn.bytes_moved(
        *(1, n, m, features, iterations), cost=cost, debias=debias, extra=extra, grads=grads, plans=plans
    )
    assert claimed < traffic.total <= 1.05 * claimed
    assert traffic.launches == 5 + iterations + max(iterations - 16, 0) + plans
    assert loss.isfinite().all() and (loss != 0).all()
    assert all(z is None or (z.isfinite().all() and (z != 0).any()) for z in (*outputs, *found))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("x_samples", "y_samples", "features"), [(9, 14, 7), (140, 260, 70), (9, 14, 40), (66, 70, 131)]
)
def test_coral(x_samples: int, y_samples: int, features: int, dtype: torch.dtype) -> None:
    problems, generator = 2, torch.Generator().manual_seed(features)
    x, y = (
        torch.randn(problems, samples, features, generator=generator).to(dtype)
        for samples in (x_samples, y_samples)
    )
    weights = [
        [torch.full(z.shape[:2], 1 / k), torch.full(z.shape[:2], k**-0.5), torch.zeros(problems).long()]
        for z, k in ((x, x_samples), (y, y_samples))
    ]
    rows = max(x_samples, y_samples)
    inner = features > rows
    for weighted in ((), ("x", "y")):
        for grads in ((), ("grad_x",), ("grad_x", "grad_y")):

            def new(*shape: int) -> torch.Tensor:
                return torch.full((problems, *shape), float("nan"))

            samples, loss = new(2 * rows, features), new()
            products = new(*[2 * rows if inner else features] * 2)
            kept = [
                new(*z.shape[1:]) if k in grads and not inner else None
                for k, z in (("grad_x", x), ("grad_y", y))
            ]
            kept.append(new(features, features) if grads and not inner else None)
            with count_traffic() as traffic:
                given = weights if weighted else ([], [])
                triton_coral.distances_of_covariances(x, y, *given, samples, products, loss, *kept)
            claimed = triton_coral.bytes_moved(
                problems,
                x_samples,
                y_samples,
                features,
                dtype.itemsize,
                weighted=weighted,
                outputs=("loss", *grads),
            )
            assert traffic.total == claimed
            stored = samples.nbytes + sum(z.nbytes for z in kept if z is not None)
            assert stored <= traffic.stored <= 1.2 * stored
            assert traffic.launches == 4
            assert (loss > 0).all()
            assert all(z is None or (z.isfinite().all() and (z != 0).any()) for z in (samples, *kept))


@pytest.mark.parametrize("weighted", [(), ("x",), ("x", "y")], ids=["", "weighted", "both weighted"])
@pytest.mark.parametrize(("n", "m"), [(13, 13), (150, 150), (200, 70)])
def test_sliced_wasserstein(n: int, m: int, weighted: tuple[str, ...]) -> None:
    """Sorted on the chip, rows and gradients move once; merged, a sample of the other side is met once a level."""
    problems, projections, generator = 2, 3, torch.Generator().manual_seed(n)
    x, y = (torch.randn(problems, projections, k, generator=generator) for k in (n, m))
    x_weights, y_weights = (
        torch.rand(problems, k, generator=generator) + 0.1 if side in weighted else None
        for side, k in (("x", n), ("y", m))
    )
    for grads in ((), ("grad_x",), ("grad_x", "grad_y")):
        outputs = [
            torch.full_like(z, float("nan")) if k in grads else None
            for k, z in (("grad_x", x), ("grad_y", y))
        ]
        loss = torch.full((problems, projections), float("nan"))
        with count_traffic() as traffic:
            triton_sliced.sliced_wasserstein(x, y, x_weights, y_weights, 2.0, loss, *outputs)
        claimed = triton_sliced.bytes_moved(
            problems * projections, n, m, weighted=weighted, outputs=("loss", *grads)
        )
        if n == m and not weighted:
            assert (
                claimed == x.nbytes + y.nbytes + sum(z.nbytes for z in outputs if z is not None) + loss.nbytes
            )
        assert traffic.total <= 1.05 * claimed
        assert traffic.total >= (0.9 if weighted else 1) * claimed
        assert traffic.launches == (1 if n == m and not weighted else 3)
        assert (loss > 0).all()
        assert all(z is None or (z.isfinite().all() and (z != 0).any()) for z in outputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("classes", "width"), [(100, 64), (200, 140)])  # one tile of classes, several of all
@pytest.mark.parametrize("shared", [False, True], ids=["two-heads", "one-head"])
def test_linear(shared: bool, classes: int, width: int, dtype: torch.dtype) -> None:
    """Hidden states and heads, and nothing of the size rows x classes: what the formula leaves out is under 5 %."""
    rows, teacher_width = 40, width if shared else 2 * width
    generator = torch.Generator().manual_seed(classes)
    input, target, weight, target_weight = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((rows, width), (rows, teacher_width), (classes, width), (classes, teacher_width))
    )
    if shared:
        target_weight = weight
    bias = torch.zeros(classes, dtype=dtype)
    sources = {"input": input, "input_weight": weight, "target": target, "target_weight": target_weight}
    statistics, loss = torch.full((triton_linear.STATISTICS_ROWS, rows), float("nan")), torch.zeros(rows)

    def run(forward: bool, *names: str) -> dict[str, torch.Tensor]:
        found = {name: torch.full_like(sources[name], float("nan")) for name in names}
        inputs = (input, weight, bias, target, target_weight, None, None, None, None)
        options = (
            2.0,
            2.0,
            None,
            4.0,
            None,
            1.0,
            None,
            1,
            1.0,
            1.0,
            0.0,
            0.0,
            0.0,
            0.0,
            0.0,
            0.0,
            0.0,
            1.0,
            1.0,
        )
        outputs = (found.get("input"), found.get("input_weight"), None)
        outputs += (found.get("target"), found.get("target_weight"), None, None, None)
        triton_linear.linear_loss(*inputs, *options, loss if forward else None, None, statistics, *outputs)
        return found

    sizes = (rows, classes, width, teacher_width, dtype.itemsize)
    with count_traffic() as traffic:
        run(True)
    claimed = triton_linear.bytes_moved(*sizes, shared=shared, biases=1)
    assert traffic.launches == 1
    assert claimed <= traffic.total <= 1.05 * claimed
    for names in (("input",), ("input_weight",), ("input", "input_weight"), tuple(sources)):
        with count_traffic() as traffic:
            found = run(False, *names)
        claimed = triton_linear.bytes_moved(*sizes, shared=shared, biases=1, grads=names)
        assert traffic.launches == 1
        assert claimed <= traffic.total <= 1.05 * claimed
        assert traffic.stored == sum(x.numel() for x in found.values()) * dtype.itemsize
        assert all(x.isfinite().all() for x in found.values())
