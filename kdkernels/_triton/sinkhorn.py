"""Entropic transport of two batches, with its gradients, without the matrix of pairs; formulas in
kdkernels.ops.sinkhorn.

Potentials are in the log domain. A program has a block of rows of one batch and goes over the samples of the other
one, or of its own where the two are debiased: tiles of inner products, summed over the features in steps, become costs,
and these an online log-sum-exp, T g. Rows of both batches, and of the transport within each, are one launch while all
iterations average; where a problem may alternate, g follows f in a second one. Old and new potentials are two buffers.

The schedule of each problem is made from its largest cost on the device, and a problem that `tol` stops has a flag
there, for whose sake programs only copy: the host waits for nothing.

|a|^2 + |b|^2 - 2 ab says little of a distance that is small beside |a| and |b|: such pairs are differenced.

2 d operations for each pair of each pass, of which there is one for each iteration, one for the largest cost, and one
for each block of features of the gradient. No atomics: sums have one order. Memory beyond the outputs: x and y in
float32.
"""

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kdkernels._triton.rows import LOG2E, LOWEST, add_online
from kdkernels._triton.samples import NEAR, load_rows, prepare_samples, samples_of_centres

# Cost in csrc/kdkernels.h
COSTS = {"sqeuclidean": 0, "euclidean": 1, "cosine": 2}
SQEUCLIDEAN = tl.constexpr(0)
EUCLIDEAN = tl.constexpr(1)
COSINE = tl.constexpr(2)
# As in kdkernels.ops.sinkhorn.
AVERAGED = tl.constexpr(16)
CHECK = 4
# Where |a|^2 + |b|^2 is below so many epsilon no squared distance is differenced: rounding moves an exponent by a few
# eps there.
SMOOTH = tl.constexpr(4)
# Samples, or iterations, that a step over what there is one of for each takes.
BLOCK = 1024


class Tile(NamedTuple):
    """A program takes block_m rows, with block_d features of their gradient, and walks along the samples by block_n,
    with inner products over block_k features a step."""

    block_m: int
    block_n: int
    block_k: int
    block_d: int
    num_warps: int


def tile(problems: int, x_samples: int, y_samples: int, *, extra: bool = False) -> Tile:
    """The most rows that leave 128 programs to each batch, of what sm_80, sm_90, sm_100 and gfx942 hold in registers
    (tests/test_triton_compile.py): fewer where costs are added."""
    block_m = 32 if extra else 64
    while block_m > 16 and problems * triton.cdiv(min(x_samples, y_samples), block_m) < 128:
        block_m //= 2
    return Tile(block_m, 32, 16, 64, 4 if block_m == 16 else 8)


def bytes_moved(
    problems: int,
    x_samples: int,
    y_samples: int,
    features: int,
    iterations: int,
    *,
    cost: str = "sqeuclidean",
    debias: bool = True,
    extra: bool = False,
    grads: Collection[str] = ("grad_x", "grad_y"),
    plans: int = 0,
) -> int:
    """Bytes of samples, of their float32 copies, of what is added to costs, of gradients and of plans that are loaded
    and stored, without near pairs. Most loads are from cache. What there is one of for a sample is left out: up to 20
    bytes for each program, or step of a program, that takes the sample."""
    block_m, block_n, _, block_d, _ = tile(problems, x_samples, y_samples, extra=extra)
    depth = triton.cdiv(features, 16) * 16

    def costs(n: int, m: int) -> int:
        return 4 * (depth * (n * triton.cdiv(m, block_n) + triton.cdiv(n, block_m) * m) + extra * n * m)

    def gradient(name: str, n: int, m: int) -> int:
        if name not in grads:
            return costs(n, m) if name == "grad_x" else 0
        return triton.cdiv(features, block_d) * costs(n, m) + 4 * triton.cdiv(n, block_m) * m * depth

    both = x_samples + y_samples
    of_centre = samples_of_centres(x_samples, y_samples) * (cost != "cosine")
    moved = 4 * ((both + of_centre) * features + both * depth)
    sides = (("grad_x", x_samples, y_samples), ("grad_y", y_samples, x_samples))
    moved += costs(x_samples, y_samples)
    for name, n, m in sides:
        moved += iterations * costs(n, m) + gradient(name, n, m)
        if debias:
            moved += (iterations + 1) * costs(n, n)
            moved += gradient(name, n, n) if name in grads else costs(n, n)
        if name in grads:
            moved += 4 * n * (features + depth * (cost != "cosine"))
    pairs = ((x_samples, y_samples), (x_samples, x_samples), (y_samples, y_samples))
    return problems * (moved + sum(costs(n, m) + 4 * n * m for n, m in pairs[:plans]))


@triton.jit
def _place(
    n,
    m,
    BLOCK_M: tl.constexpr,
):
    # The program's problem, whether its rows are y's, which come after those of x, their numbers in their batch,
    # whether they exist, and their places in both.
    x_blocks = (n + BLOCK_M - 1) // BLOCK_M
    row_blocks = x_blocks + (m + BLOCK_M - 1) // BLOCK_M
    problem = (tl.program_id(0) // row_blocks).to(tl.int64)
    block = tl.program_id(0) % row_blocks
    of_y = block >= x_blocks
    i = (block - tl.where(of_y, x_blocks, 0)) * BLOCK_M + tl.arange(0, BLOCK_M)
    return problem, of_y, i, i < tl.where(of_y, m, n), problem * (n + m) + tl.where(of_y, n, 0) + i


@triton.jit
def _columns(
    problem,
    of_y,
    own,
    n,
    m,
):
    # How many samples these rows meet, and where those start.
    meet_y = of_y == (own != 0)
    return tl.where(meet_y, m, n), problem * (n + m) + tl.where(meet_y, n, 0)


@triton.jit
def _costs(
    z_ptr,  # (problems, n + m, depth) float32
    squares_ptr,  # (problems, n + m) float32
    extras,  # of pointers, (problems, n, m), (problems, n, n) and (problems, m, m) float32, or None
    place,  # as _place has it
    own,
    diagonal,
    j,  # (BLOCK_N,)
    n,
    m,
    depth,
    epsilon,
    COST: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # The costs of a tile, and they without what is added to them, which are 0 where the samples are one; `diagonal`:
    # those are where i is j.
    problem, of_y, i, exists, row = place
    columns, first = _columns(problem, of_y, own, n, m)
    there = j < columns
    column = first + j
    BLOCK_M: tl.constexpr = i.shape[0]
    BLOCK_N: tl.constexpr = j.shape[0]
    block_n = tl.arange(0, BLOCK_N)
    block_k = tl.arange(0, BLOCK_K)
    products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, depth, BLOCK_K):
        a = load_rows(z_ptr, row, exists, k + block_k, depth)
        b = load_rows(z_ptr, column, there, k + block_k, depth)
        products = tl.dot(a, tl.trans(b), products, input_precision="ieee")
    if COST == COSINE:
        distance = 1.0 - products
    else:
        both = tl.load(squares_ptr + row, mask=exists, other=0.0)[:, None]
        both += tl.load(squares_ptr + column, mask=there, other=0.0)[None, :]
        distance = both - 2.0 * products
        same = (i[:, None] == j[None, :]) & diagonal
        distance = tl.where(same | (distance < 0.0), 0.0, distance)
        least = both
        if COST == SQEUCLIDEAN:
            least -= SMOOTH * epsilon
        near = exists[:, None] & there[None, :] & (same == 0) & (distance < least * NEAR)
        hits = tl.where(tl.max(near.to(tl.int32), 0) != 0, block_n, BLOCK_N)
        q = tl.min(hits, 0)
        while q < BLOCK_N:
            chosen = block_n == q
            other_ptr = z_ptr + tl.sum(tl.where(chosen, column, 0), 0) * depth
            squared = tl.zeros((BLOCK_M,), tl.float32)
            for k in range(0, depth, BLOCK_K):
                b = tl.load(other_ptr + k + block_k, mask=k + block_k < depth, other=0.0)
                away = load_rows(z_ptr, row, exists, k + block_k, depth) - b[None, :]
                squared += tl.sum(away * away, 1)
            distance = tl.where(near & chosen[None, :], squared[:, None], distance)
            q = tl.min(tl.where(hits > q, hits, BLOCK_N), 0)
        if COST == EUCLIDEAN:
            distance = tl.sqrt_rn(distance)
    cost = distance
    extra_ptr, extra_x_ptr, extra_y_ptr = extras
    if extra_ptr is not None:
        from_ptr = extra_ptr + problem * n * m
        if extra_x_ptr is not None:
            within = tl.where(of_y, extra_y_ptr + problem * m * m, extra_x_ptr + problem * n * n)
            from_ptr = tl.where(own != 0, within, from_ptr)
        # Rows of y are columns of what is added to x and y.
        across = of_y & (own == 0)
        i_stride = tl.where(across, 1, columns)
        j_stride = tl.where(across, m, 1)
        at = i.to(tl.int64)[:, None] * i_stride + j.to(tl.int64)[None, :] * j_stride
        cost += tl.load(from_ptr + at, mask=exists[:, None] & there[None, :], other=0.0)
    return cost, distance


@triton.jit(do_not_specialize=["n", "m", "depth"])
def sinkhorn_largest_kernel(
    z_ptr,  # (problems, n + m, depth) float32
    squares_ptr,  # (problems, n + m) float32
    extra_ptr,  # (problems, n, m) float32 or None
    extra_x_ptr,  # (problems, n, n) float32 or None
    extra_y_ptr,  # (problems, m, m) float32 or None
    largest_ptr,  # (halves, problems, row blocks) float32: the largest |cost| that a block of rows has
    n,
    m,
    depth,
    epsilon,
    COST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    depth = (depth // 16) * 16
    place = _place(n, m, BLOCK_M)
    problem, of_y, exists = place[0], place[1], place[3]
    extras = (extra_ptr, extra_x_ptr, extra_y_ptr)
    own = tl.program_id(1)
    if of_y and own == 0:
        return
    columns = _columns(problem, of_y, own, n, m)[0]
    largest = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, columns, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        there = j < columns
        cost = _costs(
            z_ptr, squares_ptr, extras, place, own, own != 0, j, n, m, depth, epsilon, COST, BLOCK_K
        )[0]
        # What is not a number is not finite either.
        x = tl.where(tl.abs(cost) < float("inf"), tl.abs(cost), float("inf"))
        largest = tl.maximum(largest, tl.where(exists[:, None] & there[None, :], x, 0.0))
    to = own * tl.num_programs(0) + tl.program_id(0)
    tl.store(largest_ptr + to, tl.max(tl.max(largest, 1), 0))


@triton.jit(do_not_specialize=["x_blocks", "row_blocks", "iterations"])
def sinkhorn_schedule_kernel(
    largest_ptr,  # (halves, problems, row blocks) float32
    scales_ptr,  # (iterations, kinds, problems) float32: epsilon of each iteration
    levels_ptr,  # (kinds, problems) int64: how many come before the last one
    x_blocks,
    row_blocks,
    iterations,
    epsilon,
    BLOCK: tl.constexpr,
):
    problems = tl.num_programs(0)
    problem = tl.program_id(0).to(tl.int64)
    kind = tl.program_id(1)
    begin = tl.where(kind == 2, x_blocks, 0)
    end = tl.where(kind == 2, row_blocks, x_blocks)
    largest_ptr += (tl.where(kind == 0, 0, problems) + problem) * row_blocks
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        block = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(largest_ptr + block, mask=block < end, other=0.0))
    top = tl.max(largest, 0).to(tl.float64)
    # log2 of the ratio of one epsilon to the one before
    steps = iterations // 2
    fast = tl.log2(epsilon / tl.where(top > 0.0, top, 1.0)) / tl.maximum(steps, 1)
    ratio = tl.where(top * tl.exp2(-steps.to(tl.float64)) <= epsilon, -1.0, fast)
    top = tl.where(steps > 0, top, 0.0 * top)
    levels = tl.zeros((BLOCK,), tl.int32)
    to = kind * problems + problem
    for start in range(0, iterations, BLOCK):
        k = start + tl.arange(0, BLOCK)
        scale = top * tl.exp2(k.to(tl.float64) * ratio)
        above = (k < iterations) & (scale > epsilon * (1 + 1e-6))
        levels += above.to(tl.int32)
        scale = tl.where(above, scale.to(tl.float32), epsilon)
        # Costs that are not finite leave nothing finite.
        scale = tl.where(top < float("inf"), scale, float("nan"))
        tl.store(
            scales_ptr + (k.to(tl.int64) * tl.num_programs(1) * problems + to), scale, mask=k < iterations
        )
    tl.store(levels_ptr + to, tl.sum(levels, 0))


@triton.jit(do_not_specialize=["n", "m", "depth", "problems", "k", "part"])
def sinkhorn_step_kernel(
    z_ptr,  # (problems, n + m, depth) float32
    squares_ptr,  # (problems, n + m) float32
    weights_ptr,  # (problems, n + m) float32
    extra_ptr,  # (problems, n, m) float32 or None
    extra_x_ptr,  # (problems, n, n) float32 or None
    extra_y_ptr,  # (problems, m, m) float32 or None
    scales_ptr,  # (iterations, kinds, problems) float32
    levels_ptr,  # (kinds, problems) int64
    moving_ptr,  # (kinds, problems) int64 or None: all are
    potentials_ptr,  # (2, halves, problems, n + m) float32: f and g, of x and y, of each batch alone; two buffers
    n,
    m,
    depth,
    problems,
    k,
    part,  # of the iteration: all at once; all but g; g
    epsilon,
    rho,
    DEBIAS: tl.constexpr,
    COST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    depth = (depth // 16) * 16
    place = _place(n, m, BLOCK_M)
    problem, of_y, exists, row = place[0], place[1], place[3], place[4]
    extras = (extra_ptr, extra_x_ptr, extra_y_ptr)
    own = tl.program_id(1)
    if (part == 1 and (of_y and own == 0)) or (part == 2 and of_y == 0):
        return
    half = problems.to(tl.int64) * (n + m)
    buffer = half * (1 + DEBIAS)
    old = (k % 2) * buffer + own * half
    new = ((k + 1) % 2) * buffer + own * half
    before = tl.load(potentials_ptr + old + row, mask=exists, other=0.0)
    kind = tl.where(own == 0, 0, 1 + of_y.to(tl.int32))
    of = kind * problems + problem
    moving = 1
    if moving_ptr is not None:
        moving = tl.load(moving_ptr + of)
    if moving == 0:
        tl.store(potentials_ptr + new + row, before, mask=exists)
        return
    scale = tl.load(scales_ptr + (k * (1 + 2 * DEBIAS) * problems.to(tl.int64) + of))
    alternating = (own == 0) & (k >= tl.load(levels_ptr + of) + AVERAGED)
    source = tl.where(alternating & of_y, new, old)
    columns, first = _columns(problem, of_y, own, n, m)
    inverse = LOG2E / scale

    largest = tl.full((BLOCK_M, BLOCK_N), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, columns, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        there = j < columns
        cost = _costs(
            z_ptr, squares_ptr, extras, place, own, own != 0, j, n, m, depth, epsilon, COST, BLOCK_K
        )[0]
        weight = tl.load(weights_ptr + first + j, mask=there, other=0.0)
        log_weight = tl.where(weight == 0.0, float("-inf"), tl.log2(tl.where(weight == 0.0, 1.0, weight)))
        potential = tl.load(potentials_ptr + source + first + j, mask=there, other=0.0)
        x = log_weight[None, :] + (potential[None, :] - cost) * inverse
        largest, total = add_online(largest, total, x, 1.0)
    top = tl.max(largest, 1)
    total = tl.sum(total * tl.exp2(largest - top[:, None]), 1)
    none = total == 0.0
    softmin = -(top + tl.log2(tl.where(none, 1.0, total))) / inverse
    to = tl.where(none, 0.0, softmin)
    to *= tl.where(rho == float("inf"), 1.0, rho / (rho + scale))
    after = tl.where(alternating, to, 0.5 * (before + to))
    tl.store(potentials_ptr + new + row, after, mask=exists)


@triton.jit(do_not_specialize=["n", "m", "k"])
def sinkhorn_stop_kernel(
    levels_ptr,  # (kinds, problems) int64
    moving_ptr,  # (kinds, problems) int64
    potentials_ptr,  # (2, halves, problems, n + m) float32
    n,
    m,
    k,
    tol,
    BLOCK: tl.constexpr,
):
    problems = tl.num_programs(0)
    problem = tl.program_id(0).to(tl.int64)
    kind = tl.program_id(1)
    halves = (tl.num_programs(1) + 1) // 2
    one_ptr = potentials_ptr + (tl.where(kind == 0, 0, problems) + problem) * (n + m)
    other_ptr = one_ptr + problems.to(tl.int64) * halves * (n + m)
    end = tl.where(kind == 1, n, n + m)
    moves = tl.zeros((BLOCK,), tl.int32)
    for start in range(tl.where(kind == 2, n, 0), end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        change = tl.load(one_ptr + i, mask=i < end, other=0.0) - tl.load(
            other_ptr + i, mask=i < end, other=0.0
        )
        # What is not a number never stops.
        moves = tl.maximum(moves, 1 - (tl.abs(change) <= tol).to(tl.int32))
    of = kind * problems + problem
    moving = (tl.max(moves, 0) != 0) | (k < tl.load(levels_ptr + of))
    # What has stopped has one potential in both buffers, and so stays.
    tl.store(moving_ptr + of, moving.to(tl.int64))


@triton.jit
def _mass_of(
    weights_ptr,  # (samples,) float32
    potentials_ptr,  # (samples,) float32
    samples,
    BLOCK: tl.constexpr,
):
    # The weights' sum, and that of the weighted potentials.
    mass = tl.zeros((BLOCK,), tl.float32)
    level = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, samples, BLOCK):
        i = start + tl.arange(0, BLOCK)
        weight = tl.load(weights_ptr + i, mask=i < samples, other=0.0)
        mass += weight
        level += weight * tl.load(potentials_ptr + i, mask=i < samples, other=0.0)
    return tl.sum(mass, 0), tl.sum(level, 0)


@triton.jit(do_not_specialize=["n", "m", "problems"])
def sinkhorn_finish_kernel(
    weights_ptr,  # (problems, n + m) float32
    potentials_ptr,  # (halves, problems, n + m) float32: as the iteration left them, and as they are from then on
    other_ptr,  # (problems,) bool or None: whether y is another batch than x
    f_ptr,  # (problems, n)
    g_ptr,  # (problems, m)
    f_self_ptr,  # (problems, n) or None
    g_self_ptr,  # (problems, m) or None
    n,
    m,
    problems,
    rho,
    BLOCK: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    weights_ptr += problem * (n + m)
    x_ptr = potentials_ptr + problem * (n + m)
    own_ptr = x_ptr + problems.to(tl.int64) * (n + m)
    a, of_f = _mass_of(weights_ptr, x_ptr, n, BLOCK)
    b, of_g = _mass_of(weights_ptr + n, x_ptr + n, m, BLOCK)
    # A problem without mass on a side has the potentials 0.
    there = (a > 0.0) & (b > 0.0)
    shift = tl.where(rho == float("inf"), 0.5 * (of_g - of_f), 0.0)
    other = True
    if other_ptr is not None:
        other = tl.load(other_ptr + problem) != 0
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < n
        f = tl.where(there, tl.load(x_ptr + i, mask=inside, other=0.0) + shift, 0.0)
        if f_self_ptr is not None:
            own = tl.where(a > 0.0, tl.load(own_ptr + i, mask=inside, other=0.0), 0.0)
            f = tl.where(other, f, own)
            tl.store(own_ptr + i, own, mask=inside)
            tl.store(f_self_ptr + problem * n + i, own, mask=inside)
        tl.store(x_ptr + i, f, mask=inside)
        tl.store(f_ptr + problem * n + i, f, mask=inside)
    for start in range(0, m, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < m
        g = tl.where(there, tl.load(x_ptr + n + i, mask=inside, other=0.0) - shift, 0.0)
        if g_self_ptr is not None:
            own = tl.where(b > 0.0, tl.load(own_ptr + n + i, mask=inside, other=0.0), 0.0)
            # Where the two batches are one, so are the potentials of each alone.
            g = tl.where(other, g, own)
            tl.store(own_ptr + n + i, own, mask=inside)
            tl.store(g_self_ptr + problem * m + i, own, mask=inside)
        tl.store(x_ptr + n + i, g, mask=inside)
        tl.store(g_ptr + problem * m + i, g, mask=inside)


@triton.jit
def _phi(
    potential,  # (BLOCK_M,)
    rho,
):
    # In float32 nothing would be left of e^x - 1 where rho is large.
    power = tl.exp2(potential.to(tl.float64) * (-LOG2E / rho)) - 1.0
    return tl.where(rho == float("inf"), potential, (-rho * power).to(tl.float32))


@triton.jit(do_not_specialize=["n", "m", "features", "depth", "problems"])
def sinkhorn_gradient_kernel(
    z_ptr,  # (problems, n + m, depth) float32
    squares_ptr,  # (problems, n + m) float32
    weights_ptr,  # (problems, n + m) float32
    extra_ptr,  # (problems, n, m) float32 or None
    extra_x_ptr,  # (problems, n, n) float32 or None
    extra_y_ptr,  # (problems, m, m) float32 or None
    potentials_ptr,  # (halves, problems, n + m) float32
    other_ptr,  # (problems,) bool or None
    rows_ptr,  # (problems, n + m) float32: shares of the loss
    grad_x_ptr,  # (problems, n, features) or None
    grad_y_ptr,  # (problems, m, features) or None
    grad_a_ptr,  # (problems, n) or None
    grad_b_ptr,  # (problems, m) or None
    n,
    m,
    features,
    depth,
    problems,
    epsilon,
    rho,
    DEBIAS: tl.constexpr,
    COST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VECTOR: tl.constexpr,
):
    GRAD_X: tl.constexpr = grad_x_ptr is not None
    GRAD_Y: tl.constexpr = grad_y_ptr is not None
    GRAD_A: tl.constexpr = grad_a_ptr is not None
    GRAD_B: tl.constexpr = grad_b_ptr is not None
    depth = (depth // 16) * 16
    features = (features // VECTOR) * VECTOR
    place = _place(n, m, BLOCK_M)
    problem, of_y, i, exists, row = place
    extras = (extra_ptr, extra_x_ptr, extra_y_ptr)
    if tl.program_id(1) > 0 and not tl.where(of_y, GRAD_Y, GRAD_X):
        return
    feature = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    half = problems.to(tl.int64) * (n + m)
    inverse = LOG2E / epsilon
    value = _phi(tl.load(potentials_ptr + row, mask=exists, other=0.0), rho)
    if DEBIAS:
        value -= _phi(tl.load(potentials_ptr + half + row, mask=exists, other=0.0), rho)
    of_weight = value
    slopes = tl.zeros((BLOCK_M,), tl.float32)
    grad = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # Pairs across are summed by x, but visited by all rows that have a gradient.
    visits = tl.where(of_y, GRAD_Y or GRAD_B, True)
    for own in range(tl.where(visits, 0, 1), 1 + DEBIAS):
        columns, first = _columns(problem, of_y, own, n, m)
        from_ptr = potentials_ptr + own * half
        f = tl.load(from_ptr + row, mask=exists, other=0.0)[:, None]
        excess = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, columns, BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            there = j < columns
            cost, distance = _costs(
                z_ptr, squares_ptr, extras, place, own, own != 0, j, n, m, depth, epsilon, COST, BLOCK_K
            )
            g = tl.load(from_ptr + first + j, mask=there, other=0.0)[None, :]
            weight = tl.load(weights_ptr + first + j, mask=there, other=0.0)[None, :]
            share = tl.exp2((f + g - cost) * inverse)
            excess += tl.sum(tl.where(weight == 0.0, 0.0, weight * (share - 1.0)), 1)
            if GRAD_X or GRAD_Y:
                c = tl.where(weight == 0.0, 0.0, weight * share)
                if COST != COSINE:
                    c = tl.where(distance == 0.0, 0.0, c)
                if COST == EUCLIDEAN:
                    c /= tl.where(distance == 0.0, 1.0, distance)
                c = tl.where(own != 0, -c, c)
                slopes += tl.sum(c, 1)
                b = load_rows(z_ptr, first + j, there, feature, depth)
                grad = tl.dot(c, b, grad, input_precision="ieee")
        excess *= epsilon
        of_weight -= tl.where(own != 0, -excess, excess)
        # OT(x, x) counts half, and its potential for both sides.
        value -= tl.where(own != 0, -0.5 * excess, tl.where(of_y, 0.0, excess))

    weight = tl.load(weights_ptr + row, mask=exists, other=0.0)
    other = True
    if other_ptr is not None:
        other = tl.load(other_ptr + problem) != 0
    whole = exists & (tl.program_id(1) == 0)
    tl.store(rows_ptr + row, tl.where(other, weight * value, 0.0), mask=whole)
    of_weight = tl.where(other, of_weight, 0.0)
    if GRAD_A:
        tl.store(grad_a_ptr + problem * n + i, of_weight, mask=whole & (of_y == 0))
    if GRAD_B:
        tl.store(grad_b_ptr + problem * m + i, of_weight, mask=whole & of_y)
    if GRAD_X or GRAD_Y:
        if COST == COSINE:
            grad = -weight[:, None] * grad
        else:
            grad = slopes[:, None] * load_rows(z_ptr, row, exists, feature, depth) - grad
            grad *= (weight * (2.0 if COST == SQEUCLIDEAN else 1.0))[:, None]
        grad = tl.where(other, grad, 0.0)
        inside = exists[:, None] & (feature < features)[None, :]
        i = i.to(tl.int64)[:, None]
        if GRAD_X:
            to = grad_x_ptr + (problem * n + i) * features + feature[None, :]
            tl.store(to, grad, mask=inside & (of_y == 0))
        if GRAD_Y:
            to = grad_y_ptr + (problem * m + i) * features + feature[None, :]
            tl.store(to, grad, mask=inside & of_y)


@triton.jit(do_not_specialize=["n", "m", "depth", "problems", "kind"])
def sinkhorn_plan_kernel(
    z_ptr,  # (problems, n + m, depth) float32
    squares_ptr,  # (problems, n + m) float32
    weights_ptr,  # (problems, n + m) float32
    extra_ptr,  # (problems, n, m) float32 or None
    extra_x_ptr,  # (problems, n, n) float32 or None
    extra_y_ptr,  # (problems, m, m) float32 or None
    potentials_ptr,  # (halves, problems, n + m) float32
    other_ptr,  # (problems,) bool or None
    plan_ptr,  # (problems, n, m), (problems, n, n) or (problems, m, m)
    n,
    m,
    depth,
    problems,
    kind,  # the plan of x and y, of x and x, of y and y
    epsilon,
    COST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    depth = (depth // 16) * 16
    place = _place(n, m, BLOCK_M)
    problem, of_y, i, exists, row = place
    extras = (extra_ptr, extra_x_ptr, extra_y_ptr)
    own = (kind != 0).to(tl.int32)
    if of_y != (kind == 2):
        return
    columns, first = _columns(problem, of_y, own, n, m)
    diagonal = own != 0
    if other_ptr is not None:
        # Then the three plans are one, to the last bit.
        diagonal = diagonal | (tl.load(other_ptr + problem) == 0)
    from_ptr = potentials_ptr + own * problems.to(tl.int64) * (n + m)
    f = tl.load(from_ptr + row, mask=exists, other=0.0)[:, None]
    own_weight = tl.load(weights_ptr + row, mask=exists, other=0.0)[:, None]
    to = problem * tl.where(of_y, m, n) + i
    for start in range(0, columns, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        there = j < columns
        cost = _costs(
            z_ptr, squares_ptr, extras, place, own, diagonal, j, n, m, depth, epsilon, COST, BLOCK_K
        )[0]
        g = tl.load(from_ptr + first + j, mask=there, other=0.0)[None, :]
        weight = own_weight * tl.load(weights_ptr + first + j, mask=there, other=0.0)[None, :]
        share = tl.exp2((f + g - cost) * (LOG2E / epsilon))
        plan = tl.where(weight == 0.0, 0.0, weight * share)
        tl.store(plan_ptr + (to[:, None] * columns + j[None, :]), plan, mask=exists[:, None] & there[None, :])


def sinkhorn(
    x: torch.Tensor,  # (B, n, d); all tensors are contiguous, in float32
    y: torch.Tensor,  # (B, m, d)
    a: torch.Tensor,  # (B, n)
    b: torch.Tensor,  # (B, m)
    extra: Sequence[torch.Tensor],  # (B, n, m), (B, n, n), (B, m, m), the first of them, or none
    cost: str,
    epsilon: float,
    rho: float,
    iterations: int,
    tol: float,
    debias: bool,
    loss: torch.Tensor,  # (B,)
    f: torch.Tensor,  # (B, n)
    g: torch.Tensor,  # (B, m)
    f_self: torch.Tensor | None,  # (B, n)
    g_self: torch.Tensor | None,  # (B, m)
    grad_x: torch.Tensor | None,  # (B, n, d)
    grad_y: torch.Tensor | None,  # (B, m, d)
    grad_a: torch.Tensor | None,  # (B, n)
    grad_b: torch.Tensor | None,  # (B, m)
    plans: Sequence[torch.Tensor],  # as extra
) -> None:
    """Fill the outputs that are not None."""
    problems, n, features = x.shape
    m = y.shape[1]
    block_m, block_n, block_k, block_d, warps = tile(problems, n, m, extra=bool(extra))
    x_blocks = triton.cdiv(n, block_m)
    row_blocks = x_blocks + triton.cdiv(m, block_m)
    halves, kinds = (2, 3) if debias else (1, 1)
    extras = (*extra, None, None, None)[:3]
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": warps}
    code = COSTS[cost]
    with torch.cuda.device_of(x):
        z, squares, differs = prepare_samples(x, y, None, centred=cost != "cosine")
        depth, rows = z.shape[-1], torch.empty_like(squares)
        weights = torch.cat((a, b), 1)
        largest = loss.new_empty(halves, problems, row_blocks)
        scales = loss.new_empty(iterations, kinds, problems)
        levels = torch.empty(kinds, problems, dtype=torch.int64, device=x.device)
        samples = (z, squares)
        sinkhorn_largest_kernel[(problems * row_blocks, halves)](
            *samples, *extras, largest, n, m, depth, epsilon, COST=code, **blocks
        )
        sinkhorn_schedule_kernel[(problems, kinds)](
            largest, scales, levels, x_blocks, row_blocks, iterations, epsilon, BLOCK=BLOCK, num_warps=4
        )
        potentials = loss.new_zeros(2, halves, problems, n + m)
        moving = torch.ones_like(levels) if tol >= 0 else None
        for k in range(iterations):
            # Nothing alternates so early.
            for part in (0,) if k < AVERAGED.value else (1, 2):
                sinkhorn_step_kernel[(problems * row_blocks, 1 if part == 2 else halves)](
                    *samples,
                    weights,
                    *extras,
                    scales,
                    levels,
                    moving,
                    potentials,
                    n,
                    m,
                    depth,
                    problems,
                    k,
                    part,
                    epsilon,
                    rho,
                    DEBIAS=debias,
                    COST=code,
                    **blocks,
                )
            if moving is not None and (k + 1) % CHECK == 0:
                sinkhorn_stop_kernel[(problems, kinds)](
                    levels, moving, potentials, n, m, k, tol, BLOCK=BLOCK, num_warps=4
                )
        other = None
        if debias and n == m:  # to the last bit: where it is the same problem thrice
            other = differs.any(1) | (a != b).any(1)
            for more in extra[1:]:
                other |= (extra[0] != more).flatten(1).any(1)
        found = potentials[iterations % 2]
        sinkhorn_finish_kernel[(problems,)](
            weights, found, other, f, g, f_self, g_self, n, m, problems, rho, BLOCK=BLOCK, num_warps=4
        )
        parts = triton.cdiv(features, block_d) if grad_x is not None or grad_y is not None else 1
        sinkhorn_gradient_kernel[(problems * row_blocks, parts)](
            *samples,
            weights,
            *extras,
            found,
            other,
            rows,
            grad_x,
            grad_y,
            grad_a,
            grad_b,
            n,
            m,
            features,
            depth,
            problems,
            epsilon,
            rho,
            DEBIAS=debias,
            COST=code,
            BLOCK_D=block_d,
            VECTOR=math.gcd(16, features),
            **blocks,
        )
        for kind, plan in enumerate(plans):
            sinkhorn_plan_kernel[(problems * row_blocks, 1)](
                *samples,
                weights,
                *extras,
                found,
                other,
                plan,
                n,
                m,
                depth,
                problems,
                kind,
                epsilon,
                COST=code,
                **blocks,
            )
    torch.sum(rows, 1, out=loss)
