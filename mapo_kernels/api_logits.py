"""The public functions of the logits level."""

from __future__ import annotations

from typing import Any

import torch

from mapo_kernels import checks, checks_rows, ops_logits, vocab_parallel
from mapo_kernels.api import (
    DEFAULT_ADVANTAGE_SPEC,
    DEFAULT_SPEC,
    LossOutput,
    gather_inputs,
    name_metrics,
    used_advantages,
)
from mapo_kernels.autograd import MapoLogitsLossFunction
from mapo_kernels.backend import resolve_backend
from mapo_kernels.inputs import RowInputs, TokenInputs
from mapo_kernels.keywords import names_checked
from mapo_kernels.plan import Plan, bounds_of
from mapo_kernels.spec import AdvantageSpec, LossSpec, require_bool
from mapo_kernels.tokens_eager import TokenLayout
from mapo_kernels.vocab_parallel import Split


def gather_rows(
    token_ids: torch.Tensor,
    temperature: torch.Tensor | float,
    inputs: TokenInputs,
    vocab: int,
    split: Split | None = None,
) -> RowInputs:
    """Validated token ids and temperatures, one of these per token where the batch is packed.

    `vocab` is the number of columns here, which are all of them unless rows are split over ranks.
    """
    checks_rows.check_temperature(temperature, inputs.n_sequences(token_ids), token_ids.device)
    share = None if split is None else split.agree(token_ids, inputs, temperature)
    checks_rows.check_token_ids(token_ids, inputs.mask, vocab if share is None else share.vocab)
    if isinstance(temperature, torch.Tensor) and inputs.cu_seqlens is not None:
        temperature = TokenLayout(token_ids, inputs).spread(temperature)
    return RowInputs(token_ids, temperature, share)


@names_checked
def mapo_loss_from_logits(
    logits: torch.Tensor,
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
    inplace: bool = False,
    vocab_group: Any = None,
) -> LossOutput:
    """The loss of `mapo_loss` from logits: log-probs, entropy, loss and gradient in one launch.

    Each live row of logits is read from memory once and its gradient written once; rows that are
    masked, or whose advantage is 0, are not read. Sequence-level importance takes three launches,
    because a row's gradient then waits for its whole sequence.

    Args:
        logits: [B, T, V], or [total, V] with `cu_seqlens`: float32, bfloat16, float16, or float64
            (eager backend), row t predicting `token_ids[t]`. Rows may be strided, as in
            `logits[:, :-1]`; autograd then copies the gradient into a tensor of the full size, and
            passing the whole `logits` with a last token that is masked saves that. Columns that are
            not adjacent in memory are copied by Triton's backend, from 64 MiB on with a warning.
        token_ids: [B, T] or [total], integers in [0, V) where live; anything elsewhere.
        rewards: this and what follows as in `mapo_loss`; token tensors have the shape of
            `token_ids`.
        advantages: see `mapo_loss`.
        group_size: see `mapo_loss`.
        group_ids: see `mapo_loss`.
        success: see `mapo_loss`.
        mask: see `mapo_loss`. The gradient is exactly 0 where it is 0, whatever the logits.
        cu_seqlens: see `mapo_loss`.
        old_logprobs: see `mapo_loss`; of `token_logprobs` at the same temperature, the ratio is
            exactly 1 as long as the weights are unchanged.
        ref_logprobs: see `mapo_loss`.
        rollout_logprobs: see `mapo_loss`.
        token_weights: see `mapo_loss`.
        normalizer: see `mapo_loss`. It also is the exact way to accumulate over micro-batches:
            dividing the loss instead costs a second pass over the gradient, and one more rounding.
        process_group: see `mapo_loss`.
        spec: which loss; `entropy_coef` adds its entropy bonus here.
        advantage_spec: how rewards become advantages.
        plan: of `make_plan`, in place of what it has.
        temperature: what the logits are divided by: a positive number, or a tensor [B]. Log-probs,
            entropy and gradient are those of softmax(logits / temperature).
        inplace: let the gradient overwrite the logits, so that there is no second [N, V] tensor.
            Nobody may use the logits afterwards; autograd raises an error if it saved them.
        vocab_group: a `torch.distributed` process group over whose ranks each row is split: then
            `logits` are this rank's adjacent columns, [B, T, V / ranks] or any other share, and the
            rest of the arguments is the same on every rank (token ids too, in [0, V)): ranks first
            exchange 216 bytes that say how each was called, for which the host waits. One
            collective gathers 16 bytes a row and rank; loss and metrics are those of the whole
            rows, the gradient is that of the columns here.

    Returns:
        `LossOutput` as of `mapo_loss`; metrics also have `entropy`, the mean over the scored tokens
        in nats. Backward may run once: it hands over the gradient that forward computed.

    Raises:
        ValueError: a shape, a value, a device or a combination that makes no sense; or ranks of
            `vocab_group` that were called differently: all of them are told.
        TypeError: an argument of the wrong type.
    """
    token_ids = checks_rows.check_rows("logits", logits, token_ids, bounds_of(plan, cu_seqlens))
    checks_rows.check_inplace(logits, inplace)
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
        logits.dtype,
    )
    split = _split_of(logits, vocab_group, "mapo_loss_from_logits")
    if split is not None:
        split = split._replace(
            spec=spec,
            advantage_spec=advantage_spec,
            wanted=(torch.is_grad_enabled() and logits.requires_grad,),
            planned=plan is not None,
        )
    rows = gather_rows(token_ids, temperature, inputs, logits.shape[-1], split)
    if not torch.is_grad_enabled():
        logits = logits.detach()
    apply = MapoLogitsLossFunction.apply
    if split is not None:
        apply = torch.compiler.disable(apply)
    loss, results, computed = apply(logits, rows, inputs, spec, advantage_spec, inplace)
    return LossOutput(loss, name_metrics(results, inputs, known), used_advantages(computed, inputs))


def _split_of(logits: torch.Tensor, vocab_group: Any, function: str) -> vocab_parallel.Split | None:
    """How rows of these logits are split over ranks, or None if they are whole."""
    if vocab_group is None:
        return None
    vocab_parallel.check_vocab_group(vocab_group)
    dtype = logits.dtype
    backend = resolve_backend(logits.device.type, dtype == torch.float64)
    return vocab_parallel.Split(vocab_group, logits.shape[-1], function, dtype, backend)


@names_checked
def token_logprobs(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    temperature: torch.Tensor | float = 1.0,
    mask: torch.Tensor | None = None,
    return_entropy: bool = False,
    vocab_group: Any = None,
) -> Any:
    """Log-probs of sampled tokens from logits, for old and reference policies: no gradient.

    On the same logits they equal, bit for bit, what `mapo_loss_from_logits` computes inside.

    Args:
        logits: [B, T, V] or [total, V], as in `mapo_loss_from_logits`.
        token_ids: [B, T] or [total], integers in [0, V) where live.
        temperature: a positive number, or a tensor with one value per leading index: [B] or
            [total].
        mask: nonzero where a token counts, shape of `token_ids`. Other rows are not read.
        return_entropy: also return the entropy of each row's distribution, in nats.
        vocab_group: see `mapo_loss_from_logits`.

    Returns:
        Log-probs in the shape of `token_ids`, float32 (float64 for float64 logits), 0 where masked,
        NaN for a token id outside [0, V); with `return_entropy` a pair of them and the entropies.

    Raises:
        ValueError: a shape, a value or a device that makes no sense.
        TypeError: an argument of the wrong type.
    """
    token_ids = checks_rows.check_rows("logits", logits, token_ids, None)
    per = "one per token" if token_ids.dim() == 1 else "one per sequence"
    checks_rows.check_temperature(temperature, token_ids.shape[0], token_ids.device, per)
    require_bool("return_entropy", return_entropy)
    if mask is not None:
        checks.check_mask(mask, token_ids, "token_ids")
    function = "token_logprobs, with entropies" if return_entropy else "token_logprobs"
    split = _split_of(logits, vocab_group, function)
    share = None
    if split is not None:
        share = split.agree(token_ids, TokenInputs(mask=mask), temperature)
    checks_rows.check_token_ids(token_ids, mask, logits.shape[-1] if share is None else share.vocab)
    with torch.no_grad():
        rows = RowInputs(token_ids, temperature, share)
        table = ops_logits.score_rows(logits.detach(), rows, mask, 2 if return_entropy else 1)
        logprobs, *entropy = table.view(table.shape[0], *token_ids.shape).unbind(0)
    return (logprobs, *entropy) if return_entropy else logprobs
