"""Factors of a group's advantages that its success ratio decides: device functions of `formula`.

Kernels that are compiled with and without fused multiply-adds compute them, and all of them have
the same bits: what could be fused is so here, but for products that are exact.
"""

from mapo_kernels._triton import jit, tl


@jit
def difficulty_weight(successes, count, exponent, GROUP: tl.constexpr):
    """(1 - p)^exponent (`focal`) or p^-exponent (`power`) of a group with p = successes / count.

    Where that power of 0 would be infinite it is 1: such a group is left as it is.
    """
    share = successes
    if GROUP.difficulty == "focal":
        # From the counts, so that 1 - p has all its digits where p is close to 1.
        share = count - successes
        power = 0.0 * share + exponent
    else:
        power = 0.0 * share - exponent
    base = share / tl.where(count > 0, count, 1.0)
    weight = tl.exp2(power * tl.log2(tl.where(base > 0, base, 1.0)))
    return tl.where(base > 0, weight, tl.where(power > 0, 0.0 * base, 0.0 * base + 1.0))


@jit
def subset_moments(successes, count, numbers):
    """Mean and deviation of "has a success" over the k-subsets of a group, for pass@k.

    And what a member's success adds to its share of such subsets among those that it is in, whose
    k - 1 others are drawn from the count - 1: C(failures - 1, k - 1) / C(count - 1, k - 1). Sums
    and products of positive terms, of which nothing cancels; 0 where each k-subset has a success.
    """
    whole = tl.where(count > 0, count, 1.0)
    failures = count - successes
    failed = failures / whole
    share = successes / whole
    # Of k = 1; the next ones draw one member more.
    adds = 0.0 * whole + 1.0
    subset = 1.0 / whole
    drawn = 1.0
    while drawn < numbers.pass_at_k:
        left = tl.where(count > drawn, count - drawn, 1.0)
        share = tl.fma(failed * adds, successes / left, share)
        adds = adds * (tl.where(failures > drawn, failures - drawn, 0.0 * failures) / left)
        subset = subset * ((drawn + 1.0) / left)
        drawn = drawn + 1.0
    rest = 1.0 - numbers.std_correction * subset
    variance = share * (failed * adds) / tl.where(rest > 0, rest, 1.0)
    return share, tl.sqrt(variance), adds


@jit
def certainty_weight(p, fixed, GROUP: tl.constexpr):
    """lambda(p): 0 where the group is uncertain (p = 1/2), 1 where it is certain (p = 0 or 1)."""
    if GROUP.certainty == "quadratic":
        certainty = tl.fma(-4.0 * p, 1.0 - p, 1.0)
    elif GROUP.certainty == "linear":
        certainty = tl.abs(2.0 * p - 1.0)
    elif GROUP.certainty == "entropy":
        q = 1.0 - p
        log_p = tl.log2(tl.where(p > 0, p, 1.0))
        log_q = tl.log2(tl.where(q > 0, q, 1.0))
        certainty = tl.fma(q, log_q, tl.fma(p, log_p, 1.0))
    elif GROUP.certainty == "step":
        certainty = tl.where((p >= 0.25) & (p <= 0.75), 0.0 * p, 1.0 + 0.0 * p)
    else:
        certainty = 0.0 * p + fixed
    return certainty
