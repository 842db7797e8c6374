"""Advantage level: the launcher of its kernel."""

from __future__ import annotations

from functools import cache

import torch

from mapo_kernels import config
from mapo_kernels._triton import next_power_of_2, on_device_of, registers
from mapo_kernels.batch import GroupInputs
from mapo_kernels.formula import GROUP_METRICS
from mapo_kernels.groups import order_by_group
from mapo_kernels.kernels.advantages import Rewards, advantages_kernel, group_summary_kernel
from mapo_kernels.launch.direct import Direct
from mapo_kernels.spec import AdvantageSpec

_advantages, _summary = Direct(advantages_kernel), Direct(group_summary_kernel)


def empty_advantages(
    groups: GroupInputs, spec: AdvantageSpec, want_stats: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Uninitialised advantages [B] and, if wanted, statistics table [7, Q]."""
    n_rows = groups.rewards.shape[0]
    advantages = groups.rewards.new_empty(n_rows, dtype=torch.float32)
    if not want_stats:
        return advantages, None
    n_groups = n_rows // groups.group_size if groups.group_ids is None else n_rows
    return advantages, advantages.new_empty((7, n_groups))


@cache
def _blocks(group_size: int, tile_elements: int) -> tuple[int, int, int]:
    """Groups of a program, the rewards that it has room for in each, and its warps."""
    block_g = next_power_of_2(group_size)
    tile = max(1, tile_elements // block_g)
    return tile, block_g, _warps(tile, block_g)


def _warps(tile: int, block_g: int) -> int:
    return min(16, max(4, tile * block_g // 128))


def launch_advantages(
    groups: GroupInputs,
    spec: AdvantageSpec,
    want_stats: bool,
    out: tuple[torch.Tensor, torch.Tensor | None],
) -> None:
    """What `eager_advantages` computes, in one launch (ids of a large batch are sorted before)."""
    tuning = config.ADVANTAGES
    n_rows = groups.rewards.shape[0]
    ids = order = starts = None
    if groups.group_ids is None:
        n_groups = n_rows // groups.group_size
        tile, block_g, warps = _blocks(groups.group_size, tuning.tile_elements)
    elif n_rows <= tuning.match_limit and not want_stats:
        n_groups, tile, block_g = n_rows, 1, tuning.match_block
        warps = _warps(tile, block_g)
        ids = groups.group_ids.contiguous()
    else:
        n_groups, tile, block_g = n_rows, tuning.sorted_tile, tuning.sorted_block
        warps = _warps(tile, block_g)
        order, starts, _ = order_by_group(groups.group_ids)
    advantages, table = out
    with on_device_of(advantages):
        _advantages[(-(-n_groups // tile),)](
            Rewards(
                groups.rewards.contiguous(),
                None if groups.success is None else groups.success.contiguous(),
                ids,
                order,
                None if groups.weight is None else groups.weight.contiguous(),
                groups.batch_std,
            ),
            starts,
            advantages,
            table,
            n_groups,
            groups.group_size,
            spec.numbers,
            GROUP=spec.kind,
            TILE=tile,
            BLOCK_G=block_g,
            num_warps=warps,
            **registers(tuning.registers),
        )


def empty_summary(table: torch.Tensor) -> torch.Tensor:
    """Uninitialised [6] of `launch_summary`."""
    return table.new_empty(len(GROUP_METRICS) + 1)


def launch_summary(table: torch.Tensor, out: torch.Tensor) -> None:
    """What `groups.group_summary` computes, in one launch."""
    with on_device_of(table):
        _summary[(1,)](
            table.contiguous(), out, table.shape[1], BLOCK=config.ADVANTAGES.summary_block
        )
