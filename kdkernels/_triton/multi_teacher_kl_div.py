"""Weighted sum of row-wise KL divergences from several teachers in Triton, with the input's gradient.

With P_k = softmax(target_k / T_k), Q_k = softmax(input / T_k) and D_k = log P_k - log Q_k, row by row:

    losses_k   = sum_j P_kj D_kj = sum_j P_kj (D_kj + exp(-D_kj) - 1)
    loss       = sum_k weight_k losses_k
    grad_input = sum_k weight_k (Q_k - P_k) / T_k

The second form of the losses has terms >= 0 that are second order in D, so nothing cancels near convergence.

A row of at most 8192 classes is read once: loss and grad_input move (K + 2) rows classes itemsize + O(K rows) bytes
for K teachers. A longer row is streamed: once for the maxima and sums of exponentials, which takes the input with
each four of the teachers, and once for losses and grad_input. `bytes_moved` counts them. Nothing is saved.
"""

from collections.abc import Collection, Sequence

import torch
import triton
import triton.language as tl

from kdkernels._triton.rows import (
    LOG2E,
    LOWEST,
    Tile,
    add_online,
    kl_term,
    load_tile,
    log_of_ratio,
    log_quotient_of_one_temperature,
    store_per_row,
    store_tile,
    tile,
    vector_width,
)

# Teachers whose maxima and sums are carried along a streamed row at a time: 3 registers and more each an element.
_TOGETHER = tl.constexpr(4)


def _tile(classes: int, itemsize: int) -> Tile:
    chosen = tile(classes, itemsize)
    # 4 KiB of each input a step: a 16-byte load for every one of 256 threads.
    return chosen._replace(block_n=4096 // itemsize) if chosen.streamed else chosen


def bytes_moved(
    rows: int,
    classes: int,
    itemsize: int,
    teachers: int,
    *,
    outputs: Collection[str] = ("loss", "grad_input"),
) -> int:
    """Bytes read and written for `outputs`; masks and the temperatures and weights of rows left out."""
    reads = teachers + 1
    if _tile(classes, itemsize).streamed:
        reads += teachers + -(-teachers // _TOGETHER.value)
    per_row = sum({"loss": 4, "losses": 4 * teachers}.get(name, 0) for name in outputs)
    return rows * ((reads + ("grad_input" in outputs)) * classes * itemsize + per_row)


@triton.jit
def _of_teacher(
    ptr,  # (teachers, rows) or None
    strides,  # of teachers, of rows
    teacher,
    row,  # (BLOCK_M,)
    live,  # (BLOCK_M,)
    value,
):
    if ptr is None:
        result = tl.zeros_like(row).to(tl.float32) + value
    else:
        offset = row.to(tl.int64) * strides[1] + tl.cast(strides[0], tl.int64) * teacher
        result = tl.load(ptr + offset, mask=live, other=1.0)
    return result[:, None]


@triton.jit
def _weighted(
    counts,  # (BLOCK_M, 1)
    weight,  # (BLOCK_M, 1)
    loss,  # (BLOCK_M, 1)
):
    # 0 inf = 0.
    return tl.where(counts & (weight != 0.0), weight * loss, 0.0)


# Integers are not specialised on their values: VECTOR says all that the generated code needs to know.
@triton.jit(
    do_not_specialize=[
        "input_stride",
        "target_strides",
        "temperature_strides",
        "weight_strides",
        "teacher_mask_strides",
        "rows",
        "classes",
    ]
)
def multi_teacher_kl_div_kernel(
    input_ptr,  # (rows, classes)
    target_ptrs,  # a tuple of (rows, classes)
    temperature_ptr,  # (teachers, rows) float32, or None: temperature_values
    weight_ptr,  # (teachers, rows) float32, or None: weight_values
    teacher_mask_ptr,  # (teachers, rows) bool, or None: every teacher counts
    mask_ptr,  # (rows,) bool, or None: every row counts
    loss_ptr,  # (rows,) float32 or None
    losses_ptr,  # (teachers, rows) float32 or None
    grad_input_ptr,  # (rows, classes) contiguous or None
    input_stride,
    target_strides,  # a tuple
    temperature_strides,  # of teachers, of rows; here and below
    weight_strides,
    teacher_mask_strides,
    rows,
    classes,
    temperature_values,  # a tuple
    weight_values,  # a tuple
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    VECTOR: tl.constexpr,
    STREAMED: tl.constexpr,
):
    TEACHERS: tl.constexpr = len(target_ptrs)
    # The compiler cannot see that rows start and end on 16 bytes unless the multiplication is in sight.
    input_stride = (input_stride // VECTOR) * VECTOR
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
    output_offset = row_offset * classes
    block = tl.arange(0, BLOCK_N)[None, :]

    loss = tl.zeros((BLOCK_M, 1), tl.float32)

    if STREAMED:
        # Of each teacher: whether it counts, where its rows are, 1 / T, weight.
        counts = ()
        offsets = ()
        inverses = ()
        weights = ()
        for k in tl.static_range(TEACHERS):
            temperature = _of_teacher(
                temperature_ptr, temperature_strides, k, row, live, temperature_values[k]
            )
            weight = _of_teacher(weight_ptr, weight_strides, k, row, live, weight_values[k])
            if teacher_mask_ptr is None:
                counts += (live_2d,)
            else:
                counts += (
                    live_2d & (_of_teacher(teacher_mask_ptr, teacher_mask_strides, k, row, live, 1) != 0),
                )
            offsets += (row_offset * ((target_strides[k] // VECTOR) * VECTOR),)
            inverses += (1.0 / temperature,)
            weights += (tl.where(counts[k], weight, 0.0),)
        zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        lowest = tl.full((BLOCK_M, BLOCK_N), LOWEST, tl.float32)
        # A maximum and a sum per lane: no reduction across the block until the row has been seen.
        maxima_p = ()
        norms_q = ()
        norms_p = ()
        log_ratios = ()
        for of_group in tl.static_range(0, TEACHERS, _TOGETHER):
            lane_max_q = lowest
            lane_max_p = (lowest, lowest, lowest, lowest)
            e_q = (zeros, zeros, zeros, zeros)
            e_p = (zeros, zeros, zeros, zeros)
            for start in range(0, classes, BLOCK_N):
                s = load_tile(input_ptr, input_offset, classes, live_2d, start + block)
                next_max_p = ()
                next_e_q = ()
                next_e_p = ()
                for i in tl.static_range(_TOGETHER):
                    maximum, lane_q, lane_p = lane_max_p[i], e_q[i], e_p[i]
                    if of_group + i < TEACHERS:
                        t = load_tile(
                            target_ptrs[of_group + i],
                            offsets[of_group + i],
                            classes,
                            counts[of_group + i],
                            start + block,
                        )
                        factor = inverses[of_group + i] * LOG2E
                        _, lane_q = add_online(lane_max_q, lane_q, s, factor)
                        maximum, lane_p = add_online(maximum, lane_p, t, factor)
                    next_max_p += (maximum,)
                    next_e_q += (lane_q,)
                    next_e_p += (lane_p,)
                lane_max_q = tl.maximum(lane_max_q, s)
                lane_max_p = next_max_p
                e_q = next_e_q
                e_p = next_e_p
            max_q = tl.max(lane_max_q, 1)[:, None]
            for i in tl.static_range(_TOGETHER):
                if of_group + i < TEACHERS:
                    factor = inverses[of_group + i] * LOG2E
                    max_p = tl.max(lane_max_p[i], 1)[:, None]
                    lanes_q = e_q[i] * tl.exp2((lane_max_q - max_q) * factor)
                    lanes_p = e_p[i] * tl.exp2((lane_max_p[i] - max_p) * factor)
                    total_q = tl.sum(lanes_q, 1)[:, None]
                    total_p = tl.sum(lanes_p, 1)[:, None]
                    maxima_p += (max_p,)
                    norms_q += (1.0 / total_q,)
                    norms_p += (1.0 / total_p,)
                    log_ratios += (log_of_ratio(total_p, total_q, tl.sum(lanes_q - lanes_p, 1)[:, None]),)

        loss_lanes = zeros
        losses_lanes = ()
        if losses_ptr is not None:
            for _ in tl.static_range(TEACHERS):
                losses_lanes += (zeros,)
        last = (tl.cdiv(classes, BLOCK_N) - 1) * BLOCK_N
        # Backwards, because the end of the row is what the cache still holds.
        for start in range(0, classes, BLOCK_N):
            column = last - start + block
            s = load_tile(input_ptr, input_offset, classes, live_2d, column)
            grad = zeros
            next_losses = ()
            for k in tl.static_range(TEACHERS):
                t = load_tile(target_ptrs[k], offsets[k], classes, counts[k], column)
                factor = inverses[k] * LOG2E
                q = tl.exp2((s - max_q) * factor) * norms_q[k]
                p = tl.exp2((t - maxima_p[k]) * factor) * norms_p[k]
                delta = log_quotient_of_one_temperature(s, t, max_q, maxima_p[k], inverses[k]) - log_ratios[k]
                excess, difference = kl_term(p, q, delta)
                if losses_ptr is None:
                    loss_lanes += tl.where(weights[k] != 0.0, weights[k] * excess, 0.0)
                else:
                    next_losses += (losses_lanes[k] + excess,)
                grad += difference * (weights[k] * inverses[k])
            if losses_ptr is not None:
                losses_lanes = next_losses
            if grad_input_ptr is not None:
                store_tile(grad_input_ptr, output_offset, classes, exists_2d, live_2d, column, grad)
        if losses_ptr is None:
            loss = tl.sum(loss_lanes, 1)[:, None]
        else:
            for k in tl.static_range(TEACHERS):
                loss_k = tl.sum(losses_lanes[k], 1)[:, None]
                store_per_row(losses_ptr + k * rows, row, exists, counts[k], loss_k)
                loss += _weighted(counts[k], weights[k], loss_k)
    else:
        s = load_tile(input_ptr, input_offset, classes, live_2d, block)
        max_q = tl.max(s, 1)[:, None]
        grad = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        # Not unrolled: the teachers would be read at once, and spilt.
        for k in range(TEACHERS):
            target_ptr, target_stride = target_ptrs[0], target_strides[0]
            temperature, weight = temperature_values[0], weight_values[0]
            for other in tl.static_range(1, TEACHERS):
                target_ptr = tl.where(k == other, target_ptrs[other], target_ptr)
                target_stride = tl.where(k == other, target_strides[other], target_stride)
                temperature = tl.where(k == other, temperature_values[other], temperature)
                weight = tl.where(k == other, weight_values[other], weight)
            inverse = 1.0 / _of_teacher(temperature_ptr, temperature_strides, k, row, live, temperature)
            counts = live_2d
            if teacher_mask_ptr is not None:
                counts &= _of_teacher(teacher_mask_ptr, teacher_mask_strides, k, row, live, 1) != 0
            weight = tl.where(counts, _of_teacher(weight_ptr, weight_strides, k, row, live, weight), 0.0)
            target_offset = row_offset * ((target_stride // VECTOR) * VECTOR)
            t = load_tile(target_ptr, target_offset, classes, counts, block)
            max_p = tl.max(t, 1)[:, None]
            factor = inverse * LOG2E
            e_q = tl.exp2((s - max_q) * factor)
            e_p = tl.exp2((t - max_p) * factor)
            quotient = log_quotient_of_one_temperature(s, t, max_q, max_p, inverse)
            total_q = tl.sum(e_q, 1)[:, None]
            total_p = tl.sum(e_p, 1)[:, None]
            # The series leaves out even the rounding of the exponentials, which few classes do not average away.
            total_difference = tl.sum(kl_term(e_p, e_q, quotient)[1], 1)[:, None]
            delta = quotient - log_of_ratio(total_p, total_q, total_difference)
            excess, difference = kl_term(e_p * (1.0 / total_p), e_q * (1.0 / total_q), delta)
            loss_k = tl.sum(excess, 1)[:, None]
            if losses_ptr is not None:
                store_per_row(losses_ptr + k * rows, row, exists, counts, loss_k)
            loss += _weighted(counts, weight, loss_k)
            grad += difference * (weight * inverse)
        if grad_input_ptr is not None:
            store_tile(grad_input_ptr, output_offset, classes, exists_2d, live_2d, block, grad)
    if loss_ptr is not None:
        store_per_row(loss_ptr, row, exists, live_2d, loss)


def multi_teacher_kl_div(
    input: torch.Tensor,  # (rows, classes), class stride 1
    targets: Sequence[torch.Tensor],  # teachers of (rows, classes), class stride 1
    temperature: torch.Tensor | None,  # (teachers, rows) float32, any strides
    temperature_values: Sequence[float],  # teachers
    weight: torch.Tensor | None,  # (teachers, rows) float32, any strides
    weight_values: Sequence[float],  # teachers
    teacher_mask: torch.Tensor | None,  # (teachers, rows) bool, any strides
    mask: torch.Tensor | None,  # (rows,) bool
    loss: torch.Tensor | None,  # (rows,) float32
    losses: torch.Tensor | None,  # (teachers, rows) float32 contiguous
    grad_input: torch.Tensor | None,  # (rows, classes) contiguous
) -> None:
    """Fill the outputs that are not None. A row whose mask is 0 is not read, nor a teacher's whose teacher_mask is."""
    rows, classes = input.shape
    input_stride, target_strides = input.stride(0), tuple(target.stride(0) for target in targets)
    per_teacher = (temperature, weight, teacher_mask)
    block_m, block_n, num_warps, streamed = _tile(classes, input.element_size())
    # Triton launches on the current device, which need not be the tensors' own.
    with torch.cuda.device_of(input):
        multi_teacher_kl_div_kernel[(triton.cdiv(rows, block_m),)](
            input,
            tuple(targets),
            *per_teacher,
            mask,
            loss,
            losses,
            grad_input,
            input_stride,
            target_strides,
            *((0, 0) if x is None else tuple(x.stride()) for x in per_teacher),
            rows,
            classes,
            tuple(map(float, temperature_values)),
            tuple(map(float, weight_values)),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            VECTOR=vector_width(classes, input_stride, *target_strides),
            STREAMED=streamed,
            num_warps=num_warps,
        )
