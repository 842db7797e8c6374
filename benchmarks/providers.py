"""Who computes a level: mapo_kernels, plain PyTorch, and the losses of other packages.

A provider takes the tensors that are differentiated, then `rest`, which `levels.py` drew: the mask
[B, T], ids, old log-probs, spec, and either advantages [B] or rewards. Plain PyTorch is what a
trainer writes by hand. Every loss is the token mean of the clipped objective.
"""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import mapo_kernels as mk
from mapo_kernels import config

from .cases import Case
from .names import GRPO, HIDDEN, KEPT, LEVELS, LOGITS, LOGPROBS, MAPO, SCORING

OURS = "mapo_kernels"
PLAIN = "plain PyTorch"
COMPILED = "torch.compile of "


@dataclass(frozen=True)
class Provider:
    """`call(*leaves, rest)` returns the loss, or the values without a gradient."""

    call: Callable[..., Tensor]
    package: str | None = None
    needs_gpu: bool = False
    compiles: bool = False
    loops: bool = False  # Over groups, in Python.
    softcap: bool = True  # Whether it knows one.

    def unavailable(self, case: Case, device: torch.device) -> str | None:
        """Why it cannot be measured here, or None."""
        reasons = {
            "not installed": self.package and importlib.util.find_spec(self.package) is None,
            "needs a GPU": self.needs_gpu and device.type != "cuda",
            "a Python loop over groups: minutes at this size": (
                self.loops and case.n_sequences > 1 << 14
            ),
            "has no cap on logits": case.head.softcap is not None and not self.softcap,
        }
        return next((reason for reason, holds in reasons.items() if holds), None)


# Of each level, in the order of the tables.
PROVIDERS: dict[str, dict[str, Provider]] = {level: {} for level in LEVELS}


def provides(name: str, *levels: str, compiled: bool = False, **settings: Any) -> Any:
    """Make a function a provider of levels; with `compiled`, what torch makes of it another."""

    def register(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        for level in levels:
            PROVIDERS[level][name] = Provider(call, **settings)
            if compiled:
                PROVIDERS[level][COMPILED + name] = Provider(torch.compile(call), compiles=True)
        return call

    return register


@provides(OURS, MAPO, GRPO)
def our_advantages(rewards: Tensor, rest: Any) -> Tensor:
    return mk.group_advantages(rewards, group_size=rest.group_size, estimator=rest.estimator)


def our_batch(rest: Any, mask: Tensor) -> dict[str, Any]:
    """What our losses take: advantages, or rewards where theirs are a part of the work."""
    batch = {"mask": mask, "spec": rest.spec}
    if rest.advantages is not None:
        return batch | {"advantages": rest.advantages}
    return batch | {"rewards": rest.rewards, "group_size": rest.group_size}


@provides(OURS, LOGPROBS, compiled=True)
def ours_from_logprobs(logp: Tensor, rest: Any) -> Tensor:
    return mk.mapo_loss(logp, old_logprobs=rest.old, **our_batch(rest, rest.mask)).loss


@provides(OURS, LOGITS)
def ours_from_logits(logits: Tensor, rest: Any, inplace: bool = False) -> Tensor:
    ids, old, mask = rest.padded
    given = {"old_logprobs": old, "inplace": inplace}
    return mk.mapo_loss_from_logits(logits, ids, **given, **our_batch(rest, mask)).loss


@provides("mapo_kernels in place", LOGITS)
def ours_in_place(logits: Tensor, rest: Any) -> Tensor:
    return ours_from_logits(logits, rest, inplace=True)


@provides(OURS, SCORING)
def our_scores(logits: Tensor, rest: Any) -> Tensor:
    return mk.token_logprobs(logits[:, :-1], rest.ids)


def our_plan(rest: Any) -> mk.Plan:
    return mk.make_plan(**our_batch(rest, rest.mask), sampling_mask=rest.kept)


@provides(OURS, HIDDEN, KEPT)
def ours_from_hidden(hidden: Tensor, weight: Tensor, rest: Any) -> Tensor:
    given = {"old_logprobs": rest.old, "plan": our_plan(rest), "softcap": rest.softcap}
    return mk.mapo_loss_from_hidden(hidden, weight, rest.ids, **given).loss


@provides("mapo_kernels log-probs", HIDDEN)
def our_logprobs_from_hidden(hidden: Tensor, weight: Tensor, rest: Any) -> Tensor:
    """Log-probs with gradients, as for a loss of one's own, and `mapo_loss`."""
    plan = our_plan(rest)
    given = {"plan": plan, "softcap": rest.softcap}
    logp = mk.token_logprobs_from_hidden(hidden, weight, rest.ids, **given)
    return mk.mapo_loss(logp, old_logprobs=rest.old, plan=plan).loss


@provides("mapo_kernels whole head", KEPT)
def ours_from_whole(hidden: Tensor, weight: Tensor, rest: Any) -> Tensor:
    """Every row of more than one column through the whole head, the others of its columns -inf."""
    with config.override({"KEPT.cpu_share": 1 << 30, "KEPT.gpu_share": 1 << 30}):
        return ours_from_hidden(hidden, weight, rest)


def plain_logits(hidden: Tensor, weight: Tensor, rest: Any) -> Tensor:
    """Logits [B, T, V] as trainers compute them: where a sampling mask is replayed, overwritten."""
    logits = torch.nn.functional.linear(hidden, weight)
    if rest.softcap is not None:
        logits = torch.tanh(logits / rest.softcap) * rest.softcap
    if rest.kept is None:
        return logits
    row = torch.repeat_interleave(rest.kept.counts)
    keeps = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
    keeps.view(-1, logits.shape[-1])[row, rest.kept.token_ids.long()] = True
    return logits.masked_fill(~keeps, -torch.inf)


@provides(PLAIN, MAPO, GRPO, compiled=True)
def plain_advantages(rewards: Tensor, rest: Any) -> Tensor:
    """MAPO or GRPO advantages [B] of contiguous groups, as the formula reads."""
    r = rewards.view(-1, rest.group_size)
    mu = r.mean(1, keepdim=True)
    z = (r - mu) / (r.std(1, keepdim=True) + 1e-6)
    if rest.estimator == "grpo":
        return z.view(-1)
    p = (r >= 1.0).to(r.dtype).mean(1, keepdim=True)
    certainty = 1 - 4 * p * (1 - p)
    return ((1 - certainty) * z + certainty * (r - mu) / (mu + 1e-6)).view(-1)


def advantages_of(rest: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """Advantages [B]: given, or computed from the rewards as a part of the measured work."""
    if rest.advantages is not None:
        return rest.advantages
    return plain_advantages(rest.rewards.to(dtype), rest)


@provides(PLAIN, LOGPROBS, compiled=True)
def plain_from_logprobs(logp: Tensor, rest: Any) -> Tensor:
    advantages = advantages_of(rest, logp.dtype)[:, None]
    ratio = torch.exp(logp - rest.old)
    clipped = ratio.clamp(1 - rest.spec.eps_low, 1 + rest.spec.eps_high)
    loss = -torch.min(ratio * advantages, clipped * advantages)
    return (loss * rest.mask).sum() / rest.mask.sum()


def plain_token_logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Log-probs [B, T] of the tokens as a trainer writes them, in float32 (or float64)."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(wide, -1).gather(-1, token_ids[..., None]).squeeze(-1)


@provides(PLAIN, SCORING, compiled=True)
def plain_scores(logits: Tensor, rest: Any) -> Tensor:
    return plain_token_logprobs(logits[:, :-1], rest.ids)


@provides(PLAIN, LOGITS, compiled=True)
def plain_from_logits(logits: Tensor, rest: Any) -> Tensor:
    return plain_from_logprobs(plain_scores(logits, rest), rest)


@provides(PLAIN, KEPT)
@provides(PLAIN, HIDDEN, compiled=True)
def plain_from_hidden(hidden: Tensor, weight: Tensor, rest: Any) -> Tensor:
    logits = plain_logits(hidden, weight, rest)
    return plain_from_logprobs(plain_token_logprobs(logits, rest.ids), rest)


@provides("authors' loop", MAPO, loops=True)
def looped_advantages(rewards: Tensor, rest: Any) -> Tensor:
    """MAPO advantages [B] the way published trainers do it: one group at a time, in Python."""
    groups = rewards.view(-1, rest.group_size)
    return torch.cat([plain_advantages(group, rest) for group in groups])


class Settings(SimpleNamespace):
    """What another package reads of its trainer or configuration: what is not given is off."""

    def __getattr__(self, name: str) -> None:
        return None

    def get(self, name: str, default: Any = None) -> Any:
        return vars(self).get(name, default)


@provides("TRL", LOGPROBS, package="trl")
def trl_from_logprobs(logp: Tensor, rest: Any, entropy: Tensor | None = None) -> Tensor:
    """TRL's own loss [] (its metrics included, as in training), by what it reads of its trainer."""
    from trl import GRPOTrainer

    entropy = torch.zeros_like(logp) if entropy is None else entropy
    collectives = ("gather", "reduce", "gather_for_metrics")
    trainer = Settings(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, entropy, None),
        _metrics=defaultdict(lambda: defaultdict(list)),
        loss_type="bnpo",
        epsilon_low=rest.spec.eps_low,
        epsilon_high=rest.spec.eps_high,
        importance_sampling_level="token",
        beta=0.0,
        current_gradient_accumulation_steps=1,
        model=Settings(training=True),
        args=Settings(),
        accelerator=Settings(**dict.fromkeys(collectives, lambda x, *_, **__: x)),
        top_entropy_quantile=1.0,
    )
    inputs = {
        "prompt_ids": rest.mask[:, :0],
        "prompt_mask": rest.mask[:, :0],
        "completion_ids": rest.mask,
        "completion_mask": rest.mask.long(),
        "advantages": advantages_of(rest, logp.dtype),
        "old_per_token_logps": rest.old,
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs)


def _trl_scores(logits: Tensor, rest: Any, mask: Tensor) -> Any:
    """Log-probs and entropies [B, T] as TRL's trainer gets them: its kernel where there is one."""
    from trl.trainer.utils import selective_log_softmax_and_entropy as scores

    return scores(logits[:, :-1], rest.ids, entropy_requires_grad=False, row_mask=mask)


@provides("TRL", SCORING, package="trl")
def trl_scores(logits: Tensor, rest: Any) -> Tensor:
    return _trl_scores(logits, rest, torch.ones_like(rest.mask))[0]


@provides("TRL", LOGITS, package="trl")
def trl_from_logits(logits: Tensor, rest: Any) -> Tensor:
    logp, entropy = _trl_scores(logits, rest, rest.mask)
    return trl_from_logprobs(logp, rest, entropy)


@provides("TRL", HIDDEN, package="trl")
def trl_from_hidden(hidden: Tensor, weight: Tensor, rest: Any) -> Tensor:
    """TRL's loss [] from its fused head, as its GRPO trainer calls it.

    Like there, only unmasked positions are scored where its Triton kernels run, all of them
    elsewhere.
    """
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction, _use_triton
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    mask = rest.mask if _use_triton(hidden.device) else torch.ones_like(rest.mask)
    found = ChunkedLogProbFunction.apply(
        hidden[mask], weight, None, rest.ids[mask], 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE,
        rest.softcap, 1.0, ("log_probs", "entropy"),
    )  # fmt: skip
    logp, entropy = (x.new_zeros(mask.shape).masked_scatter(mask, x) for x in found[:2])
    return trl_from_logprobs(logp, rest, entropy.detach())


@provides("TRL", KEPT, package="trl")
def trl_from_kept(hidden: Tensor, weight: Tensor, rest: Any) -> Tensor:
    """TRL's loss of logits that were masked for it: its fused head takes no mask of columns."""
    from trl.trainer.utils import selective_log_softmax

    logp = selective_log_softmax(plain_logits(hidden, weight, rest), rest.ids)
    return trl_from_logprobs(logp, rest)


@provides("Liger", LOGITS, package="liger_kernel", needs_gpu=True)
def liger_from_logits(logits: Tensor, rest: Any) -> Tensor:
    """Liger's fused loss [] from logits [B, T + 1, V], whose last position it does not read."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    loss, _ = triton_grpo_loss(
        logits, rest.old, None, rest.ids, rest.advantages, rest.mask, temperature=1.0, beta=0.0,
        eps_low=rest.spec.eps_low, eps_high=rest.spec.eps_high, loss_type="bnpo", reduce=True,
    )  # fmt: skip
    return loss


@provides("Liger", HIDDEN, package="liger_kernel", softcap=False)
def liger_from_hidden(hidden: Tensor, weight: Tensor, rest: Any) -> Tensor:
    """Liger's chunked loss []."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    call = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, epsilon_low=rest.spec.eps_low,
        epsilon_high=rest.spec.eps_high, loss_type="bnpo", compiled=hidden.is_cuda,
    )  # fmt: skip
    given = (hidden, weight, rest.ids, rest.mask, rest.advantages)
    return call(*given, old_per_token_logps=rest.old)[0]


@provides("verl", GRPO, package="verl", loops=True)
def verl_advantages(rewards: Tensor, rest: Any) -> Tensor:
    """verl's GRPO advantages [B] of rewards that come at the only token of each answer."""
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

    # It writes into the sums of the rewards, which for one token are the rewards themselves.
    found, _ = compute_grpo_outcome_advantage(rewards[:, None].clone(), rest.mask, rest.ids)
    return found[:, 0]


@provides("verl", LOGPROBS, package="verl")
def verl_from_logprobs(logp: Tensor, rest: Any) -> Tensor:
    """verl's own clipped loss [] (its metrics included)."""
    from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla

    config = Settings(
        clip_ratio=rest.spec.eps_low, clip_ratio_low=rest.spec.eps_low,
        clip_ratio_high=rest.spec.eps_high, clip_ratio_c=1e6, global_batch_info={},
    )  # fmt: skip
    advantages = advantages_of(rest, logp.dtype)[:, None].expand_as(logp)
    given = (rest.old, logp, advantages, rest.mask, "token-mean", config)
    return compute_policy_loss_vanilla(*given)[0]


@provides("verl", HIDDEN, package="verl", needs_gpu=True, softcap=False)
def verl_from_hidden(hidden: Tensor, weight: Tensor, rest: Any) -> Tensor:
    """verl's fused linear kernel, which scores all positions, and the plain loss."""
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    logp, _ = linear_cross_entropy(hidden, weight, rest.ids, 1.0, "none", None)
    return plain_from_logprobs(logp.view(rest.ids.shape), rest)


@provides("cut-cross-entropy", HIDDEN, package="cut_cross_entropy", needs_gpu=True)
def cce_from_hidden(hidden: Tensor, weight: Tensor, rest: Any) -> Tensor:
    """cut-cross-entropy, which leaves masked positions out, and the plain loss."""
    from cut_cross_entropy import linear_cross_entropy

    targets = rest.ids.masked_fill(~rest.mask, -100)
    losses = linear_cross_entropy(hidden, weight, targets, softcap=rest.softcap, reduction="none")
    return plain_from_logprobs(-losses, rest)
