"""Device functions about tokens: which are valid, which are scored, the formula, the last sum."""

from typing import Any, NamedTuple

from mapo_kernels import formula
from mapo_kernels._triton import constant, jit, tl
from mapo_kernels.formula import (
    GROUP_MEANS,
    LARGEST,
    RESULTS,
    GroupMetrics,
    TokenMetrics,
    loss_denominator,
    ratio_part,
    rollout_weight,
    signal_behind_weight,
    token_loss,
    token_metrics,
)
from mapo_kernels.kernels.advantages import N_GROUP_METRICS


class Tokens(NamedTuple):
    """Tensors with a number per token, contiguous; None where a call has none."""

    old: Any = None
    ref: Any = None
    rollout: Any = None
    weight: Any = None
    entropy: Any = None
    loss_weight: Any = None
    mask: Any = None
    advantage: Any = None


class TokenValues(NamedTuple):
    """What a block of tokens brings to the formula beside its log-probs; 0 where not scored."""

    advantage: Any
    weight: Any
    old: Any
    ref: Any
    rollout: Any
    factor: Any


class Common(NamedTuple):
    """What programs share; the denominator is a tensor, a number, or (both None) counted."""

    cu_seqlens: Any
    normalizer: Any
    denominator: Any
    loss: Any  # []
    results: Any  # [SLOTS]
    partials: Any  # [programs, SLOTS]
    counter: Any  # [1], or None where a launch of its own adds the sums
    # What a launch of its own found out for all rows of logits; None where each finds it out.
    n_valid: Any = None  # [B]
    sequence: Any = None  # [total], in which each packed token lies


class Scores(NamedTuple):
    """Of each token what the loss and the metrics add up; of a program, the sums (and maxima).

    In the order of `formula.RESULTS`; there, the first is 1 over the denominator.
    """

    loss: Any
    active_tokens: Any
    scored_tokens: Any
    metrics: Any  # of `TokenMetrics`


SLOTS = constant(formula.SLOTS)
LEVELS = constant(formula.SLOTS.bit_length() - 1)
N_METRICS = constant(len(TokenMetrics._fields))
ACTIVE = constant(RESULTS.index("active_tokens"))
SCORED = constant(RESULTS.index("scored_tokens"))
N_MEANS = constant(len(TokenMetrics._fields) - len(LARGEST))
# Slots of the largest, of the first metric of groups, and of the first of those that is no mean.
FIRST_LARGEST = constant(RESULTS.index(LARGEST[0]))
N_TOKEN_SLOTS = FIRST_GROUP = constant(RESULTS.index(GroupMetrics._fields[0]))
FIRST_COUNT = constant(RESULTS.index(GroupMetrics._fields[0]) + len(GROUP_MEANS))
GROUPS = constant(RESULTS.index("active_groups"))


@jit
def no_scores(THREADS: tl.constexpr):
    """The sums over no token, of each thread."""
    zero = tl.zeros([THREADS], tl.float32)
    return Scores(zero, zero, zero, (zero,) * N_METRICS)


@jit
def add_scores(s, x, scale):
    """Sums `s` [THREADS] and what a block of tokens [THREADS, PER_THREAD] adds, but active ones."""
    metrics = ()
    for i in tl.static_range(N_METRICS):
        if i < N_MEANS:
            metrics = metrics + (s.metrics[i] + tl.sum(x.metrics[i], 1),)
        else:
            metrics = metrics + (tl.maximum(s.metrics[i], tl.max(x.metrics[i], 1)),)
    loss = s.loss + tl.sum(x.loss, 1) * scale
    return Scores(loss, s.active_tokens, s.scored_tokens + tl.sum(x.scored_tokens, 1), metrics)


@jit
def program_sums(s, active):
    """The sums [SLOTS] of a program, from those of its threads, in one reduction."""
    values = (s.loss, active, s.scored_tokens)
    for i in tl.static_range(N_METRICS):
        values = values + (s.metrics[i],)
    for _ in tl.static_range(N_TOKEN_SLOTS, SLOTS):
        values = values + (tl.zeros_like(active),)
    # Every turn joins the first half with the second along a new last axis; slots stay in order.
    for level in tl.static_range(LEVELS):
        half = ()
        for i in tl.static_range(SLOTS >> (level + 1)):
            half = half + (tl.join(values[i], values[i + (SLOTS >> (level + 1))]),)
        values = half
    sums = tl.sum(tl.reshape(values[0], [active.shape[0], SLOTS]), 0)
    slots = tl.arange(0, SLOTS)
    for i in tl.static_range(N_MEANS, N_METRICS):
        sums = tl.where(slots == SCORED + 1 + i, tl.max(s.metrics[i], 0), sums)
    return sums


@jit
def token_sums(s, active, scale):
    """The same of a program that has one token [1]."""
    slots = tl.arange(0, SLOTS)
    sums = tl.where(slots == 0, tl.sum(s.loss, 0) * scale, 0.0)
    sums = tl.where(slots == ACTIVE, tl.sum(active, 0), sums)
    sums = tl.where(slots == SCORED, tl.sum(s.scored_tokens, 0), sums)
    for i in tl.static_range(N_METRICS):
        sums = tl.where(slots == SCORED + 1 + i, tl.sum(s.metrics[i], 0), sums)
    return sums


@jit
def load_row(X, row, offs, inside, valid):
    """One block of the row that starts at `row`, in float32; 0 where not valid."""
    # Loading under `inside` alone keeps the accesses wide; `valid` is known per element only.
    x = tl.load(X + row + offs, mask=inside, other=0.0).to(tl.float32)
    return tl.where(valid, x, 0.0)


@jit
def valid_tokens(Mask, row, offs, begin, end, write_end):
    """Which lanes lie in the row's allocation, and which are valid tokens of the sequence."""
    inside = offs < write_end
    valid = inside & (offs >= begin) & (offs < end)
    if Mask is not None:
        valid = valid & (tl.load(Mask + row + offs, mask=inside, other=0) != 0)
    return inside, valid


@jit
def block_tokens(start, THREADS: tl.constexpr, PER_THREAD: tl.constexpr):
    """Positions [THREADS, PER_THREAD] of a block of tokens, adjacent in a thread."""
    thread = tl.arange(0, THREADS)[:, None] * PER_THREAD
    return start + thread + tl.arange(0, PER_THREAD)[None, :]


@jit
def own_ratio_part(
    log_ratio, tokens, row, offs, inside, valid, sequence_advantage, numbers, LOSS: tl.constexpr
):
    """`formula.ratio_part` of a block of tokens."""
    advantage = tl.where(valid, sequence_advantage, 0.0)
    if tokens.advantage is not None:
        advantage = load_row(tokens.advantage, row, offs, inside, valid)
    if tokens.weight is not None:
        weight = load_row(tokens.weight, row, offs, inside, valid)
        advantage = signal_behind_weight(advantage, weight)
    return ratio_part(log_ratio, advantage, numbers, LOSS)


@jit
def sequence_statistics(
    Logp, tokens, row, begin, end, sequence_advantage, numbers, LOSS: tl.constexpr,
    THREADS: tl.constexpr, PER_THREAD: tl.constexpr,
):  # fmt: skip
    """Of a sequence: valid tokens, the logarithm of its ratio, whether any token has A w != 0."""
    count = tl.zeros([THREADS], tl.float32)
    total = tl.zeros([THREADS], tl.float32)
    signal = tl.zeros([THREADS], tl.float32)
    for start in range(begin, end, THREADS * PER_THREAD):
        offs = block_tokens(start, THREADS, PER_THREAD)
        inside, valid = valid_tokens(tokens.mask, row, offs, begin, end, end)
        count = count + tl.sum(valid.to(tl.float32), 1)
        if LOSS.sequence_level:
            logp = load_row(Logp, row, offs, inside, valid)
            old = logp
            if tokens.old is not None:
                old = load_row(tokens.old, row, offs, inside, valid)
            part = logp - old
            if LOSS.objective == "gmpo" or LOSS.objective == "vespo":
                part, _, _ = own_ratio_part(
                    part, tokens, row, offs, inside, valid, sequence_advantage, numbers, LOSS
                )
            total = total + tl.sum(part, 1)
            strength = valid.to(tl.float32)
            # Whether both differ from 0; their product may underflow, or be NaN.
            if tokens.advantage is not None:
                advantage = load_row(tokens.advantage, row, offs, inside, valid)
                strength = tl.where(advantage != 0, strength, 0.0)
            if tokens.weight is not None:
                weight = load_row(tokens.weight, row, offs, inside, valid)
                strength = tl.where(weight != 0, strength, 0.0)
            signal = tl.maximum(signal, tl.max(strength, 1))
    n_valid = tl.maximum(tl.sum(count, 0), 1.0)
    log_ratio = tl.sum(total, 0)
    if LOSS.objective != "vespo":
        log_ratio = log_ratio / n_valid
    return n_valid, log_ratio, tl.max(signal, 0)


@jit
def slot(values, slots, NAME: tl.constexpr):
    """One of the values [SLOTS], by name."""
    return tl.sum(tl.where(slots == NAME, values, 0.0), 0)


@jit
def finish(batch, n_programs, BLOCK_P: tl.constexpr):
    """Add every program's sums in a fixed order and turn them into the loss and the metrics."""
    slots = tl.arange(0, SLOTS)
    is_largest = (slots >= FIRST_LARGEST) & (slots < FIRST_GROUP)
    found = tl.zeros([BLOCK_P, SLOTS], tl.float32)
    for start in range(0, n_programs, BLOCK_P):
        program = start + tl.arange(0, BLOCK_P)[:, None]
        # Other programs wrote these: read them where they are coherent, in L2.
        x = tl.load(
            batch.partials + program * SLOTS + slots[None, :],
            mask=program < n_programs,
            other=0.0,
            cache_modifier=".cg",
        )
        found = tl.where(is_largest[None, :], tl.maximum(found, x), found + x)
    totals = tl.sum(found, 0)  # [SLOTS]
    active = slot(totals, slots, ACTIVE)
    denominator = active
    if batch.normalizer is not None:
        denominator = tl.load(batch.normalizer).to(tl.float32)
    elif batch.denominator is not None:
        denominator = batch.denominator
    denominator = loss_denominator(denominator, active)
    is_token_mean = (slots > SCORED) & (slots < FIRST_LARGEST)
    is_group_mean = (slots >= FIRST_GROUP) & (slots < FIRST_COUNT)
    scored, n_groups = slot(totals, slots, SCORED), slot(totals, slots, GROUPS)
    divisor = tl.where(is_token_mean, scored, tl.where(is_group_mean, n_groups, 1.0))
    # What is said of no scored token, or of no group, is NaN. The mean of ones is exactly 1: a
    # GPU's `/` multiplies by a rounded inverse.
    results = tl.where(divisor > 0, tl.div_rn(totals, tl.maximum(divisor, 1.0)), float("nan"))
    highest = tl.where(scored > 0, tl.max(found, 0), float("nan"))
    results = tl.where(is_largest, highest, results)
    results = tl.where(slots == 0, tl.div_rn(1.0, denominator), results)
    tl.store(batch.results + slots, results)
    tl.store(batch.loss, tl.div_rn(slot(totals, slots, 0), denominator))


@jit
def publish_sums(sums, group, batch, pid, n_programs, BLOCK_P: tl.constexpr):
    """Leave a program's sums [SLOTS]; the last program to do so finishes the batch."""
    slots = tl.arange(0, SLOTS)
    if group is not None:
        for i in tl.static_range(N_GROUP_METRICS):
            sums = tl.where(slots == FIRST_GROUP + i, group[i], sums)
    tl.store(batch.partials + pid * SLOTS + slots, sums)
    if batch.counter is not None:
        # The barrier and the release make this program's sums visible before its arrival is.
        tl.debug_barrier()
        if tl.atomic_add(batch.counter, 1, sem="acq_rel") == n_programs - 1:
            finish(batch, n_programs, BLOCK_P)
            tl.store(batch.counter, 0)


@jit
def sequence_bounds(CuSeqlens, sequence, n_sequences, length):
    """Where a sequence's tokens begin and end, and the span of gradient its programs write."""
    begin = 0
    end = length
    write_begin = 0
    write_end = length
    if CuSeqlens is not None:
        begin = tl.minimum(tl.maximum(tl.load(CuSeqlens + sequence).to(tl.int32), 0), length)
        end = tl.load(CuSeqlens + sequence + 1).to(tl.int32)
        end = tl.minimum(tl.maximum(end, begin), length)
        # The first and the last sequence also write the gradient, 0, of what lies outside all.
        write_begin = tl.where(sequence == 0, 0, begin)
        write_end = tl.where(sequence == n_sequences - 1, length, end)
    return begin, end, write_begin, write_end


@jit
def token_values(tokens, row, offs, inside, candidates, sequence_advantage, LOSS: tl.constexpr):
    """What a block of tokens brings, and which of the candidates are scored."""
    advantage = tl.where(candidates, sequence_advantage, 0.0)
    if tokens.advantage is not None:
        advantage = load_row(tokens.advantage, row, offs, inside, candidates)
    weight = candidates.to(tl.float32)
    if tokens.weight is not None:
        weight = load_row(tokens.weight, row, offs, inside, candidates)
        advantage = signal_behind_weight(advantage, weight)
    scored = candidates
    if not LOSS.score_all and not LOSS.sequence_level:
        scored = candidates & (advantage != 0) & (weight != 0)
        advantage = tl.where(scored, advantage, 0.0)
    # None of these is read where the call has none.
    old = tl.zeros_like(weight)
    ref = old
    rollout = old
    factor = old
    if tokens.old is not None:
        old = load_row(tokens.old, row, offs, inside, scored)
    if tokens.ref is not None:
        ref = load_row(tokens.ref, row, offs, inside, scored)
    if tokens.rollout is not None:
        rollout = load_row(tokens.rollout, row, offs, inside, scored)
    if tokens.loss_weight is not None:
        factor = load_row(tokens.loss_weight, row, offs, inside, scored)
    return TokenValues(advantage, weight, old, ref, rollout, factor), scored


@jit
def score_tokens(
    logp, tokens, values, scored, entropy, mean_log_ratio, numbers, LOSS: tl.constexpr
):
    """Apply the formula to one block of tokens; everything returned is 0 where not scored.

    It is 0 there because whatever comes in is: with advantage, weight and all log-probs 0 every
    term of the formula is 0, but for the ratio and the slope of k1, both of them 1.
    """
    old = logp
    if tokens.old is not None:
        old = values.old
    ref = None
    if tokens.ref is not None:
        ref = values.ref
    weight = values.weight
    if tokens.rollout is not None:
        weight = weight * rollout_weight(old, values.rollout, numbers.rollout_cap)
    bonus = None
    if numbers.entropy_coef is not None:
        bonus = entropy
    log_ratio = logp - old
    level_ratio = log_ratio
    if LOSS.sequence_level:
        level_ratio = tl.where(scored, mean_log_ratio, 0.0)
    t = token_loss(
        logp, old, level_ratio, log_ratio, ref, values.advantage, weight, bonus, numbers, LOSS
    )
    loss, d_log_ratio, d_logp = t.loss, t.d_log_ratio, tl.where(scored, t.d_logp, 0.0)
    if tokens.loss_weight is not None:
        factor = values.factor
        loss, d_log_ratio, d_logp = loss * factor, d_log_ratio * factor, d_logp * factor
    metrics = ()
    found = token_metrics(t, log_ratio, entropy, scored)
    for i in tl.static_range(N_METRICS):
        metrics = metrics + (found[i].to(tl.float32),)
    scores = Scores(loss, 0.0, scored.to(tl.float32), metrics)
    return scores, d_log_ratio, d_logp
