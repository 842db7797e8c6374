"""The formulas, once: group advantage, policy term, KL term, each value beside its derivative.

Pure device functions: no loads, no stores, no shapes. Triton compiles them into every kernel,
`mapo_kernels.eager.formula` runs this same source on torch tensors (any device, float64). Two rules
keep both readings equal: every operation is a plain operator or `tl.something`, and nothing is
assigned in place (`x += y` rebinds in Triton and mutates in torch). Bounds are taken with
`tl.where`, because Triton's minimum and maximum may drop a NaN.

Symbols are those of MAPO (arXiv 2509.18849) and PPO: mu, sigma and p are a group's mean, deviation
and success ratio, lambda its certainty weight, A the advantage, rho = exp(l) the importance ratio.
"""

from typing import Any, NamedTuple

from mapo_kernels._triton import jit, tl
from mapo_kernels.bounds import outside_trust_region
from mapo_kernels.group_factors import certainty_weight, difficulty_weight, subset_moments
from mapo_kernels.numerics import clamp, exp, k3, log1p
from mapo_kernels.sequence_formula import gamma_weight, ratio_part
from mapo_kernels.sequence_formula import sequence_divisor as sequence_divisor


class LossNumbers(NamedTuple):
    """The numbers of a loss, which kernels take at run time: fields of `LossSpec`."""

    eps_low: Any
    eps_high: Any
    dual_clip: Any
    eps_high_cispo: Any
    eps_low_cispo: Any
    sapo_tau_pos: Any
    sapo_tau_neg: Any
    vespo_k_pos: Any
    vespo_lambda_pos: Any
    vespo_k_neg: Any
    vespo_lambda_neg: Any
    beta: Any
    entropy_coef: Any
    rollout_cap: Any
    trust_low: Any
    trust_high: Any


class AdvantageNumbers(NamedTuple):
    """The numbers of an advantage, which kernels take at run time: fields of `AdvantageSpec`."""

    success_threshold: Any
    std_correction: Any
    eps: Any
    fixed_certainty: Any
    max_abs: Any
    difficulty_exponent: Any
    pass_at_k: Any


class TokenLoss(NamedTuple):
    """Of each token: loss, its derivatives by l and by log p, and what the metrics are made of."""

    loss: Any
    d_log_ratio: Any
    d_logp: Any
    ratio: Any
    ref_kl: Any
    clipped_low: Any
    clipped_high: Any


class TokenMetrics(NamedTuple):
    """The table of metrics about scored tokens, filled by `token_metrics`.

    A metric is its mean over them, or the largest for those of `LARGEST`, which come last.
    """

    clip_fraction_low: Any
    clip_fraction_high: Any
    ratio_mean: Any
    approx_kl: Any
    ref_kl: Any
    entropy: Any
    ratio_max: Any


LARGEST = ("ratio_max",)


class GroupMetrics(NamedTuple):
    """The table of metrics about groups: means over the active ones first, then counts."""

    success_ratio_mean: Any
    lambda_mean: Any
    zero_advantage_groups: Any
    nonfinite_rewards: Any
    active_groups: Any


GROUP_MEANS = ("success_ratio_mean", "lambda_mean")

# What a loss leaves on the device, by name; kernels keep their sums in the same order, where slot 0
# sums the loss. `gradient_scale` is 1 over the batch's denominator; a group is active if one of its
# rewards is finite.
RESULTS = (
    "gradient_scale",
    "active_tokens",
    "scored_tokens",
    *TokenMetrics._fields,
    *GroupMetrics._fields,
)
GROUP_METRICS = GroupMetrics._fields
# Kernels keep them in a block, whose size is a power of 2.
SLOTS = 1 << (len(RESULTS) - 1).bit_length()


@jit
def certain_elsewhere(others, gap):
    """Whether one column other than the target is nearly certain, as `row_summary` takes sums."""
    return (others < 1.125) & (gap < -1.0)


@jit
def row_summary(others, tail, weighted, gap):
    """Log-prob of a row's target and entropy of its distribution, from sums over the other columns.

    With z the tempered logits, y the target and m about their maximum: others is the sum of
    e^(z_j - m) over j != y, weighted that of e^(z_j - m) (z_j - m), gap is z_y - m. The target is
    kept apart because most tokens are certain: 1 - p and log p of p = 1 - 1e-13 come out right.
    So does the entropy of a row that is certain of another column: tail is others without the
    largest, which has to be right where `certain_elsewhere`; then m is that maximum exactly. It may
    be None for a caller who takes no entropy of such a row.
    Returns (log p_y, 1 - p_y, the sum over all columns, entropy in nats); NaN for a row of -inf.
    """
    target = exp(gap)
    total = others + target
    rest = others / total
    near = gap > -1.0
    log_total = tl.log(tl.where(total > 0, total, float("nan")))
    logp = tl.where(
        near,
        -log1p(others * exp(tl.where(near, -gap, 0.0))),
        gap - log_total,
    )
    # A target of -inf has p log p = 0.
    bounded = tl.where(gap < -1e30, -1e30, gap)
    if tail is not None:
        log_total = tl.where(certain_elsewhere(others, gap), log1p(tail + target), log_total)
    entropy = tl.where(
        near,
        bounded * rest - logp - weighted / total,
        log_total - (weighted + target * bounded) / total,
    )
    return logp, rest, total, entropy


@jit
def loss_denominator(denominator, active):
    """What the batch's loss is divided by: NaN where it is not positive.

    But for a batch of no active token, whose loss is 0. A NaN stays: ranks that disagree are told
    by it.
    """
    return tl.where(denominator <= 0, tl.where(active > 0, float("nan"), 1.0), denominator)


@jit
def signal_behind_weight(advantage, weight):
    """The advantage of a token, 0 for one that is not finite where the weight is 0."""
    return tl.where((weight != 0) | (tl.abs(advantage) < float("inf")), advantage, 0.0)


@jit
def importance_ratio(log_ratio):
    """The ratio rho = exp(clamp(l, -20, 20)) and drho/dl."""
    ratio = tl.exp(clamp(log_ratio, -20.0, 20.0))
    return ratio, tl.where(tl.abs(log_ratio) > 20.0, 0.0, ratio)


@jit
def policy_term(logp, log_ratio, ratio, ratio_slope, advantage, numbers, LOSS: tl.constexpr):
    """Per-token policy loss, its derivatives by l and by logp, and where the ratio was clipped.

    PPO (arXiv 1707.06347), DAPO's clip-higher, dual clip (arXiv 1912.09729), CISPO (arXiv
    2506.13585), SAPO (arXiv 2511.20347), VESPO; GMPO clips before, in `ratio_part`.
    Returns (loss, dloss/dl, dloss/dlogp, clipped low, clipped high).
    """
    d_logp = ratio * 0.0
    if LOSS.objective != "clip":
        clipped_low = (advantage < 0) & (advantage > 0)
        clipped_high = clipped_low
    if LOSS.objective == "clip":
        clipped_low = (ratio < 1.0 - numbers.eps_low) & (advantage < 0)
        clipped_high = (ratio > 1.0 + numbers.eps_high) & (advantage > 0)
        flat = clipped_low | clipped_high
        capped = ratio
        if numbers.dual_clip is not None:
            flat = flat | ((ratio > numbers.dual_clip) & (advantage < 0))
            capped = clamp(ratio, 0.0, numbers.dual_clip)
        # One negation; of the two products the larger is then minus the smaller of PPO.
        price = -advantage
        free = capped * price
        bounded = clamp(ratio, 1.0 - numbers.eps_low, 1.0 + numbers.eps_high) * price
        loss = tl.maximum(free, bounded, propagate_nan=tl.PropagateNan.ALL)
        d_log_ratio = tl.where(flat, 0.0, price * ratio_slope)
    elif LOSS.objective == "cispo":
        clipped_high = (ratio > numbers.eps_high_cispo) & (advantage > 0)
        least = 0.0
        if numbers.eps_low_cispo is not None:
            clipped_low = (ratio < numbers.eps_low_cispo) & (advantage < 0)
            least = numbers.eps_low_cispo
        d_logp = -clamp(ratio, least, numbers.eps_high_cispo) * advantage
        loss = d_logp * logp
        d_log_ratio = ratio * 0.0
    elif LOSS.objective == "sapo":
        # At least one branch must be a tensor: torch gives two numbers a dtype of its own choice.
        tau = tl.where(advantage > 0, numbers.sapo_tau_pos + 0.0 * ratio, numbers.sapo_tau_neg)
        gate = 1.0 / (1.0 + tl.exp(-tau * (ratio - 1.0)))
        loss = -4.0 / tau * gate * advantage
        d_log_ratio = -4.0 * gate * (1.0 - gate) * advantage * ratio_slope
    elif LOSS.objective == "vespo":
        d_logp = -gamma_weight(log_ratio, ratio, advantage, numbers) * advantage
        loss = d_logp * logp
        d_log_ratio = ratio * 0.0
    else:
        loss = -ratio * advantage
        d_log_ratio = -advantage * ratio_slope
    return loss, d_log_ratio, d_logp, clipped_low, clipped_high


@jit
def kl_term(logp, ref_logp, LOSS: tl.constexpr):
    """Per-token KL estimate to the reference policy and its derivative by logp, d = ref - logp."""
    d = ref_logp - logp
    if LOSS.kl_estimator == "k1":
        kl = -d
        d_logp = d * 0.0 + 1.0
    elif LOSS.kl_estimator == "k2":
        kl = 0.5 * d * d
        d_logp = -d
    else:
        kl = k3(d, exp(d))
        d_logp = -(kl + d)
    return kl, d_logp


@jit
def token_loss(
    logp, old_logp, log_ratio, own_log_ratio, ref_logp, advantage, weight, entropy, numbers,
    LOSS: tl.constexpr,
):  # fmt: skip
    """The loss of one token: `weight` times policy term, plus beta KL, minus the entropy bonus.

    `log_ratio` is the token's own, or its sequence's mean (GSPO, arXiv 2507.18071; the sum in
    VESPO, whose KL term takes the token's own ratio, as TRL's does). `old_logp` serves the trust
    region, which looks at the token's own probability in any case. The two
    derivatives come apart because the first flows to every token that entered `log_ratio`, the
    second to this one. The derivative by the entropy is -entropy_coef.
    Returns (loss, dloss/dl, dloss/dlogp, rho, KL estimate, clipped low, clipped high).
    """
    if LOSS.objective == "vespo":
        # No less than the logarithm of 1e-8.
        log_ratio = clamp(log_ratio, -18.420680743952367, 20.0)
    ratio, ratio_slope = importance_ratio(log_ratio)
    loss, d_log_ratio, d_logp, clipped_low, clipped_high = policy_term(
        logp, log_ratio, ratio, ratio_slope, advantage, numbers, LOSS
    )
    if LOSS.objective == "gmpo":
        _, clipped_low, clipped_high = ratio_part(own_log_ratio, advantage, numbers, LOSS)
    if LOSS.trust_region != "none":
        low, high = outside_trust_region(logp, old_logp, advantage, numbers, LOSS)
        inside = (low | high) == 0
        loss = tl.where(inside, loss, 0.0)
        d_log_ratio = tl.where(inside, d_log_ratio, 0.0)
        d_logp = tl.where(inside, d_logp, 0.0)
        clipped_low = clipped_low | low
        clipped_high = clipped_high | high
    if weight is not None:
        loss = weight * loss
        d_log_ratio = weight * d_log_ratio
        d_logp = weight * d_logp
    kl = ratio * 0.0
    if ref_logp is not None:
        kl, d_kl = kl_term(logp, ref_logp, LOSS)
        if LOSS.kl_correction and LOSS.objective == "vespo":
            own_ratio, own_slope = importance_ratio(own_log_ratio)
            loss = loss + numbers.beta * (own_ratio * kl)
            d_logp = d_logp + numbers.beta * (own_slope * kl + own_ratio * d_kl)
        elif LOSS.kl_correction:
            loss = loss + numbers.beta * (ratio * kl)
            d_log_ratio = d_log_ratio + numbers.beta * (ratio_slope * kl)
            d_logp = d_logp + numbers.beta * (ratio * d_kl)
        else:
            loss = loss + numbers.beta * kl
            d_logp = d_logp + numbers.beta * d_kl
    if entropy is not None:
        loss = loss - numbers.entropy_coef * entropy
    return TokenLoss(loss, d_log_ratio, d_logp, ratio, kl, clipped_low, clipped_high)


@jit
def approx_kl(log_ratio):
    """The k3 estimate of KL(new || old) of a token, from its log ratio clamped as in the loss."""
    d = -clamp(log_ratio, -20.0, 20.0)
    return k3(d, tl.exp(d))


@jit
def token_metrics(token, log_ratio, entropy, scored):
    """What each metric says of a token, from its `TokenLoss`: 0 where it is not scored.

    All that enters the loss of such a token is 0; its ratio is not.
    """
    ratio = tl.where(scored, token.ratio, 0.0)
    return TokenMetrics(
        clip_fraction_low=token.clipped_low,
        clip_fraction_high=token.clipped_high,
        ratio_mean=ratio,
        approx_kl=approx_kl(log_ratio),
        ref_kl=token.ref_kl,
        entropy=entropy,
        ratio_max=ratio,
    )


@jit
def rollout_weight(old_logp, rollout_logp, cap):
    """Weight min(exp(old - rollout), C) against the sampling engine's policy; C may be None."""
    if cap is not None:
        weight = clamp(tl.exp(old_logp - rollout_logp), 0.0, cap)
    else:
        # Finite: a token that a mask drops has 0 times this.
        weight = tl.exp(clamp(old_logp - rollout_logp, -20.0, 20.0))
    return weight


@jit
def reward_unit(lowest, highest, large, unit):
    """What a group's rewards are multiplied by before their deviations are squared.

    1, or the power of 2 `unit` where a reward is beyond `large`, whose square could overflow.
    """
    largest = tl.where(-lowest > highest, -lowest, highest)
    return tl.where(largest > large, 0.0 * largest + unit, 0.0 * largest + 1.0)


@jit
def row_advantage(deviation, finite, factor, limit):
    """Advantage of one row of a group, within [-limit, limit]; 0 where its reward is not finite."""
    # A deviation or a factor of 0 means exactly 0: a NaN or an overflow times 0 would not be.
    some = finite & (factor != 0) & (deviation != 0)
    return tl.where(some, clamp(deviation * factor, -limit, limit), 0.0)


@jit
def group_advantage(
    count, lowest, highest, mean, square_deviations, successes, unit, batch_std, numbers,
    GROUP: tl.constexpr,
):  # fmt: skip
    """A group's statistics and the one factor that turns (r - mu) into its advantages.

    Both the z-score and the percent deviation are multiples of (r - mu), hence so is their mixture.
    The factor is 0 where there is nothing to learn from: all rewards equal (tested on the rewards,
    not on a small sigma), or fewer than two of them; or where the group's difficulty weighs 0.
    Rewards come in times `unit`, as does `batch_std`, the deviation of the whole batch's rewards
    where that is the scale; sigma goes out without it. For pass@k rewards are 1 for a success and 0
    else, and what is normalised are those of k-subsets. Returns (factor, mu, sigma, p, lambda).
    """
    others = tl.where(count > 1, count - 1.0, 1.0)
    divisor = count - numbers.std_correction
    std = tl.sqrt(square_deviations / tl.where(divisor > 0, divisor, 1.0))
    success_ratio = tl.div_rn(successes, tl.where(count > 0, count, 1.0))  # `/` may be below 1
    certainty = certainty_weight(success_ratio, numbers.fixed_certainty, GROUP)
    scale = mean
    if numbers.pass_at_k is not None:
        # No reward is negative: the bounded denominator is the mean too. `rloo`: see the spec.
        mean, std, in_subsets = subset_moments(successes, count, numbers)
        scale = mean
        others = tl.where(count > numbers.pass_at_k, count - numbers.pass_at_k, 1.0)
    elif GROUP.apd == "bounded":
        farthest = tl.where(highest - mean > mean - lowest, highest - mean, mean - lowest) / others
        scale = tl.where(tl.abs(mean) > farthest, tl.abs(mean), farthest)
    if GROUP.estimator == "mean":
        factor = 1.0 / unit
    elif GROUP.estimator == "rloo":
        factor = count / others / unit
    else:
        eps = numbers.eps * unit
        # No percent deviation where it has no weight: `paper` may divide by a mean of -eps.
        percent = certainty / tl.where(certainty > 0, scale + eps, 1.0)
        if GROUP.scale == "group":
            factor = (1.0 - certainty) / (std + eps) + percent
        elif GROUP.scale == "batch":
            factor = (1.0 - certainty) / (batch_std + eps) + percent
        else:
            factor = (1.0 - certainty) / unit + percent
    if numbers.pass_at_k is not None:
        factor = tl.where(in_subsets != 0, factor * in_subsets, 0.0)
    if GROUP.difficulty is not None:
        weight = difficulty_weight(successes, count, numbers.difficulty_exponent, GROUP)
        factor = tl.where(weight != 0, factor * weight, 0.0)
    has_signal = (highest > lowest) & (count > 1)
    factor = tl.where(has_signal, factor, 0.0 * mean)
    return factor, mean / unit, std / unit, success_ratio, certainty
