"""One-dimensional transport costs of rows of projections, with their gradients; formulas in
kdkernels.ops.sliced_wasserstein.

Up to LONGEST samples a program sorts a row on the chip, the samples' places with them; longer ones are torch.sort's.
With equal weights and n = m it sorts both sides' rows and scatters the gradients back: 1 read of each row, 1 write of
each gradient. Otherwise sorted rows go through memory, and each sample of either side looks for the first one of the
other side whose share of the mass meets its own, and walks along those until its own ends.
"""

import math
from collections.abc import Collection
from typing import NamedTuple

import torch
import triton
import triton.language as tl

# The longest rows that sort in registers without a spill on sm_80, sm_90, sm_100 and gfx942
# (tests/test_triton_compile.py); twice as many spill on sm_90, with 16 warps and with 32. Neither this nor the tiles
# have been timed.
LONGEST = 4096


class Tile(NamedTuple):
    """A program takes block_m rows, whole where it sorts them, else block_n samples of each."""

    block_m: int
    block_n: int
    num_warps: int


def tile(samples: int) -> Tile:
    """For whole rows: 4 elements a thread, which are 16 bytes, or 8. Short rows share a warp."""
    block_n = triton.next_power_of_2(samples)
    block_m = max(1, 128 // block_n)
    return Tile(block_m, block_n, max(1, block_m * block_n // 256))


def merge_tile(samples: int) -> Tile:
    """One warp, which walks on until the last of its 128 samples is there."""
    block_n = min(128, triton.next_power_of_2(samples))
    return Tile(128 // block_n, block_n, 1)


def bytes_moved(
    rows: int,
    n: int,
    m: int,
    *,
    weighted: Collection[str] = (),
    outputs: Collection[str] = ("loss", "grad_x", "grad_y"),
) -> int:
    """Bytes read and written for `outputs`, less torch's sorts and the sum of the blocks' costs; `weighted` has "x" and
    "y" where those have weights: then it is a little more than that, as levels may meet and a search may end early."""
    grads = {"x": "grad_x" in outputs, "y": "grad_y" in outputs}
    if n == m and not weighted and n <= LONGEST:
        return 4 * rows * (n * (2 + sum(grads.values())) + 1)
    moved = 4 * rows * triton.cdiv(max(n, m), merge_tile(max(n, m)).block_n)
    programs = moved // 4
    met = n + m - (1 if weighted else math.gcd(n, m))
    for side, other, samples, others in (("x", "y", n, m), ("y", "x", m, n)):
        moved += rows * samples * (4 + 4 + 8) if samples <= LONGEST else 0
        if side in weighted:  # the weights and their sums; and the last of those
            moved += rows * samples * (4 + 8) + programs * 8 * (1 + grads["y"])
            moved += rows * samples * 8 if samples > LONGEST else 0
        if side == "x" or grads[side]:
            moved += rows * (samples * (4 + 12 * grads[side]) + met * 4)
            # Where a sample's share starts and ends; those of the samples that it looks through and meets.
            moved += rows * (2 * samples - 1) * 8 if side in weighted else 0
            moved += rows * (samples * others.bit_length() + met) * 8 if other in weighted else 0
    return moved


@triton.jit
def sorted_rows(
    x_ptr,  # (rows, n)
    row,  # (BLOCK_M, 1) int64
    exists,  # (BLOCK_M, 1)
    n,
    BLOCK_N: tl.constexpr,
):
    # Keys that order as the values do, equal ones by their places: an integer image of the float over the place.
    place = tl.arange(0, BLOCK_N)[None, :]
    inside = exists & (place < n)
    x = tl.load(x_ptr + (row * n + place), mask=inside, other=0.0)
    # -0 + 0 is 0.
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    image = tl.where(inside, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    return tl.sort((image.to(tl.int64) << 32) | place)


@triton.jit
def value_of(
    key,  # (BLOCK_M, BLOCK_N) int64
):
    image = (key >> 32).to(tl.int32)
    return (image ^ ((image >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def power(
    difference,  # (BLOCK_M, BLOCK_N)
    p,
    ORDER: tl.constexpr,
):
    # |difference|^p and its derivative, 0 where it is 0. ORDER is p where that is 1 or 2.
    if ORDER == 2:
        cost = difference * difference
        slope = 2.0 * difference
    else:
        size = tl.abs(difference)
        sign = tl.where(difference > 0.0, 1.0, tl.where(difference < 0.0, -1.0, difference))
        if ORDER == 1:
            cost = size
            slope = sign
        else:
            # In float32 the exponent would have no digits left where the power is far from 1.
            lower = tl.exp2((p - 1.0) * tl.log2(size.to(tl.float64))).to(tl.float32)
            cost = lower * size
            slope = p * lower * sign
    return cost, slope


# Integers are not specialised on their values: VECTOR says all that the generated code needs to know.
@triton.jit(do_not_specialize=["rows", "n"])
def equal_ranks_kernel(
    x_ptr,  # (rows, n)
    y_ptr,  # (rows, n)
    loss_ptr,  # (rows,)
    grad_x_ptr,  # (rows, n) or None
    grad_y_ptr,  # (rows, n) or None
    rows,
    n,
    p,
    ORDER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    VECTOR: tl.constexpr,
):
    # The compiler cannot see that rows start and end on 16 bytes unless the multiplication is in sight.
    n = (n // VECTOR) * VECTOR
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < rows
    x = sorted_rows(x_ptr, row[:, None], exists[:, None], n, BLOCK_N)
    y = sorted_rows(y_ptr, row[:, None], exists[:, None], n, BLOCK_N)
    inside = exists[:, None] & (tl.arange(0, BLOCK_N)[None, :] < n)
    cost, slope = power(tl.where(inside, value_of(x) - value_of(y), 0.0), p, ORDER)
    tl.store(loss_ptr + row, tl.sum(cost, 1) / n, mask=exists)
    grad = slope / n
    start = row[:, None] * n
    if grad_x_ptr is not None:
        tl.store(grad_x_ptr + (start + (x & 0xFFFFFFFF)), grad, mask=inside)
    if grad_y_ptr is not None:
        tl.store(grad_y_ptr + (start + (y & 0xFFFFFFFF)), -grad, mask=inside)


@triton.jit(do_not_specialize=["projections", "rows", "n"])
def sort_kernel(
    x_ptr,  # (rows, n)
    weights_ptr,  # (problems, n) or None
    sorted_ptr,  # (rows, n)
    order_ptr,  # (rows, n) int64
    sums_ptr,  # (rows, n) float64, or None: as in sum_weights_kernel
    projections,
    rows,
    n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    VECTOR: tl.constexpr,
):
    n = (n // VECTOR) * VECTOR
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    key = sorted_rows(x_ptr, row, row < rows, n, BLOCK_N)
    i = tl.arange(0, BLOCK_N)[None, :]
    inside = (row < rows) & (i < n)
    place = key & 0xFFFFFFFF
    tl.store(sorted_ptr + (row * n + i), value_of(key), mask=inside)
    tl.store(order_ptr + (row * n + i), place, mask=inside)
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + (row // projections * n + place), mask=inside, other=0.0)
        tl.store(sums_ptr + (row * n + i), tl.cumsum(weight.to(tl.float64), 1), mask=inside)


@triton.jit(do_not_specialize=["projections", "rows", "n"])
def sum_weights_kernel(
    weights_ptr,  # (problems, n)
    order_ptr,  # (rows, n) int64
    sums_ptr,  # (rows, n) float64
    projections,
    rows,
    n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    VECTOR: tl.constexpr,
):
    # The weight of the sorted samples up to each, that one included.
    n = (n // VECTOR) * VECTOR
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    before = tl.zeros((BLOCK_M, 1), tl.float64)
    for begin in range(0, n, BLOCK_N):
        i = begin + tl.arange(0, BLOCK_N)[None, :]
        inside = (row < rows) & (i < n)
        place = tl.load(order_ptr + (row * n + i), mask=inside, other=0)
        weight = tl.load(weights_ptr + (row // projections * n + place), mask=inside, other=0.0)
        sums = before + tl.cumsum(weight.to(tl.float64), 1)
        tl.store(sums_ptr + (row * n + i), sums, mask=inside)
        before = tl.max(sums, 1)[:, None]


@triton.jit
def total_weight(
    sums_ptr,  # (rows, n) float64, or None
    row,  # (BLOCK_M, 1)
    exists,  # (BLOCK_M, 1)
    n,
):
    total = tl.zeros_like(row).to(tl.float64) + n
    if sums_ptr is not None:
        total = tl.load(sums_ptr + (row * n + (n - 1)), mask=exists, other=1.0)
    return tl.where(total > 0.0, total, 1.0)


@triton.jit
def level(
    sums_ptr,  # (rows, n) float64, or None: equal weights
    start,  # (BLOCK_M, 1)
    total,  # (BLOCK_M, 1)
    i,  # (BLOCK_M, BLOCK_N)
    wanted,  # (BLOCK_M, BLOCK_N)
):
    # The share of the mass up to the i-th sorted sample, 0 before the first.
    weight = (i + 1).to(tl.float64)
    if sums_ptr is not None:
        weight = tl.load(sums_ptr + (start + i), mask=wanted & (i >= 0), other=0.0)
    return tl.minimum(weight / total, 1.0)


@triton.jit
def meet(
    x_ptr,  # (rows, n) sorted
    x_order_ptr,  # (rows, n) int64
    x_sums_ptr,  # (rows, n) float64, or None
    y_ptr,  # (rows, m) sorted
    y_sums_ptr,  # (rows, m) float64, or None
    grad_x_ptr,  # (rows, n) or None
    row,  # (BLOCK_M, 1)
    exists,  # (BLOCK_M, 1)
    i,  # (1, BLOCK_N)
    n,
    m,
    search,
    p,
    ORDER: tl.constexpr,
    VECTOR: tl.constexpr,
):
    # Writes the gradients of samples of x; returns what they add to the costs, (BLOCK_M, BLOCK_N).
    n = (n // VECTOR) * VECTOR
    inside = exists & (i < n)
    y_start = row * m
    x_total = total_weight(x_sums_ptr, row, exists, n)
    y_total = total_weight(y_sums_ptr, row, exists, m)
    x = tl.load(x_ptr + (row * n + i), mask=inside, other=0.0)
    low = level(x_sums_ptr, row * n, x_total, i - 1, inside)
    high = level(x_sums_ptr, row * n, x_total, i, inside)
    # The first sample of y with a level above `low`; one too early does no harm, it has no mass.
    if y_sums_ptr is None:
        j = (low * m).to(tl.int32)
    else:
        j = tl.zeros_like(x).to(tl.int32)
        end = j + m
        for _ in range(search):
            looks = inside & (j < end)
            middle = (j + end) // 2
            above = level(y_sums_ptr, y_start, y_total, middle, looks) > low
            end = tl.where(looks & above, middle, end)
            j = tl.where(looks & (above == 0), middle + 1, j)
    cost = tl.zeros_like(x)
    slope = tl.zeros_like(x)
    walks = inside & (low < high) & (j < m)
    while tl.max(tl.max(walks.to(tl.int32), 1), 0) > 0:
        y = tl.load(y_ptr + (y_start + j), mask=walks, other=0.0)
        y_level = level(y_sums_ptr, y_start, y_total, j, walks)
        top = tl.minimum(y_level, high)
        mass = (top - low).to(tl.float32)
        meets = walks & (mass > 0.0)
        each, each_slope = power(x - y, p, ORDER)
        cost += tl.where(meets, mass * each, 0.0)
        slope += tl.where(meets, mass * each_slope, 0.0)
        low = tl.where(walks, tl.maximum(low, top), low)
        j += (walks & (y_level <= high)).to(tl.int32)
        walks = walks & (low < high) & (j < m)
    if grad_x_ptr is not None:
        place = tl.load(x_order_ptr + (row * n + i), mask=inside, other=0)
        tl.store(grad_x_ptr + (row * n + place), slope, mask=inside)
    return cost


@triton.jit(do_not_specialize=["rows", "n", "m", "x_search", "y_search"])
def merge_kernel(
    x_ptr,  # (rows, n) sorted
    y_ptr,  # (rows, m) sorted
    x_order_ptr,  # (rows, n) int64
    y_order_ptr,  # (rows, m) int64
    x_sums_ptr,  # (rows, n) float64, or None: equal weights
    y_sums_ptr,  # (rows, m) float64, or None: equal weights
    loss_ptr,  # (rows, blocks of samples)
    grad_x_ptr,  # (rows, n) or None
    grad_y_ptr,  # (rows, m) or None
    rows,
    n,
    m,
    x_search,
    y_search,
    p,
    ORDER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < rows
    i = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    cost = meet(
        x_ptr,
        x_order_ptr,
        x_sums_ptr,
        y_ptr,
        y_sums_ptr,
        grad_x_ptr,
        row[:, None],
        exists[:, None],
        i[None, :],
        n,
        m,
        y_search,
        p,
        ORDER,
        VECTOR,
    )
    tl.store(loss_ptr + (row * tl.num_programs(1) + tl.program_id(1)), tl.sum(cost, 1), mask=exists)
    if grad_y_ptr is not None:
        meet(
            y_ptr,
            y_order_ptr,
            y_sums_ptr,
            x_ptr,
            x_sums_ptr,
            grad_y_ptr,
            row[:, None],
            exists[:, None],
            i[None, :],
            m,
            n,
            x_search,
            p,
            ORDER,
            VECTOR,
        )


def sort(
    x: torch.Tensor,  # (B, L, n) float32, contiguous
    weights: torch.Tensor | None,  # (B, n) float32, contiguous
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The sorted rows, the places of their samples, and how much weight lies up to each (float64)."""
    problems, projections, n = x.shape
    rows = problems * projections
    sums = None if weights is None else torch.empty_like(x, dtype=torch.float64)
    block_m, block_n, num_warps = tile(n if n <= LONGEST else 1024)
    programs = (triton.cdiv(rows, block_m),)
    options = {"BLOCK_M": block_m, "BLOCK_N": block_n, "VECTOR": math.gcd(16, n), "num_warps": num_warps}
    if n <= LONGEST:
        ordered, order = torch.empty_like(x), torch.empty_like(x, dtype=torch.int64)
        sort_kernel[programs](x, weights, ordered, order, sums, projections, rows, n, **options)
    else:
        ordered, order = x.sort(dim=-1, stable=True)
        if weights is not None:
            sum_weights_kernel[programs](weights, order, sums, projections, rows, n, **options)
    return ordered, order, sums


def sliced_wasserstein(
    x: torch.Tensor,  # (B, L, n) float32, contiguous
    y: torch.Tensor,  # (B, L, m) float32, contiguous
    x_weights: torch.Tensor | None,  # (B, n) float32, contiguous
    y_weights: torch.Tensor | None,  # (B, m) float32, contiguous
    p: float,
    loss: torch.Tensor,  # (B, L) float32
    grad_x: torch.Tensor | None,  # (B, L, n) contiguous
    grad_y: torch.Tensor | None,  # (B, L, m) contiguous
) -> None:
    """Fill the outputs that are not None."""
    problems, projections, n = x.shape
    m, rows = y.shape[2], problems * projections
    order = int(p) if p in (1, 2) else 0
    with torch.cuda.device_of(x):
        if n == m and x_weights is None and y_weights is None and n <= LONGEST:
            block_m, block_n, num_warps = tile(n)
            equal_ranks_kernel[(triton.cdiv(rows, block_m),)](
                x,
                y,
                loss,
                grad_x,
                grad_y,
                rows,
                n,
                p,
                ORDER=order,
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                VECTOR=math.gcd(16, n),
                num_warps=num_warps,
            )
            return
        block_m, block_n, num_warps = merge_tile(max(n, m))
        programs = triton.cdiv(rows, block_m)
        (x, x_order, x_sums), (y, y_order, y_sums) = sort(x, x_weights), sort(y, y_weights)
        blocks = triton.cdiv(max(n, m), block_n)
        shares = loss.new_empty(*loss.shape, blocks)
        merge_kernel[(programs, blocks)](
            x,
            y,
            x_order,
            y_order,
            x_sums,
            y_sums,
            shares,
            grad_x,
            grad_y,
            rows,
            n,
            m,
            n.bit_length(),
            m.bit_length(),
            p,
            ORDER=order,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            VECTOR=math.gcd(16, n, m),
            num_warps=num_warps,
        )
    torch.sum(shares, 2, out=loss)
