"""Validation of rewards, their groups and what goes with them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mapo_kernels.batch import GroupInputs, replaced
from mapo_kernels.checks import (
    check_constant,
    check_shape,
    check_tensor,
    dims,
    validates_device_data,
)
from mapo_kernels.dtypes import INTEGER, REAL, comparable, require_dtype, signed
from mapo_kernels.groups import warn_of_single, weight_of_rows
from mapo_kernels.spec import AdvantageSpec, describe


def check_groups(
    rewards: torch.Tensor,
    group_size: int | None,
    group_ids: torch.Tensor | None,
    success: torch.Tensor | None,
    is_part: bool = False,
    device: torch.device | None = None,
    is_double: bool = True,
    group_weight: torch.Tensor | None = None,
    are_rewards: bool = True,
    spec: AdvantageSpec | None = None,
) -> GroupInputs:
    """Validate rewards (on `device`) and their groups, which on a part may be incomplete.

    With the `spec` of their advantages they may be [B, K]. `is_double` says whether all else of the
    call is float64: then so may their statistics be.
    `are_rewards` is False where only the groups matter.
    """
    validates_device_data()  # an error, if the environment is not clear about it
    check_constant("rewards", rewards, device, REAL)
    _check_shape(rewards, None if spec is None else spec.reward_weights)
    if (group_size is None) == (group_ids is None):
        came = "neither" if group_size is None else "both"
        raise ValueError(f"group_size, group_ids: expected exactly one of them, got {came}")
    if group_ids is not None:
        check_tensor("group_ids", group_ids, rewards.device)
        check_shape("group_ids", group_ids, rewards.shape[:1], "one id per sequence")
        require_dtype("group_ids", group_ids, INTEGER)
        group_ids = signed(group_ids)
    else:
        if isinstance(group_size, bool) or not isinstance(group_size, int):
            raise TypeError(f"group_size: expected an int, got {describe(group_size)}")
        if group_size < 1:
            raise ValueError(
                f"group_size: expected a positive divisor of all rewards, got {group_size}"
            )
    if not is_part:
        k = None if spec is None else spec.pass_at_k
        check_group_count(rewards.shape[0], group_size or 0, k)
    if success is not None:
        check_tensor("success", success, rewards.device)
        check_shape("success", success, rewards.shape[:1], "one flag per sequence")
        if success.dtype != torch.bool:
            raise TypeError(f"success: expected dtype torch.bool, got {success.dtype}")
    wide = is_double and rewards.dtype == torch.float64
    groups = GroupInputs(comparable(rewards), group_size or 0, group_ids, success, wide)
    if group_size == 1 and are_rewards:
        warn_of_single()
    if group_weight is not None:
        groups = replaced(groups, weight=_check_weight(group_weight, groups, is_part))
    return groups


def _check_shape(rewards: torch.Tensor, reward_weights: Sequence[float] | None) -> None:
    """Raise unless rewards are [B], or [B, K] with a weight for each of the K."""
    if rewards.dim() == 1 and reward_weights is None:
        return
    if reward_weights is None or rewards.dim() not in (1, 2):
        raise ValueError(
            f"rewards: expected shape [B] (one reward per sequence), or [B, K] with K "
            f"reward_weights, got {dims(rewards.shape)}"
        )
    n_weights = len(reward_weights)
    if rewards.dim() == 1 or rewards.shape[1] != n_weights:
        raise ValueError(
            f"reward_weights: expected one number for each of the K rewards [B, K] of a sequence, "
            f"got {n_weights} with rewards {dims(rewards.shape)}"
        )


def _check_weight(weight: torch.Tensor, groups: GroupInputs, is_part: bool) -> torch.Tensor:
    """Validated factors of the groups' advantages, one per reward."""
    n_rows, group_size = groups.rewards.shape[0], groups.group_size
    check_constant("group_weight", weight, groups.rewards.device)
    shape = tuple(weight.shape)
    fits = shape == (n_rows,)
    if not is_part and weight.dim() == 1:
        fits = fits or (shape[0] * group_size == n_rows if group_size else 0 < shape[0] < n_rows)
    if not fits:
        per_group = "" if is_part else ", or one per group, by ascending id"
        if not is_part and group_size:
            per_group = f", or one per group ([{n_rows // group_size}])"
        raise ValueError(
            f"group_weight: expected one number per reward ([{n_rows}]){per_group}, got shape "
            f"{dims(weight.shape)}"
        )
    found = weight_of_rows(weight, n_rows, group_size, groups.group_ids)
    if validates_device_data() and not bool(found.isfinite().all()):
        raise ValueError(
            "group_weight: expected finite numbers, one for each group or each reward, got others, "
            "or another number of groups"
        )
    return found


def check_group_count(n_rows: int, group_size: int, pass_at_k: int | None = None) -> None:
    """Raise unless the rewards of a whole batch are some, and make whole groups of `group_size`.

    Or where a group cannot have `pass_at_k` sequences: a kernel draws as many, one after another.
    """
    if n_rows == 0:
        raise ValueError("rewards: expected at least one sequence (B >= 1), got an empty batch")
    if group_size and n_rows % group_size:
        raise ValueError(
            f"group_size: expected a positive divisor of the {n_rows} rewards, got {group_size}"
        )
    if pass_at_k is not None and pass_at_k > (group_size or n_rows):
        raise ValueError(
            f"pass_at_k: expected at most the {group_size or n_rows} sequences of a "
            f"{'group' if group_size else 'batch'}, got {pass_at_k}"
        )
