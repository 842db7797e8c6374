"""The autograd nodes of losses and of log-probs.

A loss's forward computes its gradient, too, and backward scales that. What the gradient by
log-probs will be is not known before backward, which reads the logits again, or has them multiplied
again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from mapo_kernels import hidden as hidden_level
from mapo_kernels import operators
from mapo_kernels.batch import Batch, HeadInputs, Kept, RowInputs, empty_results, replaced
from mapo_kernels.dtypes import result_dtype
from mapo_kernels.live_rows import Wanted
from mapo_kernels.spec import AdvantageSpec, LossSpec


def _once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """`once_differentiable`, but for its preparations where nobody differentiates a second time."""
    guarded = once_differentiable(backward)

    @wraps(backward)
    def call(ctx: Any, *grads: torch.Tensor | None) -> Any:
        # On only with create_graph=True.
        return guarded(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return call


class MapoLossFunction(torch.autograd.Function):
    """The token loss as an autograd node, for trainers that apply it themselves.

    `MapoLossFunction.apply(logprobs, inputs, spec, advantage_spec)` returns (loss [], results [16]
    in the order of `mapo_kernels.formula.RESULTS`, advantages [B] or empty). Only the loss is
    differentiable, by `logprobs` [B, T] or [total]. `inputs` is a `Batch`; nothing is
    validated: `mapo_loss` does that.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logprobs: torch.Tensor,
        inputs: Batch,
        spec: LossSpec,
        advantage_spec: AdvantageSpec,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss, results and advantages; keeps d loss / d logp of the tokens for backward."""
        out = operators.token_loss(logprobs, inputs, spec, advantage_spec, ctx.needs_input_grad[0])
        ctx.save_for_backward(out.grad, out.results)
        ctx.dtype = logprobs.dtype
        ctx.mark_non_differentiable(out.results, out.advantages)
        ctx.set_materialize_grads(False)
        return out.loss, out.results, out.advantages

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor | None, *_: Any) -> Any:
        """Scale what forward kept by the upstream gradient, on the device."""
        if upstream is None:
            return None, None, None, None
        grad, results = ctx.saved_tensors
        return operators.scale_gradient(grad, upstream, results, ctx.dtype), None, None, None


class MapoLogitsLossFunction(torch.autograd.Function):
    """The loss from logits as an autograd node, for trainers that apply it themselves.

    `MapoLogitsLossFunction.apply(logits, rows, inputs, spec, advantage_spec, inplace, scores)`
    returns (loss [], results [16] in the order of `mapo_kernels.formula.RESULTS`, advantages [B] or
    empty); with `scores` (2 or 3, by default 0) also log-probs, entropies and the sums of p^2 of
    the tokens that contribute, [scores, shape of the token ids].
    Only the loss is differentiable, by `logits` [B, T, V] or [total, V]. `rows` is a `RowInputs`,
    `inputs` a `Batch`; nothing is validated: `mapo_loss_from_logits` does that.

    Forward computes the gradient, backward hands over that very tensor: a second backward through
    the same loss raises RuntimeError, whatever `retain_graph` was. With `inplace` the gradient
    takes the place of the logits, and whoever else saved them for a backward is told so by an
    error.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        rows: RowInputs,
        inputs: Batch,
        spec: LossSpec,
        advantage_spec: AdvantageSpec,
        inplace: bool,
        scores: int = 0,
    ) -> tuple[torch.Tensor, ...]:
        """Loss, results, advantages and scores; keeps d loss / d logits for backward."""
        need_grad = ctx.needs_input_grad[0]
        place = None
        if inplace and need_grad:
            place = empty_results(rows.token_ids, inputs, spec, advantage_spec, False)
            place = place._replace(grad=logits)
        given = (inputs, spec, advantage_spec, need_grad, place)
        table = _room_for(scores, logits, rows)
        out = operators.logits_loss(logits, rows, *given, table)
        if need_grad:
            if out.grad is logits:
                _note_write(logits)
            ctx.save_for_backward(out.grad)
        return _outputs(ctx, out, table)

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor | None, *_: Any) -> Any:
        """Hand over what forward kept, times the upstream gradient where that is not 1."""
        if upstream is None:
            return (None,) * 7
        _once(ctx)
        (grad,) = ctx.saved_tensors
        grad = grad.detach()
        operators.rescale(grad, upstream)
        _note_write(grad)
        return grad, None, None, None, None, None, None


def _room_for(n: int, x: torch.Tensor, rows: RowInputs) -> torch.Tensor | None:
    """Zeros [n, shape of the token ids] in the dtype of results of `x`; None for none."""
    if n == 0:
        return None
    return torch.zeros((n, *rows.token_ids.shape), dtype=result_dtype(x), device=x.device)


def _outputs(ctx: Any, out: Any, scores: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """What a node returns, of which the loss is differentiable."""
    others = (out.results, out.advantages) if scores is None else (*out[1:3], scores)
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)
    return (out.loss, *others)


def _once(ctx: Any) -> None:
    """Raise if this node's backward has run: its gradient belongs to someone else by now."""
    # A compiled graph cannot keep a note, and lets torch say it in its own words.
    if torch.compiler.is_compiling():
        return
    if getattr(ctx, "handed_over", False):
        raise RuntimeError(
            "backward: expected one backward through a loss from logits or hidden states, got a "
            "second. The first handed over the very gradient that forward had computed, which may "
            "have been modified by an inplace operation since, so retain_graph=True cannot keep "
            "it: call the loss again, or add up what depends on it and differentiate that once."
        )
    ctx.handed_over = True


def _note_write(x: torch.Tensor) -> None:
    """Tell autograd that a kernel wrote to `x`, so that a stale use of it is an error."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(x)


class MapoLinearLossFunction(torch.autograd.Function):
    """The loss from hidden states as an autograd node, for trainers that apply it themselves.

    `MapoLinearLossFunction.apply(hidden, weight, bias, head, rows, inputs, spec, advantage_spec,
    scores)` returns what `MapoLogitsLossFunction` does. Only the loss is differentiable, by
    `hidden` [B, T, H] or [total, H], `weight` [V, H] and `bias` [V] (or None), each only if it
    requires grad. `head` is a `HeadInputs` whose weight and bias are ignored; nothing is validated:
    `mapo_loss_from_hidden` does that.

    Forward computes the gradients, backward hands over those very tensors, once: a second backward
    raises RuntimeError, whatever `retain_graph` was.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        head: HeadInputs,
        rows: RowInputs,
        inputs: Batch,
        spec: LossSpec,
        advantage_spec: AdvantageSpec,
        scores: int = 0,
    ) -> tuple[torch.Tensor, ...]:
        """Loss, results, advantages and scores; keeps the gradients that will be asked for."""
        wanted = Wanted(*ctx.needs_input_grad[:3])
        head = head._replace(weight=weight, bias=bias)
        # Products choose their dtypes themselves.
        with torch.autocast(hidden.device.type, enabled=False):
            table = _room_for(scores, hidden, rows)
            given = (inputs, spec, advantage_spec, wanted, table)
            out = hidden_level.linear_loss(hidden, head, rows, *given)
        if any(wanted):
            ctx.save_for_backward(*out[3:])
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return _outputs(ctx, out, table)

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor | None, *_: Any) -> Any:
        """Hand over what forward kept, times the upstream gradient where that is not 1."""
        grads: list[torch.Tensor | None] = [None] * 3
        if upstream is not None:
            _once(ctx)
            for i, kept in enumerate(ctx.saved_tensors):
                if kept is not None:
                    operators.rescale(kept if kept.dim() > 1 else kept[None], upstream)
                    _note_write(kept)
                    grads[i] = kept.to(ctx.dtypes[i])
        return (*grads, None, None, None, None, None, None)


class LogitsScoresFunction(torch.autograd.Function):
    """Log-probs and entropies from logits as an autograd node.

    `LogitsScoresFunction.apply(logits, rows, mask)` returns both, in the shape of the token ids and
    differentiable by `logits` [B, T, V] or [total, V]; nothing is validated: `token_logprobs` does
    that. The logits are kept, and 5 numbers a row; backward reads them once and may run again.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, rows: RowInputs, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies, 0 where masked."""
        table = operators.score_rows(logits, rows, mask, 5)
        _keep(ctx, rows, logits, mask, table)
        return _two_of(table, rows)

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, slope: torch.Tensor | None, entropy_slope: torch.Tensor | None) -> Any:
        """The gradient by the logits; exactly 0 where masked."""
        if slope is None and entropy_slope is None:
            return None, None, None
        (logits, mask, table), rows = _kept(ctx)
        slope, bonus = _slopes(slope, entropy_slope)
        one = table.new_ones(1)
        grad = operators.row_gradient(logits, rows, mask, table, slope, bonus, one)
        return grad, None, None


class LinearScoresFunction(torch.autograd.Function):
    """Log-probs and entropies from hidden states as an autograd node.

    `LinearScoresFunction.apply(hidden, weight, bias, head, rows)` returns both, in the shape of the
    token ids and differentiable by `hidden` [B, T, H] or [total, H], `weight` [V, H] and `bias` [V]
    (or None). `head` is a `HeadInputs` with `live_rows`, whose weight and bias are ignored; nothing
    is validated: `token_logprobs_from_hidden` does that.

    Inputs are kept, and 5 numbers a row. Backward has the logits multiplied again, chunk by chunk,
    and may run again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        head: HeadInputs,
        rows: RowInputs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies, 0 where a row is not live."""
        head = head._replace(weight=weight, bias=bias)
        # Products choose their dtypes themselves.
        with torch.autocast(hidden.device.type, enabled=False):
            table = hidden_level.linear_scores(hidden, head, rows, 5)
        _keep(ctx, rows, hidden, weight, bias, head.live_rows, table)
        # Tensors are kept where autograd can see to them.
        ctx.head = replaced(head, weight=None, bias=None, live_rows=None)
        return _two_of(table, rows)

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, slope: torch.Tensor | None, entropy_slope: torch.Tensor | None) -> Any:
        """The gradients that are asked for; exactly 0 where a row is not live."""
        grads: list[torch.Tensor | None] = [None] * 3
        if slope is not None or entropy_slope is not None:
            (hidden, weight, bias, live_rows, table), rows = _kept(ctx)
            head = ctx.head._replace(weight=weight, bias=bias, live_rows=live_rows)
            wanted = Wanted(*ctx.needs_input_grad[:3])
            with torch.autocast(hidden.device.type, enabled=False):
                found = hidden_level.linear_scores_gradient(
                    hidden, head, rows, table, *_slopes(slope, entropy_slope), wanted
                )
            given = zip(found, (hidden, weight, bias), strict=True)
            grads = [None if grad is None else grad.to(x.dtype) for grad, x in given]
        return (*grads, None, None)


def _keep(ctx: Any, rows: RowInputs, *tensors: torch.Tensor | None) -> None:
    """Save for backward the rows, and some tensors."""
    temperature = rows.temperature
    of_rows = temperature if isinstance(temperature, torch.Tensor) else None
    kept = rows.kept or (None,) * len(Kept._fields)
    ctx.save_for_backward(rows.token_ids, of_rows, *kept, *tensors)
    ctx.rows = replaced(
        rows, token_ids=None, temperature=temperature if of_rows is None else None, kept=None
    )
    ctx.set_materialize_grads(False)


def _kept(ctx: Any) -> tuple[tuple[Any, ...], RowInputs]:
    """What `_keep` saved: the tensors, and the rows."""
    token_ids, temperature, columns, row, bounds, *tensors = ctx.saved_tensors
    kept = None if columns is None else Kept(columns, row, bounds)
    temperature = ctx.rows.temperature if temperature is None else temperature
    rows = replaced(ctx.rows, token_ids=token_ids, temperature=temperature, kept=kept)
    return tuple(tensors), rows


def _two_of(table: torch.Tensor, rows: RowInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies of a table, which is kept: whoever overwrites these leaves it be."""
    shape = rows.token_ids.shape
    return table[0].reshape(shape).clone(), table[1].reshape(shape).clone()


def _slopes(
    slope: torch.Tensor | None, entropy_slope: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `operators.row_gradient` takes, from the gradients by log-probs and entropies."""
    # An entropy bonus of weight b adds -b H to a loss.
    bonus = None if entropy_slope is None else -entropy_slope.contiguous()
    if slope is None:
        assert entropy_slope is not None
        slope = torch.zeros_like(entropy_slope, memory_format=torch.contiguous_format)
    return slope.contiguous(), bonus
