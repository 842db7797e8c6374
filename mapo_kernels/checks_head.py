"""Validation of a language model's head: its weight, bias, softcap, scale and chunks."""

from __future__ import annotations

import torch

from mapo_kernels.checks import check_plain, check_shape
from mapo_kernels.dtypes import FLOATS
from mapo_kernels.spec import describe, require_bool, require_number


def check_weight(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Validate a head's weight [V, H] and bias [V] against hidden states [.., H]."""
    given = {"lm_head_weight": weight} if bias is None else {"lm_head_weight": weight, "bias": bias}
    for name, x in given.items():
        check_plain(name, x, hidden.device)
        if x.dtype not in FLOATS:
            raise TypeError(
                f"{name}: expected float32, bfloat16, float16 or float64 (dequantise it first), "
                f"got {x.dtype}"
            )
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"lm_head_weight: expected shape [V, {hidden.shape[-1]}] (the width of hidden), got "
            f"{list(weight.shape)}"
        )
    if bias is not None:
        check_shape("bias", bias, weight.shape[:1], "one per row of lm_head_weight")


def check_not_rounded(arguments: dict[str, object]) -> None:
    """Raise if log-probs come in a narrow dtype, as FSDP2's mixed precision casts them."""
    for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs"):
        x = arguments.get(name)
        if isinstance(x, torch.Tensor) and x.element_size() < 4:
            raise ValueError(
                f"{name}: expected float32 under fully_shard, whose MixedPrecisionPolicy takes "
                f"cast_forward_inputs=False here, got {x.dtype}"
            )


def check_head_options(
    softcap: object, logit_scale: object, chunk_rows: object, batch_invariant: object
) -> None:
    """Validate what happens to a head's product, and in how large chunks."""
    if softcap is not None:
        require_number("softcap", softcap, 0.0, open_low=True)
    require_number("logit_scale", logit_scale, 0.0, open_low=True)
    require_bool("batch_invariant", batch_invariant)
    if chunk_rows is None:
        return
    if isinstance(chunk_rows, bool) or not isinstance(chunk_rows, int):
        raise TypeError(f"chunk_rows: expected an int, got {describe(chunk_rows)}")
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows: expected at least 1, got {chunk_rows}")
