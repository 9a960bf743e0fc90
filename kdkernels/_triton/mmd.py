"""Maximum mean discrepancies and energy distances, with their gradients, without the matrix of pairs; formulas in
kdkernels.ops.mmd.

Samples of both batches are copied in float32, in the order of their classes, less a common centre. A program has a
block of rows of one batch and goes over the samples of both: a tile of inner products, summed over the features in
steps, becomes squared distances, kernel values and coefficients, and these times the samples are added to the rows'
gradient: in registers where it is one block of features, else in memory that only this program touches. Rows without a
gradient meet the later half of their own batch, and count it twice.

|a|^2 + |b|^2 - 2 ab says little of a distance that is small beside |a| and |b|: such pairs are taken out of the tile,
and differenced.

2 d operations for each pair's distance, and as many for its coefficient times the sample; where a batch is so small
that its rows leave multiprocessors idle, parts of the features are programs of their own, and each forms the distances
again. No atomics: sums have one order. Memory beyond the gradients: x and y in float32, twice where a gradient is not
in registers.
"""

import math
from collections.abc import Collection
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kdkernels._triton.classes import classes_of
from kdkernels._triton.rows import LOG2E
from kdkernels._triton.samples import NEAR, load_rows, prepare_samples, samples_of_centres

# MmdKernel in csrc/kdkernels.h; the last is the mean distance's.
RBF = tl.constexpr(0)
LAPLACIAN = tl.constexpr(1)
POLYNOMIAL = tl.constexpr(2)
IMQ = tl.constexpr(3)
ENERGY = tl.constexpr(4)
DISTANCE = tl.constexpr(5)
LN2 = tl.constexpr(math.log(2))
LARGEST = tl.constexpr(3.4028234663852886e38)
# No pair is differenced where |a|^2 + |b|^2 is below so many squared bandwidths of a kernel that is smooth at 0:
# rounding moves its value by 8 eps at most there.
SMOOTH = tl.constexpr(16)
# Samples that a step over weights takes.
BLOCK_SHARES = 1024


class Tile(NamedTuple):
    """A program takes block_m rows, with `blocks` blocks of block_d features of their gradient, and walks along the
    samples by block_n, with inner products over block_k features a step."""

    block_m: int
    block_n: int
    block_k: int
    block_d: int
    blocks: int


def tile(problems: int, x_samples: int, y_samples: int, features: int) -> Tile:
    """The largest that sm_80, sm_90, sm_100 and gfx942 hold in registers (tests/test_triton_compile.py); features are
    parted until there are 128 programs."""
    block_m, block_d = 64 if problems * (x_samples + y_samples) >= 128 * 64 else 32, 64
    programs = problems * (triton.cdiv(x_samples, block_m) + triton.cdiv(y_samples, block_m))
    return Tile(
        block_m, 32, 16, block_d, triton.cdiv(triton.cdiv(features, block_d), triton.cdiv(128, programs))
    )


def bytes_moved(
    problems: int,
    x_samples: int,
    y_samples: int,
    features: int,
    itemsize: int,
    *,
    mean_distance: bool = False,
    grads: Collection[str] = ("grad_x", "grad_y"),
) -> int:
    """Bytes of samples, of their float32 copies and of their gradients that are loaded and stored, without labels and
    near pairs. Most loads are from cache. What there is one of for a sample is left out: up to 28 bytes, and 4 for each
    bandwidth, for each program, or step of a program, that takes the sample."""
    block_m, block_n, _, block_d, blocks = tile(problems, x_samples, y_samples, features)
    parts = triton.cdiv(features, block_d * blocks)
    both, depth = x_samples + y_samples, triton.cdiv(features, 16) * 16
    moved = (both + samples_of_centres(x_samples, y_samples)) * features * itemsize + both * depth * 4

    def pairs(grads: Collection[str]) -> int:
        rows, gradients = 0, 0
        for name, n, m in (("grad_x", x_samples, y_samples), ("grad_y", y_samples, x_samples)):
            across = triton.cdiv(m, block_n)
            if name in grads:
                programs, steps = triton.cdiv(n, block_m), triton.cdiv(n, block_n) + across
                rows += parts * (n * steps + programs * both)
                # What the coefficients are multiplied by, and the rows again.
                rows += programs * both + n
                rows += 2 * n * (steps + 1) if blocks > 1 else 0
                gradients += n * features * itemsize
                continue
            for first in range(0, n, block_m):
                taken, later = min(block_m, n - first), n - first
                rows += taken * triton.cdiv(later, block_n) + later
                rows += taken * across + m if name == "grad_x" else 0
        return rows * depth * 4 + gradients

    return problems * (moved + pairs(grads) + (pairs(()) if mean_distance else 0))


@triton.jit
def _run(
    starts_ptr,  # (problems, runs + 1) int64 or None
    problem,
    x_samples,
    y_samples,
    runs,
):
    # Where the samples of this program's class start, and end in x and in y.
    begin = 0
    x_end = x_samples
    y_end = y_samples
    if starts_ptr is not None:
        starts = starts_ptr + problem * (runs + 1) + tl.program_id(0) % runs
        begin = tl.load(starts).to(tl.int32)
        x_end = tl.load(starts + 1).to(tl.int32)
        y_end = x_end
    return begin, x_end, y_end


@triton.jit
def _weights(
    weights_ptr,  # (samples,) float32 or None
    order_ptr,  # (samples,) int64 or None
    i,  # (BLOCK,)
    exists,  # (BLOCK,)
):
    weight = exists.to(tl.float32)
    if weights_ptr is not None:
        row = i.to(tl.int64)
        if order_ptr is not None:
            row = tl.load(order_ptr + i, mask=exists, other=0)
        weight = tl.load(weights_ptr + row, mask=exists, other=0.0)
    return weight


@triton.jit
def _total(
    weights_ptr,  # (samples,) float32 or None
    order_ptr,  # (samples,) int64 or None
    begin,
    end,
    BLOCK: tl.constexpr,
):
    # The weight of the samples, and how many have weight.
    total = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        weight = _weights(weights_ptr, order_ptr, i, i < end)
        total += weight
        count += (weight > 0.0).to(tl.int32)
    return tl.sum(total, 0), tl.sum(count, 0)


@triton.jit
def _write_shares(
    weights_ptr,  # (samples,) float32 or None
    order_ptr,  # (samples,) int64 or None
    shares_ptr,  # (samples,) float32
    own_ptr,  # (samples,) float32 or None
    begin,
    end,
    total,
    counts,
    BLOCK: tl.constexpr,
):
    total = tl.where(total > 0.0, total, 1.0)
    left = tl.zeros((BLOCK,), tl.float32)
    if own_ptr is not None:
        # 1 - sum u^2
        for start in range(begin, end, BLOCK):
            i = start + tl.arange(0, BLOCK)
            share = _weights(weights_ptr, order_ptr, i, i < end) / total
            left += share * (1.0 - share)
    within = 1.0 / tl.where(counts, tl.sum(left, 0), 1.0)
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        exists = i < end
        share = tl.where(counts, _weights(weights_ptr, order_ptr, i, exists) / total, 0.0)
        tl.store(shares_ptr + i, share, mask=exists)
        if own_ptr is not None:
            tl.store(own_ptr + i, share * within, mask=exists)


@triton.jit(do_not_specialize=["problems", "x_samples", "y_samples", "runs"])
def mmd_shares_kernel(
    x_weights_ptr,  # (problems, x_samples) float32 or None
    y_weights_ptr,  # (problems, y_samples) float32 or None
    order_ptr,  # (problems, x_samples) int64 or None
    starts_ptr,  # (problems, runs + 1) int64, where in that order the classes start; or None
    differs_ptr,  # (problems, x_samples) bool
    shares_ptr,  # (problems, x_samples + y_samples) float32
    own_ptr,  # (problems, x_samples + y_samples) float32 or None: the shares, over 1 - sum u^2
    bounds_ptr,  # (2, problems, x_samples) int64 or None: where the sample's class starts and ends
    problems,
    x_samples,
    y_samples,
    runs,
    BLOCK: tl.constexpr,
):
    problem = (tl.program_id(0) // runs).to(tl.int64)
    to = problem * (x_samples + y_samples)
    begin, x_end, y_end = _run(starts_ptr, problem, x_samples, y_samples, runs)
    if begin == x_end:
        return
    if order_ptr is not None:
        order_ptr += problem * x_samples
    if x_weights_ptr is not None:
        x_weights_ptr += problem * x_samples
    if y_weights_ptr is not None:
        y_weights_ptr += problem * y_samples
    x_total, x_count = _total(x_weights_ptr, order_ptr, begin, x_end, BLOCK)
    y_total, y_count = _total(y_weights_ptr, order_ptr, begin, y_end, BLOCK)
    if own_ptr is not None:
        counts = (x_count > 1) & (y_count > 1)
    else:
        # What is equal has distance 0, and not what rounding leaves.
        apart = (x_end != y_end).to(tl.int32)
        for start in range(begin, tl.minimum(x_end, y_end), BLOCK):
            i = start + tl.arange(0, BLOCK)
            exists = (i < x_end) & (i < y_end)
            u = _weights(x_weights_ptr, order_ptr, i, exists) / x_total
            v = _weights(y_weights_ptr, order_ptr, i, exists) / y_total
            differs = tl.load(differs_ptr + problem * x_samples + i, mask=exists, other=0)
            apart = tl.maximum(apart, tl.max((exists & ((u != v) | (differs != 0))).to(tl.int32), 0))
        counts = (x_count > 0) & (y_count > 0) & (apart != 0)
    shares_ptr += to
    if own_ptr is not None:
        own_ptr += to
    _write_shares(x_weights_ptr, order_ptr, shares_ptr, own_ptr, begin, x_end, x_total, counts, BLOCK)
    shares_ptr += x_samples
    if own_ptr is not None:
        own_ptr += x_samples
    _write_shares(y_weights_ptr, order_ptr, shares_ptr, own_ptr, begin, y_end, y_total, counts, BLOCK)
    if bounds_ptr is not None:
        here = bounds_ptr + problem * x_samples
        for start in range(begin, x_end, BLOCK):
            i = start + tl.arange(0, BLOCK)
            tl.store(here + i, tl.zeros_like(i) + begin, mask=i < x_end)
            tl.store(here + problems.to(tl.int64) * x_samples + i, tl.zeros_like(i) + x_end, mask=i < x_end)


@triton.jit(do_not_specialize=["x_samples", "y_samples", "runs"])
def mmd_bandwidth_kernel(
    rows_ptr,  # (problems, x_samples + y_samples) float32: of distances
    starts_ptr,  # (problems, runs + 1) int64 or None
    bandwidths_ptr,  # (problems, x_samples + y_samples) float32
    x_samples,
    y_samples,
    runs,
    BLOCK: tl.constexpr,
):
    # The mean distance of a class, for each of its samples.
    problem = (tl.program_id(0) // runs).to(tl.int64)
    begin, x_end, y_end = _run(starts_ptr, problem, x_samples, y_samples, runs)
    if begin == x_end:
        return
    rows_ptr += problem * (x_samples + y_samples)
    bandwidths_ptr += problem * (x_samples + y_samples)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, x_end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(rows_ptr + i, mask=i < x_end, other=0.0)
    for start in range(begin, y_end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(rows_ptr + x_samples + i, mask=i < y_end, other=0.0)
    mean = tl.sum(total, 0) / 3.0
    mean = tl.where(mean > 0.0, mean, 1.0)
    for start in range(begin, x_end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        tl.store(bandwidths_ptr + i, tl.zeros((BLOCK,), tl.float32) + mean, mask=i < x_end)
    for start in range(begin, y_end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        tl.store(bandwidths_ptr + x_samples + i, tl.zeros((BLOCK,), tl.float32) + mean, mask=i < y_end)


@triton.jit
def _evaluate(
    x,  # (BLOCK_M, BLOCK): squared distances, or inner products
    bandwidth_ptr,  # (BLOCK_M, 1)
    exists,  # (BLOCK_M, 1)
    count,
    KERNEL: tl.constexpr,
):
    # Kernel values, and their derivatives by x.
    value = tl.zeros_like(x)
    slope = tl.zeros_like(x)
    if KERNEL == LAPLACIAN or KERNEL == ENERGY or KERNEL == DISTANCE:
        root = tl.sqrt_rn(x)
        half = tl.where(root > 0.0, 0.5 / tl.where(root > 0.0, root, 1.0), 0.0)
    if KERNEL == ENERGY:
        value = -root
        slope = -half
    elif KERNEL == DISTANCE:
        value = root
    else:
        for each in range(count):
            bandwidth = tl.load(bandwidth_ptr + each, mask=exists, other=1.0)
            inverse = 1.0 / bandwidth
            if KERNEL == RBF:
                rate = tl.minimum(inverse * inverse * (0.5 * LOG2E), LARGEST)
                power = tl.exp2(-rate * x)
                value += power
                slope -= (rate * LN2) * power
            elif KERNEL == LAPLACIAN:
                power = tl.exp2(-(inverse * LOG2E) * root)
                value += power
                slope -= (inverse * half) * power
            elif KERNEL == POLYNOMIAL:
                rate = inverse * inverse
                base = x * rate + 1.0
                square = base * base
                value += square * base
                slope += (3.0 * rate) * square
            else:
                rate = tl.minimum(inverse * inverse, LARGEST)
                ratio = 1.0 / (1.0 + rate * x)
                root = tl.sqrt_rn(ratio)
                value += root
                slope -= 0.5 * rate * ratio * root
    return value, slope


@triton.jit
def _store_rows(
    to_ptr,  # (.., width)
    row,  # (BLOCK_M,)
    exists,  # (BLOCK_M,)
    column,  # (BLOCK_D,)
    width,
    values,  # (BLOCK_M, BLOCK_D)
):
    mask = exists[:, None] & (column < width)[None, :]
    tl.store(to_ptr + (row[:, None] * width + column[None, :]), values, mask=mask)


@triton.jit(
    do_not_specialize=[
        "problems",
        "x_samples",
        "y_samples",
        "features",
        "depth",
        "blocks",
        "count",
        "bandwidth_stride",
    ]
)
def mmd_pairs_kernel(
    z_ptr,  # (problems, x_samples + y_samples, depth) float32
    squares_ptr,  # (problems, x_samples + y_samples) float32
    shares_ptr,  # (problems, x_samples + y_samples) float32
    own_ptr,  # (problems, x_samples + y_samples) float32: the shares in pairs within a batch
    bounds_ptr,  # (2, problems, x_samples) int64 or None
    order_ptr,  # (problems, x_samples) int64 or None
    bandwidths_ptr,  # (count,), or 1 for each sample (problems, x_samples + y_samples), float32
    rows_ptr,  # (problems, x_samples + y_samples) float32: shares of the loss
    grad_x_ptr,  # (problems, x_samples, features) contiguous, or None
    grad_y_ptr,  # (problems, y_samples, features) contiguous, or None
    sums_ptr,  # (problems, x_samples + y_samples, depth) float32, or None: a program's gradient is one block
    problems,
    x_samples,
    y_samples,
    features,
    depth,
    blocks,
    count,
    bandwidth_stride,
    KERNEL: tl.constexpr,
    UNBIASED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VECTOR: tl.constexpr,
):
    GRAD_X: tl.constexpr = grad_x_ptr is not None
    GRAD_Y: tl.constexpr = grad_y_ptr is not None
    depth = (depth // 16) * 16
    features = (features // VECTOR) * VECTOR
    x_blocks = (x_samples + BLOCK_M - 1) // BLOCK_M
    row_blocks = x_blocks + (y_samples + BLOCK_M - 1) // BLOCK_M
    problem = (tl.program_id(0) // row_blocks).to(tl.int64)
    row_block = tl.program_id(0) % row_blocks
    of_y = row_block >= x_blocks
    needs = tl.where(of_y, GRAD_Y, GRAD_X)
    if tl.program_id(1) > 0 and not needs:
        return
    samples = tl.where(of_y, y_samples, x_samples)
    others = tl.where(of_y, x_samples, y_samples)
    own_first = problem * (x_samples + y_samples) + tl.where(of_y, x_samples, 0)
    other_first = problem * (x_samples + y_samples) + tl.where(of_y, 0, x_samples)
    first = (row_block - tl.where(of_y, x_blocks, 0)) * BLOCK_M
    i = first + tl.arange(0, BLOCK_M)
    exists = i < samples
    row = own_first + i
    begin = 0
    end = samples
    other_end = others
    if bounds_ptr is not None:
        # Classes one after the other: from where the first row's starts to where the last row's ends.
        starts_ptr = bounds_ptr + problem * x_samples
        ends_ptr = starts_ptr + problems.to(tl.int64) * x_samples
        class_begin = tl.load(starts_ptr + i, mask=exists, other=0).to(tl.int32)[:, None]
        class_end = tl.load(ends_ptr + i, mask=exists, other=0).to(tl.int32)[:, None]
        begin = tl.load(starts_ptr + first).to(tl.int32)
        end = tl.load(ends_ptr + tl.minimum(first + BLOCK_M, samples) - 1).to(tl.int32)
        other_end = end
    own_begin = tl.where(needs, begin, first)
    own_steps = (end - own_begin + BLOCK_N - 1) // BLOCK_N
    # Pairs across are summed by x, but visited by all rows that have a gradient.
    other_steps = tl.where(of_y & (needs == 0), 0, (other_end - begin + BLOCK_N - 1) // BLOCK_N)
    share_i = tl.load(shares_ptr + row, mask=exists, other=0.0)
    own_i = tl.load(own_ptr + row, mask=exists, other=0.0)
    exists_2d = exists[:, None]
    bandwidth_ptr = bandwidths_ptr + (row * bandwidth_stride)[:, None]
    if KERNEL != POLYNOMIAL:
        squares_i = tl.load(squares_ptr + row, mask=exists, other=0.0)[:, None]
        smooth = tl.zeros((BLOCK_M, 1), tl.float32)
        if KERNEL == RBF or KERNEL == IMQ:
            least = tl.load(bandwidth_ptr, mask=exists_2d, other=1.0)
            for each in range(1, count):
                least = tl.minimum(least, tl.load(bandwidth_ptr + each, mask=exists_2d, other=1.0))
            smooth = least * least * SMOOTH
    if sums_ptr is None:
        blocks = 1
    part = blocks * BLOCK_D
    block_n = tl.arange(0, BLOCK_N)
    block_k = tl.arange(0, BLOCK_K)
    block_d = tl.arange(0, BLOCK_D)
    feature = tl.program_id(1) * part + block_d
    # Rows without a gradient have none of its blocks.
    part = tl.where(needs, part, 0)

    total = tl.zeros((BLOCK_M,), tl.float32)
    slopes = tl.zeros((BLOCK_M,), tl.float32)
    grad = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if sums_ptr is not None:
        for f in range(0, part, BLOCK_D):
            _store_rows(sums_ptr, row, exists, feature + f, depth, grad)
    for step in range(0, own_steps + other_steps):
        across = step >= own_steps
        start = tl.where(across, begin + (step - own_steps) * BLOCK_N, own_begin + step * BLOCK_N)
        j = start + block_n
        there = j < tl.where(across, other_end, end)
        column = tl.where(across, other_first, own_first) + j
        products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, depth, BLOCK_K):
            a = load_rows(z_ptr, row, exists, k + block_k, depth)
            b = load_rows(z_ptr, column, there, k + block_k, depth)
            products = tl.dot(a, tl.trans(b), products, input_precision="ieee")

        same = (i[:, None] == j[None, :]) & (across == 0)
        live = exists_2d & there[None, :]
        if bounds_ptr is not None:
            live = live & (j[None, :] >= class_begin) & (j[None, :] < class_end)
        weight = tl.where(live, tl.load(shares_ptr + column, mask=there, other=0.0)[None, :], 0.0)
        if UNBIASED:
            weight = tl.where(same, 0.0, weight)
        if not (GRAD_X and GRAD_Y):
            # The later half of the pairs within, where there is no gradient.
            later = tl.where(j[None, :] > i[:, None], 2.0, same.to(tl.float32))
            weight *= tl.where(across | (needs != 0), 1.0, later)
        if KERNEL == DISTANCE:
            of_value = share_i
        else:
            of_value = tl.where(across, tl.where(of_y, 0.0, -2.0) * share_i, own_i)
        of_slope = tl.where(across, -share_i, own_i)

        if KERNEL == POLYNOMIAL:
            x = products
        else:
            both = squares_i + tl.load(squares_ptr + column, mask=there, other=0.0)[None, :]
            x = both - 2.0 * products
            x = tl.where(same | (x < 0.0), 0.0, x)
            near = (weight > 0.0) & (same == 0) & (x < (both - smooth) * NEAR)
            hits = tl.where(tl.max(near.to(tl.int32), 0) != 0, block_n, BLOCK_N)
            q = tl.min(hits, 0)
            while q < BLOCK_N:
                share = tl.sum(tl.where(near & (block_n == q)[None, :], weight, 0.0), 1)
                other_ptr = z_ptr + (tl.where(across, other_first, own_first) + start + q) * depth
                squared = tl.zeros((BLOCK_M,), tl.float32)
                for k in range(0, depth, BLOCK_K):
                    b = tl.load(other_ptr + k + block_k, mask=k + block_k < depth, other=0.0)
                    away = load_rows(z_ptr, row, exists, k + block_k, depth) - b[None, :]
                    squared += tl.sum(away * away, 1)
                value, slope = _evaluate(squared[:, None], bandwidth_ptr, exists_2d, count, KERNEL)
                total += of_value * share * tl.sum(value, 1)
                if GRAD_X or GRAD_Y:
                    c = (of_slope * share)[:, None] * slope
                    for f in range(0, part, BLOCK_D):
                        b = tl.load(other_ptr + feature + f, mask=feature + f < depth, other=0.0)
                        away = load_rows(z_ptr, row, exists, feature + f, depth) - b[None, :]
                        if sums_ptr is not None:
                            # Other threads may have stored these sums.
                            tl.debug_barrier()
                            grad = load_rows(sums_ptr, row, exists, feature + f, depth)
                        # The gradient is the slopes' sum times z, less `grad`.
                        grad -= c * away
                        if sums_ptr is not None:
                            _store_rows(sums_ptr, row, exists, feature + f, depth, grad)
                q = tl.min(tl.where(hits > q, hits, BLOCK_N), 0)
            weight = tl.where(near, 0.0, weight)
        value, slope = _evaluate(x, bandwidth_ptr, exists_2d, count, KERNEL)
        total += of_value * tl.sum(tl.where(weight > 0.0, weight * value, 0.0), 1)
        if GRAD_X or GRAD_Y:
            if KERNEL != POLYNOMIAL:
                weight = tl.where(same, 0.0, weight)
            c = of_slope[:, None] * tl.where(weight > 0.0, weight * slope, 0.0)
            slopes += tl.sum(c, 1)
            for f in range(0, part, BLOCK_D):
                b = load_rows(z_ptr, column, there, feature + f, depth)
                if sums_ptr is not None:
                    tl.debug_barrier()
                    grad = load_rows(sums_ptr, row, exists, feature + f, depth)
                grad = tl.dot(c, b, grad, input_precision="ieee")
                if sums_ptr is not None:
                    _store_rows(sums_ptr, row, exists, feature + f, depth, grad)

    tl.store(rows_ptr + row, total, mask=exists & (tl.program_id(1) == 0))
    if GRAD_X or GRAD_Y:
        to = i.to(tl.int64)
        if order_ptr is not None:
            to = tl.load(order_ptr + problem * x_samples + i, mask=exists, other=0)
        to += problem * samples
        for f in range(0, part, BLOCK_D):
            column = feature + f
            if sums_ptr is not None:
                tl.debug_barrier()
                grad = load_rows(sums_ptr, row, exists, column, depth)
            if KERNEL == POLYNOMIAL:
                of_rows = 2.0 * grad
            else:
                z = load_rows(z_ptr, row, exists, column, depth)
                of_rows = 4.0 * (slopes[:, None] * z - grad)
            if GRAD_X:
                _store_rows(grad_x_ptr, to, exists & (of_y == 0), column, features, of_rows)
            if GRAD_Y:
                _store_rows(grad_y_ptr, to, exists & of_y, column, features, of_rows)


def mmd(
    x: torch.Tensor,  # (B, n, d), features side by side
    y: torch.Tensor,  # (B, m, d), features side by side
    labels: torch.Tensor | None,  # (B, n) int64, contiguous
    x_weights: torch.Tensor | None,  # (B, n) float32, contiguous
    y_weights: torch.Tensor | None,  # (B, m) float32, contiguous
    bandwidths: torch.Tensor | None,  # (K,) float32, contiguous
    kernel: int,
    unbiased: bool,
    loss: torch.Tensor,  # (B,) float32
    grad_x: torch.Tensor | None,  # (B, n, d) contiguous
    grad_y: torch.Tensor | None,  # (B, m, d) contiguous
) -> None:
    """Fill the outputs that are not None."""
    problems, n, features = x.shape
    m = y.shape[1]
    block_m, block_n, block_k, block_d, blocks = tile(problems, n, m, features)
    parts = triton.cdiv(features, block_d * blocks)
    polynomial = kernel == POLYNOMIAL.value
    with torch.cuda.device_of(x):
        order = starts = bounds = None
        runs = 1
        if labels is not None:
            order, starts = classes_of(labels)
            runs = n
            bounds = order.new_empty(2, problems, n)
        z, squares, differs = prepare_samples(x, y, order, centred=not polynomial)
        shares, rows = (torch.empty_like(squares) for _ in range(2))
        own = torch.empty_like(shares) if unbiased else None
        mmd_shares_kernel[(problems * runs,)](
            x_weights,
            y_weights,
            order,
            starts,
            differs,
            shares,
            own,
            bounds,
            problems,
            n,
            m,
            runs,
            BLOCK=BLOCK_SHARES,
            num_warps=4,
        )

        def pairs(
            kernel: int,
            own: torch.Tensor,  # (B, n + m)
            bandwidths: torch.Tensor,  # (K,) or (B, n + m)
            *grads: torch.Tensor | None,
        ) -> None:
            needs = [grad is not None for grad in grads]
            row_blocks = triton.cdiv(n, block_m) + triton.cdiv(m, block_m)
            mmd_pairs_kernel[(problems * row_blocks, parts if any(needs) else 1)](
                z,
                squares,
                shares,
                own,
                bounds,
                order,
                bandwidths,
                rows,
                *grads,
                torch.empty_like(z) if any(needs) and blocks > 1 else None,
                problems,
                n,
                m,
                features,
                z.shape[-1],
                blocks,
                1 if bandwidths.dim() == 2 else len(bandwidths),
                int(bandwidths.dim() == 2),
                KERNEL=kernel,
                UNBIASED=unbiased and kernel != DISTANCE.value,
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                BLOCK_K=block_k,
                BLOCK_D=block_d,
                VECTOR=math.gcd(16, features),
                num_warps=8,
            )

        if bandwidths is None:
            if polynomial:
                bandwidths = loss.new_full((1,), math.sqrt(features))
            else:
                bandwidths = torch.empty_like(rows)
                if kernel != ENERGY.value:
                    pairs(DISTANCE.value, shares, bandwidths, None, None)
                    mmd_bandwidth_kernel[(problems * runs,)](
                        rows, starts, bandwidths, n, m, runs, BLOCK=BLOCK_SHARES, num_warps=4
                    )
        pairs(kernel, shares if own is None else own, bandwidths, grad_x, grad_y)
    torch.sum(rows, 1, out=loss)
    if not unbiased:  # rounding may leave a little less than nothing
        loss.clamp_(min=0)
