"""Group statistics and mixed advantage (SPEC section 1): one launch, and its eager twin.

A group is found in one of three layouts: `contiguous` (rows k G to (k + 1) G), `match` (all rows
are scanned for an equal id; right for a batch of a few thousand) and `order` (ids were sorted; a
permutation and the groups' starts say where each group's rows lie). None of them waits on the host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mapo_kernels import twin
from mapo_kernels._triton import on_device_of, registers, triton
from mapo_kernels.advantages_kernel import Rewards, advantages_kernel
from mapo_kernels.inputs import GroupInputs
from mapo_kernels.spec import AdvantageSpec

# Above it, scanning every id for every row costs more than sorting.
MATCH_LIMIT = 4096
_TILE_ELEMENTS = 1024


class GroupStats(NamedTuple):
    """Statistics per group, [Q] tensors: groups by position, or by ascending id for `group_ids`.

    Ids of uint64 from 2^63 on come first, as the negative numbers that their bits are in int64.

    Attributes:
        mean: mu, mean of the group's finite rewards.
        std: sigma, with the correction of the spec.
        success_ratio: p, share of successes among the finite rewards.
        certainty: lambda(p), the weight of the percent deviation.
        size: number of finite rewards.
        nonfinite: number of NaN or infinite rewards.
    """

    mean: torch.Tensor
    std: torch.Tensor
    success_ratio: torch.Tensor
    certainty: torch.Tensor
    size: torch.Tensor
    nonfinite: torch.Tensor


def order_by_group(group_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort rows by group without learning on the host how many groups there are.

    Args:
        group_ids: [B] integers in any order.

    Returns:
        `order` [B], the rows sorted by id; `starts` [B + 1], where each group starts in `order`,
        filled with B past the last group; `index` [B], each row's group counted from 0 by ascending
        id.
    """
    n_rows = group_ids.shape[0]
    ids, order = torch.sort(group_ids, stable=True)
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[1:] = ids[1:] != ids[:-1]
    rank = begins.cumsum(0) - 1
    positions = torch.arange(n_rows, device=ids.device)
    starts = torch.full((n_rows + 1,), n_rows, dtype=torch.int64, device=ids.device)
    # Rows that begin no group all write B to the last slot, which holds B already.
    starts.scatter_(0, rank.where(begins, n_rows), positions.where(begins, n_rows))
    index = torch.empty_like(rank).scatter_(0, order, rank)
    return order, starts, index


def empty_advantages(groups: GroupInputs, want_stats: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised advantages [B] and statistics table [7, Q] ([0, Q] if not wanted)."""
    n_rows = groups.rewards.shape[0]
    n_groups = n_rows // groups.group_size if groups.group_ids is None else n_rows
    shape = (7 if want_stats else 0, n_groups)
    return (
        groups.rewards.new_empty(n_rows, dtype=torch.float32),
        groups.rewards.new_empty(shape, dtype=torch.float32),
    )


def launch_advantages(
    groups: GroupInputs, spec: AdvantageSpec, want_stats: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `eager_advantages` computes, in one launch (ids of a large batch are sorted before)."""
    n_rows = groups.rewards.shape[0]
    ids = order = starts = None
    if groups.group_ids is None:
        n_groups = n_rows // groups.group_size
        block_g = triton.next_power_of_2(groups.group_size)
        tile = max(1, _TILE_ELEMENTS // block_g)
    elif n_rows <= MATCH_LIMIT and not want_stats:
        n_groups, tile, block_g = n_rows, 1, 1024
        ids = groups.group_ids.contiguous()
    else:
        n_groups, tile, block_g = n_rows, 16, 64
        order, starts, _ = order_by_group(groups.group_ids)
    advantages, table = empty_advantages(groups, want_stats)
    with on_device_of(advantages):
        advantages_kernel[(triton.cdiv(n_groups, tile),)](
            Rewards(
                groups.rewards.contiguous(),
                None if groups.success is None else groups.success.contiguous(),
                ids,
                order,
            ),
            starts,
            advantages,
            table if want_stats else None,
            n_groups,
            groups.group_size,
            spec.numbers,
            GROUP=spec.kind,
            TILE=tile,
            BLOCK_G=block_g,
            num_warps=min(16, max(4, tile * block_g // 128)),
            # Up to 512 threads have them; Triton 3.6 spills for an A100 at fewer.
            **registers(128),
        )
    return advantages, table


def result_dtype(x: torch.Tensor) -> torch.dtype:
    """What the eager backend computes in for inputs like `x`: float64 stays, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """What the eager backend adds long runs of scattered values in; Apple's GPU has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


class _Groups:
    """Goes between rows and groups: contiguous groups as a table [Q, G], others by scattering."""

    def __init__(self, groups: GroupInputs) -> None:
        self._index = None if groups.group_ids is None else order_by_group(groups.group_ids)[2]
        self.shape = (-1,) if self._index is not None else (-1, groups.group_size)

    def reduce(self, x: torch.Tensor, how: str, start: float = 0.0) -> torch.Tensor:
        """Reduce rows by `sum`, `amin` or `amax` to [Q], or [B] of which the last may be empty."""
        if self._index is None:
            return getattr(x, how)(1)
        # Scattered values are added one after the other, which costs float32 its last digits.
        wide = x.to(accumulator_dtype(x.device))
        return torch.full_like(wide, start).scatter_reduce(0, self._index, wide, how).to(x.dtype)

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """Values of groups in a shape that broadcasts against rows."""
        return x[:, None] if self._index is None else x[self._index]


def eager_advantages(
    groups: GroupInputs, spec: AdvantageSpec, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages [B] and the statistics table [7, Q]: fields of `GroupStats`, then the factor.

    For group ids the table is [7, B]: groups by ascending id, empty ones last.
    """
    by_group = _Groups(groups)
    reduce, spread = by_group.reduce, by_group.spread
    if dtype is None:
        dtype = result_dtype(groups.rewards)
    given = groups.rewards.reshape(by_group.shape)
    rewards = given.to(dtype)

    finite = rewards.abs() < float("inf")
    if groups.success is None:
        # In the rewards' own dtype: a float32 reward of 0.9 passes a threshold of 0.9.
        success = finite & (given >= spec.success_threshold)
    else:
        success = finite & groups.success.reshape(by_group.shape)
    inf = float("inf")
    count = reduce(finite.to(rewards.dtype), "sum")
    nonfinite = reduce((~finite).to(rewards.dtype), "sum")
    successes = reduce(success.to(rewards.dtype), "sum")
    lowest = reduce(rewards.where(finite, inf), "amin", inf).where(count > 0, 0.0)
    highest = reduce(rewards.where(finite, -inf), "amax", -inf).where(count > 0, 0.0)
    above = (rewards - spread(lowest)).where(finite, 0.0)
    offset = reduce(above, "sum") / count.clamp(min=1.0)
    deviation = (above - spread(offset)).where(finite, 0.0)
    mean = lowest + offset
    factor, std, success_ratio, certainty = twin.group_advantage(
        count,
        lowest,
        highest,
        mean,
        reduce(deviation * deviation, "sum"),
        successes,
        spec.numbers,
        spec.kind,
    )
    advantages = deviation * spread(factor)
    if spec.max_abs is not None:
        advantages = advantages.clamp(-spec.max_abs, spec.max_abs)
    advantages = advantages.where(finite & spread(factor != 0), 0.0)
    table = [mean, std, success_ratio, certainty, count, nonfinite, factor]
    return advantages.reshape(-1), torch.stack(table)


def group_metrics(table: torch.Tensor) -> list[torch.Tensor]:
    """The batch's `GROUP_METRICS`, 0-d each, from the statistics table."""
    _, _, success_ratio, certainty, count, nonfinite, factor = table.unbind(0)
    counted = count > 0
    n_groups = counted.sum().to(table.dtype)
    divisor = n_groups.clamp(min=1)
    without_signal = (factor == 0) & (count + nonfinite > 0)
    return [
        success_ratio.where(counted, 0.0).sum() / divisor,
        certainty.where(counted, 0.0).sum() / divisor,
        without_signal.sum().to(table.dtype),
        nonfinite.sum(),
        n_groups,
    ]
