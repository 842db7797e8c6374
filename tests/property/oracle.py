"""What a call should return, from `reference/` in float64, and how exactly it can.

Every number comes with a scale: what its rounding errors are relative to. It is the size of the
terms that the number is a sum of, each times how much it feels the rounding of what it is made of.
A result is right if it is within a few units of rounding of that scale, however much cancels.
"""

import math
from dataclasses import dataclass

import torch
from cases import Batch, Rows, lists_of
from torch import Tensor

import reference
from mapo_kernels.bounds import RolloutMetrics

# Exponents below it add nothing to a sum.
_NEGLIGIBLE = 100.0


@dataclass
class Exact:
    """Float64 results, canonical; and the scale of each, broadcastable to it.

    `gradients` and `gradient_scales` have the names of what was differentiated.
    """

    loss: Tensor
    loss_scale: Tensor
    gradients: dict[str, Tensor]
    gradient_scales: dict[str, Tensor]
    metrics: dict[str, Tensor]
    metric_scales: dict[str, Tensor]


def weights_of(batch: Batch) -> Tensor | None:
    """Factors [B, T] of the tokens, 0 where the mask against rollouts drops one; None if all are 1.

    Float64; anything at tokens that are not live.
    """
    spec, live, given = batch.spec, batch.layout.live, batch.tensors
    weights = given.get("token_weights")
    if spec.rollout_mask is None:
        return None if weights is None else weights.double()
    gap = given["old_logprobs"].double() - given["rollout_logprobs"].double()
    gap = torch.where(live, gap, 0.0).clamp(-20, 20)
    if spec.rollout_mask_level == "sequence":
        gap = (gap.sum(1, keepdim=True) / live.sum(1, keepdim=True).clamp(min=1)).expand_as(gap)
    low, high = spec.rollout_mask
    kept = (gap.exp() >= low) & (gap.exp() <= high)
    return torch.where(kept | ~live, 1.0 if weights is None else weights.double(), 0.0)


def is_read(batch: Batch, advantages: Tensor) -> Tensor:
    """Which tokens [B, T] can change a result: those that are scored."""
    spec, live = batch.spec, batch.layout.live
    if spec.score_all or spec.beta != 0 or spec.entropy_coef != 0:
        return live
    A = advantages if advantages.dim() == 2 else advantages[:, None]
    scored = live & (A != 0)
    weights = weights_of(batch)
    if weights is not None:
        scored = scored & (weights != 0)
    if spec.importance_level == "sequence":
        scored = live & scored.any(1, keepdim=True)
    return scored


def logits_of(rows: Rows, read: Tensor, leaves: dict[str, Tensor]) -> Tensor:
    """Float64 logits [B, T, V] of leaves, 0 where not read, before the temperature."""
    if rows.logits is not None:
        return torch.where(read[..., None], leaves["logits"], 0.0)
    hidden = torch.where(read[..., None], leaves["hidden"], 0.0)
    x = hidden @ leaves["lm_head_weight"].T
    if rows.bias is not None:
        x = x + leaves["bias"]
    x = x * rows.logit_scale
    return x if rows.softcap is None else rows.softcap * torch.tanh(x / rows.softcap)


def leaves_of(rows: Rows) -> dict[str, Tensor]:
    """Float64 copies of what rows are differentiated by."""
    named = {
        "logits": rows.logits,
        "hidden": rows.hidden,
        "lm_head_weight": rows.weight,
        "bias": rows.bias,
    }
    return {k: x.detach().double() for k, x in named.items() if x is not None}


def temperatures(rows: Rows) -> Tensor:
    """Temperatures in float64, broadcastable to [B, T, V]."""
    if isinstance(rows.temperature, Tensor):
        return rows.temperature.double()[:, None, None]
    return torch.tensor(float(rows.temperature), dtype=torch.float64).view(1, 1, 1)


def absolute_logits(rows: Rows, leaves: dict[str, Tensor]) -> Tensor:
    """Sizes [B, T, V] that rounding errors of the tempered logits are relative to."""
    tau = temperatures(rows)
    if rows.logits is not None:
        # Exact but for the division, of which some backends round the result.
        size = leaves["logits"].abs() / tau
        return torch.where((tau != 1) & size.isfinite(), size, 0.0)
    hidden = leaves["hidden"].abs().nan_to_num(0.0, 0.0, 0.0)
    size = hidden @ leaves["lm_head_weight"].abs().T
    if rows.bias is not None:
        size = size + leaves["bias"].abs()
    return (2 * size * rows.logit_scale + (rows.softcap or 0.0)) / tau


@dataclass
class RowScales:
    """Of tempered logits [B, T, V]: probabilities, exponents, and scales of what is made of them.

    Attributes:
        p: probabilities.
        d: how far each logit is below the largest, 0 where that is too far to matter.
        logp: scale of the log-prob, [B, T].
        entropy: scale of the entropy, [B, T].
    """

    p: Tensor
    d: Tensor
    logp: Tensor
    entropy: Tensor


def row_scales(rows: Rows, x: Tensor, leaves: dict[str, Tensor], logp: Tensor) -> RowScales:
    """Scales of rows with logits x, before the temperature, and log-probs [B, T]."""
    z = x.detach() / temperatures(rows)
    if rows.kept is not None:
        z = z.masked_fill(~rows.kept, -torch.inf)
    p = torch.softmax(z, -1)
    d = (z.amax(-1, keepdim=True) - z).nan_to_num(_NEGLIGIBLE, _NEGLIGIBLE)
    d = torch.where(d > _NEGLIGIBLE, 0.0, d)
    weighted = (p * d).sum(-1)
    rounding = (p * absolute_logits(rows, leaves)).sum(-1)
    known = (rows.ids >= 0) & (rows.ids < rows.vocab)
    index = torch.where(known, rows.ids, 0).long()[..., None]
    own = d.gather(-1, index).squeeze(-1)
    rounding = rounding + absolute_logits(rows, leaves).gather(-1, index).squeeze(-1)
    scale = weighted + own + logp.detach().abs().nan_to_num(0.0, 0.0, 0.0) + rounding
    return RowScales(p, d, scale, 1 + (p * d * (d + rounding[..., None])).sum(-1) + weighted)


@dataclass
class TokenScales:
    """Scales [B, T] of each token's loss, of its gradient by log-prob, and of its metrics."""

    loss: Tensor
    gradient: Tensor
    ratio: Tensor
    approx_kl: Tensor
    ref_kl: Tensor


def _policy_scales(s, ratio, A, size, logp_size):
    """Of the policy term: scale of the loss and of its gradient, all [B, T]."""
    strength = A.abs()
    if s.objective == "sapo":
        tau = torch.where(A > 0, s.sapo_tau_pos, s.sapo_tau_neg).double()
        gate = torch.sigmoid(tau * (ratio - 1))
        slope = (1 - gate) * (1 + tau * ratio) * size + 1
        return 4 / tau * gate * strength * size, 4 * strength * ratio * gate * slope
    if s.objective == "vespo":
        k = torch.where(A >= 0, s.vespo_k_pos, s.vespo_k_neg).double()
        rate = torch.where(A >= 0, s.vespo_lambda_pos, s.vespo_lambda_neg).double().clamp(min=1e-4)
        phi = torch.exp(k * ratio.log() - rate * (ratio - 1))
        # Its exponent is a difference of numbers that may be large.
        exponent = k * ratio.log().abs() + rate * (ratio + 1)
        factor = phi * strength * (1 + exponent + (k + rate * ratio) * size)
        return factor * logp_size, factor
    if s.objective == "cispo":
        factor = ratio.clamp(s.eps_low_cispo, s.eps_high_cispo) * strength * size
        return factor * logp_size, factor
    if s.objective == "clip":
        bounded = ratio.clamp(max=s.dual_clip) if s.dual_clip is not None else ratio
        free, kept = bounded * A, ratio.clamp(1 - s.eps_low, 1 + s.eps_high) * A
        return torch.minimum(free, kept).abs() * size, ratio * strength * size
    return ratio * strength * size, ratio * strength * size


def _kl_scales(estimator, d, size):
    """Of a KL estimate at d = ref - logp, whose rounding is relative to `size`: value, slope."""
    if estimator == "k1":
        return size, torch.ones_like(d)
    # Near d = 0 it is the square of a rounding error.
    square = 1e-5 * size**2
    if estimator == "k2":
        return d.abs() * size + d**2 + square, size
    return d.expm1().abs() * size + torch.expm1(d) - d + square, d.exp() * size + d.expm1().abs()


def token_scales(
    batch: Batch, logp: Tensor, logp_scale: Tensor, advantages: Tensor, entropy: Tensor | None
) -> TokenScales:
    """Scales of live tokens from their log-probs [B, T], 0 elsewhere; all before aggregation.

    `entropy` [B, T] is the scale of the entropies.
    """
    s, given = batch.spec, {k: v.double() for k, v in batch.tensors.items()}
    read = is_read(batch, advantages)

    def clean(x):
        return torch.where(read, x, 0.0)

    logp = clean(logp.detach())
    old = clean(given.get("old_logprobs", logp))
    A = clean(advantages.double() if advantages.dim() == 2 else advantages.double()[:, None])
    weight = weights_of(batch)
    weight = clean(logp * 0 + 1) if weight is None else clean(weight).abs()
    size = clean(logp_scale) + old.abs() if "old_logprobs" in given else clean(logp_scale) * 0
    log_ratio = logp - old
    own_size = 1 + size + log_ratio.abs()
    size = own_size
    level = part = log_ratio
    if s.objective == "gmpo":
        part = torch.where(A > 0, log_ratio.clamp(max=s.eps_high), log_ratio)
        part = torch.where(A < 0, log_ratio.clamp(min=-s.eps_low), part)
    own_ratio = log_ratio.clamp(-20, 20).exp()
    if s.objective == "vespo":
        total = log_ratio.clamp(-20, 20).sum(1, keepdim=True)
        level = total.clamp(math.log(1e-8), 20).expand_as(logp)
        size = clean(own_size).sum(1, keepdim=True).expand_as(logp)
    elif s.importance_level == "sequence":
        n = read.sum(1, keepdim=True).clamp(min=1)
        level = (part.sum(1, keepdim=True) / n).expand_as(logp)
        size = (clean(own_size).sum(1, keepdim=True) / n).expand_as(logp)
    ratio = level.clamp(-20, 20).exp()
    loss, slope = _policy_scales(s, ratio, A, size, 1 + clean(logp_scale))
    weight_size = 1.0
    if "rollout_logprobs" in given and s.rollout_is:
        rollout = clean(given["rollout_logprobs"])
        if s.rollout_cap is None:
            weight = weight * (old - rollout).clamp(-20, 20).exp()
        else:
            weight = weight * (old - rollout).exp().clamp(max=s.rollout_cap)
        weight_size = 1 + own_size + old.abs() + rollout.abs()
    loss, slope = loss * weight * weight_size, slope * weight * weight_size
    own_slope = torch.zeros_like(slope)
    if s.objective in ("cispo", "vespo"):
        slope, own_slope = own_slope, slope
    ref_kl = torch.zeros_like(loss)
    if "ref_logprobs" in given:
        ref = clean(given["ref_logprobs"])
        ref_kl, kl_slope = _kl_scales(
            s.kl_estimator, ref - logp, 1 + clean(logp_scale) + ref.abs() + (ref - logp).abs()
        )
        kl_ratio = own_ratio * own_size if s.objective == "vespo" else ratio * size
        factor = s.beta * kl_ratio if s.kl_importance_correction else s.beta
        loss, own_slope = loss + factor * ref_kl, own_slope + factor * kl_slope
        if s.kl_importance_correction and s.objective == "vespo":
            own_slope = own_slope + factor * ref_kl
        elif s.kl_importance_correction:
            slope = slope + factor * ref_kl
    if entropy is not None:
        loss = loss + s.entropy_coef * clean(entropy)
    if s.importance_level == "sequence":
        slope = (
            clean(slope).sum(1, keepdim=True) / read.sum(1, keepdim=True).clamp(min=1)
        ) + 0 * slope
    d = -log_ratio.clamp(-20, 20)
    approx_kl = _kl_scales("k3", d, own_size)[0]
    found = (loss, slope + own_slope, ratio * size, approx_kl, ref_kl)
    return TokenScales(*[clean(x) for x in found])


def token_factors(batch: Batch, advantages: Tensor) -> Tensor:
    """What the aggregation multiplies each live token's loss by, [B, T]; 0 elsewhere."""
    s, live = batch.spec, batch.layout.live.double()
    signal = live
    if s.denominator == "contributing":
        A = advantages if advantages.dim() == 2 else advantages[:, None]
        signal = live * (A != 0)
    counted = signal.sum(1) > 0 if s.denominator == "contributing" else torch.ones(len(live)) > 0
    count = {"token-mean": signal.sum(), "token-sum": 1}.get(s.aggregation, counted.sum())
    if s.aggregation == "prompt-mean":
        count = len(batch.prompts[counted].unique())
    if s.denominator == "contributing":
        count = max(float(count), 1.0)
    count = float(count if batch.normalizer is None else batch.normalizer)
    factors = live / max(count, torch.finfo(torch.float64).tiny)
    if s.aggregation == "prompt-mean":
        same = (batch.prompts[:, None] == batch.prompts).double()
        factors = factors / (same @ live.sum(1)).clamp(min=1)[:, None]
    if s.aggregation == "seq-mean-token-mean":
        factors = factors / live.sum(1, keepdim=True).clamp(min=1)
    if s.aggregation == "seq-mean-token-sum-norm":
        factors = factors / float(s.max_tokens or max(batch.layout.length, 1))
    return factors


def exact_results(batch: Batch, advantages: Tensor) -> Exact:
    """Results of a loss call with these advantages, [B] or [B, T]."""
    read, rows = is_read(batch, advantages), batch.rows
    if rows is None:
        leaves = {"logprobs": batch.logprobs.detach().double().requires_grad_()}
        logp, entropy = leaves["logprobs"], None
        logp_scale = logp.detach().abs()
    else:
        leaves = {k: x.requires_grad_() for k, x in leaves_of(rows).items()}
        x = logits_of(rows, read, leaves)
        x.retain_grad() if x.requires_grad else None
        kept = lists_of(rows.kept)
        logp, entropy = reference.token_logprobs(x, rows.ids, rows.temperature, read, kept)
        constants = {k: v.detach() for k, v in leaves.items()}
        scales = row_scales(rows, x, constants, logp)
        logp_scale = scales.logp
    settings = {name: getattr(batch.spec, name) for name in batch.spec.__dataclass_fields__}
    loss, metrics = reference.mapo_loss(
        logp,
        advantages,
        batch.layout.live,
        entropy=entropy,
        normalizer=batch.normalizer,
        prompts=batch.prompts,
        **batch.tensors,
        **settings,
    )
    (loss * batch.upstream).backward()
    entropy_scale = None if rows is None else scales.entropy
    found = token_scales(batch, logp, logp_scale, advantages, entropy_scale)
    factors = token_factors(batch, advantages)
    gradients = {k: torch.zeros_like(x) if x.grad is None else x.grad for k, x in leaves.items()}
    slope = abs(batch.upstream) * factors * found.gradient
    if rows is None:
        gradient_scales = {"logprobs": slope}
    else:
        bonus = abs(batch.upstream) * factors * batch.spec.entropy_coef
        at_logits = logits_gradient_scale(rows, scales, slope, bonus)
        at_logits = torch.where(read[..., None], at_logits, 0.0)
        gradient_scales = leaf_scales(rows, at_logits, constants, read)
    metric_scales = {
        "ratio_mean": _mean(found.ratio, read),
        "ratio_max": found.ratio.amax() if found.ratio.numel() else torch.ones(()),
        "approx_kl": _mean(found.approx_kl, read),
        "ref_kl": _mean(found.ref_kl, read),
    }
    if "rollout_logprobs" in batch.tensors and "old_logprobs" in batch.tensors:
        metric_scales |= _rollout_scales(batch)
    if rows is not None:
        metric_scales["entropy"] = _mean(torch.where(read, scales.entropy, 0.0), read)
    metrics = _without_scored_tokens(metrics)
    return Exact(
        loss.detach(),
        (factors * found.loss).sum(),
        gradients,
        gradient_scales,
        metrics,
        metric_scales,
    )


def _rollout_scales(batch: Batch) -> dict[str, Tensor]:
    """Scales of the metrics about rollouts, whose log-probs round relative to their size."""
    live = batch.layout.live
    old, rollout = (
        torch.where(live, batch.tensors[k].double(), 0.0)
        for k in ("old_logprobs", "rollout_logprobs")
    )
    gap = (old - rollout).clamp(-20, 20)
    size = 1 + old.abs() + rollout.abs()
    ratio = torch.where(live, gap.exp() * size, 0.0)
    return {
        "rollout_ratio_mean": _mean(ratio, live),
        "rollout_ratio_max": ratio.amax() if ratio.numel() else torch.ones(()),
        "rollout_kl": _mean(torch.where(live, _kl_scales("k3", gap, size)[0], 0.0), live),
    }


def _mean(x: Tensor, read: Tensor) -> Tensor:
    return x.sum() / read.sum().clamp(min=1)


def _without_scored_tokens(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Metrics, of which those that are means (or a maximum) over no token are NaN."""
    if metrics["scored_tokens"] > 0:
        return metrics
    apart = ("active_tokens", "scored_tokens", *RolloutMetrics._fields)
    return {k: v if k in apart else torch.full_like(v, torch.nan) for k, v in metrics.items()}


def logits_gradient_scale(rows: Rows, scales: RowScales, slope: Tensor, bonus: Tensor) -> Tensor:
    """Scale [B, T, V] of the gradient by logits, of tokens with these scales of their slopes.

    The probability of a nearly certain token's own column enters as 1 - p, which is exact.
    """
    p, d = scales.p, scales.d
    felt = 1 + d + scales.logp[..., None]
    known = (rows.ids >= 0) & (rows.ids < rows.vocab)
    index = torch.where(known, rows.ids, 0).long()[..., None]
    others = p.scatter(-1, index, 0.0)
    own = (others * felt).sum(-1, keepdim=True)
    grad = slope[..., None] * (others * felt).scatter(-1, index, own)
    # The reference itself rounds 1 - p, to 1e-16 of 1.
    grad = grad + slope[..., None] * 1e-4 * torch.zeros_like(p).scatter(-1, index, 1.0)
    log_p = p.clamp(min=1e-45).log().abs()
    grad = grad + bonus[..., None] * p * felt * (log_p + scales.entropy[..., None])
    return grad / temperatures(rows)


def leaf_scales(
    rows: Rows, at_logits: Tensor, leaves: dict[str, Tensor], read: Tensor
) -> dict[str, Tensor]:
    """Scales of the gradients by the leaves, from that by the logits."""
    if rows.logits is not None:
        return {"logits": at_logits}
    hidden = torch.where(read[..., None], leaves["hidden"], 0.0).abs()
    at_product = 2 * at_logits * rows.logit_scale
    found = {
        "hidden": at_product @ leaves["lm_head_weight"].abs(),
        "lm_head_weight": torch.einsum("btv,bth->vh", at_product, hidden),
        "bias": at_product.sum((0, 1)),
    }
    return {k: v for k, v in found.items() if k in leaves}
