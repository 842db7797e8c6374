"""Token losses of MAPO and its relatives: one sequence, then one token, at a time.

Notation, for token t of sequence i:

    log_rho     clamp(logp - old_logp, -20, 20), or its mean over the sequence (GSPO)
    rho         exp(log_rho), the importance ratio
    A           advantage
    d           ref_logp - logp
    H           entropy of the policy
    sg(x)       x without gradient, `x.detach()`

    loss = sum_it weight_it (w_it policy(rho, A) + beta kl(d) - entropy_coef H)

where `weight_it` is the aggregation's and `w_it` corrects the policy term alone.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reference.settings import LossSettings
from reference.trust_region import has_left


@dataclass(frozen=True)
class Batch:
    """Padded tensors [B, T] in float64, of which logp and entropy carry gradient."""

    logp: Tensor
    old: Tensor
    A: Tensor
    w: Tensor
    ref: Tensor | None
    rollout: Tensor | None
    entropy: Tensor | None
    has_old: bool  # else `old` is logp


@dataclass(frozen=True)
class Token:
    """One scored token: 0-d float64 tensors, of which logp, rho and entropy carry gradient.

    ref and entropy are NaN in a batch without them, so that reading them by mistake shows.
    """

    logp: Tensor
    old: Tensor
    rho: Tensor
    A: Tensor
    w: Tensor
    ref: Tensor
    entropy: Tensor


def constant(x: Tensor) -> Tensor:
    """Float64 version of x, without gradient."""
    return x.detach().double()


def clipped_where_pushed(log_ratio: Tensor, A: Tensor, s: LossSettings) -> Tensor:
    """A token's log ratio in `gmpo`: bounded above if A > 0, below if A < 0."""
    if A > 0:
        return log_ratio.clamp(max=s.eps_high)
    return log_ratio.clamp(min=-s.eps_low) if A < 0 else log_ratio


def log_ratios(
    logp: Tensor, old: Tensor, A: Tensor, live: list[int], s: LossSettings
) -> dict[int, Tensor]:
    """log_rho at the live positions of one sequence, from its logp, old and A, [T] each.

    At level "sequence" every token gets the mean over the live tokens, clamped after the mean; its
    gradient reaches all of them.
    """
    level = s.importance_level
    ratios = {t: logp[t] - old[t] for t in live}
    if s.objective == "gmpo":
        ratios = {t: clipped_where_pushed(ratio, A[t], s) for t, ratio in ratios.items()}
    if s.objective == "vespo" and live:  # the product of the ratios, no less than 1e-8
        total = torch.stack([ratio.clamp(-20, 20) for ratio in ratios.values()]).sum()
        ratios = dict.fromkeys(live, total.clamp(min=math.log(1e-8)))
    elif level == "sequence" and live:
        ratios = dict.fromkeys(live, torch.stack(list(ratios.values())).mean())
    elif level not in ("token", "sequence"):
        raise ValueError(f"importance_level: expected token or sequence, got {level!r}")
    return {t: ratio.clamp(-20, 20) for t, ratio in ratios.items()}


def policy_term(token: Token, s: LossSettings) -> Tensor:
    """Loss of one token's policy gradient objective."""
    rho, A = token.rho, token.A
    if s.objective == "clip":  # PPO, GRPO, DAPO
        unclipped = rho if s.dual_clip is None else rho.clamp(max=s.dual_clip)
        clipped = rho.clamp(1 - s.eps_low, 1 + s.eps_high)
        return -torch.minimum(unclipped * A, clipped * A)
    if s.objective == "cispo":
        return -rho.clamp(s.eps_low_cispo, s.eps_high_cispo).detach() * A * token.logp
    if s.objective == "sapo":
        tau = s.sapo_tau_pos if A > 0 else s.sapo_tau_neg
        return -(4 / tau) * torch.sigmoid(tau * (rho - 1)) * A
    if s.objective == "vespo":
        k = s.vespo_k_pos if A >= 0 else s.vespo_k_neg
        rate = max(s.vespo_lambda_pos if A >= 0 else s.vespo_lambda_neg, 1e-4)
        phi = math.exp(rate) * rho**k * torch.exp(-rate * rho)
        return -phi.detach() * A * token.logp
    if s.objective in ("none", "gmpo"):  # of gmpo, rho is made of what was clipped already
        return -rho * A
    raise ValueError(f"objective: expected a known one, got {s.objective!r}")


def kl_term(d: Tensor, estimator: str) -> Tensor:
    """Estimate of KL(policy || reference) at one token from d = ref_logp - logp."""
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return d**2 / 2
    if estimator == "k3":
        return torch.expm1(d) - d  # exp(d) - d - 1 without its cancellation at small d
    raise ValueError(f"kl_estimator: expected k1, k2 or k3, got {estimator!r}")


def token_loss(token: Token, s: LossSettings) -> Tensor:
    """Loss of one token, before aggregation."""
    dropped = has_left(token, s, 1) or has_left(token, s, -1)
    loss = token.logp * 0 if dropped else token.w * policy_term(token, s)
    if s.beta != 0:
        kl = kl_term(token.ref - token.logp, s.kl_estimator)
        rho = token.rho
        if s.objective == "vespo":  # as in TRL, the KL term has the token's own ratio
            rho = (token.logp - token.old).clamp(-20, 20).exp()
        loss = loss + s.beta * (rho * kl if s.kl_importance_correction else kl)
    if s.entropy_coef != 0:
        loss = loss - s.entropy_coef * token.entropy
    return loss


def aggregation_weight(
    s: LossSettings, count: float, live_tokens: int, T: int, prompt_tokens: int
) -> float:
    """Weight of one live token in the loss.

    Args:
        s: settings, of which `aggregation` and `max_tokens` are read.
        count: what `count_batch` counts, or the normalizer.
        live_tokens: number of live tokens in the sequence.
        T: padded length.
        prompt_tokens: number of live tokens in all sequences of its prompt.
    """
    if s.aggregation == "token-sum":
        return 1 / count
    if s.aggregation == "prompt-mean":
        return 1 / (count * prompt_tokens)
    if s.aggregation == "token-mean":
        return 1 / count
    if s.aggregation == "seq-mean-token-mean":
        return 1 / (count * live_tokens)
    if s.aggregation == "seq-mean-token-sum":
        return 1 / count
    if s.aggregation == "seq-mean-token-sum-norm":
        return 1 / (count * (T if s.max_tokens is None else s.max_tokens))
    raise ValueError(f"aggregation: unknown mode {s.aggregation!r}")


def count_batch(
    s: LossSettings, live: list[list[int]], A: Tensor, prompts: list[int] | None
) -> float:
    """What a batch's loss is divided by: tokens, sequences, prompts, or nothing."""
    if s.aggregation == "token-sum":
        return 1
    counted = live
    if s.denominator == "contributing":
        counted = [[t for t in live_i if A[i, t] != 0] for i, live_i in enumerate(live)]
    tokens = sum(len(x) for x in counted)
    if s.aggregation == "token-mean":
        return tokens if s.denominator == "all" else max(tokens, 1)
    who = [i for i in range(len(live)) if s.denominator == "all" or counted[i]]
    if prompts is not None and s.aggregation == "prompt-mean":
        who = list({prompts[i] for i in who})
    return max(len(who), 1)


def mean(values: list[Tensor]) -> Tensor:
    """Mean of 0-d tensors of any dtype, 0-d float64 without gradient; NaN if there are none."""
    if not values:
        return torch.tensor(math.nan, dtype=torch.float64)
    return torch.stack([constant(v) for v in values]).mean()


def ratio_metrics(tokens: list[Token], s: LossSettings) -> dict[str, Tensor]:
    """Metrics of the importance ratio, means over the scored tokens."""
    # An objective without a bound never clips.
    lower = 1 - s.eps_low if s.objective == "clip" else -math.inf
    if s.objective == "cispo" and s.eps_low_cispo is not None:
        lower = s.eps_low_cispo
    upper = {"clip": 1 + s.eps_high, "cispo": s.eps_high_cispo}.get(s.objective, math.inf)
    clipped = [(k, k.rho) for k in tokens]
    if s.objective == "gmpo":  # clips the logarithm of each token's own ratio
        lower, upper = -s.eps_low, s.eps_high
        clipped = [(k, k.logp - k.old) for k in tokens]
    return {
        "clip_fraction_low": mean(
            [(rho < lower) & (k.A < 0) | has_left(k, s, -1) for k, rho in clipped]
        ),
        "clip_fraction_high": mean(
            [(rho > upper) & (k.A > 0) | has_left(k, s, 1) for k, rho in clipped]
        ),
        "ratio_mean": mean([k.rho for k in tokens]),
        "ratio_max": torch.stack([k.rho.detach() for k in tokens]).max() if tokens else mean([]),
        # The token's own ratio, also where the loss takes the sequence's.
        "approx_kl": mean([kl_term((k.old - k.logp).clamp(-20, 20), "k3") for k in tokens]),
    }


def is_scored(A: Tensor, w: Tensor, s: LossSettings) -> bool:
    """Whether the term of a live token of advantage A and weight w can differ from 0."""
    return s.score_all or s.beta != 0 or s.entropy_coef != 0 or bool(A != 0 and w != 0)


def rollout_weight(old: Tensor, rollout: Tensor, cap: float | None) -> Tensor:
    """Truncated importance weight for tokens sampled by another engine than scored them."""
    if cap is None:
        return (old - rollout).clamp(-20, 20).exp()
    return (old - rollout).exp().clamp(max=cap)


def is_rejected(batch: Batch, i: int, t: int, live: list[int], s: LossSettings) -> bool:
    """Whether the ratio of the old to the rollout policy is out of bounds at token t of sequence i.

    IcePop's mask of tokens; or of whole sequences, by the geometric mean of their ratios.
    """
    if s.rollout_mask is None or batch.rollout is None:
        return False
    low, high = s.rollout_mask
    own = [t] if s.rollout_mask_level == "token" else live
    ratios = [(batch.old[i, u] - batch.rollout[i, u]).clamp(-20, 20) for u in own]
    ratio = torch.stack(ratios).mean().exp()
    return bool((ratio < low) | (ratio > high))


def rollout_metrics(batch: Batch, live: list[list[int]], s: LossSettings) -> dict[str, Tensor]:
    """Of all live tokens: how many are rejected, the ratio, and k3 of KL(rollout || old)."""
    assert batch.rollout is not None
    tokens = [(i, t) for i, live_i in enumerate(live) for t in live_i]
    gaps = [(batch.old[k] - batch.rollout[k]).clamp(-20, 20) for k in tokens]
    return {
        "rollout_masked_fraction": mean(
            [torch.tensor(is_rejected(batch, i, t, live[i], s)) for i, t in tokens]
        ),
        "rollout_ratio_mean": mean([gap.exp() for gap in gaps]),
        "rollout_ratio_max": torch.stack(gaps).max().exp() if gaps else mean([]),
        "rollout_kl": mean([kl_term(gap, "k3") for gap in gaps]),
    }


def read_token(batch: Batch, i: int, t: int, log_rho: Tensor, s: LossSettings) -> Token:
    """Token t of sequence i, its weight multiplied by the rollout weight."""
    old, w, absent = batch.old[i, t], batch.w[i, t], torch.tensor(math.nan)
    if batch.rollout is not None and s.rollout_is:
        w = w * rollout_weight(old, batch.rollout[i, t], s.rollout_cap)
    return Token(
        logp=batch.logp[i, t],
        old=old,
        rho=log_rho.exp(),
        A=batch.A[i, t],
        w=w,
        ref=absent if batch.ref is None else batch.ref[i, t],
        entropy=absent if batch.entropy is None else batch.entropy[i, t],
    )


def batch_loss(
    batch: Batch,
    mask: Tensor,
    normalizer: float | None,
    s: LossSettings,
    prompts: list[int] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and metrics of a batch; positions where mask [B, T] is 0 are never read."""
    B, T = mask.shape
    live = [[t for t in range(T) if mask[i, t] != 0] for i in range(B)]
    active = sum(len(live_i) for live_i in live)
    if normalizer is None:
        normalizer = count_batch(s, live, batch.A, prompts)
    of_prompt: dict[int, int] = {}
    for name, live_i in zip(prompts or (), live, strict=False):
        of_prompt[name] = of_prompt.get(name, 0) + len(live_i)
    if active and not normalizer > 0:
        normalizer = math.nan  # what is not positive is no number of tokens or sequences

    w = batch.w.clone()
    for i, live_i in enumerate(live):
        for t in live_i:
            if is_rejected(batch, i, t, live_i, s):
                w[i, t] = 0
    metrics = {}
    if batch.rollout is not None and batch.has_old:
        metrics = rollout_metrics(batch, live, s)
    batch = replace(batch, w=w)

    loss = batch.logp[:0].sum()  # an empty sum: 0 whatever logp holds, yet part of the graph
    tokens = []
    for i in range(B):
        log_rho = log_ratios(batch.logp[i], batch.old[i], batch.A[i], live[i], s)
        scored = [t for t in live[i] if is_scored(batch.A[i, t], batch.w[i, t], s)]
        if s.importance_level == "sequence" and scored:
            scored = live[i]  # every token moves rho, so a sequence is scored whole or not at all
        for t in scored:
            token = read_token(batch, i, t, log_rho[t], s)
            prompt_tokens = len(live[i]) if prompts is None else of_prompt[prompts[i]]
            weight = aggregation_weight(s, normalizer, len(live[i]), T, prompt_tokens)
            loss = loss + weight * token_loss(token, s)
            tokens.append(token)

    metrics |= ratio_metrics(tokens, s)
    if batch.ref is not None:
        metrics["ref_kl"] = mean([kl_term(k.ref - k.logp, s.kl_estimator) for k in tokens])
    if batch.entropy is not None:
        metrics["entropy"] = mean([k.entropy for k in tokens])
    metrics["active_tokens"] = torch.tensor(active, dtype=torch.float64)
    metrics["scored_tokens"] = torch.tensor(len(tokens), dtype=torch.float64)
    return loss, metrics


def mapo_loss(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    token_weights: Tensor | None = None,
    entropy: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    prompts: Tensor | None = None,
    **settings,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of a padded batch of trajectories; its gradient is autograd's.

    Live tokens whose term is 0 (A = 0 or weight 0, without KL and entropy terms) are not scored:
    the metrics do not speak of them, though the aggregation still counts them. At importance level
    "sequence" every live token moves its sequence's ratio, and gets gradient from all tokens beside
    it: there a sequence is scored whole if any of its tokens is.

    Args:
        logprobs: [B, T], with gradient.
        advantages: [B] or [B, T].
        mask: [B, T], nonzero for live tokens. Nothing is read at the others.
        old_logprobs: [B, T], policy of the importance ratio; None: on-policy, sg(logprobs).
        ref_logprobs: [B, T], reference policy of the KL term.
        rollout_logprobs: [B, T], from the engine that sampled. The policy term is weighted by
            min(exp(old_logp - rollout_logp), rollout_cap), without gradient, or by 0: see
            `is_rejected`.
        token_weights: [B, T], factors of the policy term.
        entropy: [B, T], H, possibly with gradient.
        normalizer: replaces the number of tokens or sequences of the batch in the aggregation, so
            that the losses of micro-batches add up to the loss of the whole batch.
        prompts: [B] integers, equal for the sequences of a prompt; "prompt-mean" needs them.
        **settings: fields of `LossSettings`.

    Returns:
        The loss, 0-d float64, and metrics, 0-d float64 each: means over scored tokens except
        `ratio_max`, `active_tokens` and `scored_tokens`.
    """
    s = LossSettings(**settings)
    if s.beta != 0 and ref_logprobs is None:
        raise ValueError(f"ref_logprobs: expected a tensor because beta is {s.beta}, got None")
    if s.entropy_coef != 0 and entropy is None:
        raise ValueError(f"entropy: expected a tensor because entropy_coef is {s.entropy_coef}")
    A = advantages if advantages.dim() == 2 else advantages[:, None].expand_as(logprobs)
    batch = Batch(
        logp=logprobs.double(),
        old=constant(logprobs if old_logprobs is None else old_logprobs),
        A=constant(A),
        w=constant(torch.ones_like(logprobs) if token_weights is None else token_weights),
        ref=None if ref_logprobs is None else constant(ref_logprobs),
        rollout=None if rollout_logprobs is None else constant(rollout_logprobs),
        entropy=None if entropy is None else entropy.double(),
        has_old=old_logprobs is not None,
    )
    if s.aggregation == "prompt-mean" and prompts is None:
        raise ValueError("prompts: expected a tensor for 'prompt-mean', got None")
    names = None if prompts is None else prompts.tolist()
    return batch_loss(batch, mask, None if normalizer is None else float(normalizer), s, names)
