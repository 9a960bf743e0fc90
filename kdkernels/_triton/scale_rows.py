"""Row scaling in place: grad[r, :] *= scale[r].

A row whose scale is exactly 1 is neither read nor written: an upstream gradient of 1 moves 4 bytes a row, any
other 2 rows classes itemsize + O(rows) bytes.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Tile(NamedTuple):
    """A program takes block_m rows and walks along them: rows that need no scaling cost one load."""

    block_m: int
    block_n: int
    num_warps: int


def tile(classes: int) -> Tile:
    """The tile for rows of `classes` elements."""
    block_n = min(4096, triton.next_power_of_2(classes))
    return Tile(max(1, 1024 // block_n), block_n, max(4, block_n // 512))


# Integers are not specialised on their values: VECTOR says all that the generated code needs to know.
@triton.jit(do_not_specialize=["scale_stride", "rows", "classes"])
def scale_rows_kernel(
    grad_ptr,  # (rows, classes) contiguous
    scale_ptr,  # (rows,) float32, or one value with stride 0
    scale_stride,
    rows,
    classes,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    VECTOR: tl.constexpr,
):
    # The compiler cannot see that rows start and end on 16 bytes unless the multiplication is in sight.
    classes = (classes // VECTOR) * VECTOR
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    scale = tl.load(scale_ptr + row.to(tl.int64) * scale_stride, mask=row < rows, other=1.0)
    changes = scale != 1.0
    if tl.max(changes.to(tl.int32), 0) != 0:
        row_ptr = grad_ptr + row.to(tl.int64)[:, None] * classes
        for start in range(0, classes, BLOCK_N):
            column = start + tl.arange(0, BLOCK_N)[None, :]
            inside = changes[:, None] & (column < classes)
            x = tl.load(row_ptr + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(row_ptr + column, x * scale[:, None], mask=inside)


def scale_rows(
    grad: torch.Tensor,  # (rows, ...) contiguous
    scale: torch.Tensor,  # () or (rows,) float32
) -> None:
    """Multiply each row of `grad` by its scale, in place; the scale is never read on the host."""
    rows, classes = grad.shape[0], grad.numel() // grad.shape[0]
    block_m, block_n, num_warps = tile(classes)
    with torch.cuda.device_of(grad):
        scale_rows_kernel[(triton.cdiv(rows, block_m),)](
            grad,
            scale,
            scale.stride(0) if scale.dim() else 0,
            rows,
            classes,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            VECTOR=math.gcd(16, classes),
            num_warps=num_warps,
        )
