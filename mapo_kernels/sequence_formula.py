"""Formulas of whole sequences, ratios and divisors: a part of `formula`, under its two rules."""

from mapo_kernels._triton import jit, tl
from mapo_kernels.numerics import clamp


@jit
def ratio_part(log_ratio, advantage, numbers, LOSS: tl.constexpr):
    """What a token's own l adds to its sequence's, and on which side it was clipped.

    GMPO (arXiv 2507.20673) clips each token's l, where its advantage pushes, before the mean: a
    clipped token moves the sequence's ratio no more. VESPO (arXiv 2602.10693) clamps it before the
    sum. Returns (part, clipped low, clipped high).
    """
    if LOSS.objective == "vespo":
        clipped_low = (advantage < 0) & (advantage > 0)
        clipped_high = clipped_low
        part = clamp(log_ratio, -20.0, 20.0)
    else:
        clipped_low = (log_ratio < -numbers.eps_low) & (advantage < 0)
        clipped_high = (log_ratio > numbers.eps_high) & (advantage > 0)
        part = tl.where(clipped_low, -numbers.eps_low + 0.0 * log_ratio, log_ratio)
        part = tl.where(clipped_high, numbers.eps_high + 0.0 * log_ratio, part)
    return part, clipped_low, clipped_high


@jit
def gamma_weight(log_ratio, ratio, advantage, numbers):
    """VESPO's phi(w) = e^lambda w^k e^(-lambda w) of a sequence, k and lambda by sign of A."""
    zero = 0.0 * ratio
    k = tl.where(advantage >= 0, numbers.vespo_k_pos + zero, numbers.vespo_k_neg + zero)
    rate = tl.where(
        advantage >= 0, numbers.vespo_lambda_pos + zero, numbers.vespo_lambda_neg + zero
    )
    return tl.exp(k * log_ratio - rate * (ratio - 1.0))


@jit
def sequence_divisor(n_valid, length, LOSS: tl.constexpr):
    """What the sum of a sequence's token losses is divided by, which has `n_valid` of them."""
    divisor = 0.0 * n_valid + 1.0
    if LOSS.divisor == "tokens":
        divisor = n_valid
    elif LOSS.divisor == "length":
        divisor = length + 0.0 * n_valid
    return divisor
