"""The losses, from log-probs, from logits, from hidden states and lm_head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch

from mapo_kernels import checks, checks_head, checks_rows
from mapo_kernels.arguments import LossArguments, takes
from mapo_kernels.autograd import (
    MapoLinearLossFunction,
    MapoLogitsLossFunction,
    MapoLossFunction,
)
from mapo_kernels.batch import HeadInputs
from mapo_kernels.calls import LossOutput, TokenLossOutput, n_scores, resolve
from mapo_kernels.masks import SamplingMask
from mapo_kernels.plan import bounds_of
from mapo_kernels.scoring import checked_head, head_description, split_of
from mapo_kernels.tracing import outside_graphs

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mapo_kernels.arguments import HiddenLossArguments, LogitsLossArguments


@takes(LossArguments)
def mapo_loss(logprobs: torch.Tensor, **arguments: Unpack[LossArguments]) -> LossOutput:
    """Clipped policy loss of a batch from its log-probs, group advantages included.

    One launch computes the loss, every metric and the gradient; backward is one more. Neither waits
    for the host. Token tensors have the shape of `logprobs`: [B, T] padded, or [total] packed.

    Args:
        logprobs: log-probs of the sampled tokens under the current policy, float32, bfloat16,
            float16, or float64 (eager backend). Rows may be strided; they are copied then.
        **arguments: those that all losses share, in `arguments.LossArguments`.

    Returns:
        `LossOutput`. Metrics are means over the scored tokens (`scored_tokens` of `active_tokens`;
        a token whose advantage is 0 is not scored unless KL or `score_all` needs it), NaN if there
        is none:
        `clip_fraction_low`, `clip_fraction_high`, `ratio_mean`, `ratio_max` (their largest),
        `approx_kl` (k3 of new against old), `ref_kl` with a reference. With rollout and old
        log-probs, over all valid tokens: `rollout_ratio_mean`, `rollout_ratio_max` (of old to
        rollout), `rollout_kl` (k3 of rollout against old), `rollout_masked_fraction`. From rewards
        also `success_ratio_mean`, `lambda_mean` (over the `active_groups`, those with a finite
        reward), `zero_advantage_groups`, `nonfinite_rewards` (counts). With `process_group` these
        speak of the groups of all ranks; `metrics.reduce(process_group)` does it for every metric.

    Raises:
        ValueError: a shape, a value, a device or a combination that makes no sense.
        TypeError: an argument of the wrong type.
    """
    dtype = getattr(logprobs, "dtype", torch.float32)
    call = resolve("logprobs", logprobs, dtype, arguments)
    checks.check_no_bonus(call.spec)
    if not torch.is_grad_enabled():
        # Otherwise the node would be told that a gradient is needed, and write one for nobody.
        logprobs = logprobs.detach()
    loss, results, own = MapoLossFunction.apply(
        logprobs, call.batch, call.spec, call.advantage_spec
    )
    return call.output(loss, results, own, has_entropy=False)


@overload
def mapo_loss_from_logits(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    return_logprobs: Literal[False] = False,
    return_sum_pi_squared: Literal[False] = False,
    **arguments: Unpack[LogitsLossArguments],
) -> LossOutput: ...
@overload
def mapo_loss_from_logits(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    return_logprobs: Literal[True],
    return_sum_pi_squared: bool = False,
    **arguments: Unpack[LogitsLossArguments],
) -> TokenLossOutput: ...
@overload
def mapo_loss_from_logits(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    return_logprobs: bool = False,
    return_sum_pi_squared: Literal[True],
    **arguments: Unpack[LogitsLossArguments],
) -> TokenLossOutput: ...
@overload
def mapo_loss_from_logits(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    return_logprobs: bool,
    return_sum_pi_squared: bool = False,
    **arguments: Unpack[LogitsLossArguments],
) -> LossOutput | TokenLossOutput: ...
@takes(LossArguments)
def mapo_loss_from_logits(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    temperature: torch.Tensor | float = 1.0,
    inplace: bool = False,
    vocab_group: torch.distributed.ProcessGroup | None = None,
    sampling_mask: SamplingMask | None = None,
    return_logprobs: bool = False,
    return_sum_pi_squared: bool = False,
    **arguments: Unpack[LossArguments],
) -> LossOutput | TokenLossOutput:
    """The loss of `mapo_loss` from logits: log-probs, entropy, loss and gradient in one launch.

    Each live row of logits is read from memory once and its gradient written once; rows that are
    masked, or whose advantage is 0, are not read. Sequence-level importance takes three launches,
    because a row's gradient then waits for its whole sequence. Old log-probs of `token_logprobs` at
    the same temperature give ratios of exactly 1 as long as the weights are unchanged.

    `normalizer` is the exact way to accumulate over micro-batches: dividing the loss instead costs
    a second pass over the gradient, and one more rounding. The gradient is rounded to the dtype of
    the logits before anything multiplies it: under a GradScaler, whose factor saves float16 from
    underflow, divide the normalizer by the scale rather than multiply the loss by it.
    `spec.entropy_coef` adds an entropy bonus here.

    Args:
        logits: [B, T, V], or [total, V] with `cu_seqlens`: float32, bfloat16, float16, or float64
            (eager backend), row t predicting `token_ids[t]`. Rows may be strided, as in
            `logits[:, :-1]`; autograd then copies the gradient into a tensor of the full size, and
            passing the whole `logits` with a last token that is masked saves that. Columns that are
            not adjacent in memory are copied by Triton's backend, from 64 MiB on with a warning.
        token_ids: [B, T] or [total], integers in [0, V) where live; anything elsewhere.
        **arguments: those that all losses share, in `arguments.LossArguments`.
        temperature: what the logits are divided by: a positive number, or a tensor [B]. Log-probs,
            entropy and gradient are those of softmax(logits / temperature).
        inplace: let the gradient overwrite the logits, so that there is no second [N, V] tensor.
            Nobody may use the logits afterwards; autograd raises an error if it saved them.
        vocab_group: a `torch.distributed` process group over whose ranks each row is split: then
            `logits` are this rank's adjacent columns, [B, T, V / ranks] or any other share, and the
            rest of the arguments is the same on every rank (token ids too, in [0, V)): ranks first
            exchange 232 bytes that say how each was called, for which the host waits. One
            collective gathers 16 bytes a row and rank (with a sampling mask there are two); loss
            and metrics are those of the whole rows, the gradient is that of the columns here.
        sampling_mask: the columns that each token could have been sampled from, [B * T] or [total]
            tokens of them: log-prob, entropy and gradient are those of the distribution over these
            columns, and no other is read. The gradient elsewhere is exactly 0. A token that its
            mask does not keep makes the loss NaN.
        return_logprobs: return a `TokenLossOutput`, with log-probs and entropies of the scored
            tokens (`spec.score_all` for every one). On Triton the rows are then read twice.
        return_sum_pi_squared: the same, and the sum of each token's squared probabilities, which
            reads the rows once more (verl's baseline `optimal_token_baseline` takes it).

    Returns:
        `LossOutput` as of `mapo_loss`; metrics also have `entropy`, the mean over the scored tokens
        in nats. Backward may run once: it hands over the gradient that forward computed.

    Raises:
        ValueError: a shape, a value, a device or a combination that makes no sense; or ranks of
            `vocab_group` that were called differently: all of them are told.
        TypeError: an argument of the wrong type.
    """
    bounds = bounds_of(arguments.get("plan"), arguments.get("cu_seqlens"))
    token_ids = checks_rows.check_rows("logits", logits, token_ids, bounds)
    checks_rows.check_inplace(logits, inplace)
    call = resolve("token_ids", token_ids, logits.dtype, arguments)
    scores = n_scores(return_logprobs, return_sum_pi_squared)
    split = split_of(logits, vocab_group, f"mapo_loss_from_logits{_asked(scores)}")
    if split is not None:
        split = split._replace(wanted=(_needs_grad(logits),))
    rows = call.rows(token_ids, temperature, logits.shape[-1], split, sampling_mask)
    if not torch.is_grad_enabled():
        logits = logits.detach()
    apply = MapoLogitsLossFunction.apply
    if split is not None:
        apply = outside_graphs(apply)
    given = (call.batch, call.spec, call.advantage_spec, inplace)
    return call.output(*apply(logits, rows, *given, *((scores,) if scores else ())))


@overload
def mapo_loss_from_hidden(
    hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    return_logprobs: Literal[False] = False,
    return_sum_pi_squared: Literal[False] = False,
    **arguments: Unpack[HiddenLossArguments],
) -> LossOutput: ...
@overload
def mapo_loss_from_hidden(
    hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    return_logprobs: Literal[True],
    return_sum_pi_squared: bool = False,
    **arguments: Unpack[HiddenLossArguments],
) -> TokenLossOutput: ...
@overload
def mapo_loss_from_hidden(
    hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    return_logprobs: bool = False,
    return_sum_pi_squared: Literal[True],
    **arguments: Unpack[HiddenLossArguments],
) -> TokenLossOutput: ...
@overload
def mapo_loss_from_hidden(
    hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    return_logprobs: bool,
    return_sum_pi_squared: bool = False,
    **arguments: Unpack[HiddenLossArguments],
) -> LossOutput | TokenLossOutput: ...
@outside_graphs
@takes(LossArguments)
def mapo_loss_from_hidden(
    hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    temperature: torch.Tensor | float = 1.0,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_rows: int | None = None,
    batch_invariant: bool = False,
    vocab_group: torch.distributed.ProcessGroup | None = None,
    sampling_mask: SamplingMask | None = None,
    return_logprobs: bool = False,
    return_sum_pi_squared: bool = False,
    **arguments: Unpack[LossArguments],
) -> LossOutput | TokenLossOutput:
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
        **arguments: those that all losses share, in `arguments.LossArguments`.
        temperature: a positive number, or a tensor [B].
        bias: [V], of the head, or None.
        softcap: c of `c tanh(x / c)` (Gemma), or None.
        logit_scale: positive factor of the product (Cohere, Granite).
        chunk_rows: tokens per chunk, or None for as many as make 2 GiB (64 MiB on a CPU) of float32
            logits, hidden states and their gradients. It changes results by float32 rounding alone.
            What memory is free does not enter. On a GPU bfloat16 or float16 gradients of up to 2 H
            rows of logits are kept for one product by the weight, which takes no more than its
            gradient in float32.
        batch_invariant: give every product the same shape, `chunk_rows` rows (1024 by default, or
            fewer of a very large vocabulary), the last of them filled with zeros. Then a token's
            log-prob and the gradient by its hidden state, at a given denominator, are the same bit
            for bit whatever else is in the batch.
        vocab_group: a `torch.distributed` process group over whose ranks the vocabulary is split:
            then `lm_head_weight` and `bias` are this rank's adjacent rows, [V / ranks, H] or any
            other share, and the rest of the arguments is the same on every rank (token ids too, in
            [0, V)): ranks first exchange 232 bytes that say how each was called, for which the host
            waits. A chunk takes one collective of 16 bytes a row and rank; the gradient by `hidden`
            is summed over ranks once, in float32, that by the weight stays here.
        sampling_mask: as in `mapo_loss_from_logits`. Rows of which few columns are kept (see
            `config.KEPT`) take products with these columns alone, and a row of a single one takes
            none; the other rows go through chunks of the whole vocabulary, in two readings. Sorting
            rows out waits for the device, with a plan too.
        return_logprobs: as in `mapo_loss_from_logits`; no product more.
        return_sum_pi_squared: as there; no product more.

    Returns:
        `LossOutput` as of `mapo_loss_from_logits`. Gradients reach `hidden`, `lm_head_weight`
        (summed in float32) and `bias`, each only if it requires grad. Backward may run once.

    Raises:
        ValueError: a shape, a value, a device, a placement or a combination that makes no sense; or
            ranks of `vocab_group` that were called differently: all of them are told.
        TypeError: an argument of the wrong type, such as a quantised weight.
    """
    plan = arguments.get("plan")
    bounds = bounds_of(plan, arguments.get("cu_seqlens"))
    checks_head.check_head_options(softcap, logit_scale, chunk_rows, batch_invariant)
    hidden, weight, bias, token_ids, split = checked_head(
        hidden, lm_head_weight, bias, token_ids, bounds, vocab_group
    )
    call = resolve("token_ids", token_ids, hidden.dtype, arguments)
    scores = n_scores(return_logprobs, return_sum_pi_squared)
    if split is not None:
        split = split._replace(
            function=f"mapo_loss_from_hidden{_asked(scores)}",
            chunk_rows=chunk_rows or 0,
            head=head_description(softcap, logit_scale, bias, batch_invariant),
            wanted=tuple(_needs_grad(x) for x in (hidden, weight, bias)),
        )
    rows = call.rows(token_ids, temperature, weight.shape[0], split, sampling_mask)
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    live_rows = None if plan is None else plan.live_rows
    head = HeadInputs(weight, bias, softcap, logit_scale, chunk_rows, live_rows, batch_invariant)
    return call.output(
        *MapoLinearLossFunction.apply(
            hidden, weight, bias, head, rows, call.batch, call.spec, call.advantage_spec, scores
        )
    )


def _asked(scores: int) -> str:
    """What ranks tell each other about the numbers of tokens that a call is asked for."""
    return f", with {scores} numbers a token" if scores else ""


def _needs_grad(x: torch.Tensor | None) -> bool:
    """Whether the gradient by `x` will be asked for."""
    return torch.is_grad_enabled() and x is not None and x.requires_grad
