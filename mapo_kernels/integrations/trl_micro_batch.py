"""Of a micro-batch in TRL: its entropy bonus, and how much of its sequences was clipped."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from mapo_kernels.spec import LossSpec


def entropy_bonus(
    spec: LossSpec, coef: float, mask: torch.Tensor, normalizer: torch.Tensor | float, steps: int
) -> tuple[LossSpec, torch.Tensor | float, torch.Tensor | None]:
    """The same loss with TRL's entropy bonus, `coef` times the mean entropy over a micro-batch.

    TRL divides the bonus by the tokens of the micro-batch, whatever the loss is divided by, and by
    the micro-batches of a step. Here one denominator serves both: where the loss weighs all tokens
    alike, the coefficient makes up for the difference (which waits for the device); where it weighs
    them by sequence, weights of the policy term do.

    Args:
        spec: the loss without the bonus.
        coef: TRL's `entropy_coef`.
        mask: [B, T] of the micro-batch.
        normalizer: what the loss is divided by.
        steps: micro-batches of this optimizer step.

    Returns:
        The spec, the normalizer, and weights [B, 1] of the policy term or None.
    """
    counts = (mask != 0).sum(1).to(torch.float32)
    share = counts.sum().clamp(min=1) * steps
    if spec.aggregation == "seq-mean-token-mean":
        weights = share / (normalizer * counts.clamp(min=1)[:, None])
        spec = replace(spec, aggregation="token-mean", entropy_coef=coef)
        return spec, share, weights
    per_token = normalizer * (spec.max_tokens or 1)
    spec = replace(spec, entropy_coef=coef * float(per_token / share))
    return spec, normalizer, None


def clip_extremes(
    log_probs: torch.Tensor | None,
    old: torch.Tensor | None,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    spec: LossSpec,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest share of a sequence's tokens that were clipped low, and largest that were high.

    Args:
        log_probs: [B, T], 0 where a token was not scored (it then counts as not clipped).
        old: [B, T], or None on-policy, where nothing is clipped.
        advantages: [B] or [B, T].
        mask: [B, T].
        spec: the loss.

    Returns:
        Two 0-d tensors, NaN where no sequence has a token.
    """
    counts = (mask != 0).sum(1).to(torch.float32)
    low = high = torch.zeros_like(counts)
    if log_probs is not None and old is not None:
        A = advantages if advantages.dim() == 2 else advantages[:, None]
        scored = (mask != 0) & (log_probs != 0)
        gap = torch.where(scored, log_probs - old, 0.0)
        if spec.importance_level == "sequence":
            gap = (gap.sum(1) / counts.clamp(min=1))[:, None].expand_as(gap)
        ratio = gap.exp()
        shares = [
            (x & (mask != 0)).sum(1) / counts.clamp(min=1)
            for x in (
                (ratio < 1 - spec.eps_low) & (A < 0),
                (ratio > 1 + spec.eps_high) & (A > 0),
            )
        ]
        low, high = shares
    some = counts > 0
    nan, inf = torch.full_like(counts[:1], math.nan), math.inf
    if not bool(some.any()):
        return nan[0], nan[0]
    return low.where(some, inf).amin(), high.where(some, -inf).amax()
