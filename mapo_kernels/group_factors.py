"""Factors of a group's advantages that its success ratio decides: device functions of `formula`."""

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
