"""Rows of which only some columns could be sampled, on torch tensors: as few numbers as are kept.

Both backends compute these rows here: there are about ten columns a row, whose sums are float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mapo_kernels import config
from mapo_kernels.batch import RowInputs
from mapo_kernels.dtypes import result_dtype
from mapo_kernels.eager import logits as whole
from mapo_kernels.eager.sums import accumulator_dtype, row_sum


class Entries(NamedTuple):
    """The kept columns of n rows that are here, entry by entry; see `batch.Kept`.

    Attributes:
        columns: [nnz] int64, of this rank's share; 0 where an entry does not count.
        row: [nnz] int64.
        bounds: [n + 1] int64.
        counts: [nnz] bool, whether an entry counts.
        is_target: [nnz] bool, whether it is the row's sampled token.
        alone: [nnz] bool, whether it is the only one of its row, and so certain: nothing is read.
    """

    columns: torch.Tensor
    row: torch.Tensor
    bounds: torch.Tensor
    counts: torch.Tensor
    is_target: torch.Tensor
    alone: torch.Tensor

    @property
    def read(self) -> torch.Tensor:
        """[nnz] bool, entries whose logit matters."""
        return self.counts & ~self.alone


def entries_of(rows: RowInputs, vocab: int, wanted: torch.Tensor | None) -> Entries:
    """The entries in the `vocab` columns that are here; of `wanted` rows [n], if that is given."""
    kept = rows.kept
    assert kept is not None
    columns, ids = kept.columns, rows.token_ids.reshape(-1).long()
    is_target = (columns == ids[kept.row]) & (columns >= 0)
    if rows.share is not None:
        columns = columns - rows.share.offset
        is_target &= (columns >= 0) & (columns < vocab)
    counts = (columns >= 0) & (columns < vocab)
    if wanted is not None:
        counts = counts & wanted.reshape(-1)[kept.row]
    alone = (kept.counts == 1)[kept.row]
    return Entries(columns.where(counts, 0), kept.row, kept.bounds, counts, is_target, alone)


def gather(logits: torch.Tensor, rows: RowInputs, entries: Entries) -> torch.Tensor:
    """The tempered logits [nnz] of the entries, in the dtype of results; 0 where none is read."""
    x = logits[place_of(logits, entries)].to(result_dtype(logits))
    return tempered(x, rows, entries)


def place_of(logits: torch.Tensor, entries: Entries) -> tuple[torch.Tensor, ...]:
    """What indexes logits [..., V] by entries."""
    if logits.dim() == 2:
        return entries.row, entries.columns
    length = logits.shape[1]
    return entries.row // length, entries.row % length, entries.columns


def tempered(x: torch.Tensor, rows: RowInputs, entries: Entries) -> torch.Tensor:
    """Logits [nnz] over the temperature of their rows; 0 where none is read."""
    return (x / _of_entries(rows, entries, x.dtype)).where(entries.read, 0.0)


def _of_entries(rows: RowInputs, entries: Entries, dtype: torch.dtype) -> torch.Tensor | float:
    """The temperature of each entry, or the one of all."""
    temperature = rows.temperature
    if not isinstance(temperature, torch.Tensor):
        return temperature
    of_row = entries.row
    if rows.token_ids.dim() == 2:
        of_row = of_row // rows.token_ids.shape[1]
    return temperature.to(dtype)[of_row]


def scores(x: torch.Tensor, rows: RowInputs, entries: Entries, columns: int) -> torch.Tensor:
    """Table [columns, n] of `operators.score_rows`, in nats, from tempered logits [nnz]."""
    ids = rows.token_ids.reshape(-1)
    found = whole.scores_of(_sums(x, entries, columns > 1), ids >= 0)
    return torch.stack(found[:columns]).to(x.dtype)


def shares(x: torch.Tensor, rows: RowInputs, entries: Entries, columns: int) -> torch.Tensor:
    """Table [columns, n] of what `eager.shares.merge_shares` takes, in nats."""
    ids = rows.token_ids.reshape(-1)
    found = whole.shares_of(_sums(x, entries, columns > 3), ids >= 0)
    return torch.stack(found[:columns]).to(x.dtype)


def _sums(x: torch.Tensor, entries: Entries, with_entropy: bool) -> tuple[torch.Tensor, ...]:
    """What `eager.logits` makes of whole rows: reference, others, gap, weighted, tail, [n] each."""
    wide = x.to(accumulator_dtype(x.device))
    is_other = entries.counts & ~entries.is_target
    others_x = wide.where(is_other, -torch.inf)
    own = _segments(wide.where(entries.is_target & entries.counts, -torch.inf), entries, "max")
    top = torch.maximum(_segments(others_x, entries, "max"), own)
    top = top.clamp(min=torch.finfo(x.dtype).min)
    d = (others_x - top[entries.row]).clamp(min=-1e30)
    powers = d.exp().where(is_other, 0.0)
    others = _segments(powers, entries, "sum")
    gap = own - top
    if not with_entropy:
        return top, others, gap, torch.zeros_like(others), others
    tail = _segments(powers.where(powers != 1.0, 0.0), entries, "sum")
    return top, others, gap, _segments(powers * d, entries, "sum"), tail


def _segments(x: torch.Tensor, entries: Entries, reduce: str) -> torch.Tensor:
    """Sum or maximum of each row's entries, [n], in their order; 0 or -inf for none."""
    initial = 0.0 if reduce == "sum" else -torch.inf
    if not torch.compiler.is_compiling():
        return torch.segment_reduce(x, reduce, offsets=entries.bounds, unsafe=True, initial=initial)
    out = x.new_full((entries.bounds.shape[0] - 1,), initial)
    name = "sum" if reduce == "sum" else "amax"
    return out.scatter_reduce(0, entries.row, x, name, include_self=True)


def gradient(
    x: torch.Tensor,
    rows: RowInputs,
    entries: Entries,
    table: torch.Tensor,
    slope: torch.Tensor,
    bonus: torch.Tensor | None,
    results: torch.Tensor,
) -> torch.Tensor:
    """Gradient [nnz] by logits before the temperature, from what `launch_gradient` takes.

    Exactly 0 where no entry is read.
    """
    row = entries.row
    factor = results[0].to(x.dtype) / _of_entries(rows, entries, x.dtype)
    g = slope.reshape(-1)[row] * factor
    b = None if bonus is None else bonus.reshape(-1)[row] * factor
    first = row.new_zeros((row.shape[0], 1))
    found = whole.gradient_of(x.clone()[:, None], first, entries.is_target, table[:, row], g, b)
    return found.squeeze(1).where(entries.read, 0.0)


def eager_gather_products(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    source: torch.Tensor,
    row: torch.Tensor,
    columns: torch.Tensor,
    bounds: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """What `launch_gather_products` writes."""
    step = max(1, config.EAGER.chunk_logits // hidden.shape[1])
    for first in range(0, row.shape[0], step):
        some = slice(first, first + step)
        states = hidden.index_select(0, source[row[some]]).to(out.dtype)
        out[some] = row_sum(states.mul_(weight.index_select(0, columns[some])))
    return out


def eager_gather_sums(
    matrix: torch.Tensor,
    index: torch.Tensor | None,
    factor: torch.Tensor | None,
    bounds: torch.Tensor,
    place: torch.Tensor | None,
    add: bool,
    out: torch.Tensor,
) -> torch.Tensor:
    """What `launch_gather_sums` writes."""
    if index is None:
        index = torch.arange(matrix.shape[0], device=matrix.device)
    wide = result_dtype(matrix)
    if matrix.dtype != wide:
        # Of a narrow matrix only the rows that are needed are made wide.
        used, index = index.unique(return_inverse=True)
        matrix = matrix.index_select(0, used).to(wide)
    sums = torch.nn.functional.embedding_bag(
        index, matrix, bounds, mode="sum", per_sample_weights=factor, include_last_offset=True
    ).to(out.dtype)
    if place is None:
        return out.add_(sums) if add else out.copy_(sums)
    return out.index_add_(0, place, sums) if add else out.index_copy_(0, place, sums)
