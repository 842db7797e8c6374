"""Hidden level: hidden states times lm_head to loss, chunk by chunk of live rows.

No row that is not live enters any product. `live_rows` has those that go through the whole head,
`kept_rows` those that a sampling mask leaves few columns of. Where a row's gradient waits for its
sequence (GSPO), or some rows keep few columns, logits of whole rows are computed a second time.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from mapo_kernels import operators
from mapo_kernels.batch import (
    Batch,
    HeadInputs,
    HeadResults,
    RowInputs,
    TokenResults,
)
from mapo_kernels.distributed import vocabulary
from mapo_kernels.distributed.agreement import all_gather
from mapo_kernels.dtypes import result_dtype
from mapo_kernels.formula import LARGEST, RESULTS, SLOTS
from mapo_kernels.kept_rows import KeptRows, takes_few
from mapo_kernels.layout import Layout, loss_denominator
from mapo_kernels.live_rows import LiveRows, Wanted
from mapo_kernels.spec import AdvantageSpec, LossSpec

_Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def linear_loss(
    hidden: torch.Tensor,
    head: HeadInputs,
    rows: RowInputs,
    inputs: Batch,
    spec: LossSpec,
    advantage_spec: AdvantageSpec,
    wanted: Wanted,
    scores: torch.Tensor | None = None,
) -> HeadResults:
    """Loss, results, advantages and the gradients of a validated batch, but for the upstream.

    `scores` as in `operators.logits_loss`, of zeros.
    """
    if inputs.groups is not None:
        inputs, complete = operators.with_advantages(inputs, inputs.groups, advantage_spec)
        given = (inputs, spec, advantage_spec, wanted, scores)
        return complete(linear_loss(hidden, head, rows, *given))
    layout = Layout(rows.token_ids, inputs)
    advantage = layout.advantage().expand(layout.valid.shape)
    live_rows, scored = head.live_rows, None
    if live_rows is None or inputs.token_weights is not None:
        scored = layout.contributing(spec, advantage, inputs.token_weights).reshape(-1)
    if live_rows is None:
        assert scored is not None
        live_rows, scored = scored.nonzero().squeeze(1), None
    few: KeptRows | None = None
    if rows.kept is not None:
        if scored is not None:
            live_rows, scored = live_rows[scored[live_rows]], None
        live_rows, few, rows = _split(hidden, head, rows, live_rows)
    live = LiveRows(hidden, head, rows, live_rows, scored)
    dtype = _dtype_of_sums(hidden, rows)
    if any(wanted) and spec.importance_level == "token" and few is None:
        args = (inputs, spec, layout, advantage, wanted, dtype, scores)
        found, gradients = _token_level(live, *args)
    else:
        found, gradients = _in_two_passes(live, few, inputs, spec, layout, wanted, dtype, scores)
    if scores is not None and scored is not None:
        # Of a plan's live rows, those whose token weight is 0.
        scores.masked_fill_(~scored.view(scores.shape[1:]), 0.0)
    gradients = _of_the_batch(gradients, live, few, hidden, head, rows, wanted)
    none = found.loss.new_empty(0)
    return HeadResults(found.loss, found.results, none, *gradients)


def _dtype_of_sums(hidden: torch.Tensor, rows: RowInputs) -> torch.dtype:
    """The dtype of the gradient by hidden states before it is summed over ranks."""
    # Each rank has what its columns contribute: one sum over ranks, then one rounding.
    return hidden.dtype if rows.share is None else result_dtype(hidden)


def _of_the_batch(
    gradients: _Gradients,
    live: LiveRows,
    few: KeptRows | None,
    hidden: torch.Tensor,
    head: HeadInputs,
    rows: RowInputs,
    wanted: Wanted,
) -> _Gradients:
    """The gradients by all hidden states, contiguous, and by weight and bias, on this rank."""
    d_hidden, d_weight, d_bias = gradients
    if d_hidden is not None:
        if rows.share is not None:
            d_hidden = vocabulary.sum_over_ranks(d_hidden, rows.share).to(hidden.dtype)
        if few is None and d_hidden.numel() == hidden.numel():
            d_hidden = d_hidden.view(hidden.shape)
        else:
            chosen = live.chosen if few is None else torch.cat([live.chosen, few.chosen])
            whole = hidden.new_zeros(hidden.shape)
            whole.view(-1, hidden.shape[-1]).index_copy_(0, chosen, d_hidden)
            d_hidden = whole
    if wanted.weight and d_weight is None:
        d_weight = torch.zeros_like(head.weight, memory_format=torch.contiguous_format)
    if wanted.bias and d_bias is None:
        d_bias = head.weight.new_zeros(head.weight.shape[0])
    return d_hidden, d_weight, d_bias


def _split(
    hidden: torch.Tensor, head: HeadInputs, rows: RowInputs, live: torch.Tensor
) -> tuple[torch.Tensor, KeptRows | None, RowInputs]:
    """The live rows that go through the whole head, those of few columns, what the first are like.

    Waits for the device.
    """
    assert rows.kept is not None
    is_few = takes_few(rows, head)[live]
    few, live = live[is_few], live[~is_few]
    parts = KeptRows(hidden, head, rows, few) if few.shape[0] else None
    if not bool((rows.kept.counts[live] > 0).any()):
        rows = rows._replace(kept=None)
    return live, parts, rows


def _token_level(
    live: LiveRows,
    inputs: Batch,
    spec: LossSpec,
    layout: Layout,
    advantage: torch.Tensor,
    wanted: Wanted,
    dtype: torch.dtype,
    scores: torch.Tensor | None,
) -> tuple[TokenResults, _Gradients]:
    """Loss and gradients of a chunk from its logits while they are there."""
    wide = result_dtype(live.head.weight)
    active = layout.n_valid().sum().to(wide)
    denominator = loss_denominator(inputs, spec, layout.n_sequences, active)
    weights = inputs.loss_weights
    if spec.how.divisor != "one":
        per_sequence = 1.0 / layout.divisor(spec).to(wide)
        weights = layout.spread(per_sequence).expand(layout.valid.shape)
    tensors = inputs._replace(loss_weights=weights).token_tensors()[:-1]
    # Sequences of one token each: all that is known of the real ones is in the weights.
    taken = [None if x is None else live.take(x)[:, None] for x in tensors]
    given = Batch(*taken)  # type: ignore[arg-type]
    advantages = live.take(advantage)
    chunk_spec = replace(spec, aggregation="token-mean", max_tokens=None)
    no_groups = AdvantageSpec()
    # Of each chunk its results, then its loss; kernels are compiled for rows aligned to 16 bytes.
    table = active.new_zeros((-(-live.n // live.step), 2 * SLOTS))
    nothing = active.new_empty(0)
    of_live = None if scores is None else active.new_empty((scores.shape[0], live.n))

    def gradient(span: slice, logits: torch.Tensor, rows: RowInputs, place: torch.Tensor) -> None:
        chunk = given.of_rows(span)._replace(advantages=advantages[span], normalizer=denominator)
        found = table[span.start // live.step]
        operators.logits_loss(
            logits[:, None],
            rows._replace(token_ids=rows.token_ids[:, None]),
            chunk,
            chunk_spec,
            no_groups,
            True,
            TokenResults(found[SLOTS], found[:SLOTS], nothing, place[:, None]),
            None if of_live is None else of_live[:, span, None],
        )

    gradients = live.differentiate(gradient, wanted, dtype)
    if scores is not None and of_live is not None:
        scores.copy_(live.spread(of_live, layout.valid.numel()).view(scores.shape))
    results = _combine(table[:, :SLOTS], active, denominator)
    # Without a chunk, too, a denominator that is none has to show.
    loss = table[:, SLOTS].sum().where(denominator == denominator, torch.nan)
    if inputs.parts is not None:
        found = all_gather(torch.cat([results, loss[None]]), inputs.parts.group)
        results, loss = _combine(found[:, :-1], active, denominator), found[:, -1].sum()
    return TokenResults(loss, results, nothing, nothing), gradients


def _combine(table: torch.Tensor, active: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """Results of a batch [16] from those of its chunks [chunks, 16]: see `formula.RESULTS`."""
    names = {name: slot for slot, name in enumerate(RESULTS)}
    # A slice: an index made from a list is copied to the device, which waits for it.
    maxima = slice(names[LARGEST[0]], names[LARGEST[-1]] + 1)
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
    live: LiveRows,
    few: KeptRows | None,
    inputs: Batch,
    spec: LossSpec,
    layout: Layout,
    wanted: Wanted,
    dtype: torch.dtype,
    scores: torch.Tensor | None,
) -> tuple[TokenResults, _Gradients]:
    """All log-probs, the loss of the batch from them, then gradients, where they are wanted."""
    columns, shape = 5 if any(wanted) else 2, layout.valid.shape
    if scores is not None and scores.shape[0] > 2:
        columns = 6
    table = live.score(columns)
    n_whole = 2 if scores is None else columns
    whole = live.spread(table[:n_whole], layout.valid.numel())
    if few is not None:
        few_table = few.score(columns)
        whole.index_copy_(1, few.chosen, few_table[:n_whole])
    if scores is not None:
        scores.copy_(operators.taken_scores(whole, scores))
    logprobs, entropy = whole[:2].view(2, *shape).unbind(0)
    inputs = inputs._replace(entropy=entropy)
    found = operators.token_loss(logprobs, inputs, spec, AdvantageSpec(), any(wanted))
    if not any(wanted):
        return found, (None, None, None)
    tables = table, None if few is None else few_table
    weights = found.grad, layout.entropy_weights(spec, table), found.results
    return found, _second_pass(live, few, tables, weights, wanted, dtype)


def _second_pass(
    live: LiveRows,
    few: KeptRows | None,
    tables: tuple[torch.Tensor, torch.Tensor | None],
    weights: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor],
    wanted: Wanted,
    dtype: torch.dtype,
) -> _Gradients:
    """Gradients from logits that are computed again.

    `tables` are those of `operators.score_rows` of the live rows and of the few, `weights` the
    slopes and bonuses of the batch, and the results, as `operators.row_gradient` takes them.
    """
    table, few_table = tables
    slopes, bonuses, results = weights
    slope, bonus = live.take(slopes), None if bonuses is None else live.take(bonuses)
    live.is_all = few is None

    def gradient(span: slice, logits: torch.Tensor, rows: RowInputs, place: torch.Tensor) -> None:
        operators.row_gradient(
            logits,
            rows,
            None,
            table[:5, span].contiguous(),
            slope[span],
            None if bonus is None else bonus[span],
            results,
            place,
        )

    gradients = live.differentiate(gradient, wanted, dtype)
    if few is not None:
        assert few_table is not None
        bonus = None if bonuses is None else few.take(bonuses)
        few.differentiate(few_table[:5], few.take(slopes), bonus, results)
        gradients = _with_few(few, gradients, wanted, dtype)
    return gradients


def _with_few(
    few: KeptRows, gradients: _Gradients, wanted: Wanted, dtype: torch.dtype
) -> _Gradients:
    """The gradients with those of rows that keep few columns, behind or on top of the others'."""
    weight = few.weight
    d_hidden, d_weight, d_bias = gradients
    if d_hidden is not None:
        d_hidden = torch.cat([d_hidden, few.hidden_gradient(dtype)])
    is_new = d_weight is None
    if wanted.weight and d_weight is None:
        # Every column's sum is complete, and rounded once.
        d_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    if wanted.bias and d_bias is None:
        d_bias = weight.new_zeros(weight.shape[0], dtype=result_dtype(weight))
    few.add_weight_gradients(d_weight, d_bias, is_new)
    return d_hidden, d_weight, d_bias


def linear_scores(
    hidden: torch.Tensor, head: HeadInputs, rows: RowInputs, columns: int
) -> torch.Tensor:
    """Table [columns, N] of `operators.score_rows`; 0 but for `head.live_rows`."""
    live, few = _rows_of(hidden, head, rows)
    table = live.spread(live.score(columns), rows.token_ids.numel())
    return table if few is None else table.index_copy_(1, few.chosen, few.score(columns))


def linear_scores_gradient(
    hidden: torch.Tensor,
    head: HeadInputs,
    rows: RowInputs,
    table: torch.Tensor,
    slopes: torch.Tensor,
    bonuses: torch.Tensor | None,
    wanted: Wanted,
) -> _Gradients:
    """Gradients by hidden states, weight and bias, the last two in the dtype of sums.

    `table` [5, N] is that of `linear_scores`, whose `head.live_rows` are the only ones that have
    a gradient; `slopes` and `bonuses` have the shape of the token ids, as `row_gradient` takes
    them, and no scale is to come.
    """
    live, few = _rows_of(hidden, head, rows)
    tables = table[:, live.chosen], None if few is None else table[:, few.chosen]
    weights = slopes, bonuses, table.new_ones(1)
    dtype = _dtype_of_sums(hidden, rows)
    gradients = _second_pass(live, few, tables, weights, wanted, dtype)
    return _of_the_batch(gradients, live, few, hidden, head, rows, wanted)


def _rows_of(
    hidden: torch.Tensor, head: HeadInputs, rows: RowInputs
) -> tuple[LiveRows, KeptRows | None]:
    """The head's live rows: those that go through the whole of it, and those of few columns."""
    chosen, few = head.live_rows, None
    assert chosen is not None
    if rows.kept is not None:
        chosen, few, rows = _split(hidden, head, rows, chosen)
    return LiveRows(hidden, head, rows, chosen), few
