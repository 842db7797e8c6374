"""Advantages of the sequences of a batch: the public function of the first level."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch.compiler import is_compiling

from mapo_kernels import checks, checks_groups, operators
from mapo_kernels.distributed import data
from mapo_kernels.groups import GroupStats, threshold_decides, warn_of_threshold
from mapo_kernels.keywords import names_checked
from mapo_kernels.spec import AdvantageSpec, require_bool

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mapo_kernels.arguments import AdvantageArguments
    from mapo_kernels.choices import (
        ApdDenominator,
        Certainty,
        Difficulty,
        Estimator,
        MultiObjective,
        Scale,
    )

_SETTINGS = tuple(field.name for field in fields(AdvantageSpec))
_WEIGHTS = _SETTINGS.index("reward_weights")
_known: dict[Any, AdvantageSpec] = {}


def _spec(settings: tuple[Any, ...]) -> AdvantageSpec:
    return AdvantageSpec(**dict(zip(_SETTINGS, settings, strict=True)))


def _known_spec(settings: tuple[Any, ...]) -> AdvantageSpec:
    """The spec of these settings, which takes as long to validate as the launch does."""
    try:
        # True is no 1 here, and 1.0 none either.
        key = (settings, *map(type, settings), *map(type, settings[_WEIGHTS] or ()))
        spec = _known.get(key)
    except (TypeError, ValueError, RuntimeError):  # a list or an array, say: the spec's error
        return _spec(settings)
    if spec is None:
        if len(_known) >= 1000:
            _known.clear()
        spec = _known[key] = _spec(settings)
    return spec


@overload
def group_advantages(
    rewards: torch.Tensor,
    *,
    return_stats: Literal[False] = False,
    **arguments: Unpack[AdvantageArguments],
) -> torch.Tensor: ...
@overload
def group_advantages(
    rewards: torch.Tensor, *, return_stats: Literal[True], **arguments: Unpack[AdvantageArguments]
) -> tuple[torch.Tensor, GroupStats]: ...
@overload
def group_advantages(
    rewards: torch.Tensor, *, return_stats: bool, **arguments: Unpack[AdvantageArguments]
) -> torch.Tensor | tuple[torch.Tensor, GroupStats]: ...
@names_checked
def group_advantages(
    rewards: torch.Tensor,
    *,
    group_size: int | None = None,
    group_ids: torch.Tensor | None = None,
    estimator: Estimator = "mapo",
    certainty: Certainty | float = "quadratic",
    success: torch.Tensor | None = None,
    success_threshold: float = 1.0,
    std_correction: int = 1,
    eps: float = 1e-6,
    apd: ApdDenominator = "bounded",
    max_abs: float | None = None,
    difficulty: Difficulty | None = None,
    difficulty_exponent: float = 0.5,
    scale: Scale = "group",
    reward_weights: tuple[float, ...] | list[float] | None = None,
    multi_objective_aggregation: MultiObjective = "sum_then_normalize",
    pass_at_k: int | None = None,
    group_weight: torch.Tensor | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
    return_stats: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, GroupStats]:
    """Advantage of each sequence from the rewards of its group (MAPO, arXiv 2509.18849).

    With mu, sigma and p a group's mean, standard deviation and success ratio:
    `A = (1 - lambda) (r - mu) / (sigma + eps) + lambda (r - mu) / (D + eps)`, lambda = 1 - 4p(1-p).
    A group whose rewards are all equal, or that has one member, gets exactly 0. A NaN or infinite
    reward (a failed verifier) takes no part in its group's statistics and gets 0.

    Args:
        rewards: [B] of any real dtype; or [B, K], several of each sequence, which are summed with
            `reward_weights`. Statistics are float32, or float64 for float64 rewards.
        group_size: G, sequences per group, where each group's rows are contiguous; or give
            `group_ids`.
        group_ids: [B] integers; rows in any order, groups of any size.
        estimator: `mapo`, `grpo`, `apd`, `mean` or `rloo`; see `AdvantageSpec` for this and what
            follows.
        certainty: lambda(p): `quadratic`, `linear`, `entropy`, `step`, or a number in [0, 1].
        success: [B] bool, where success is known apart from the reward.
        success_threshold: otherwise a reward at or above it is a success, in its own dtype.
        std_correction: 1 or 0, subtracted from G in the standard deviation.
        eps: added to both denominators.
        apd: `bounded` or `paper`, the denominator D.
        max_abs: optional symmetric clamp.
        difficulty: `focal` or `power`, a factor by the group's success ratio.
        difficulty_exponent: of that factor.
        scale: what the z-score divides by: deviation of the `group` or of the `batch`, or `none`.
        reward_weights: K factors of the rewards [B, K]; None where they are [B].
        multi_objective_aggregation: `sum_then_normalize`, or `normalize_then_sum` (GDPO).
        pass_at_k: k, to train for a success among k sequences, at most `group_size` (or B) of them.
        group_weight: factors of the advantages, before that clamp: [B], or [Q] one per group, in
            order or by ascending id (NaN if there are not as many ids); with `process_group` [B].
            Statistics do not know of them. Such as weights from the history of a prompt (HA-DW,
            arXiv 2601.08521).
        process_group: ranks that each hold a part of the batch, of any size, 0 included; `rewards`
            and what else is given are this rank's. Groups may lie across ranks: ids are the same on
            all of them, and with `group_size` the ranks' rewards follow one another in the order of
            the ranks. One collective gathers them, 32 bytes per reward and some 250 per rank (one
            more when there are more rewards on a rank than ever, from 64 on), and the host waits
            for it. Every rank of the group has to call this.
        return_stats: also return `GroupStats`. With `group_ids` this waits once for the device, to
            learn the number of groups; nothing else here does.

    Returns:
        [B] float32 (float64 for float64 rewards), without gradient; with `return_stats` a pair of
        that and `GroupStats` of [Q] tensors, of the groups of all ranks.

    Raises:
        ValueError: a shape, a value or a combination that makes no sense; or ranks that were called
            with different settings.
        TypeError: an argument of the wrong type.
    """
    settings = (
        estimator, certainty, success_threshold, std_correction, eps, apd, max_abs,
        difficulty, difficulty_exponent, scale,
        tuple(reward_weights) if isinstance(reward_weights, list) else reward_weights,
        multi_objective_aggregation, pass_at_k,
    )  # fmt: skip
    spec = _spec(settings) if is_compiling() else _known_spec(settings)
    require_bool("return_stats", return_stats)
    checks.check_process_group(process_group, None)
    is_part = process_group is not None
    groups = checks_groups.check_groups(
        rewards, group_size, group_ids, success, is_part, group_weight=group_weight, spec=spec
    )
    own = None
    if process_group is not None:
        call = data.Call("group_advantages", None, spec)
        part = data.Part(rewards.shape[0], groups=groups)
        shared = data.share(part, call, process_group, rewards.device)
        assert shared.groups is not None
        groups, own = shared.groups, shared.own
    advantages, table = operators.group_advantages(groups, spec, return_stats)
    if own is not None:
        advantages = advantages[own].to(rewards.device)
    if not return_stats:
        return advantages
    decides = threshold_decides(spec, success) and not is_compiling()
    return advantages, _stats(table.to(rewards.device), spec, group_ids is not None, decides)


def _stats(table: torch.Tensor, spec: AdvantageSpec, has_ids: bool, decides: bool) -> GroupStats:
    """Statistics [Q] of each group, from the table of all; warns where no reward was a success."""
    if has_ids:
        table = table[:, : int((table[4] + table[5] > 0).sum())]
    # Where the device has been waited for, or there is none.
    if decides and (has_ids or table.device.type == "cpu"):
        if operators.group_summary(table)[-1]:
            warn_of_threshold(spec)
    return GroupStats(*table[:6].unbind(0))
