"""Distances of diagonal Gaussians, with their gradients; formulas in kdkernels.ops.gaussian.

Moments are Welford's, of lanes and then of all lanes together: 1 read of the samples, another 1 read and 1 write for
each side's gradient, from the caches where a block of columns stays there. Many samples of few columns are split:
their parts' moments go through memory. A class of labelled samples is a program's rows, gathered.
"""

import math
from collections.abc import Collection
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kdkernels._triton.classes import classes_of


class Tile(NamedTuple):
    """A program takes block_d columns of one of `splits` runs of samples and walks along it by block_n samples."""

    block_n: int
    block_d: int
    num_warps: int
    splits: int


def tile(problems: int, samples: int, features: int, labelled: bool) -> Tile:
    """8 or 16 elements a thread, 64 or more of them side by side; samples are split where programs are few."""
    block_d = min(128 if labelled else 64, triton.next_power_of_2(features))
    block_n = min((1024 if labelled else 4096) // block_d, triton.next_power_of_2(samples))
    splits = 1
    if not labelled:
        most = min(32, samples // 256, 512 // (problems * triton.cdiv(features, block_d)))
        splits = 1 << max(0, most.bit_length() - 1)
    return Tile(block_n, block_d, max(4, block_n * block_d // 512), splits)


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
    """Bytes read and written for `outputs` without labels, less the sum of the blocks' shares; `weighted` has "x" and
    "y" where those have weights."""
    _, block_d, _, splits = tile(problems, max(x_samples, y_samples), features, False)
    blocks = triton.cdiv(features, block_d)
    moved = 0
    for side, samples in (("x", x_samples), ("y", y_samples)):
        passes = 1 + (f"grad_{side}" in outputs)
        moved += samples * features * itemsize * (2 * passes - 1)
        moved += samples * blocks * 4 * passes if side in weighted else 0
        # The first sample, which others are measured from.
        moved += splits * features * itemsize
    if splits > 1:
        programs = splits if len(outputs) > 1 else 1
        # The parts' moments and weights of both sides, and the first samples again.
        moved += 2 * splits * (8 * features + 4)
        moved += programs * 2 * (splits * (8 * features + 4 * blocks) + features * itemsize)
    return problems * (moved + 4 * blocks)


@triton.jit
def load_samples(
    x_ptr,  # (samples, features)
    stride,
    order_ptr,  # (samples,) int64 or None
    i,  # (BLOCK_N,)
    exists,  # (BLOCK_N,)
    column,  # (BLOCK_D,)
    inside,  # (BLOCK_D,)
):
    row = i.to(tl.int64)
    if order_ptr is not None:
        row = tl.load(order_ptr + i, mask=exists, other=0)
    pointers = x_ptr + (row[:, None] * stride + column[None, :])
    return row, tl.load(pointers, mask=exists[:, None] & inside[None, :], other=0.0).to(tl.float32)


@triton.jit
def load_weights(
    weights_ptr,  # (samples,) float32 or None
    row,  # (BLOCK_N,)
    exists,  # (BLOCK_N,)
):
    weight = exists.to(tl.float32)
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + row, mask=exists, other=0.0)
    return weight


@triton.jit
def combine(
    weight,  # (K,)
    mean,  # (K, BLOCK_D)
    squares,  # (K, BLOCK_D)
):
    # The moments of K sets of samples as one.
    total = tl.sum(weight, 0)
    # From one of the means, so that what is constant has exactly no variance.
    pivot = tl.max(tl.where(weight[:, None] > 0.0, mean, float("-inf")), 0)
    pivot = tl.where(total > 0.0, pivot, 0.0)
    share = weight / tl.where(total > 0.0, total, 1.0)
    apart = tl.where(weight[:, None] > 0.0, mean - pivot[None, :], 0.0)
    shift = tl.sum(share[:, None] * apart, 0)
    away = apart - shift[None, :]
    return total, pivot + shift, tl.sum(squares + (weight[:, None] * away) * away, 0)


@triton.jit
def first_sample(
    x_ptr,  # (samples, features)
    stride,
    order_ptr,  # (samples,) int64 or None
    first,
    there,
    column,  # (BLOCK_D,)
    inside,  # (BLOCK_D,)
):
    row = first.to(tl.int64)
    if order_ptr is not None:
        row = tl.load(order_ptr + first, mask=there, other=0)
    return tl.load(x_ptr + (row * stride + column), mask=there & inside, other=0.0).to(tl.float32)


@triton.jit
def moments(
    x_ptr,  # (samples, features)
    stride,
    order_ptr,  # (samples,) int64 or None
    weights_ptr,  # (samples,) float32 or None
    begin,
    end,
    origin,  # (BLOCK_D,)
    column,  # (BLOCK_D,)
    inside,  # (BLOCK_D,)
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # The weight of the samples, how many have weight, their mean less the origin, and w (x - mean)^2 added up.
    weight = tl.zeros((BLOCK_N,), tl.float32)
    count = tl.zeros((BLOCK_N,), tl.int32)
    mean = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    squares = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        exists = i < end
        row, x = load_samples(x_ptr, stride, order_ptr, i, exists, column, inside)
        w = load_weights(weights_ptr, row, exists)
        weight += w
        count += (w > 0.0).to(tl.int32)
        ratio = w / tl.where(weight > 0.0, weight, 1.0)
        before = (x - origin[None, :]) - mean
        mean += ratio[:, None] * before
        squares += (w[:, None] * before) * ((x - origin[None, :]) - mean)
    total, shift, spread = combine(weight, mean, squares)
    return total, tl.sum(count, 0), shift, spread


@triton.jit
def write_gradient(
    grad_ptr,  # (samples, features)
    x_ptr,  # (samples, features)
    stride,
    order_ptr,  # (samples,) int64 or None
    weights_ptr,  # (samples,) float32 or None
    begin,
    end,
    features,
    counts,
    total,
    origin,  # (BLOCK_D,)
    mean,  # (BLOCK_D,)
    push,  # (BLOCK_D,)
    slope,  # (BLOCK_D,)
    column,  # (BLOCK_D,)
    inside,  # (BLOCK_D,)
    BLOCK_N: tl.constexpr,
):
    scale = 1.0 / tl.where(total > 0.0, total, 1.0)
    for start in range(begin, end, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        exists = i < end
        row, x = load_samples(x_ptr, stride, order_ptr, i, exists, column, inside)
        share = load_weights(weights_ptr, row, exists) * scale
        centred = (x - origin[None, :]) - mean[None, :]
        grad = share[:, None] * (push[None, :] + slope[None, :] * centred)
        pointers = grad_ptr + (row[:, None] * features + column[None, :])
        tl.store(pointers, tl.where(counts, grad, 0.0), mask=exists[:, None] & inside[None, :])


@triton.jit
def ratio_less_log(
    a,  # (BLOCK_D,)
    b,  # (BLOCK_D,)
    more,  # (BLOCK_D,)
):
    # t - log(1 + t) with 1 + t = a / b and more = a - b. With z = t / (2 + t), log(1 + t) = 2 atanh(z) and
    # t - 2 z = t z, so nothing of first order cancels; the series to z^15 is good to 5e-9 for -0.5 <= t <= 1.
    t = more / b
    near = (t >= -0.5) & (t <= 1.0)
    z = tl.where(near, more / (a + b), 0.0)
    w = z * z
    series = 1.0 / 13.0 + w * (1.0 / 15.0)
    series = 1.0 / 9.0 + w * (1.0 / 11.0 + w * series)
    series = 1.0 / 3.0 + w * (1.0 / 5.0 + w * (1.0 / 7.0 + w * series))
    # The logarithm of the ratio that is above 1: the other may round to 0.
    rises = more >= 0.0
    log = tl.log(tl.where(near, 1.0, tl.where(rises, a / b, b / a)))
    far = tl.where(rises, t - log, t + log)
    return tl.where(near, z * (t - 2.0 * w * series), far)


@triton.jit(do_not_specialize=["problem_stride", "stride", "samples", "features"])
def gaussian_moments_kernel(
    x_ptr,  # (problems, samples, features)
    weights_ptr,  # (problems, samples) float32 or None
    part_weights_ptr,  # (problems, SPLITS) float32
    parts_ptr,  # (problems, SPLITS, 2, features) float32: the means less the first sample, the sums of squares
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
    if weights_ptr is not None:
        weights_ptr += problem * samples
    origin = tl.load(x_ptr + column, mask=inside, other=0.0).to(tl.float32)
    weight, _, mean, squares = moments(
        x_ptr, stride, None, weights_ptr, begin, end, origin, column, inside, BLOCK_N, BLOCK_D
    )
    tl.store(part_weights_ptr + part, weight, mask=tl.program_id(1) == 0)
    here = parts_ptr + (part * 2 * features + column)
    tl.store(here, mean, mask=inside)
    tl.store(here + features, squares, mask=inside)


@triton.jit
def moments_of_parts(
    part_weights_ptr,  # (SPLITS,) float32
    parts_ptr,  # (SPLITS, 2, features) float32
    features,
    column,  # (BLOCK_D,)
    inside,  # (BLOCK_D,)
    SPLITS: tl.constexpr,
):
    part = tl.arange(0, SPLITS)
    weight = tl.load(part_weights_ptr + part)
    here = parts_ptr + (part[:, None] * 2 * features + column[None, :])
    mean = tl.load(here, mask=inside[None, :], other=0.0)
    squares = tl.load(here + features, mask=inside[None, :], other=0.0)
    return combine(weight, mean, squares)


@triton.jit(
    do_not_specialize=[
        "x_problem_stride",
        "x_stride",
        "y_problem_stride",
        "y_stride",
        "problems",
        "x_samples",
        "y_samples",
        "features",
        "runs",
        "min_samples",
    ]
)
def gaussian_kernel(
    x_ptr,  # (problems, x_samples, features)
    y_ptr,  # (problems, y_samples, features)
    order_ptr,  # (problems, x_samples) int64, the samples of each class after those of the one before; or None
    starts_ptr,  # (problems, runs + 1) int64, where in that order the classes start; or None
    x_weights_ptr,  # (problems, x_samples) float32 or None
    y_weights_ptr,  # (problems, y_samples) float32 or None
    part_weights_ptr,  # (2, problems, SPLITS) float32 or None
    parts_ptr,  # (2, problems, SPLITS, 2, features) float32 or None
    loss_ptr,  # (problems, runs or 1, blocks of columns) float32
    grad_x_ptr,  # (problems, x_samples, features) contiguous, or None
    grad_y_ptr,  # (problems, y_samples, features) contiguous, or None
    x_problem_stride,
    x_stride,
    y_problem_stride,
    y_stride,
    problems,
    x_samples,
    y_samples,
    features,
    runs,
    eps,
    min_samples,
    DISTANCE: tl.constexpr,
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
    program = tl.program_id(0).to(tl.int64)
    problem = program // runs
    run = (program % runs).to(tl.int32)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < features
    x_ptr += problem * x_problem_stride
    y_ptr += problem * y_problem_stride
    if x_weights_ptr is not None:
        x_weights_ptr += problem * x_samples
    if y_weights_ptr is not None:
        y_weights_ptr += problem * y_samples

    if starts_ptr is not None:
        order_ptr += problem * x_samples
        starts = starts_ptr + problem * (runs + 1) + run
        x_begin = tl.load(starts).to(tl.int32)
        x_end = tl.load(starts + 1).to(tl.int32)
        y_begin = x_begin
        y_end = x_end
        first = x_begin
        there = x_begin < x_end
    else:
        x_run = (x_samples + runs - 1) // runs
        y_run = (y_samples + runs - 1) // runs
        x_begin = run * x_run
        y_begin = run * y_run
        x_end = tl.minimum(x_begin + x_run, x_samples)
        y_end = tl.minimum(y_begin + y_run, y_samples)
        first = run * 0
        there = first < x_samples
    x_origin = first_sample(x_ptr, x_stride, order_ptr, first, there, column, inside)
    y_origin = first_sample(y_ptr, y_stride, order_ptr, first, there, column, inside)
    if parts_ptr is not None:
        of_x = problem * SPLITS
        of_y = (problems + problem) * SPLITS
        x_weight, x_mean, x_squares = moments_of_parts(
            part_weights_ptr + of_x, parts_ptr + of_x * 2 * features, features, column, inside, SPLITS
        )
        y_weight, y_mean, y_squares = moments_of_parts(
            part_weights_ptr + of_y, parts_ptr + of_y * 2 * features, features, column, inside, SPLITS
        )
        counts = (x_weight > 0.0) & (y_weight > 0.0)
    else:
        x_weight, x_count, x_mean, x_squares = moments(
            x_ptr,
            x_stride,
            order_ptr,
            x_weights_ptr,
            x_begin,
            x_end,
            x_origin,
            column,
            inside,
            BLOCK_N,
            BLOCK_D,
        )
        y_weight, y_count, y_mean, y_squares = moments(
            y_ptr,
            y_stride,
            order_ptr,
            y_weights_ptr,
            y_begin,
            y_end,
            y_origin,
            column,
            inside,
            BLOCK_N,
            BLOCK_D,
        )
        counts = (x_weight > 0.0) & (y_weight > 0.0) & (x_count >= min_samples) & (y_count >= min_samples)

    x_variance = x_squares / tl.where(x_weight > 0.0, x_weight, 1.0)
    y_variance = y_squares / tl.where(y_weight > 0.0, y_weight, 1.0)
    move = (x_origin - y_origin) + (x_mean - y_mean)
    more = x_variance - y_variance
    if DISTANCE == 0:
        x_deviation = tl.sqrt_rn(x_variance)
        y_deviation = tl.sqrt_rn(y_variance)
        both = x_deviation + y_deviation
        spread = more / tl.where(both > 0.0, both, 1.0)
        loss = move * move + spread * spread
        push = 2.0 * move
        x_slope = tl.where(
            x_deviation > 0.0, 2.0 * spread / tl.where(x_deviation > 0.0, x_deviation, 1.0), 0.0
        )
        y_slope = tl.where(
            y_deviation > 0.0, -2.0 * spread / tl.where(y_deviation > 0.0, y_deviation, 1.0), 0.0
        )
    else:
        x_variance += eps
        y_variance += eps
        scaled = move / y_variance
        t = more / y_variance
        loss = 0.5 * (ratio_less_log(x_variance, y_variance, more) + move * scaled)
        loss = tl.where(x_variance > 0.0, loss, float("inf"))
        push = scaled
        x_slope = t / x_variance
        y_slope = -t / y_variance - scaled * scaled
    if starts_ptr is not None or run == 0:
        slot = program if starts_ptr is not None else problem
        total = tl.sum(tl.where(inside, tl.where(counts, loss, 0.0), 0.0), 0)
        tl.store(loss_ptr + slot * tl.num_programs(1) + tl.program_id(1), total)
    if grad_x_ptr is not None:
        write_gradient(
            grad_x_ptr + problem * x_samples * features,
            x_ptr,
            x_stride,
            order_ptr,
            x_weights_ptr,
            x_begin,
            x_end,
            features,
            counts,
            x_weight,
            x_origin,
            x_mean,
            push,
            x_slope,
            column,
            inside,
            BLOCK_N,
        )
    if grad_y_ptr is not None:
        write_gradient(
            grad_y_ptr + problem * y_samples * features,
            y_ptr,
            y_stride,
            order_ptr,
            y_weights_ptr,
            y_begin,
            y_end,
            features,
            counts,
            y_weight,
            y_origin,
            y_mean,
            -push,
            y_slope,
            column,
            inside,
            BLOCK_N,
        )


def gaussian(
    x: torch.Tensor,  # (B, n, d), features side by side
    y: torch.Tensor,  # (B, m, d), features side by side
    labels: torch.Tensor | None,  # (B, n) int64, contiguous
    x_weights: torch.Tensor | None,  # (B, n) float32, contiguous
    y_weights: torch.Tensor | None,  # (B, m) float32, contiguous
    distance: int,
    eps: float,
    min_samples: int,
    loss: torch.Tensor,  # (B,) float32
    grad_x: torch.Tensor | None,  # (B, n, d) contiguous
    grad_y: torch.Tensor | None,  # (B, m, d) contiguous
) -> None:
    """Fill the outputs that are not None."""
    problems, n, features = x.shape
    m = y.shape[1]
    block_n, block_d, num_warps, splits = tile(problems, max(n, m), features, labels is not None)
    blocks = triton.cdiv(features, block_d)
    with torch.cuda.device_of(x):
        order = starts = part_weights = parts = None
        runs = slots = 1
        if labels is not None:
            order, starts = classes_of(labels)
            runs = slots = n
        if splits > 1:
            part_weights = loss.new_empty(2, problems, splits)
            parts = loss.new_empty(2, problems, splits, 2, features)
            for side, z, weights in ((0, x, x_weights), (1, y, y_weights)):
                gaussian_moments_kernel[(problems * splits, blocks)](
                    z,
                    weights,
                    part_weights[side],
                    parts[side],
                    z.stride(0),
                    z.stride(1),
                    z.shape[1],
                    features,
                    SPLITS=splits,
                    BLOCK_N=block_n,
                    BLOCK_D=block_d,
                    VECTOR=math.gcd(16, features, z.stride(0), z.stride(1)),
                    num_warps=num_warps,
                    enable_fp_fusion=False,
                )
            runs = 1 if grad_x is None and grad_y is None else splits
        shares = loss.new_empty(problems, slots, blocks)
        gaussian_kernel[(problems * runs, blocks)](
            x,
            y,
            order,
            starts,
            x_weights,
            y_weights,
            part_weights,
            parts,
            shares,
            grad_x,
            grad_y,
            x.stride(0),
            x.stride(1),
            y.stride(0),
            y.stride(1),
            problems,
            n,
            m,
            features,
            runs,
            eps,
            min_samples if labels is not None else 1,
            DISTANCE=distance,
            SPLITS=splits,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            VECTOR=math.gcd(16, features, *x.stride()[:2], *y.stride()[:2]),
            num_warps=num_warps,
            # Equal numbers make equal moments, bit for bit, whichever products an assembler would have fused.
            enable_fp_fusion=False,
        )
    torch.sum(shares, (1, 2), out=loss)
