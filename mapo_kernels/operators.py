"""The computations that losses are made of, each on the backend that its tensors take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mapo_kernels import backend, config
from mapo_kernels.batch import Batch, GroupInputs, RowInputs, TokenResults, empty_results, replaced
from mapo_kernels.dispatch import dispatched
from mapo_kernels.distributed import sequences
from mapo_kernels.distributed.agreement import all_gather
from mapo_kernels.eager import kept, shares
from mapo_kernels.eager import logits as eager_logits
from mapo_kernels.eager.advantages import eager_advantages
from mapo_kernels.eager.compiled import fused
from mapo_kernels.eager.logprobs import eager_token_loss
from mapo_kernels.formula import GROUP_METRICS, RESULTS
from mapo_kernels.groups import Signal, decide_rewards
from mapo_kernels.groups import group_summary as eager_summary
from mapo_kernels.launch import advantages as launch_groups
from mapo_kernels.launch import kept as launch_kept
from mapo_kernels.launch import logits as launch_logits
from mapo_kernels.launch import logprobs as launch_logprobs
from mapo_kernels.layout import Layout
from mapo_kernels.objectives import Apart
from mapo_kernels.spec import AdvantageSpec, LossSpec


def _eager_summary(table: torch.Tensor, out: None = None) -> torch.Tensor:
    return eager_summary(table)


@fused
def _eager_scale(
    grad: torch.Tensor,
    upstream: torch.Tensor,
    results: torch.Tensor,
    dtype: torch.dtype,
    out: None = None,
) -> torch.Tensor:
    """`grad` times upstream gradient [] and `gradient_scale`, in `dtype`, all on the device."""
    return (grad * (upstream * results[0])).to(dtype)


def _empty_scaled(
    grad: torch.Tensor, upstream: torch.Tensor, results: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    return torch.empty_like(grad, dtype=dtype)


def _eager_rescale(upstream: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    if torch.compiler.is_compiling() or upstream.device.type != "cpu" or float(upstream) != 1.0:
        out.copy_((out * upstream).where(out != 0, 0.0))
    return out


_advantages = dispatched(
    launch_groups.launch_advantages, eager_advantages, launch_groups.empty_advantages
)
_summary = dispatched(launch_groups.launch_summary, _eager_summary, launch_groups.empty_summary)
_token_loss = dispatched(launch_logprobs.launch_token_loss, eager_token_loss, empty_results)
_logits_loss = dispatched(launch_logits.launch_logits_loss, None, launch_logits.empty_loss)
_scores = dispatched(
    launch_logits.launch_scores, eager_logits.eager_scores, launch_logits.empty_scores
)
_shares = dispatched(
    launch_logits.launch_shares, eager_logits.eager_shares, launch_logits.empty_scores
)
_gradient = dispatched(
    launch_logits.launch_gradient, eager_logits.eager_gradient, launch_logits.empty_gradient
)
_rescale = dispatched(launch_logits.launch_rescale, _eager_rescale, None)
gather_products = dispatched(launch_kept.launch_gather_products, kept.eager_gather_products, None)
gather_sums = dispatched(launch_kept.launch_gather_sums, kept.eager_gather_sums, None)
scale_gradient = dispatched(launch_logprobs.launch_scale, _eager_scale, _empty_scaled)


def group_advantages(
    groups: GroupInputs, spec: AdvantageSpec, want_stats: bool
) -> tuple[torch.Tensor, Any]:
    """Advantages [B] and, if wanted, the statistics table of `eager_advantages`."""
    if not spec.normalizes_first:
        return _advantages(decide_rewards(groups, spec), spec, want_stats)
    apart = Apart(groups, spec)
    alone = spec.of_one_reward()
    return apart.joined(*_advantages(decide_rewards(apart.blocks, alone), alone, want_stats))


def group_summary(table: torch.Tensor) -> torch.Tensor:
    """The metrics about groups, and whether none had a success: see `groups.group_summary`."""
    if table.shape[1] > config.ADVANTAGES.summary_limit:
        return eager_summary(table)
    return _summary(table)


def group_signals(groups: GroupInputs, spec: AdvantageSpec) -> tuple[Signal, Signal | None]:
    """What rewards come to; and, where that is float64, what they come to in float32."""
    given, table = group_advantages(groups, spec, want_stats=True)
    summary = group_summary(table)
    metrics = dict(zip(GROUP_METRICS, summary.unbind(0), strict=False))
    narrow = group_signals(replaced(groups, wide=False), spec)[0] if groups.wide else None
    return Signal(given, metrics, summary[len(metrics) :]), narrow


def with_advantages(
    inputs: Batch, groups: GroupInputs, spec: AdvantageSpec
) -> tuple[Batch, Callable[[Any], Any]]:
    """Inputs with the advantages of their groups, and what puts the groups' metrics in results."""
    given, table = group_advantages(groups, spec, want_stats=True)

    def complete(out: Any) -> Any:
        first = len(RESULTS) - len(GROUP_METRICS)
        metrics = group_summary(table)[:-1].to(out.results.dtype)
        results = torch.cat([out.results[:first], metrics, out.results[len(RESULTS) :]])
        return replaced(out, results=results, advantages=given)

    return replaced(inputs, groups=None, advantages=given, per_token=False), complete


def token_loss(
    logprobs: torch.Tensor,
    inputs: Batch,
    spec: LossSpec,
    advantage_spec: AdvantageSpec,
    need_grad: bool,
) -> TokenResults:
    """Loss, results, advantages and unscaled gradient of a validated batch."""
    if inputs.parts is not None:
        logprobs, inputs, own = sequences.gather(logprobs, inputs)
        found = token_loss(logprobs, inputs, spec, advantage_spec, need_grad)
        return replaced(found, grad=own(found.grad)) if need_grad else found
    groups = inputs.groups
    if groups is not None and groups.group_ids is not None and not backend.is_eager(logprobs):
        if groups.rewards.shape[0] > config.ADVANTAGES.match_limit:
            # Too many rows to look for each one's group in the loss kernel: advantages come first.
            inputs, complete = with_advantages(inputs, groups, advantage_spec)
            return complete(_token_loss(logprobs, inputs, spec, advantage_spec, need_grad))
    return _token_loss(logprobs, inputs, spec, advantage_spec, need_grad)


def score_rows(
    logits: torch.Tensor, rows: RowInputs, mask: torch.Tensor | None, columns: int
) -> torch.Tensor:
    """Table [columns, rows]: log-probs, entropies (from 2 on), what gradients need (5), p^2 (6).

    All of it is 0 where `mask` is, and nothing is read there. Where rows are split over ranks this
    takes one collective, and every rank gets the same table.
    """
    if rows.kept is not None:
        is_whole = (rows.kept.counts == 0).view(rows.token_ids.shape)
        of_whole = is_whole if mask is None else is_whole & (mask != 0)
        table = score_rows(logits, replaced(rows, kept=None), of_whole, columns)
        return table.where(is_whole.view(-1), _kept_scores(logits, rows, mask, columns))
    if columns == 6:
        table = score_rows(logits, rows, mask, 5)
        half = replaced(rows, temperature=rows.temperature / 2)
        again = score_rows(logits, half, mask, 5)
        return _with_squares(table, again, mask, powers_of_2=not backend.is_eager(logits))
    if rows.share is None:
        return _scores(logits, rows, mask, columns)
    local = shares.local_rows(rows)
    sums = _shares(logits, local, mask, 3 if columns == 1 else 4)
    sums = all_gather(sums, rows.share.group)
    in_powers_of_2 = not backend.is_eager(logits)
    return shares.merge_shares(sums, rows, mask, columns, powers_of_2=in_powers_of_2)


def taken_scores(table: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Of a table [2, 5 or 6, rows] what `scores` of `logits_loss` gets, in the shape of `like`."""
    found = table[:2] if like.shape[0] == 2 else torch.cat([table[:2], table[5:]])
    return found.view(like.shape)


def _with_squares(
    table: torch.Tensor, at_half: torch.Tensor, mask: torch.Tensor | None, powers_of_2: bool
) -> torch.Tensor:
    """Table [6, rows] from those [5, rows] at the temperature and at half of it.

    p is e^(x - reference) / total, and at half the temperature the total is that of e^(2 x).
    """
    apart = at_half[2] - 2 * table[2]
    factor = torch.exp2(apart) if powers_of_2 else torch.exp(apart)
    squares = at_half[3] * factor / table[3].square()
    if mask is not None:
        squares = squares.where(mask.reshape(-1) != 0, 0.0)
    return torch.cat([table, squares[None]])


def _kept_scores(
    logits: torch.Tensor, rows: RowInputs, mask: torch.Tensor | None, columns: int
) -> torch.Tensor:
    """The table of `score_rows` for rows that keep some columns; anything for the others."""
    entries = kept.entries_of(rows, logits.shape[-1], mask)
    table = score_kept(kept.gather(logits, rows, entries), rows, entries, columns)
    return table if mask is None else table.where(mask.reshape(-1) != 0, 0.0)


def score_kept(
    x: torch.Tensor, rows: RowInputs, entries: kept.Entries, columns: int
) -> torch.Tensor:
    """Table [columns, n] of `score_rows` from the tempered logits [nnz] of what rows keep."""
    if columns == 6:
        table, at_half = (score_kept(y, rows, entries, 5) for y in (x, 2 * x))
        return _with_squares(table, at_half, None, powers_of_2=False)
    if rows.share is None:
        return kept.scores(x, rows, entries, columns)
    sums = all_gather(kept.shares(x, rows, entries, 3 if columns == 1 else 4), rows.share.group)
    return shares.merge_shares(sums, rows, None, columns, powers_of_2=False)


def row_gradient(
    logits: torch.Tensor,
    rows: RowInputs,
    mask: torch.Tensor | None,
    table: torch.Tensor,
    slope: torch.Tensor,
    bonus: torch.Tensor | None,
    results: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gradient by the logits, from the table of `score_rows` and what `launch_gradient` takes.

    It goes to `out`: the logits themselves, another tensor of their shape, or by default a new one.
    Where rows are split over ranks, each rank has the gradient by its columns.
    """
    if torch.compiler.is_compiling():
        # A compiled graph decides by itself which of its buffers it reuses.
        out = None
    if rows.kept is None:
        rows = shares.local_rows(rows)
        return _gradient(logits, rows, mask, table, slope, bonus, results, out=out)
    entries = kept.entries_of(rows, logits.shape[-1], mask)
    x = kept.gather(logits, rows, entries)
    x = kept.gradient(x, rows, entries, table, slope, bonus, results)
    of_whole = (rows.kept.counts == 0).view(rows.token_ids.shape)
    if mask is not None:
        of_whole = of_whole & (mask != 0)
    rows = replaced(rows, kept=None)
    out = row_gradient(logits, rows, of_whole, table, slope, bonus, results, out)
    # Adding to a 0: an entry that does not count adds another one.
    return out.index_put_(kept.place_of(out, entries), x.to(out.dtype), accumulate=True)


def logits_loss(
    logits: torch.Tensor,
    rows: RowInputs,
    inputs: Batch,
    spec: LossSpec,
    advantage_spec: AdvantageSpec,
    need_grad: bool,
    out: TokenResults | None = None,
    scores: torch.Tensor | None = None,
) -> TokenResults:
    """Loss, results, advantages and the gradient by the logits of a validated batch.

    `scores` [2 or 3, shape of the token ids] gets log-probs, entropies and the sums of p^2 of the
    tokens that contribute. The rest goes to `out` where it is given; its gradient may be the
    logits. The gradient comes with the batch's scale and lacks only the upstream gradient. One
    launch, or three of many rows, where a row's gradient depends on no other row; else statistics,
    loss and gradient are three; so it is where rows are split over ranks, or keep some of their
    columns, or where scores are asked for.
    """
    if torch.compiler.is_compiling():
        # A compiled graph decides by itself which of its buffers it reuses.
        out = None
    fuses = scores is None and _fuses_groups(logits, rows, inputs, spec)
    if inputs.groups is not None and not fuses:
        inputs, complete = with_advantages(inputs, inputs.groups, advantage_spec)
        given = (inputs, spec, advantage_spec, need_grad, out, scores)
        return complete(logits_loss(logits, rows, *given))
    fused = scores is None and spec.importance_level == "token" and rows.token_ids.numel() > 0
    fused = fused and rows.share is None and rows.kept is None and inputs.parts is None
    if fused and not backend.is_eager(logits):
        return _logits_loss(logits, rows, inputs, spec, advantage_spec, need_grad, out=out)
    given = (inputs, spec, advantage_spec, need_grad, out, scores)
    return _scored_then_differentiated(logits, rows, *given)


def _fuses_groups(logits: torch.Tensor, rows: RowInputs, inputs: Batch, spec: LossSpec) -> bool:
    """Whether the advantages are better computed where the loss is, by each row's program."""
    groups = inputs.groups
    if backend.is_eager(logits) or groups is None or rows.token_ids.numel() == 0:
        return False
    if spec.importance_level == "sequence" or rows.share is not None or rows.kept is not None:
        return False
    if inputs.parts is not None:
        return False
    n_rows = groups.rewards.shape[0]
    in_reach = groups.group_ids is None or n_rows <= config.LOGITS.match_limit
    # A packed sequence may have no row at all, which then cannot speak for it.
    is_prepared = rows.token_ids.numel() > config.LOGITS.fused_rows
    return in_reach and (inputs.cu_seqlens is None or is_prepared)


def _scored_then_differentiated(
    logits: torch.Tensor,
    rows: RowInputs,
    inputs: Batch,
    spec: LossSpec,
    advantage_spec: AdvantageSpec,
    need_grad: bool,
    out: TokenResults | None,
    scores: torch.Tensor | None,
) -> TokenResults:
    """The same in three steps: statistics of the rows, the loss of the log-probs, the gradient."""
    layout = Layout(rows.token_ids, inputs)
    scored = layout.contributing(spec, layout.advantage(), inputs.token_weights)
    columns = 5 if need_grad else 2
    if scores is not None and scores.shape[0] > 2:
        columns = 6
    table = score_rows(logits, rows, scored, columns)
    if scores is not None:
        scores.copy_(taken_scores(table, scores))
    table = table[:5]
    logprobs, entropy = table[:2].view(2, *rows.token_ids.shape).unbind(0)
    inputs = replaced(inputs, entropy=entropy)
    found = token_loss(logprobs, inputs, spec, advantage_spec, need_grad)
    if out is not None:
        out.loss.copy_(found.loss)
        out.results.copy_(found.results)
    if not need_grad:
        return found
    bonus = layout.entropy_weights(spec, table)
    place = None if out is None else out.grad
    grad = row_gradient(logits, rows, scored, table, found.grad, bonus, found.results, place)
    return replaced(found, grad=grad)


def rescale(grad: torch.Tensor, upstream: torch.Tensor) -> None:
    """Multiply the gradient of logits in place by the upstream gradient [], where that is not 1."""
    _rescale(upstream, out=grad)
