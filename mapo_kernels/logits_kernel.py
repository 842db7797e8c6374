"""The kernels of the logits level: one program per row of V logits.

A row is read twice, and the second time it should still lie in a cache: first its statistics, with
which d loss / d logp of its token is known in closed form, then its gradient, from the end of the
row, which was read last, to its beginning. Between the two every thread works alone: each keeps a
running maximum and running sums of its own columns, so the loops have no barrier.

Exponents are kept in units of log 2, as c x - m with c = log2(e) / temperature in one fused
multiply-add: exact where x and the maximum are large and close.
"""

from mapo_kernels._triton import jit, tl
from mapo_kernels.advantages_kernel import advantage_of_sequence
from mapo_kernels.formula import exp, row_summary
from mapo_kernels.tokens_kernel import (
    finish,
    live_tokens,
    load_row,
    score_tokens,
    sequence_bounds,
    sequence_statistics,
    token_signal,
)


@jit
def tile_columns(R: tl.constexpr, A: tl.constexpr, WIDE: tl.constexpr):
    """Columns [R, A] of a tile: A of each of R threads, so that a thread's maximum is its own.

    They are adjacent where a row is aligned to 16 bytes, which a thread reads at once. Elsewhere
    neighbouring threads read neighbouring columns.
    """
    if WIDE:
        columns = tl.arange(0, R)[:, None] * A + tl.arange(0, A)[None, :]
    else:
        columns = tl.arange(0, R)[:, None] + tl.arange(0, A)[None, :] * R
    return columns


@jit
def load_tile(Row, offs, vocab, target, MASKED: tl.constexpr):
    """One tile [R, A] of a row in float32; -inf at the target and beyond the row if MASKED."""
    if MASKED:
        x = tl.load(
            Row + offs, mask=offs < vocab, other=float("-inf"), eviction_policy="evict_last"
        )
        x = tl.where(offs == target, float("-inf"), x.to(tl.float32))
    else:
        x = tl.load(Row + offs, eviction_policy="evict_last").to(tl.float32)
    return x


@jit
def fold_block(
    Row,
    start,
    top,
    total,
    weighted,
    c,
    vocab,
    target,
    MASKED: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    R: tl.constexpr,
    A: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Add two tiles to every thread's running maximum, sum of 2^d and sum of 2^d d."""
    offs = start + tile_columns(R, A, WIDE)
    x0 = load_tile(Row, offs, vocab, target, MASKED)
    x1 = load_tile(Row, offs + R * A, vocab, target, MASKED)
    new_top = tl.maximum(top, tl.maximum(tl.max(x0, 1), tl.max(x1, 1)) * c)
    fade = tl.exp2(top - new_top)
    d0 = tl.fma(x0, c, -new_top[:, None])
    d1 = tl.fma(x1, c, -new_top[:, None])
    e0 = tl.exp2(d0)
    e1 = tl.exp2(d1)
    if HAS_ENTROPY:
        # 2^-inf times -inf is meant to be 0.
        products = tl.fma(e0, tl.maximum(d0, -1e30), e1 * tl.maximum(d1, -1e30))
        weighted = tl.fma(total, top - new_top, weighted) * fade + tl.sum(products, 1)
    total = tl.fma(total, fade, tl.sum(e0 + e1, 1))
    return new_top, total, weighted


@jit
def row_statistics(
    Row,
    target,
    vocab,
    c,
    HAS_ENTROPY: tl.constexpr,
    R: tl.constexpr,
    A: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Read a row once. `target` is its token id, or -1 for one that does not exist.

    Returns (reference m in units of log 2, sum over all columns, log-prob of the target,
    probability of all others, entropy).
    """
    BLOCK: tl.constexpr = 2 * R * A
    top = tl.full([R], -1e30, tl.float32)
    total = tl.zeros([R], tl.float32)
    weighted = tl.zeros([R], tl.float32)
    n_full = vocab // BLOCK
    # The target stays out of the sums, so its block is left to the masked loop.
    inside = (target >= 0) & (target < n_full * BLOCK)
    own = tl.where(inside, target // BLOCK, n_full)
    for i in range(0, n_full - tl.where(inside, 1, 0)):
        start = (i + tl.where(i >= own, 1, 0)) * BLOCK
        top, total, weighted = fold_block(
            Row, start, top, total, weighted, c, vocab, target, False, HAS_ENTROPY, R, A, WIDE
        )
    for k in range(tl.where(inside, 0, 1), tl.where(n_full * BLOCK < vocab, 2, 1)):
        start = tl.where(k == 0, own, n_full) * BLOCK
        top, total, weighted = fold_block(
            Row, start, top, total, weighted, c, vocab, target, True, HAS_ENTROPY, R, A, WIDE
        )
    index = target + tl.arange(0, 1)
    x = tl.load(Row + index, mask=index >= 0, other=float("nan")).to(tl.float32)
    x = tl.sum(x, 0)
    reference = tl.maximum(tl.max(top, 0), x * c)
    fade = tl.exp2(top - reference)
    others = tl.sum(total * fade, 0)
    weighted = tl.sum(tl.fma(total, top - reference, weighted) * fade, 0)
    gap = tl.fma(x, c, -reference)
    logp, rest, total, entropy = row_summary(
        others, weighted * 0.6931471805599453, gap * 0.6931471805599453
    )
    return reference, total, logp, rest, entropy


@jit
def narrow(x, dtype: tl.constexpr, CONVERTS: tl.constexpr):
    """`x` rounded to nearest, ties to even, in the dtype of the gradient.

    Where the hardware has no conversion to bfloat16, the compiler's own takes five instructions, of
    which two keep a NaN from overflowing. One that stems from bfloat16 cannot.
    """
    if dtype == tl.bfloat16 and not CONVERTS:
        bits = x.to(tl.int32, bitcast=True)
        bits = bits + 32767 + ((bits >> 16) & 1)
        y = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(dtype)
    return y


@jit
def write_zeros(Out, vocab, R: tl.constexpr, A: tl.constexpr, WIDE: tl.constexpr):
    """The gradient of a row that needs none."""
    zeros = tl.zeros([R, A], Out.dtype.element_ty)
    for start in range(0, vocab, R * A):
        offs = start + tile_columns(R, A, WIDE)
        tl.store(Out + offs, zeros, mask=offs < vocab)


@jit
def gradient_tile(
    Row,
    Out,
    offs,
    vocab,
    c,
    reference,
    factor,
    tilt,
    MASKED: tl.constexpr,
    HAS_BONUS: tl.constexpr,
    CONVERTS: tl.constexpr,
):
    """2^d (factor + tilt d) of one tile of a row, to where the gradient goes."""
    if MASKED:
        x = tl.load(
            Row + offs, mask=offs < vocab, other=float("-inf"), eviction_policy="evict_first"
        )
    else:
        x = tl.load(Row + offs, eviction_policy="evict_first")
    d = tl.fma(x.to(tl.float32), c, -reference)
    if HAS_BONUS:
        grad = tl.exp2(d) * tl.fma(tl.maximum(d, -1e30), tilt, factor)
    else:
        grad = tl.exp2(d) * factor
    grad = narrow(grad, Out.dtype.element_ty, CONVERTS)
    if MASKED:
        tl.store(Out + offs, grad, mask=offs < vocab, eviction_policy="evict_first")
    else:
        tl.store(Out + offs, grad, eviction_policy="evict_first")


@jit
def write_gradient(
    Row,
    Out,
    target,
    vocab,
    c,
    reference,
    total,
    logp,
    rest,
    entropy,
    slope,
    bonus,
    HAS_BONUS: tl.constexpr,
    R: tl.constexpr,
    A: tl.constexpr,
    WIDE: tl.constexpr,
    CONVERTS: tl.constexpr,
):
    """Read a row again and write d loss / d logits, from `slope` = d loss / d logp.

    With p the row's probabilities, H its entropy, `bonus` the weight of the entropy bonus:
    slope (1[j = y] - p_j) + bonus p_j (log p_j + H), over the temperature. Out may be Row.
    """
    per_logit = c * 0.6931471805599453
    slope = slope * per_logit
    bonus = bonus * per_logit
    factor = -slope / total
    tilt = 0.0
    at_target = slope * rest
    if HAS_BONUS:
        factor = factor + bonus * (entropy - tl.log(total)) / total
        tilt = bonus * 0.6931471805599453 / total
        at_target = at_target + bonus * exp(logp) * (tl.maximum(logp, -1e30) + entropy)
    tile = tile_columns(R, A, WIDE)
    n_full = vocab // (2 * R * A)
    for start in range(n_full * (2 * R * A), vocab, R * A):
        gradient_tile(
            Row, Out, start + tile, vocab, c, reference, factor, tilt, True, HAS_BONUS, CONVERTS
        )
    for i in range(0, n_full):
        start = (n_full - 1 - i) * (2 * R * A)
        for u in tl.static_range(2):
            gradient_tile(
                Row, Out, start + u * (R * A) + tile, vocab, c, reference, factor, tilt, False,
                HAS_BONUS, CONVERTS,
            )  # fmt: skip
    # Another thread wrote the target's column, so this one waits for it.
    tl.debug_barrier()
    index = target + tl.arange(0, 1)
    value = tl.zeros([1], tl.float32) + at_target
    tl.store(Out + index, value.to(Out.dtype.element_ty), mask=index >= 0)


@jit
def load_target(TokenIds, vocab):
    """The token id of a row, -1 if it does not exist."""
    token = tl.load(TokenIds)
    return tl.where((token >= 0) & (token < vocab), token, -1).to(tl.int32)


@jit
def load_exponent(Temperature, index, c, HAS_TEMPERATURE: tl.constexpr):
    """log2(e) / temperature: the given number, or from a tensor of temperatures."""
    if HAS_TEMPERATURE:
        c = 1.4426950408889634 / tl.load(Temperature + index).to(tl.float32)
    return c


@jit(do_not_specialize=["n", "length", "per_temperature"])
def score_kernel(
    Logits,  # n rows of V
    TokenIds,  # [n]
    Temperature,  # [n / per_temperature]
    Mask,  # [n]
    Table,  # [COLUMNS, n]
    n,
    length,
    per_temperature,
    vocab,
    stride_row,
    gap,
    c,
    HAS_MASK: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    COLUMNS: tl.constexpr,  # 1: log-probs; 2: entropies too; 5: all that the gradient needs
    R: tl.constexpr,
    A: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Statistics of a row; all 0, and nothing read, where it is masked."""
    row = tl.program_id(0)
    live = 1
    if HAS_MASK:
        live = (tl.load(Mask + row) != 0).to(tl.int32)
    logp = 0.0
    entropy = 0.0
    reference = 0.0
    total = 1.0
    rest = 0.0
    if live > 0:
        Row = Logits + (row.to(tl.int64) * stride_row + (row // length).to(tl.int64) * gap)
        target = load_target(TokenIds + row, vocab)
        c = load_exponent(Temperature, row // per_temperature, c, HAS_TEMPERATURE)
        reference, total, logp, rest, entropy = row_statistics(
            Row, target, vocab, c, COLUMNS > 1, R, A, WIDE
        )
    tl.store(Table + row, logp)
    if COLUMNS > 1:
        tl.store(Table + n + row, entropy)
    if COLUMNS > 2:
        tl.store(Table + 2 * n + row, reference)
        tl.store(Table + 3 * n + row, total)
        tl.store(Table + 4 * n + row, rest)


@jit(do_not_specialize=["n", "length", "per_temperature"])
def gradient_kernel(
    Logits,  # n rows of V
    Grad,  # n rows of V
    TokenIds,  # [n]
    Temperature,  # [n / per_temperature]
    Mask,  # [n]
    Table,  # [5, n]
    Slope,  # [n]
    Bonus,  # [n]
    Results,  # [SLOTS]
    n,
    length,
    per_temperature,
    vocab,
    stride_row,
    gap,
    stride_grad,
    gap_grad,
    c,
    HAS_MASK: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_BONUS: tl.constexpr,
    R: tl.constexpr,
    A: tl.constexpr,
    WIDE: tl.constexpr,
    CONVERTS: tl.constexpr,
):
    """Gradient of a row whose statistics and d loss / d logp (but for the batch's scale) exist."""
    row = tl.program_id(0)
    wide = row.to(tl.int64)
    sequence = (row // length).to(tl.int64)
    Out = Grad + (wide * stride_grad + sequence * gap_grad)
    live = 1
    if HAS_MASK:
        live = (tl.load(Mask + row) != 0).to(tl.int32)
    scale = tl.load(Results)
    slope = 0.0
    if live > 0:
        slope = tl.load(Slope + row)
    if not HAS_BONUS:
        live = live * tl.where(slope != 0, 1, 0)
    if live > 0:
        target = load_target(TokenIds + row, vocab)
        c = load_exponent(Temperature, row // per_temperature, c, HAS_TEMPERATURE)
        bonus = 0.0
        if HAS_BONUS:
            bonus = tl.load(Bonus + row) * scale
        write_gradient(
            Logits + (wide * stride_row + sequence * gap), Out, target, vocab, c,
            tl.load(Table + 2 * n + row), tl.load(Table + 3 * n + row), tl.load(Table + row),
            tl.load(Table + 4 * n + row), tl.load(Table + n + row), slope * scale,
            bonus, HAS_BONUS, R, A, WIDE, CONVERTS,
        )  # fmt: skip
    else:
        write_zeros(Out, vocab, R, A, WIDE)


@jit(do_not_specialize=["n", "length"])
def rescale_kernel(
    Grad,  # n rows of V
    Upstream,  # []
    n,
    length,
    vocab,
    stride_row,
    gap,
    R: tl.constexpr,
    A: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Backward: multiply the gradient by the upstream gradient, unless that is 1."""
    factor = tl.load(Upstream).to(tl.float32)
    if factor != 1.0:
        for row in range(tl.program_id(0), n, tl.num_programs(0)):
            # The counter may be a plain number, which has no `.to`.
            wide = tl.zeros([], tl.int64) + row
            Row = Grad + (wide * stride_row + (wide // length) * gap)
            for start in range(0, vocab, R * A):
                offs = start + tile_columns(R, A, WIDE)
                x = tl.load(Row + offs, mask=offs < vocab).to(tl.float32)
                # What is exactly 0 stays so, whatever the factor.
                x = tl.where(x == 0, 0.0, x * factor)
                tl.store(Row + offs, x.to(Grad.dtype.element_ty), mask=offs < vocab)


@jit
def count_live(Mask, begin, end, HAS_MASK: tl.constexpr, BLOCK_T: tl.constexpr):
    """Live tokens of a whole batch, whose mask is contiguous."""
    count = tl.zeros([BLOCK_T], tl.float32)
    for start in range(begin, end, BLOCK_T):
        offs = start + tl.arange(0, BLOCK_T)
        _, live = live_tokens(Mask, offs, begin, end, end, HAS_MASK)
        count = count + live.to(tl.float32)
    return tl.sum(count, 0)


@jit
def sequence_of(CuSeqlens, row, n_sequences, BLOCK_T: tl.constexpr):
    """Which packed sequence a row lies in: how many of them end at or before it."""
    ended = tl.zeros([BLOCK_T], tl.int32)
    for start in range(0, n_sequences, BLOCK_T):
        offs = start + tl.arange(0, BLOCK_T)
        ends = tl.load(CuSeqlens + 1 + offs, mask=offs < n_sequences, other=2147483647)
        ended = ended + (ends <= row).to(tl.int32)
    return tl.minimum(tl.sum(ended, 0), n_sequences - 1)


# One number per row is read through these strides: their alignment is worth no compilation.
_TOKEN_STRIDES = ["ids", "old", "ref", "rollout", "weight", "mask", "advantage"]


@jit(
    do_not_specialize=[
        "n_sequences",
        "length",
        "group_size",
        *(f"stride_{name}" for name in _TOKEN_STRIDES),
    ]
)
def logits_loss_kernel(
    Logits,  # [B, T, V] or [total, V]
    Grad,  # the same; may be Logits
    TokenIds,  # [B, T] or [total], as every token tensor
    Temperature,  # [B] or [total]
    Old,
    Ref,
    Rollout,
    Weight,
    Mask,
    Advantage,  # [B] or per token
    Rewards,  # [B]
    Success,  # [B]
    GroupIds,  # [B]
    CuSeqlens,  # [B + 1]
    Normalizer,  # []
    Loss,  # []
    Results,  # [SLOTS]
    Partials,  # [SLOTS, programs]
    AdvantageOut,  # [B]
    Counter,  # [1]
    n_sequences,
    length,  # T, or total if packed
    group_size,
    denominator,
    max_tokens,
    vocab,
    stride_row,
    gap,
    stride_grad,
    gap_grad,
    stride_ids,
    stride_old,
    stride_ref,
    stride_rollout,
    stride_weight,
    stride_mask,
    stride_advantage,
    c,
    success_threshold,
    std_correction,
    eps,
    fixed_certainty,
    max_abs,
    eps_low,
    eps_high,
    dual_clip,
    eps_high_cispo,
    sapo_tau_pos,
    sapo_tau_neg,
    beta,
    entropy_coef,
    rollout_cap,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_ROLLOUT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_BONUS: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    PACKED: tl.constexpr,
    ADVANTAGE: tl.constexpr,  # "group", "sequence" or "token"
    LAYOUT: tl.constexpr,
    NORMALIZER: tl.constexpr,  # "tensor", "number" or "count"
    LENGTH_WEIGHT: tl.constexpr,  # "one", "mean" or "fixed"
    SCORE_ALL: tl.constexpr,
    OBJECTIVE: tl.constexpr,
    HAS_DUAL_CLIP: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    KL_CORRECTION: tl.constexpr,
    HAS_SUCCESS: tl.constexpr,
    HAS_MAX_ABS: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    CERTAINTY: tl.constexpr,
    APD: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    R: tl.constexpr,
    A: tl.constexpr,
    WIDE: tl.constexpr,
    CONVERTS: tl.constexpr,
):
    """One row, from its logits to its gradient; the last program to arrive finishes the batch."""
    row = tl.program_id(0)
    n_programs = tl.num_programs(0)
    sequence = row // length
    position = row % length
    if PACKED:
        sequence = sequence_of(CuSeqlens, row, n_sequences, BLOCK_T)
    begin, end, cover, limit = sequence_bounds(CuSeqlens, sequence, n_sequences, length, PACKED)
    wide = sequence.to(tl.int64)
    offs = position + tl.arange(0, 1)  # [1], as everything about the token
    Old = Old + wide * stride_old if HAS_OLD else Old
    Ref = Ref + wide * stride_ref if HAS_REF else Ref
    Rollout = Rollout + wide * stride_rollout if HAS_ROLLOUT else Rollout
    Weight = Weight + wide * stride_weight if HAS_WEIGHT else Weight
    RowMask = Mask + wide * stride_mask if HAS_MASK else Mask
    Advantage = Advantage + wide * stride_advantage if ADVANTAGE != "group" else Advantage
    inside, live = live_tokens(RowMask, offs, begin, end, limit, HAS_MASK)

    slots = tl.arange(0, SLOTS)
    sums = tl.zeros([SLOTS], tl.float32)
    advantage = tl.full([], 1.0, tl.float32)
    if ADVANTAGE == "group":
        # Every sequence's first row speaks for it, be it masked or not.
        if tl.max((live | (offs == 0)).to(tl.int32), 0) > 0:
            advantage, sums = advantage_of_sequence(
                Rewards, Success, GroupIds, AdvantageOut, sequence, position, n_sequences,
                group_size, success_threshold, std_correction, eps, fixed_certainty, max_abs,
                SLOTS, BLOCK_G, LAYOUT, HAS_SUCCESS, HAS_MAX_ABS, ESTIMATOR, CERTAINTY, APD,
            )  # fmt: skip
    elif ADVANTAGE == "sequence":
        advantage = tl.load(Advantage).to(tl.float32)
    candidates = live
    if not SCORE_ALL:
        candidates = live & (tl.where(live, advantage, 0.0) != 0)
    advantages, weight, scored = token_signal(
        Weight, Advantage, offs, inside, candidates, advantage,
        HAS_WEIGHT, ADVANTAGE, SCORE_ALL, False,
    )  # fmt: skip
    sums = tl.where(slots == 1, tl.sum(live.to(tl.float32), 0), sums)

    Out = Grad
    if HAS_GRAD:
        Out = Grad + (row.to(tl.int64) * stride_grad + wide * gap_grad)
    if tl.max(scored.to(tl.int32), 0) > 0:
        Row = Logits + (row.to(tl.int64) * stride_row + wide * gap)
        target = load_target(TokenIds + wide * stride_ids + position, vocab)
        c = load_exponent(Temperature, row if PACKED else sequence, c, HAS_TEMPERATURE)
        reference, total, logp, rest, entropy = row_statistics(
            Row, target, vocab, c, True, R, A, WIDE
        )
        zero = tl.zeros([1], tl.float32)
        loss, d_log_ratio, d_logp, ratio, new_kl, ref_kl, one, low, high = score_tokens(
            zero + logp, Old, Ref, Rollout, offs, inside, scored, advantages, weight,
            zero + entropy, 0.0, eps_low, eps_high, dual_clip, eps_high_cispo, sapo_tau_pos,
            sapo_tau_neg, beta, entropy_coef, rollout_cap, HAS_OLD, HAS_REF, HAS_ROLLOUT,
            HAS_BONUS, False, OBJECTIVE, HAS_DUAL_CLIP, KL_ESTIMATOR, KL_CORRECTION,
        )  # fmt: skip
        scale = 1.0
        if LENGTH_WEIGHT == "mean":
            n_live, mean, signal = sequence_statistics(
                Mask, Mask, RowMask, Mask, Mask, begin, end,
                False, HAS_MASK, False, "sequence", False, BLOCK_T,
            )  # fmt: skip
            scale = 1.0 / n_live
        elif LENGTH_WEIGHT == "fixed":
            scale = 1.0 / max_tokens
        sums = tl.where(slots == 0, tl.sum(loss, 0) * scale, sums)
        sums = tl.where(slots == 2, tl.sum(one, 0), sums)
        sums = tl.where(slots == 3, tl.sum(low, 0), sums)
        sums = tl.where(slots == 4, tl.sum(high, 0), sums)
        sums = tl.where(slots == 5, tl.sum(ratio, 0), sums)
        sums = tl.where(slots == 6, tl.sum(new_kl, 0), sums)
        sums = tl.where(slots == 7, tl.sum(ref_kl, 0), sums)
        sums = tl.where(slots == 8, entropy, sums)
        sums = tl.where(slots == 9, tl.max(ratio, 0), sums)
        if HAS_GRAD:
            divisor = denominator
            if NORMALIZER == "tensor":
                divisor = tl.load(Normalizer).to(tl.float32)
            elif NORMALIZER == "count":
                first = 0
                last = n_programs
                if PACKED:
                    first = tl.maximum(tl.load(CuSeqlens).to(tl.int32), 0)
                    last = tl.load(CuSeqlens + n_sequences).to(tl.int32)
                    last = tl.minimum(last, n_programs)
                divisor = count_live(Mask, first, last, HAS_MASK, BLOCK_T)
            scale = scale / tl.where(divisor > 0, divisor, 1.0)
            slope = tl.sum(d_logp + d_log_ratio, 0) * scale
            has_slope = 1
            if not HAS_BONUS:
                has_slope = tl.where(slope != 0, 1, 0)
            if has_slope > 0:
                write_gradient(
                    Row, Out, target, vocab, c, reference, total, logp, rest, entropy, slope,
                    entropy_coef * scale, HAS_BONUS, R, A, WIDE, CONVERTS,
                )  # fmt: skip
            else:
                write_zeros(Out, vocab, R, A, WIDE)
    elif HAS_GRAD:
        write_zeros(Out, vocab, R, A, WIDE)

    tl.store(Partials + slots * n_programs + row, sums)
    # The barrier and the release make this program's sums visible before its arrival is.
    tl.debug_barrier()
    if tl.atomic_add(Counter, 1, sem="acq_rel") == n_programs - 1:
        finish(
            Partials, Normalizer, Loss, Results, n_programs, denominator, NORMALIZER, SLOTS, BLOCK_P
        )
        tl.store(Counter, 0)
