"""The doors of the logits level: see `ops`."""

from __future__ import annotations

import torch

from mapo_kernels import logits as rows_of_logits
from mapo_kernels import logits_eager, rows_merged, vocab_parallel
from mapo_kernels.inputs import RowInputs, TokenInputs, TokenResults, empty_results, replaced
from mapo_kernels.ops import LOSS_SCHEMA, is_eager, pack, token_loss, unpack, with_advantages
from mapo_kernels.spec import AdvantageSpec, LossSpec
from mapo_kernels.tokens_eager import TokenLayout, entropy_weights, scored_tokens


def _temperatures(rows: RowInputs) -> tuple[torch.Tensor | None, float]:
    """The temperature as an operator takes it: a tensor, or a number."""
    if isinstance(rows.temperature, torch.Tensor):
        return rows.temperature, 1.0
    return None, float(rows.temperature)


def _rows(
    token_ids: torch.Tensor, temperatures: torch.Tensor | None, temperature: float
) -> RowInputs:
    return RowInputs(token_ids, temperature if temperatures is None else temperatures)


@torch.library.custom_op(
    "mapo_kernels::score_rows",
    mutates_args=(),
    schema="(Tensor logits, Tensor token_ids, Tensor? temperatures, float temperature, "
    "Tensor? mask, int columns) -> Tensor",
)
def _score_rows(logits, token_ids, temperatures, temperature, mask, columns):  # type: ignore[no-untyped-def]
    rows = _rows(token_ids, temperatures, temperature)
    return rows_of_logits.launch_scores(logits, rows, mask, columns)


@_score_rows.register_fake
def _score_rows_fake(logits, token_ids, temperatures, temperature, mask, columns):  # type: ignore[no-untyped-def]
    return rows_of_logits.empty_scores(logits, columns)


def score_rows(
    logits: torch.Tensor, rows: RowInputs, mask: torch.Tensor | None, columns: int
) -> torch.Tensor:
    """Table [columns, rows]: log-probs, entropies (from 2 on), what a gradient needs (5).

    All of it is 0 where `mask` is, and nothing is read there. Where rows are split over ranks this
    takes one collective, and every rank gets the same table.
    """
    if rows.share is not None:
        local = rows_merged.local_rows(rows)
        eager = is_eager(logits)
        tabulate = logits_eager.eager_shares if eager else rows_of_logits.launch_shares
        sums = tabulate(logits, local, mask, 3 if columns == 1 else 4)
        sums = vocab_parallel.gather(sums, rows.share)
        return rows_merged.merge_shares(sums, rows, mask, columns, powers_of_2=not eager)
    if is_eager(logits):
        return logits_eager.eager_scores(logits, rows, mask, columns)
    if not torch.compiler.is_compiling():
        return rows_of_logits.launch_scores(logits, rows, mask, columns)
    return _score_rows(logits, rows.token_ids, *_temperatures(rows), mask, columns)


@torch.library.custom_op(
    "mapo_kernels::row_gradient",
    mutates_args=(),
    schema="(Tensor logits, Tensor token_ids, Tensor? temperatures, float temperature, "
    "Tensor? mask, Tensor table, Tensor slope, Tensor? bonus, Tensor results) -> Tensor",
)
def _row_gradient(  # type: ignore[no-untyped-def]
    logits, token_ids, temperatures, temperature, mask, table, slope, bonus, results
):
    out = empty_gradient(logits)
    rows = _rows(token_ids, temperatures, temperature)
    rows_of_logits.launch_gradient(logits, out, rows, mask, table, slope, bonus, results)
    return out


@_row_gradient.register_fake
def _row_gradient_fake(logits, *_):  # type: ignore[no-untyped-def]
    return empty_gradient(logits)


def empty_gradient(logits: torch.Tensor) -> torch.Tensor:
    """Uninitialised contiguous gradient of logits."""
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


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
    rows = rows_merged.local_rows(rows)
    given = (rows, mask, table, slope, bonus, results)
    compiling = torch.compiler.is_compiling()
    if compiling and not is_eager(logits):
        # A compiled graph decides by itself which of its buffers it reuses.
        return _row_gradient(logits, rows.token_ids, *_temperatures(rows), *given[1:])
    if out is None or compiling:
        out = empty_gradient(logits)
    write = logits_eager.eager_gradient if is_eager(logits) else rows_of_logits.launch_gradient
    write(logits, out, *given)
    return out


@torch.library.custom_op(
    "mapo_kernels::logits_loss",
    mutates_args=(),
    schema="(Tensor logits, Tensor token_ids, Tensor? temperatures, float temperature, "
    + LOSS_SCHEMA,
)
def _logits_loss(logits, token_ids, temperatures, temperature, *rest):  # type: ignore[no-untyped-def]
    rows = _rows(token_ids, temperatures, temperature)
    inputs, need_grad, spec, advantage_spec = unpack(*rest)
    out = empty_gradient(logits) if need_grad else logits.new_empty(0)
    results = rows_of_logits.launch_logits_loss(
        logits, out if need_grad else None, rows, inputs, spec, advantage_spec
    )
    return tuple(replaced(results, grad=out))


@_logits_loss.register_fake
def _logits_loss_fake(logits, token_ids, temperatures, temperature, *rest):  # type: ignore[no-untyped-def]
    inputs, need_grad, _, _ = unpack(*rest)
    results = empty_results(token_ids, inputs, False)
    return tuple(
        replaced(results, grad=empty_gradient(logits) if need_grad else logits.new_empty(0))
    )


def logits_loss(
    logits: torch.Tensor,
    rows: RowInputs,
    inputs: TokenInputs,
    spec: LossSpec,
    advantage_spec: AdvantageSpec,
    need_grad: bool,
    out: torch.Tensor | None = None,
) -> TokenResults:
    """Loss, results, advantages and the gradient by the logits of a validated batch.

    The gradient goes to `out`, as in `row_gradient`. It comes with the batch's scale and lacks only
    the upstream gradient. One launch where a row's gradient depends on no other row; else
    statistics, loss and gradient are three; so it is where rows are split over ranks.
    """
    if inputs.groups is not None and not _fuses_groups(logits, rows, inputs, spec):
        inputs, complete = with_advantages(inputs, inputs.groups, advantage_spec)
        return complete(logits_loss(logits, rows, inputs, spec, advantage_spec, need_grad, out))
    fused = spec.importance_level == "token" and rows.token_ids.numel() > 0 and rows.share is None
    if is_eager(logits) or not fused:
        return _scored_then_differentiated(
            logits, rows, inputs, spec, advantage_spec, need_grad, out
        )
    if inputs.denominator(spec, 1) is None and inputs.mask is not None:
        if rows.token_ids.numel() > rows_of_logits.COUNT_LIMIT:
            live = TokenLayout(rows.token_ids, inputs).live
            inputs = replaced(inputs, normalizer=live.sum().float())
    if torch.compiler.is_compiling():
        temperatures = _temperatures(rows)
        packed = pack(inputs, need_grad, spec, advantage_spec)
        return TokenResults(*_logits_loss(logits, rows.token_ids, *temperatures, *packed))
    if not need_grad:
        out = None
    elif out is None:
        out = empty_gradient(logits)
    results = rows_of_logits.launch_logits_loss(logits, out, rows, inputs, spec, advantage_spec)
    return results if out is None else replaced(results, grad=out)


def _fuses_groups(
    logits: torch.Tensor, rows: RowInputs, inputs: TokenInputs, spec: LossSpec
) -> bool:
    """Whether the advantages are better computed where the loss is, by each row's program."""
    groups = inputs.groups
    if is_eager(logits) or groups is None or rows.token_ids.numel() == 0:
        return False
    if spec.importance_level == "sequence" or rows.share is not None:
        return False
    n_rows = groups.rewards.shape[0]
    in_reach = groups.group_ids is None or n_rows <= rows_of_logits.MATCH_LIMIT
    # A packed sequence may have no row at all, and then nobody speaks for it.
    return in_reach and inputs.cu_seqlens is None


def _scored_then_differentiated(
    logits: torch.Tensor,
    rows: RowInputs,
    inputs: TokenInputs,
    spec: LossSpec,
    advantage_spec: AdvantageSpec,
    need_grad: bool,
    out: torch.Tensor | None,
) -> TokenResults:
    """The same in three steps: statistics of the rows, the loss of the log-probs, the gradient."""
    layout = TokenLayout(rows.token_ids, inputs)
    given = inputs.advantages
    assert given is not None
    advantage = given if inputs.per_token else layout.spread(given)
    weight = layout.live if inputs.token_weights is None else inputs.token_weights
    scored = scored_tokens(layout, advantage, weight, spec)
    table = score_rows(logits, rows, scored, 5 if need_grad else 2)
    logprobs, entropy = table[:2].view(2, *rows.token_ids.shape).unbind(0)
    inputs = replaced(inputs, entropy=entropy)
    found = token_loss(logprobs, inputs, spec, advantage_spec, need_grad)
    if not need_grad:
        return found
    bonus = entropy_weights(layout, inputs, spec, table)
    grad = row_gradient(logits, rows, scored, table, found.grad, bonus, found.results, out)
    return replaced(found, grad=grad)


@torch.library.custom_op(
    "mapo_kernels::rescale",
    mutates_args=("grad",),
    schema="(Tensor(a!) grad, Tensor upstream) -> ()",
)
def _rescale(grad, upstream):  # type: ignore[no-untyped-def]
    rows_of_logits.launch_rescale(grad, upstream)


def rescale(grad: torch.Tensor, upstream: torch.Tensor) -> None:
    """Multiply the gradient of logits in place by the upstream gradient [], where that is not 1."""
    if not is_eager(grad):
        call = _rescale if torch.compiler.is_compiling() else rows_of_logits.launch_rescale
        call(grad, upstream)
    elif torch.compiler.is_compiling() or upstream.device.type != "cpu" or float(upstream) != 1.0:
        grad.copy_((grad * upstream).where(grad != 0, 0.0))
