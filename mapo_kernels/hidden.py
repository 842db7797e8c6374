"""Hidden level: hidden states times lm_head to loss, chunk by chunk of live rows.

A chunk has the full vocabulary, so its gradient is closed-form while its logits are there: three
matrix products a chunk (logits, d hidden, d weight), and no row that is not live enters any. Where
a row's gradient waits for its sequence (GSPO), the logits are computed a second time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from mapo_kernels import config, operators
from mapo_kernels.batch import Batch, HeadInputs, HeadResults, RowInputs, VocabShare
from mapo_kernels.distributed import vocabulary
from mapo_kernels.dtypes import result_dtype
from mapo_kernels.formula import LARGEST, RESULTS, SLOTS
from mapo_kernels.layout import Layout, loss_denominator
from mapo_kernels.spec import AdvantageSpec, LossSpec


class Wanted(NamedTuple):
    """Which gradients are asked for."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False


def chunk_rows_of(head: HeadInputs, n_live: int, share: VocabShare | None = None) -> int:
    """Hidden states per chunk where the caller leaves it open.

    At most as many as make 2 GiB (64 MiB on a CPU) of float32 logits, their gradient, hidden states
    and their gradient; on a GPU that is halved while it is more than half of the free memory.
    Chunks are of one size, a multiple of 128, but for the last. Ranks that split a row have the
    same chunks, whatever memory each has left.
    """
    weight = head.weight
    budget = config.HIDDEN.gpu_chunk if weight.is_cuda else config.HIDDEN.cpu_chunk
    if weight.is_cuda and share is None:
        free = torch.cuda.mem_get_info(weight.device)[0]
        free = free + torch.cuda.memory_reserved(weight.device)
        free = free - torch.cuda.memory_allocated(weight.device)
        while budget > free // 2 and budget > 1 << 20:
            budget = budget // 2
    (vocab, width), size = weight.shape, weight.element_size()
    if share is not None:
        vocab = max(share.sizes)
    multiple = config.HIDDEN.multiple
    per_row = vocab * (4 + size) + width * 2 * size
    most = max(multiple, budget // per_row // multiple * multiple)
    n_chunks = max(1, -(-n_live // most))
    return -(-max(n_live, 1) // (n_chunks * multiple)) * multiple


def mixes_dtypes(weight: torch.Tensor) -> bool:
    """Whether a product of inputs like `weight` can come out in float32 at full speed.

    The one place that knows. Elsewhere a narrow weight is widened once per call, and the products
    run in float32.
    """
    narrow = weight.dtype in (torch.bfloat16, torch.float16)
    on_cuda = weight.is_cuda and torch.version.hip is None
    return narrow and on_cuda and hasattr(torch.ops.aten.mm, "dtype")


class _Head:
    """The head's products. Logits come in float32, whatever the inputs; so do sums of gradients."""

    def __init__(self, head: HeadInputs) -> None:
        self.bias, self.softcap, self.scale = head.bias, head.softcap, head.logit_scale
        self._mixed = mixes_dtypes(head.weight)
        self.weight = head.weight if self._mixed else head.weight.to(result_dtype(head.weight))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [n, V] of hidden states [n, H]; without a softcap their scale is still to come."""
        if self._mixed:
            x = torch.mm(hidden, self.weight.t(), out_dtype=torch.float32)
        else:
            x = torch.mm(hidden.to(self.weight.dtype), self.weight.t())
        if self.bias is not None:
            x.add_(self.bias)
        if self.softcap is not None:
            x.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)
        return x

    def place(self, logits: torch.Tensor) -> torch.Tensor:
        """Where the gradient of these logits goes: over them, unless they are needed again."""
        if self.softcap is not None:
            return torch.empty_like(logits)
        return torch.empty_like(logits, dtype=self.weight.dtype) if self._mixed else logits

    def before_softcap(self, grad: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Gradient by the product from that by the logits, which are overwritten."""
        if self.softcap is not None:
            # d c tanh(s x / c) / dx = s (1 - tanh^2)
            logits.div_(self.softcap).square_().neg_().add_(1.0).mul_(self.scale)
            grad = grad.mul_(logits)
        return grad.to(self.weight.dtype)

    def add_products(
        self,
        grad: torch.Tensor,
        hidden: torch.Tensor,
        rows: torch.Tensor,
        out: HeadResults,
    ) -> None:
        """Add what a chunk's gradient [n, V] contributes to those that are asked for."""
        if out.d_hidden is not None:
            if self._mixed and out.d_hidden.dtype == torch.float32:
                d_hidden = torch.mm(grad, self.weight, out_dtype=torch.float32)
            else:
                d_hidden = torch.mm(grad, self.weight).to(out.d_hidden.dtype)
            out.d_hidden.view(-1, d_hidden.shape[1]).index_copy_(0, rows, d_hidden)
        if out.d_weight is not None:
            if self._mixed:
                torch.addmm(
                    out.d_weight, grad.t(), hidden, out_dtype=torch.float32, out=out.d_weight
                )
            else:
                torch.addmm(out.d_weight, grad.t(), hidden.to(grad.dtype), out=out.d_weight)
        if out.d_bias is not None:
            out.d_bias.add_(grad.sum(0, dtype=out.d_bias.dtype))


class _Chunk(NamedTuple):
    """Some live rows of a batch.

    Attributes:
        chosen: their positions [n] in the flattened batch.
        into: where [n] their gradient goes in `HeadResults.d_hidden`, which has live rows alone
            until it is summed over ranks.
        hidden: their hidden states [n, H].
        rows: their token ids and temperatures.
    """

    chosen: torch.Tensor
    into: torch.Tensor
    hidden: torch.Tensor
    rows: RowInputs


class _Chunks:
    """Live rows of a batch, chunk by chunk."""

    def __init__(
        self,
        hidden: torch.Tensor,
        head: HeadInputs,
        rows: RowInputs,
        live_rows: torch.Tensor,
        scored: torch.Tensor | None = None,
    ) -> None:
        """Rows that are not `scored` [N], if that is given, count as hidden states of 0."""
        self._hidden = hidden
        self._scored = scored
        self._live = live_rows
        self._share = rows.share
        self._step = head.chunk_rows or chunk_rows_of(head, live_rows.shape[0], rows.share)
        self._ids = rows.token_ids.reshape(-1)
        temperature = rows.temperature
        if isinstance(temperature, torch.Tensor):
            # A narrow dtype is widened before anything is divided by it.
            temperature = temperature.to(result_dtype(hidden))
            if rows.token_ids.dim() == 2:
                temperature = temperature[:, None].expand(rows.token_ids.shape).reshape(-1)
        # Without a softcap between them, the product's scale and the temperature are one factor.
        self._temperature = (
            temperature if head.softcap is not None else temperature / head.logit_scale
        )

    def __iter__(self) -> Iterator[_Chunk]:
        for i, chosen in enumerate(self._live.split(self._step)):
            if chosen.shape[0]:
                temperature = self._temperature
                if isinstance(temperature, torch.Tensor):
                    temperature = temperature[chosen]
                some = RowInputs(self._ids[chosen], temperature, self._share)
                into = chosen
                if self._share is not None:
                    into = torch.arange(chosen.shape[0], device=chosen.device) + i * self._step
                yield _Chunk(chosen, into, self._take(chosen), some)

    def _take(self, chosen: torch.Tensor) -> torch.Tensor:
        """Hidden states [n, H] of some rows; a strided batch is not copied as a whole."""
        if self._hidden.dim() == 2:
            taken = self._hidden.index_select(0, chosen)
        else:
            length = self._hidden.shape[1]
            taken = self._hidden[chosen // length, chosen % length]
        if self._scored is None:
            return taken
        # A plan knows no token weights: where one is 0 there may be anything, NaN too.
        return taken.masked_fill_(~self._scored[chosen][:, None], 0.0)


def linear_loss(
    hidden: torch.Tensor,
    head: HeadInputs,
    rows: RowInputs,
    inputs: Batch,
    spec: LossSpec,
    advantage_spec: AdvantageSpec,
    wanted: Wanted,
) -> HeadResults:
    """Loss, results, advantages and the gradients of a validated batch, but for the upstream."""
    if inputs.groups is not None:
        inputs, complete = operators.with_advantages(inputs, inputs.groups, advantage_spec)
        return complete(linear_loss(hidden, head, rows, inputs, spec, advantage_spec, wanted))
    layout = Layout(rows.token_ids, inputs)
    advantage = layout.advantage().expand(layout.valid.shape)
    live_rows, scored = head.live_rows, None
    if live_rows is None or inputs.token_weights is not None:
        scored = layout.contributing(spec, advantage, inputs.token_weights).reshape(-1)
    if live_rows is None:
        assert scored is not None
        live_rows, scored = scored.nonzero().squeeze(1), None
    dtype = result_dtype(hidden)
    d_hidden = None
    if wanted.hidden and rows.share is None:
        d_hidden = hidden.new_zeros(hidden.shape)
    elif wanted.hidden:
        d_hidden = hidden.new_empty((live_rows.shape[0], hidden.shape[-1]), dtype=dtype)
    out = HeadResults(
        hidden.new_zeros((), dtype=dtype),
        hidden.new_zeros(SLOTS, dtype=dtype),
        hidden.new_empty(0, dtype=dtype),
        d_hidden,
        head.weight.new_zeros(head.weight.shape, dtype=dtype) if wanted.weight else None,
        head.weight.new_zeros(head.weight.shape[0], dtype=dtype) if wanted.bias else None,
    )
    chunks = _Chunks(hidden, head, rows, live_rows, scored)
    if any(wanted) and spec.importance_level == "token":
        out = _token_level(chunks, _Head(head), inputs, spec, layout, advantage, out)
    else:
        out = _in_two_passes(chunks, _Head(head), inputs, spec, layout, out)
    if out.d_hidden is None or rows.share is None:
        return out
    # Each rank has what its columns contribute: one sum over ranks, then one rounding.
    live_grad = vocabulary.sum_over_ranks(out.d_hidden, rows.share).to(hidden.dtype)
    whole = hidden.new_zeros(hidden.shape)
    whole.view(-1, hidden.shape[-1]).index_copy_(0, live_rows, live_grad)
    return out._replace(d_hidden=whole)


def _token_level(
    chunks: _Chunks,
    head: _Head,
    inputs: Batch,
    spec: LossSpec,
    layout: Layout,
    advantage: torch.Tensor,
    out: HeadResults,
) -> HeadResults:
    """Loss and gradients of a chunk from its logits while they are there."""
    shape = layout.valid.shape
    active = layout.valid.sum().to(out.loss.dtype)
    denominator = loss_denominator(inputs, spec, layout.n_sequences, active)
    weights = inputs.loss_weights
    if spec.how.divisor != "one":
        per_sequence = 1.0 / layout.divisor(spec).to(out.loss.dtype)
        weights = layout.spread(per_sequence).expand(shape)
    tensors = inputs._replace(loss_weights=weights).token_tensors()
    found = []
    chunk_spec = replace(spec, aggregation="token-mean", max_tokens=None)
    for chosen, into, hidden, rows in chunks:
        # Sequences of one token each: all that is known of the real ones is in the weights.
        given = [None if x is None else x.reshape(-1)[chosen][:, None] for x in tensors[:-1]]
        chunk = Batch(*given)._replace(  # type: ignore[arg-type]
            advantages=advantage.reshape(-1)[chosen], normalizer=denominator
        )
        rows = rows._replace(token_ids=rows.token_ids[:, None])
        logits = head.logits(hidden)
        place = head.place(logits)
        result = operators.logits_loss(
            logits[:, None], rows, chunk, chunk_spec, AdvantageSpec(), True, place[:, None]
        )
        found.append(torch.cat([result.loss.reshape(1), result.results]))
        head.add_products(head.before_softcap(place, logits), hidden, into, out)
        del logits, place, result
    table = torch.stack(found) if found else out.results.new_zeros((0, SLOTS + 1))
    results = _combine(table[:, 1:], active, denominator)
    # Without a chunk, too, a denominator that is none has to show.
    loss = table[:, 0].sum().where(denominator == denominator, torch.nan)
    return out._replace(loss=loss, results=results)


def _combine(table: torch.Tensor, active: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """Results of a batch [16] from those of its chunks [chunks, 16]: see `formula.RESULTS`."""
    names = {name: slot for slot, name in enumerate(RESULTS)}
    maxima = [names[name] for name in LARGEST]
    scored = table[:, names["scored_tokens"]]
    has_scored = scored[:, None] > 0
    # What a chunk, or the batch, has no scored token for is NaN.
    results = (table * scored[:, None]).where(has_scored, 0.0).sum(0) / scored.sum()
    if table.shape[0]:
        largest = table.where(has_scored, -torch.inf)[:, maxima].amax(0)
        results[maxima] = largest.where(scored.sum() > 0, torch.nan)
    results[names["gradient_scale"]] = 1.0 / denominator
    results[names["active_tokens"]] = active
    results[names["scored_tokens"]] = scored.sum()
    return results


def _in_two_passes(
    chunks: _Chunks,
    head: _Head,
    inputs: Batch,
    spec: LossSpec,
    layout: Layout,
    out: HeadResults,
) -> HeadResults:
    """All log-probs, the loss of the batch from them, then gradients, where they are wanted."""
    need_grad = any(x is not None for x in out[3:])
    table = _score(chunks, head, layout.valid.numel(), 5 if need_grad else 2)
    logprobs, entropy = table[:2].view(2, *layout.valid.shape).unbind(0)
    inputs = inputs._replace(entropy=entropy)
    found = operators.token_loss(logprobs, inputs, spec, AdvantageSpec(), need_grad)
    out = out._replace(loss=found.loss, results=found.results)
    if not need_grad:
        return out
    slope, bonus = found.grad.reshape(-1), layout.entropy_weights(spec, table)
    for chosen, into, hidden, rows in chunks:
        logits = head.logits(hidden)
        place = head.place(logits)
        operators.row_gradient(
            logits,
            rows,
            None,
            table[:, chosen].contiguous(),
            slope[chosen],
            None if bonus is None else bonus.reshape(-1)[chosen],
            found.results,
            place,
        )
        head.add_products(head.before_softcap(place, logits), hidden, into, out)
        del logits, place
    return out


def _score(chunks: _Chunks, head: _Head, n: int, columns: int) -> torch.Tensor:
    """Table [columns, n] of `operators.score_rows`, 0 at rows that are not live."""
    table = head.weight.new_zeros((columns, n), dtype=result_dtype(head.weight))
    for chosen, _, hidden, rows in chunks:
        logits = head.logits(hidden)
        table.index_copy_(1, chosen, operators.score_rows(logits, rows, None, columns))
        del logits
    return table


def linear_scores(
    hidden: torch.Tensor,
    head: HeadInputs,
    rows: RowInputs,
    mask: torch.Tensor | None,
    columns: int,
) -> torch.Tensor:
    """Table [columns, N] of log-probs and entropies, without gradient; 0 where masked."""
    n = rows.token_ids.numel()
    live_rows = torch.arange(n, device=hidden.device)
    if mask is not None:
        live_rows = live_rows[mask.reshape(-1) != 0]
    return _score(_Chunks(hidden, head, rows, live_rows), _Head(head), n, columns)
