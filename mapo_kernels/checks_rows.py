"""Validation of logits or hidden states, and of what turns them into log-probs."""

from __future__ import annotations

import torch

from mapo_kernels.checks import (
    check_constant,
    check_plain,
    check_shape,
    check_tensor,
    dims,
    validates_device_data,
)
from mapo_kernels.dtypes import FLOATING, INTEGER, require_dtype, signed
from mapo_kernels.spec import require_bool, require_number


def check_rows(
    name: str, x: torch.Tensor, token_ids: torch.Tensor, cu_seqlens: torch.Tensor | None
) -> torch.Tensor:
    """Validate logits, or hidden states, against the token ids drawn from them; the ids, signed."""
    width = {"logits": "V", "hidden": "H"}[name]
    check_plain(name, x)
    require_dtype(name, x, FLOATING)
    if x.dim() not in (2, 3) or x.shape[-1] < 1:
        raise ValueError(
            f"{name}: expected shape [B, T, {width}], or [total, {width}] if packed, with "
            f"{width} >= 1, got {dims(x.shape)}"
        )
    if cu_seqlens is not None and x.dim() != 2:
        raise ValueError(
            f"{name}: expected shape [total, {width}] with cu_seqlens, got {dims(x.shape)}"
        )
    check_tensor("token_ids", token_ids, x.device)
    require_dtype("token_ids", token_ids, INTEGER)
    check_shape("token_ids", token_ids, x.shape[:-1], f"the shape of {name} without {width}")
    return signed(token_ids)


def check_temperature(
    temperature: object, count: int, device: torch.device, what: str = "one per sequence"
) -> None:
    """Validate a temperature: a positive number, or a tensor of `count` of them, `what` says."""
    if not isinstance(temperature, torch.Tensor):
        require_number("temperature", temperature, 0.0, open_low=True)
        return
    check_constant("temperature", temperature, device)
    check_shape("temperature", temperature, (count,), what)
    if validates_device_data() and not bool((temperature > 0).all()):
        raise ValueError(f"temperature: expected positive values, got {temperature.tolist()}")


def check_inplace(logits: torch.Tensor, inplace: bool) -> None:
    """Raise unless the gradient can take the place of the logits, where that is asked for."""
    require_bool("inplace", inplace)
    if not inplace:
        return
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        raise ValueError(
            f"logits: expected adjacent columns (stride 1) with inplace=True, got stride "
            f"{logits.stride(-1)}"
        )
    if logits.numel() and any(
        step == 0 and size > 1 for step, size in zip(logits.stride(), logits.shape, strict=True)
    ):
        raise ValueError("logits: expected memory of their own with inplace=True, got a broadcast")


def check_token_ids(token_ids: torch.Tensor, mask: torch.Tensor | None, vocab: int) -> None:
    """Under MAPO_KERNELS_VALIDATE=1, raise unless every live token id is a column of the logits."""
    if not validates_device_data():
        return
    ids = token_ids if mask is None else token_ids[mask != 0]
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
        raise ValueError(
            f"token_ids: expected ids in [0, {vocab}) where live, got {int(ids.min())} to "
            f"{int(ids.max())}"
        )
