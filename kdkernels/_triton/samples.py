"""What the Triton kernels over pairs of samples share: float32 copies less a common centre, and when a pair is near."""

import math

import torch
import triton
import triton.language as tl

# A pair is differenced where its squared distance is below this share of |a|^2 + |b|^2, whose rounding is 64 times as
# large beside it.
NEAR = tl.constexpr(1 / 64)
# Samples of a batch that the centre is made of; any point near them would do.
OF_CENTRE = 16
# Samples and features that a step of the copy takes.
BLOCK_SAMPLES, BLOCK_FEATURES = 16, 64


@triton.jit(
    do_not_specialize=[
        "x_problem_stride",
        "x_stride",
        "y_problem_stride",
        "y_stride",
        "x_samples",
        "y_samples",
        "features",
        "depth",
    ]
)
def prepare_samples_kernel(
    x_ptr,  # (problems, x_samples, features)
    y_ptr,  # (problems, y_samples, features)
    order_ptr,  # (problems, x_samples) int64, the samples of each class after those of the one before; or None
    z_ptr,  # (problems, x_samples + y_samples, depth) float32: less the centre, 0 beyond the features
    squares_ptr,  # (problems, x_samples + y_samples) float32: |z|^2
    differs_ptr,  # (problems, x_samples) bool: whether x has another sample than y
    x_problem_stride,
    x_stride,
    y_problem_stride,
    y_stride,
    x_samples,
    y_samples,
    features,
    depth,
    CENTRED: tl.constexpr,
    OF_CENTRE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VECTOR: tl.constexpr,
):
    # The compiler cannot see that rows start and end on 16 bytes unless the multiplication is in sight.
    x_stride = (x_stride // VECTOR) * VECTOR
    y_stride = (y_stride // VECTOR) * VECTOR
    x_problem_stride = (x_problem_stride // VECTOR) * VECTOR
    y_problem_stride = (y_problem_stride // VECTOR) * VECTOR
    features = (features // VECTOR) * VECTOR
    depth = (depth // 16) * 16
    blocks = (tl.maximum(x_samples, y_samples) + BLOCK_N - 1) // BLOCK_N
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_x = i < x_samples
    in_y = i < y_samples
    row = i.to(tl.int64)
    if order_ptr is not None:
        row = tl.load(order_ptr + problem * x_samples + i, mask=in_x, other=0)
    x_ptr += problem * x_problem_stride
    y_ptr += problem * y_problem_stride
    to = problem * (x_samples + y_samples) + i
    of_centre = tl.arange(0, OF_CENTRE)
    x_of = of_centre * ((x_samples + OF_CENTRE - 1) // OF_CENTRE)
    y_of = of_centre * ((y_samples + OF_CENTRE - 1) // OF_CENTRE)
    x_there = x_of < x_samples
    y_there = y_of < y_samples
    taken = tl.sum(x_there.to(tl.float32) + y_there.to(tl.float32), 0)

    x_squares = tl.zeros((BLOCK_N,), tl.float32)
    y_squares = tl.zeros((BLOCK_N,), tl.float32)
    differs = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(0, depth, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        inside = (column < features)[None, :]
        x_mask = in_x[:, None] & inside
        y_mask = in_y[:, None] & inside
        x = tl.load(x_ptr + (row[:, None] * x_stride + column[None, :]), mask=x_mask, other=0.0).to(
            tl.float32
        )
        y = tl.load(y_ptr + (row[:, None] * y_stride + column[None, :]), mask=y_mask, other=0.0).to(
            tl.float32
        )
        differs = tl.maximum(differs, tl.max((x != y).to(tl.int32), 1))
        if CENTRED:
            x_some = x_ptr + (x_of.to(tl.int64)[:, None] * x_stride + column[None, :])
            y_some = y_ptr + (y_of.to(tl.int64)[:, None] * y_stride + column[None, :])
            some = tl.load(x_some, mask=x_there[:, None] & inside, other=0.0).to(tl.float32)
            some += tl.load(y_some, mask=y_there[:, None] & inside, other=0.0).to(tl.float32)
            centre = tl.sum(some, 0)[None, :] / taken
            x = tl.where(x_mask, x - centre, 0.0)
            y = tl.where(y_mask, y - centre, 0.0)
        x_squares += tl.sum(x * x, 1)
        y_squares += tl.sum(y * y, 1)
        held = (column < depth)[None, :]
        here = z_ptr + (to[:, None] * depth + column[None, :])
        tl.store(here, x, mask=in_x[:, None] & held)
        tl.store(here + x_samples.to(tl.int64) * depth, y, mask=in_y[:, None] & held)
    tl.store(squares_ptr + to, x_squares, mask=in_x)
    tl.store(squares_ptr + to + x_samples, y_squares, mask=in_y)
    tl.store(differs_ptr + problem * x_samples + i, differs != 0, mask=in_x)


def prepare_samples(
    x: torch.Tensor,  # (B, n, d), features side by side
    y: torch.Tensor,  # (B, m, d), features side by side
    order: torch.Tensor | None,  # (B, n) int64
    *,
    centred: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The kernel's z, squares and differs."""
    problems, n, features = x.shape
    m = y.shape[1]
    depth = triton.cdiv(features, 16) * 16
    z = torch.empty(problems, n + m, depth, dtype=torch.float32, device=x.device)
    squares = torch.empty(problems, n + m, dtype=torch.float32, device=x.device)
    differs = torch.empty(problems, n, dtype=torch.bool, device=x.device)
    prepare_samples_kernel[(problems * triton.cdiv(max(n, m), BLOCK_SAMPLES),)](
        x,
        y,
        order,
        z,
        squares,
        differs,
        *x.stride()[:2],
        *y.stride()[:2],
        n,
        m,
        features,
        depth,
        CENTRED=centred,
        OF_CENTRE=OF_CENTRE,
        BLOCK_N=BLOCK_SAMPLES,
        BLOCK_D=min(BLOCK_FEATURES, triton.next_power_of_2(depth)),
        VECTOR=math.gcd(16, features, *x.stride()[:2], *y.stride()[:2]),
        num_warps=4,
    )
    return z, squares, differs


def samples_of_centres(n: int, m: int) -> int:
    """How many samples a problem's programs read to form the centre."""
    of_one = sum(triton.cdiv(k, triton.cdiv(k, OF_CENTRE)) for k in (n, m))
    return of_one * triton.cdiv(max(n, m), BLOCK_SAMPLES)


@triton.jit
def load_rows(
    z_ptr,  # (.., depth) float32
    row,  # (BLOCK,)
    exists,  # (BLOCK,)
    column,  # (BLOCK_K,)
    depth,
):
    mask = exists[:, None] & (column < depth)[None, :]
    return tl.load(z_ptr + (row[:, None] * depth + column[None, :]), mask=mask, other=0.0)
