"""Log-probs and entropies of sampled tokens, from logits or hidden states, differentiable."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from mapo_kernels import checks, checks_head, checks_rows, operators
from mapo_kernels import hidden as hidden_level
from mapo_kernels.autograd import LinearScoresFunction, LogitsScoresFunction
from mapo_kernels.backend import resolve_backend
from mapo_kernels.batch import Batch, HeadInputs, RowInputs
from mapo_kernels.distributed import vocabulary
from mapo_kernels.distributed.vocabulary import Split, local_head
from mapo_kernels.keywords import names_checked
from mapo_kernels.masks import SamplingMask, check_sampling_mask, one_of_both, resolved
from mapo_kernels.plan import Plan, require_plan
from mapo_kernels.spec import require_bool
from mapo_kernels.tracing import outside_graphs

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mapo_kernels.arguments import HiddenScoreArguments, ScoreArguments


@overload
def token_logprobs(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    return_entropy: Literal[False] = False,
    **arguments: Unpack[ScoreArguments],
) -> torch.Tensor: ...
@overload
def token_logprobs(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    return_entropy: Literal[True],
    **arguments: Unpack[ScoreArguments],
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def token_logprobs(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    return_entropy: bool,
    **arguments: Unpack[ScoreArguments],
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...
@names_checked
def token_logprobs(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    temperature: torch.Tensor | float = 1.0,
    mask: torch.Tensor | None = None,
    return_entropy: bool = False,
    vocab_group: torch.distributed.ProcessGroup | None = None,
    sampling_mask: SamplingMask | None = None,
    plan: Plan | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of sampled tokens from logits, and their entropies: both differentiable.

    On the same logits they equal, bit for bit, what `mapo_loss_from_logits` computes inside. The
    same in memory, too: of rows that are aligned to 16 bytes and of a cut of them that is not, the
    Triton kernels add columns in another order.

    Where the logits require grad they are kept for backward, which reads them once more and writes
    the gradient; it may run again, but not be differentiated. Old and reference log-probs belong
    under `torch.no_grad`.

    Args:
        logits: [B, T, V] or [total, V], as in `mapo_loss_from_logits`.
        token_ids: [B, T] or [total], integers in [0, V) where live.
        temperature: a positive number, or a tensor with one value per leading index: [B] or
            [total].
        mask: nonzero where a token counts, shape of `token_ids`. Other rows are not read.
        return_entropy: also return the entropy of each row's distribution, in nats.
        vocab_group: see `mapo_loss_from_logits`. Where ranks go on with the same numbers, the
            gradient by this rank's columns is complete.
        sampling_mask: see there.
        plan: of `make_plan`, in place of the mask (and its sampling mask): tokens that cannot
            change the plan's loss are not scored either.

    Returns:
        Log-probs in the shape of `token_ids`, float32 (float64 for float64 logits), 0 where masked,
        NaN for a token id outside [0, V); with `return_entropy` a pair of them and the entropies.

    Raises:
        ValueError: a shape, a value or a device that makes no sense.
        TypeError: an argument of the wrong type.
    """
    token_ids = checks_rows.check_rows("logits", logits, token_ids, None)
    _check(token_ids, temperature, return_entropy)
    mask, sampling_mask = _counting(token_ids, mask, sampling_mask, plan)
    split = split_of(logits, vocab_group, _named("token_logprobs", return_entropy))
    needs_grad = torch.is_grad_enabled() and logits.requires_grad
    if split is not None:
        split = split._replace(wanted=(needs_grad,), planned=plan is not None)
    rows = _rows(token_ids, temperature, mask, logits.shape[-1], split, sampling_mask)
    if needs_grad:
        found = LogitsScoresFunction.apply(logits, rows, mask)
        return found if return_entropy else found[0]
    # Nothing here requires grad: what else is floating-point has been checked for that.
    table = operators.score_rows(logits.detach(), rows, mask, 2 if return_entropy else 1)
    if not return_entropy:
        return table.view(token_ids.shape)
    logprobs, entropy = table.view(2, *token_ids.shape).unbind(0)
    return logprobs, entropy


@overload
def token_logprobs_from_hidden(
    hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    return_entropy: Literal[False] = False,
    **arguments: Unpack[HiddenScoreArguments],
) -> torch.Tensor: ...
@overload
def token_logprobs_from_hidden(
    hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    return_entropy: Literal[True],
    **arguments: Unpack[HiddenScoreArguments],
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def token_logprobs_from_hidden(
    hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    return_entropy: bool,
    **arguments: Unpack[HiddenScoreArguments],
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...
@outside_graphs
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
    batch_invariant: bool = False,
    vocab_group: torch.distributed.ProcessGroup | None = None,
    sampling_mask: SamplingMask | None = None,
    plan: Plan | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of sampled tokens from hidden states, and their entropies: both differentiable.

    One matrix product over the tokens that are not masked. Where hidden states, weight or bias
    require grad, backward takes three more (two with a frozen weight), because it has the logits of
    each chunk multiplied again: nothing of the size of the logits is kept. It may run again, but
    not be differentiated. Old and reference log-probs belong under `torch.no_grad`.

    `mapo_loss_from_hidden` takes one product less; this is for a loss of one's own.

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
        batch_invariant: as there: it makes them equal, where the loss has it too.
        vocab_group: as there. Every rank has to go on with the same numbers, and call backward.
        sampling_mask: as there.
        plan: of `make_plan`, in place of the mask (and its sampling mask): tokens that cannot
            change the plan's loss enter no product, and nothing waits for the device.

    Returns:
        Log-probs in the shape of `token_ids`, float32 (float64 for float64 inputs), 0 where masked;
        with `return_entropy` a pair of them and the entropies.

    Raises:
        ValueError: a shape, a value or a device that makes no sense.
        TypeError: an argument of the wrong type.
    """
    checks_head.check_head_options(softcap, logit_scale, chunk_rows, batch_invariant)
    hidden, weight, bias, token_ids, split = checked_head(
        hidden, lm_head_weight, bias, token_ids, None, vocab_group
    )
    _check(token_ids, temperature, return_entropy)
    mask, sampling_mask = _counting(token_ids, mask, sampling_mask, plan)
    given = (hidden, weight, bias)
    wanted = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in given)
    if split is not None:
        split = split._replace(
            function=_named("token_logprobs_from_hidden", return_entropy),
            chunk_rows=chunk_rows or 0,
            head=head_description(softcap, logit_scale, bias, batch_invariant),
            wanted=wanted,
            planned=plan is not None,
        )
    rows = _rows(token_ids, temperature, mask, weight.shape[0], split, sampling_mask)
    if plan is not None:
        live_rows = plan.live_rows
    else:
        live_rows = torch.arange(token_ids.numel(), device=hidden.device)
        if mask is not None:
            live_rows = live_rows[mask.reshape(-1) != 0]
    head = HeadInputs(weight, bias, softcap, logit_scale, chunk_rows, live_rows, batch_invariant)
    if any(wanted):
        found = LinearScoresFunction.apply(hidden, weight, bias, head, rows)
        return found if return_entropy else found[0]
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        table = hidden_level.linear_scores(hidden, head, rows, 2 if return_entropy else 1)
        logprobs, *entropy = table.view(table.shape[0], *token_ids.shape).unbind(0)
    return (logprobs, entropy[0]) if return_entropy else logprobs


def _named(function: str, return_entropy: bool) -> str:
    """What ranks tell each other about a call."""
    return f"{function}{', with entropies' if return_entropy else ''}"


def _check(
    token_ids: torch.Tensor, temperature: torch.Tensor | float, return_entropy: bool
) -> None:
    """Raise unless the temperature fits the token ids, and the flag is one."""
    per = "one per token" if token_ids.dim() == 1 else "one per sequence"
    checks_rows.check_temperature(temperature, token_ids.shape[0], token_ids.device, per)
    require_bool("return_entropy", return_entropy)


def _counting(
    token_ids: torch.Tensor,
    mask: torch.Tensor | None,
    sampling_mask: SamplingMask | None,
    plan: Plan | None,
) -> tuple[torch.Tensor | None, SamplingMask | None]:
    """Which tokens count, and the columns that they keep: as given, or as the plan has them."""
    if mask is not None:
        checks.check_mask(mask, token_ids, "token_ids")
    if plan is None:
        return mask, sampling_mask
    require_plan(plan)
    if mask is not None:
        raise ValueError("mask: expected None with a plan, which has one already")
    sampling_mask = one_of_both(sampling_mask, plan.sampling_mask)
    live = plan.live
    missing = token_ids.shape[-1] - live.shape[-1]
    if plan.bounds is not None and live.dim() == token_ids.dim() and missing > 0:
        # Tokens behind the last sequence belong to none.
        live = torch.nn.functional.pad(live, (0, missing))
    if live.shape != token_ids.shape:
        raise ValueError(
            f"plan: expected one of {list(token_ids.shape)} tokens (token_ids), got one of "
            f"{list(live.shape)}"
        )
    return live, sampling_mask


def _rows(
    token_ids: torch.Tensor,
    temperature: torch.Tensor | float,
    mask: torch.Tensor | None,
    vocab: int,
    split: Split | None,
    sampling_mask: SamplingMask | None,
) -> RowInputs:
    """Validated rows; `vocab` columns of them are here."""
    if sampling_mask is not None:
        check_sampling_mask(sampling_mask, token_ids.numel(), token_ids.device)
    share = None
    if split is not None:
        share = split.agree(token_ids, Batch(mask=mask), temperature, sampling_mask)
        vocab = share.vocab
    checks_rows.check_token_ids(token_ids, mask, vocab)
    kept, token_ids = resolved(sampling_mask, token_ids, mask, vocab)
    # torch.compile takes the default of a field for an input, which two nodes cannot share.
    return RowInputs(token_ids, temperature, share, scale=1.0, kept=kept)


def split_of(logits: torch.Tensor, vocab_group: Any, function: str) -> Split | None:
    """How rows of these logits are split over ranks, or None if they are whole."""
    if vocab_group is None:
        return None
    vocabulary.check_vocab_group(vocab_group)
    dtype = logits.dtype
    backend = resolve_backend(logits.device.type, dtype == torch.float64)
    return Split(vocab_group, logits.shape[-1], function, dtype, backend)


def _as_linear_would(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The inputs in the dtype of autocast, if it is on: differentiably, as `linear` casts them."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def checked_head(
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


def head_description(
    softcap: float | None, logit_scale: float, bias: object, batch_invariant: bool
) -> tuple[object, ...]:
    """What ranks have to have the same of the head's options; equal numbers have one form."""
    cap = None if softcap is None else float(softcap)
    return cap, float(logit_scale), bias is not None, batch_invariant
