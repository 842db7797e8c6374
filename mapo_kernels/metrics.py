"""The metrics of a loss call, and their means over the ranks of a process group."""

from __future__ import annotations

import torch
import torch.distributed as dist

from mapo_kernels.inputs import GROUP_METRICS, RESULTS
from mapo_kernels.parallel import all_gather, meeting_place

_NAMES = RESULTS[1:]
_GROUP_MEANS = ("success_ratio_mean", "lambda_mean")
_SUMS = (
    "active_tokens",
    "scored_tokens",
    "zero_advantage_groups",
    "nonfinite_rewards",
    "active_groups",
)
# torch.compile of older versions cannot trace the making of a dict of another class.
_IS_TRACEABLE = tuple(int(x) for x in torch.__version__.split(".")[:2]) >= (2, 11)


class Metrics(dict[str, torch.Tensor]):
    """Names and values (0-d tensors, [] each) of the metrics of a loss, as `mapo_loss` lists them.

    A loss compiled by torch.compile before torch 2.11 returns a plain dict: `Metrics(values)` has
    it reduced, too (after setting `across_ranks`, if the loss was given a process group or a plan
    with one).

    Attributes:
        across_ranks: whether the metrics about groups speak of the groups of all ranks already.
    """

    across_ranks = False

    def reduce(self, process_group: dist.ProcessGroup | None = None) -> Metrics:
        """Metrics of the batch of all ranks, the same on each of them.

        One collective, of 120 bytes per rank; nothing waits for the device. Every rank of the group
        has to call it: one that computed no loss, because it holds no sequence, calls
        `Metrics().reduce(process_group)` and gets every name, 0 where no rank has it.

        Args:
            process_group: the ranks that hold the batch; None means all.

        Returns:
            A new `Metrics`: means weighted by the tokens (or groups) that they speak of, sums of
            counts, the largest of `ratio_max`.

        Raises:
            ValueError: a name that is none of a loss.
        """
        if not self.keys() <= set(_NAMES):
            raise ValueError(
                f"metrics: expected only names of a loss, got {sorted(self.keys() - set(_NAMES))}"
            )
        some = next(iter(self.values()), torch.zeros(()))
        place = meeting_place(process_group, some.device)
        values = torch.zeros(len(_NAMES) + 1, dtype=torch.float64, device=place)
        for i, name in enumerate(_NAMES):
            if name in self:
                values[i].copy_(self[name])
        values[-1].fill_(self.across_ranks)
        reduced = _reduce_table(all_gather(values, process_group))
        wanted = self.keys() or _NAMES
        out = Metrics({k: reduced[k].to(some.device, some.dtype) for k in _NAMES if k in wanted})
        out.across_ranks = True
        return out


def _reduce_table(table: torch.Tensor) -> dict[str, torch.Tensor]:
    """Metrics of all ranks from the values of each, and whether its groups are those of all."""
    by_name = dict(zip(_NAMES, table[:, :-1].unbind(1), strict=True))
    across_ranks = table[:, -1].amax() > 0
    reduced = {}
    for name, values in by_name.items():
        if name in _SUMS:
            value = values.sum()
        else:
            # A rank that speaks of nothing has a NaN; so have all if none of them does.
            weights = by_name["active_groups" if name in _GROUP_MEANS else "scored_tokens"]
            if name == "ratio_max":
                value = values.where(weights > 0, -torch.inf).amax()
                value = value.where(weights.sum() > 0, torch.nan)
            else:
                value = sum_behind(values, weights).sum() / weights.sum()
        if name in GROUP_METRICS:
            # Where the groups are those of all ranks, every rank that has metrics has this value.
            value = values.amax().where(across_ranks, value)
        reduced[name] = value
    return reduced


def sum_behind(mean: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The sum that a mean over `count` things was taken of: 0 where it is over nothing, and NaN."""
    return (mean * count).where(count > 0, 0.0)


def as_metrics(values: dict[str, torch.Tensor], across_ranks: bool) -> dict[str, torch.Tensor]:
    """`values` as `Metrics`, but for a compiled graph that cannot make them."""
    if torch.compiler.is_compiling() and not _IS_TRACEABLE:
        return values
    metrics = Metrics(values)
    metrics.across_ranks = across_ranks
    return metrics
