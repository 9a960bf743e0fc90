"""Bytes that the Triton kernels move, counted in the interpreter, against the formula beside the launcher."""

import os
import sys

import pytest
import torch

if "triton" not in sys.modules and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read once, when a kernel is defined

pytest.importorskip("triton")

from triton_counter import count_traffic, is_interpreted

from kdkernels._triton import kl_div as triton_kl_div
from kdkernels._triton import scale_rows as triton_scale_rows

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
