"""Losses from two rows of logits in Triton: a soft term, cross-entropy, z-loss and MSE, with the input's gradient.

The formulas are those of LogitLossParams in csrc/kdkernels.h. With x = z f_Q, f_Q = 1 / T_Q (divided by 1e-7 + std
where the logits are standardized), Q = softmax(x) and D = log P - log Q, every soft term has the gradient

    dsoft/dx_j = w_j - Q_j sum_k w_k

where w_j is Q_j - P_j for KL(P||Q), whose sum is 0, -Q_j D_j for KL(Q||P), and so on (divergence.py). Where a label
is taken apart, P and Q are over the other classes, summed without it, and the label's own logit u, P_y = 1 / (1 +
e^-u), is its logit less the others' log-sum-exp. Standardizing is a factor for each row, and one more term of the
gradient: with g the gradient for a fixed std, z_j - mean times -sum_k g_k (z_k - mean) / ((n - 1) std (std + 1e-7)).

A row of at most 8192 classes (4096 where more is made of it, see `_tile`) is read once: loss and grad_input move
3 rows classes itemsize + O(rows) bytes, or 2 where neither soft term nor MSE reads the target. A longer row is
streamed: once for the spread where it is standardized, once for the sums of exponentials, once for the loss, and once
more for a gradient that needs sums which the loss's sweep finishes (every standardized one, and those with sum_k w_k
!= 0). `bytes_moved` counts them. Nothing is saved. What is stored of the gradient is not read again in the input.
"""

from collections.abc import Collection

import torch
import triton
import triton.language as tl

from kdkernels._triton.divergence import (
    DECOUPLED,
    MIXTURE,
    NONE,
    NORMALIZED,
    REVERSE_DECOUPLED,
    REVERSE_KL,
    REVERSE_NORMALIZED,
    STATISTICS,
    TOTAL_VARIATION,
    divergence_term,
    log1p,
    log_quotient,
    logit_difference,
    times,
    towards,
)
from kdkernels._triton.rows import (
    LOG2E,
    LOWEST,
    Tile,
    add_online,
    kl_term,
    load_tile,
    log_of_ratio,
    per_row,
    second_order_ratio,
    store_per_row,
    store_tile,
    tile,
    vector_width,
)

_OF_LABELS = (5, 6, 7, 8)
_WITHOUT_SUM = (0, 1, 5, 7, 9)  # sum_k w_k is 0: the loss's sweep can store the gradient
_SPREAD_EPS = tl.constexpr(1e-7)


def _tile(classes: int, itemsize: int, divergence: int, standardize: bool, mse: bool) -> Tile:
    # What a row makes more of spills where it is longer than half of what others hold, or in steps of 8 KiB.
    if divergence in (0, 1, 2, 4) and not standardize and not mse:
        return tile(classes, itemsize)
    if classes > 4096:
        return Tile(1, 4096 // itemsize, 4, True)
    return tile(classes, itemsize)


def bytes_moved(
    rows: int,
    classes: int,
    itemsize: int,
    divergence: int,
    *,
    standardize: bool = False,
    hard: bool = False,
    mse: bool = False,
    grad_itemsize: int | None = None,
    outputs: Collection[str] = ("loss", "grad_input"),
) -> int:
    """Bytes read and written for `outputs`; mask and the scales and temperatures of rows left out."""
    soft, grad = divergence != 0, "grad_input" in outputs
    reads = 2 if soft or mse else 1
    standardize = standardize and soft
    if _tile(classes, itemsize, divergence, standardize, mse).streamed:
        later = grad and (standardize or divergence not in _WITHOUT_SUM)
        # The first sums of exponentials take the target for a soft term only, and nothing for the MSE alone.
        sums = 2 if soft else int(hard or not mse)
        reads = sums * (int(standardize) + 1) + reads * (int(soft or mse or grad) + int(later))
    labels = 0
    if divergence in _OF_LABELS or hard:
        labels = 8 + itemsize * (2 if divergence in _OF_LABELS else 1)
    per_row = sum({"loss": 4, "terms": 20, "grad_input_temperature": 4}.get(name, 0) for name in outputs)
    moved = reads * itemsize + (grad_itemsize or itemsize if grad else 0)
    return rows * (moved * classes + labels + per_row)


@triton.jit
def _exponential(
    z,  # (BLOCK_M, BLOCK_N): a logit less its row's maximum
    factor,  # (BLOCK_M, 1)
    FLAT: tl.constexpr,
):
    e = tl.exp2(z * factor)
    if FLAT:  # the factor may be 0
        e = tl.where(z == float("-inf"), 0.0, e)
    return e


@triton.jit
def _spread(
    x,  # (BLOCK_M, BLOCK_N)
    origin,  # (BLOCK_M, 1)
):
    # Of the logits that are not -inf: their number, mean less the origin, and distances from the mean.
    finite = x > float("-inf")
    count = tl.sum(tl.where(finite, 1.0, 0.0), 1)[:, None]
    centre = tl.sum(tl.where(finite, x - origin, 0.0), 1)[:, None] / count
    return count, centre, tl.where(finite, (x - origin) - centre, 0.0)


@triton.jit
def _add_spreads(
    count_q,  # (BLOCK_M, BLOCK_N), here and below
    count_p,
    mean_q,
    mean_p,
    mean_apart,
    squares_q,
    squares_p,
    products,
    s,
    t,
):
    # Welford's update of every lane: squares about the means, and products of (t - s) and (t + s) about theirs.
    finite_q = s > float("-inf")
    finite_p = t > float("-inf")
    count_q += tl.where(finite_q, 1.0, 0.0)
    count_p += tl.where(finite_p, 1.0, 0.0)
    from_q = tl.where(finite_q, s - mean_q, 0.0)
    from_p = tl.where(finite_p, t - mean_p, 0.0)
    step_q = from_q / tl.maximum(count_q, 1.0)
    step_p = from_p / tl.maximum(count_p, 1.0)
    squares_q += from_q * (from_q - step_q)
    squares_p += from_p * (from_p - step_p)
    apart = tl.where(finite_q | finite_p, logit_difference(s, t) - mean_apart, 0.0)
    products += apart * ((from_q - step_q) + (from_p - step_p))
    mean_apart += apart / tl.maximum(count_q, 1.0)
    return count_q, count_p, mean_q + step_q, mean_p + step_p, mean_apart, squares_q, squares_p, products


@triton.jit
def _merge_mean(
    lane_count,  # (BLOCK_M, BLOCK_N)
    lane_mean,  # (BLOCK_M, BLOCK_N)
    origin,  # (BLOCK_M, 1)
):
    # As _spread, of lanes.
    count = tl.sum(lane_count, 1)[:, None]
    centre = tl.sum(tl.where(lane_count > 0.0, lane_count * (lane_mean - origin), 0.0), 1)[:, None] / count
    return count, centre, tl.where(lane_count > 0.0, (lane_mean - origin) - centre, 0.0)


@triton.jit
def _std(
    count,  # (BLOCK_M, 1)
    squares,  # (BLOCK_M, 1)
):
    # The std, 1 / (1e-7 + std), and 1 / ((n - 1) std (1e-7 + std)); these are 0 for a row without spread, whose
    # squares are exactly 0.
    spreads = (count >= 2.0) & (squares > 0.0)
    freedom = tl.where(spreads, count - 1.0, 1.0)
    std = tl.sqrt(tl.where(spreads, squares, 1.0) / freedom)
    gain = tl.where(spreads, 1.0 / (_SPREAD_EPS + std), 0.0)
    return std, gain, gain / (freedom * std)


@triton.jit
def _logistic(u):
    return 1.0 / (1.0 + tl.exp2(-u * LOG2E))


@triton.jit
def _surprisal(
    x,  # (BLOCK_M, BLOCK_N)
    maximum,  # (BLOCK_M, 1)
    total,  # (BLOCK_M, 1)
    inverse,  # (BLOCK_M, 1)
):
    # -log of a probability; `inverse` may be 0.
    return tl.where(x == float("-inf"), float("inf"), tl.log(total) - (x - maximum) * inverse)


@triton.jit
def _label_logit(
    x,  # (BLOCK_M, 1)
    maximum,  # (BLOCK_M, 1)
    total,  # (BLOCK_M, 1)
    inverse,  # (BLOCK_M, 1)
):
    return tl.where(x == float("-inf"), x, (x - maximum) * inverse - tl.log(total))


@triton.jit
def _softplus(u):
    return tl.maximum(u, 0.0) + log1p(tl.exp2(-tl.abs(u) * LOG2E))[0]


@triton.jit
def _of_label(
    u_p,  # (BLOCK_M, 1)
    u_q,  # (BLOCK_M, 1)
    d,  # (BLOCK_M, 1): u_p - u_q
    REVERSE: tl.constexpr,
):
    # KL between the label and all others, probabilities 1 / (1 + e^-u), and its derivative with respect to u_q.
    p = _logistic(u_p)
    q = _logistic(u_q)
    not_p = _logistic(-u_p)
    not_q = _logistic(-u_q)
    # q - p as a product, of which nothing cancels.
    magnitude = tl.minimum(tl.abs(d), 1e4)
    near = magnitude < 0.5
    x = tl.where(near, magnitude, 0.0)
    fall = tl.where(near, x * x * second_order_ratio(x) - x, tl.exp2(-magnitude * LOG2E) - 1.0)
    difference = tl.where(d >= 0.0, p * not_q, -q * not_p) * fall
    log_p_q = tl.where(near, 0.0, _softplus(-u_q) - _softplus(-u_p))
    log_not = tl.where(near, 0.0, _softplus(u_q) - _softplus(u_p))
    if REVERSE:
        series = towards(q, -difference)[0] + towards(not_q, difference)[0]
        far = -times(q, log_p_q) - times(not_q, log_not)
        slope = -times(q * not_q, d)
    else:
        series = towards(p, difference)[0] + towards(not_p, -difference)[0]
        far = times(p, log_p_q) + times(not_p, log_not)
        slope = difference
    return tl.where(near, series, far), slope


# Integers are not specialised on their values: VECTOR says all that the generated code needs to know.
@triton.jit(do_not_specialize=["input_stride", "target_stride", "grad_stride", "rows", "classes"])
def logit_loss_kernel(
    input_ptr,  # (rows, classes)
    target_ptr,  # (rows, classes), or None where DIVERGENCE is NONE and not MSE
    labels_ptr,  # (rows,) int64, or None where nothing needs them
    input_temperature_ptr,  # (rows,) float32, or None: input_temperature_value
    target_temperature_ptr,  # (rows,) float32, or None: target_temperature_value
    soft_scale_ptr,  # (rows,) float32, or None: soft_scale_value
    row_scale_ptr,  # (rows,) float32, or None: scale
    mask_ptr,  # (rows,) bool, or None: every row counts
    loss_ptr,  # (rows,) float32 or None
    terms_ptr,  # (5, rows) float32 or None
    grad_input_ptr,  # (rows, classes), which may be input_ptr, or None
    grad_input_temperature_ptr,  # (rows,) float32 or None
    input_stride,
    target_stride,
    grad_stride,
    rows,
    classes,
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
    DIVERGENCE: tl.constexpr,
    STANDARDIZE: tl.constexpr,
    HARD: tl.constexpr,
    SMOOTH: tl.constexpr,
    Z_LOSS: tl.constexpr,
    MSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    VECTOR: tl.constexpr,
    STREAMED: tl.constexpr,
):
    SOFT: tl.constexpr = DIVERGENCE != NONE
    OF_DECOUPLED: tl.constexpr = DIVERGENCE == DECOUPLED or DIVERGENCE == REVERSE_DECOUPLED
    OF_NORMALIZED: tl.constexpr = DIVERGENCE == NORMALIZED or DIVERGENCE == REVERSE_NORMALIZED
    # P and Q leave the label's class out.
    APART: tl.constexpr = OF_DECOUPLED or OF_NORMALIZED
    REVERSED: tl.constexpr = DIVERGENCE == REVERSE_DECOUPLED or DIVERGENCE == REVERSE_NORMALIZED
    WEIGHTS_HAVE_SUM: tl.constexpr = (
        DIVERGENCE == REVERSE_KL or DIVERGENCE == MIXTURE or DIVERGENCE == TOTAL_VARIATION or REVERSED
    )
    GRAD: tl.constexpr = grad_input_ptr is not None
    SOFT_GRAD: tl.constexpr = SOFT and DIVERGENCE != STATISTICS
    MOMENT: tl.constexpr = SOFT_GRAD and (
        grad_input_temperature_ptr is not None or (STANDARDIZE and grad_input_ptr is not None)
    )
    # The softmax of the logits as they are, and that at temperature 1 of what the soft term takes.
    CROSS: tl.constexpr = HARD or Z_LOSS
    PLAIN: tl.constexpr = CROSS or (OF_NORMALIZED and not STANDARDIZE)
    UNIT: tl.constexpr = OF_NORMALIZED and STANDARDIZE
    # Whether the sweep that sums can store the gradient too.
    TOGETHER: tl.constexpr = not (SOFT_GRAD and (WEIGHTS_HAVE_SUM or STANDARDIZE))
    SWEEPS: tl.constexpr = 2 if GRAD and not TOGETHER else 1 if GRAD or SOFT or MSE else 0
    ONLINE: tl.constexpr = STREAMED and not STANDARDIZE

    # The compiler cannot see that rows start and end on 16 bytes unless the multiplication is in sight.
    input_stride = (input_stride // VECTOR) * VECTOR
    target_stride = (target_stride // VECTOR) * VECTOR
    grad_stride = (grad_stride // VECTOR) * VECTOR
    classes = (classes // VECTOR) * VECTOR

    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < rows
    live = exists
    if mask_ptr is not None:
        live = exists & (tl.load(mask_ptr + row, mask=exists, other=0) != 0)
    exists_2d = exists[:, None]
    live_2d = live[:, None]
    row_offset = row.to(tl.int64)[:, None]
    input_offset = row_offset * input_stride
    target_offset = row_offset * target_stride
    grad_offset = row_offset * grad_stride
    block = tl.arange(0, BLOCK_N)[None, :]

    temperature = per_row(input_temperature_ptr, row, live, input_temperature_value)
    inverse_q = 1.0 / temperature
    inverse_p = 1.0 / per_row(target_temperature_ptr, row, live, target_temperature_value)
    inverse_gap = inverse_p - inverse_q
    soft_scale = per_row(soft_scale_ptr, row, live, soft_scale_value)
    row_scale = per_row(row_scale_ptr, row, live, scale)

    if HARD or APART:
        label = tl.load(labels_ptr + row, mask=live, other=0)[:, None]
        named = (label >= 0) & (label < classes)
        row_scale = tl.where(named, row_scale, float("nan"))
        label_s = tl.load(input_ptr + (input_offset + label), mask=live_2d & named, other=0.0).to(tl.float32)
        if APART:
            label_t = tl.load(target_ptr + (target_offset + label), mask=live_2d & named, other=0.0).to(
                tl.float32
            )
            # No distribution has it; apart from the others it would not show.
            infinite = (label_s == float("inf")) | (label_t == float("inf"))
            row_scale = tl.where(infinite, float("nan"), row_scale)
        label = tl.where(named, label, 0).to(tl.int32)

    # A row in registers is one step of every sweep.
    if STREAMED:
        end = classes
    else:
        end = 1
        s = load_tile(input_ptr, input_offset, classes, live_2d, block)
        if SOFT or MSE:
            t = load_tile(target_ptr, target_offset, classes, live_2d, block)

    # Maxima (of the classes other than the label's, where that is apart), and online the sums of exponentials.
    if STREAMED:
        lane_max_q = tl.full((BLOCK_M, BLOCK_N), LOWEST, tl.float32)
        lane_max_p = tl.full((BLOCK_M, BLOCK_N), LOWEST, tl.float32)
        zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if STANDARDIZE:
            count_q, mean_q, squares_q, products = zeros, zeros, zeros, zeros
            count_p, mean_p, squares_p, mean_apart = zeros, zeros, zeros, zeros
        else:
            e_q, e_p, e_plain, e_unit_p = zeros, zeros, zeros, zeros
            if SMOOTH:
                smooth, smooth_count = zeros, zeros
        for start in range(0, classes if SOFT or PLAIN else 0, BLOCK_N):
            s = load_tile(input_ptr, input_offset, classes, live_2d, start + block)
            x = tl.where(start + block == label, float("-inf"), s) if APART else s
            if SOFT:
                t = load_tile(target_ptr, target_offset, classes, live_2d, start + block)
                y = tl.where(start + block == label, float("-inf"), t) if APART else t
            if STANDARDIZE:
                count_q, count_p, mean_q, mean_p, mean_apart, squares_q, squares_p, products = _add_spreads(
                    count_q, count_p, mean_q, mean_p, mean_apart, squares_q, squares_p, products, s, t
                )
                lane_max_q = tl.maximum(lane_max_q, x)
                lane_max_p = tl.maximum(lane_max_p, y)
            else:
                higher = lane_max_q
                if PLAIN:
                    higher, e_plain = add_online(lane_max_q, e_plain, x, LOG2E)
                if SOFT:
                    higher, e_q = add_online(lane_max_q, e_q, x, inverse_q * LOG2E)
                    if OF_NORMALIZED:
                        _, e_unit_p = add_online(lane_max_p, e_unit_p, y, LOG2E)
                    lane_max_p, e_p = add_online(lane_max_p, e_p, y, inverse_p * LOG2E)
                lane_max_q = higher
                if SMOOTH:
                    smooth += tl.where(s > float("-inf"), s, 0.0)
                    smooth_count += tl.where(s > float("-inf"), 1.0, 0.0)
        max_q = tl.max(lane_max_q, 1)[:, None]
        max_p = tl.max(lane_max_p, 1)[:, None]
    else:
        x = tl.where(block == label, float("-inf"), s) if APART else s
        # Finite even where the label's is the only class.
        max_q = tl.maximum(tl.max(x, 1)[:, None], LOWEST)
        max_p = max_q
        if SOFT:
            y = tl.where(block == label, float("-inf"), t) if APART else t
            max_p = tl.maximum(tl.max(y, 1)[:, None], LOWEST)

    gain_q = 1.0
    centre = 0.0
    if STANDARDIZE:
        if STREAMED:
            lane_count_q, lane_count_p = count_q, count_p
            count_q, centre, from_q = _merge_mean(count_q, mean_q, max_q)
            count_p, _, from_p = _merge_mean(count_p, mean_p, max_p)
            squares_q += lane_count_q * from_q * from_q
            squares_p += lane_count_p * from_p * from_p
            _, _, apart = _merge_mean(lane_count_q, mean_apart, max_p - max_q)
            products += lane_count_q * apart * (from_p + from_q)
        else:
            count_q, centre, from_q = _spread(s, max_q)
            count_p, centre_p, from_p = _spread(t, max_p)
            squares_q = from_q * from_q
            squares_p = from_p * from_p
            apart = (logit_difference(s, t) - (max_p - max_q)) - (centre_p - centre)
            nowhere = (s == float("-inf")) & (t == float("-inf"))
            products = tl.where(nowhere, 0.0, apart * (from_p + from_q))
        std_q, gain_q, correction = _std(count_q, tl.sum(squares_q, 1)[:, None])
        std_p, gain_p, _ = _std(count_p, tl.sum(squares_p, 1)[:, None])
        # The gains' difference from that of the variances, sum (t - s) (t + s) about the means: exact where s and t
        # are close. It is not a number where other classes are masked in one than in the other.
        products = tl.sum(products, 1)[:, None]
        gap = -gain_p * gain_q * products / ((std_p + std_q) * tl.maximum(count_q - 1.0, 1.0))
        gap = tl.where(tl.abs(products) < float("inf"), gap, gain_p - gain_q)
        inverse_gap = inverse_gap * gain_p + inverse_q * gap
        inverse_q *= gain_q
        inverse_p *= gain_p
        unit_q = gain_q * LOG2E
        unit_p = gain_p * LOG2E
    else:
        gain_p = 1.0
        unit_p = LOG2E
    factor_q = inverse_q * LOG2E
    factor_p = inverse_p * LOG2E

    # Sums of exponentials.
    if ONLINE:
        e_q *= tl.exp2((lane_max_q - max_q) * factor_q)
        e_p *= tl.exp2((lane_max_p - max_p) * factor_p)
        e_plain *= tl.exp2((lane_max_q - max_q) * LOG2E)
        e_unit_p *= tl.exp2((lane_max_p - max_p) * LOG2E)
        e_difference = e_q - e_p
    else:
        zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        e_q, e_p, e_difference, e_plain, e_unit_q, e_unit_p = zeros, zeros, zeros, zeros, zeros, zeros
        if SMOOTH:
            smooth, smooth_count = zeros, zeros
        for start in range(0, end, BLOCK_N):
            if STREAMED:
                s = load_tile(input_ptr, input_offset, classes, live_2d, start + block)
                t = load_tile(target_ptr, target_offset, classes, live_2d, start + block)
            x = tl.where(start + block == label, float("-inf"), s) if APART else s
            if PLAIN:
                e_plain += tl.exp2((x - max_q) * LOG2E)
            if SMOOTH:
                smooth += tl.where(s > float("-inf"), s, 0.0)
                smooth_count += tl.where(s > float("-inf"), 1.0, 0.0)
            if SOFT:
                y = tl.where(start + block == label, float("-inf"), t) if APART else t
                e_s = _exponential(x - max_q, factor_q, STANDARDIZE)
                e_t = _exponential(y - max_p, factor_p, STANDARDIZE)
                e_q += e_s
                e_p += e_t
                # The series leaves out even the rounding of the exponentials, which few classes do not average away.
                e_difference += kl_term(
                    e_t, e_s, log_quotient(x, y, max_q, max_p, inverse_q, inverse_p, inverse_gap)
                )[1]
                if OF_NORMALIZED:
                    e_unit_p += _exponential(y - max_p, unit_p, STANDARDIZE)
                if UNIT:
                    e_unit_q += _exponential(x - max_q, unit_q, STANDARDIZE)

    if SOFT:
        total_q = tl.sum(e_q, 1)[:, None]
        total_p = tl.sum(e_p, 1)[:, None]
        log_ratio = log_of_ratio(total_p, total_q, tl.sum(e_difference, 1)[:, None])
        norm_q = 1.0 / total_q
        norm_p = 1.0 / total_p
        if APART:
            others_q = total_q != 0.0
            others_p = total_p != 0.0
            log_ratio = tl.where(others_q & others_p, log_ratio, 0.0)
            norm_q = tl.where(others_q, norm_q, 0.0)
            norm_p = tl.where(others_p, norm_p, 0.0)
    # The maximum of all classes, and sums over them, where the label's was apart.
    top_q = max_q
    if PLAIN:
        total_plain = tl.sum(e_plain, 1)[:, None]
    if APART:
        top_q = tl.maximum(max_q, label_s)
        if PLAIN:
            total_plain *= tl.exp2((max_q - top_q) * LOG2E)
            total_plain += tl.exp2((label_s - top_q) * LOG2E)

    # What a row knows before its loss is summed.
    hard = 0.0
    square = 0.0
    plain_weight = 0.0
    label_weight = 0.0
    if CROSS:
        log_total = tl.log(total_plain)
        if HARD:
            named_logit = times(1.0 - label_smoothing, label_s - top_q)
            label_weight -= row_scale * hard_weight * (1.0 - label_smoothing)
            if SMOOTH:
                smooth_count = tl.sum(smooth_count, 1)[:, None]
                named_logit += label_smoothing * (tl.sum(smooth, 1)[:, None] / smooth_count - top_q)
                smooth_weight = row_scale * hard_weight * label_smoothing / smooth_count
            hard = hard_weight * (log_total - named_logit)
            plain_weight += row_scale * hard_weight
        if Z_LOSS:
            lse = top_q + log_total
            square = z_loss * lse * lse
            plain_weight += row_scale * 2.0 * z_loss * lse
    soft_weight = row_scale * soft_scale * inverse_q
    part = 0.0
    if OF_DECOUPLED:
        u_q = _label_logit(label_s, max_q, total_q, inverse_q)
        u_p = _label_logit(label_t, max_p, total_p, inverse_p)
        d = log_quotient(label_s, label_t, max_q, max_p, inverse_q, inverse_p, inverse_gap) - log_ratio
        d = tl.where(others_q, d, float("-inf"))
        d = tl.where(others_p, d, tl.where(others_q, float("inf"), 0.0))
        part, pull = _of_label(u_p, u_q, d, REVERSED)
        part = soft_scale * times(first, part)
        pull = tl.where(others_q, times(first, pull), 0.0)
        label_weight += soft_weight * pull
    if OF_NORMALIZED:
        # At temperature 1.
        top_p = tl.maximum(max_p, label_t)
        e_label_p = _exponential(label_t - top_p, unit_p, STANDARDIZE)
        total_unit_p = tl.sum(e_unit_p, 1)[:, None] * tl.exp2((max_p - top_p) * unit_p) + e_label_p
        if UNIT:
            e_label_q = _exponential(label_s - top_q, unit_q, STANDARDIZE)
            total_unit_q = tl.sum(e_unit_q, 1)[:, None] * tl.exp2((max_q - top_q) * unit_q) + e_label_q
            unit_norm = 1.0 / total_unit_q
        else:
            e_label_q = tl.exp2((label_s - top_q) * LOG2E)
            total_unit_q = total_plain
        if REVERSED:
            part = _surprisal(label_t, top_p, total_unit_p, gain_p)
            part = times(first, times(e_label_q / total_unit_q, part))
            pull = tl.where(part == float("inf"), 0.0, -part)
        else:
            pull = first * (e_label_p / total_unit_p)
            part = times(pull, _surprisal(label_s, top_q, total_unit_q, gain_q))
        unit_weight = row_scale * gain_q * pull
        label_weight -= unit_weight
        if not UNIT:
            plain_weight += unit_weight
    if APART:
        # Without another class there is nothing to match.
        of_others = tl.where(others_p & others_q, second, 0.0)
    if PLAIN:
        plain_weight = plain_weight / total_plain

    weight_sum = 0.0
    spread_weight = 0.0
    mse = 0.0
    mse_weight = row_scale * (2.0 * logit_mse / classes)
    if GRAD and (HARD or APART):
        # In the input's place no warp may store before all have read the label's logit.
        tl.debug_barrier()
    last = (tl.cdiv(classes, BLOCK_N) - 1) * BLOCK_N
    for SWEEP in tl.static_range(SWEEPS):
        if SWEEP == 0 and SOFT:
            zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            loss_lanes, weight_lanes = zeros, zeros
            if MOMENT:
                moment_lanes, mean_lanes, unit_lanes = zeros, zeros, zeros
            if DIVERGENCE == STATISTICS:
                entropy_p, entropy_q, overlap = zeros, zeros, zeros
                first_p = tl.zeros((BLOCK_M, BLOCK_N), tl.int32) + classes
                first_q = first_p
        if SWEEP == 0 and MSE:
            gap_lanes = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, end, BLOCK_N):
            column = block
            if STREAMED:
                # To and fro, because the end of the row is what the cache still holds.
                column += last - start if (SWEEP == 0) != STANDARDIZE else start
                s = load_tile(input_ptr, input_offset, classes, live_2d, column)
                if SOFT or MSE:
                    t = load_tile(target_ptr, target_offset, classes, live_2d, column)
            if SOFT:
                x = tl.where(column == label, float("-inf"), s) if APART else s
                y = tl.where(column == label, float("-inf"), t) if APART else t
                q = _exponential(x - max_q, factor_q, STANDARDIZE) * norm_q
                p = _exponential(y - max_p, factor_p, STANDARDIZE) * norm_p
                delta = log_quotient(x, y, max_q, max_p, inverse_q, inverse_p, inverse_gap) - log_ratio
                surprisal = delta
                if DIVERGENCE == NORMALIZED:
                    surprisal = _surprisal(x, max_q, total_q, inverse_q)
                if DIVERGENCE == REVERSE_NORMALIZED:
                    surprisal = _surprisal(y, max_p, total_p, inverse_p)
                term, weight = divergence_term(p, q, delta, surprisal, first, second, mix, DIVERGENCE)
                if SWEEP == 0:
                    loss_lanes += term
                    if WEIGHTS_HAVE_SUM or MOMENT:
                        weight_lanes += weight
                    if MOMENT:
                        z = (s - max_q) - centre
                        # A masked class has no part in them.
                        z = tl.where(s == float("-inf"), 0.0, z)
                        moment_lanes += weight * z
                        mean_lanes += q * z
                        if UNIT:
                            unit_lanes += _exponential(s - top_q, unit_q, STANDARDIZE) * z
                    if DIVERGENCE == STATISTICS:
                        entropy_p += times(p, _surprisal(y, max_p, total_p, inverse_p))
                        entropy_q += times(q, _surprisal(x, max_q, total_q, inverse_q))
                        overlap += tl.minimum(p, q)
                        first_p = tl.minimum(first_p, tl.where(t == max_p, column, classes))
                        first_q = tl.minimum(first_q, tl.where(s == max_q, column, classes))
            if MSE:
                gap = logit_difference(t, s)
                if SWEEP == 0:
                    gap_lanes += gap * gap
            if GRAD and (SWEEP == 1 or TOGETHER):
                grad = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                if SOFT_GRAD:
                    if WEIGHTS_HAVE_SUM:
                        # An infinite loss gives its one-sided limits.
                        limit = tl.where(q == 0.0, 0.0, weight - q * weight_sum)
                        weight = tl.where(weight == float("inf"), weight, limit)
                    if APART:
                        weight = times(of_others, weight)
                    if OF_DECOUPLED:
                        weight -= times(q, pull)
                    grad = soft_weight * weight
                    if UNIT:
                        grad += (unit_weight * unit_norm) * _exponential(s - top_q, unit_q, STANDARDIZE)
                    if STANDARDIZE:
                        grad -= tl.where(s > float("-inf"), spread_weight * ((s - max_q) - centre), 0.0)
                if PLAIN:
                    grad += plain_weight * tl.exp2((s - top_q) * LOG2E)
                if SMOOTH:
                    grad -= tl.where(s > float("-inf"), smooth_weight, 0.0)
                if MSE:
                    grad += mse_weight * gap
                if HARD or APART:
                    grad += tl.where(column == label, label_weight, 0.0)
                store_tile(grad_input_ptr, grad_offset, classes, exists_2d, live_2d, column, grad)
        if SWEEP == 0 and MSE:
            mse = tl.sum(gap_lanes, 1)[:, None] * (logit_mse / classes)
        if SWEEP == 0 and SOFT:
            loss = tl.sum(loss_lanes, 1)[:, None]
            if WEIGHTS_HAVE_SUM or MOMENT:
                weight_sum = tl.sum(weight_lanes, 1)[:, None]
            if MOMENT:
                mean = tl.sum(mean_lanes, 1)[:, None]
                moment = tl.sum(moment_lanes, 1)[:, None] - weight_sum * mean
                # An infinite loss has none.
                moment = tl.where(weight_sum == float("inf"), 0.0, moment)
                z = (label_s - max_q) - centre if APART else 0.0
                if APART:
                    moment = times(of_others, moment)
                if OF_DECOUPLED:
                    moment += times(pull, z - mean)
                moment *= soft_weight
                if STANDARDIZE:
                    of_spread = moment
                    if UNIT:
                        unit_mean = tl.sum(unit_lanes, 1)[:, None] * unit_norm
                        of_spread += times(unit_weight, unit_mean - z)
                    of_spread = tl.where(tl.abs(of_spread) < float("inf"), of_spread, 0.0)
                    spread_weight = correction * of_spread

    soft = 0.0
    if SOFT:
        if APART:
            one_sided = others_q & ~others_p if REVERSED else others_p & ~others_q
            loss = tl.where(others_p & others_q, loss, tl.where(one_sided, float("inf"), 0.0))
            loss = times(second, loss)
        soft = soft_scale * loss + part
    if loss_ptr is not None:
        store_per_row(loss_ptr, row, exists, live_2d, row_scale * (soft + hard + square + mse))
    if terms_ptr is not None:
        if DIVERGENCE == STATISTICS:
            agree = tl.min(first_p, 1)[:, None] == tl.min(first_q, 1)[:, None]
            of_row = (
                row_scale * tl.sum(entropy_p, 1)[:, None],
                row_scale * tl.sum(entropy_q, 1)[:, None],
                row_scale * tl.sum(overlap, 1)[:, None],
                row_scale * tl.where(agree, 1.0, 0.0),
                row_scale * 0.0,
            )
        else:
            of_row = (
                row_scale * soft,
                row_scale * hard,
                row_scale * square,
                row_scale * part,
                row_scale * mse,
            )
        for index in tl.static_range(5):
            store_per_row(terms_ptr + index * rows, row, exists, live_2d, of_row[index])
    if grad_input_temperature_ptr is not None:
        slope = -moment / temperature if MOMENT else row_scale * 0.0
        store_per_row(grad_input_temperature_ptr, row, exists, live_2d, slope)


def logit_loss(
    input: torch.Tensor,  # (rows, classes), class stride 1
    target: torch.Tensor | None,  # (rows, classes), class stride 1
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
    standardize: bool,
    hard_weight: float,
    label_smoothing: float,
    z_loss: float,
    logit_mse: float,
    loss: torch.Tensor | None,  # (rows,) float32
    terms: torch.Tensor | None,  # (5, rows) float32
    grad_input: torch.Tensor | None,  # (rows, classes), class stride 1, any dtype; may be input
    grad_input_temperature: torch.Tensor | None,  # (rows,) float32
) -> None:
    """Fill the outputs that are not None. A row whose mask is 0 is not read: its outputs are 0."""
    rows, classes = input.shape
    strides = [0 if x is None else x.stride(0) for x in (input, target, grad_input)]
    standardize = bool(standardize) and divergence != 0
    block_m, block_n, num_warps, streamed = _tile(
        classes, input.element_size(), divergence, standardize, logit_mse != 0
    )
    # Triton launches on the current device, which need not be the tensors' own.
    with torch.cuda.device_of(input):
        logit_loss_kernel[(triton.cdiv(rows, block_m),)](
            input,
            target,
            labels,
            input_temperature,
            target_temperature,
            soft_scale,
            row_scale,
            mask,
            loss,
            terms,
            grad_input,
            grad_input_temperature,
            *strides,
            rows,
            classes,
            float(input_temperature_value),
            float(target_temperature_value),
            float(soft_scale_value),
            float(scale),
            float(first),
            float(second),
            float(mix),
            float(hard_weight),
            float(label_smoothing),
            float(z_loss),
            float(logit_mse),
            DIVERGENCE=divergence,
            STANDARDIZE=standardize,
            HARD=hard_weight != 0,
            SMOOTH=hard_weight != 0 and label_smoothing != 0,
            Z_LOSS=z_loss != 0,
            MSE=logit_mse != 0,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            VECTOR=vector_width(classes, *strides),
            STREAMED=streamed,
            num_warps=num_warps,
        )
