"""What mapo_kernels is measured against: plain PyTorch, and the losses of other packages.

`plain_*` is what a trainer writes by hand, in the input's dtype. The tests use it too: the error
that it makes in a dtype is the yardstick for the error a kernel may make. The functions named
`*_from_*` take the tensors that are differentiated, then `rest`: the mask [B, T], ids, old
log-probs, spec and either advantages [B] or rewards that `levels.py` drew.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch


def plain_advantages(rewards: torch.Tensor, group_size: int, estimator: str = "mapo"):
    """MAPO or GRPO advantages [B] of contiguous groups, as the formula reads."""
    r = rewards.view(-1, group_size)
    mu = r.mean(1, keepdim=True)
    z = (r - mu) / (r.std(1, keepdim=True) + 1e-6)
    if estimator == "grpo":
        return z.view(-1)
    p = (r >= 1.0).to(r.dtype).mean(1, keepdim=True)
    certainty = 1 - 4 * p * (1 - p)
    return ((1 - certainty) * z + certainty * (r - mu) / (mu + 1e-6)).view(-1)


def _policy(logp, ratio, A, s):
    if s.objective == "clip":
        free = ratio if s.dual_clip is None else ratio.clamp(max=s.dual_clip)
        return -torch.min(free * A, ratio.clamp(1 - s.eps_low, 1 + s.eps_high) * A)
    if s.objective == "cispo":
        return -ratio.clamp(max=s.eps_high_cispo).detach() * A * logp
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


def looped_advantages(rewards: torch.Tensor, rest: Any) -> torch.Tensor:
    """MAPO advantages [B] the way published trainers do it: one group at a time, in Python."""
    groups = rewards.view(-1, rest.group_size)
    return torch.cat([plain_advantages(group, rest.group_size) for group in groups])


def verl_advantages(rewards: torch.Tensor, rest: Any) -> torch.Tensor:
    """verl's GRPO advantages [B] of rewards that come at the only token of each answer."""
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

    # It writes into the sums of the rewards, which for one token are the rewards themselves.
    found, _ = compute_grpo_outcome_advantage(rewards[:, None].clone(), rest.mask, rest.ids)
    return found[:, 0]


def advantages_of(rest: Any, dtype: torch.dtype) -> torch.Tensor:
    """Advantages [B]: given, or computed from the rewards as a part of the measured work."""
    if rest.rewards is None:
        return rest.advantages
    return plain_advantages(rest.rewards.to(dtype), rest.group_size)


def plain_from_logprobs(logp: torch.Tensor, rest: Any) -> torch.Tensor:
    return plain_loss(logp, advantages_of(rest, logp.dtype), rest.mask, rest.spec, old=rest.old)


def plain_token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Log-probs [B, T] of the tokens as a trainer writes them, in float32."""
    every = torch.log_softmax(logits.float(), -1)
    return every.gather(-1, token_ids[..., None]).squeeze(-1)


def plain_scores(logits: torch.Tensor, rest: Any) -> torch.Tensor:
    return plain_token_logprobs(logits[:, :-1], rest.ids)


def plain_from_logits(logits: torch.Tensor, rest: Any) -> torch.Tensor:
    return plain_from_logprobs(plain_scores(logits, rest), rest)


def plain_logits(hidden: torch.Tensor, weight: torch.Tensor, softcap: float | None):
    """Logits [B, T, V] of a head, with Gemma's cap where there is one."""
    logits = torch.nn.functional.linear(hidden, weight)
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def plain_from_hidden(hidden: torch.Tensor, weight: torch.Tensor, rest: Any) -> torch.Tensor:
    logits = plain_logits(hidden, weight, rest.softcap)
    return plain_from_logprobs(plain_token_logprobs(logits, rest.ids), rest)


class _TrlState:
    """What TRL's loss reads from its trainer, for log-probs that are there already."""

    def __init__(self, logp: torch.Tensor, entropy: torch.Tensor, spec: Any) -> None:
        self._logp, self._entropy = logp, entropy
        self.loss_type = {"token-mean": "bnpo", "seq-mean-token-mean": "grpo"}[spec.aggregation]
        self.epsilon_low, self.epsilon_high = spec.eps_low, spec.eps_high
        self.importance_sampling_level = spec.importance_level
        self.beta = spec.beta
        self.current_gradient_accumulation_steps = 1
        self.model = SimpleNamespace(training=True)
        self.args = SimpleNamespace(
            delta=spec.dual_clip, use_bias_correction_kl=spec.kl_importance_correction
        )
        self.accelerator = SimpleNamespace(
            gather=lambda x: x, reduce=lambda x, reduction: x, gather_for_metrics=lambda x: x
        )
        self._metrics: Any = defaultdict(lambda: defaultdict(list))
        self.top_entropy_quantile = 1.0
        self.off_policy_mask_threshold = None
        self.use_vllm = self.aux_loss_enabled = self._entropy_bonus_enabled = False

    def _get_per_token_logps_and_entropies(self, *_: Any, **__: Any) -> tuple[Any, Any, Any]:
        return self._logp, self._entropy, None


def trl_from_logprobs(
    logp: torch.Tensor, rest: Any, entropy: torch.Tensor | None = None
) -> torch.Tensor:
    """TRL's own loss [] (its metrics included, as in training)."""
    from trl import GRPOTrainer

    empty = rest.mask[:, :0]
    inputs = {
        "prompt_ids": empty,
        "prompt_mask": empty,
        "completion_ids": rest.mask,
        "completion_mask": rest.mask.long(),
        "advantages": advantages_of(rest, logp.dtype),
        "old_per_token_logps": rest.old,
    }
    entropy = torch.zeros_like(logp) if entropy is None else entropy
    return GRPOTrainer._compute_loss(_TrlState(logp, entropy, rest.spec), None, inputs)


def _trl_scores(logits: torch.Tensor, rest: Any, mask: torch.Tensor) -> Any:
    """Log-probs and entropies [B, T] as TRL's trainer gets them: its kernel where there is one."""
    from trl.trainer.utils import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy(
        logits[:, :-1], rest.ids, entropy_requires_grad=False, row_mask=mask
    )


def trl_scores(logits: torch.Tensor, rest: Any) -> torch.Tensor:
    return _trl_scores(logits, rest, torch.ones_like(rest.mask))[0]


def trl_from_logits(logits: torch.Tensor, rest: Any) -> torch.Tensor:
    logp, entropy = _trl_scores(logits, rest, rest.mask)
    return trl_from_logprobs(logp, rest, entropy)


def trl_from_hidden(hidden: torch.Tensor, weight: torch.Tensor, rest: Any) -> torch.Tensor:
    """TRL's loss [] from its fused head, as its GRPO trainer calls it.

    Like there, only unmasked positions are scored where its Triton kernels run, all of them
    elsewhere.
    """
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction, _use_triton
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    mask, compact = rest.mask, _use_triton(hidden.device)
    rows = hidden[mask] if compact else hidden.reshape(-1, hidden.shape[-1])
    targets = rest.ids[mask] if compact else rest.ids.reshape(-1)
    logp, entropy, *_ = ChunkedLogProbFunction.apply(
        rows, weight, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, rest.softcap, 1.0,
        ("log_probs", "entropy"),
    )  # fmt: skip
    if compact:
        logp, entropy = (x.new_zeros(mask.shape).masked_scatter(mask, x) for x in (logp, entropy))
    else:
        logp, entropy = (x.view(mask.shape).masked_fill(~mask, 0) for x in (logp, entropy))
    return trl_from_logprobs(logp, rest, entropy.detach())


def liger_from_logits(logits: torch.Tensor, rest: Any) -> torch.Tensor:
    """Liger's fused loss [] from logits [B, T + 1, V], whose last position it does not read."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    loss, _ = triton_grpo_loss(
        logits, rest.old, None, rest.ids, rest.advantages, rest.mask, temperature=1.0, beta=0.0,
        eps_low=rest.spec.eps_low, eps_high=rest.spec.eps_high, loss_type="bnpo", reduce=True,
    )  # fmt: skip
    return loss


def liger_from_hidden(hidden: torch.Tensor, weight: torch.Tensor, rest: Any) -> torch.Tensor:
    """Liger's chunked loss []."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, epsilon_low=rest.spec.eps_low,
        epsilon_high=rest.spec.eps_high, loss_type="bnpo", compiled=hidden.is_cuda,
    )  # fmt: skip
    return loss(hidden, weight, rest.ids, rest.mask, rest.advantages, old_per_token_logps=rest.old)[
        0
    ]


class _VerlConfig(SimpleNamespace):
    """What verl's loss reads from its actor's configuration."""

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)


def verl_from_logprobs(logp: torch.Tensor, rest: Any) -> torch.Tensor:
    """verl's own clipped loss [] (its metrics included)."""
    from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla

    config = _VerlConfig(
        clip_ratio=rest.spec.eps_low, clip_ratio_low=rest.spec.eps_low,
        clip_ratio_high=rest.spec.eps_high, clip_ratio_c=1e6, global_batch_info={},
    )  # fmt: skip
    advantages = advantages_of(rest, logp.dtype)[:, None].expand_as(logp)
    return compute_policy_loss_vanilla(rest.old, logp, advantages, rest.mask, "token-mean", config)[
        0
    ]


def verl_from_hidden(hidden: torch.Tensor, weight: torch.Tensor, rest: Any) -> torch.Tensor:
    """verl's fused linear kernel, which scores all positions, and the plain loss."""
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    logp, _ = linear_cross_entropy(hidden, weight, rest.ids, 1.0, "none", None)
    return plain_from_logprobs(logp.view(rest.ids.shape), rest)


def cce_from_hidden(hidden: torch.Tensor, weight: torch.Tensor, rest: Any) -> torch.Tensor:
    """cut-cross-entropy, which leaves masked positions out, and the plain loss."""
    from cut_cross_entropy import linear_cross_entropy

    targets = rest.ids.masked_fill(~rest.mask, -100)
    losses = linear_cross_entropy(hidden, weight, targets, softcap=rest.softcap, reduction="none")
    return plain_from_logprobs(-losses, rest)
