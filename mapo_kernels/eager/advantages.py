"""Group statistics and mixed advantage (SPEC section 1) on torch tensors."""

from __future__ import annotations

import torch

from mapo_kernels import backend, config
from mapo_kernels.batch import GroupInputs, replaced
from mapo_kernels.dtypes import result_dtype
from mapo_kernels.eager import formula
from mapo_kernels.eager.compiled import fused
from mapo_kernels.eager.sums import accumulator_dtype, row_sum
from mapo_kernels.groups import order_by_group, successes_of
from mapo_kernels.spec import AdvantageSpec


class _Groups:
    """Goes between rows and groups: contiguous groups as a table [Q, G], others by scattering."""

    def __init__(self, groups: GroupInputs) -> None:
        self._index = None
        if groups.group_ids is not None:
            self._index = order_by_group(groups.group_ids)[2]
            # Members are added by ascending reward, so that the order of the rows does not show.
            self._order = torch.argsort(groups.rewards)
        self.shape = (-1,) if self._index is not None else (-1, groups.group_size)

    def reduce(self, x: torch.Tensor, how: str, start: float = 0.0) -> torch.Tensor:
        """Reduce rows by `sum`, `amin` or `amax` to [Q], or [B] of which the last may be empty."""
        if self._index is None:
            return row_sum(x) if how == "sum" else getattr(x, how)(1)
        # Scattered values are added one after the other, which costs float32 its last digits.
        wide = x.to(accumulator_dtype(x.device))[self._order]
        found = torch.full_like(wide, start)
        return found.scatter_reduce(0, self._index[self._order], wide, how).to(x.dtype)

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """Values of groups in a shape that broadcasts against rows."""
        return x[:, None] if self._index is None else x[self._index]


def _large_rewards(dtype: torch.dtype) -> tuple[float, float]:
    """Beyond which reward deviations are squared in which unit: see `formula.reward_unit`."""
    # Not at module level, where torch.compile takes numbers for symbols.
    return (2.0**400, 2.0**-620) if dtype == torch.float64 else (2.0**50, 2.0**-80)


def eager_advantages(
    groups: GroupInputs, spec: AdvantageSpec, want_stats: bool, out: None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages [B] and the statistics table [7, Q]: fields of `GroupStats`, then the factor.

    For group ids the table is [7, B]: groups by ascending id, empty ones last. Where it is not
    wanted, it may be [0, Q].
    """
    if groups.group_ids is not None:
        # Not compiled: a graph's own loop would add in the order in which threads come.
        return _of_any(groups, spec)
    n_rows, size = groups.rewards.shape[0], groups.group_size
    if torch.compiler.is_compiling() or groups.rewards.device.type != "cpu" or n_rows == 0:
        return _of_contiguous(groups, spec)
    step = max(1, config.EAGER.chunk_rewards // size) * size
    if n_rows <= step or backend.is_compiled(groups.rewards):
        return _of_chunk(groups, spec, want_stats)
    dtype = result_dtype(groups.rewards)
    advantages = groups.rewards.new_empty(n_rows, dtype=dtype)
    table = groups.rewards.new_empty((7 if want_stats else 0, n_rows // size), dtype=dtype)
    for first in range(0, n_rows, step):
        r, q = slice(first, first + step), slice(first // size, (first + step) // size)
        success = None if groups.success is None else groups.success[r]
        weight = None if groups.weight is None else groups.weight[r]
        some = replaced(groups, rewards=groups.rewards[r], success=success, weight=weight)
        advantages[r], table[:, q] = _of_chunk(some, spec, want_stats)
    return advantages, table


def _of_chunk(
    groups: GroupInputs, spec: AdvantageSpec, want_stats: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of contiguous groups on a CPU: in a hurry, and with care where that will not do."""
    was_enough: torch.Tensor | bool = False
    if groups.weight is None:
        advantages, table, was_enough = _of_ordinary(groups, spec, want_stats)
    if not was_enough:
        advantages, table = _of_contiguous(groups, spec)
    return advantages, table if want_stats else table[:0]


@fused
def _of_ordinary(
    groups: GroupInputs, spec: AdvantageSpec, want_stats: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same of contiguous groups, and whether all rewards were ordinary, [] bool.

    Else, where a reward is not finite or its square might not be, the rest means nothing.
    """
    dtype = result_dtype(groups.rewards)
    given = groups.rewards.reshape(-1, groups.group_size)
    rewards = given.to(dtype)
    lowest, highest = torch.aminmax(rewards, dim=1)
    success = _successes(groups, given, spec)
    count = torch.full_like(lowest, groups.group_size)
    above = rewards - lowest[:, None]
    offset = row_sum(above) / count
    deviation = above - offset[:, None]
    factor, *statistics = formula.group_advantage(
        count,
        lowest,
        highest,
        lowest + offset,
        row_sum(deviation * deviation),
        success.to(dtype).sum(1) if torch.compiler.is_compiling() else success.sum(1).to(dtype),
        1.0,
        _batch_std(groups, 1.0),
        spec.numbers,
        spec.kind,
    )
    large = _large_rewards(dtype)[0]
    is_within = (lowest.amin() >= -large) & (highest.amax() <= large)
    limit = torch.finfo(dtype).max if spec.max_abs is None else spec.max_abs
    limit = formula.operand(limit, deviation)
    # Of finite numbers: where one is 0 so is the product, but for its sign.
    advantages = deviation.mul_(factor[:, None]).clamp_(-limit, limit).add_(0.0)
    columns = [*statistics, count, torch.zeros_like(count), factor]
    table = torch.stack(columns) if want_stats else count[None, :][:0]
    return advantages.reshape(-1), table, is_within & (factor.abs().amax() < float("inf"))


def _batch_std(groups: GroupInputs, unit: torch.Tensor | float) -> torch.Tensor | None:
    """The deviation of the batch's rewards times `unit`; None where nothing divides by it."""
    found = groups.batch_std
    return None if found is None else found[0] * (found[1] * unit)


def _successes(groups: GroupInputs, given: torch.Tensor, spec: AdvantageSpec) -> torch.Tensor:
    """Which rewards, in the shape of `given`, are successes, finite or not."""
    if groups.success is not None:
        return groups.success.reshape(given.shape)
    return successes_of(given, spec)


def _of_any(groups: GroupInputs, spec: AdvantageSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """What `eager_advantages` returns, of any rewards and groups."""
    by_group = _Groups(groups)
    reduce, spread = by_group.reduce, by_group.spread
    dtype = result_dtype(groups.rewards)
    given = groups.rewards.reshape(by_group.shape)
    rewards = given.to(dtype)
    finite = rewards.abs() < float("inf")
    success = finite & _successes(groups, given, spec)
    inf = float("inf")
    count = reduce(finite.to(rewards.dtype), "sum")
    nonfinite = reduce((~finite).to(rewards.dtype), "sum")
    successes = reduce(success.to(rewards.dtype), "sum")
    lowest = reduce(rewards.where(finite, inf), "amin", inf).where(count > 0, 0.0)
    highest = reduce(rewards.where(finite, -inf), "amax", -inf).where(count > 0, 0.0)
    unit = formula.reward_unit(lowest, highest, *_large_rewards(dtype))
    lowest, highest = lowest * unit, highest * unit
    above = (rewards * spread(unit) - spread(lowest)).where(finite, 0.0)
    offset = reduce(above, "sum") / count.clamp(min=1.0)
    deviation = (above - spread(offset)).where(finite, 0.0)
    factor, *statistics = formula.group_advantage(
        count,
        lowest,
        highest,
        lowest + offset,
        reduce(deviation * deviation, "sum"),
        successes,
        unit,
        _batch_std(groups, unit),
        spec.numbers,
        spec.kind,
    )
    limit = torch.finfo(dtype).max if spec.max_abs is None else spec.max_abs
    row_factor = spread(factor)
    if groups.weight is not None:
        row_factor = row_factor * groups.weight.to(dtype).reshape(given.shape)
    advantages = formula.row_advantage(deviation, finite, row_factor, limit)
    table = torch.stack([*statistics, count, nonfinite, factor])
    return advantages.reshape(-1), table


_of_contiguous = fused(_of_any)
