"""The kernels of the log-prob level: log-probs to loss, metrics and d loss / d logp.

One launch computes everything, the group statistics included: each program finds its own group's
statistics (G numbers), walks its share of one sequence, and leaves its sums; the last program to
arrive adds all sums in a fixed order, so the order of arrival enters no result. The gradient it
leaves lacks the two factors known only afterwards (the batch's denominator and the upstream
gradient); the backward launch applies both.
"""

from mapo_kernels._triton import jit, tl
from mapo_kernels.advantages_kernel import advantage_of_sequence
from mapo_kernels.tokens_device import (
    arrive,
    live_tokens,
    load_row,
    put_sums,
    score_tokens,
    sequence_bounds,
    sequence_statistics,
    token_signal,
)


@jit
def spread_slope(Grad, Mask, slope, begin, end, HAS_MASK: tl.constexpr, BLOCK_T: tl.constexpr):
    """Add a sequence's common slope to the gradient of its live tokens."""
    tl.debug_barrier()
    for start in range(begin, end, BLOCK_T):
        offs = start + tl.arange(0, BLOCK_T)
        inside, live = live_tokens(Mask, offs, begin, end, end, HAS_MASK)
        grad = tl.load(Grad + offs, mask=inside, other=0.0)
        tl.store(Grad + offs, grad + tl.where(live, slope, 0.0), mask=inside)


@jit(do_not_specialize=["n_sequences", "n_splits", "group_size"])
def token_loss_kernel(
    Logp,  # [B, T] or [total], as every token tensor
    Old,
    Ref,
    Rollout,
    Weight,
    Entropy,
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
    Grad,  # like Logp, float32, contiguous
    Counter,  # [1]
    n_sequences,
    length,  # T, or total if packed
    n_splits,  # programs per sequence
    group_size,
    denominator,
    max_tokens,
    stride_logp,
    stride_old,
    stride_ref,
    stride_rollout,
    stride_weight,
    stride_entropy,
    stride_loss_weight,
    stride_mask,
    stride_advantage,
    stride_grad,
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
    HAS_OLD: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_ROLLOUT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_LOSS_WEIGHT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    PACKED: tl.constexpr,
    ADVANTAGE: tl.constexpr,  # "group", "sequence" or "token"
    LAYOUT: tl.constexpr,
    NORMALIZER: tl.constexpr,  # "tensor", "number" or "count"
    LENGTH_WEIGHT: tl.constexpr,  # "one", "mean" or "fixed"
    SCORE_ALL: tl.constexpr,
    SEQUENCE_LEVEL: tl.constexpr,
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
):
    """One program's share of one sequence; the last program to arrive finishes the batch."""
    pid = tl.program_id(0)
    n_programs = n_sequences * n_splits
    sequence = pid // n_splits
    split = pid % n_splits
    begin, end, cover, limit = sequence_bounds(CuSeqlens, sequence, n_sequences, length, PACKED)
    row = sequence.to(tl.int64)
    Logp = Logp + row * stride_logp
    Old = Old + row * stride_old if HAS_OLD else Old
    Ref = Ref + row * stride_ref if HAS_REF else Ref
    Rollout = Rollout + row * stride_rollout if HAS_ROLLOUT else Rollout
    Weight = Weight + row * stride_weight if HAS_WEIGHT else Weight
    Entropy = Entropy + row * stride_entropy if HAS_ENTROPY else Entropy
    LossWeight = LossWeight + row * stride_loss_weight if HAS_LOSS_WEIGHT else LossWeight
    Mask = Mask + row * stride_mask if HAS_MASK else Mask
    Advantage = Advantage + row * stride_advantage if ADVANTAGE != "group" else Advantage
    Grad = Grad + row * stride_grad if HAS_GRAD else Grad

    sums = tl.zeros([SLOTS], tl.float32)
    advantage = tl.full([], 1.0, tl.float32)
    if ADVANTAGE == "group":
        advantage, sums = advantage_of_sequence(
            Rewards, Success, GroupIds, AdvantageOut, sequence, split, n_sequences, group_size,
            success_threshold, std_correction, eps, fixed_certainty, max_abs,
            SLOTS, BLOCK_G, LAYOUT, HAS_SUCCESS, HAS_MAX_ABS, ESTIMATOR, CERTAINTY, APD,
        )  # fmt: skip
    elif ADVANTAGE == "sequence":
        advantage = tl.load(Advantage).to(tl.float32)

    n_live = 1.0
    mean_log_ratio = 0.0
    scale = 1.0
    # A sequence without signal needs no statistics: nothing of it will be scored.
    stop = end
    if not SCORE_ALL:
        stop = tl.where(advantage != 0, end, begin)
    if SEQUENCE_LEVEL or LENGTH_WEIGHT == "mean":
        n_live, mean_log_ratio, signal = sequence_statistics(
            Logp, Old, Mask, Weight, Advantage, begin, stop,
            HAS_OLD, HAS_MASK, HAS_WEIGHT, ADVANTAGE, SEQUENCE_LEVEL, BLOCK_T,
        )  # fmt: skip
        if SEQUENCE_LEVEL:
            advantage = tl.where(signal > 0, advantage, 0.0)
    if LENGTH_WEIGHT == "mean":
        scale = 1.0 / n_live
    elif LENGTH_WEIGHT == "fixed":
        scale = 1.0 / max_tokens

    loss_sum = tl.zeros([BLOCK_T], tl.float32)
    active_sum = tl.zeros([BLOCK_T], tl.float32)
    scored_sum = tl.zeros([BLOCK_T], tl.float32)
    low_sum = tl.zeros([BLOCK_T], tl.float32)
    high_sum = tl.zeros([BLOCK_T], tl.float32)
    ratio_sum = tl.zeros([BLOCK_T], tl.float32)
    approx_kl_sum = tl.zeros([BLOCK_T], tl.float32)
    ref_kl_sum = tl.zeros([BLOCK_T], tl.float32)
    entropy_sum = tl.zeros([BLOCK_T], tl.float32)
    ratio_max = tl.zeros([BLOCK_T], tl.float32)
    slope_sum = tl.zeros([BLOCK_T], tl.float32)
    for start in range(cover + split * BLOCK_T, limit, n_splits * BLOCK_T):
        offs = start + tl.arange(0, BLOCK_T)
        inside, live = live_tokens(Mask, offs, begin, end, limit, HAS_MASK)
        active_sum = active_sum + live.to(tl.float32)
        candidates = live
        if not SCORE_ALL:
            candidates = live & (tl.where(live, advantage, 0.0) != 0)
        grad = tl.zeros([BLOCK_T], tl.float32)
        # A block without work (padding, or a sequence without signal) reads nothing but its mask.
        if tl.max(candidates.to(tl.int32), 0) > 0:
            advantages, weight, scored = token_signal(
                Weight, Advantage, offs, inside, candidates, advantage,
                HAS_WEIGHT, ADVANTAGE, SCORE_ALL, SEQUENCE_LEVEL,
            )  # fmt: skip
            logp = load_row(Logp, offs, inside, scored)
            entropy = tl.zeros([BLOCK_T], tl.float32)
            if HAS_ENTROPY:
                entropy = load_row(Entropy, offs, inside, scored)
                entropy_sum = entropy_sum + entropy
            loss, d_log_ratio, d_logp, ratio, new_kl, ref_kl, one, low, high = score_tokens(
                logp, Old, Ref, Rollout, offs, inside, scored, advantages, weight, entropy,
                mean_log_ratio, eps_low, eps_high, dual_clip, eps_high_cispo, sapo_tau_pos,
                sapo_tau_neg, beta, entropy_coef, rollout_cap, HAS_OLD, HAS_REF, HAS_ROLLOUT,
                HAS_ENTROPY, SEQUENCE_LEVEL, OBJECTIVE, HAS_DUAL_CLIP, KL_ESTIMATOR,
                KL_CORRECTION,
            )  # fmt: skip
            if HAS_LOSS_WEIGHT:
                factor = load_row(LossWeight, offs, inside, scored)
                loss = loss * factor
                d_logp = d_logp * factor
                d_log_ratio = d_log_ratio * factor
            loss_sum = loss_sum + loss
            scored_sum = scored_sum + one
            low_sum = low_sum + low
            high_sum = high_sum + high
            ratio_sum = ratio_sum + ratio
            approx_kl_sum = approx_kl_sum + new_kl
            ref_kl_sum = ref_kl_sum + ref_kl
            ratio_max = tl.maximum(ratio_max, ratio)
            grad = d_logp
            if SEQUENCE_LEVEL:
                slope_sum = slope_sum + d_log_ratio
            else:
                grad = grad + d_log_ratio
        if HAS_GRAD:
            tl.store(Grad + offs, grad * scale, mask=inside)
    if HAS_GRAD and SEQUENCE_LEVEL:
        # The mean over a sequence is self-adjoint: every live token gets the mean of the slopes.
        slope = tl.sum(slope_sum, 0) / n_live * scale
        spread_slope(Grad, Mask, slope, begin, stop, HAS_MASK, BLOCK_T)

    sums = put_sums(
        sums, tl.sum(loss_sum, 0) * scale, tl.sum(active_sum, 0), tl.sum(scored_sum, 0),
        tl.sum(low_sum, 0), tl.sum(high_sum, 0), tl.sum(ratio_sum, 0), tl.sum(approx_kl_sum, 0),
        tl.sum(ref_kl_sum, 0), tl.sum(entropy_sum, 0), tl.max(ratio_max, 0), SLOTS,
    )  # fmt: skip
    arrive(
        sums, Partials, Counter, Normalizer, Loss, Results, pid, n_programs, denominator,
        NORMALIZER, SLOTS, BLOCK_P,
    )  # fmt: skip


@jit
def scale_kernel(Grad, Upstream, Results, Out, n, BLOCK: tl.constexpr):
    """Backward: apply the upstream gradient and the batch's scale, both still on the device."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(Upstream).to(tl.float32) * tl.load(Results)
    grad = tl.load(Grad + offs, mask=offs < n, other=0.0)
    tl.store(Out + offs, grad * factor, mask=offs < n)
