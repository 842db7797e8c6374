"""The loss as a trainer writes it by hand, in plain PyTorch: the yardstick of the tests.

The error that it makes in a dtype is the yardstick for the error a kernel may make in it.
"""

from __future__ import annotations

from typing import Any

import torch


def _policy(logp, ratio, A, s):
    if s.objective == "clip":
        free = ratio if s.dual_clip is None else ratio.clamp(max=s.dual_clip)
        return -torch.min(free * A, ratio.clamp(1 - s.eps_low, 1 + s.eps_high) * A)
    if s.objective == "cispo":
        return -ratio.clamp(s.eps_low_cispo, s.eps_high_cispo).detach() * A * logp
    if s.objective == "sapo":
        tau = torch.where(A > 0, s.sapo_tau_pos, s.sapo_tau_neg).to(ratio.dtype)
        return -4 / tau * torch.sigmoid(tau * (ratio - 1)) * A
    return -ratio * A


def _kl(d, estimator):
    if estimator == "k1":
        return -d
    return d * d / 2 if estimator == "k2" else torch.exp(d) - d - 1


def plain_loss(
    logp: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    spec: Any,
    old: torch.Tensor | None = None,
    ref: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    rollout: torch.Tensor | None = None,
) -> torch.Tensor:
    """Loss [] of padded log-probs [B, T] under a `LossSpec`, differentiable by autograd."""
    live = mask != 0
    m = live.to(logp.dtype)

    def clean(x):
        return x.to(logp.dtype).masked_fill(~live, 0)

    logp = clean(logp)
    old = logp.detach() if old is None else clean(old)
    A = clean(advantages if advantages.dim() == 2 else advantages[:, None].expand_as(logp))
    log_ratio = logp - old
    if spec.importance_level == "sequence":
        log_ratio = (log_ratio * m).sum(1, keepdim=True) / m.sum(1, keepdim=True).clamp(min=1)
        log_ratio = log_ratio.expand_as(logp)
    ratio = torch.exp(log_ratio.clamp(-20, 20))
    loss = _policy(logp, ratio, A, spec)
    if weights is not None:
        loss = loss * clean(weights)
    if rollout is not None:
        loss = loss * torch.exp(old - clean(rollout)).clamp(max=spec.rollout_cap)
    if spec.beta:
        kl = _kl(clean(ref) - logp, spec.kl_estimator)
        loss = loss + spec.beta * (ratio * kl if spec.kl_importance_correction else kl)
    loss = loss * m
    if spec.aggregation == "token-mean":
        return loss.sum() / m.sum().clamp(min=1)
    per_sequence = loss.sum(1)
    if spec.aggregation == "seq-mean-token-mean":
        per_sequence = per_sequence / m.sum(1).clamp(min=1)
    elif spec.aggregation == "seq-mean-token-sum-norm":
        per_sequence = per_sequence / (spec.max_tokens or logp.shape[1])
    return per_sequence.mean()
