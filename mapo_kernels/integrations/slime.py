"""slime: `--custom-reward-post-process-path`, `--custom-loss-function-path`, its log-probs.

Contracts as in slime 0.3.1 and its main branch of 2026-08-21: `slime/ray/rollout.py` calls the
first, `slime/backends/megatron_utils/loss.py` the second. Log-probs and entropies for any loss of
slime's are those of `token_logprobs` after `--custom-megatron-init-path`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch

from mapo_kernels.advantages import group_advantages
from mapo_kernels.losses import mapo_loss
from mapo_kernels.scoring import token_logprobs
from mapo_kernels.spec import LossSpec

# What slime's own policy loss adds to the clipped term, and the value that leaves it out.
_ABSENT = {
    "use_kl_loss": False,
    "entropy_coef": 0.0,
    "use_opsm": False,
    "custom_pg_loss_reducer_function_path": None,
}


def mapo_rewards(
    args: Any, samples: Sequence[Any], **options: Any
) -> tuple[list[float], list[float]]:
    """Rewards of a rollout and what trains on them: MAPO advantages of each prompt's group.

    slime spreads the second list over the tokens as advantages (`--advantage-estimator grpo`).

    Args:
        args: slime's arguments; `Sample.get_reward_value` reads `reward_key`.
        samples: B `Sample` objects in any order; their `group_index` says which belong together.
        options: fields of `AdvantageSpec`, for a function of your own that calls this one.

    Returns:
        The rewards, and the advantages, B floats each.

    Raises:
        ValueError: a sample without `group_index`, or an option that makes no sense.
    """
    raw = [sample.get_reward_value(args) for sample in samples]
    groups = [sample.group_index for sample in samples]
    if None in groups:
        raise ValueError(
            f"samples: expected a group_index in each, got None at {groups.index(None)}"
        )
    rewards = torch.tensor(raw, dtype=torch.float32)
    advantages = group_advantages(rewards, group_ids=torch.tensor(groups), **options)
    return raw, advantages.tolist()


def policy_loss(
    args: Any,
    batch: dict[str, Any],
    logits: torch.Tensor,
    sum_of_sample_mean: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The clipped policy loss of slime, by `mapo_loss`; for `--loss-type custom_loss`.

    Args:
        args: slime's arguments: `eps_clip`, `eps_clip_high`, `eps_clip_c`, `use_rollout_logprobs`,
            `calculate_per_token_loss`, `advantage_estimator`; `use_tis` with `tis_clip_low`,
            `tis_clip` and as `custom_tis_function_path` slime's `icepop_function` or none.
        batch: a micro-batch of b samples: `advantages`, `loss_masks` and old log-probs as lists of
            [response length] tensors, `rollout_mask_sums` of b counts.
        logits: [1, T, V], over which slime's own code computes the log-probs.
        sum_of_sample_mean: slime's reducer; what it computes is written out here instead.

    Returns:
        The loss [], a sum that slime divides by the batch's samples (or tokens), and metrics.

    Raises:
        ValueError: a setting of slime's that this loss leaves out, or context parallelism.
    """
    _check_settings(args)
    lengths = batch["response_lengths"]
    logp = _response_logprobs(args, batch, logits)
    old = batch.get("rollout_log_probs" if args.use_rollout_logprobs else "log_probs")
    per_token = args.calculate_per_token_loss
    divisors = torch.as_tensor(batch["rollout_mask_sums"], device=logp.device).clamp(min=1)
    counts = torch.tensor(lengths, device=logp.device)
    weights = None if per_token else (1.0 / divisors).repeat_interleave(counts)
    rollout = mask = None
    if getattr(args, "use_tis", False):
        bounds = (args.tis_clip_low, args.tis_clip)
        rollout = torch.cat(batch["rollout_log_probs"])
        if getattr(args, "custom_tis_function_path", None) is not None:
            mask = bounds
        else:
            truncated = (torch.cat(batch["log_probs"]) - rollout).exp().clamp(*bounds)
            weights = truncated if weights is None else truncated * weights
    out = mapo_loss(
        logp,
        advantages=torch.cat(batch["advantages"]),
        mask=torch.cat(batch["loss_masks"]),
        cu_seqlens=torch.tensor([0, *accumulate(lengths)], device=logp.device),
        old_logprobs=torch.cat(old) if old else None,
        rollout_logprobs=None if mask is None else rollout,
        token_weights=weights,
        normalizer=1.0,
        spec=LossSpec(
            eps_low=args.eps_clip,
            eps_high=args.eps_clip_high,
            dual_clip=args.eps_clip_c,
            rollout_mask=mask,
            aggregation="token-mean" if per_token else "seq-mean-token-sum",
        ),
    )
    loss = out.loss.detach().clone()
    return out.loss, {"loss": loss, "pg_loss": loss}


def _check_settings(args: Any) -> None:
    """Raise if slime is asked for more than the clipped term."""
    for name, absent in _ABSENT.items():
        if getattr(args, name, absent) != absent:
            raise ValueError(f"{name}: expected {absent} with this loss, got {getattr(args, name)}")
    if getattr(args, "use_tis", False):
        path = getattr(args, "custom_tis_function_path", None)
        if path is not None and path.rpartition(".")[2] != "icepop_function":
            raise ValueError(
                f"custom_tis_function_path: expected None or slime's icepop_function with this "
                f"loss, got {path}"
            )
        if args.use_rollout_logprobs:
            raise ValueError(
                "use_tis: expected False with use_rollout_logprobs (the old policy is then the one "
                "that sampled), got True"
            )
    if args.advantage_estimator in ("gspo", "cispo"):
        raise ValueError(
            f"advantage_estimator: expected one whose loss is clipped per token, such as 'grpo', "
            f"got {args.advantage_estimator!r}"
        )


def _response_logprobs(args: Any, batch: dict[str, Any], logits: torch.Tensor) -> torch.Tensor:
    """Log-probs of the responses' tokens, one after the other, [sum of lengths]."""
    from slime.backends.megatron_utils.loss import (
        get_log_probs_and_entropy,
        get_rollout_top_p_logprob_kwargs,
    )

    lengths = batch["response_lengths"]
    _, scored = get_log_probs_and_entropy(
        logits,
        args=args,
        unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=batch["total_lengths"],
        response_lengths=lengths,
        **get_rollout_top_p_logprob_kwargs(args, batch),
    )
    logp = torch.cat(scored["log_probs"])
    if logp.shape[0] != sum(lengths):
        raise ValueError(
            f"batch: expected whole responses (context parallel size 1), {sum(lengths)} tokens, "
            f"got {logp.shape[0]}"
        )
    return logp


def use_log_probs(args: Any) -> None:
    """Let slime's losses have log-probs and entropies from `token_logprobs`.

    For `--custom-megatron-init-path`, which is called in every training process. Logits that lie on
    several tensor-parallel ranks are a `vocab_group`.

    Args:
        args: slime's arguments; none is read.
    """
    from slime.backends.megatron_utils import loss

    before = loss.calculate_log_probs_and_entropy

    def calculate(
        logits: torch.Tensor,
        tokens: torch.Tensor,
        tp_group: Any,
        with_entropy: bool = False,
        chunk_size: int = -1,
        log_prob_keep_mask: torch.Tensor | None = None,
        with_entropy_grad: bool = True,
        **others: Any,
    ) -> Any:
        if log_prob_keep_mask is not None or any(others.values()) or not tokens.numel():
            # Its log-probs are of the kept columns, its entropies of all.
            others |= {"chunk_size": chunk_size, "log_prob_keep_mask": log_prob_keep_mask}
            others |= {"with_entropy": with_entropy, "with_entropy_grad": with_entropy_grad}
            return before(logits, tokens, tp_group, **others)
        is_split = tp_group is not None and torch.distributed.get_world_size(tp_group) > 1
        group = tp_group if is_split else None
        logp, entropy = token_logprobs(logits, tokens, vocab_group=group, return_entropy=True)
        if not with_entropy:
            return logp[:, None], None
        return logp[:, None], entropy if with_entropy_grad else entropy.detach()

    loss.calculate_log_probs_and_entropy = calculate
