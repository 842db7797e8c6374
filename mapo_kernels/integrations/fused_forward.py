"""A loss computed inside the forward of a Hugging Face causal LM.

The lm_head is multiplied where DDP, FSDP, accelerate and PEFT expect a parameter to be used: in the
forward that they wrap. Calls without a `LossCall` go to the forward that was there before.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import transformers
from transformers.utils import ModelOutput

from mapo_kernels.losses import mapo_loss_from_hidden, mapo_loss_from_logits
from mapo_kernels.masks import SamplingMask
from mapo_kernels.scoring import token_logprobs, token_logprobs_from_hidden

Weigh = Callable[[torch.Tensor, torch.Tensor], torch.Tensor | None]


class LossCall:
    """One loss to compute at the end of a forward.

    No dataclass: FSDP looks for tensors in those, and would round log-probs to the model's dtype.

    Args:
        token_ids: [B, T], the last T tokens of the input.
        arguments: keywords of `mapo_loss_from_hidden`; token tensors are [B, T].
        weigh: where token weights depend on the current policy: log-probs and entropies [B, T],
            without gradient, to token weights [B, T]. Scoring them costs one more product.
    """

    def __init__(
        self, token_ids: torch.Tensor, arguments: dict[str, Any], weigh: Weigh | None = None
    ) -> None:
        """Keep them."""
        self.token_ids, self.arguments, self.weigh = token_ids, arguments, weigh


@dataclass
class FusedOutput(ModelOutput):
    """What a fused forward returns: a loss with its metrics, or scores.

    Attributes:
        loss: [] differentiable.
        metrics: of the loss, 0-d each.
        log_probs: [B, S - 1], or [B, T] with a sampling mask; without gradient; where there is a
            loss, a placeholder.
        entropy: as `log_probs`, in nats.
        aux_loss: [], of a mixture of experts.
        scored_log_probs: [B, T] of the loss, where that was asked for them; without gradient, and 0
            where a token is not scored.
    """

    loss: torch.Tensor | None = None
    metrics: dict[str, torch.Tensor] | None = None
    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    scored_log_probs: torch.Tensor | None = None


def logit_scale_of(config: Any) -> float:
    """The factor of a model's logits, under the names that model families give it.

    Args:
        config: the text config of a Hugging Face model.

    Returns:
        The factor, 1.0 for most models; Granite and MiniCPM3 divide by `logits_scaling`.
    """
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)


def patch_forward(model: Any, *, level: str, temperature: float, float32_head: bool) -> None:
    """Let `model(..., loss_call=LossCall(...))` return a loss instead of logits.

    At level `hidden`, `model(..., labels=..., fused_lm_head=True)` without gradients (TRL's way to
    ask for log-probs) is answered from hidden states too, so that old log-probs and those inside
    the loss are of one kind. So is, at either level, such a call with `sampling_mask=`: of the last
    T tokens of its B sequences, whose log-probs and entropies [B, T] it returns. Every other call
    goes to the forward that the model has now.

    Args:
        model: a causal LM with `get_output_embeddings`; patched in place, before it is wrapped.
        level: `hidden` or `logits`.
        temperature: what the logits are divided by.
        float32_head: multiply the head in float32, outside autocast (TRL's
            `cast_lm_head_to_fp32`).
    """
    before = model.forward
    head = _Head(model, temperature, float32_head)

    # `generate` checks its arguments against this signature.
    @functools.wraps(type(model).forward)
    def forward(
        self: Any,
        *args: Any,
        loss_call: LossCall | None = None,
        sampling_mask: SamplingMask | None = None,
        **kwargs: Any,
    ) -> Any:
        scores = kwargs.get("fused_lm_head", False) and not torch.is_grad_enabled()
        scores = scores and (level == "hidden" or sampling_mask is not None)
        if loss_call is None and not scores:
            return before(*args, **kwargs)
        labels = kwargs.pop("labels", None)
        kwargs.pop("fused_lm_head", None)
        if level == "logits":
            if loss_call is not None:
                return head.loss_from_logits(before, loss_call, args, kwargs)
            assert sampling_mask is not None  # else `scores` is of level hidden
            return head.scores_from_logits(before, labels, sampling_mask, args, kwargs)
        hidden, aux_loss = head.hidden_states(self, args, kwargs)
        if loss_call is not None:
            return head.loss_from_hidden(self, hidden, loss_call, aux_loss)
        return head.scores(self, hidden, labels, aux_loss, sampling_mask)

    model.forward = MethodType(forward, model)


class _Head:
    """The end of a model's forward: from hidden states or logits to a loss, or to scores."""

    def __init__(self, model: Any, temperature: float, float32: bool) -> None:
        self.config = model.config.get_text_config()
        self.temperature = temperature
        self.float32 = float32
        self.options: dict[str, Any] = {
            "softcap": getattr(self.config, "final_logit_softcapping", None),
            "logit_scale": logit_scale_of(self.config),
            "temperature": temperature,
        }
        # Before transformers 5 a vision-language model's text decoder is not its base model.
        old = int(transformers.__version__.split(".")[0]) < 5
        self._backbone = "model" if old and self.config is not model.config else "base_model"
        known = inspect.signature(type(model).forward).parameters
        self._keeps_some = "logits_to_keep" in known

    def hidden_states(
        self, model: Any, args: Any, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Last hidden states [B, S, H], and the load-balancing loss where it is asked for."""
        if getattr(self.config, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        outputs = getattr(model, self._backbone)(*args, **{**kwargs, "use_cache": False})
        aux_loss: Any = None
        if kwargs.get("output_router_logits"):
            from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

            experts = getattr(self.config, "num_experts", None) or self.config.num_local_experts
            aux_loss = load_balancing_loss_func(
                outputs.router_logits,
                experts,
                self.config.num_experts_per_tok,
                kwargs.get("attention_mask"),
            )
        return outputs.last_hidden_state, aux_loss

    def _matrices(
        self, model: Any, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Hidden states, weight and bias as the head multiplies them; looked up at each call."""
        head = model.get_output_embeddings()
        weight, bias = head.weight, getattr(head, "bias", None)
        if hasattr(weight, "full_tensor"):  # sharded by FSDP2
            weight = weight.full_tensor()
            bias = None if bias is None else bias.full_tensor()
        if self.float32:
            hidden, weight = hidden.float(), weight.float()
            bias = None if bias is None else bias.float()
        return hidden, weight, bias

    def _precision(self, x: torch.Tensor) -> Any:
        return torch.autocast(x.device.type, enabled=False) if self.float32 else nullcontext()

    def loss_from_hidden(
        self, model: Any, hidden: torch.Tensor, call: LossCall, aux_loss: torch.Tensor | None
    ) -> FusedOutput:
        """The loss of the last T tokens, each predicted by the hidden state before it."""
        hidden = hidden[:, -call.token_ids.shape[1] - 1 : -1]
        hidden, weight, bias = self._matrices(model, hidden)
        arguments = call.arguments
        with self._precision(hidden):
            if call.weigh is not None:
                with torch.no_grad():
                    found = token_logprobs_from_hidden(
                        hidden,
                        weight,
                        call.token_ids,
                        bias=bias,
                        mask=arguments["mask"],
                        sampling_mask=arguments.get("sampling_mask"),
                        return_entropy=True,
                        **self.options,
                    )
                arguments = {**arguments, "token_weights": call.weigh(*found)}
            out = mapo_loss_from_hidden(
                hidden, weight, call.token_ids, bias=bias, **arguments, **self.options
            )
        return _output(out, aux_loss, slice(None))

    def loss_from_logits(
        self, forward: Callable[..., Any], call: LossCall, args: Any, kwargs: dict[str, Any]
    ) -> FusedOutput:
        """The same from the logits of the model's own forward."""
        outputs = self._run(forward, call.token_ids.shape[1], args, kwargs)
        logits = outputs.logits
        # All positions go in, those that predict no completion token masked: slicing logits would
        # cost a gradient of the full size.
        before = logits.shape[1] - 1 - call.token_ids.shape[1]
        ids, arguments = _pad(call.token_ids, before), dict(call.arguments)
        for name, x in arguments.items():
            if isinstance(x, torch.Tensor) and x.dim() == 2:
                arguments[name] = _pad(x, before)
        kept = arguments.get("sampling_mask")
        if kept is not None:
            arguments["sampling_mask"] = _pad_mask(kept, ids.shape[0], before)
        if call.weigh is not None:
            given = call.arguments
            weights = call.weigh(*self._scored(logits, call.token_ids, given["mask"], kept))
            arguments["token_weights"] = None if weights is None else _pad(weights, before)
        # A softcap's backward reads its own result, so that must not be overwritten.
        inplace = self.options["softcap"] is None and torch.is_grad_enabled()
        out = mapo_loss_from_logits(
            logits, ids, temperature=self.temperature, inplace=inplace, **arguments
        )
        return _output(out, getattr(outputs, "aux_loss", None), slice(before, -1))

    def _run(
        self, forward: Callable[..., Any], n_tokens: int, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Outputs of the model's own forward, with the logits that predict the last tokens."""
        if self._keeps_some:
            kwargs["logits_to_keep"] = n_tokens + 1
        return forward(*args, **{**kwargs, "use_cache": False})

    @torch.no_grad()
    def _scored(
        self,
        logits: torch.Tensor,
        token_ids: torch.Tensor,
        mask: torch.Tensor,
        sampling_mask: SamplingMask | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies of the last T tokens, [B, T] each."""
        n_tokens = token_ids.shape[1]
        before = logits.shape[1] - 1 - n_tokens
        if sampling_mask is not None:
            sampling_mask = _pad_mask(sampling_mask, token_ids.shape[0], before)
        log_probs, entropy = token_logprobs(
            logits,
            _pad(token_ids, before),
            mask=_pad(mask, before),
            temperature=self.temperature,
            return_entropy=True,
            sampling_mask=sampling_mask,
        )
        tokens = slice(before, before + n_tokens)
        return log_probs[:, tokens], entropy[:, tokens]

    def scores_from_logits(
        self,
        forward: Callable[..., Any],
        labels: torch.Tensor,
        sampling_mask: SamplingMask,
        args: Any,
        kwargs: dict[str, Any],
    ) -> FusedOutput:
        """Log-probs and entropies of the tokens that the mask speaks of, by the model's logits."""
        labels = labels[:, -(sampling_mask.n_tokens // labels.shape[0]) :]
        outputs = self._run(forward, labels.shape[1], args, kwargs)
        found = self._scored(outputs.logits, labels.clamp(min=0), labels != -100, sampling_mask)
        aux_loss = getattr(outputs, "aux_loss", None)
        return FusedOutput(log_probs=found[0], entropy=found[1], aux_loss=aux_loss)

    def scores(
        self,
        model: Any,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        aux_loss: torch.Tensor | None,
        sampling_mask: SamplingMask | None,
    ) -> FusedOutput:
        """Log-probs and entropies of every labelled token but the first position's.

        With a sampling mask, of the last T tokens, of which it speaks.
        """
        n_tokens = labels.shape[1] - 1
        if sampling_mask is not None:
            n_tokens = sampling_mask.n_tokens // labels.shape[0]
        hidden, weight, bias = self._matrices(model, hidden[:, -n_tokens - 1 : -1])
        labels = labels[:, -n_tokens:]
        with torch.no_grad(), self._precision(hidden):
            log_probs, entropy = token_logprobs_from_hidden(
                hidden,
                weight,
                labels.clamp(min=0),
                bias=bias,
                mask=labels != -100,
                sampling_mask=sampling_mask,
                return_entropy=True,
                **self.options,
            )
        return FusedOutput(log_probs=log_probs, entropy=entropy, aux_loss=aux_loss)


def _pad(x: torch.Tensor, before: int) -> torch.Tensor:
    """[B, T] with zeros before it and one after it."""
    return torch.nn.functional.pad(x, (before, 1))


def _pad_mask(mask: SamplingMask, n_rows: int, before: int) -> SamplingMask:
    """The same for a mask of [n_rows, T] tokens: those around them have no columns listed."""
    counts = _pad(mask.counts.view(n_rows, -1), before)
    return SamplingMask.from_counts(mask.token_ids, counts.flatten())


def _output(out: Any, aux_loss: torch.Tensor | None, tokens: slice) -> FusedOutput:
    """What the forward returns; `tokens` are those of the call among those that the loss saw."""
    found = getattr(out, "logprobs", None)
    return FusedOutput(
        loss=out.loss,
        metrics=out.metrics,
        log_probs=out.loss.detach().reshape(1, 1),
        aux_loss=aux_loss,
        scored_log_probs=None if found is None else found[:, tokens],
    )
