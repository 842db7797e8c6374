"""Hidden level: rows of which few columns are kept take products with these columns alone.

Three products of a kept column and a hidden state: its logit, and the gradients of both. A row with
a single column is certain, and takes none. Nothing is as large as rows times vocabulary, and no
number is added in an order that depends on timing.
"""

from __future__ import annotations

import torch

from mapo_kernels import config, operators
from mapo_kernels.batch import HeadInputs, Kept, RowInputs, VocabShare
from mapo_kernels.dtypes import result_dtype
from mapo_kernels.eager import kept
from mapo_kernels.eager.sums import accumulator_dtype


def takes_few(rows: RowInputs, head: HeadInputs) -> torch.Tensor:
    """Which rows [N] keep so few columns that products with these alone are cheaper, bool."""
    assert rows.kept is not None
    vocab = head.weight.shape[0] if rows.share is None else rows.share.vocab
    share = config.KEPT.gpu_share if head.weight.is_cuda else config.KEPT.cpu_share
    counts = rows.kept.counts
    return (counts > 0) & (counts <= max(1, vocab // share))


def some_rows(rows: RowInputs, chosen: torch.Tensor, dtype: torch.dtype) -> RowInputs:
    """Token ids and temperatures of some rows [n] of a batch, one each; nothing of what is kept.

    Temperatures are in `dtype`: a narrow one is widened before anything is divided by it.
    """
    ids, temperature = rows.token_ids, rows.temperature
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.to(dtype)
        if ids.dim() == 2:
            temperature = temperature[:, None].expand(ids.shape)
        temperature = temperature.reshape(-1)[chosen]
    return rows._replace(token_ids=ids.reshape(-1)[chosen], temperature=temperature, kept=None)


def select_kept(found: Kept, chosen: torch.Tensor) -> Kept:
    """The entries of some rows [n], which are counted anew. Waits for the device."""
    counts = found.counts[chosen]
    bounds = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    starts = found.bounds[:-1][chosen] - bounds[:-1]
    row = torch.repeat_interleave(counts)
    entries = starts[row] + torch.arange(row.shape[0], device=row.device)
    return Kept(found.columns[entries], row, bounds)


def keep_only(logits: torch.Tensor, found: Kept, share: VocabShare | None) -> None:
    """Make -inf, in place, of the logits [n, V] at columns that their rows do not keep."""
    columns = found.columns if share is None else found.columns - share.offset
    inside = (columns >= 0) & (columns < logits.shape[1])
    row, columns = found.row[inside], columns[inside]
    values = logits[row, columns]
    logits.masked_fill_((found.counts > 0)[:, None], -torch.inf)
    logits[row, columns] = values


class KeptRows:
    """Some rows of a batch, their logits at the columns that they keep, and gradients from these.

    Attributes:
        chosen: [n] int64, positions of the rows in the flattened batch.
        weight: [V, H] of the head, or of this rank's share of it.
    """

    def __init__(
        self, hidden: torch.Tensor, head: HeadInputs, rows: RowInputs, chosen: torch.Tensor
    ) -> None:
        """`rows` are those of the whole batch. Waits for the device."""
        self.chosen = chosen
        self._hidden = hidden.reshape(-1, hidden.shape[-1])
        self._head = head
        weight = head.weight
        self.weight = weight if weight.stride(1) == 1 else weight.contiguous()
        assert rows.kept is not None
        self._rows = some_rows(rows, chosen, result_dtype(hidden))
        self._rows = self._rows._replace(kept=select_kept(rows.kept, chosen))
        self._entries = kept.entries_of(self._rows, weight.shape[0], None)
        # The entries that products are taken of: all but those of rows with a single one.
        self._read = self._entries.read.nonzero().squeeze(1)
        self._row = self._entries.row[self._read]
        self._columns = self._entries.columns[self._read]
        every = torch.arange(chosen.shape[0] + 1, device=chosen.device)
        self._bounds = torch.searchsorted(self._row, every)
        self._logits: torch.Tensor | None = None

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """What a token tensor has for these rows, [n]."""
        return x.reshape(-1)[self.chosen]

    def score(self, columns: int) -> torch.Tensor:
        """Table [columns, n] of `operators.score_rows`."""
        return operators.score_kept(self._read_logits(), self._rows, self._entries, columns)

    def _read_logits(self) -> torch.Tensor:
        """Tempered logits [nnz] of the entries; the first call multiplies."""
        if self._logits is not None:
            return self._logits
        head, wide = self._head, result_dtype(self._hidden)
        x = self._hidden.new_empty(self._read.shape, dtype=wide)
        x = operators.gather_products(
            self._hidden, self.weight, self.chosen, self._row, self._columns, self._bounds, out=x
        )
        if head.bias is not None:
            x = x + head.bias[self._columns].to(wide)
        x = x * head.logit_scale
        self._slope = torch.full_like(x, head.logit_scale)
        if head.softcap is not None:
            bent = torch.tanh(x / head.softcap)
            x = bent * head.softcap
            # d c tanh(s x / c) / dx = s (1 - tanh^2)
            self._slope = head.logit_scale * (1.0 - bent.square())
        logits = x.new_zeros(self._entries.row.shape).index_copy_(0, self._read, x)
        self._logits = kept.tempered(logits, self._rows, self._entries)
        return self._logits

    def differentiate(
        self,
        table: torch.Tensor,
        slope: torch.Tensor,
        bonus: torch.Tensor | None,
        results: torch.Tensor,
    ) -> None:
        """Find the gradient by the products, from what `operators.row_gradient` takes."""
        x = self._read_logits()
        grad = kept.gradient(x, self._rows, self._entries, table, slope, bonus, results)
        self._grad = grad[self._read] * self._slope

    def hidden_gradient(self, dtype: torch.dtype) -> torch.Tensor:
        """The gradient [n, H] by the rows' hidden states."""
        n, width = self.chosen.shape[0], self._hidden.shape[1]
        out = self._hidden.new_empty((n, width), dtype=dtype)
        return operators.gather_sums(
            self.weight, self._columns, self._grad, self._bounds, None, False, out=out
        )

    def add_weight_gradients(
        self, d_weight: torch.Tensor | None, d_bias: torch.Tensor | None, is_new: bool
    ) -> None:
        """Add these rows' part to the gradients [V, H] and [V], 0 as yet where `is_new`."""
        vocab, piece = self.weight.shape[0], config.KEPT.piece
        # Columns that few rows keep come after those that many do; each in the order of its rows.
        often = torch.bincount(self._columns, minlength=vocab)
        key = self._columns + vocab * (often[self._columns] <= piece)
        key, order = key.sort(stable=True)
        found, counts = key.unique_consecutive(return_counts=True)
        columns = found % vocab
        bounds = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        n_pieces = (counts + piece - 1) // piece
        n_long = (found < vocab).sum()
        grad = self._grad[order]
        if d_bias is not None:
            wide = grad.to(accumulator_dtype(grad.device))
            sums = torch.segment_reduce(wide, "sum", offsets=bounds, unsafe=True, initial=0.0)
            d_bias.index_add_(0, columns, sums.to(d_bias.dtype))
        if d_weight is None or not columns.shape[0]:
            return
        n_parts = (n_pieces * (found < vocab)).sum()
        long, n_parts, first = torch.stack([n_long, n_parts, bounds[n_long]]).tolist()
        source, add = self.chosen[self._row[order]], not is_new
        few = (source[first:], grad[first:], bounds[long:] - first, columns[long:])
        operators.gather_sums(self._hidden, *few, add, out=d_weight)
        if long:
            # A column in pieces of some entries each, and then the sum of its pieces.
            of = torch.repeat_interleave(n_pieces[:long], output_size=n_parts)
            firsts = torch.nn.functional.pad(n_pieces[:long].cumsum(0), (1, 0))
            places = torch.arange(n_parts, device=of.device)
            begins = bounds[of] + (places - firsts[of]) * piece
            begins = torch.cat([begins, bounds[long : long + 1]])
            parts = grad.new_empty((n_parts, self._hidden.shape[1]))
            many = (source[:first], grad[:first], begins, None)
            operators.gather_sums(self._hidden, *many, False, out=parts)
            operators.gather_sums(parts, None, None, firsts, columns[:long], add, out=d_weight)
