"""What the Triton kernels over rows of logits share: tiles, loads and stores, and the terms of a KL divergence."""

import math
from typing import NamedTuple

import triton
import triton.language as tl

# Finite, so that a lane which has seen only -inf never forms -inf - -inf.
LOWEST = tl.constexpr(-3.4028234663852886e38)
LOG2E = tl.constexpr(1.4426950408889634)
# A maximum's distance from most of its row, over the temperature: two maxima further apart are far from each other.
FAR = tl.constexpr(44.0)


class Tile(NamedTuple):
    """A program takes block_m rows by block_n classes, and walks along the row where it is streamed."""

    block_m: int
    block_n: int
    num_warps: int
    streamed: bool


def tile(classes: int, itemsize: int) -> Tile:
    """The tile for rows of `classes` elements of `itemsize` bytes."""
    # The longest row that every variant holds in registers without a spill on sm_80, sm_90 and sm_100 alike
    # (tests/test_triton_compile.py); at 16384 some spill with 16 warps and with 32.
    if classes > 8192:
        # 8 KiB of each input a step: two 16-byte loads of each for every one of 256 threads.
        return Tile(1, 8192 // itemsize, 8, True)
    block_n = triton.next_power_of_2(classes)
    # Short rows share a program: 1024 elements are 8 per thread, 16 bytes even in half precision.
    return Tile(max(1, 1024 // block_n), block_n, max(4, block_n // 512), False)


def vector_width(classes: int, *strides: int) -> int:
    """The power of two (at most 16 elements) that divides every row's start and end."""
    return math.gcd(16, classes, *strides)


@triton.jit
def load_tile(
    ptr,  # (rows, classes)
    offset,  # (BLOCK_M, 1)
    classes,
    live,  # (BLOCK_M, 1)
    column,  # (1, BLOCK_N)
):
    x = tl.load(ptr + (offset + column), mask=live & (column < classes), other=0.0).to(tl.float32)
    # A row that is not read stays 0 where it has classes: its softmax is uniform, never NaN.
    return tl.where(column < classes, x, float("-inf"))


@triton.jit
def per_row(
    ptr,  # (rows,) or None
    row,  # (BLOCK_M,)
    exists,  # (BLOCK_M,)
    value,
):
    if ptr is None:
        result = tl.zeros_like(row).to(tl.float32) + value
    else:
        result = tl.load(ptr + row, mask=exists, other=1.0)
    return result[:, None]


@triton.jit
def add_online(
    maximum,  # (BLOCK_M, BLOCK_N)
    total,  # (BLOCK_M, BLOCK_N)
    x,  # (BLOCK_M, BLOCK_N)
    factor,  # (BLOCK_M, 1)
):
    # Of the two exponentials of an online sum one is always 1.
    e = tl.exp2(-tl.abs(x - maximum) * factor)
    rises = x > maximum
    return tl.where(rises, x, maximum), tl.where(rises, total * e + 1.0, total + e)


@triton.jit
def log_quotient_of_one_temperature(
    s,  # (BLOCK_M, BLOCK_N)
    t,  # (BLOCK_M, BLOCK_N)
    max_q,  # (BLOCK_M, 1)
    max_p,  # (BLOCK_M, 1)
    inverse,  # (BLOCK_M, 1)
):
    # log(e_p / e_q): log(p / q) but for the ratio of the sums. The logits' difference is exact where they are close;
    # where the sides are far from each other each is first taken from its own maximum.
    far = tl.abs(max_p - max_q) * inverse > FAR
    return (tl.where(far, t - max_p, t - s) - tl.where(far, s - max_q, max_p - max_q)) * inverse


@triton.jit
def log_of_ratio(
    total_p,  # (BLOCK_M, 1)
    total_q,  # (BLOCK_M, 1)
    total_difference,  # (BLOCK_M, 1)
):
    # log(total_p / total_q). Near 1 it comes from the sum of differences, where the rounding of the two sums
    # does not show; -log(1 + x) = -2 atanh(z), whose series to z^7 is good to 3e-9 for |x| <= 0.25.
    x = total_difference / total_p
    z = x / (2.0 + x)
    w = z * z
    near = -2.0 * z * (1.0 + w * (1.0 / 3.0 + w * (1.0 / 5.0 + w * (1.0 / 7.0))))
    return tl.where(tl.abs(x) <= 0.25, near, tl.log(total_p / total_q))


@triton.jit
def second_order_ratio(x):
    # (e^-x - 1 + x) / x^2 for |x| <= 0.5: relative error <= 2.5e-8 (least-maximum fit).
    h = -1.98756294e-4 * x + 1.39819975e-3
    h = h * x - 8.33345217e-3
    h = h * x + 4.16657959e-2
    h = h * x - 1.66666655e-1
    return h * x + 5.00000012e-1


@triton.jit
def kl_term(
    p,  # (BLOCK_M, BLOCK_N)
    q,  # (BLOCK_M, BLOCK_N)
    delta,  # (BLOCK_M, BLOCK_N)
):
    # The share of the loss, P (D + e^-D - 1) >= 0, and Q - P; both from the series near D = 0.
    near = tl.abs(delta) < 0.5
    # Keeps an infinite delta out of the polynomial.
    x = tl.where(near, delta, 0.0)
    e = x * x * second_order_ratio(x)
    far = q - p
    # p = 0 contributes q whatever delta is (0 inf = 0); a NaN reaches the sum through `far`.
    excess = tl.where(near, p * e, tl.where(p > 0.0, p * delta, 0.0) + far)
    return excess, tl.where(near, p * (e - x), far)


@triton.jit
def store_tile(
    ptr,  # (rows, classes)
    offset,  # (BLOCK_M, 1)
    classes,
    exists,  # (BLOCK_M, 1)
    live,  # (BLOCK_M, 1)
    column,  # (1, BLOCK_N)
    x,  # (BLOCK_M, BLOCK_N)
):
    tl.store(ptr + (offset + column), tl.where(live, x, 0.0), mask=exists & (column < classes))


@triton.jit
def store_per_row(
    ptr,  # (rows,)
    row,  # (BLOCK_M,)
    exists,  # (BLOCK_M,)
    live,  # (BLOCK_M, 1)
    x,  # (BLOCK_M, 1)
):
    tl.store(ptr + row, tl.sum(tl.where(live, x, 0.0), 1), mask=exists)
