"""The kernel of the logits level: one program per row, from its logits to its gradient.

The last program to arrive adds what all of them found, in a fixed order.
"""

from mapo_kernels._triton import jit, tl
from mapo_kernels.advantages_kernel import advantage_of_sequence
from mapo_kernels.rows_kernel import (
    load_exponent,
    load_target,
    row_statistics,
    write_gradient,
    write_zeros,
)
from mapo_kernels.tokens_device import (
    arrive,
    live_tokens,
    put_sums,
    score_tokens,
    sequence_bounds,
    sequence_statistics,
    token_signal,
)


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
_TOKEN_STRIDES = ["ids", "old", "ref", "rollout", "weight", "loss_weight", "mask", "advantage"]


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
    LossWeight,
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
    stride_loss_weight,
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
    HAS_LOSS_WEIGHT: tl.constexpr,
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
    active = tl.sum(live.to(tl.float32), 0)
    sums = tl.where(tl.arange(0, SLOTS) == 1, active, sums)

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
        if HAS_LOSS_WEIGHT:
            scale = scale * tl.load(LossWeight + wide * stride_loss_weight + position).to(
                tl.float32
            )
        sums = put_sums(
            sums, tl.sum(loss, 0) * scale, active, tl.sum(one, 0), tl.sum(low, 0),
            tl.sum(high, 0), tl.sum(ratio, 0), tl.sum(new_kl, 0), tl.sum(ref_kl, 0), entropy,
            tl.max(ratio, 0), SLOTS,
        )  # fmt: skip
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
            scale = scale / tl.where(divisor <= 0, 1.0, divisor)
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

    arrive(
        sums, Partials, Counter, Normalizer, Loss, Results, row, n_programs, denominator,
        NORMALIZER, SLOTS, BLOCK_P,
    )  # fmt: skip
