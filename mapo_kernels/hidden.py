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
    few: KeptRows | None = None
    if rows.kept is not None:
        if scored is not None:
            live_rows, scored = live_rows[scored[live_rows]], None
        live_rows, few, rows = _split(hidden, head, rows, live_rows)
    live = LiveRows(hidden, head, rows, live_rows, scored)
    # Each rank has what its columns contribute: one sum over ranks, then one rounding.
    dtype = hidden.dtype if rows.share is None else result_dtype(hidden)
    if any(wanted) and spec.importance_level == "token" and few is None:
        found, gradients = _token_level(live, inputs, spec, layout, advantage, wanted, dtype)
    else:
        found, gradients = _in_two_passes(live, few, inputs, spec, layout, wanted, dtype)
    d_hidden, d_weight, d_bias = gradients
    if d_hidden is not None:
        if rows.share is not None:
            d_hidden = vocabulary.sum_over_ranks(d_hidden, rows.share).to(hidden.dtype)
        if few is not None:
            live_rows = torch.cat([live_rows, few.chosen])
        d_hidden = _in_place(d_hidden, live_rows, hidden, few is None)
    if wanted.weight and d_weight is None:
        d_weight = torch.zeros_like(head.weight, memory_format=torch.contiguous_format)
    if wanted.bias and d_bias is None:
        d_bias = head.weight.new_zeros(head.weight.shape[0])
    none = found.loss.new_empty(0)
    return HeadResults(found.loss, found.results, none, d_hidden, d_weight, d_bias)


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


def _in_place(
    d_hidden: torch.Tensor, live: torch.Tensor, hidden: torch.Tensor, in_order: bool
) -> torch.Tensor:
    """The gradient of all hidden states, contiguous, from that of the live ones."""
    if in_order and d_hidden.numel() == hidden.numel():
        return d_hidden.view(hidden.shape)
    whole = hidden.new_zeros(hidden.shape)
    whole.view(-1, hidden.shape[-1]).index_copy_(0, live, d_hidden)
    return whole


_Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def _token_level(
    live: LiveRows,
    inputs: Batch,
    spec: LossSpec,
    layout: Layout,
    advantage: torch.Tensor,
    wanted: Wanted,
    dtype: torch.dtype,
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
    # Of each chunk its results, then its loss; kernels are compiled for rows aligned to 16 bytes.
    table = active.new_zeros((-(-live.n // live.step), 2 * SLOTS))
    nothing = active.new_empty(0)

    def gradient(span: slice, logits: torch.Tensor, rows: RowInputs, place: torch.Tensor) -> None:
        chunk = given.of_rows(span)._replace(advantages=advantages[span], normalizer=denominator)
        found = table[span.start // live.step]
        operators.logits_loss(
            logits[:, None],
            rows._replace(token_ids=rows.token_ids[:, None]),
            chunk,
            chunk_spec,
            AdvantageSpec(),
            True,
            TokenResults(found[SLOTS], found[:SLOTS], nothing, place[:, None]),
        )

    gradients = live.differentiate(gradient, wanted, dtype)
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
    live: LiveRows,
    few: KeptRows | None,
    inputs: Batch,
    spec: LossSpec,
    layout: Layout,
    wanted: Wanted,
    dtype: torch.dtype,
) -> tuple[TokenResults, _Gradients]:
    """All log-probs, the loss of the batch from them, then gradients, where they are wanted."""
    columns, shape = 5 if any(wanted) else 2, layout.valid.shape
    table = live.score(columns)
    scores = live.spread(table[:2], layout.valid.numel())
    if few is not None:
        few_table = few.score(columns)
        scores.index_copy_(1, few.chosen, few_table[:2])
    logprobs, entropy = scores.view(2, *shape).unbind(0)
    inputs = inputs._replace(entropy=entropy)
    found = operators.token_loss(logprobs, inputs, spec, AdvantageSpec(), any(wanted))
    if not any(wanted):
        return found, (None, None, None)
    slopes, bonuses = found.grad, layout.entropy_weights(spec, table)
    slope, bonus = live.take(slopes), None if bonuses is None else live.take(bonuses)
    live.is_all = few is None

    def gradient(span: slice, logits: torch.Tensor, rows: RowInputs, place: torch.Tensor) -> None:
        operators.row_gradient(
            logits,
            rows,
            None,
            table[:, span].contiguous(),
            slope[span],
            None if bonus is None else bonus[span],
            found.results,
            place,
        )

    gradients = live.differentiate(gradient, wanted, dtype)
    if few is not None:
        bonus = None if bonuses is None else few.take(bonuses)
        few.differentiate(few_table, few.take(slopes), bonus, found.results)
        gradients = _with_few(few, gradients, wanted, dtype)
    return found, gradients


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
    hidden: torch.Tensor,
    head: HeadInputs,
    rows: RowInputs,
    mask: torch.Tensor | None,
    columns: int,
) -> torch.Tensor:
    """Table [columns, N] of log-probs and entropies, without gradient; 0 where masked."""
    n = rows.token_ids.numel()
    chosen = torch.arange(n, device=hidden.device)
    if mask is not None:
        chosen = chosen[mask.reshape(-1) != 0]
    few = None
    if rows.kept is not None:
        chosen, few, rows = _split(hidden, head, rows, chosen)
    live = LiveRows(hidden, head, rows, chosen)
    table = live.spread(live.score(columns), n)
    return table if few is None else table.index_copy_(1, few.chosen, few.score(columns))
