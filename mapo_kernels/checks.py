"""Validation at the boundary: every error names the argument, what was expected and what came.

Nothing here reads device data, so nothing waits, except under MAPO_KERNELS_VALIDATE=1.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from mapo_kernels.inputs import GroupInputs, TokenInputs
from mapo_kernels.spec import LossSpec, describe, require_bool, require_number

# The normalizer that counts the batch of all ranks.
GLOBAL = "global"


@torch.compiler.assume_constant_result
def validates_device_data() -> bool:
    """Whether MAPO_KERNELS_VALIDATE=1 asks for checks that read device data (they synchronise)."""
    return os.environ.get("MAPO_KERNELS_VALIDATE", "0").lower() in ("1", "true", "yes", "on")


def _shape(shape: torch.Size | tuple[int, ...]) -> str:
    return str(list(shape))


def check_tensor(name: str, x: object, device: torch.device | None = None) -> None:
    """Raise unless `x` is a tensor (on `device`)."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {describe(x)}")
    if device is not None and x.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {x.device}")


def check_plain(name: str, x: torch.Tensor, device: torch.device | None = None) -> None:
    """Raise unless `x` is a tensor (on `device`), and no DTensor."""
    check_tensor(name, x, device)
    if not torch.compiler.is_compiling() and type(x).__name__ == "DTensor":
        raise TypeError(
            f"{name}: expected a plain tensor, got a DTensor: pass {name}.to_local() if all of it "
            f"is here (or, of logits, this rank's columns, with vocab_group), else "
            f"{name}.full_tensor()"
        )


def check_constant(name: str, x: torch.Tensor, device: torch.device, floating: bool = True) -> None:
    """Raise unless `x` is a tensor on `device` that the loss is not differentiated by."""
    check_tensor(name, x, device)
    if floating and not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {x.dtype}")
    if x.requires_grad:
        raise ValueError(
            f"{name}: expected a tensor that does not require grad (the loss treats it as a "
            f"constant; pass {name}.detach()), got requires_grad=True"
        )


def check_shape(name: str, x: torch.Tensor, shape: torch.Size | tuple[int, ...], what: str) -> None:
    """Raise unless `x` has `shape`, described by `what`."""
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {_shape(shape)} ({what}), got {_shape(x.shape)}")


def check_groups(
    rewards: torch.Tensor,
    group_size: int | None,
    group_ids: torch.Tensor | None,
    success: torch.Tensor | None,
    is_part: bool = False,
) -> GroupInputs:
    """Validate rewards [B] and their grouping; a part's groups may continue on other ranks."""
    check_tensor("rewards", rewards)
    if rewards.dim() != 1:
        raise ValueError(
            f"rewards: expected shape [B] (one reward per sequence), got {_shape(rewards.shape)}"
        )
    if rewards.is_complex():
        raise TypeError(f"rewards: expected a real dtype, got {rewards.dtype}")
    check_constant("rewards", rewards, rewards.device, floating=False)
    if (group_size is None) == (group_ids is None):
        came = "neither" if group_size is None else "both"
        raise ValueError(f"group_size, group_ids: expected exactly one of them, got {came}")
    if group_ids is not None:
        check_tensor("group_ids", group_ids, rewards.device)
        check_shape("group_ids", group_ids, rewards.shape, "one id per reward")
        if group_ids.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64):
            raise TypeError(f"group_ids: expected an integer dtype, got {group_ids.dtype}")
    else:
        if isinstance(group_size, bool) or not isinstance(group_size, int):
            raise TypeError(f"group_size: expected an int, got {describe(group_size)}")
        if group_size < 1:
            raise ValueError(
                f"group_size: expected a positive divisor of all rewards, got {group_size}"
            )
    if not is_part:
        check_group_count(rewards.shape[0], group_size or 0)
    if success is not None:
        check_tensor("success", success, rewards.device)
        check_shape("success", success, rewards.shape, "one flag per reward")
        if success.dtype != torch.bool:
            raise TypeError(f"success: expected dtype torch.bool, got {success.dtype}")
    # A bool has no sign for the kernel to take; 0 and 1 are what is meant.
    rewards = rewards.to(torch.uint8) if rewards.dtype == torch.bool else rewards
    return GroupInputs(rewards, group_size or 0, group_ids, success)


def check_group_count(n_rows: int, group_size: int) -> None:
    """Raise unless the rewards of a whole batch are some, and make whole groups of `group_size`."""
    if n_rows == 0:
        raise ValueError("rewards: expected at least one sequence (B >= 1), got an empty batch")
    if group_size and n_rows % group_size:
        raise ValueError(
            f"group_size: expected a positive divisor of the {n_rows} rewards, got {group_size}"
        )


def is_global(normalizer: object) -> bool:
    """Whether the denominator is that of all ranks of a process group."""
    return isinstance(normalizer, str) and normalizer == GLOBAL


def check_process_group(process_group: object, normalizer: object) -> None:
    """Validate a process group, and that there is one for a normalizer that needs it."""
    if process_group is None:
        if is_global(normalizer):
            raise ValueError("process_group: expected one with normalizer='global', got None")
        return
    if not dist.is_available() or not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"process_group: expected a torch.distributed.ProcessGroup that this rank belongs to "
            f"(of a DeviceMesh, mesh.get_group()), got {describe(process_group)}"
        )


def check_layout(
    name: str, x: torch.Tensor, cu_seqlens: torch.Tensor | None, is_part: bool = False
) -> int:
    """Validate the layout of a token tensor, [B, T] or [total]; the number B of sequences.

    Only where other ranks may hold the rest of the batch, this part may be empty.
    """
    if cu_seqlens is None:
        if x.dim() != 2:
            raise ValueError(
                f"{name}: expected shape [B, T], or [total] with cu_seqlens, got {_shape(x.shape)}"
            )
        if x.shape[0] < 1 and not is_part:
            raise ValueError(f"{name}: expected at least one sequence (B >= 1), got an empty batch")
        return x.shape[0]
    if x.dim() != 1:
        raise ValueError(f"{name}: expected shape [total] with cu_seqlens, got {_shape(x.shape)}")
    return check_bounds(cu_seqlens, x.device, x.shape[0], is_part)


def check_bounds(
    cu_seqlens: torch.Tensor,
    device: torch.device | None = None,
    total: int | None = None,
    is_part: bool = False,
) -> int:
    """Validate the boundaries of a packed batch (of `total` tokens, where known); the number B."""
    check_tensor("cu_seqlens", cu_seqlens, device)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: expected int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < (1 if is_part else 2):
        raise ValueError(
            f"cu_seqlens: expected shape [B + 1] with B >= 1, got {_shape(cu_seqlens.shape)}"
        )
    if validates_device_data():
        bounds = cu_seqlens.tolist()
        total = bounds[-1] if total is None else total
        if bounds[0] != 0 or bounds[-1] != total or bounds != sorted(bounds):
            raise ValueError(
                f"cu_seqlens: expected non-decreasing values from 0 to {total}, got {bounds}"
            )
    return cu_seqlens.shape[0] - 1


def check_advantages(
    advantages: torch.Tensor, n_sequences: int, tokens: torch.Tensor
) -> torch.Tensor:
    """Validate advantages [B] or per token."""
    check_constant("advantages", advantages, tokens.device)
    if tuple(advantages.shape) not in ((n_sequences,), tuple(tokens.shape)):
        raise ValueError(
            f"advantages: expected shape [{n_sequences}] (per sequence) or {_shape(tokens.shape)} "
            f"(per token), got {_shape(advantages.shape)}"
        )
    return advantages


def is_per_token(
    advantages: torch.Tensor | None, tokens: torch.Tensor, cu_seqlens: torch.Tensor | None
) -> bool:
    """Whether given advantages are the tokens' own, and not their sequences'.

    A packed batch may have as many tokens as sequences; then they are the sequences'.
    """
    # Called before anything is validated.
    if not isinstance(advantages, torch.Tensor) or not isinstance(tokens, torch.Tensor):
        return False
    if advantages.shape != tokens.shape:
        return False
    return cu_seqlens is None or advantages.shape[0] != cu_seqlens.shape[0] - 1


def check_mask(mask: torch.Tensor, tokens: torch.Tensor, name: str) -> None:
    """Validate a token mask against the tokens, an argument called `name`."""
    check_tensor("mask", mask, tokens.device)
    check_shape("mask", mask, tokens.shape, f"the shape of {name}")


def check_normalizer(normalizer: object, device: torch.device) -> None:
    """Validate the denominator over the batch."""
    if isinstance(normalizer, torch.Tensor):
        if normalizer.numel() != 1:
            raise ValueError(
                f"normalizer: expected a number or a 0-d tensor, got shape "
                f"{_shape(normalizer.shape)}"
            )
        check_constant("normalizer", normalizer, device, floating=False)
    elif isinstance(normalizer, bool) or not isinstance(normalizer, (int, float)):
        raise TypeError(
            f"normalizer: expected a number, a 0-d tensor or 'global', got {describe(normalizer)}"
        )
    elif not 0 < normalizer < float("inf"):
        raise ValueError(f"normalizer: expected a positive finite number, got {normalizer!r}")


def check_denominator(
    normalizer: object, mask: torch.Tensor | None, dtype: torch.dtype = torch.float32
) -> None:
    """Under MAPO_KERNELS_VALIDATE=1, raise unless a normalizer is positive in `dtype`.

    Or there is no token for it to count: 0 is right then, and the loss is 0.
    """
    if normalizer is None or is_global(normalizer) or not validates_device_data():
        return
    value = float(torch.as_tensor(normalizer).to(dtype))
    if not 0 < value < float("inf") and (mask is None or bool((mask != 0).any())):
        raise ValueError(
            f"normalizer: expected a positive finite number (in {dtype}), got {value:g}"
        )


def check_source(rewards: object, advantages: object) -> None:
    """Raise unless exactly one of rewards and advantages is given."""
    if (rewards is None) == (advantages is None):
        came = "neither" if rewards is None else "both"
        raise ValueError(f"rewards, advantages: expected exactly one of them, got {came}")


def check_tokens(
    name: str, tokens: torch.Tensor, inputs: TokenInputs, spec: LossSpec, is_part: bool = False
) -> None:
    """Validate the tensors of one loss against its spec and the tokens, an argument called `name`.

    That is the log-probs, or the token ids of logits or hidden states. `is_part`: see
    `check_layout`.
    """
    check_tensor(name, tokens)
    if name == "logprobs" and not tokens.is_floating_point():
        raise TypeError(f"logprobs: expected a floating-point dtype, got {tokens.dtype}")
    n_sequences = check_layout(name, tokens, inputs.cu_seqlens, is_part)
    for field in ("old_logprobs", "ref_logprobs", "rollout_logprobs", "token_weights"):
        x = getattr(inputs, field)
        if x is not None:
            check_constant(field, x, tokens.device)
            check_shape(field, x, tokens.shape, f"the shape of {name}")
    if inputs.mask is not None:
        check_mask(inputs.mask, tokens, name)
    if inputs.advantages is not None:
        check_advantages(inputs.advantages, n_sequences, tokens)
    if inputs.groups is not None:
        rewards = inputs.groups.rewards
        check_tensor("rewards", rewards, tokens.device)
        check_shape("rewards", rewards, (n_sequences,), f"one reward per sequence of {name}")
    if inputs.normalizer is not None and not is_global(inputs.normalizer):
        check_normalizer(inputs.normalizer, tokens.device)
    _check_spec(inputs, spec)


def check_rows(
    name: str, x: torch.Tensor, token_ids: torch.Tensor, cu_seqlens: torch.Tensor | None
) -> None:
    """Validate logits, or hidden states, against the token ids that were drawn from them."""
    width = {"logits": "V", "hidden": "H"}[name]
    check_plain(name, x)
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {x.dtype}")
    if x.dim() not in (2, 3) or x.shape[-1] < 1:
        raise ValueError(
            f"{name}: expected shape [B, T, {width}], or [total, {width}] if packed, with "
            f"{width} >= 1, got {_shape(x.shape)}"
        )
    if cu_seqlens is not None and x.dim() != 2:
        raise ValueError(
            f"{name}: expected shape [total, {width}] with cu_seqlens, got {_shape(x.shape)}"
        )
    check_tensor("token_ids", token_ids, x.device)
    if token_ids.dtype not in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64):
        raise TypeError(f"token_ids: expected an integer dtype, got {token_ids.dtype}")
    check_shape("token_ids", token_ids, x.shape[:-1], f"the shape of {name} without {width}")


def check_weight(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Validate a head's weight [V, H] and bias [V] against hidden states [.., H]."""
    given = {"lm_head_weight": weight} if bias is None else {"lm_head_weight": weight, "bias": bias}
    for name, x in given.items():
        check_plain(name, x, hidden.device)
        if not x.is_floating_point() or x.element_size() < 2:
            raise TypeError(
                f"{name}: expected float32, bfloat16, float16 or float64 (dequantise it first), "
                f"got {x.dtype}"
            )
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"lm_head_weight: expected shape [V, {hidden.shape[-1]}] (the width of hidden), got "
            f"{_shape(weight.shape)}"
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


def check_head_options(softcap: object, logit_scale: object, chunk_rows: object) -> None:
    """Validate what happens to a head's product, and in how large chunks."""
    if softcap is not None:
        require_number("softcap", softcap, 0.0, open_low=True)
    require_number("logit_scale", logit_scale, 0.0, open_low=True)
    if chunk_rows is None:
        return
    if isinstance(chunk_rows, bool) or not isinstance(chunk_rows, int):
        raise TypeError(f"chunk_rows: expected an int, got {describe(chunk_rows)}")
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows: expected at least 1, got {chunk_rows}")


def check_temperature(temperature: object, count: int, device: torch.device) -> None:
    """Validate a temperature: a positive number, or a tensor of `count` of them."""
    if not isinstance(temperature, torch.Tensor):
        require_number("temperature", temperature, 0.0, open_low=True)
        return
    check_constant("temperature", temperature, device)
    check_shape("temperature", temperature, (count,), "one per sequence")
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


def check_no_bonus(spec: LossSpec) -> None:
    """Raise if the spec asks for an entropy bonus where there are no logits to take it from."""
    if spec.entropy_coef != 0:
        raise ValueError(
            f"entropy_coef: expected 0 where only log-probs are seen (entropy needs logits), got "
            f"{spec.entropy_coef!r}"
        )


def _check_spec(inputs: TokenInputs, spec: LossSpec) -> None:
    if not isinstance(spec, LossSpec):
        raise TypeError(f"spec: expected a LossSpec, got {describe(spec)}")
    if spec.beta != 0 and inputs.ref_logprobs is None:
        raise ValueError(f"ref_logprobs: expected a tensor because beta is {spec.beta:g}, got None")
    if (spec.rollout_cap is None) != (inputs.rollout_logprobs is None):
        missing = "rollout_cap" if spec.rollout_cap is None else "rollout_logprobs"
        raise ValueError(f"{missing}: expected with its counterpart (cap and log-probs), got None")
    if (
        spec.aggregation == "seq-mean-token-sum-norm"
        and spec.max_tokens is None
        and inputs.cu_seqlens is not None
    ):
        raise ValueError(
            "max_tokens: expected a number for 'seq-mean-token-sum-norm' of packed input, got None"
        )
