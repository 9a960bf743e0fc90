"""Pooling of two maps and their squared distance; formulas in kdkernels.ops.pool_mse.

Forward: 2 reads. Backward: 2 reads and 1 write a side; without an upstream gradient of the distances the writes
alone.
"""

import math
from collections.abc import Collection
from typing import NamedTuple

import torch
import triton
import triton.language as tl

OUTPUTS = ("pooled_student", "pooled_teacher", "mse", "grad_student", "grad_teacher")


class Tile(NamedTuple):
    """A program takes block_c channels by block_p positions, and walks along the positions."""

    block_c: int
    block_p: int


def tile(channels: int, positions: int, channels_last: bool) -> Tile:
    """1024 elements, 8 a thread: 16 bytes even in half precision, along what lies side by side."""
    channels, positions = triton.next_power_of_2(channels), triton.next_power_of_2(positions)
    if channels_last:
        block_c = min(channels, 1024 // min(16, positions))
        return Tile(block_c, min(positions, 1024 // block_c))
    block_p = min(positions, 1024)
    return Tile(min(channels, 1024 // block_p), block_p)


def bytes_moved(
    batch: int,
    channels: int,
    positions: int,
    itemsize: int,
    *,
    outputs: Collection[str] = OUTPUTS[:3],
    upstream: Collection[str] = ("grad_mse",),
    pieces: int = 1,
    channels_last: bool = False,
) -> int:
    """Bytes read and written for `outputs` from the gradients `upstream`; mask left out."""
    maps = batch * channels * positions * itemsize
    if "mse" in outputs:
        return 2 * maps + batch * (2 * channels * itemsize + 4 * pieces)
    passes = len(outputs) + (2 if "grad_mse" in upstream else 0)
    sides = [name for name in outputs if f"grad_pooled_{name.removeprefix('grad_')}" in upstream]
    pooled = batch * channels * itemsize * len(sides)
    programs = batch * triton.cdiv(channels, tile(channels, positions, channels_last).block_c)
    return passes * maps + pooled + (4 * programs if "grad_mse" in upstream else 0)


# Integers are not specialised on their values: VECTOR says all that the generated code needs to know.
@triton.jit(do_not_specialize=["channels", "positions", "pieces"])
def pool_mse_fwd_kernel(
    student_ptr,  # (batch, channels, positions), or (batch, positions, channels)
    teacher_ptr,  # the same
    mask_ptr,  # (batch,) or None
    pooled_student_ptr,  # (batch, channels)
    pooled_teacher_ptr,  # (batch, channels)
    mse_ptr,  # (batch, pieces) float32
    channels,
    positions,
    pieces,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    VECTOR: tl.constexpr,
):
    # The compiler cannot see that rows start and end on 16 bytes unless the multiplication is in sight.
    if CHANNELS_LAST:
        channels = (channels // VECTOR) * VECTOR
    else:
        positions = (positions // VECTOR) * VECTOR
    sample = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    live = True
    if mask_ptr is not None:
        live = tl.load(mask_ptr + sample) != 0
    first = sample * channels * positions
    squares = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for start in range(piece * BLOCK_C, channels, pieces * BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        exists = channel < channels
        student_sum = tl.zeros((BLOCK_C,), tl.float32)
        teacher_sum = tl.zeros((BLOCK_C,), tl.float32)
        # Not more than 32 values meet a sum before it meets a longer one.
        for run in range(0, positions, 32 * BLOCK_P):
            student_run = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
            teacher_run = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
            for begin in range(run, tl.minimum(run + 32 * BLOCK_P, positions), BLOCK_P):
                position = begin + tl.arange(0, BLOCK_P)
                inside = live & exists[:, None] & (position < positions)[None, :]
                if CHANNELS_LAST:
                    offset = first + (position[None, :] * channels + channel[:, None])
                else:
                    offset = first + (channel[:, None] * positions + position[None, :])
                s = tl.load(student_ptr + offset, mask=inside, other=0.0).to(tl.float32)
                t = tl.load(teacher_ptr + offset, mask=inside, other=0.0).to(tl.float32)
                student_run += s
                teacher_run += t
                squares += (s - t) * (s - t)
            student_sum += tl.sum(student_run, 1)
            teacher_sum += tl.sum(teacher_run, 1)
        pooled = sample * channels + channel
        tl.store(pooled_student_ptr + pooled, student_sum / positions, mask=exists)
        tl.store(pooled_teacher_ptr + pooled, teacher_sum / positions, mask=exists)
    total = tl.sum(tl.sum(squares, 1), 0)
    tl.store(mse_ptr + sample * pieces + piece, total / channels / positions)


@triton.jit(do_not_specialize=["channels", "positions"])
def pool_mse_bwd_kernel(
    student_ptr,  # (batch, channels, positions), or (batch, positions, channels)
    teacher_ptr,  # the same
    mask_ptr,  # (batch,) or None
    grad_pooled_student_ptr,  # (batch, channels) or None
    grad_pooled_teacher_ptr,  # (batch, channels) or None
    grad_mse_ptr,  # (batch,) float32 or None
    grad_student_ptr,  # as student, or None
    grad_teacher_ptr,  # as student, or None
    channels,
    positions,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    VECTOR: tl.constexpr,
):
    if CHANNELS_LAST:
        channels = (channels // VECTOR) * VECTOR
    else:
        positions = (positions // VECTOR) * VECTOR
    sample = tl.program_id(0).to(tl.int64)
    live = True
    if mask_ptr is not None:
        live = tl.load(mask_ptr + sample) != 0
    first = sample * channels * positions
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = channel < channels
    student_bias = tl.zeros((BLOCK_C,), tl.float32)
    teacher_bias = tl.zeros((BLOCK_C,), tl.float32)
    pooled = sample * channels + channel
    if grad_student_ptr is not None and grad_pooled_student_ptr is not None:
        student_bias += tl.load(grad_pooled_student_ptr + pooled, mask=live & exists, other=0.0).to(
            tl.float32
        )
    if grad_teacher_ptr is not None and grad_pooled_teacher_ptr is not None:
        teacher_bias += tl.load(grad_pooled_teacher_ptr + pooled, mask=live & exists, other=0.0).to(
            tl.float32
        )
    student_bias = student_bias / positions
    teacher_bias = teacher_bias / positions
    scale = 0.0
    if grad_mse_ptr is not None:
        scale = 2.0 * tl.load(grad_mse_ptr + sample, mask=live, other=0.0) / channels / positions
    for begin in range(0, positions, BLOCK_P):
        position = begin + tl.arange(0, BLOCK_P)
        inside = exists[:, None] & (position < positions)[None, :]
        if CHANNELS_LAST:
            offset = first + (position[None, :] * channels + channel[:, None])
        else:
            offset = first + (channel[:, None] * positions + position[None, :])
        slope = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
        if grad_mse_ptr is not None:
            s = tl.load(student_ptr + offset, mask=live & inside, other=0.0).to(tl.float32)
            t = tl.load(teacher_ptr + offset, mask=live & inside, other=0.0).to(tl.float32)
            slope = scale * (s - t)
        if grad_student_ptr is not None:
            tl.store(grad_student_ptr + offset, student_bias[:, None] + slope, mask=inside)
        if grad_teacher_ptr is not None:
            tl.store(grad_teacher_ptr + offset, teacher_bias[:, None] - slope, mask=inside)


def pool_mse(
    student: torch.Tensor,  # (batch, channels, *spatial), contiguous or channels last
    teacher: torch.Tensor,  # as student
    mask: torch.Tensor | None,  # (batch,)
    grad_pooled_student: torch.Tensor | None,  # (batch, channels)
    grad_pooled_teacher: torch.Tensor | None,  # (batch, channels)
    grad_mse: torch.Tensor | None,  # (batch,) float32
    pooled_student: torch.Tensor | None,  # (batch, channels)
    pooled_teacher: torch.Tensor | None,  # (batch, channels)
    mse: torch.Tensor | None,  # (batch,), or (batch, pieces) that add up to it; float32
    grad_student: torch.Tensor | None,  # as student
    grad_teacher: torch.Tensor | None,  # as student
) -> None:
    """Fill the outputs that are not None: the first three together, of the others those wanted."""
    batch, channels, *spatial = student.shape
    positions = math.prod(spatial)
    channels_last = positions == 1 or not student.is_contiguous()
    block_c, block_p = tile(channels, positions, channels_last)
    layout = {
        "CHANNELS_LAST": channels_last,
        "BLOCK_C": block_c,
        "BLOCK_P": block_p,
        "VECTOR": math.gcd(16, channels if channels_last else positions),
        "num_warps": 4,
    }
    with torch.cuda.device_of(student):
        if mse is not None:
            pieces = mse.shape[1] if mse.dim() == 2 else 1
            pool_mse_fwd_kernel[(batch, pieces)](
                student,
                teacher,
                mask,
                pooled_student,
                pooled_teacher,
                mse,
                channels,
                positions,
                pieces,
                **layout,
            )
        if grad_student is not None or grad_teacher is not None:
            pool_mse_bwd_kernel[(batch, triton.cdiv(channels, block_c))](
                student,
                teacher,
                mask,
                grad_pooled_student,
                grad_pooled_teacher,
                grad_mse,
                grad_student,
                grad_teacher,
                channels,
                positions,
                **layout,
            )
