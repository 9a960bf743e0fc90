"""Squared differences of feature maps under one weight map; formulas in kdkernels.ops.masked_feature_loss.

2 reads of the features, and 1 write where the student's gradient is wanted. A program's share of the loss, and of the
map's gradient where a sample's channels are split, is added up by torch, in one order.
"""

import math
from collections.abc import Collection
from typing import NamedTuple

import torch
import triton
import triton.language as tl

OUTPUTS = ("loss", "grad_student", "squares")


class Tile(NamedTuple):
    """A program takes block_p positions of a sample and walks along one of `pieces` of its channels."""

    block_c: int
    block_p: int
    pieces: int


def tile(samples: int, channels: int, positions: int) -> Tile:
    """1024 elements, 8 a thread: 16 bytes even in half precision. Channels are split where programs are few."""
    block_p = min(128, triton.next_power_of_2(positions))
    block_c = min(1024 // block_p, triton.next_power_of_2(channels))
    programs = samples * triton.cdiv(positions, block_p)
    return Tile(block_c, block_p, max(1, min(1024 // programs, channels // (8 * block_c))))


def bytes_moved(
    samples: int, channels: int, positions: int, itemsize: int, *, outputs: Collection[str] = OUTPUTS
) -> int:
    """Bytes read and written for `outputs`, less the sums of the programs' shares."""
    _, block_p, pieces = tile(samples, channels, positions)
    passes = 3 if "grad_student" in outputs else 2
    maps = pieces * samples * positions * 4
    shares = pieces * samples * triton.cdiv(positions, block_p) * 4
    return passes * samples * channels * positions * itemsize + maps * (1 + ("squares" in outputs)) + shares


# Integers are not specialised on their values: VECTOR says all that the generated code needs to know.
@triton.jit(do_not_specialize=["samples", "channels", "positions", "pieces"])
def masked_feature_loss_kernel(
    student_ptr,  # (samples, channels, positions)
    teacher_ptr,  # (samples, channels, positions)
    weight_map_ptr,  # (samples, positions) float32
    loss_ptr,  # (samples, blocks of positions, pieces) float32
    grad_student_ptr,  # (samples, channels, positions) or None
    squares_ptr,  # (pieces, samples, positions) float32 or None
    samples,
    channels,
    positions,
    pieces,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    VECTOR: tl.constexpr,
):
    # The compiler cannot see that rows start and end on 16 bytes unless the multiplication is in sight.
    positions = (positions // VECTOR) * VECTOR
    sample = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    piece = tl.program_id(2)
    position = block * BLOCK_P + tl.arange(0, BLOCK_P)
    exists = position < positions
    weight = tl.load(weight_map_ptr + (sample * positions + position), mask=exists, other=0.0)
    first = sample * channels * positions
    squares = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for start in range(piece * BLOCK_C, channels, pieces * BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        inside = (channel < channels)[:, None] & exists[None, :]
        offset = first + (channel[:, None].to(tl.int64) * positions + position[None, :])
        s = tl.load(student_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        t = tl.load(teacher_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        difference = s - t
        squares += difference * difference
        if grad_student_ptr is not None:
            tl.store(grad_student_ptr + offset, 2.0 * weight[None, :] * difference, mask=inside)
    total = tl.sum(squares, 0)
    if squares_ptr is not None:
        here = (piece * samples + sample) * positions + position
        tl.store(squares_ptr + here, total, mask=exists)
    share = tl.sum(weight * total, 0)
    tl.store(loss_ptr + (sample * tl.num_programs(1) + block) * pieces + piece, share)


def masked_feature_loss(
    student: torch.Tensor,  # (N, C, H, W) contiguous
    teacher: torch.Tensor,  # (N, C, H, W) contiguous
    weight_map: torch.Tensor,  # (N, H, W) float32, contiguous
    loss: torch.Tensor,  # () float32
    grad_student: torch.Tensor | None,  # (N, C, H, W) contiguous
    squares: torch.Tensor | None,  # (N, H, W) float32, contiguous
) -> None:
    """Fill the outputs that are not None."""
    samples, channels, *spatial = student.shape
    positions = math.prod(spatial)
    if not samples * positions:
        loss.zero_()
        return
    block_c, block_p, pieces = tile(samples, channels, positions)
    blocks = triton.cdiv(positions, block_p)
    shares = weight_map.new_empty(samples, blocks, pieces)
    maps = squares
    if squares is not None and pieces > 1:
        maps = squares.new_empty(pieces, *squares.shape)
    with torch.cuda.device_of(student):
        masked_feature_loss_kernel[(samples, blocks, pieces)](
            student,
            teacher,
            weight_map,
            shares,
            grad_student,
            maps,
            samples,
            channels,
            positions,
            pieces,
            BLOCK_C=block_c,
            BLOCK_P=block_p,
            VECTOR=math.gcd(16, positions),
            num_warps=4,
        )
    torch.sum(shares, (0, 1, 2), out=loss)
    if squares is not None and maps is not None and pieces > 1:
        torch.sum(maps, 0, out=squares)
