"""The divergences between two rows of class probabilities in Triton: of each class its term and the gradient's weight.

The counterpart of csrc/divergence.h. With Q = softmax(x) and D = log P - log Q every soft term has the gradient

    dsoft/dx_j = w_j - Q_j sum_k w_k

and `divergence_term` gives term and weight w_j. Terms are of second order in D where that is small, so nothing cancels
near convergence.
"""

import triton
import triton.language as tl

from kdkernels._triton.rows import FAR, kl_term

# Divergence in csrc/kdkernels.h.
NONE = tl.constexpr(0)
KL = tl.constexpr(1)
REVERSE_KL = tl.constexpr(2)
MIXTURE = tl.constexpr(3)
TOTAL_VARIATION = tl.constexpr(4)
DECOUPLED = tl.constexpr(5)
REVERSE_DECOUPLED = tl.constexpr(6)
NORMALIZED = tl.constexpr(7)
REVERSE_NORMALIZED = tl.constexpr(8)
STATISTICS = tl.constexpr(9)


@triton.jit
def log1p(x):
    # log(1 + x), and x - log(1 + x) >= 0; near 0 by 2 atanh(z), whose series to z^9 is good to 3e-9 for |x| <= 0.25.
    near = tl.abs(x) <= 0.25
    y = tl.where(near, x, 0.0)
    z = y / (2.0 + y)
    w = z * z
    rest = 2.0 * z * w * (1.0 / 3.0 + w * (1.0 / 5.0 + w * (1.0 / 7.0 + w * (1.0 / 9.0))))
    far = tl.log(1.0 + x)
    return tl.where(near, 2.0 * z + rest, far), tl.where(near, y * z - rest, x - far)


@triton.jit
def towards(p, gap):
    # The term p (log(p / m) + m / p - 1) >= 0 of m = p + gap, and log(m / p).
    ratio = gap / tl.where(p > 0.0, p, 1.0)
    # Where p is so small that the quotient overflows, the logarithm does not matter.
    log, excess = log1p(tl.minimum(ratio, 1e38))
    return tl.where((tl.abs(ratio) <= 0.25) & (p > 0.0), p * excess, gap - p * log), log


@triton.jit
def times(factor, x):
    # 0 inf = 0.
    return tl.where(factor == 0.0, 0.0, factor * x)


@triton.jit
def logit_difference(
    s,  # (BLOCK_M, BLOCK_N)
    t,  # (BLOCK_M, BLOCK_N)
):
    # t - s, where -inf - -inf = 0.
    return tl.where((s == float("-inf")) & (t == float("-inf")), 0.0, t - s)


@triton.jit
def log_quotient(
    s,  # (BLOCK_M, BLOCK_N)
    t,  # (BLOCK_M, BLOCK_N)
    max_q,  # (BLOCK_M, 1)
    max_p,  # (BLOCK_M, 1)
    inverse_q,  # (BLOCK_M, 1)
    inverse_p,  # (BLOCK_M, 1)
    inverse_gap,  # (BLOCK_M, 1): inverse_p - inverse_q
):
    # log(e_p / e_q). The logits' difference is exact where they are close; where the factors are far apart, or the
    # maxima, it would be a large number for a small one.
    close = (tl.abs(inverse_gap) <= 0.25 * inverse_q) & (tl.abs(max_p - max_q) * inverse_q <= FAR)
    of_both = tl.where(close, inverse_q, 0.0)
    of_p = tl.where(close, inverse_gap, inverse_p)
    of_q = tl.where(close, 0.0, -inverse_q)
    quotient = ((t - s) - (max_p - max_q)) * of_both + ((t - max_p) * of_p + (s - max_q) * of_q)
    # A factor of 0 says nothing of a class that is masked.
    nowhere = tl.where(s == float("-inf"), 0.0, float("-inf"))
    quotient = tl.where(s == float("-inf"), float("inf"), quotient)
    return tl.where(t == float("-inf"), nowhere, quotient)


@triton.jit
def divergence_term(
    p,  # (BLOCK_M, BLOCK_N)
    q,  # (BLOCK_M, BLOCK_N)
    delta,  # (BLOCK_M, BLOCK_N): log p - log q
    surprisal,  # (BLOCK_M, BLOCK_N): -log q, or -log p of REVERSE_NORMALIZED; unused elsewhere
    first,
    second,
    mix,
    DIVERGENCE: tl.constexpr,
):
    # The class's term, and its weight w: the gradient is w_j - Q_j sum_k w_k.
    if DIVERGENCE == REVERSE_KL or DIVERGENCE == REVERSE_DECOUPLED:
        term = kl_term(q, p, -delta)[0]
        weight = times(q, -delta)
    elif DIVERGENCE == REVERSE_NORMALIZED:
        term = times(q, surprisal)
        weight = term
    else:
        term, weight = kl_term(p, q, delta)  # KL(P||Q), and Q - P
        if DIVERGENCE == NORMALIZED:
            term = times(p, surprisal)
        if DIVERGENCE == TOTAL_VARIATION:
            term = 0.5 * tl.abs(weight)
            weight = tl.where(weight > 0.0, 0.5 * q, tl.where(weight < 0.0, -0.5 * q, 0.0))
        if DIVERGENCE == MIXTURE:
            difference = weight
            of_p, _ = towards(p, (1.0 - mix) * difference)
            of_q, log = towards(q, -mix * difference)
            term = first * of_p + second * of_q
            mixture = mix * p + (1.0 - mix) * q
            relative = (1.0 - mix) * difference / tl.where(mixture > 0.0, mixture, 1.0)
            slope = (first * (1.0 - mix) - second * mix) * relative - second * log
            weight = times(q, slope)
    return term, weight
