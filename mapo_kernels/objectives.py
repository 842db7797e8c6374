"""Several rewards of each sequence [B, K] that have advantages of their own, which are summed.

A few torch operations on B x K numbers, before and behind the one launch that makes advantages of
all of them: the deviation that divides the sum of advantages is one of the whole batch, for which
no program of that launch could wait.
"""

from __future__ import annotations

import torch

from mapo_kernels.batch import GroupInputs, replaced
from mapo_kernels.eager import formula
from mapo_kernels.eager.sums import accumulator_dtype
from mapo_kernels.groups import (
    batch_deviation,
    decide_rewards,
    order_by_group,
    successes_of,
    weighted_columns,
)
from mapo_kernels.spec import AdvantageSpec


class Apart:
    """Rewards [B, K] of which each has advantages of its own, as blocks of groups in a row.

    Attributes:
        blocks: the groups that the advantages are computed of: those of the weighted sum, for
            their statistics, then those of each reward whose weight is not 0.
    """

    def __init__(self, groups: GroupInputs, spec: AdvantageSpec) -> None:
        """Lay the blocks one after another."""
        self._spec, self._weight = spec, groups.weight
        rewards = groups.rewards if groups.rewards.dim() == 2 else groups.rewards[:, None]
        total = decide_rewards(replaced(groups, rewards=rewards), spec)
        success = total.success
        if success is None:
            success = successes_of(total.rewards, spec)
        columns = weighted_columns(rewards, spec)
        self._weights = [w for w, _ in columns]
        self._finite = total.rewards.isfinite()
        stacked = torch.stack([total.rewards.to(columns[0][1].dtype), *[x for _, x in columns]])
        stacked = stacked.where(self._finite, float("nan"))
        self._n_blocks, self._n_rows = stacked.shape
        self._group_size, self._index = groups.group_size, None
        ids = None
        if groups.group_ids is not None:
            self._index = order_by_group(groups.group_ids)[2]
            first = torch.arange(self._n_blocks, device=rewards.device) * self._n_rows
            ids = (first[:, None] + self._index).reshape(-1)
        self.blocks = replaced(
            groups,
            rewards=stacked.reshape(-1),
            success=success.expand(stacked.shape).reshape(-1),
            group_ids=ids,
            weight=None,
        )

    def joined(
        self, advantages: torch.Tensor, table: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Advantages [B] and the statistics table of the groups, from those of the blocks."""
        spec, dtype = self._spec, advantages.dtype
        parts = advantages.view(self._n_blocks, -1)[1:].to(accumulator_dtype(advantages.device))
        total = torch.zeros_like(parts[0])
        for weight, part in zip(self._weights, parts, strict=True):
            total = total + weight * part
        known = total.where(self._finite, float("nan"))
        std, unit = batch_deviation(known, spec.std_correction, total.dtype)
        found = total / (std * unit + spec.eps)
        limit = torch.finfo(dtype).max if spec.max_abs is None else spec.max_abs
        factor = torch.ones_like(found) if self._weight is None else self._weight.to(found)
        weighted = formula.row_advantage(found, self._finite, factor, limit).to(dtype)
        if table is None or table.shape[0] == 0:
            return weighted, table
        return weighted, self._statistics(found, table)

    def _statistics(self, found: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """The table of the first block; the factor of a group is the largest of its advantages."""
        size = found.abs().to(table.dtype)
        if self._index is None:
            table = table.view(7, self._n_blocks, -1)[:, 0]
            return torch.cat([table[:6], size.view(-1, self._group_size).amax(1)[None]])
        # There are as many groups as ids, which the host does not know; other blocks' are behind.
        n_groups = self._index.amax() + 1
        own = torch.arange(self._n_rows, device=table.device) < n_groups
        largest = torch.zeros_like(size).scatter_reduce(0, self._index, size, "amax")
        return torch.cat([table[:6, : self._n_rows], largest[None]]).where(own, 0.0)
