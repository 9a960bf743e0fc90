"""Row-wise KL divergence of tempered softmaxes in Triton, with every gradient.

With P = softmax(target / T_P), Q = softmax(input / T_Q) and D = log P - log Q, row by row:

    loss                    = sum_j P_j D_j = sum_j P_j (D_j + exp(-D_j) - 1)
    grad_input_j            = scale (Q_j - P_j) / T_Q
    grad_target_j           = scale P_j (D_j - loss) / T_P
    grad_input_temperature  = -scale / T_Q^2  sum_j (Q_j - P_j) input_j
    grad_target_temperature = -scale / T_P^2  sum_j P_j (D_j - loss) target_j

The second form of the loss has terms >= 0 that are second order in D, so nothing cancels near convergence.

A row of at most 8192 classes is read once: loss and grad_input move 3 rows classes itemsize + O(rows) bytes.
A longer row is streamed: once for the maxima and sums of exponentials, once for loss and grad_input, together
5 rows classes itemsize, and once more where the target's side needs the finished loss. `bytes_moved` counts
them. Nothing is saved.
"""

from collections.abc import Collection

import torch
import triton
import triton.language as tl

from kdkernels._triton.rows import (
    LOG2E,
    LOWEST,
    add_online,
    kl_term,
    load_tile,
    log_of_ratio,
    log_quotient_of_one_temperature,
    per_row,
    store_per_row,
    store_tile,
    tile,
    vector_width,
)


def bytes_moved(rows: int, classes: int, itemsize: int, *, grads: Collection[str] = ("grad_input",)) -> int:
    """Bytes read and written for the loss and `grads`; mask, row_scale and per-row temperatures left out."""
    target_side = "grad_target" in grads or "grad_target_temperature" in grads
    sweeps = (3 if target_side else 2) if tile(classes, itemsize).streamed else 1
    written = sum(name in grads for name in ("grad_input", "grad_target"))
    per_row = 1 + sum(name in grads for name in ("grad_input_temperature", "grad_target_temperature"))
    return rows * ((2 * sweeps + written) * classes * itemsize + 4 * per_row)


@triton.jit
def _log_quotient(
    s,  # (BLOCK_M, BLOCK_N)
    t,  # (BLOCK_M, BLOCK_N)
    max_q,  # (BLOCK_M, 1)
    max_p,  # (BLOCK_M, 1)
    inverse_q,  # (BLOCK_M, 1)
    inverse_p,  # (BLOCK_M, 1)
):
    equal = log_quotient_of_one_temperature(s, t, max_q, max_p, inverse_q)
    return equal + (t - max_p) * (inverse_p - inverse_q)


@triton.jit
def _target_gradient(
    p,  # (BLOCK_M, BLOCK_N)
    delta,  # (BLOCK_M, BLOCK_N)
    loss,  # (BLOCK_M, 1)
):
    # P (D - loss), where 0 inf = 0 and an infinite loss gives its one-sided limits.
    slope = tl.where(delta == float("inf"), delta, delta - loss)
    return tl.where(p == 0.0, 0.0, p * slope)


@triton.jit
def _moment(
    weight,  # (BLOCK_M, BLOCK_N)
    p,  # (BLOCK_M, BLOCK_N)
    x,  # (BLOCK_M, BLOCK_N)
    maximum,  # (BLOCK_M, 1)
):
    # Terms of sum_j w_j z_j and of mean z, z the logit less the row's maximum; 0 inf = 0.
    z = x - maximum
    return tl.where(weight == 0.0, 0.0, weight * z), tl.where((p == 0.0) | (z == float("-inf")), 0.0, p * z)


@triton.jit
def _centred(
    moment,  # (BLOCK_M, BLOCK_N)
    mean,  # (BLOCK_M, BLOCK_N)
    weight,  # (BLOCK_M, BLOCK_N)
):
    # The weights sum to 0 but for rounding, which puts each off by that much of P_j: that times the mean of z
    # is taken off. Only a streamed row needs it: the ratio of sums of one tile is exact near convergence.
    return tl.sum(moment, 1)[:, None] - tl.sum(mean, 1)[:, None] * tl.sum(weight, 1)[:, None]


# Integers are not specialised on their values: VECTOR says all that the generated code needs to know.
@triton.jit(do_not_specialize=["input_stride", "target_stride", "rows", "classes"])
def kl_div_fwd_kernel(
    input_ptr,  # (rows, classes)
    target_ptr,  # (rows, classes)
    input_temperature_ptr,  # (rows,) float32, or None: input_temperature_value
    target_temperature_ptr,  # (rows,) float32, or None: target_temperature_value
    row_scale_ptr,  # (rows,) float32, or None: scale
    mask_ptr,  # (rows,) bool, or None: every row counts
    loss_ptr,  # (rows,) float32 or None
    grad_input_ptr,  # (rows, classes) contiguous or None
    grad_target_ptr,  # (rows, classes) contiguous or None
    grad_input_temperature_ptr,  # (rows,) float32 or None
    grad_target_temperature_ptr,  # (rows,) float32 or None
    input_stride,
    target_stride,
    rows,
    classes,
    input_temperature_value,
    target_temperature_value,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    VECTOR: tl.constexpr,
    STREAMED: tl.constexpr,
):
    INPUT_MOMENT: tl.constexpr = grad_input_temperature_ptr is not None
    TARGET_MOMENT: tl.constexpr = grad_target_temperature_ptr is not None
    TARGET_SIDE: tl.constexpr = grad_target_ptr is not None or grad_target_temperature_ptr is not None
    # The compiler cannot see that rows start and end on 16 bytes unless the multiplication is in sight.
    input_stride = (input_stride // VECTOR) * VECTOR
    target_stride = (target_stride // VECTOR) * VECTOR
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
    output_offset = row_offset * classes
    block = tl.arange(0, BLOCK_N)[None, :]

    inverse_q = 1.0 / per_row(input_temperature_ptr, row, live, input_temperature_value)
    inverse_p = 1.0 / per_row(target_temperature_ptr, row, live, target_temperature_value)
    row_scale = per_row(row_scale_ptr, row, live, scale)
    factor_q = inverse_q * LOG2E
    factor_p = inverse_p * LOG2E

    if STREAMED:
        # A maximum and a sum per lane: no reduction across the block until the row has been seen.
        lane_max_q = tl.full((BLOCK_M, BLOCK_N), LOWEST, tl.float32)
        lane_max_p = tl.full((BLOCK_M, BLOCK_N), LOWEST, tl.float32)
        e_q = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        e_p = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, classes, BLOCK_N):
            s = load_tile(input_ptr, input_offset, classes, live_2d, start + block)
            t = load_tile(target_ptr, target_offset, classes, live_2d, start + block)
            lane_max_q, e_q = add_online(lane_max_q, e_q, s, factor_q)
            lane_max_p, e_p = add_online(lane_max_p, e_p, t, factor_p)
        max_q = tl.max(lane_max_q, 1)[:, None]
        max_p = tl.max(lane_max_p, 1)[:, None]
        e_q *= tl.exp2((lane_max_q - max_q) * factor_q)
        e_p *= tl.exp2((lane_max_p - max_p) * factor_p)
        e_difference = e_q - e_p
    else:
        s = load_tile(input_ptr, input_offset, classes, live_2d, block)
        t = load_tile(target_ptr, target_offset, classes, live_2d, block)
        max_q = tl.max(s, 1)[:, None]
        max_p = tl.max(t, 1)[:, None]
        e_q = tl.exp2((s - max_q) * factor_q)
        e_p = tl.exp2((t - max_p) * factor_p)
        quotient = _log_quotient(s, t, max_q, max_p, inverse_q, inverse_p)
        # The series leaves out even the rounding of the exponentials, which few classes do not average away.
        e_difference = kl_term(e_p, e_q, quotient)[1]

    total_q = tl.sum(e_q, 1)[:, None]
    total_p = tl.sum(e_p, 1)[:, None]
    log_ratio = log_of_ratio(total_p, total_q, tl.sum(e_difference, 1)[:, None])
    norm_q = 1.0 / total_q
    norm_p = 1.0 / total_p
    grad_scale_q = row_scale * inverse_q
    grad_scale_p = row_scale * inverse_p

    if STREAMED:
        loss_lanes = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if INPUT_MOMENT:
            moment_lanes = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            mean_lanes = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            weight_lanes = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        last = (tl.cdiv(classes, BLOCK_N) - 1) * BLOCK_N
        # Backwards, because the end of the row is what the cache still holds.
        for start in range(0, classes, BLOCK_N):
            column = last - start + block
            s = load_tile(input_ptr, input_offset, classes, live_2d, column)
            t = load_tile(target_ptr, target_offset, classes, live_2d, column)
            q = tl.exp2((s - max_q) * factor_q) * norm_q
            p = tl.exp2((t - max_p) * factor_p) * norm_p
            delta = _log_quotient(s, t, max_q, max_p, inverse_q, inverse_p) - log_ratio
            excess, difference = kl_term(p, q, delta)
            loss_lanes += excess
            if grad_input_ptr is not None:
                store_tile(
                    grad_input_ptr,
                    output_offset,
                    classes,
                    exists_2d,
                    live_2d,
                    column,
                    difference * grad_scale_q,
                )
            if INPUT_MOMENT:
                moment, mean = _moment(difference, p, s, max_q)
                moment_lanes += moment
                mean_lanes += mean
                weight_lanes += difference
        loss = tl.sum(loss_lanes, 1)[:, None]
        if INPUT_MOMENT:
            input_moment = _centred(moment_lanes, mean_lanes, weight_lanes)
    else:
        q = e_q * norm_q
        p = e_p * norm_p
        delta = quotient - log_ratio
        excess, difference = kl_term(p, q, delta)
        if grad_input_ptr is not None:
            store_tile(
                grad_input_ptr, output_offset, classes, exists_2d, live_2d, block, difference * grad_scale_q
            )
        loss = tl.sum(excess, 1)[:, None]
        if INPUT_MOMENT:
            input_moment = tl.sum(_moment(difference, p, s, max_q)[0], 1)[:, None]

    if loss_ptr is not None:
        store_per_row(loss_ptr, row, exists, live_2d, row_scale * loss)
    if INPUT_MOMENT:
        store_per_row(
            grad_input_temperature_ptr, row, exists, live_2d, -grad_scale_q * inverse_q * input_moment
        )

    if TARGET_SIDE:
        if STREAMED:
            if TARGET_MOMENT:
                moment_lanes = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                mean_lanes = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                weight_lanes = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for start in range(0, classes, BLOCK_N):
                s = load_tile(input_ptr, input_offset, classes, live_2d, start + block)
                t = load_tile(target_ptr, target_offset, classes, live_2d, start + block)
                p = tl.exp2((t - max_p) * factor_p) * norm_p
                delta = _log_quotient(s, t, max_q, max_p, inverse_q, inverse_p) - log_ratio
                weight = _target_gradient(p, delta, loss)
                if grad_target_ptr is not None:
                    store_tile(
                        grad_target_ptr,
                        output_offset,
                        classes,
                        exists_2d,
                        live_2d,
                        start + block,
                        weight * grad_scale_p,
                    )
                if TARGET_MOMENT:
                    moment, mean = _moment(weight, p, t, max_p)
                    moment_lanes += moment
                    mean_lanes += mean
                    weight_lanes += weight
            if TARGET_MOMENT:
                target_moment = _centred(moment_lanes, mean_lanes, weight_lanes)
        else:
            weight = _target_gradient(p, delta, loss)
            if grad_target_ptr is not None:
                store_tile(
                    grad_target_ptr, output_offset, classes, exists_2d, live_2d, block, weight * grad_scale_p
                )
            if TARGET_MOMENT:
                target_moment = tl.sum(_moment(weight, p, t, max_p)[0], 1)[:, None]
        if TARGET_MOMENT:
            store_per_row(
                grad_target_temperature_ptr, row, exists, live_2d, -grad_scale_p * inverse_p * target_moment
            )


def kl_div(
    input: torch.Tensor,  # (rows, classes), class stride 1
    target: torch.Tensor,  # (rows, classes), class stride 1
    input_temperature: torch.Tensor | None,  # (rows,) float32
    target_temperature: torch.Tensor | None,  # (rows,) float32
    input_temperature_value: float,
    target_temperature_value: float,
    row_scale: torch.Tensor | None,  # (rows,) float32
    scale: float,
    mask: torch.Tensor | None,  # (rows,) bool
    loss: torch.Tensor | None,  # (rows,) float32
    grad_input: torch.Tensor | None,  # (rows, classes) contiguous
    grad_target: torch.Tensor | None,  # (rows, classes) contiguous
    grad_input_temperature: torch.Tensor | None,  # (rows,) float32
    grad_target_temperature: torch.Tensor | None,  # (rows,) float32
) -> None:
    """Fill the outputs that are not None. A row whose mask is 0 is not read: its outputs are 0."""
    rows, classes = input.shape
    input_stride, target_stride = input.stride(0), target.stride(0)
    block_m, block_n, num_warps, streamed = tile(classes, input.element_size())
    # Triton launches on the current device, which need not be the tensors' own.
    with torch.cuda.device_of(input):
        kl_div_fwd_kernel[(triton.cdiv(rows, block_m),)](
            input,
            target,
            input_temperature,
            target_temperature,
            row_scale,
            mask,
            loss,
            grad_input,
            grad_target,
            grad_input_temperature,
            grad_target_temperature,
            input_stride,
            target_stride,
            rows,
            classes,
            float(input_temperature_value),
            float(target_temperature_value),
            float(scale),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            VECTOR=vector_width(classes, input_stride, target_stride),
            STREAMED=streamed,
            num_warps=num_warps,
        )
