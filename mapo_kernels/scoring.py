"""Log-probs of sampled tokens, from logits or hidden states, without gradient."""

from __future__ import annotations

from typing import Any

import torch

from mapo_kernels import checks, checks_head, checks_rows, operators
from mapo_kernels import hidden as hidden_level
from mapo_kernels.backend import resolve_backend
from mapo_kernels.batch import Batch, HeadInputs, RowInputs
from mapo_kernels.distributed import vocabulary
from mapo_kernels.distributed.vocabulary import Split, local_head
from mapo_kernels.keywords import names_checked
from mapo_kernels.masks import SamplingMask, check_kept, check_sampling_mask
from mapo_kernels.spec import require_bool


@names_checked
def token_logprobs(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    temperature: torch.Tensor | float = 1.0,
    mask: torch.Tensor | None = None,
    return_entropy: bool = False,
    vocab_group: Any = None,
    sampling_mask: SamplingMask | None = None,
) -> Any:
    """Log-probs of sampled tokens from logits, for old and reference policies: no gradient.

    On the same logits they equal, bit for bit, what `mapo_loss_from_logits` computes inside. The
    same in memory, too: of rows that are aligned to 16 bytes and of a cut of them that is not, the
    Triton kernels add columns in another order.

    Args:
        logits: [B, T, V] or [total, V], as in `mapo_loss_from_logits`.
        token_ids: [B, T] or [total], integers in [0, V) where live.
        temperature: a positive number, or a tensor with one value per leading index: [B] or
            [total].
        mask: nonzero where a token counts, shape of `token_ids`. Other rows are not read.
        return_entropy: also return the entropy of each row's distribution, in nats.
        vocab_group: see `mapo_loss_from_logits`.
        sampling_mask: see there.

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
    split = split_of(logits, vocab_group, function)
    rows = _rows(token_ids, temperature, mask, logits.shape[-1], split, sampling_mask)
    # Nothing here requires grad: what else is floating-point has been checked for that.
    table = operators.score_rows(logits.detach(), rows, mask, 2 if return_entropy else 1)
    if not return_entropy:
        return table.view(token_ids.shape)
    return tuple(table.view(2, *token_ids.shape).unbind(0))


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
    batch_invariant: bool = False,
    vocab_group: Any = None,
    sampling_mask: SamplingMask | None = None,
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
        batch_invariant: as there: it makes them equal, where the loss has it too.
        vocab_group: as there.
        sampling_mask: as there.

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
    per = "one per token" if token_ids.dim() == 1 else "one per sequence"
    checks_rows.check_temperature(temperature, token_ids.shape[0], token_ids.device, per)
    require_bool("return_entropy", return_entropy)
    if mask is not None:
        checks.check_mask(mask, token_ids, "token_ids")
    if split is not None:
        split = split._replace(
            function=f"token_logprobs_from_hidden{', with entropies' if return_entropy else ''}",
            chunk_rows=chunk_rows or 0,
            head=head_description(softcap, logit_scale, bias, batch_invariant),
        )
    rows = _rows(token_ids, temperature, mask, weight.shape[0], split, sampling_mask)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        head = HeadInputs(
            weight, bias, softcap, logit_scale, chunk_rows, batch_invariant=batch_invariant
        )
        table = hidden_level.linear_scores(hidden, head, rows, mask, 2 if return_entropy else 1)
        logprobs, *entropy = table.view(table.shape[0], *token_ids.shape).unbind(0)
    return (logprobs, *entropy) if return_entropy else logprobs


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
    share = kept = None
    if split is not None:
        share = split.agree(token_ids, Batch(mask=mask), temperature, sampling_mask)
        vocab = share.vocab
    checks_rows.check_token_ids(token_ids, mask, vocab)
    if sampling_mask is not None:
        check_kept(sampling_mask, token_ids, mask, vocab)
        kept, token_ids = sampling_mask.resolve(token_ids, vocab)
    return RowInputs(token_ids, temperature, share, kept=kept)


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
