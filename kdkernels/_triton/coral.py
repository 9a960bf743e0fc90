"""What surrounds the products of CORAL; formulas in kdkernels.ops.coral.

The products are torch's: what is multiplied is float32, where tl.dot is no faster than cuBLAS, and a tile of the
symmetric half takes two products, D_iᵀS_j + S_iᵀD_j, so that a kernel of our own would do as many. Around them: 2 reads
of the samples, the second from the caches where they stay there, and 1 write of each of D, S and the A and B that
gradients need; then 1 read of the products, and 1 write of the covariances' difference.
"""

import math
from collections.abc import Collection
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kdkernels._triton.gaussian import load_samples, load_weights


class Tile(NamedTuple):
    """A program takes block_d columns of block_n samples, or for the means walks along one of `splits` runs of them."""

    block_n: int
    block_d: int
    num_warps: int
    splits: int


def tile(problems: int, samples: int, features: int) -> Tile:
    """8 elements a thread, 64 of them side by side; samples are split where programs are few."""
    block_d = min(64, triton.next_power_of_2(features))
    block_n = min(2048 // block_d, triton.next_power_of_2(samples))
    most = min(32, samples // 128, 512 // (problems * triton.cdiv(features, block_d)))
    return Tile(block_n, block_d, max(1, block_n * block_d // 256), 1 << max(0, most.bit_length() - 1))


def square_tile(width: int) -> tuple[int, int]:  # block, num_warps
    """A square of products, 16 a thread."""
    block = min(64, triton.next_power_of_2(width))
    return block, max(1, block * block // 512)


def bytes_moved(
    problems: int,
    x_samples: int,
    y_samples: int,
    features: int,
    itemsize: int,
    *,
    weighted: Collection[str] = (),
    outputs: Collection[str] = ("loss", "grad_x", "grad_y"),
) -> int:
    """Bytes read and written for `outputs`, less the products of matrices and the sum of the tiles' shares; `weighted`
    has "x" and "y" where those have weights."""
    rows = max(x_samples, y_samples)
    block_n, block_d, _, splits = tile(problems, rows, features)
    row_blocks, blocks = triton.cdiv(rows, block_n), triton.cdiv(features, block_d)
    moved = 2 * rows * features * 4
    for side, samples in (("x", x_samples), ("y", y_samples)):
        moved += 2 * samples * features * itemsize
        # The sample that others are measured from, and the parts of the mean.
        moved += (splits + row_blocks) * features * itemsize + splits * features * 4 * (1 + row_blocks)
        if side in weighted:  # the shares and the scales, with each block; and which sample is the first
            moved += 2 * samples * blocks * 4 + 8 * blocks * (splits + row_blocks)
        if f"grad_{side}" in outputs and features <= rows:
            moved += samples * features * 4
    width = features if features <= rows else rows
    block, _ = square_tile(width)
    tiles = triton.cdiv(width, block)
    moved += tiles * tiles * 4
    if features > rows:
        return problems * (moved + 4 * rows * rows * 4)
    # A tile on the diagonal is read as its own transpose.
    last = width - (tiles - 1) * block
    moved += (width * width + (tiles - 1) * block * block + last * last) * 4
    return problems * (moved + (width * width * 4 if len(outputs) > 1 else 0))


@triton.jit
def first_sample(
    x_ptr,  # (samples, features)
    stride,
    first_ptr,  # the number of the first sample that has weight, int64; or None: 0
    column,  # (BLOCK_D,)
    inside,  # (BLOCK_D,)
):
    if first_ptr is not None:
        x_ptr += tl.load(first_ptr) * stride
    return tl.load(x_ptr + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["problem_stride", "stride", "samples", "features"])
def means_kernel(
    x_ptr,  # (problems, samples, features)
    shares_ptr,  # (problems, samples) float32, or None: equal
    first_ptr,  # (problems,) int64 or None
    parts_ptr,  # (problems, SPLITS, features) float32: the mean less the first sample, in parts
    problem_stride,
    stride,
    samples,
    features,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VECTOR: tl.constexpr,
):
    # The compiler cannot see that rows start and end on 16 bytes unless the multiplication is in sight.
    stride = (stride // VECTOR) * VECTOR
    problem_stride = (problem_stride // VECTOR) * VECTOR
    features = (features // VECTOR) * VECTOR
    part = tl.program_id(0).to(tl.int64)
    problem = part // SPLITS
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < features
    run = (samples + SPLITS - 1) // SPLITS
    begin = (part % SPLITS).to(tl.int32) * run
    end = tl.minimum(begin + run, samples)
    x_ptr += problem * problem_stride
    if shares_ptr is not None:
        shares_ptr += problem * samples
        first_ptr += problem
    origin = first_sample(x_ptr, stride, first_ptr, column, inside)
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        exists = i < end
        row, x = load_samples(x_ptr, stride, None, i, exists, column, inside)
        total += load_weights(shares_ptr, row, exists)[:, None] * (x - origin[None, :])
    mean = tl.sum(total, 0)
    if shares_ptr is None:
        mean /= samples
    tl.store(parts_ptr + (part * features + column), mean, mask=inside)


@triton.jit
def scaled(
    x_ptr,  # (problems, samples, features)
    scales_ptr,  # (problems, samples) float32 or None
    first_ptr,  # (problems,) int64 or None
    parts_ptr,  # (problems, SPLITS, features) float32
    out_ptr,  # (problems, samples, features) float32 or None
    problem_stride,
    stride,
    samples,
    features,
    scale,
    problem,
    i,  # (BLOCK_N,)
    column,  # (BLOCK_D,)
    inside,  # (BLOCK_D,)
    SPLITS: tl.constexpr,
):
    # The centred samples, scaled so that their products are the covariance; 0 beyond the last.
    part = problem * SPLITS + tl.arange(0, SPLITS)
    parts = tl.load(parts_ptr + (part[:, None] * features + column[None, :]), mask=inside[None, :], other=0.0)
    mean = tl.sum(parts, 0)
    x_ptr += problem * problem_stride
    if scales_ptr is not None:
        scales_ptr += problem * samples
        first_ptr += problem
    origin = first_sample(x_ptr, stride, first_ptr, column, inside)
    exists = i < samples
    row, x = load_samples(x_ptr, stride, None, i, exists, column, inside)
    each = load_weights(scales_ptr, row, exists)
    if scales_ptr is None:
        each *= scale
    found = tl.where(exists[:, None], ((x - origin[None, :]) - mean[None, :]) * each[:, None], 0.0)
    if out_ptr is not None:
        pointers = out_ptr + ((problem * samples + row)[:, None] * features + column[None, :])
        tl.store(pointers, found, mask=exists[:, None] & inside[None, :])
    return found


@triton.jit(
    do_not_specialize=[
        "x_problem_stride",
        "x_stride",
        "y_problem_stride",
        "y_stride",
        "x_samples",
        "y_samples",
        "rows",
        "features",
    ]
)
def samples_kernel(
    x_ptr,  # (problems, x_samples, features)
    y_ptr,  # (problems, y_samples, features)
    x_scales_ptr,  # (problems, x_samples) float32 or None
    y_scales_ptr,  # (problems, y_samples) float32 or None
    x_first_ptr,  # (problems,) int64 or None
    y_first_ptr,  # (problems,) int64 or None
    x_parts_ptr,  # (problems, SPLITS, features) float32
    y_parts_ptr,  # (problems, SPLITS, features) float32
    samples_ptr,  # (problems, 2, rows, features) float32: A + B, then A - B
    a_ptr,  # (problems, x_samples, features) float32 or None
    b_ptr,  # (problems, y_samples, features) float32 or None
    x_problem_stride,
    x_stride,
    y_problem_stride,
    y_stride,
    x_samples,
    y_samples,
    rows,
    features,
    x_scale,
    y_scale,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VECTOR: tl.constexpr,
):
    x_stride = (x_stride // VECTOR) * VECTOR
    y_stride = (y_stride // VECTOR) * VECTOR
    x_problem_stride = (x_problem_stride // VECTOR) * VECTOR
    y_problem_stride = (y_problem_stride // VECTOR) * VECTOR
    features = (features // VECTOR) * VECTOR
    problem = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < features
    a = scaled(
        x_ptr,
        x_scales_ptr,
        x_first_ptr,
        x_parts_ptr,
        a_ptr,
        x_problem_stride,
        x_stride,
        x_samples,
        features,
        x_scale,
        problem,
        i,
        column,
        inside,
        SPLITS,
    )
    b = scaled(
        y_ptr,
        y_scales_ptr,
        y_first_ptr,
        y_parts_ptr,
        b_ptr,
        y_problem_stride,
        y_stride,
        y_samples,
        features,
        y_scale,
        problem,
        i,
        column,
        inside,
        SPLITS,
    )
    here = samples_ptr + ((problem * 2 * rows + i)[:, None] * features + column[None, :])
    mask = (i < rows)[:, None] & inside[None, :]
    tl.store(here, a + b, mask=mask)
    tl.store(here + rows.to(tl.int64) * features, a - b, mask=mask)


@triton.jit(do_not_specialize=["features"])
def covariances_kernel(
    products_ptr,  # (problems, features, features): (A - B)ᵀ(A + B)
    difference_ptr,  # (problems, features, features), its symmetric part; or None
    loss_ptr,  # (problems, tiles, tiles)
    features,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    # A program takes a tile above the diagonal and the one across it.
    features = (features // VECTOR) * VECTOR
    problem = tl.program_id(0).to(tl.int64)
    row_block = tl.program_id(1)
    column_block = tl.program_id(2)
    share = 0.0
    if row_block <= column_block:
        row = row_block * BLOCK + tl.arange(0, BLOCK)
        column = column_block * BLOCK + tl.arange(0, BLOCK)
        start = problem * features
        here = (start + row)[:, None] * features + column[None, :]
        across = (start + column)[:, None] * features + row[None, :]
        inside = (row < features)[:, None] & (column < features)[None, :]
        inside_across = (column < features)[:, None] & (row < features)[None, :]
        product = tl.load(products_ptr + here, mask=inside, other=0.0)
        other = tl.load(products_ptr + across, mask=inside_across, other=0.0)
        difference = 0.5 * (product + tl.trans(other))
        share = tl.sum(tl.sum(difference * difference, 1), 0)
        if row_block < column_block:
            share *= 2.0
        if difference_ptr is not None:
            tl.store(difference_ptr + here, difference, mask=inside)
            if row_block < column_block:
                tl.store(difference_ptr + across, tl.trans(difference), mask=inside_across)
    tiles = tl.num_programs(1)
    tl.store(loss_ptr + (problem * tiles + row_block) * tiles + column_block, share)


@triton.jit(do_not_specialize=["rows"])
def inner_products_kernel(
    products_ptr,  # (problems, 2, rows, 2, rows): of A + B and A - B
    loss_ptr,  # (problems, tiles, tiles)
    rows,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    rows = (rows // VECTOR) * VECTOR
    problem = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < rows)[None, :]
    total = products_ptr + ((problem * 2 * rows + row)[:, None] * (2 * rows) + column[None, :])
    difference = total + rows.to(tl.int64) * (2 * rows)
    share = tl.load(total, mask=inside, other=0.0) * tl.load(difference + rows, mask=inside, other=0.0)
    share += tl.load(total + rows, mask=inside, other=0.0) * tl.load(difference, mask=inside, other=0.0)
    tiles = tl.num_programs(1)
    here = loss_ptr + (problem * tiles + tl.program_id(1)) * tiles + tl.program_id(2)
    tl.store(here, 0.5 * tl.sum(tl.sum(share, 1), 0))


def distances_of_covariances(
    x: torch.Tensor,  # (B, n, d), features side by side
    y: torch.Tensor,  # (B, m, d), features side by side
    x_weights: list[torch.Tensor],  # shares, scales (B, n) float32, the first with weight (B,) int64; or none
    y_weights: list[torch.Tensor],  # shares, scales (B, m) float32, the first with weight (B,) int64; or none
    samples: torch.Tensor,  # (B, 2 r, d) float32 with r = max(n, m), contiguous, as all that follow
    products: torch.Tensor,  # (B, d, d) float32; with r < d (B, 2 r, 2 r)
    loss: torch.Tensor,  # (B,) float32
    a: torch.Tensor | None,  # (B, n, d) float32
    b: torch.Tensor | None,  # (B, m, d) float32
    difference: torch.Tensor | None,  # (B, d, d) float32
) -> None:
    """Fill the outputs that are not None; `loss` is the squared distance of the covariances."""
    problems, n, features = x.shape
    m, rows = y.shape[1], samples.shape[1] // 2
    block_n, block_d, num_warps, splits = tile(problems, rows, features)
    blocks = triton.cdiv(features, block_d)
    vector = math.gcd(16, features, *x.stride()[:2], *y.stride()[:2])
    with torch.cuda.device_of(x):
        parts, scales, first = [], [], []
        for z, weights in ((x, x_weights), (y, y_weights)):
            shares, each, number = weights or (None, None, None)
            parts.append(loss.new_empty(problems, splits, features))
            scales.append(each)
            first.append(number)
            means_kernel[(problems * splits, blocks)](
                z,
                shares,
                number,
                parts[-1],
                z.stride(0),
                z.stride(1),
                z.shape[1],
                features,
                SPLITS=splits,
                BLOCK_N=block_n,
                BLOCK_D=block_d,
                VECTOR=vector,
                num_warps=num_warps,
                enable_fp_fusion=False,
            )
        samples_kernel[(problems, triton.cdiv(rows, block_n), blocks)](
            x,
            y,
            *scales,
            *first,
            *parts,
            samples,
            a,
            b,
            x.stride(0),
            x.stride(1),
            y.stride(0),
            y.stride(1),
            n,
            m,
            rows,
            features,
            max(n - 1, 1) ** -0.5,
            max(m - 1, 1) ** -0.5,
            SPLITS=splits,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            VECTOR=vector,
            num_warps=num_warps,
            # Equal numbers differ by exactly nothing, whichever products an assembler would have fused.
            enable_fp_fusion=False,
        )
        width = min(features, rows)
        block, num_warps = square_tile(width)
        tiles = triton.cdiv(width, block)
        shares = loss.new_empty(problems, tiles, tiles)
        options = {"BLOCK": block, "VECTOR": math.gcd(16, width), "num_warps": num_warps}
        if features <= rows:
            torch.bmm(samples[:, rows:].mT, samples[:, :rows], out=products)
            covariances_kernel[(problems, tiles, tiles)](products, difference, shares, features, **options)
        else:
            torch.bmm(samples, samples.mT, out=products)
            inner_products_kernel[(problems, tiles, tiles)](products, shares, rows, **options)
    torch.sum(shares, (1, 2), out=loss)


def coral(
    x: torch.Tensor,  # (B, n, d), features side by side
    y: torch.Tensor,  # (B, m, d), features side by side
    labels: None,
    x_weights: torch.Tensor | None,  # (B, n) float32, contiguous
    y_weights: torch.Tensor | None,  # (B, m) float32, contiguous
    loss: torch.Tensor,  # (B,) float32
    grad_x: torch.Tensor | None,  # (B, n, d) contiguous
    grad_y: torch.Tensor | None,  # (B, m, d) contiguous
) -> None:
    """Each problem's distance, and the gradients that are not None, whose products are torch's too."""
    assert labels is None
    problems, n, d = x.shape
    rows = max(n, y.shape[1])
    (there_x, scale_x, given_x), (there_y, scale_y, given_y) = (
        scales(z, weights) for z, weights in ((x, x_weights), (y, y_weights))
    )
    unit = (there_x & there_y) / (4.0 * d * d)
    graded = grad_x is not None or grad_y is not None
    samples = loss.new_empty(problems, 2 * rows, d)
    products = loss.new_empty(problems, *([d, d] if d <= rows else [2 * rows, 2 * rows]))
    root_x = root_y = covariances = None
    if d <= rows and graded:
        root_x, root_y = (
            None if g is None else loss.new_empty(z.shape) for z, g in ((x, grad_x), (y, grad_y))
        )
        covariances = torch.empty_like(products)
    distances_of_covariances(x, y, given_x, given_y, samples, products, loss, root_x, root_y, covariances)
    loss.mul_(unit)
    total, difference = samples[:, :rows], samples[:, rows:]
    with torch.autocast(x.device.type, enabled=False):
        for gradient, root, scale, sign in (
            (grad_x, root_x, scale_x, 1),
            (grad_y, root_y, scale_y, -1),
        ):
            if gradient is None:
                continue
            if root is not None and covariances is not None:  # ± 4 A (C_x − C_y)
                through = torch.bmm(root, covariances).mul_(4 * sign)
            else:  # (S ± D)(DᵀS + SᵀD)
                of_total, cross = products[:, :rows, :rows], products[:, :rows, rows:]
                back, of_difference = products[:, rows:, :rows], products[:, rows:, rows:]
                through = torch.bmm(of_difference + sign * cross, total)
                through.baddbmm_(back + sign * of_total, difference)
            torch.mul(through[:, : gradient.shape[1]], scale * unit[:, None, None], out=gradient)


def scales(
    x: torch.Tensor,  # (B, n, d)
    weights: torch.Tensor | None,  # (B, n)
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Whether there is a covariance (B,), what of the centred samples its root is (B, n, 1), and what
    `distances_of_covariances` takes."""
    problems, n, _ = x.shape
    if weights is None:
        ones = torch.ones(problems, 1, 1, device=x.device)
        return ones[:, 0, 0] * n > 1, ones * max(n - 1, 1) ** -0.5, []
    total = weights.sum(1, keepdim=True)
    share = weights / torch.where(total > 0, total, 1)
    there = (share > 0).sum(1) > 1
    left = torch.where(there, 1 - share.square().sum(1), 1)
    scale = (share / left[:, None]).sqrt()
    first = (weights > 0).to(torch.int8).argmax(1) if n else torch.zeros(problems, dtype=torch.int64)
    return there, scale[..., None], [share, scale, first.to(x.device)]
