"""Row-wise KL divergence from a teacher known by k log-probabilities in Triton, with every gradient.

The formulas are those of TopkKlDivParams in csrc/kdkernels.h. With I the indices of a row, x = input / T,
Q = softmax(x), D_i = log P_i - log Q_i, P_r and Q_r what I leaves over, and W = sum_i P_i + P_r:

    bucket       dloss/dx_i = W Q_i - P_i, dloss/dx_j = (W Q_r - P_r) Q_j / Q_r outside I,
                 dloss/dlog P_i = P_i (D_i - D_r), or P_i (D_i + 1) where P_r = 0
    renormalize  the first two of kdkernels._triton.kl_div, over I alone
    drop         dloss/dx_j = W Q_j - P_j, dloss/dlog P_i = P_i (D_i + 1), with P_r = 0

Q_r is summed outside I, about its own maximum: which classes those are is a bit for each, set from the indices.
Where both sides sum to 1 the terms are P (D + e^-D - 1) >= 0, second order in D, so nothing cancels near convergence.

loss and grad_input read a row of at most 8192 classes once and write it once: 2 rows classes itemsize + O(rows k)
bytes. A longer row is read twice, once for the maximum and sums of exponentials, and once for grad_input; the loss
needs the first only. To renormalize, only I is read. The k classes of I are written once more. `bytes_moved` counts
them. Nothing is saved.
"""

from collections.abc import Collection

import torch
import triton
import triton.language as tl

from kdkernels._triton.rows import (
    LOG2E,
    LOWEST,
    Tile,
    kl_term,
    load_tile,
    log_of_ratio,
    per_row,
    store_per_row,
    store_tile,
    tile,
    vector_width,
)

# Tail in csrc/kdkernels.h.
BUCKET = tl.constexpr(0)
RENORMALIZE = tl.constexpr(1)
DROP = tl.constexpr(2)
_WORD = tl.constexpr(32)
_INDICES = tl.constexpr(16)  # looked for at a time


def _tile(classes: int, itemsize: int) -> Tile:
    chosen = tile(max(classes, _WORD.value), itemsize)
    # 4 KiB a step: a 16-byte load for every one of 256 threads.
    return chosen._replace(block_n=4096 // itemsize) if chosen.streamed else chosen


def bytes_moved(
    rows: int,
    classes: int,
    itemsize: int,
    k: int,
    tail: int,
    *,
    outputs: Collection[str] = ("loss", "grad_input"),
) -> int:
    """Bytes read and written for `outputs`; mask, row_scale and per-row temperatures left out."""
    grad = "grad_input" in outputs
    _, block_n, _, streamed = _tile(classes, itemsize)
    reads = 0 if tail == RENORMALIZE.value else 1 + (streamed and grad)
    # The indices come from the cache with each step.
    steps = -(-classes // block_n) if tail == BUCKET.value and k < classes else 0
    of_k = 4 + 8 * (1 + steps) + itemsize * (1 + grad) + 4 * ("grad_log_probs" in outputs)
    per_row = 4 * ("loss" in outputs) + 4 * ("grad_input_temperature" in outputs)
    return rows * ((reads + grad) * classes * itemsize + of_k * k + per_row)


@triton.jit
def _among(
    indices_ptr,  # (rows, k)
    row,  # (BLOCK_M,)
    live,  # (BLOCK_M,)
    k,
    start,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Whether each of the classes from `start` on is one of the row's indices: a bit each, 32 in a word.
    WORDS: tl.constexpr = BLOCK_N // _WORD
    words = tl.zeros((BLOCK_M, WORDS), tl.int32)
    at = tl.arange(0, WORDS)[None, :, None]
    for first in range(0, k, _INDICES):
        i = first + tl.arange(0, _INDICES)[None, :]
        inside = live[:, None] & (i < k)
        index = tl.load(indices_ptr + (row.to(tl.int64)[:, None] * k + i), mask=inside, other=-1) - start
        # Beyond the block, before it and not there: no word.
        index = tl.where((index >= 0) & (index < BLOCK_N), index, -1).to(tl.int32)[:, None, :]
        bit = tl.where((index >> 5) == at, 1 << (index & 31), 0)
        words |= tl.sum(bit, 2)
    bits = (words[:, :, None] >> tl.arange(0, _WORD)[None, None, :]) & 1
    return tl.reshape(bits, (BLOCK_M, BLOCK_N)) != 0


@triton.jit
def _add(
    maximum,  # (BLOCK_M, BLOCK_N)
    total,  # (BLOCK_M, BLOCK_N)
    moment,  # (BLOCK_M, BLOCK_N)
    x,  # (BLOCK_M, BLOCK_N)
    factor,  # (BLOCK_M, 1)
    MOMENT: tl.constexpr,
):
    # The sums of e^(z factor) and of z times that, z the logit less the maximum so far, of every lane.
    gap = tl.abs(x - maximum)
    e = tl.exp2(-gap * factor)
    rises = x > maximum
    if MOMENT:
        gap = tl.where(e > 0.0, gap, 0.0)
        moment = tl.where(rises, e * (moment - total * gap), moment - e * gap)
    return tl.maximum(maximum, x), tl.where(rises, total * e + 1.0, total + e), moment


# Integers are not specialised on their values: VECTOR says all that the generated code needs to know.
@triton.jit(do_not_specialize=["input_stride", "grad_stride", "rows", "classes", "k"])
def topk_kl_div_kernel(
    input_ptr,  # (rows, classes)
    log_probs_ptr,  # (rows, k) float32 contiguous
    indices_ptr,  # (rows, k) int64 contiguous
    input_temperature_ptr,  # (rows,) float32, or None: input_temperature_value
    row_scale_ptr,  # (rows,) float32, or None: scale
    mask_ptr,  # (rows,) bool, or None: every row counts
    loss_ptr,  # (rows,) float32 or None
    grad_input_ptr,  # (rows, classes) or None
    grad_log_probs_ptr,  # (rows, k) float32 contiguous or None
    grad_input_temperature_ptr,  # (rows,) float32 or None
    input_stride,
    grad_stride,
    rows,
    classes,
    k,
    input_temperature_value,
    scale,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VECTOR: tl.constexpr,
    STREAMED: tl.constexpr,
):
    MOMENT: tl.constexpr = grad_input_temperature_ptr is not None
    # The compiler cannot see that rows start and end on 16 bytes unless the multiplication is in sight.
    input_stride = (input_stride // VECTOR) * VECTOR
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
    grad_offset = row_offset * grad_stride
    block = tl.arange(0, BLOCK_N)[None, :]

    inverse = 1.0 / per_row(input_temperature_ptr, row, live, input_temperature_value)
    factor = inverse * LOG2E
    row_scale = per_row(row_scale_ptr, row, live, scale)

    # The classes of I.
    i = tl.arange(0, BLOCK_K)[None, :]
    k_offset = row_offset * k + i
    known = live_2d & (i < k)
    index = tl.load(indices_ptr + k_offset, mask=known, other=0)
    named = (index >= 0) & (index < classes)
    row_scale = tl.where(tl.min(named.to(tl.int32), 1)[:, None] == 0, float("nan"), row_scale)
    known = known & named
    log_p = tl.load(log_probs_ptr + k_offset, mask=known, other=0.0)
    s_i = tl.load(input_ptr + (input_offset + index), mask=known, other=0.0).to(tl.float32)
    # A row that is not read stays finite.
    log_p = tl.where(i < k, log_p, float("-inf"))
    s_i = tl.where(i < k, s_i, float("-inf"))
    max_i = tl.maximum(tl.max(s_i, 1)[:, None], LOWEST)

    # The maximum and sums of the classes outside I (of all, where the tail is dropped). A row in registers is one step.
    if STREAMED:
        end = classes
    else:
        end = 1
        s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if TAIL != RENORMALIZE:
            s = load_tile(input_ptr, input_offset, classes, live_2d, block)
    if TAIL != RENORMALIZE:
        lane_max = tl.full((BLOCK_M, BLOCK_N), LOWEST, tl.float32)
        lane_total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        lane_moment = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, end, BLOCK_N):
            if STREAMED:
                s = load_tile(input_ptr, input_offset, classes, live_2d, start + block)
            x = s
            if TAIL == BUCKET:
                x = tl.where(_among(indices_ptr, row, live, k, start, BLOCK_M, BLOCK_N), float("-inf"), s)
            lane_max, lane_total, lane_moment = _add(lane_max, lane_total, lane_moment, x, factor, MOMENT)
        max_r = tl.max(lane_max, 1)[:, None]
        fall = tl.exp2((lane_max - max_r) * factor)
        total_r = tl.sum(lane_total * fall, 1)[:, None]
        norm_r = tl.where(total_r == 0.0, 0.0, 1.0 / total_r)
        if MOMENT:
            moment = fall * (lane_moment + lane_total * tl.where(fall > 0.0, lane_max - max_r, 0.0))
            mean_r = tl.sum(moment, 1)[:, None] * norm_r

    # Loss, the gradients of I's x and log P, and that of the others: `rest` times their own softmax.
    max_p = tl.maximum(tl.max(log_p, 1)[:, None], LOWEST)
    quotient = (log_p - max_p) - (s_i - max_i) * inverse
    if TAIL == RENORMALIZE:
        origin = max_i
        e_p = tl.exp2((log_p - max_p) * LOG2E)
        e_q = tl.exp2((s_i - max_i) * factor)
        total_p = tl.sum(e_p, 1)[:, None]
        total_q = tl.sum(e_q, 1)[:, None]
        delta = quotient - log_of_ratio(total_p, total_q, tl.sum(kl_term(e_p, e_q, quotient)[1], 1)[:, None])
        p = e_p * (1.0 / total_p)
        excess, of_i = kl_term(p, e_q * (1.0 / total_q), delta)
        loss = tl.sum(excess, 1)[:, None]
        less = loss
    else:
        if TAIL == BUCKET:
            origin = tl.maximum(max_i, max_r)
            # What I and the others sum to on either side is few numbers, whose rounding would show: they are float64.
            rest_r = tl.sum((lane_total * fall).to(tl.float64), 1)[:, None]
            rest_r *= tl.exp((max_r - origin).to(tl.float64) * inverse.to(tl.float64))
            total_i = tl.sum(tl.exp2((s_i - origin) * factor).to(tl.float64), 1)[:, None]
            log_total = tl.log(total_i + rest_r)
            total = (total_i + rest_r).to(tl.float32)
        else:
            origin = max_r
            total = total_r
            log_total = tl.log(total)
        exact_p = tl.exp(log_p.to(tl.float64))
        p = exact_p.to(tl.float32)
        q = tl.exp2((s_i - origin) * factor) * (1.0 / total)
        # From the maxima, where what is close to each other is close to 0.
        offset = log_total - ((max_i - origin) * inverse - max_p)
        delta = quotient + offset.to(tl.float32)
        mass = tl.sum(p, 1)[:, None]
        if TAIL == BUCKET:
            q_r = (rest_r / (total_i + rest_r)).to(tl.float32)
            left_over = 1.0 - tl.sum(exact_p, 1)[:, None]
            left_over = tl.where(left_over < 0.0, 0.0, left_over)
            p_r = left_over.to(tl.float32)
            # A sum too small for any float has a logarithm all the same.
            log_q_r = ((max_r - origin) * inverse + tl.log(total_r)).to(tl.float64) - log_total
            log_q_r = tl.where(rest_r > 1e-30, tl.log(rest_r) - log_total, log_q_r)
            delta_r = (tl.log(left_over) - log_q_r).to(tl.float32)
            excess_r, difference_r = kl_term(p_r, q_r, delta_r)
            # Both sides sum to 1 only where something is left.
            left = p_r > 0.0
            excess, difference = kl_term(p, q, delta)
            plain = tl.sum(tl.where(p == 0.0, 0.0, p * delta), 1)[:, None]
            loss = tl.where(left, tl.sum(excess, 1)[:, None] + excess_r, plain)
            of_i = difference + tl.where(left, 0.0, mass - 1.0) * q
            rest = tl.where(left, difference_r, mass * q_r)
            less = tl.where(left, delta_r, -1.0)
        else:
            loss = tl.sum(tl.where(p == 0.0, 0.0, p * delta), 1)[:, None]
            of_i = mass * q - p
            rest = mass
            less = -1.0

    if loss_ptr is not None:
        store_per_row(loss_ptr, row, exists, live_2d, row_scale * loss)
    if grad_log_probs_ptr is not None:
        slope = tl.where(delta == float("inf"), delta, delta - less)
        of_log_p = row_scale * tl.where(p == 0.0, 0.0, p * slope)
        tl.store(grad_log_probs_ptr + k_offset, tl.where(live_2d, of_log_p, 0.0), mask=exists_2d & (i < k))
    if MOMENT:
        z = s_i - origin
        if TAIL == DROP:
            # What is P's among them; all of Q's is in the mean.
            moment = -tl.where(p == 0.0, 0.0, p * z)
        else:
            moment = tl.where(z == float("-inf"), 0.0, of_i * z)
        moment = tl.sum(moment, 1)[:, None]
        if TAIL != RENORMALIZE:
            moment += rest * tl.where(total_r > 0.0, mean_r + (max_r - origin), 0.0)
        slope = -row_scale * inverse * inverse * moment
        store_per_row(grad_input_temperature_ptr, row, exists, live_2d, slope)
    if grad_input_ptr is not None:
        grad_scale = row_scale * inverse
        last = (tl.cdiv(classes, BLOCK_N) - 1) * BLOCK_N
        for start in range(0, end, BLOCK_N):
            column = start + block
            if STREAMED:
                # Backwards, because the end of the row is what the cache still holds.
                column = last - start + block
            if TAIL == RENORMALIZE:
                grad = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            else:
                if STREAMED:
                    s = load_tile(input_ptr, input_offset, classes, live_2d, column)
                grad = (rest * norm_r) * tl.exp2((s - max_r) * factor)
            store_tile(grad_input_ptr, grad_offset, classes, exists_2d, live_2d, column, grad * grad_scale)
        # The classes of I, over what was just written there.
        tl.debug_barrier()
        tl.store(grad_input_ptr + (grad_offset + index), of_i * grad_scale, mask=known)


def topk_kl_div(
    input: torch.Tensor,  # (rows, classes), class stride 1
    log_probs: torch.Tensor,  # (rows, k) float32 contiguous
    indices: torch.Tensor,  # (rows, k) int64 contiguous
    input_temperature: torch.Tensor | None,  # (rows,) float32
    input_temperature_value: float,
    row_scale: torch.Tensor | None,  # (rows,) float32
    scale: float,
    mask: torch.Tensor | None,  # (rows,) bool
    tail: int,
    loss: torch.Tensor | None,  # (rows,) float32
    grad_input: torch.Tensor | None,  # (rows, classes), class stride 1
    grad_log_probs: torch.Tensor | None,  # (rows, k) float32 contiguous
    grad_input_temperature: torch.Tensor | None,  # (rows,) float32
) -> None:
    """Fill the outputs that are not None. A row whose mask is 0 is not read: its outputs are 0."""
    rows, classes = input.shape
    k = indices.shape[1]
    if tail == BUCKET.value and k == classes:
        tail = DROP.value  # nothing is left over
    input_stride, grad_stride = input.stride(0), 0 if grad_input is None else grad_input.stride(0)
    block_m, block_n, num_warps, streamed = _tile(classes, input.element_size())
    # Triton launches on the current device, which need not be the tensors' own.
    with torch.cuda.device_of(input):
        topk_kl_div_kernel[(triton.cdiv(rows, block_m),)](
            input,
            log_probs,
            indices,
            input_temperature,
            row_scale,
            mask,
            loss,
            grad_input,
            grad_log_probs,
            grad_input_temperature,
            input_stride,
            grad_stride,
            rows,
            classes,
            k,
            float(input_temperature_value),
            float(scale),
            TAIL=tail,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=triton.next_power_of_2(k),
            VECTOR=vector_width(classes, input_stride, grad_stride),
            STREAMED=streamed,
            num_warps=num_warps,
        )
