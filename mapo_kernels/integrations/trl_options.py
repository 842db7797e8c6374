"""What the TRL integration decides without TRL: specs from a config, denominators, rows to keep.

Names of options are TRL's (`GRPOConfig` of 1.16), so that errors speak of what the user wrote.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from mapo_kernels.advantage_spec import require_scale
from mapo_kernels.settings import require_bool, require_choice, require_number
from mapo_kernels.spec import (
    ESTIMATORS,
    VESPO,
    AdvantageSpec,
    AggregationName,
    LossSpec,
    Objective,
)

LEVELS = ("hidden", "logits", "logprobs")
# TRL's loss types: what is averaged, and over what.
AGGREGATIONS: dict[str, AggregationName] = {
    "grpo": "seq-mean-token-mean",
    "sapo": "seq-mean-token-mean",
    "bnpo": "token-mean",
    "dapo": "token-mean",
    "cispo": "token-mean",
    "vespo": "token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
    "luspo": "seq-mean-token-sum",
}
OBJECTIVES: dict[str, Objective] = {"cispo": "cispo", "sapo": "sapo", "vespo": "vespo"}


def check_config(args: Any) -> None:
    """Raise unless this package can do what the config asks for.

    Args:
        args: a `MAPOConfig`, or anything with its attributes.

    Raises:
        ValueError: an option, or a combination, that cannot work; it names the option.
        TypeError: an option of the wrong type.
    """
    require_choice("fused", args.fused, LEVELS)
    require_bool("drop_zero_signal", args.drop_zero_signal)
    require_bool("score_all", args.score_all)
    require_bool("replay_sampling_mask", args.replay_sampling_mask)
    if args.fused == "logprobs" and args.replay_sampling_mask and truncates(args):
        raise ValueError(
            "fused: expected 'hidden' or 'logits' where replay_sampling_mask is on and sampling is "
            "truncated (TRL's own log-probs are over the whole vocabulary), got 'logprobs'"
        )
    if args.loss_type not in AGGREGATIONS:
        raise ValueError(
            f"loss_type: expected one of {sorted(AGGREGATIONS)}, got {args.loss_type!r} (use TRL's "
            f"GRPOTrainer for it)"
        )
    why = "the controller needs the entropy of every token of a step before its loss"
    _expect(args, "use_adaptive_entropy", False, why)
    require_number("entropy_coef", args.entropy_coef, 0.0)
    if args.entropy_coef:
        why = "entropy_coef != 0 takes the entropy of every token"
        _expect(args, "top_entropy_quantile", 1.0, why)
        _expect(args, "drop_zero_signal", False, why)
        if args.loss_type in ("grpo", "sapo") and args.fused != "logprobs":
            why = f"loss_type {args.loss_type!r} weighs tokens by sequence, TRL's bonus does not"
            _expect(args, "beta", 0.0, f"{why}: with entropy_coef != 0 one of both, or 'logprobs'")
    if args.drop_zero_signal:
        why = "with drop_zero_signal=True a sequence without signal never enters the model"
        _expect(args, "beta", 0.0, f"{why}, but the KL term acts on it")
        _expect(args, "top_entropy_quantile", 1.0, f"{why}, but the quantile counts its tokens")
        _expect(args, "score_all", False, f"{why}, but score_all=True scores its tokens")
    loss_spec_of(args)
    advantage_spec_of(args)


def _expect(args: Any, name: str, value: object, why: str) -> None:
    given = getattr(args, name)
    if given != value:
        raise ValueError(f"{name}: expected {value!r} ({why}), got {given!r}")


def truncates(args: Any) -> bool:
    """Whether the settings of generation leave columns out of the vocabulary.

    Args:
        args: a `MAPOConfig`, or anything with its attributes. `generation_kwargs` come last, as
            they do in TRL.
    """
    settings = {name: getattr(args, name) for name in ("top_p", "top_k", "min_p")}
    settings |= args.generation_kwargs or {}

    def value(name: str, default: float) -> float:
        return default if settings.get(name) is None else settings[name]

    return any(value(name, 1.0) < 1.0 for name in ("top_p", "typical_p", "top_h")) or any(
        value(name, 0.0) > 0.0 for name in ("top_k", "min_p", "epsilon_cutoff", "eta_cutoff")
    )


def loss_spec_of(args: Any) -> LossSpec:
    """The loss that a config describes, as `GRPOTrainer` understands it.

    Args:
        args: a `MAPOConfig`, or anything with its attributes.

    Returns:
        The spec; TRL's KL estimate is k3, and its `delta` is the dual clip.

    Raises:
        ValueError: a value outside its range, by TRL's name.
        TypeError: a value of the wrong type.
    """
    kind = args.loss_type
    objective = OBJECTIVES.get(kind, "clip")
    require_number("epsilon", args.epsilon, 0.0, 1.0, open_low=True, open_high=True)
    eps_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    require_number("epsilon_high", eps_high, 0.0, open_low=True)
    for name in ("sapo_temperature_pos", "sapo_temperature_neg"):
        require_number(name, getattr(args, name), 0.0, open_low=True)
    require_choice(
        "importance_sampling_level", args.importance_sampling_level, ("token", "sequence")
    )
    if kind == "vespo":
        _expect(args, "importance_sampling_level", "token", "its weight is a sequence's anyway")
        for name in VESPO:
            require_number(name, getattr(args, name), 0.0)
        if args.use_vllm and args.vllm_importance_sampling_correction and args.beta != 0:
            why = "vLLM's ratio is a part of VESPO's here, and the KL term would take both"
            _expect(args, "use_bias_correction_kl", False, why)
    if args.delta is not None:
        if objective != "clip":
            raise ValueError(f"delta: expected None with loss_type {kind!r}, got {args.delta!r}")
        require_number("delta", args.delta, 1.0 + eps_high, open_low=True)
    if kind == "dr_grpo" and args.max_completion_length is None:
        raise ValueError(
            "max_completion_length: expected a number with loss_type 'dr_grpo', which divides by "
            "it, got None"
        )
    return LossSpec(
        objective=objective,
        importance_level="sequence" if kind == "vespo" else args.importance_sampling_level,
        eps_low=args.epsilon,
        eps_high=eps_high,
        dual_clip=args.delta,
        eps_high_cispo=eps_high,
        sapo_tau_pos=args.sapo_temperature_pos,
        sapo_tau_neg=args.sapo_temperature_neg,
        **({name: getattr(args, name) for name in VESPO} if kind == "vespo" else {}),
        beta=args.beta,
        kl_importance_correction=args.use_bias_correction_kl,
        aggregation=AGGREGATIONS[kind],
        max_tokens=args.max_completion_length if kind == "dr_grpo" else None,
        score_all=args.score_all,
    )


def old_logprobs(inputs: dict[str, Any], loss_type: str) -> torch.Tensor | None:
    """Log-probs [B, T] of the policy that sampled, as the loss takes them; None on-policy.

    TRL multiplies VESPO's ratio of a sequence by vLLM's ratios of its tokens, in place of the loss:
    that is the ratio to old log-probs without them. It clamps both logarithms to +-20 (vLLM's to
    that of 1e-8), here their sum is clamped.

    Args:
        inputs: TRL's batch.
        loss_type: TRL's.
    """
    old: torch.Tensor | None = inputs.get("old_per_token_logps")
    ratio = inputs.get("importance_sampling_ratio")
    if loss_type != "vespo" or ratio is None:
        return old
    return inputs["old_per_token_logps"] - ratio.log().clamp(math.log(1e-8), 20.0)


def advantage_spec_of(args: Any) -> AdvantageSpec:
    """How a config turns rewards into advantages.

    Args:
        args: a `MAPOConfig`, or anything with its attributes.

    Returns:
        The spec. A certainty such as "0.5", which is how a command line says it, is a number.

    Raises:
        ValueError: a value outside its range, by the config's name.
        TypeError: a value of the wrong type.
    """
    require_number("advantage_eps", args.advantage_eps, 0.0, open_low=True)
    certainty = args.certainty
    if isinstance(certainty, str):
        try:
            certainty = float(certainty)
        except ValueError:
            pass
    require_choice("estimator", args.estimator, ESTIMATORS)
    apart = args.multi_objective_aggregation == "normalize_then_sum"
    if not apart:
        require_scale("scale_rewards", args.scale_rewards, args.estimator)
    return AdvantageSpec(
        estimator=args.estimator,
        # TRL does not look at it where it normalizes first.
        scale="group" if apart else args.scale_rewards,
        certainty=certainty,
        success_threshold=args.success_threshold,
        eps=args.advantage_eps,
        max_abs=args.max_abs,
        difficulty=args.difficulty,
        difficulty_exponent=args.difficulty_exponent,
        multi_objective_aggregation=args.multi_objective_aggregation,
        pass_at_k=args.pass_at_k,
    )


def rewards_of_functions(per_function: torch.Tensor, group_size: int) -> torch.Tensor:
    """Rewards [B, F] for functions that are normalised one by one.

    A function that returned None for all of a group says nothing about it: the same for everybody.
    One that did so for some of a group's completions takes these out of the group; so does no
    function at all that applies, as in TRL, which in the former case leaves them in.

    Args:
        per_function: [B, F], NaN where a function does not apply.
        group_size: completions of a prompt.
    """
    absent = per_function.isnan()
    nobody = absent.all(dim=1, keepdim=True)
    grouped = absent.view(-1, group_size, absent.shape[1])
    elsewhere = grouped.all(dim=1, keepdim=True).expand_as(grouped).reshape(absent.shape)
    return per_function.masked_fill(elsewhere & ~nobody, 0.0)


def success_column(name: str | None, reward_names: Sequence[str]) -> int | None:
    """Which reward function says what a success is; None for the total.

    Args:
        name: of a reward function, or None.
        reward_names: those of all reward functions, in TRL's order.

    Returns:
        Its position.

    Raises:
        ValueError: no reward function, or more than one, has this name.
    """
    if name is None:
        return None
    if list(reward_names).count(name) != 1:
        raise ValueError(
            f"success_reward: expected the name of one of the reward functions "
            f"{list(reward_names)}, got {name!r}"
        )
    return list(reward_names).index(name)


def rewards_and_success(
    per_function: torch.Tensor, weights: torch.Tensor, column: int | None, threshold: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Total rewards, and successes where a reward function defines them.

    Args:
        per_function: [B, F], NaN where a function does not apply.
        weights: [F].
        column: the function that defines success, or None for the total.
        threshold: its value from which on a completion is a success.

    Returns:
        [B] weighted sums, NaN where no function applies (such a completion takes no part); and [B]
        bool, or None where the total is compared with the threshold.
    """
    weighted = per_function * weights.to(per_function)
    nobody = per_function.isnan().all(dim=1)
    total = weighted.nansum(dim=1).masked_fill(nobody, float("nan"))
    return total, None if column is None else per_function[:, column] >= threshold


def denominator(
    loss_type: str,
    mask: torch.Tensor,
    num_items_in_batch: torch.Tensor,
    *,
    accumulation: int,
    steps_per_generation: int,
    num_processes: int,
    training: bool,
) -> torch.Tensor | float:
    """What TRL divides a micro-batch's loss by, so that steps and ranks average as they do there.

    Args:
        loss_type: TRL's.
        mask: [B, T] of the whole micro-batch, before any sequence is dropped.
        num_items_in_batch: [] tokens of the generation batch, over all processes.
        accumulation: micro-batches of this optimizer step.
        steps_per_generation: micro-batches that a generation batch is split into.
        num_processes: number of ranks; their gradients are averaged.
        training: in evaluation nothing is accumulated.

    Returns:
        The `normalizer` of a loss: a number, or a 0-d tensor where tokens are counted.
    """
    steps = accumulation if training else 1
    if loss_type in ("dapo", "cispo", "vespo"):
        share = steps / steps_per_generation if training else 1.0
        return num_items_in_batch.clamp(min=1).to(torch.float32) * (share / num_processes)
    if loss_type == "bnpo":
        return (mask != 0).sum().clamp(min=1).to(torch.float32) * steps
    return float(mask.shape[0] * steps)


def rows_with_signal(advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sequences that can change a loss without a KL term, and never none of them.

    A sequence whose advantage is 0, or whose tokens are all masked, changes neither loss nor
    gradient. Where that is all of them the first one stays, so that every rank runs the model (its
    collectives wait for each other) and every parameter gets its gradient, which is 0.

    Args:
        advantages: [B] or [B, T].
        mask: [B, T].

    Returns:
        [n] positions, 1 <= n <= B. Waits for the device.
    """
    signal = (advantages.reshape(mask.shape[0], -1) != 0) & (mask != 0)
    rows = signal.any(dim=1).nonzero().squeeze(1)
    return rows if rows.numel() else torch.zeros(1, dtype=torch.int64, device=mask.device)


def take_rows(inputs: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    """The batch with only some of its sequences; what belongs to all of them stays.

    Args:
        inputs: tensors [B, ...], 0-d tensors, lists of B, or None.
        rows: [n] positions.

    Returns:
        A new dict; the tensors [n, ...] are copies.
    """
    per_row = {key: x for key, x in inputs.items() if isinstance(x, torch.Tensor) and x.dim() > 0}
    lists = {key: x for key, x in inputs.items() if isinstance(x, list)}
    return {
        **inputs,
        **{key: x[rows] for key, x in per_row.items()},
        **{key: [x[n] for n in rows.tolist()] for key, x in lists.items()},
    }
