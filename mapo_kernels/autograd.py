"""The autograd nodes: forward computes loss and gradient, backward scales the gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from mapo_kernels import hidden as hidden_level
from mapo_kernels import operators
from mapo_kernels.batch import Batch, HeadInputs, RowInputs, empty_results
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

    `MapoLogitsLossFunction.apply(logits, rows, inputs, spec, advantage_spec, inplace)` returns
    (loss [], results [16] in the order of `mapo_kernels.formula.RESULTS`, advantages [B] or empty).
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
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss, results and advantages; keeps d loss / d logits for backward."""
        need_grad = ctx.needs_input_grad[0]
        place = None
        if inplace and need_grad:
            place = empty_results(rows.token_ids, inputs, spec, advantage_spec, False)
            place = place._replace(grad=logits)
        out = operators.logits_loss(logits, rows, inputs, spec, advantage_spec, need_grad, place)
        if need_grad:
            if out.grad is logits:
                _note_write(logits)
            ctx.save_for_backward(out.grad)
        ctx.mark_non_differentiable(out.results, out.advantages)
        ctx.set_materialize_grads(False)
        return out.loss, out.results, out.advantages

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor | None, *_: Any) -> Any:
        """Hand over what forward kept, times the upstream gradient where that is not 1."""
        if upstream is None:
            return (None,) * 6
        _once(ctx)
        (grad,) = ctx.saved_tensors
        grad = grad.detach()
        operators.rescale(grad, upstream)
        _note_write(grad)
        return grad, None, None, None, None, None


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

    `MapoLinearLossFunction.apply(hidden, weight, bias, head, rows, inputs, spec, advantage_spec)`
    returns (loss [], results [16] in the order of `mapo_kernels.formula.RESULTS`, advantages [B] or
    empty). Only the loss is differentiable, by `hidden` [B, T, H] or [total, H], `weight` [V, H]
    and `bias` [V] (or None), each only if it requires grad. `head` is a `HeadInputs` whose weight
    and bias are ignored; nothing is validated: `mapo_loss_from_hidden` does that.

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
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss, results and advantages; keeps the gradients that will be asked for."""
        wanted = Wanted(*ctx.needs_input_grad[:3])
        head = head._replace(weight=weight, bias=bias)
        # Products choose their dtypes themselves.
        with torch.autocast(hidden.device.type, enabled=False):
            out = hidden_level.linear_loss(hidden, head, rows, inputs, spec, advantage_spec, wanted)
        if any(wanted):
            ctx.save_for_backward(*out[3:])
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.mark_non_differentiable(out.results, out.advantages)
        ctx.set_materialize_grads(False)
        return out.loss, out.results, out.advantages

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
        return (*grads, None, None, None, None, None)
