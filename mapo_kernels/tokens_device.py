"""Device functions about tokens: which are live, which are scored, the formula, the last sum."""

from mapo_kernels._triton import jit, tl
from mapo_kernels.formula import approx_kl, rollout_weight, token_loss


@jit
def load_row(X, offs, inside, live):
    """One block of a row in float32; what is not live reads as 0, whatever lies there."""
    # Loading under `inside` alone keeps the accesses wide; `live` is known per element only.
    x = tl.load(X + offs, mask=inside, other=0.0).to(tl.float32)
    return tl.where(live, x, 0.0)


@jit
def live_tokens(Mask, offs, begin, end, limit, HAS_MASK: tl.constexpr):
    """Which lanes lie in the row's allocation, and which are live tokens of the sequence."""
    inside = offs < limit
    live = inside & (offs >= begin) & (offs < end)
    if HAS_MASK:
        live = live & (tl.load(Mask + offs, mask=inside, other=0) != 0)
    return inside, live


@jit
def sequence_statistics(
    Logp,
    Old,
    Mask,
    Weight,
    Advantage,
    begin,
    end,
    HAS_OLD: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    ADVANTAGE: tl.constexpr,
    SEQUENCE_LEVEL: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Live tokens of a sequence, the mean of logp - old over them, and their largest |A w|."""
    count = tl.zeros([BLOCK_T], tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    signal = tl.zeros([BLOCK_T], tl.float32)
    for start in range(begin, end, BLOCK_T):
        offs = start + tl.arange(0, BLOCK_T)
        inside, live = live_tokens(Mask, offs, begin, end, end, HAS_MASK)
        count = count + live.to(tl.float32)
        if SEQUENCE_LEVEL:
            logp = load_row(Logp, offs, inside, live)
            old = logp
            if HAS_OLD:
                old = load_row(Old, offs, inside, live)
            total = total + (logp - old)
            strength = live.to(tl.float32)
            if ADVANTAGE == "token":
                strength = strength * tl.abs(load_row(Advantage, offs, inside, live))
            if HAS_WEIGHT:
                strength = strength * tl.abs(load_row(Weight, offs, inside, live))
            signal = tl.maximum(signal, strength)
    n_live = tl.maximum(tl.sum(count, 0), 1.0)
    return n_live, tl.sum(total, 0) / n_live, tl.max(signal, 0)


@jit
def finish(
    Partials,
    Normalizer,
    Loss,
    Results,
    n_programs,
    denominator,
    NORMALIZER: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Add every program's sums in a fixed order and turn them into the loss and the metrics.

    Slots are numbered as `mapo_kernels.inputs.RESULTS` names them; slot 0 comes in as the sum of
    the loss, and slot 14 counts the groups.
    """
    slots = tl.arange(0, SLOTS)
    sums = tl.zeros([SLOTS, BLOCK_P], tl.float32)
    maxima = tl.zeros([SLOTS, BLOCK_P], tl.float32)
    for start in range(0, n_programs, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)[None, :]
        # Other programs wrote these: read them where they are coherent, in L2.
        x = tl.load(
            Partials + slots[:, None] * n_programs + offs_p,
            mask=offs_p < n_programs,
            other=0.0,
            cache_modifier=".cg",
        )
        sums = sums + x
        maxima = tl.maximum(maxima, x)
    totals = tl.sum(sums, 1)  # [SLOTS]
    active = tl.sum(tl.where(slots == 1, totals, 0.0), 0)
    scored = tl.sum(tl.where(slots == 2, totals, 0.0), 0)
    n_groups = tl.sum(tl.where(slots == 14, totals, 0.0), 0)
    if NORMALIZER == "tensor":
        denominator = tl.load(Normalizer).to(tl.float32)
    elif NORMALIZER == "count":
        denominator = active
    # A NaN stays: ranks that disagree are told by it.
    denominator = tl.where(denominator <= 0, 1.0, denominator)
    is_token_mean = (slots >= 3) & (slots <= 8)
    is_group_mean = (slots == 10) | (slots == 11)
    divisor = tl.where(is_token_mean, scored, tl.where(is_group_mean, n_groups, 1.0))
    results = totals / tl.maximum(divisor, 1.0)
    results = tl.where(slots == 9, tl.max(maxima, 1), results)
    results = tl.where(slots == 0, 1.0 / denominator, results)
    tl.store(Results + slots, results)
    tl.store(Loss, tl.sum(tl.where(slots == 0, totals, 0.0), 0) / denominator)


@jit
def put_sums(
    sums,
    loss,
    active,
    scored,
    low,
    high,
    ratio,
    new_kl,
    ref_kl,
    entropy,
    ratio_max,
    SLOTS: tl.constexpr,
):
    """A program's sums [SLOTS] over its tokens, beside those about groups, which are there."""
    slots = tl.arange(0, SLOTS)
    sums = tl.where(slots == 0, loss, sums)
    sums = tl.where(slots == 1, active, sums)
    sums = tl.where(slots == 2, scored, sums)
    sums = tl.where(slots == 3, low, sums)
    sums = tl.where(slots == 4, high, sums)
    sums = tl.where(slots == 5, ratio, sums)
    sums = tl.where(slots == 6, new_kl, sums)
    sums = tl.where(slots == 7, ref_kl, sums)
    sums = tl.where(slots == 8, entropy, sums)
    return tl.where(slots == 9, ratio_max, sums)


@jit
def arrive(
    sums,
    Partials,
    Counter,
    Normalizer,
    Loss,
    Results,
    pid,
    n_programs,
    denominator,
    NORMALIZER: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Leave a program's sums; the last program to do so finishes the batch."""
    tl.store(Partials + tl.arange(0, SLOTS) * n_programs + pid, sums)
    # The barrier and the release make this program's sums visible before its arrival is.
    tl.debug_barrier()
    if tl.atomic_add(Counter, 1, sem="acq_rel") == n_programs - 1:
        finish(
            Partials, Normalizer, Loss, Results, n_programs, denominator, NORMALIZER, SLOTS, BLOCK_P
        )
        tl.store(Counter, 0)


@jit
def sequence_bounds(CuSeqlens, sequence, n_sequences, length, PACKED: tl.constexpr):
    """Where a sequence's tokens begin and end, and the span of gradient its programs write."""
    begin = 0
    end = length
    cover = 0
    limit = length
    if PACKED:
        begin = tl.minimum(tl.maximum(tl.load(CuSeqlens + sequence).to(tl.int32), 0), length)
        end = tl.load(CuSeqlens + sequence + 1).to(tl.int32)
        end = tl.minimum(tl.maximum(end, begin), length)
        # The first and the last sequence also write the gradient, 0, of what lies outside all.
        cover = tl.where(sequence == 0, 0, begin)
        limit = tl.where(sequence == n_sequences - 1, length, end)
    return begin, end, cover, limit


@jit
def token_signal(
    Weight,
    Advantage,
    offs,
    inside,
    candidates,
    sequence_advantage,
    HAS_WEIGHT: tl.constexpr,
    ADVANTAGE: tl.constexpr,
    SCORE_ALL: tl.constexpr,
    SEQUENCE_LEVEL: tl.constexpr,
):
    """Advantage and weight of a block of tokens, 0 where not live, and which of them to score."""
    advantage = tl.where(candidates, sequence_advantage, 0.0)
    if ADVANTAGE == "token":
        advantage = load_row(Advantage, offs, inside, candidates)
    weight = candidates.to(tl.float32)
    if HAS_WEIGHT:
        weight = load_row(Weight, offs, inside, candidates)
    scored = candidates
    if not SCORE_ALL and not SEQUENCE_LEVEL:
        scored = candidates & (advantage != 0) & (weight != 0)
    return advantage, weight, scored


@jit
def score_tokens(
    logp,
    Old,
    Ref,
    Rollout,
    offs,
    inside,
    scored,
    advantage,
    weight,
    entropy,
    mean_log_ratio,
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
    HAS_ENTROPY: tl.constexpr,
    SEQUENCE_LEVEL: tl.constexpr,
    OBJECTIVE: tl.constexpr,
    HAS_DUAL_CLIP: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    KL_CORRECTION: tl.constexpr,
):
    """Apply the formula to one block of tokens; everything returned is 0 where not scored.

    It is 0 there because whatever comes in is: with advantage, weight and all log-probs 0 every
    term of the formula is 0, but for the ratio and the slope of k1, both of them 1.
    """
    old = logp
    if HAS_OLD:
        old = load_row(Old, offs, inside, scored)
    ref = logp
    if HAS_REF:
        ref = load_row(Ref, offs, inside, scored)
    if HAS_ROLLOUT:
        rollout = load_row(Rollout, offs, inside, scored)
        weight = weight * rollout_weight(old, rollout, rollout_cap)
    log_ratio = logp - old
    level_ratio = log_ratio
    if SEQUENCE_LEVEL:
        level_ratio = tl.where(scored, mean_log_ratio, 0.0)
    loss, d_log_ratio, d_logp, ratio, kl, clipped_low, clipped_high = token_loss(
        logp, level_ratio, ref, advantage, weight, entropy, eps_low, eps_high, dual_clip,
        eps_high_cispo, sapo_tau_pos, sapo_tau_neg, beta, entropy_coef,
        OBJECTIVE, HAS_DUAL_CLIP, HAS_REF, HAS_ENTROPY, KL_ESTIMATOR, KL_CORRECTION,
    )  # fmt: skip
    return (
        loss,
        d_log_ratio,
        tl.where(scored, d_logp, 0.0),
        tl.where(scored, ratio, 0.0),
        approx_kl(log_ratio),
        kl,
        scored.to(tl.float32),
        clipped_low.to(tl.float32),
        clipped_high.to(tl.float32),
    )
