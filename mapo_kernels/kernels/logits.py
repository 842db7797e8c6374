"""The kernels of the logits level: one program per row, from its logits to its gradient.

What is the same for all rows of a small batch each of them finds out by itself, and the last to
arrive adds what all of them found: one launch. In a large batch it is done once: one launch before
that of the rows has advantages and counts, one after it adds. Sums are in a fixed order.
"""

from mapo_kernels._triton import jit, tl
from mapo_kernels.formula import loss_denominator, sequence_divisor
from mapo_kernels.kernels.advantages import (
    N_GROUP_METRICS,
    add_groups,
    advantage_of_sequence,
    no_groups,
)
from mapo_kernels.kernels.gradient import write_gradient, write_zeros
from mapo_kernels.kernels.row import (
    exponent_of,
    row_of,
    row_statistics,
    target_of,
)
from mapo_kernels.kernels.token import (
    ACTIVE,
    FIRST_GROUP,
    SLOTS,
    finish,
    publish_sums,
    score_tokens,
    sequence_bounds,
    sequence_statistics,
    token_sums,
    token_values,
    valid_tokens,
)


@jit
def count_valid(Mask, begin, end, BLOCK_T: tl.constexpr):
    """Valid tokens of a whole batch, whose mask is contiguous."""
    count = tl.zeros([BLOCK_T], tl.float32)
    for start in range(begin, end, BLOCK_T):
        offs = start + tl.arange(0, BLOCK_T)
        _, valid = valid_tokens(Mask, 0, offs, begin, end, end)
        count = count + valid.to(tl.float32)
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


@jit
def sequence_of_row(batch, row, length, n_sequences, n_rows, BLOCK_T: tl.constexpr):
    """The sequence of a row, and where that begins and ends."""
    sequence = row // length
    begin = sequence * length
    end = begin + length
    if batch.cu_seqlens is not None:
        if batch.sequence is not None:
            sequence = tl.load(batch.sequence + row)
        else:
            sequence = sequence_of(batch.cu_seqlens, row, n_sequences, BLOCK_T)
        begin, end, _, _ = sequence_bounds(batch.cu_seqlens, sequence, n_sequences, n_rows)
    return sequence, begin, end


@jit
def batch_divisor(batch, Mask, n_sequences, n_rows, BLOCK_T: tl.constexpr):
    """The batch's denominator, counted here if it is not given."""
    if batch.normalizer is not None:
        divisor = tl.load(batch.normalizer).to(tl.float32)
    elif batch.denominator is not None:
        divisor = batch.denominator
    else:
        first = 0
        last = n_rows
        if batch.cu_seqlens is not None:
            first = tl.maximum(tl.load(batch.cu_seqlens).to(tl.int32), 0)
            last = tl.minimum(tl.load(batch.cu_seqlens + n_sequences).to(tl.int32), n_rows)
        divisor = count_valid(Mask, first, last, BLOCK_T)
    # A row asks, so that there is an active token.
    return loss_denominator(divisor, 1.0)


@jit(do_not_specialize=["n_sequences", "length", "n_rows", "group_size"])
def prepare_kernel(
    Mask,  # [B, T] or [total], or None
    rewards,  # Rewards, or None
    AdvantageOut,  # [B]
    batch,  # Common, whose counter, n_valid and sequence are to be used
    Total,  # [] float32, the valid tokens of the batch
    n_sequences,
    length,  # T, or total if packed
    n_rows,
    group_size,
    group_numbers,  # AdvantageNumbers
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Of one sequence: advantage, valid tokens, which rows are its own; their total comes last."""
    sequence = tl.program_id(0)
    begin = sequence * length
    end = begin + length
    write_begin = begin
    write_end = end
    if batch.cu_seqlens is not None:
        begin, end, write_begin, write_end = sequence_bounds(
            batch.cu_seqlens, sequence, n_sequences, n_rows
        )
    if rewards.reward is not None:
        advantage, group = advantage_of_sequence(
            rewards, AdvantageOut, sequence, 0, n_sequences, group_size, group_numbers,
            GROUP, BLOCK_G,
        )  # fmt: skip
        slots = tl.arange(0, SLOTS)
        sums = tl.zeros([SLOTS], tl.float32)
        for i in tl.static_range(N_GROUP_METRICS):
            sums = tl.where(slots == FIRST_GROUP + i, group[i], sums)
        tl.store(batch.partials + (n_rows + sequence) * SLOTS + slots, sums)
    count = count_valid(Mask, begin, end, BLOCK_T)
    tl.store(batch.n_valid + sequence, count)
    if batch.sequence is not None:
        for start in range(write_begin, write_end, BLOCK_T):
            offs = start + tl.arange(0, BLOCK_T)
            tl.store(batch.sequence + offs, sequence, mask=offs < write_end)
    tl.debug_barrier()
    if tl.atomic_add(batch.counter, 1, sem="acq_rel") == n_sequences - 1:
        total = tl.zeros([BLOCK_T], tl.float32)
        for start in range(0, n_sequences, BLOCK_T):
            offs = start + tl.arange(0, BLOCK_T)
            mask = offs < n_sequences
            total = total + tl.load(
                batch.n_valid + offs, mask=mask, other=0.0, cache_modifier=".cg"
            )
        tl.store(Total, tl.sum(total, 0))
        tl.store(batch.counter, 0)


@jit(do_not_specialize=["n_programs"])
def finish_kernel(batch, n_programs, BLOCK_P: tl.constexpr):
    """Loss and metrics of a batch whose rows have left their sums."""
    finish(batch, n_programs, BLOCK_P)


@jit(do_not_specialize=["n_sequences", "length", "group_size"])
def logits_loss_kernel(
    rows,  # Rows of logits [B, T, V] or [total, V]; temperatures are [B] or [total]
    out,  # Matrix of the gradient, which may be that of the logits; or None
    tokens,  # Tokens
    Advantage,  # [B], or None where advantages are the tokens' or come from rewards
    rewards,  # Rewards, or None
    AdvantageOut,  # [B]
    batch,  # Common
    n_sequences,
    length,  # T, or total if packed
    group_size,
    max_tokens,
    vocab,
    c,  # log2(e) / temperature, where that is one number
    numbers,  # LossNumbers
    group_numbers,  # AdvantageNumbers
    LOSS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TILE: tl.constexpr,
):
    """One row, from its logits to its gradient; the last program to arrive finishes the batch."""
    row = tl.program_id(0)
    n_rows = tl.num_programs(0)
    sequence, begin, end = sequence_of_row(batch, row, length, n_sequences, n_rows, BLOCK_T)
    offs = row + tl.arange(0, 1)  # [1], as everything about the token
    inside, valid = valid_tokens(tokens.mask, 0, offs, begin, end, n_rows)

    group = None
    advantage = tl.full([], 1.0, tl.float32)
    if rewards.reward is not None:
        group = no_groups()
        # Every sequence's first row speaks for it, be it masked or not.
        if tl.max((valid | (offs == begin)).to(tl.int32), 0) > 0:
            advantage, found = advantage_of_sequence(
                rewards, AdvantageOut, sequence, row - begin, n_sequences, group_size,
                group_numbers, GROUP, BLOCK_G,
            )  # fmt: skip
            group = add_groups(group, found)
    elif Advantage is not None:
        advantage = tl.load(Advantage + sequence).to(tl.float32)
    candidates = valid
    if not LOSS.score_all:
        candidates = valid & (tl.where(valid, advantage, 0.0) != 0)
    values, scored = token_values(tokens, 0, offs, inside, candidates, advantage, LOSS)
    active = valid.to(tl.float32)
    sums = tl.where(tl.arange(0, SLOTS) == ACTIVE, tl.sum(active, 0), 0.0)

    if tl.max(scored.to(tl.int32), 0) > 0:
        Row = row_of(rows.logits, row, sequence)
        target = target_of(rows, row, vocab)
        c = exponent_of(rows, sequence if batch.cu_seqlens is None else row, c)
        n_valid = 1.0
        if LOSS.divisor == "tokens":
            if batch.n_valid is not None:
                n_valid = tl.maximum(tl.load(batch.n_valid + sequence), 1.0)
            else:
                n_valid, mean, signal = sequence_statistics(
                    Row, tokens, 0, begin, end, advantage, numbers, LOSS, BLOCK_T, 1
                )
        reference, total, logp, rest, entropy = row_statistics(
            rows, Row, target, vocab, c, True, TILE
        )
        zero = tl.zeros([1], tl.float32)
        scores, d_log_ratio, d_logp = score_tokens(
            zero + logp, tokens, values, scored, zero + entropy, 0.0, numbers, LOSS
        )
        scale = 1.0 / sequence_divisor(n_valid, max_tokens, LOSS)
        sums = token_sums(scores, active, scale)
        if out is not None:
            scale = scale / batch_divisor(batch, tokens.mask, n_sequences, n_rows, BLOCK_T)
            slope = tl.sum(d_logp + d_log_ratio, 0) * scale
            has_slope = 1
            bonus = None
            if numbers.entropy_coef is None:
                has_slope = tl.where(slope != 0, 1, 0)
            else:
                bonus = numbers.entropy_coef * scale
                if tokens.loss_weight is not None:
                    bonus = bonus * tl.sum(values.factor, 0)
            Out = row_of(out, row, sequence)
            if has_slope > 0:
                write_gradient(
                    rows, Row, Out, target, vocab, c, reference, total, logp, rest, entropy, slope,
                    bonus, TILE,
                )  # fmt: skip
            else:
                write_zeros(Out, vocab, TILE)
    elif out is not None:
        write_zeros(row_of(out, row, sequence), vocab, TILE)

    publish_sums(sums, group, batch, row, n_rows, BLOCK_P)
