"""One door per computation: eager twin, Triton launch, or the launch as a torch operator.

Inside a compiled graph a launch is an operator, so that `torch.compile` sees it whole. Outside it
the launcher is called directly: an operator costs tens of microseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mapo_kernels import advantages, logits_eager, tokens
from mapo_kernels import logits as rows_of_logits
from mapo_kernels.backend import resolve_backend
from mapo_kernels.inputs import (
    GROUP_METRICS,
    RESULTS,
    GroupInputs,
    RowInputs,
    TokenInputs,
    TokenResults,
    empty_results,
)
from mapo_kernels.spec import AdvantageSpec, LossSpec
from mapo_kernels.tokens_eager import (
    TokenLayout,
    eager_token_loss,
    length_weight,
    scored_tokens,
)


def _is_eager(x: torch.Tensor) -> bool:
    return resolve_backend(x.device.type, x.dtype == torch.float64) == "eager"


def _pack(
    inputs: TokenInputs, need_grad: bool, spec: LossSpec, advantage_spec: AdvantageSpec
) -> tuple[Any, ...]:
    """The arguments of a loss as an operator's schema has them."""
    normalizer, groups = inputs.normalizer, inputs.groups
    is_tensor = isinstance(normalizer, torch.Tensor)
    return (
        *inputs.token_tensors(),
        inputs.advantages,
        inputs.cu_seqlens,
        normalizer if is_tensor else None,
        0.0 if is_tensor or normalizer is None else float(normalizer),
        None if groups is None else groups.rewards,
        0 if groups is None else groups.group_size,
        None if groups is None else groups.group_ids,
        None if groups is None else groups.success,
        need_grad,
        *spec.pack(),
        *advantage_spec.pack(),
    )


def _unpack(*packed: Any) -> tuple[TokenInputs, bool, LossSpec, AdvantageSpec]:
    """What `_pack` packed."""
    tensors, (given, cu_seqlens, normalizer, number) = packed[:6], packed[6:10]
    rewards, group_size, group_ids, success, need_grad = packed[10:15]
    groups = None if rewards is None else GroupInputs(rewards, group_size, group_ids, success)
    if normalizer is None and number > 0:
        normalizer = number
    inputs = TokenInputs(*tensors, given, groups, cu_seqlens, normalizer)
    specs = packed[15:]
    return inputs, need_grad, LossSpec.unpack(*specs[:2]), AdvantageSpec.unpack(*specs[2:])


_LOSS_SCHEMA = (
    "Tensor? old_logprobs, Tensor? ref_logprobs, Tensor? rollout_logprobs, "
    "Tensor? token_weights, Tensor? entropy, Tensor? mask, Tensor? advantages, "
    "Tensor? cu_seqlens, Tensor? normalizer, float normalizer_value, Tensor? rewards, "
    "int group_size, Tensor? group_ids, Tensor? success, bool need_grad, "
    "float[] spec_numbers, str spec_kinds, float[] advantage_numbers, str advantage_kinds) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.custom_op(
    "mapo_kernels::token_loss", mutates_args=(), schema=f"(Tensor logprobs, {_LOSS_SCHEMA}"
)
def _token_loss(logprobs, *packed):  # type: ignore[no-untyped-def]
    inputs, need_grad, *specs = _unpack(*packed)
    return tuple(tokens.launch_token_loss(logprobs, inputs, *specs, need_grad))


@_token_loss.register_fake
def _token_loss_fake(logprobs, *packed):  # type: ignore[no-untyped-def]
    inputs, need_grad, *_ = _unpack(*packed)
    return tuple(empty_results(logprobs, inputs, need_grad))


def token_loss(
    logprobs: torch.Tensor,
    inputs: TokenInputs,
    spec: LossSpec,
    advantage_spec: AdvantageSpec,
    need_grad: bool,
) -> TokenResults:
    """Loss, results, advantages and unscaled gradient of a validated batch."""
    if _is_eager(logprobs):
        return eager_token_loss(logprobs, inputs, spec, advantage_spec, need_grad)
    groups = inputs.groups
    if groups is not None and groups.group_ids is not None:
        if groups.rewards.shape[0] > advantages.MATCH_LIMIT:
            # Too many rows to look for each one's group in the loss kernel: advantages come first.
            inputs, complete = _with_advantages(inputs, groups, advantage_spec)
            return complete(token_loss(logprobs, inputs, spec, advantage_spec, need_grad))
    if not torch.compiler.is_compiling():
        return tokens.launch_token_loss(logprobs, inputs, spec, advantage_spec, need_grad)
    return TokenResults(*_token_loss(logprobs, *_pack(inputs, need_grad, spec, advantage_spec)))


def _with_advantages(
    inputs: TokenInputs, groups: GroupInputs, spec: AdvantageSpec
) -> tuple[TokenInputs, Callable[[TokenResults], TokenResults]]:
    """Inputs with the advantages of their groups, and what puts the groups' metrics in results."""
    given, table = group_advantages(groups, spec, want_stats=True)

    def complete(out: TokenResults) -> TokenResults:
        first = len(RESULTS) - len(GROUP_METRICS)
        metrics = torch.stack(advantages.group_metrics(table)).to(out.results.dtype)
        results = torch.cat([out.results[:first], metrics, out.results[len(RESULTS) :]])
        return out._replace(results=results, advantages=given)

    return inputs._replace(groups=None, advantages=given), complete


@torch.library.custom_op(
    "mapo_kernels::scale_gradient",
    mutates_args=(),
    schema="(Tensor grad, Tensor upstream, Tensor results, ScalarType dtype) -> Tensor",
)
def _scale_gradient(grad, upstream, results, dtype):  # type: ignore[no-untyped-def]
    return tokens.launch_scale(grad, upstream, results, dtype)


@_scale_gradient.register_fake
def _scale_gradient_fake(grad, upstream, results, dtype):  # type: ignore[no-untyped-def]
    return torch.empty_like(grad, dtype=dtype)


def scale_gradient(
    grad: torch.Tensor, upstream: torch.Tensor, results: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """`grad` times upstream gradient [] and `gradient_scale`, in `dtype`, all on the device."""
    if _is_eager(grad):
        return (grad * (upstream * results[0])).to(dtype)
    call = _scale_gradient if torch.compiler.is_compiling() else tokens.launch_scale
    return call(grad, upstream, results, dtype)


@torch.library.custom_op(
    "mapo_kernels::group_advantages",
    mutates_args=(),
    schema="(Tensor rewards, int group_size, Tensor? group_ids, Tensor? success, bool want_stats, "
    "float[] numbers, str kinds) -> (Tensor, Tensor)",
)
def _group_advantages(rewards, group_size, group_ids, success, want_stats, *spec):  # type: ignore[no-untyped-def]
    groups = GroupInputs(rewards, group_size, group_ids, success)
    return advantages.launch_advantages(groups, AdvantageSpec.unpack(*spec), want_stats)


@_group_advantages.register_fake
def _group_advantages_fake(rewards, group_size, group_ids, success, want_stats, *spec):  # type: ignore[no-untyped-def]
    return advantages.empty_advantages(
        GroupInputs(rewards, group_size, group_ids, success), want_stats
    )


def group_advantages(
    groups: GroupInputs, spec: AdvantageSpec, want_stats: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages [B] and, if wanted, the statistics table of `eager_advantages`."""
    if _is_eager(groups.rewards):
        return advantages.eager_advantages(groups, spec)
    if not torch.compiler.is_compiling():
        return advantages.launch_advantages(groups, spec, want_stats)
    return _group_advantages(
        groups.rewards,
        groups.group_size,
        groups.group_ids,
        groups.success,
        want_stats,
        *spec.pack(),
    )


def _temperatures(rows: RowInputs) -> tuple[torch.Tensor | None, float]:
    """The temperature as an operator takes it: a tensor, or a number."""
    temperature = rows.temperature
    is_tensor = isinstance(temperature, torch.Tensor)
    return (temperature, 1.0) if is_tensor else (None, float(temperature))


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

    All of it is 0 where `mask` is, and nothing is read there.
    """
    if _is_eager(logits):
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
    rows_of_logits.launch_gradient(
        logits, out, rows, mask, table, slope, bonus, results
    )
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
    inplace: bool,
) -> torch.Tensor:
    """d loss / d logits, like `logits`, from `score_rows` and what `launch_gradient` says."""
    given = (rows, mask, table, slope, bonus, results)
    compiling = torch.compiler.is_compiling()
    if compiling and not _is_eager(logits):
        # A compiled graph decides by itself which of its buffers it reuses.
        return _row_gradient(
            logits, rows.token_ids, *_temperatures(rows), *given[1:]
        )
    inplace = inplace and not compiling
    if _is_eager(logits):
        out = logits if inplace else torch.zeros_like(logits)
        logits_eager.eager_gradient(logits, out, *given)
        return out
    out = logits if inplace else empty_gradient(logits)
    rows_of_logits.launch_gradient(logits, out, *given)
    return out


@torch.library.custom_op(
    "mapo_kernels::logits_loss",
    mutates_args=(),
    schema="(Tensor logits, Tensor token_ids, Tensor? temperatures, float temperature, "
    + _LOSS_SCHEMA,
)
def _logits_loss(logits, token_ids, temperatures, temperature, *rest):  # type: ignore[no-untyped-def]
    rows = _rows(token_ids, temperatures, temperature)
    inputs, need_grad, spec, advantage_spec = _unpack(*rest)
    out = empty_gradient(logits) if need_grad else logits.new_empty(0)
    results = rows_of_logits.launch_logits_loss(
        logits, out if need_grad else None, rows, inputs, spec, advantage_spec
    )
    return tuple(results._replace(grad=out))


@_logits_loss.register_fake
def _logits_loss_fake(logits, token_ids, temperatures, temperature, *rest):  # type: ignore[no-untyped-def]
    inputs, need_grad, _, _ = _unpack(*rest)
    results = empty_results(token_ids, inputs, False)
    return tuple(
        results._replace(grad=empty_gradient(logits) if need_grad else logits.new_empty(0))
    )


def logits_loss(
    logits: torch.Tensor,
    rows: RowInputs,
    inputs: TokenInputs,
    spec: LossSpec,
    advantage_spec: AdvantageSpec,
    need_grad: bool,
    inplace: bool,
) -> TokenResults:
    """Loss, results, advantages and the gradient by the logits of a validated batch.

    The gradient comes with the batch's scale and lacks only the upstream gradient. One launch
    where a row's gradient depends on no other row; else statistics, loss and gradient are three.
    """
    if inputs.groups is not None and not _fuses_groups(logits, rows, inputs, spec):
        inputs, complete = _with_advantages(inputs, inputs.groups, advantage_spec)
        return complete(
            logits_loss(logits, rows, inputs, spec, advantage_spec, need_grad, inplace)
        )
    fused = spec.importance_level == "token" and rows.token_ids.numel() > 0
    if _is_eager(logits) or not fused:
        return _scored_then_differentiated(
            logits, rows, inputs, spec, advantage_spec, need_grad, inplace
        )
    if spec.aggregation == "token-mean" and inputs.normalizer is None and inputs.mask is not None:
        if rows.token_ids.numel() > rows_of_logits.COUNT_LIMIT:
            live = TokenLayout(rows.token_ids, inputs).live
            inputs = inputs._replace(normalizer=live.sum().float())
    if torch.compiler.is_compiling():
        temperatures = _temperatures(rows)
        packed = _pack(inputs, need_grad, spec, advantage_spec)
        return TokenResults(*_logits_loss(logits, rows.token_ids, *temperatures, *packed))
    out = None
    if need_grad:
        out = logits if inplace else empty_gradient(logits)
    results = rows_of_logits.launch_logits_loss(
        logits, out, rows, inputs, spec, advantage_spec
    )
    return results if out is None else results._replace(grad=out)


def _fuses_groups(
    logits: torch.Tensor, rows: RowInputs, inputs: TokenInputs, spec: LossSpec
) -> bool:
    """Whether the advantages are better computed where the loss is, by each row's program."""
    groups = inputs.groups
    if _is_eager(logits) or groups is None or rows.token_ids.numel() == 0:
        return False
    if spec.importance_level == "sequence":
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
    inplace: bool,
) -> TokenResults:
    """The same in three steps: statistics of the rows, the loss of the log-probs, the gradient."""
    layout = TokenLayout(rows.token_ids, inputs)
    given = inputs.advantages
    assert given is not None
    advantage = given if given.shape == layout.live.shape else layout.spread(given)
    weight = layout.live if inputs.token_weights is None else inputs.token_weights
    scored = scored_tokens(layout, advantage, weight, spec)
    table = score_rows(logits, rows, scored, 5 if need_grad else 2)
    logprobs, entropy = table[:2].view(2, *rows.token_ids.shape).unbind(0)
    out = token_loss(
        logprobs, inputs._replace(entropy=entropy), spec, advantage_spec, need_grad
    )
    if not need_grad:
        return out
    bonus = None
    if spec.entropy_coef != 0:
        divisor = length_weight(layout, spec, rows.token_ids.shape[-1]).to(table.dtype)
        bonus = layout.spread(spec.entropy_coef / divisor).expand(rows.token_ids.shape).contiguous()
    grad = row_gradient(logits, rows, scored, table, out.grad, bonus, out.results, inplace)
    return out._replace(grad=grad)


@torch.library.custom_op(
    "mapo_kernels::rescale", mutates_args=("grad",), schema="(Tensor(a!) grad, Tensor upstream) -> ()"
)
def _rescale(grad, upstream):  # type: ignore[no-untyped-def]
    rows_of_logits.launch_rescale(grad, upstream)


def rescale(grad: torch.Tensor, upstream: torch.Tensor) -> None:
    """Multiply the gradient of logits in place by the upstream gradient [], where that is not 1."""
    if not _is_eager(grad):
        call = _rescale if torch.compiler.is_compiling() else rows_of_logits.launch_rescale
        call(grad, upstream)
    elif torch.compiler.is_compiling() or upstream.device.type != "cpu" or float(upstream) != 1.0:
        grad.copy_((grad * upstream).where(grad != 0, 0.0))
