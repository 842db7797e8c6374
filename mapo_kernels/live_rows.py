"""Hidden level: rows that go through the whole head, chunk by chunk.

A chunk has the full vocabulary, so its gradient is closed-form while its logits are there: three
matrix products a chunk (logits, d hidden, d weight).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from mapo_kernels import config, operators
from mapo_kernels.batch import HeadInputs, RowInputs
from mapo_kernels.dtypes import result_dtype
from mapo_kernels.head import Head, chunk_rows_of
from mapo_kernels.kept_rows import keep_only, select_kept, some_rows


class Wanted(NamedTuple):
    """Which gradients are asked for."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False


class LiveRows:
    """The live rows of a batch, in order: what belongs to each, in chunks and blocks of them.

    A block is some chunks whose gradients are kept for one product by the weight. With mixed dtypes
    it has at most 2 H rows, whose narrow gradients take no more than one float32 gradient of the
    weight; elsewhere it is one chunk.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        head: HeadInputs,
        rows: RowInputs,
        chosen: torch.Tensor,
        scored: torch.Tensor | None = None,
    ) -> None:
        """Rows that are not `scored` [N], if that is given, count as hidden states of 0."""
        self.n, self.chosen = chosen.shape[0], chosen
        self.head = Head(head, rows.kept is None)
        self.is_all = True
        self._hidden, self._scored = hidden, scored
        if hidden.is_contiguous():
            self._hidden = hidden.view(-1, hidden.shape[-1])
        self._pads = head.batch_invariant
        self.step = head.chunk_rows or chunk_rows_of(head, self.n, rows.share)
        waits = self.head.mixed and config.HIDDEN.one_product
        most = 2 * head.weight.shape[1] if waits else self.step
        self.block = max(self.step, most // self.step * self.step)
        self._rows = some_rows(rows, chosen, result_dtype(hidden))
        temperature = self._rows.temperature
        # Without a softcap between them, the product's scale and the temperature are one factor.
        if head.softcap is None:
            temperature = temperature / head.logit_scale
        self._rows = self._rows._replace(temperature=temperature)
        self._kept = None
        if rows.kept is not None:
            self._kept = [select_kept(rows.kept, some) for some in chosen.split(self.step)]

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """What a token tensor has for the live rows, [n]."""
        return x.reshape(-1)[self.chosen]

    def spans(self, size: int, first: int = 0, last: int | None = None) -> Iterator[slice]:
        """The live rows from `first` to `last`, so many at a time."""
        last = self.n if last is None else last
        return (slice(i, min(i + size, last)) for i in range(first, last, size))

    def rows(self, span: slice) -> RowInputs:
        """Token ids and temperatures of some live rows."""
        temperature = self._rows.temperature
        if isinstance(temperature, torch.Tensor):
            temperature = temperature[span]
        some = self._rows._replace(token_ids=self._rows.token_ids[span], temperature=temperature)
        return self.head.described(some)

    def hidden(self, span: slice) -> torch.Tensor:
        """Hidden states [n, H] of some live rows; a strided batch is not copied as a whole.

        For batch-invariant products zeros fill the last chunk.
        """
        chosen = self.chosen[span]
        if self._hidden.dim() == 2 and self.n == self._hidden.shape[0] and self._scored is None:
            taken = self._hidden[span]  # all rows are live, in order
        elif self._hidden.dim() == 2:
            taken = self._hidden.index_select(0, chosen)
        else:
            length = self._hidden.shape[1]
            taken = self._hidden[chosen // length, chosen % length]
        if self._scored is not None:
            # A plan knows no token weights: where one is 0 there may be anything, NaN too.
            taken.masked_fill_(~self._scored[chosen][:, None], 0.0)
        missing = -taken.shape[0] % self.step
        if self._pads and missing:
            taken = torch.cat([taken, taken.new_zeros((missing, taken.shape[1]))])
        return taken

    def logits(self, span: slice, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of the rows of a chunk, from their hidden states; -inf where one is not kept."""
        logits = self.head.logits(hidden)
        if self._kept is not None:
            found = self._kept[span.start // self.step]
            keep_only(logits[: span.stop - span.start], found, self._rows.share)
        return logits

    def score(self, columns: int) -> torch.Tensor:
        """Table [columns, n] of `operators.score_rows`."""
        table = self._hidden.new_empty((columns, self.n), dtype=result_dtype(self._hidden))
        for span in self.spans(self.step):
            rows = self.rows(span)
            logits = self.logits(span, self.hidden(span))[: rows.token_ids.shape[0]]
            table[:, span] = operators.score_rows(logits, rows, None, columns)
            del logits
        return table

    def spread(self, x: torch.Tensor, n: int) -> torch.Tensor:
        """Values [..., live rows] in their places among n rows, the others 0."""
        whole = x.new_zeros((*x.shape[:-1], n))
        return whole.index_copy_(-1, self.chosen, x)

    def differentiate(
        self,
        gradient: Callable[[slice, torch.Tensor, RowInputs, torch.Tensor], object],
        wanted: Wanted,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Gradients by the live hidden states [n, H] in `dtype`, by weight and bias.

        `gradient(span, logits, rows, place)` writes the gradient of some live rows' logits to
        `place`, which may be the logits.
        """
        head, weight = self.head, self.head.weight
        d_hidden = d_weight = d_bias = None
        if wanted.hidden:
            d_hidden = self._hidden.new_empty((self.n, weight.shape[1]), dtype=dtype)
        # Without a product by the weight there is nothing to wait for.
        size = self.block if wanted.weight else self.step
        for block in self.spans(size):
            hidden = self.hidden(block)
            kept = None
            if head.mixed:
                kept = hidden.new_empty((hidden.shape[0], weight.shape[0]))
            for span in self.spans(self.step, block.start, block.stop):
                rows, n = self.rows(span), span.stop - span.start
                first = span.start - block.start
                padded = slice(first, min(first + self.step, hidden.shape[0]))
                logits = self.logits(span, hidden[padded])
                place = head.place(logits) if kept is None else kept[padded]
                gradient(span, logits[:n], rows, place[:n])
                if place.shape[0] > n:
                    place[n:].zero_()
                grad = head.before_softcap(place, logits)
                if d_hidden is not None:
                    d_hidden[span] = head.hidden_gradient(grad, dtype)[:n]
                if wanted.bias:
                    sums = grad.sum(0, dtype=result_dtype(weight))
                    d_bias = sums if d_bias is None else d_bias.add_(sums)
                del logits, place
            if wanted.weight:
                grads = grad if kept is None else kept
                d_weight = head.weight_gradient(
                    grads, hidden, d_weight, self.is_all and self.n <= size
                )
                del grads
            del grad, kept
        return d_hidden, d_weight, d_bias
