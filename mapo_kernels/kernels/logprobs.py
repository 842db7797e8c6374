"""The kernels of the log-prob level: log-probs to loss, metrics and d loss / d logp.

One launch computes everything, the group statistics included: each program walks its share of some
sequences, finds the statistics of their groups (G numbers each), and leaves its sums, which its
threads have kept each for itself; the last program to arrive adds all sums in a fixed order, so the
order of arrival enters no result. The gradient it leaves lacks the two factors known only
afterwards (the batch's denominator and the upstream gradient); the backward launch applies both.
"""

from mapo_kernels._triton import jit, tl
from mapo_kernels.formula import sequence_divisor
from mapo_kernels.kernels.advantages import add_groups, advantage_of_sequence, no_groups
from mapo_kernels.kernels.token import (
    add_scores,
    block_tokens,
    load_row,
    no_scores,
    program_sums,
    publish_sums,
    score_tokens,
    sequence_bounds,
    sequence_statistics,
    token_values,
    valid_tokens,
)


@jit
def spread_slope(
    Grad, Mask, row, slope, begin, end, THREADS: tl.constexpr, PER_THREAD: tl.constexpr
):
    """Add a sequence's common slope to the gradient of its valid tokens."""
    tl.debug_barrier()
    for start in range(begin, end, THREADS * PER_THREAD):
        offs = block_tokens(start, THREADS, PER_THREAD)
        inside, valid = valid_tokens(Mask, row, offs, begin, end, end)
        grad = tl.load(Grad + row + offs, mask=inside, other=0.0)
        tl.store(Grad + row + offs, grad + tl.where(valid, slope, 0.0), mask=inside)


@jit
def loss_of_sequence(
    sums, active, Logp, tokens, Grad, batch, sequence, split, advantage, n_sequences, length,
    n_splits, max_tokens, numbers,
    LOSS: tl.constexpr, THREADS: tl.constexpr, PER_THREAD: tl.constexpr,
):  # fmt: skip
    """Add a program's share of a sequence to the sums of its threads, and write the gradient."""
    BLOCK: tl.constexpr = THREADS * PER_THREAD
    begin, end, write_begin, write_end = sequence_bounds(
        batch.cu_seqlens, sequence, n_sequences, length
    )
    row = (tl.zeros([], tl.int64) + sequence) * (length if batch.cu_seqlens is None else 0)
    n_valid = 1.0
    mean_log_ratio = 0.0
    # A sequence without signal needs no statistics: nothing of it will be scored.
    has_signal = 1
    if not LOSS.score_all:
        has_signal = tl.where(advantage != 0, 1, 0)
    stats_end = tl.where(has_signal > 0, end, begin)
    if LOSS.sequence_level or LOSS.divisor == "tokens":
        n_valid, mean_log_ratio, signal = sequence_statistics(
            Logp, tokens, row, begin, stats_end, LOSS.sequence_level, THREADS, PER_THREAD
        )
        if LOSS.sequence_level and not LOSS.score_all:
            advantage = tl.where(signal > 0, advantage, 0.0)
    scale = 1.0 / sequence_divisor(n_valid, max_tokens, LOSS)

    slopes = tl.zeros([THREADS], tl.float32)
    for start in range(write_begin + split * BLOCK, write_end, n_splits * BLOCK):
        offs = block_tokens(start, THREADS, PER_THREAD)
        inside, valid = valid_tokens(tokens.mask, row, offs, begin, end, write_end)
        active = active + tl.sum(valid.to(tl.float32), 1)
        grad = tl.zeros([THREADS, PER_THREAD], tl.float32)
        # A sequence without signal reads nothing but its mask.
        if has_signal > 0:
            candidates = valid
            if not LOSS.score_all:
                candidates = valid & (tl.where(valid, advantage, 0.0) != 0)
            # Nor does a thread whose tokens are all masked.
            reads = inside & (tl.max(candidates.to(tl.int32), 1) > 0)[:, None]
            values, scored = token_values(tokens, row, offs, reads, candidates, advantage, LOSS)
            logp = load_row(Logp, row, offs, reads, scored)
            entropy = tl.zeros_like(logp)
            if tokens.entropy is not None:
                entropy = load_row(tokens.entropy, row, offs, reads, scored)
            scores, d_log_ratio, d_logp = score_tokens(
                logp, tokens, values, scored, entropy, mean_log_ratio, numbers, LOSS
            )
            sums = add_scores(sums, scores, scale)
            grad = d_logp
            if LOSS.sequence_level:
                slopes = slopes + tl.sum(d_log_ratio, 1)
            else:
                grad = grad + d_log_ratio
        if Grad is not None:
            tl.store(Grad + row + offs, grad * scale, mask=inside)
    if Grad is not None and LOSS.sequence_level:
        # The mean over a sequence is self-adjoint: every valid token gets the mean of the slopes.
        slope = tl.sum(slopes, 0) / n_valid * scale
        spread_slope(Grad, tokens.mask, row, slope, begin, stats_end, THREADS, PER_THREAD)
    return sums, active


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
    THREADS: tl.constexpr,
    PER_THREAD: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One program's share of some sequences; the last program to arrive finishes the batch."""
    pid = tl.program_id(0)
    n_programs = tl.num_programs(0)
    split = pid % n_splits
    sums = no_scores(THREADS)
    active = tl.zeros([THREADS], tl.float32)
    group = None
    if rewards.reward is not None:
        group = no_groups()
    for sequence in range(pid // n_splits, n_sequences, n_programs // n_splits):
        advantage = tl.full([], 1.0, tl.float32)
        if rewards.reward is not None:
            advantage, found = advantage_of_sequence(
                rewards, AdvantageOut, sequence, split, n_sequences, group_size, group_numbers,
                GROUP, BLOCK_G,
            )  # fmt: skip
            group = add_groups(group, found)
        elif Advantage is not None:
            advantage = tl.load(Advantage + sequence).to(tl.float32)
        sums, active = loss_of_sequence(
            sums, active, Logp, tokens, Grad, batch, sequence, split, advantage, n_sequences,
            length, n_splits, max_tokens, numbers, LOSS, THREADS, PER_THREAD,
        )  # fmt: skip
    publish_sums(program_sums(sums, active), group, batch, pid, n_programs, BLOCK_P)


@jit
def scale_kernel(Grad, Upstream, Results, Out, n, BLOCK: tl.constexpr):
    """Backward: apply the upstream gradient and the batch's scale, both still on the device."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(Upstream).to(tl.float32) * tl.load(Results)
    grad = tl.load(Grad + offs, mask=offs < n, other=0.0)
    tl.store(Out + offs, grad * factor, mask=offs < n)
