"""The metrics of a loss call, and their means over the ranks of a process group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from mapo_kernels.bounds import LARGEST_OF_ROLLOUT, RolloutMetrics
from mapo_kernels.distributed.agreement import all_gather, digest, group_ranks, meeting_place
from mapo_kernels.formula import GROUP_MEANS, GROUP_METRICS, LARGEST, RESULTS

_NAMES = (*RESULTS[1:], *RolloutMetrics._fields)
_COUNTS = ("active_tokens", "scored_tokens", *GROUP_METRICS[len(GROUP_MEANS) :])
# torch.compile of older versions cannot trace the making of a dict of another class.
_IS_TRACEABLE = tuple(int(x) for x in torch.__version__.split(".")[:2]) >= (2, 11)


class Metrics(dict[str, torch.Tensor]):
    """Names and values (0-d tensors, [] each) of the metrics of a loss, as `mapo_loss` lists them.

    Copies (`copy`, `Metrics(metrics)`, pickles) and unions (`|`, `update`) are `Metrics` that know
    what these know: of metrics that speak of different ranks there is no union. A loss compiled by
    torch.compile before torch 2.11 returns a plain dict: `Metrics(values)` has it reduced, too
    (after setting `across_ranks`, and `ranks` to those of the plan, if the loss was given a process
    group or a plan with one).

    Attributes:
        across_ranks: whether the metrics about groups speak of the groups of several ranks already.
        ranks: those ranks, ascending; None where `across_ranks` is False, or where nobody said.
        reduced: whether `reduce` returned these metrics.
    """

    across_ranks = False
    ranks: tuple[int, ...] | None = None
    reduced = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As of a dict; of `Metrics`, what they know besides, too."""
        super().__init__(*args, **kwargs)
        if args and isinstance(args[0], Metrics):
            self._know_what(args[0])

    def _know_what(self, other: Metrics) -> None:
        self.across_ranks, self.ranks = other.across_ranks, other.ranks
        self.reduced = other.reduced

    def copy(self) -> Metrics:
        """The same names and values, of the same ranks."""
        return Metrics(self)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """As of a dict.

        Raises:
            ValueError: metrics of other ranks than these.
        """
        if args and isinstance(args[0], Metrics) and args[0]:
            other = args[0]
            if self and _knowledge(self) != _knowledge(other):
                raise ValueError(
                    f"metrics: expected those of the same ranks, got {_knowledge(self)} and "
                    f"{_knowledge(other)}"
                )
            self._know_what(other)
        super().update(*args, **kwargs)

    def __or__(self, other: Any) -> Metrics:  # type: ignore[override]
        """A union, as `update` has it."""
        return _union(self, other)

    def __ror__(self, other: Any) -> Metrics:  # type: ignore[override]
        """A union, as `update` has it."""
        return _union(other, self)

    def __ior__(self, other: Any) -> Metrics:  # type: ignore[misc, override]
        """See `update`."""
        self.update(other)
        return self

    def reduce(self, process_group: dist.ProcessGroup | None = None) -> Metrics:
        """Metrics of the batch of all ranks, the same on each of them.

        One collective, of 152 bytes per rank; nothing waits for the device. Every rank of the group
        has to call it: one that computed no loss, because it holds no sequence, calls
        `Metrics().reduce(process_group)`, which does wait, and gets every name, 0 where no rank has
        it.

        Args:
            process_group: the ranks that hold the batch; None means all. Where the loss had a
                process group, or a plan with one, this has to have the same ranks.

        Returns:
            A new `Metrics`: means weighted by the tokens (or groups) that they speak of, sums of
            counts, the largest of `ratio_max` and `rollout_ratio_max`. Metrics about
            groups are NaN on a rank that has its own groups alone, if other ranks' metrics speak of
            those of another process group.

        Raises:
            ValueError: a name that is none of a loss; or, on every rank that has such metrics or
                none at all, metrics about the groups of other ranks than those of `process_group`;
                or metrics that are reduced already.
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
        values[-1].fill_(_code_of(self))
        table = all_gather(values, process_group)
        # Only now: a rank that raised before would leave those waiting that know nothing of it.
        ranks = group_ranks(process_group)
        self._check_span(ranks, table[:, -1])
        reduced = _reduce_table(table, _code(ranks))
        wanted = self.keys() or _NAMES
        out = Metrics({k: reduced[k].to(some.device, some.dtype) for k in _NAMES if k in wanted})
        out.across_ranks, out.ranks, out.reduced = True, ranks, True
        return out

    def _check_span(self, ranks: tuple[int, ...], codes: torch.Tensor) -> None:
        """Raise unless metrics about groups speak of own ones, or of those of `ranks`."""
        if self.reduced:
            raise ValueError("metrics: expected those of a loss, got some that reduce returned")
        if self:
            foreign, theirs = self.ranks not in (None, ranks), f"{list(self.ranks or ())}"
        else:
            # This rank has computed nothing that a reading would wait for.
            foreign = any(code not in (_OWN, _UNKNOWN, _code(ranks)) for code in codes.tolist())
            theirs = "which are others"
        if foreign:
            raise ValueError(
                f"metrics: expected a process_group of the ranks whose groups they speak of, "
                f"{theirs} (those of the plan), got {list(ranks)}"
            )


# What a rank's message says about the ranks whose groups its metrics speak of: its own, some that
# nobody named, or a number that stands for them.
_OWN, _UNKNOWN = 0, 1


def _code(ranks: tuple[int, ...]) -> int:
    """A number from 2 to 2^53, which float64 holds exactly, that stands for these ranks."""
    return 2 + (digest(str(ranks)) >> 12)


def _code_of(metrics: Metrics) -> int:
    if not metrics.across_ranks:
        return _OWN
    return _UNKNOWN if metrics.ranks is None else _code(metrics.ranks)


def _knowledge(metrics: Metrics) -> dict[str, object]:
    return {name: getattr(metrics, name) for name in ("across_ranks", "ranks", "reduced")}


def _union(one: Any, other: Any) -> Any:
    if not isinstance(one, dict) or not isinstance(other, dict):
        return NotImplemented
    out = Metrics(one)
    out.update(other)
    return out


def _reduce_table(table: torch.Tensor, code: int) -> dict[str, torch.Tensor]:
    """Metrics of all ranks from the values of each and whose groups these speak of.

    `code` stands for the ranks that reduce.
    """
    by_name = dict(zip(_NAMES, table[:, :-1].unbind(1), strict=True))
    codes = table[:, -1]
    across_ranks = codes.amax() > _OWN
    meaningless = ((codes > _UNKNOWN) & (codes != code)).any()
    reduced = {}
    for name, values in by_name.items():
        if name in _COUNTS:
            value = values.sum()
        else:
            # A rank that speaks of nothing has a NaN; so have all if none of them does.
            weights = by_name[_spoken_of(name)]
            if name in (*LARGEST, *LARGEST_OF_ROLLOUT):
                value = values.where(weights > 0, -torch.inf).amax()
                value = value.where(weights.sum() > 0, torch.nan)
            else:
                value = sum_behind(values, weights).sum() / weights.sum()
        if name in GROUP_METRICS:
            # Where the groups are those of all ranks, every rank that has metrics has this value.
            value = values.amax().where(across_ranks, value)
            value = value.masked_fill(meaningless, float("nan"))
        reduced[name] = value
    return reduced


def _spoken_of(name: str) -> str:
    """The count of what a mean, or a largest, is taken over."""
    if name in RolloutMetrics._fields:
        return "active_tokens"
    return "active_groups" if name in GROUP_MEANS else "scored_tokens"


def sum_behind(mean: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The sum that a mean over `count` things was taken of: 0 where it is over nothing, and NaN."""
    return (mean * count).where(count > 0, 0.0)


class Slots(dict[str, int]):
    """Names of metrics, and where in the results of a loss their values are."""

    def __init__(self, slots: dict[str, int]) -> None:
        """Also keeps the names without values."""
        super().__init__(slots)
        self.unread: dict[str, Any] = dict.fromkeys(slots)


class _Unread(Metrics):
    """`Metrics` of a loss that nobody has looked at: to view each value costs more than a launch.

    Whatever reads or changes them makes them ordinary `Metrics` first. Until then each name has
    None: code in C, such as that of json, looks at the size of a dict before it asks for its items.
    """

    _source: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Ordinary ones: for callers that make another dict of the type that they find."""
        return Metrics(*args, **kwargs)

    def _read(self) -> None:
        source = self._source
        if source is not None:  # else another thread is done with it
            slots, results = source
            values = results.unbind(0)
            dict.update(self, {name: values[slot] for name, slot in slots.items()})
            self.__class__ = Metrics  # type: ignore[assignment]
            self.__dict__.pop("_source", None)


def _reading(name: str) -> Any:
    """The method of `Metrics`, after they have been made ordinary."""

    def method(self: Metrics, *args: Any, **kwargs: Any) -> Any:
        for x in (self, *args):
            if isinstance(x, _Unread):
                x._read()
        return getattr(Metrics, name)(self, *args, **kwargs)

    return method


# Everything that a dict does, `__iter__` so that even those written in C ask for `keys`.
for _name in (
    *("__contains__", "__delitem__", "__eq__", "__getitem__", "__ior__", "__iter__", "__len__"),
    *("__ne__", "__or__", "__reduce__", "__reduce_ex__", "__repr__", "__reversed__", "__ror__"),
    *("__setitem__", "__sizeof__", "clear", "copy", "get", "items", "keys", "pop", "popitem"),
    *("reduce", "setdefault", "update", "values"),
):
    setattr(_Unread, _name, _reading(_name))


def as_metrics(
    slots: Slots,
    results: torch.Tensor,
    known: dict[str, torch.Tensor],
    ranks: tuple[int, ...] | None,
) -> Metrics:
    """`Metrics` from what a loss leaves, but for a compiled graph that cannot make them.

    Args:
        slots: their names, and where in `results` they are.
        results: [16], as of `batch.TokenResults`.
        known: further ones.
        ranks: those whose groups they speak of, or None if that is this one alone.
    """
    results = results.detach()
    if torch.compiler.is_compiling():
        values = {name: results[slot] for name, slot in slots.items()}
        values.update(known)
        if not _IS_TRACEABLE:
            return values  # type: ignore[return-value]
        metrics = Metrics(values)
    else:
        metrics = dict.__new__(_Unread)
        dict.update(metrics, slots.unread)
        dict.update(metrics, known)
        metrics._source = (slots, results)
    if ranks is not None:
        metrics.across_ranks, metrics.ranks = True, ranks
    return metrics
