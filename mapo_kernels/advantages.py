"""Group statistics and mixed advantage (SPEC section 1): one launch, and its eager twin.

A group is found in one of three layouts: `contiguous` (rows k G to (k + 1) G), `match` (all rows
are scanned for an equal id; right for a batch of a few thousand) and `order` (ids were sorted; a
permutation and the groups' starts say where each group's rows lie). None of them waits on the host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mapo_kernels import twin
from mapo_kernels._triton import jit, tl, triton
from mapo_kernels.formula import group_advantage
from mapo_kernels.inputs import GroupInputs
from mapo_kernels.spec import AdvantageSpec

# Above it, scanning every id for every row costs more than sorting.
MATCH_LIMIT = 4096
_TILE_ELEMENTS = 1024


class GroupStats(NamedTuple):
    """Statistics per group, [Q] tensors: groups by position, or by ascending id for `group_ids`.

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


@jit
def member_rewards(
    Rewards,
    GroupIds,
    Order,
    first,
    size,
    own_id,
    start,
    BLOCK_G: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """One block of a tile of groups: rows, which lanes are members, rewards, which are finite."""
    offs = start + tl.arange(0, BLOCK_G)[None, :]  # [1, BLOCK_G]
    member = offs < size[:, None]  # [TILE, BLOCK_G]
    rows = first[:, None] + offs
    if LAYOUT == "order":
        rows = tl.load(Order + rows, mask=member, other=0)
    if LAYOUT == "match":
        ids = tl.load(GroupIds + rows, mask=member, other=0)
        member = member & (ids == own_id[:, None])
    reward = tl.load(Rewards + rows, mask=member, other=0.0).to(tl.float32)
    finite = member & (tl.abs(reward) < float("inf"))
    return rows, member, reward, finite


@jit
def group_moments(
    Rewards,
    Success,
    GroupIds,
    Order,
    first,
    size,
    own_id,
    span,
    success_threshold,
    TILE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    LAYOUT: tl.constexpr,
    HAS_SUCCESS: tl.constexpr,
):
    """Moments of a tile of groups, [TILE] each; `span` is the largest `size` of the tile.

    Deviations are taken from the lowest reward first, so a common offset of the rewards costs no
    digits. Returns (count, members, lowest, highest, mean above lowest, squared deviations,
    successes, leader), the leader being the group's first row.
    """
    count = tl.zeros([TILE], tl.float32)
    members = tl.zeros([TILE], tl.float32)
    successes = tl.zeros([TILE], tl.float32)
    lowest = tl.full([TILE], float("inf"), tl.float32)
    highest = tl.full([TILE], float("-inf"), tl.float32)
    leader = tl.full([TILE], 2147483647, tl.int32)
    for start in range(0, span, BLOCK_G):
        rows, member, reward, finite = member_rewards(
            Rewards, GroupIds, Order, first, size, own_id, start, BLOCK_G, LAYOUT
        )
        if HAS_SUCCESS:
            success = finite & (tl.load(Success + rows, mask=member, other=0) != 0)
        else:
            threshold = success_threshold
            if Rewards.dtype.element_ty.is_floating():
                # Rounded like the rewards: a bfloat16 reward of 0.9 passes a threshold of 0.9.
                threshold = threshold.to(Rewards.dtype.element_ty).to(tl.float32)
            success = finite & (reward >= threshold)
        count = count + tl.sum(finite.to(tl.float32), 1)
        members = members + tl.sum(member.to(tl.float32), 1)
        successes = successes + tl.sum(success.to(tl.float32), 1)
        lowest = tl.minimum(lowest, tl.min(tl.where(finite, reward, float("inf")), 1))
        highest = tl.maximum(highest, tl.max(tl.where(finite, reward, float("-inf")), 1))
        leader = tl.minimum(leader, tl.min(tl.where(member, rows, 2147483647).to(tl.int32), 1))
    lowest = tl.where(count > 0, lowest, 0.0)
    highest = tl.where(count > 0, highest, 0.0)

    total = tl.zeros([TILE], tl.float32)
    for start in range(0, span, BLOCK_G):
        rows, member, reward, finite = member_rewards(
            Rewards, GroupIds, Order, first, size, own_id, start, BLOCK_G, LAYOUT
        )
        total = total + tl.sum(tl.where(finite, reward - lowest[:, None], 0.0), 1)
    offset = total / tl.maximum(count, 1.0)

    squares = tl.zeros([TILE], tl.float32)
    for start in range(0, span, BLOCK_G):
        rows, member, reward, finite = member_rewards(
            Rewards, GroupIds, Order, first, size, own_id, start, BLOCK_G, LAYOUT
        )
        deviation = tl.where(finite, (reward - lowest[:, None]) - offset[:, None], 0.0)
        squares = squares + tl.sum(deviation * deviation, 1)
    return count, members, lowest, highest, offset, squares, successes, leader


@jit
def row_advantage(reward, lowest, offset, factor, max_abs, HAS_MAX_ABS: tl.constexpr):
    """Advantage of one row of a group; 0 where the reward is NaN or infinite."""
    advantage = ((reward - lowest) - offset) * factor
    if HAS_MAX_ABS:
        advantage = tl.minimum(tl.maximum(advantage, -max_abs), max_abs)
    # A factor of 0 means exactly 0: a NaN or an overflow times 0 would not be.
    return tl.where((tl.abs(reward) < float("inf")) & (factor != 0), advantage, 0.0)


@jit(do_not_specialize=["n_groups"])
def _advantages_kernel(
    Rewards,  # [B]
    Success,  # [B] or unused
    GroupIds,  # [B] or unused
    Order,  # [B] or unused
    Starts,  # [B + 1] or unused
    Advantages,  # [B]
    Stats,  # [7, n_groups] or unused
    n_groups,
    group_size,
    success_threshold,
    std_correction,
    eps,
    fixed_certainty,
    max_abs,
    TILE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    LAYOUT: tl.constexpr,
    HAS_SUCCESS: tl.constexpr,
    HAS_STATS: tl.constexpr,
    HAS_MAX_ABS: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    CERTAINTY: tl.constexpr,
    APD: tl.constexpr,
):
    tile = tl.program_id(0) * TILE
    groups = tile + tl.arange(0, TILE)  # [TILE]
    present = groups < n_groups
    own_id = groups
    if LAYOUT == "order":
        first = tl.load(Starts + groups, mask=present, other=0)
        size = tl.load(Starts + groups + 1, mask=present, other=0) - first
        span = tl.max(size, 0)
    elif LAYOUT == "match":
        first = groups * 0
        size = tl.where(present, n_groups, 0)
        own_id = tl.load(GroupIds + groups, mask=present, other=0)
        span = n_groups
    else:
        first = groups * group_size
        size = tl.where(present, group_size, 0)
        span = group_size
    count, members, lowest, highest, offset, squares, successes, leader = group_moments(
        Rewards, Success, GroupIds, Order, first, size, own_id, span, success_threshold,
        TILE, BLOCK_G, LAYOUT, HAS_SUCCESS,
    )  # fmt: skip
    factor, std, success_ratio, certainty = group_advantage(
        count, lowest, highest, lowest + offset, squares, successes, std_correction, eps,
        fixed_certainty, ESTIMATOR, CERTAINTY, APD,
    )  # fmt: skip
    if LAYOUT == "match":
        reward = tl.load(Rewards + groups, mask=present, other=0.0).to(tl.float32)
        advantage = row_advantage(reward, lowest, offset, factor, max_abs, HAS_MAX_ABS)
        tl.store(Advantages + groups, advantage, mask=present)
    else:
        for start in range(0, span, BLOCK_G):
            rows, member, reward, finite = member_rewards(
                Rewards, GroupIds, Order, first, size, own_id, start, BLOCK_G, LAYOUT
            )
            advantage = row_advantage(
                reward, lowest[:, None], offset[:, None], factor[:, None], max_abs, HAS_MAX_ABS
            )
            tl.store(Advantages + rows, advantage, mask=member)
    if HAS_STATS:
        tl.store(Stats + groups, lowest + offset, mask=present)
        tl.store(Stats + n_groups + groups, std, mask=present)
        tl.store(Stats + 2 * n_groups + groups, success_ratio, mask=present)
        tl.store(Stats + 3 * n_groups + groups, certainty, mask=present)
        tl.store(Stats + 4 * n_groups + groups, count, mask=present)
        tl.store(Stats + 5 * n_groups + groups, members - count, mask=present)
        tl.store(Stats + 6 * n_groups + groups, factor, mask=present)


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
        layout, n_groups = "contiguous", n_rows // groups.group_size
        block_g = triton.next_power_of_2(groups.group_size)
        tile = max(1, _TILE_ELEMENTS // block_g)
    elif n_rows <= MATCH_LIMIT and not want_stats:
        layout, n_groups, tile, block_g = "match", n_rows, 1, 1024
        ids = groups.group_ids.contiguous()
    else:
        layout, n_groups, tile, block_g = "order", n_rows, 16, 64
        order, starts, _ = order_by_group(groups.group_ids)
    advantages, table = empty_advantages(groups, want_stats)
    _advantages_kernel[(triton.cdiv(n_groups, tile),)](
        groups.rewards.contiguous(),
        None if groups.success is None else groups.success.contiguous(),
        ids,
        order,
        starts,
        advantages,
        table,
        n_groups,
        groups.group_size,
        *advantage_arguments(spec),
        TILE=tile,
        BLOCK_G=block_g,
        LAYOUT=layout,
        HAS_STATS=want_stats,
        **advantage_flags(groups, spec),
    )
    return advantages, table


def advantage_arguments(spec: AdvantageSpec) -> tuple[float, ...]:
    """The run-time numbers of the advantage kernels, in their order."""
    return (
        float(spec.success_threshold),
        float(spec.std_correction),
        float(spec.eps),
        spec.certainty_value,
        float(spec.max_abs or 0.0),
    )


def advantage_flags(groups: GroupInputs | None, spec: AdvantageSpec) -> dict[str, object]:
    """The compile-time choices of the advantage kernels."""
    return {
        "HAS_SUCCESS": groups is not None and groups.success is not None,
        "HAS_MAX_ABS": spec.max_abs is not None,
        "ESTIMATOR": spec.estimator,
        "CERTAINTY": spec.certainty_mode,
        "APD": spec.apd,
    }


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """What the eager backend adds long runs of scattered values in; Apple's GPU has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _segments(groups: GroupInputs) -> tuple[torch.Tensor, int]:
    """Each row's group counted from 0, and an upper bound of the number of groups."""
    n_rows = groups.rewards.shape[0]
    if groups.group_ids is not None:
        return order_by_group(groups.group_ids)[2], n_rows
    rows = torch.arange(n_rows, device=groups.rewards.device)
    return rows // groups.group_size, n_rows // groups.group_size


def eager_advantages(
    groups: GroupInputs, spec: AdvantageSpec, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages [B] and the statistics table [7, Q]: fields of `GroupStats`, then the factor.

    For group ids the table is [7, B]: groups by ascending id, empty ones last.
    """
    index, n_groups = _segments(groups)
    if dtype is None:
        dtype = torch.float64 if groups.rewards.dtype == torch.float64 else torch.float32
    rewards = groups.rewards.to(dtype)

    def reduce(x: torch.Tensor, how: str, start: float = 0.0) -> torch.Tensor:
        if groups.group_ids is None:
            table = x.reshape(n_groups, groups.group_size)
            return table.sum(1) if how == "sum" else getattr(table, how)(1)
        # Scattered values are added one after the other, which costs float32 its last digits.
        wide = x.to(accumulator_dtype(x.device))
        return torch.full_like(wide, start).scatter_reduce(0, index, wide, how).to(dtype)

    finite = rewards.abs() < float("inf")
    if groups.success is None:
        # In the rewards' own dtype: a float32 reward of 0.9 passes a threshold of 0.9.
        success = finite & (groups.rewards >= spec.success_threshold)
    else:
        success = finite & groups.success
    inf = float("inf")
    count = reduce(finite.to(rewards.dtype), "sum")
    nonfinite = reduce((~finite).to(rewards.dtype), "sum")
    successes = reduce(success.to(rewards.dtype), "sum")
    lowest = reduce(rewards.where(finite, inf), "amin", inf).where(count > 0, 0.0)
    highest = reduce(rewards.where(finite, -inf), "amax", -inf).where(count > 0, 0.0)
    above = (rewards - lowest[index]).where(finite, 0.0)
    offset = reduce(above, "sum") / count.clamp(min=1.0)
    deviation = (above - offset[index]).where(finite, 0.0)
    mean = lowest + offset
    factor, std, success_ratio, certainty = twin.group_advantage(
        count,
        lowest,
        highest,
        mean,
        reduce(deviation * deviation, "sum"),
        successes,
        float(spec.std_correction),
        float(spec.eps),
        spec.certainty_value,
        spec.estimator,
        spec.certainty_mode,
        spec.apd,
    )
    advantages = deviation * factor[index]
    if spec.max_abs is not None:
        advantages = advantages.clamp(-spec.max_abs, spec.max_abs)
    advantages = advantages.where(finite & (factor[index] != 0), 0.0)
    table = [mean, std, success_ratio, certainty, count, nonfinite, factor]
    return advantages, torch.stack(table)


def group_metrics(table: torch.Tensor) -> list[torch.Tensor]:
    """The batch's `GROUP_METRICS`, 0-d each, from the statistics table."""
    _, _, success_ratio, certainty, count, nonfinite, factor = table
    counted = count > 0
    n_groups = counted.sum().clamp(min=1)
    without_signal = (factor == 0) & (count + nonfinite > 0)
    return [
        success_ratio.where(counted, 0.0).sum() / n_groups,
        certainty.where(counted, 0.0).sum() / n_groups,
        without_signal.sum().to(table.dtype),
        nonfinite.sum(),
    ]
