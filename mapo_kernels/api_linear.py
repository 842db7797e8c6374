"""The public functions and the module of the hidden level."""

from __future__ import annotations

from typing import Any

import torch

from mapo_kernels import checks, checks_head, checks_rows, linear
from mapo_kernels.api import (
    DEFAULT_ADVANTAGE_SPEC,
    DEFAULT_SPEC,
    LossOutput,
    gather_inputs,
    name_metrics,
    used_advantages,
)
from mapo_kernels.api_logits import gather_rows
from mapo_kernels.autograd import MapoLinearLossFunction
from mapo_kernels.backend import resolve_backend
from mapo_kernels.inputs import HeadInputs, RowInputs, TokenInputs
from mapo_kernels.keywords import names_checked, require_names
from mapo_kernels.plan import Plan, bounds_of
from mapo_kernels.spec import AdvantageSpec, LossSpec, require_bool
from mapo_kernels.vocab_parallel import Split, local_head


def _as_linear_would(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The inputs in the dtype of autocast, if it is on: differentiably, as `linear` casts them."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


@torch.compiler.disable
@names_checked
def mapo_loss_from_hidden(
    hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    rewards: torch.Tensor | None = None,
    advantages: torch.Tensor | None = None,
    group_size: int | None = None,
    group_ids: torch.Tensor | None = None,
    success: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    old_logprobs: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    rollout_logprobs: torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
    normalizer: torch.Tensor | float | str | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
    spec: LossSpec = DEFAULT_SPEC,
    advantage_spec: AdvantageSpec = DEFAULT_ADVANTAGE_SPEC,
    plan: Plan | None = None,
    temperature: torch.Tensor | float = 1.0,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_rows: int | None = None,
    vocab_group: Any = None,
) -> LossOutput:
    """The loss of `mapo_loss` from hidden states and the lm_head, without the [N, V] logits.

    Logits are `softcap(logit_scale (h W^T + bias)) / temperature`, computed in float32 for a chunk
    of live tokens at a time. A token that is masked, or whose advantage is 0, enters no product.
    Where the gradients of hidden states and weight are asked for there are three products a chunk
    (two with a frozen weight, one without gradients; one more for sequence-level importance).

    With a plan of `make_plan` nothing here waits for the device; without one, finding the live
    tokens does, once, and with a `vocab_group` so does making sure that its ranks were called
    alike. Inside `torch.compile` the call is a graph break.

    Args:
        hidden: [B, T, H], or [total, H] with `cu_seqlens`: float32, bfloat16, float16, or float64
            (eager backend), the decoder's last hidden states, position t predicting `token_ids[t]`.
        lm_head_weight: [V, H], of the same dtype; under autocast both are cast as in `linear`. A
            DTensor with Shard(0) on one mesh dimension has this rank's rows, and that dimension's
            group is the `vocab_group`; with Replicate it is whole.
        token_ids: [B, T] or [total], integers in [0, V) where live; anything elsewhere.
        rewards: this and what follows as in `mapo_loss`; token tensors have the shape of
            `token_ids`.
        advantages: see `mapo_loss`.
        group_size: see `mapo_loss`.
        group_ids: see `mapo_loss`.
        success: see `mapo_loss`.
        mask: see `mapo_loss`.
        cu_seqlens: see `mapo_loss`.
        old_logprobs: see `mapo_loss`.
        ref_logprobs: see `mapo_loss`.
        rollout_logprobs: see `mapo_loss`.
        token_weights: see `mapo_loss`.
        normalizer: see `mapo_loss`.
        process_group: see `mapo_loss`.
        spec: which loss; `entropy_coef` adds its entropy bonus here.
        advantage_spec: how rewards become advantages.
        plan: of `make_plan`, in place of what it has.
        temperature: a positive number, or a tensor [B].
        bias: [V], of the head, or None.
        softcap: c of `c tanh(x / c)` (Gemma), or None.
        logit_scale: positive factor of the product (Cohere, Granite).
        chunk_rows: tokens per chunk, or None for as many as make 2 GiB (64 MiB on a CPU) of float32
            logits, hidden states and their gradients, halved while that is more than half of a
            GPU's free memory.
            It changes results by float32 rounding alone.
        vocab_group: a `torch.distributed` process group over whose ranks the vocabulary is split:
            then `lm_head_weight` and `bias` are this rank's adjacent rows, [V / ranks, H] or any
            other share, and the rest of the arguments is the same on every rank (token ids too, in
            [0, V)): ranks first exchange 216 bytes that say how each was called, for which the host
            waits. A chunk takes one collective of 16 bytes a row and rank; the gradient by `hidden`
            is summed over ranks once, in float32, that by the weight stays here.

    Returns:
        `LossOutput` as of `mapo_loss_from_logits`. Gradients reach `hidden`, `lm_head_weight`
        (summed in float32) and `bias`, each only if it requires grad. Backward may run once.

    Raises:
        ValueError: a shape, a value, a device, a placement or a combination that makes no sense; or
            ranks of `vocab_group` that were called differently: all of them are told.
        TypeError: an argument of the wrong type, such as a quantised weight.
    """
    bounds = bounds_of(plan, cu_seqlens)
    checks_head.check_head_options(softcap, logit_scale, chunk_rows)
    hidden, weight, bias, token_ids, split = _checked_head(
        hidden, lm_head_weight, bias, token_ids, bounds, vocab_group
    )
    inputs, spec, known = gather_inputs(
        "token_ids",
        token_ids,
        plan,
        spec,
        advantage_spec,
        {
            "rewards": rewards,
            "advantages": advantages,
            "group_size": group_size,
            "group_ids": group_ids,
            "success": success,
            "process_group": process_group,
        },
        {"mask": mask, "cu_seqlens": cu_seqlens, "normalizer": normalizer},
        {
            "old_logprobs": old_logprobs,
            "ref_logprobs": ref_logprobs,
            "rollout_logprobs": rollout_logprobs,
            "token_weights": token_weights,
        },
        hidden.dtype,
    )
    if split is not None:
        split = split._replace(
            function="mapo_loss_from_hidden",
            chunk_rows=chunk_rows or 0,
            head=_description(softcap, logit_scale, bias),
            spec=spec,
            advantage_spec=advantage_spec,
            wanted=tuple(_needs_grad(x) for x in (hidden, weight, bias)),
            planned=plan is not None,
        )
    rows = gather_rows(token_ids, temperature, inputs, weight.shape[0], split)
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    live_rows = None if plan is None else plan.live_rows
    head = HeadInputs(weight, bias, softcap, logit_scale, chunk_rows, live_rows)
    loss, results, computed = MapoLinearLossFunction.apply(
        hidden, weight, bias, head, rows, inputs, spec, advantage_spec
    )
    return LossOutput(loss, name_metrics(results, inputs, known), used_advantages(computed, inputs))


def _checked_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    token_ids: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    vocab_group: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, Split | None]:
    """Hidden states, what of weight and bias is here, token ids, how rows are split over ranks."""
    token_ids = checks_rows.check_rows("hidden", hidden, token_ids, cu_seqlens)
    weight, bias, group, vocab = local_head(weight, bias, vocab_group)
    checks_head.check_weight(hidden, weight, bias)
    hidden, weight, bias = _as_linear_would(hidden, weight, bias)
    if weight.dtype != hidden.dtype:
        raise TypeError(
            f"lm_head_weight: expected the dtype of hidden, {hidden.dtype} (or autocast), got "
            f"{weight.dtype}"
        )
    split = None
    if group is not None:
        dtype = hidden.dtype
        backend = resolve_backend(hidden.device.type, dtype == torch.float64)
        split = Split(group, weight.shape[0], "", dtype, backend, weight.shape[1], vocab)
    return hidden, weight, bias, token_ids, split


def _description(softcap: float | None, logit_scale: float, bias: object) -> tuple[object, ...]:
    """What ranks have to have the same of the head's options; equal numbers have one form."""
    return None if softcap is None else float(softcap), float(logit_scale), bias is not None


def _needs_grad(x: torch.Tensor | None) -> bool:
    """Whether the gradient by `x` will be asked for."""
    return torch.is_grad_enabled() and x is not None and x.requires_grad


@torch.compiler.disable
@names_checked
def token_logprobs_from_hidden(
    hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    temperature: torch.Tensor | float = 1.0,
    mask: torch.Tensor | None = None,
    return_entropy: bool = False,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_rows: int | None = None,
    vocab_group: Any = None,
) -> Any:
    """Log-probs of sampled tokens from hidden states, for old and reference policies: no gradient.

    One matrix product over the tokens that are not masked.

    Args:
        hidden: [B, T, H] or [total, H], as in `mapo_loss_from_hidden`.
        lm_head_weight: [V, H], or a DTensor, as there.
        token_ids: [B, T] or [total], integers in [0, V) where live.
        temperature: a positive number, or a tensor with one value per leading index: [B] or
            [total].
        mask: nonzero where a token counts, shape of `token_ids`; finding them waits for the device.
        return_entropy: also return the entropy of each token's distribution, in nats.
        bias: [V], or None.
        softcap: as in `mapo_loss_from_hidden`.
        logit_scale: as there.
        chunk_rows: as there. Log-probs equal those inside the loss bit for bit where the products
            do, which depends on how a matrix library treats the number of rows.
        vocab_group: as there.

    Returns:
        Log-probs in the shape of `token_ids`, float32 (float64 for float64 inputs), 0 where masked;
        with `return_entropy` a pair of them and the entropies.

    Raises:
        ValueError: a shape, a value or a device that makes no sense.
        TypeError: an argument of the wrong type.
    """
    checks_head.check_head_options(softcap, logit_scale, chunk_rows)
    hidden, weight, bias, token_ids, split = _checked_head(
        hidden, lm_head_weight, bias, token_ids, None, vocab_group
    )
    per = "one per token" if token_ids.dim() == 1 else "one per sequence"
    checks_rows.check_temperature(temperature, token_ids.shape[0], token_ids.device, per)
    require_bool("return_entropy", return_entropy)
    if mask is not None:
        checks.check_mask(mask, token_ids, "token_ids")
    share = None
    if split is not None:
        split = split._replace(
            function=f"token_logprobs_from_hidden{', with entropies' if return_entropy else ''}",
            chunk_rows=chunk_rows or 0,
            head=_description(softcap, logit_scale, bias),
        )
        share = split.agree(token_ids, TokenInputs(mask=mask), temperature)
    checks_rows.check_token_ids(token_ids, mask, weight.shape[0] if share is None else share.vocab)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        head = HeadInputs(weight, bias, softcap, logit_scale, chunk_rows)
        rows = RowInputs(token_ids, temperature, share)
        table = linear.linear_scores(hidden, head, rows, mask, 2 if return_entropy else 1)
        logprobs, *entropy = table.view(table.shape[0], *token_ids.shape).unbind(0)
    return (logprobs, *entropy) if return_entropy else logprobs


class MapoLinearLoss(torch.nn.Module):
    """`mapo_loss_from_hidden` as a module that owns the lm_head.

    FSDP2 gathers a sharded weight only inside the forward of a module that owns it: call
    `fully_shard` on this one. Its mixed precision takes `cast_forward_inputs=False`, because
    log-probs in bfloat16 are off by as much as a ratio is clipped at. The head stays the model's
    own (tied embeddings too): nothing is copied.

    Args:
        lm_head: a `torch.nn.Linear` with weight [V, H], with or without bias [V].
        spec: which loss, and how it is aggregated.
        advantage_spec: how rewards become advantages.
        **options: of `mapo_loss_from_hidden`: softcap, logit_scale, chunk_rows, temperature,
            vocab_group.

    Raises:
        TypeError: an unknown option; or `lm_head` is no plain linear layer. One with an adapter of
            its own has a weight that is not `lm_head.weight`; merge it, or leave lm_head out of the
            adapted modules.
    """

    def __init__(
        self,
        lm_head: torch.nn.Linear,
        spec: LossSpec = DEFAULT_SPEC,
        advantage_spec: AdvantageSpec = DEFAULT_ADVANTAGE_SPEC,
        **options: Any,
    ) -> None:
        """Keep the head, the specs and the options."""
        super().__init__()
        require_names(type(self).__name__, options, mapo_loss_from_hidden)
        if not isinstance(lm_head, torch.nn.Linear) or hasattr(lm_head, "base_layer"):
            raise TypeError(
                f"lm_head: expected a torch.nn.Linear without adapters, got "
                f"{type(lm_head).__module__}.{type(lm_head).__name__}"
            )
        self.lm_head = lm_head
        self.spec = spec
        self.advantage_spec = advantage_spec
        self.options = options

    def forward(
        self, hidden: torch.Tensor, token_ids: torch.Tensor, **arguments: Any
    ) -> LossOutput:
        """The loss of hidden states [B, T, H] or [total, H]; see `mapo_loss_from_hidden`."""
        if any(base.__name__ == "FSDPModule" for base in type(self).__mro__):
            checks_head.check_not_rounded(arguments)
        specs = {"spec": self.spec, "advantage_spec": self.advantage_spec}
        return mapo_loss_from_hidden(
            hidden,
            self.lm_head.weight,
            token_ids,
            bias=self.lm_head.bias,
            **{**specs, **self.options, **arguments},
        )

    def extra_repr(self) -> str:
        """The specs and the options."""
        return f"{self.spec}, {self.advantage_spec}, {self.options}"
