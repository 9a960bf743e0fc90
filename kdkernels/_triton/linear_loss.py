"""Losses from two rows of hidden states through their heads in Triton: no tensor of rows x classes exists.

    s = cap(a (x W^T + b)),  t = cap(a' (x' W'^T + b')),  cap(u) = c tanh(u / c), or u where c is 0
    loss = row_scale (soft(s, t) + hard(s) + z_loss(s) + logit_mse mean_j (s_j - t_j)^2)

with the terms of LogitLossParams in csrc/kdkernels.h. A tile of both logits is two tl.dot with float32 accumulators.

Forward, one launch: a program has a block of rows and goes over the classes once for the sums of exponentials, and
once more for the divergence, in the second-order form of rows.py, for which the tiles are formed again; a head of at
most one tile's classes is formed once. What the backward needs of a row it leaves in `statistics`.

Backward, one launch: with G = dloss/d(x W^T + b), programs for blocks of G W (rows x features) go over the classes,
and programs for blocks of G^T x (classes x features) and of G^T 1 go over the rows; each forms its tiles of logits
again. No atomics: the sums have one order. For the tensor cores G is rounded to the dtype of the hidden states;
float16 first has each row of a tile of G multiplied by a power of two, so that none of it underflows.

Products of 2 rows classes width operations: forward 2 for each side (1 where the classes are one tile); backward, for
every gradient of a width D that is asked for, ceil(D / block_d) for each side and 1. `bytes_moved` counts loads and
stores: heads and hidden states are read once for each block of the other, most of it from cache.

Limits: a label's, a teacher's or a student's logits of an infinite loss have an infinite gradient, and its products
with a head are not numbers.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kdkernels._triton.divergence import (
    KL,
    NONE,
    REVERSE_KL,
    divergence_term,
    log_quotient,
    logit_difference,
    times,
)
from kdkernels._triton.rows import LOG2E, LOWEST, log_of_ratio, per_row, store_per_row, vector_width

# Rows of `statistics`. Those that a call's terms need are filled: of the student's logits the maximum, the sums of
# exponentials from there at its temperature and at 1, and how many are not -inf; the teacher's maximum and sum;
# the divergence, and sum_k w_k (divergence.py).
STATISTICS_ROWS = 8
_MAX_Q = tl.constexpr(0)
_TOTAL_Q = tl.constexpr(1)
_MAX_P = tl.constexpr(2)
_TOTAL_P = tl.constexpr(3)
_TOTAL_PLAIN = tl.constexpr(4)
_COUNT = tl.constexpr(5)
_LOSS = tl.constexpr(6)
_WEIGHT_SUM = tl.constexpr(7)


class Tiles(NamedTuple):
    """How the work is cut: what a program takes of its rows (or classes), by what it goes over in steps."""

    block_m: int  # rows
    block_n: int  # classes a step of the forward
    block_c: int  # classes of a program for a head's gradient
    step: int  # classes, or for a head rows, a step of the backward
    block_k: int  # features a step of a logit
    block_d: int  # features of a gradient that a program has
    forward_warps: int
    backward_warps: int


def tiles(rows: int, classes: int, student_width: int, teacher_width: int, itemsize: int) -> Tiles:
    """The tiles of a call; teacher_width is 0 where there is no teacher.

    The largest that sm_80, sm_90, sm_100 and gfx942 hold in registers (tests/test_triton_compile.py).
    """

    def block(count: int) -> int:
        # A program's time is that of its sweep: the large block only where 128 of them fill the multiprocessors.
        return 32 if count >= 128 * 32 else 16

    half = itemsize == 2
    block_m, block_c = block(rows), block(classes)
    width = triton.next_power_of_2(max(student_width, teacher_width, 16))
    return Tiles(
        block_m,
        128,
        block_c,
        64 if half else 32,
        min(width, 64 if half else 32 if block_m == 16 else 16),
        min(width, 256 if half else 128),
        4 if half and block_m == 16 else 8,
        4 if block_m == block_c == 16 else 8,
    )


def bytes_moved(
    rows: int,
    classes: int,
    student_width: int,
    teacher_width: int,
    itemsize: int,
    *,
    soft: bool = True,
    shared: bool = False,
    biases: int = 0,
    grads: Collection[str] | None = None,
    grad_itemsize: int | None = None,
) -> int:
    """Bytes of hidden states, heads, biases and their gradients that are loaded and stored.

    By the forward where `grads` is None, else by the backward for gradients of those names ("input", "input_weight",
    "target", "target_weight"). Most loads are from cache. A row's label, statistics, scales and outputs are left out:
    up to 80 bytes for each program, or step of a program, that takes the row.
    """
    cut = tiles(rows, classes, student_width, teacher_width, itemsize)
    widths, heads = student_width + teacher_width, student_width + (0 if shared else teacher_width)
    row_blocks, class_blocks = triton.cdiv(rows, cut.block_m), triton.cdiv(classes, cut.block_c)

    def logits(loads_of_rows: int, loads_of_classes: int) -> int:
        return rows * widths * loads_of_rows + classes * (heads + biases) * loads_of_classes

    if grads is None:
        class_tiles = triton.cdiv(classes, cut.block_n)
        return itemsize * logits(class_tiles, row_blocks) * (2 if soft and class_tiles > 1 else 1)
    moved = 0
    for name in grads:
        width = student_width if name.startswith("input") else teacher_width
        parts = triton.cdiv(width, cut.block_d)
        if name.endswith("weight"):
            moved += itemsize * parts * logits(class_blocks, triton.cdiv(rows, cut.step))
            moved += itemsize * rows * width * class_blocks + (grad_itemsize or itemsize) * classes * width
        else:
            moved += itemsize * parts * logits(triton.cdiv(classes, cut.step), row_blocks)
            moved += itemsize * classes * width * row_blocks + (grad_itemsize or itemsize) * rows * width
    return moved


@triton.jit
def _capped(u, softcap):
    # c tanh(u / c); below 0.625 a polynomial, good to 1.3e-7.
    x = u / softcap
    magnitude = tl.abs(x)
    near = magnitude < 0.625
    y = tl.where(near, x, 0.0)
    w = y * y
    h = -5.70498872745e-3 * w + 2.06390887954e-2
    h = h * w - 5.37397155531e-2
    h = h * w + 1.33314422036e-1
    h = h * w - 3.33332819422e-1
    far = 1.0 - 2.0 / (tl.exp2(magnitude * (2.0 * LOG2E)) + 1.0)
    return softcap * tl.where(near, h * w * y + y, tl.where(x < 0.0, -far, far))


@triton.jit
def _load_block(
    ptr,  # (.., width)
    offset,  # (BLOCK, 1)
    exists,  # (BLOCK, 1)
    feature,  # (1, BLOCK_K)
    width,
):
    return tl.load(ptr + (offset + feature), mask=exists & (feature < width), other=0.0)


@triton.jit
def _logits_of(
    products,  # (BLOCK_M, BLOCK_N)
    side,
    column,  # (1, BLOCK_N)
    classes,
    CAPPED: tl.constexpr,
):
    _, _, bias_ptr, _, _, _, logit_scale, softcap = side
    u = products
    if bias_ptr is not None:
        u += tl.load(bias_ptr + column, mask=column < classes, other=0.0).to(tl.float32)
    u *= logit_scale
    if CAPPED:
        u = _capped(u, softcap)
    return tl.where(column < classes, u, float("-inf"))


@triton.jit
def _logits(
    sides,
    row,  # (BLOCK_M,)
    live,  # (BLOCK_M,)
    start,
    classes,
    SPEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # The tiles of both logits (the student's twice where there is no teacher), -inf beyond the classes.
    PAIRED: tl.constexpr = SPEC[0] != NONE or SPEC[4]
    SHARED: tl.constexpr = SPEC[5]
    BLOCK_K: tl.constexpr = SPEC[8]
    student, teacher = sides
    input_ptr, weight_ptr, _, input_stride, weight_stride, width, _, _ = student
    target_ptr, target_weight_ptr, _, target_stride, target_weight_stride, target_width, _, _ = teacher
    live_2d = live[:, None]
    row_2d = row.to(tl.int64)[:, None]
    column = start + tl.arange(0, BLOCK_N)
    is_class = (column < classes)[:, None]
    column_2d = column.to(tl.int64)[:, None]
    block = tl.arange(0, BLOCK_K)[None, :]

    s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    t = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, width, BLOCK_K):
        x = _load_block(input_ptr, row_2d * input_stride, live_2d, k + block, width)
        w = tl.trans(_load_block(weight_ptr, column_2d * weight_stride, is_class, k + block, width))
        s = tl.dot(x, w, s, input_precision="ieee")
        if PAIRED and SHARED:
            y = _load_block(target_ptr, row_2d * target_stride, live_2d, k + block, width)
            t = tl.dot(y, w, t, input_precision="ieee")
    if PAIRED and not SHARED:
        for k in range(0, target_width, BLOCK_K):
            y = _load_block(target_ptr, row_2d * target_stride, live_2d, k + block, target_width)
            w = tl.trans(
                _load_block(
                    target_weight_ptr, column_2d * target_weight_stride, is_class, k + block, target_width
                )
            )
            t = tl.dot(y, w, t, input_precision="ieee")
    s = _logits_of(s, student, column[None, :], classes, SPEC[6])
    if PAIRED:
        t = _logits_of(t, teacher, column[None, :], classes, SPEC[7])
    else:
        t = s
    return s, t


@triton.jit
def _soft_term(
    s,  # (BLOCK_M, BLOCK_N)
    t,  # (BLOCK_M, BLOCK_N)
    distributions,
    first,
    second,
    mix,
    DIVERGENCE: tl.constexpr,
    OF_TARGET: tl.constexpr,
):
    # The classes' terms, weights, and probabilities of the side that the weights are of.
    inverse_q, inverse_p, max_q, max_p, norm_q, norm_p, log_ratio = distributions
    q = tl.exp2((s - max_q) * (inverse_q * LOG2E)) * norm_q
    p = tl.exp2((t - max_p) * (inverse_p * LOG2E)) * norm_p
    delta = log_quotient(s, t, max_q, max_p, inverse_q, inverse_p, inverse_p - inverse_q) - log_ratio
    if OF_TARGET:
        # The same loss with the sides exchanged.
        EXCHANGED: tl.constexpr = (
            REVERSE_KL if DIVERGENCE == KL else KL if DIVERGENCE == REVERSE_KL else DIVERGENCE
        )
        term, weight = divergence_term(q, p, -delta, delta, second, first, 1.0 - mix, EXCHANGED)
        own = p
    else:
        term, weight = divergence_term(p, q, delta, delta, first, second, mix, DIVERGENCE)
        own = q
    return term, weight, own


@triton.jit
def _add_sum(
    total,  # (BLOCK_M, 1)
    maximum,  # (BLOCK_M, 1)
    higher,  # (BLOCK_M, 1)
    x,  # (BLOCK_M, BLOCK_N)
    factor,  # (BLOCK_M, 1)
):
    fresh = tl.sum(tl.exp2((x - higher) * factor), 1)[:, None]
    return total * tl.exp2((maximum - higher) * factor) + fresh


@triton.jit
def _labels_of(
    labels_ptr,  # (rows,) int64
    row,  # (BLOCK_M,)
    live,  # (BLOCK_M,)
    row_scale,  # (BLOCK_M, 1)
    classes,
):
    # The labels, and the scales of the rows: NaN where there is no such class.
    label = tl.load(labels_ptr + row, mask=live, other=0)[:, None]
    named = (label >= 0) & (label < classes)
    return tl.where(named, label, 0).to(tl.int32), tl.where(named, row_scale, float("nan"))


# Integers are not specialised on their values: the VECTORs say all that the generated code needs to know.
@triton.jit(
    do_not_specialize=[
        "input_stride",
        "input_weight_stride",
        "target_stride",
        "target_weight_stride",
        "rows",
        "classes",
        "student_width",
        "teacher_width",
    ]
)
def linear_loss_fwd_kernel(
    input_ptr,  # (rows, student_width)
    input_weight_ptr,  # (classes, student_width)
    input_bias_ptr,  # (classes,) or None
    target_ptr,  # (rows, teacher_width), or None where nothing needs it; so are its head's
    target_weight_ptr,  # (classes, teacher_width)
    target_bias_ptr,  # (classes,) or None
    labels_ptr,  # (rows,) int64, or None where nothing needs them
    input_temperature_ptr,  # (rows,) float32, or None: input_temperature_value
    target_temperature_ptr,  # (rows,) float32, or None: target_temperature_value
    soft_scale_ptr,  # (rows,) float32, or None: soft_scale_value
    row_scale_ptr,  # (rows,) float32, or None: scale
    mask_ptr,  # (rows,) bool, or None: every row counts
    loss_ptr,  # (rows,) float32 or None
    terms_ptr,  # (5, rows) float32 or None
    statistics_ptr,  # (STATISTICS_ROWS, rows) float32
    input_stride,
    input_weight_stride,
    target_stride,
    target_weight_stride,
    rows,
    classes,
    student_width,
    teacher_width,
    input_temperature_value,
    target_temperature_value,
    soft_scale_value,
    scale,
    first,
    second,
    mix,
    hard_weight,
    label_smoothing,
    z_loss,
    logit_mse,
    logit_scale,
    target_logit_scale,
    softcap,
    target_softcap,
    DIVERGENCE: tl.constexpr,
    HARD: tl.constexpr,
    SMOOTH: tl.constexpr,
    Z_LOSS: tl.constexpr,
    MSE: tl.constexpr,
    SHARED: tl.constexpr,
    CAPPED: tl.constexpr,
    TARGET_CAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STUDENT_VECTOR: tl.constexpr,
    TEACHER_VECTOR: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    SPEC: tl.constexpr = (DIVERGENCE, HARD, SMOOTH, Z_LOSS, MSE, SHARED, CAPPED, TARGET_CAPPED, BLOCK_K)
    SOFT: tl.constexpr = DIVERGENCE != NONE
    PLAIN: tl.constexpr = HARD or Z_LOSS
    # The compiler cannot see that rows start and end on 16 bytes unless the multiplication is in sight.
    student = (
        input_ptr,
        input_weight_ptr,
        input_bias_ptr,
        (input_stride // STUDENT_VECTOR) * STUDENT_VECTOR,
        (input_weight_stride // STUDENT_VECTOR) * STUDENT_VECTOR,
        (student_width // STUDENT_VECTOR) * STUDENT_VECTOR,
        logit_scale,
        softcap,
    )
    teacher = (
        target_ptr,
        target_weight_ptr,
        target_bias_ptr,
        (target_stride // TEACHER_VECTOR) * TEACHER_VECTOR,
        (target_weight_stride // TEACHER_VECTOR) * TEACHER_VECTOR,
        (teacher_width // TEACHER_VECTOR) * TEACHER_VECTOR,
        target_logit_scale,
        target_softcap,
    )
    sides = (student, teacher)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < rows
    live = exists
    if mask_ptr is not None:
        live = exists & (tl.load(mask_ptr + row, mask=exists, other=0) != 0)
    live_2d = live[:, None]
    inverse_q = 1.0 / per_row(input_temperature_ptr, row, live, input_temperature_value)
    inverse_p = 1.0 / per_row(target_temperature_ptr, row, live, target_temperature_value)
    soft_scale = per_row(soft_scale_ptr, row, live, soft_scale_value)
    row_scale = per_row(row_scale_ptr, row, live, scale)
    zero = tl.zeros((BLOCK_M, 1), tl.float32)
    if HARD:
        label, row_scale = _labels_of(labels_ptr, row, live, row_scale, classes)
    block = tl.arange(0, BLOCK_N)[None, :]

    # A head of one tile is one step of both sweeps.
    if ONE_TILE:
        end = 1
        s, t = _logits(sides, row, live, 0, classes, SPEC, BLOCK_M, BLOCK_N)
    else:
        end = classes

    # Sums of exponentials, and what needs none.
    max_q = zero + LOWEST
    max_p = zero + LOWEST
    total_q, total_p, total_plain, squares, label_s, smooth, count = zero, zero, zero, zero, zero, zero, zero
    for start in range(0, end, BLOCK_N):
        if not ONE_TILE:
            s, t = _logits(sides, row, live, start, classes, SPEC, BLOCK_M, BLOCK_N)
        higher = tl.maximum(max_q, tl.max(s, 1)[:, None])
        if PLAIN:
            total_plain = _add_sum(total_plain, max_q, higher, s, LOG2E)
        if SOFT:
            total_q = _add_sum(total_q, max_q, higher, s, inverse_q * LOG2E)
            higher_p = tl.maximum(max_p, tl.max(t, 1)[:, None])
            total_p = _add_sum(total_p, max_p, higher_p, t, inverse_p * LOG2E)
            max_p = higher_p
        max_q = higher
        if MSE:
            apart = logit_difference(s, t)
            squares += tl.sum(apart * apart, 1)[:, None]
        if HARD:
            label_s += tl.sum(tl.where(start + block == label, s, 0.0), 1)[:, None]
        if SMOOTH:
            smooth += tl.sum(tl.where(s > float("-inf"), s, 0.0), 1)[:, None]
            count += tl.sum(tl.where(s > float("-inf"), 1.0, 0.0), 1)[:, None]

    loss = zero
    weight_sum = zero
    if SOFT:
        log_ratio = log_of_ratio(total_p, total_q, total_q - total_p)
        distributions = (inverse_q, inverse_p, max_q, max_p, 1.0 / total_q, 1.0 / total_p, log_ratio)
        for start in range(0, end, BLOCK_N):
            if not ONE_TILE:
                s, t = _logits(sides, row, live, start, classes, SPEC, BLOCK_M, BLOCK_N)
            term, weight, _ = _soft_term(s, t, distributions, first, second, mix, DIVERGENCE, False)
            loss += tl.sum(term, 1)[:, None]
            if DIVERGENCE != KL:
                weight_sum += tl.sum(weight, 1)[:, None]
    hard = zero
    square = zero
    if PLAIN:
        log_total = tl.log(total_plain)
        if HARD:
            named = times(1.0 - label_smoothing, label_s - max_q)
            if SMOOTH:
                named += label_smoothing * (smooth / count - max_q)
            hard = hard_weight * (log_total - named)
        if Z_LOSS:
            lse = max_q + log_total
            square = z_loss * lse * lse
    soft = soft_scale * loss if SOFT else zero
    apart = logit_mse * squares / classes if MSE else zero

    if loss_ptr is not None:
        store_per_row(loss_ptr, row, exists, live_2d, row_scale * (soft + hard + square + apart))
    if terms_ptr is not None:
        of_row = (row_scale * soft, row_scale * hard, row_scale * square, zero, row_scale * apart)
        for index in tl.static_range(5):
            store_per_row(terms_ptr + index * rows, row, exists, live_2d, of_row[index])
    if PLAIN or SOFT:
        store_per_row(statistics_ptr + _MAX_Q * rows, row, exists, live_2d, max_q)
    if PLAIN:
        store_per_row(statistics_ptr + _TOTAL_PLAIN * rows, row, exists, live_2d, total_plain)
    if SMOOTH:
        store_per_row(statistics_ptr + _COUNT * rows, row, exists, live_2d, count)
    if SOFT:
        store_per_row(statistics_ptr + _TOTAL_Q * rows, row, exists, live_2d, total_q)
        store_per_row(statistics_ptr + _MAX_P * rows, row, exists, live_2d, max_p)
        store_per_row(statistics_ptr + _TOTAL_P * rows, row, exists, live_2d, total_p)
        store_per_row(statistics_ptr + _LOSS * rows, row, exists, live_2d, loss)
        store_per_row(statistics_ptr + _WEIGHT_SUM * rows, row, exists, live_2d, weight_sum)


@triton.jit
def _statistic(
    ptr,  # (STATISTICS_ROWS, rows)
    index,
    rows,
    row,  # (BLOCK_M,)
    live,  # (BLOCK_M,)
):
    return tl.load(ptr + index * rows + row, mask=live, other=1.0)[:, None]


@triton.jit
def _row_state(
    row,  # (BLOCK_M,)
    of_rows,
    weights,
    SPEC: tl.constexpr,
    OF_TARGET: tl.constexpr,
):
    # What the gradient's tiles take of their rows, (BLOCK_M, 1) each; zeros where the terms have no use for it.
    DIVERGENCE: tl.constexpr = SPEC[0]
    HARD: tl.constexpr = SPEC[1]
    SMOOTH: tl.constexpr = SPEC[2]
    Z_LOSS: tl.constexpr = SPEC[3]
    labels_ptr, input_temperature_ptr, target_temperature_ptr, soft_scale_ptr, row_scale_ptr, mask_ptr = (
        of_rows[0]
    )
    statistics_ptr, input_temperature_value, target_temperature_value, soft_scale_value, scale = of_rows[1]
    rows, classes = of_rows[2]
    _, _, _, hard_weight, label_smoothing, z_loss, _ = weights
    SOFT: tl.constexpr = DIVERGENCE != NONE
    HAS_SUM: tl.constexpr = SPEC[0] != REVERSE_KL if OF_TARGET else SPEC[0] != KL
    OWN: tl.constexpr = (HARD or Z_LOSS) and not OF_TARGET  # the student's own terms

    live = row < rows
    if mask_ptr is not None:
        live = live & (tl.load(mask_ptr + row, mask=live, other=0) != 0)
    zero = tl.zeros_like(row)[:, None].to(tl.float32)
    row_scale = per_row(row_scale_ptr, row, live, scale)
    label = zero.to(tl.int32)
    if HARD:
        label, row_scale = _labels_of(labels_ptr, row, live, row_scale, classes)
    distributions = (zero, zero, zero, zero, zero, zero, zero)
    max_q, soft_scale, weight_sum, plain, smooth = zero, zero, zero, zero, zero
    if SOFT or OWN:
        max_q = _statistic(statistics_ptr, _MAX_Q, rows, row, live)
    if SOFT:
        inverse_q = 1.0 / per_row(input_temperature_ptr, row, live, input_temperature_value)
        inverse_p = 1.0 / per_row(target_temperature_ptr, row, live, target_temperature_value)
        soft_scale = per_row(soft_scale_ptr, row, live, soft_scale_value)
        total_q = _statistic(statistics_ptr, _TOTAL_Q, rows, row, live)
        total_p = _statistic(statistics_ptr, _TOTAL_P, rows, row, live)
        max_p = _statistic(statistics_ptr, _MAX_P, rows, row, live)
        log_ratio = log_of_ratio(total_p, total_q, total_q - total_p)
        distributions = (inverse_q, inverse_p, max_q, max_p, 1.0 / total_q, 1.0 / total_p, log_ratio)
        if HAS_SUM:
            weight_sum = _statistic(statistics_ptr, _WEIGHT_SUM, rows, row, live)
            if OF_TARGET:
                # A divergence is homogeneous in P and Q together: both sides' weights sum to it.
                loss = _statistic(statistics_ptr, _LOSS, rows, row, live)
                weight_sum = tl.where(weight_sum == float("inf"), 0.0, loss - weight_sum)
    if OWN:
        total_plain = _statistic(statistics_ptr, _TOTAL_PLAIN, rows, row, live)
        if HARD:
            plain += hard_weight
        if Z_LOSS:
            plain += 2.0 * z_loss * (max_q + tl.log(total_plain))
        plain = plain / total_plain
        if SMOOTH:
            smooth = hard_weight * label_smoothing / _statistic(statistics_ptr, _COUNT, rows, row, live)
    return live, row_scale, label, distributions, max_q, soft_scale, weight_sum, plain, smooth


@triton.jit
def _gradient(
    sides,
    state,
    weights,
    row,  # (BLOCK_M,)
    start,
    classes,
    SPEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OF_TARGET: tl.constexpr,
):
    # A tile of dloss / d(logit_scale (x W^T + b)) of a side, and its share of sum_j z_j dsoft/dz_j.
    DIVERGENCE: tl.constexpr = SPEC[0]
    HARD: tl.constexpr = SPEC[1]
    SMOOTH: tl.constexpr = SPEC[2]
    Z_LOSS: tl.constexpr = SPEC[3]
    MSE: tl.constexpr = SPEC[4]
    CAPPED: tl.constexpr = SPEC[7 if OF_TARGET else 6]
    HAS_SUM: tl.constexpr = SPEC[0] != REVERSE_KL if OF_TARGET else SPEC[0] != KL
    live, row_scale, label, distributions, max_q, soft_scale, weight_sum, plain, smooth = state
    inverse_q, inverse_p, _, max_p, _, _, _ = distributions
    first, second, mix, hard_weight, label_smoothing, _, logit_mse = weights
    s, t = _logits(sides, row, live, start, classes, SPEC, BLOCK_M, BLOCK_N)
    column = start + tl.arange(0, BLOCK_N)[None, :]
    grad = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    moment = tl.zeros((BLOCK_M, 1), tl.float32)
    if DIVERGENCE != NONE:
        _, weight, own = _soft_term(s, t, distributions, first, second, mix, DIVERGENCE, OF_TARGET)
        if HAS_SUM:
            # An infinite loss gives its one-sided limits.
            limit = tl.where(own == 0.0, 0.0, weight - own * weight_sum)
            weight = tl.where(weight == float("inf"), weight, limit)
        grad = soft_scale * (inverse_p if OF_TARGET else inverse_q) * weight
        # A masked class has no part in the temperature's.
        z = t - max_p if OF_TARGET else s - max_q
        moment = tl.sum(weight * tl.where(z == float("-inf"), 0.0, z), 1)[:, None]
    if (HARD or Z_LOSS) and not OF_TARGET:
        grad += plain * tl.exp2((s - max_q) * LOG2E)
        if SMOOTH:
            grad -= tl.where(s > float("-inf"), smooth, 0.0)
        if HARD:
            grad -= tl.where(column == label, hard_weight * (1.0 - label_smoothing), 0.0)
    if MSE:
        apart = logit_difference(s, t) * (2.0 * logit_mse / classes)
        grad += apart if OF_TARGET else -apart
    if CAPPED:
        z = t / sides[1][7] if OF_TARGET else s / sides[0][7]
        grad *= tl.where(column < classes, 1.0 - z * z, 0.0)
    return tl.where(live[:, None], row_scale * grad, 0.0), moment


@triton.jit
def _add_product(
    acc,  # (BLOCK, BLOCK_D)
    grad,  # (BLOCK, BLOCK_K)
    x,  # (BLOCK_K, BLOCK_D)
):
    if x.dtype == tl.float16:
        # In [1, 2) the largest of a row, by exact factors.
        bits = tl.max(tl.abs(grad), 1)[:, None].to(tl.int32, bitcast=True) & 0x7F800000
        bits = tl.minimum(tl.maximum(bits, 1 << 23), 253 << 23)
        up = ((254 << 23) - bits).to(tl.float32, bitcast=True)
        acc += tl.dot((grad * up).to(x.dtype), x, input_precision="ieee") * bits.to(tl.float32, bitcast=True)
    else:
        acc = tl.dot(grad.to(x.dtype), x, acc, input_precision="ieee")
    return acc


@triton.jit
def _gradient_of_rows(
    pid,
    sides,
    of_rows,
    weights,
    outputs,  # (rows, width) or None, its row stride; (rows,) float32 or None
    SPEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OF_TARGET: tl.constexpr,
):
    _, weight_ptr, _, _, weight_stride, width, logit_scale, _ = sides[1] if OF_TARGET else sides[0]
    rows, classes = of_rows[2]
    grad_ptr, grad_stride, grad_temperature_ptr = outputs
    blocks = tl.cdiv(rows, BLOCK_M)
    row = (pid % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    feature = (pid // blocks) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    state = _row_state(row, of_rows, weights, SPEC, OF_TARGET)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    moment = tl.zeros((BLOCK_M, 1), tl.float32)
    for start in range(0, classes, STEP):
        grad, part = _gradient(sides, state, weights, row, start, classes, SPEC, BLOCK_M, STEP, OF_TARGET)
        if grad_ptr is not None:
            column = (start + tl.arange(0, STEP)).to(tl.int64)[:, None]
            w = _load_block(weight_ptr, column * weight_stride, column < classes, feature, width)
            acc = _add_product(acc, grad, w)
        if grad_temperature_ptr is not None:
            moment += part
    exists = row < rows
    if grad_ptr is not None:
        offset = row.to(tl.int64)[:, None] * grad_stride
        tl.store(grad_ptr + (offset + feature), acc * logit_scale, mask=exists[:, None] & (feature < width))
    if grad_temperature_ptr is not None:
        live, row_scale, _, distributions, _, soft_scale, weight_sum, _, _ = state
        inverse = distributions[1] if OF_TARGET else distributions[0]
        # An infinite loss has none.
        moment = tl.where(weight_sum == float("inf"), 0.0, moment)
        slope = -row_scale * soft_scale * inverse * inverse * moment
        store_per_row(grad_temperature_ptr, row, exists & (pid < blocks), live[:, None], slope)


@triton.jit
def _gradient_of_head(
    pid,
    sides,
    of_rows,
    weights,
    outputs,  # (classes, width) or None, its row stride; (classes,) or None
    SPEC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OF_TARGET: tl.constexpr,
):
    input_ptr, _, _, input_stride, _, width, logit_scale, _ = sides[1] if OF_TARGET else sides[0]
    rows, classes = of_rows[2]
    grad_weight_ptr, grad_stride, grad_bias_ptr = outputs
    blocks = tl.cdiv(classes, BLOCK_C)
    first_class = (pid % blocks) * BLOCK_C
    feature = (pid // blocks) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    acc = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    of_bias = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, rows, STEP):
        row = start + tl.arange(0, STEP)
        state = _row_state(row, of_rows, weights, SPEC, OF_TARGET)
        grad = _gradient(sides, state, weights, row, first_class, classes, SPEC, STEP, BLOCK_C, OF_TARGET)[0]
        if grad_weight_ptr is not None:
            offset = row.to(tl.int64)[:, None] * input_stride
            x = _load_block(input_ptr, offset, state[0][:, None], feature, width)
            acc = _add_product(acc, tl.trans(grad), x)
        if grad_bias_ptr is not None:
            of_bias += tl.sum(grad, 0)
    column = first_class + tl.arange(0, BLOCK_C)
    is_class = column < classes
    if grad_weight_ptr is not None:
        offset = column.to(tl.int64)[:, None] * grad_stride
        mask = is_class[:, None] & (feature < width)
        tl.store(grad_weight_ptr + (offset + feature), acc * logit_scale, mask=mask)
    if grad_bias_ptr is not None:
        tl.store(grad_bias_ptr + column, of_bias * logit_scale, mask=is_class & (pid < blocks))


@triton.jit(
    do_not_specialize=[
        "input_stride",
        "input_weight_stride",
        "target_stride",
        "target_weight_stride",
        "grad_input_stride",
        "grad_input_weight_stride",
        "grad_target_stride",
        "grad_target_weight_stride",
        "rows",
        "classes",
        "student_width",
        "teacher_width",
        "input_programs",
        "target_programs",
        "input_head_programs",
    ]
)
def linear_loss_bwd_kernel(
    input_ptr,  # these as in linear_loss_fwd_kernel
    input_weight_ptr,
    input_bias_ptr,
    target_ptr,
    target_weight_ptr,
    target_bias_ptr,
    labels_ptr,
    input_temperature_ptr,
    target_temperature_ptr,
    soft_scale_ptr,
    row_scale_ptr,
    mask_ptr,
    statistics_ptr,
    grad_input_ptr,  # (rows, student_width) or None
    grad_input_weight_ptr,  # (classes, student_width) or None
    grad_input_bias_ptr,  # (classes,) or None
    grad_target_ptr,  # (rows, teacher_width) or None
    grad_target_weight_ptr,  # (classes, teacher_width) or None
    grad_target_bias_ptr,  # (classes,) or None
    grad_input_temperature_ptr,  # (rows,) float32 or None
    grad_target_temperature_ptr,  # (rows,) float32 or None
    input_stride,
    input_weight_stride,
    target_stride,
    target_weight_stride,
    grad_input_stride,
    grad_input_weight_stride,
    grad_target_stride,
    grad_target_weight_stride,
    rows,
    classes,
    student_width,
    teacher_width,
    input_programs,
    target_programs,
    input_head_programs,
    input_temperature_value,
    target_temperature_value,
    soft_scale_value,
    scale,
    first,
    second,
    mix,
    hard_weight,
    label_smoothing,
    z_loss,
    logit_mse,
    logit_scale,
    target_logit_scale,
    softcap,
    target_softcap,
    DIVERGENCE: tl.constexpr,
    HARD: tl.constexpr,
    SMOOTH: tl.constexpr,
    Z_LOSS: tl.constexpr,
    MSE: tl.constexpr,
    SHARED: tl.constexpr,
    CAPPED: tl.constexpr,
    TARGET_CAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STUDENT_VECTOR: tl.constexpr,
    TEACHER_VECTOR: tl.constexpr,
):
    SPEC: tl.constexpr = (DIVERGENCE, HARD, SMOOTH, Z_LOSS, MSE, SHARED, CAPPED, TARGET_CAPPED, BLOCK_K)
    student = (
        input_ptr,
        input_weight_ptr,
        input_bias_ptr,
        (input_stride // STUDENT_VECTOR) * STUDENT_VECTOR,
        (input_weight_stride // STUDENT_VECTOR) * STUDENT_VECTOR,
        (student_width // STUDENT_VECTOR) * STUDENT_VECTOR,
        logit_scale,
        softcap,
    )
    teacher = (
        target_ptr,
        target_weight_ptr,
        target_bias_ptr,
        (target_stride // TEACHER_VECTOR) * TEACHER_VECTOR,
        (target_weight_stride // TEACHER_VECTOR) * TEACHER_VECTOR,
        (teacher_width // TEACHER_VECTOR) * TEACHER_VECTOR,
        target_logit_scale,
        target_softcap,
    )
    grad_input_stride = (grad_input_stride // STUDENT_VECTOR) * STUDENT_VECTOR
    grad_input_weight_stride = (grad_input_weight_stride // STUDENT_VECTOR) * STUDENT_VECTOR
    grad_target_stride = (grad_target_stride // TEACHER_VECTOR) * TEACHER_VECTOR
    grad_target_weight_stride = (grad_target_weight_stride // TEACHER_VECTOR) * TEACHER_VECTOR
    of_rows = (
        (labels_ptr, input_temperature_ptr, target_temperature_ptr, soft_scale_ptr, row_scale_ptr, mask_ptr),
        (statistics_ptr, input_temperature_value, target_temperature_value, soft_scale_value, scale),
        (rows, classes),
    )
    weights = (first, second, mix, hard_weight, label_smoothing, z_loss, logit_mse)

    # The kinds of programs follow each other.
    pid = tl.program_id(0)
    after_input = input_programs
    after_target = after_input + target_programs
    after_head = after_target + input_head_programs
    sides = (student, teacher)
    if grad_input_ptr is not None or grad_input_temperature_ptr is not None:
        outputs = (grad_input_ptr, grad_input_stride, grad_input_temperature_ptr)
        if pid < after_input:
            _gradient_of_rows(pid, sides, of_rows, weights, outputs, SPEC, BLOCK_M, STEP, BLOCK_D, False)
    if grad_target_ptr is not None or grad_target_temperature_ptr is not None:
        outputs = (grad_target_ptr, grad_target_stride, grad_target_temperature_ptr)
        own = pid - after_input
        if (own >= 0) & (pid < after_target):
            _gradient_of_rows(own, sides, of_rows, weights, outputs, SPEC, BLOCK_M, STEP, BLOCK_D, True)
    if grad_input_weight_ptr is not None or grad_input_bias_ptr is not None:
        outputs = (grad_input_weight_ptr, grad_input_weight_stride, grad_input_bias_ptr)
        own = pid - after_target
        if (own >= 0) & (pid < after_head):
            _gradient_of_head(own, sides, of_rows, weights, outputs, SPEC, BLOCK_C, STEP, BLOCK_D, False)
    if grad_target_weight_ptr is not None or grad_target_bias_ptr is not None:
        outputs = (grad_target_weight_ptr, grad_target_weight_stride, grad_target_bias_ptr)
        own = pid - after_head
        if own >= 0:
            _gradient_of_head(own, sides, of_rows, weights, outputs, SPEC, BLOCK_C, STEP, BLOCK_D, True)


def linear_loss(
    input: torch.Tensor,  # (rows, student_width), feature stride 1
    input_weight: torch.Tensor,  # (classes, student_width), feature stride 1
    input_bias: torch.Tensor | None,  # (classes,)
    target: torch.Tensor | None,  # (rows, teacher_width), feature stride 1
    target_weight: torch.Tensor | None,  # (classes, teacher_width), feature stride 1
    target_bias: torch.Tensor | None,  # (classes,)
    labels: torch.Tensor | None,  # (rows,) int64
    input_temperature: torch.Tensor | None,  # (rows,) float32
    target_temperature: torch.Tensor | None,  # (rows,) float32
    input_temperature_value: float,
    target_temperature_value: float,
    soft_scale: torch.Tensor | None,  # (rows,) float32
    soft_scale_value: float,
    row_scale: torch.Tensor | None,  # (rows,) float32
    scale: float,
    mask: torch.Tensor | None,  # (rows,) bool
    divergence: int,
    first: float,
    second: float,
    mix: float,
    hard_weight: float,
    label_smoothing: float,
    z_loss: float,
    logit_mse: float,
    softcap: float,
    target_softcap: float,
    logit_scale: float,
    target_logit_scale: float,
    loss: torch.Tensor | None,  # (rows,) float32
    terms: torch.Tensor | None,  # (5, rows) float32: soft, hard, z_loss, 0, logit_mse
    statistics: torch.Tensor,  # (STATISTICS_ROWS, rows) float32
    grad_input: torch.Tensor | None,  # (rows, student_width), feature stride 1
    grad_input_weight: torch.Tensor | None,  # (classes, student_width), feature stride 1
    grad_input_bias: torch.Tensor | None,  # (classes,)
    grad_target: torch.Tensor | None,  # (rows, teacher_width), feature stride 1
    grad_target_weight: torch.Tensor | None,  # (classes, teacher_width), feature stride 1
    grad_target_bias: torch.Tensor | None,  # (classes,)
    grad_input_temperature: torch.Tensor | None,  # (rows,) float32
    grad_target_temperature: torch.Tensor | None,  # (rows,) float32
) -> None:
    """Without gradients to fill, the forward: loss, terms and statistics. Else the backward, from the statistics.

    Gradients are filled that are not None. A row whose mask is 0 is not read: its outputs are 0.
    """
    rows, student_width = input.shape
    classes = input_weight.shape[0]
    teacher_width = 0 if target is None else target.shape[1]
    of_student, of_teacher = (grad_input, grad_input_weight), (grad_target, grad_target_weight)
    cut = tiles(rows, classes, student_width, teacher_width, input.element_size())

    def stride(x: torch.Tensor | None) -> int:
        return 0 if x is None else x.stride(0)

    strides = [stride(x) for x in (input, input_weight, target, target_weight)]
    grad_strides = [stride(x) for x in (*of_student, *of_teacher)]
    grads = (
        *of_student,
        grad_input_bias,
        *of_teacher,
        grad_target_bias,
        grad_input_temperature,
        grad_target_temperature,
    )
    backward = any(x is not None for x in grads)
    inputs = (
        input,
        input_weight,
        input_bias,
        target,
        target_weight,
        target_bias,
        labels,
        input_temperature,
        target_temperature,
        soft_scale,
        row_scale,
        mask,
    )
    scalars = (
        input_temperature_value,
        target_temperature_value,
        soft_scale_value,
        scale,
        first,
        second,
        mix,
        hard_weight,
        label_smoothing,
        z_loss,
        logit_mse,
        logit_scale,
        target_logit_scale,
        softcap,
        target_softcap,
    )
    shared = (
        target is not None
        and target_weight is not None
        and input.dtype == target.dtype
        and input_weight.data_ptr() == target_weight.data_ptr()
        and input_weight.shape == target_weight.shape
        and input_weight.stride() == target_weight.stride()
    )
    options = {
        "DIVERGENCE": divergence,
        "HARD": hard_weight != 0,
        "SMOOTH": hard_weight != 0 and label_smoothing != 0,
        "Z_LOSS": z_loss != 0,
        "MSE": logit_mse != 0,
        "SHARED": shared,
        "CAPPED": softcap != 0,
        "TARGET_CAPPED": target_softcap != 0,
        "BLOCK_M": cut.block_m,
        "BLOCK_K": cut.block_k,
        "STUDENT_VECTOR": vector_width(student_width, *strides[:2], *grad_strides[:2]),
        "TEACHER_VECTOR": vector_width(teacher_width, *strides[2:], *grad_strides[2:]),
    }
    sizes = (rows, classes, student_width, teacher_width)
    values = tuple(map(float, scalars))
    row_blocks, class_blocks = triton.cdiv(rows, cut.block_m), triton.cdiv(classes, cut.block_c)

    def programs(blocks: int, width: int, grad: torch.Tensor | None, narrow: torch.Tensor | None) -> int:
        if grad is not None:
            return blocks * triton.cdiv(width, cut.block_d)
        return blocks if narrow is not None else 0

    # Triton launches on the current device, which need not be the tensors' own.
    with torch.cuda.device_of(input):
        if backward:
            counts = (
                programs(row_blocks, student_width, grad_input, grad_input_temperature),
                programs(row_blocks, teacher_width, grad_target, grad_target_temperature),
                programs(class_blocks, student_width, grad_input_weight, grad_input_bias),
                programs(class_blocks, teacher_width, grad_target_weight, grad_target_bias),
            )
            linear_loss_bwd_kernel[(sum(counts),)](
                *inputs,
                statistics,
                grad_input,
                grad_input_weight,
                grad_input_bias,
                grad_target,
                grad_target_weight,
                grad_target_bias,
                grad_input_temperature,
                grad_target_temperature,
                *strides,
                *grad_strides,
                *sizes,
                *counts[:3],
                *values,
                **options,
                BLOCK_C=cut.block_c,
                STEP=cut.step,
                BLOCK_D=cut.block_d,
                num_warps=cut.backward_warps,
            )
        else:
            linear_loss_fwd_kernel[(row_blocks,)](
                *inputs,
                loss,
                terms,
                statistics,
                *strides,
                *sizes,
                *values,
                **options,
                BLOCK_N=cut.block_n,
                ONE_TILE=classes <= cut.block_n,
                num_warps=cut.forward_warps,
            )
