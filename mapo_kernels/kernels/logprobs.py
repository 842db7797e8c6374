"""The kernels of the log-prob level: log-probs to loss, metrics and d loss / d logp.

One launch computes everything, the group statistics included: each program finds its own group's
statistics (G numbers), walks its share of one sequence, and leaves its sums; the last program to
arrive adds all sums in a fixed order, so the order of arrival enters no result. The gradient it
leaves lacks the two factors known only afterwards (the batch's denominator and the upstream
gradient); the backward launch applies both.
"""

from mapo_kernels._triton import jit, tl
from mapo_kernels.formula import sequence_divisor
from mapo_kernels.kernels.advantages import advantage_of_sequence
from mapo_kernels.kernels.token import (
    add_scores,
    load_row,
    no_scores,
    publish_sums,
    score_tokens,
    sequence_bounds,
    sequence_statistics,
    token_signal,
    total_scores,
    valid_tokens,
)


@jit
def spread_slope(Grad, Mask, row, slope, begin, end, BLOCK_T: tl.constexpr):
    """Add a sequence's common slope to the gradient of its valid tokens."""
    tl.debug_barrier()
    for start in range(begin, end, BLOCK_T):
        offs = start + tl.arange(0, BLOCK_T)
        inside, valid = valid_tokens(Mask, row, offs, begin, end, end)
        grad = tl.load(Grad + row + offs, mask=inside, other=0.0)
        tl.store(Grad + row + offs, grad + tl.where(valid, slope, 0.0), mask=inside)


@jit(do_not_specialize=["n_sequences", "n_splits", "group_size"])
def token_loss_kernel(
    Logp,  # [B, T] or [total], as every token tensor
    tokens,  # Tokens
    Advantage,  # [B], or None where advantages are the tokens' or come from rewards
    rewards,  # Rewards, or None
    AdvantageOut,  # [B]
    Grad,  # like Logp, float32; or None
    batch,  # Common
    n_sequences,
    length,  # T, or total if packed
    n_splits,  # programs per sequence
    group_size,
    max_tokens,
    numbers,  # LossNumbers
    group_numbers,  # AdvantageNumbers
    LOSS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One program's share of one sequence; the last program to arrive finishes the batch."""
    pid = tl.program_id(0)
    n_programs = n_sequences * n_splits
    sequence = pid // n_splits
    split = pid % n_splits
    begin, end, write_begin, write_end = sequence_bounds(
        batch.cu_seqlens, sequence, n_sequences, length
    )
    row = sequence.to(tl.int64) * (length if batch.cu_seqlens is None else 0)

    group = None
    advantage = tl.full([], 1.0, tl.float32)
    if rewards.reward is not None:
        advantage, group = advantage_of_sequence(
            rewards, AdvantageOut, sequence, split, n_sequences, group_size, group_numbers,
            GROUP, BLOCK_G,
        )  # fmt: skip
    elif Advantage is not None:
        advantage = tl.load(Advantage + sequence).to(tl.float32)

    n_valid = 1.0
    mean_log_ratio = 0.0
    # A sequence without signal needs no statistics: nothing of it will be scored.
    stats_end = end
    if not LOSS.score_all:
        stats_end = tl.where(advantage != 0, end, begin)
    if LOSS.sequence_level or LOSS.divisor == "tokens":
        n_valid, mean_log_ratio, signal = sequence_statistics(
            Logp, tokens, row, begin, stats_end, LOSS.sequence_level, BLOCK_T
        )
        if LOSS.sequence_level:
            advantage = tl.where(signal > 0, advantage, 0.0)
    scale = 1.0 / sequence_divisor(n_valid, max_tokens, LOSS)

    sums = no_scores(BLOCK_T)
    active = tl.zeros([BLOCK_T], tl.float32)
    slope_sum = tl.zeros([BLOCK_T], tl.float32)
    for start in range(write_begin + split * BLOCK_T, write_end, n_splits * BLOCK_T):
        offs = start + tl.arange(0, BLOCK_T)
        inside, valid = valid_tokens(tokens.mask, row, offs, begin, end, write_end)
        active = active + valid.to(tl.float32)
        candidates = valid
        if not LOSS.score_all:
            candidates = valid & (tl.where(valid, advantage, 0.0) != 0)
        grad = tl.zeros([BLOCK_T], tl.float32)
        # A block without work (padding, or a sequence without signal) reads nothing but its mask.
        if tl.max(candidates.to(tl.int32), 0) > 0:
            advantages, weight, scored = token_signal(
                tokens, row, offs, inside, candidates, advantage, LOSS
            )
            logp = load_row(Logp, row, offs, inside, scored)
            entropy = tl.zeros([BLOCK_T], tl.float32)
            if tokens.entropy is not None:
                entropy = load_row(tokens.entropy, row, offs, inside, scored)
            scores, d_log_ratio, d_logp = score_tokens(
                logp, tokens, row, offs, inside, scored, advantages, weight, entropy,
                mean_log_ratio, numbers, LOSS,
            )  # fmt: skip
            sums = add_scores(sums, scores)
            grad = d_logp
            if LOSS.sequence_level:
                slope_sum = slope_sum + d_log_ratio
            else:
                grad = grad + d_log_ratio
        if Grad is not None:
            tl.store(Grad + row + offs, grad * scale, mask=inside)
    if Grad is not None and LOSS.sequence_level:
        # The mean over a sequence is self-adjoint: every valid token gets the mean of the slopes.
        slope = tl.sum(slope_sum, 0) / n_valid * scale
        spread_slope(Grad, tokens.mask, row, slope, begin, stats_end, BLOCK_T)

    publish_sums(total_scores(sums, active, scale), group, batch, pid, n_programs, BLOCK_P)


@jit
def scale_kernel(Grad, Upstream, Results, Out, n, BLOCK: tl.constexpr):
    """Backward: apply the upstream gradient and the batch's scale, both still on the device."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(Upstream).to(tl.float32) * tl.load(Results)
    grad = tl.load(Grad + offs, mask=offs < n, other=0.0)
    tl.store(Out + offs, grad * factor, mask=offs < n)
