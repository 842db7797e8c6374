"""Validation at the boundary: every error names the argument, what was expected and what came.

Nothing here reads device data, so nothing waits, except under MAPO_KERNELS_VALIDATE=1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from mapo_kernels._triton import environment
from mapo_kernels.batch import Batch
from mapo_kernels.choices import GLOBAL as GLOBAL
from mapo_kernels.dtypes import FLOATING, NUMBER, REAL, require_dtype
from mapo_kernels.spec import AdvantageSpec, LossSpec, describe
from mapo_kernels.tracing import constant_in_graphs

# Token tensors that a loss is not differentiated by: the first fields of `Batch`.
CONSTANTS = ("old_logprobs", "ref_logprobs", "rollout_logprobs", "token_weights")
_VALIDATE = "MAPO_KERNELS_VALIDATE"
_ON, _OFF = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


@constant_in_graphs
def validates_device_data() -> bool:
    """Whether MAPO_KERNELS_VALIDATE=1 asks for checks that read device data (they synchronise).

    Raises:
        ValueError: the variable has another value than those for on and off.
    """
    value = environment(_VALIDATE)
    if not value:
        return False
    word = value.strip().lower()
    if word not in _ON and word not in _OFF:
        raise ValueError(
            f"{_VALIDATE}: expected 1, true, yes or on, or (for off) 0, false, no, off or nothing, "
            f"got {value!r}"
        )
    return word in _ON


def dims(shape: torch.Size | tuple[int, ...]) -> str:
    """A shape as messages have it."""
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


def check_constant(
    name: str, x: torch.Tensor, device: torch.device | None, kind: str = FLOATING
) -> None:
    """Raise unless `x` is a tensor on `device` that the loss is not differentiated by."""
    check_tensor(name, x, device)
    require_dtype(name, x, kind)
    if x.requires_grad:
        raise ValueError(
            f"{name}: expected a tensor that does not require grad (the loss treats it as a "
            f"constant; pass {name}.detach()), got requires_grad=True"
        )


def check_shape(name: str, x: torch.Tensor, shape: torch.Size | tuple[int, ...], what: str) -> None:
    """Raise unless `x` has `shape`, described by `what`."""
    if x.shape != shape and tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {dims(shape)} ({what}), got {dims(x.shape)}")


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
    validates_device_data()  # an error, if the environment is not clear about it
    if cu_seqlens is None:
        if x.dim() != 2:
            raise ValueError(
                f"{name}: expected shape [B, T], or [total] with cu_seqlens, got {dims(x.shape)}"
            )
        if x.shape[0] < 1 and not is_part:
            raise ValueError(f"{name}: expected at least one sequence (B >= 1), got an empty batch")
        return x.shape[0]
    if x.dim() != 1:
        raise ValueError(f"{name}: expected shape [total] with cu_seqlens, got {dims(x.shape)}")
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
            f"cu_seqlens: expected shape [B + 1] with B >= 1, got {dims(cu_seqlens.shape)}"
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
    advantages: torch.Tensor,
    n_sequences: int,
    tokens: torch.Size | None,
    device: torch.device,
) -> None:
    """Validate advantages [B] or per token; `tokens` is None for as many as the device knows of."""
    check_constant("advantages", advantages, device)
    if tokens is None:
        fits = advantages.dim() == 1
    else:
        fits = tuple(advantages.shape) in ((n_sequences,), tuple(tokens))
    if not fits:
        # Not before: sizes that torch.compile traces cannot be written down.
        per_token = "[total]" if tokens is None else dims(tokens)
        raise ValueError(
            f"advantages: expected shape [{n_sequences}] (per sequence) or {per_token} (per "
            f"token), got {dims(advantages.shape)}"
        )


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
    require_dtype("mask", mask, REAL)
    check_shape("mask", mask, tokens.shape, f"the shape of {name}")


def check_normalizer(normalizer: object, device: torch.device) -> None:
    """Validate the denominator over the batch."""
    if isinstance(normalizer, torch.Tensor):
        if normalizer.numel() != 1:
            raise ValueError(
                f"normalizer: expected a number or a 0-d tensor, got shape {dims(normalizer.shape)}"
            )
        check_constant("normalizer", normalizer, device, NUMBER)
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


def check_source(rewards: object, advantages: object, grouping: Mapping[str, object]) -> None:
    """Raise unless exactly one of the two is given, and `grouping` only of rewards."""
    if (rewards is None) == (advantages is None):
        came = "neither" if rewards is None else "both"
        raise ValueError(f"rewards, advantages: expected exactly one of them, got {came}")
    if rewards is not None:
        return
    given = [name for name, value in grouping.items() if value is not None]
    if given:
        raise ValueError(
            f"{', '.join(grouping)}: expected None with advantages, got a value for "
            f"{', '.join(given)}"
        )


def check_specs(spec: object, advantage_spec: object) -> None:
    """Raise unless the two specs are specs."""
    if not isinstance(spec, LossSpec):
        raise TypeError(f"spec: expected a LossSpec, got {describe(spec)}")
    if not isinstance(advantage_spec, AdvantageSpec):
        raise TypeError(
            f"advantage_spec: expected an AdvantageSpec, got {describe(advantage_spec)}"
        )


def check_tokens(
    name: str, tokens: torch.Tensor, inputs: Batch, spec: LossSpec, is_part: bool = False
) -> None:
    """Validate the tensors of one loss against its spec and the tokens, an argument called `name`.

    That is the log-probs, or the token ids of logits or hidden states. `is_part`: see
    `check_layout`.
    """
    check_tensor(name, tokens)
    if name == "logprobs":
        require_dtype(name, tokens, FLOATING)
    n_sequences = check_layout(name, tokens, inputs.cu_seqlens, is_part)
    shape, device = tokens.shape, tokens.device
    for field, x in zip(CONSTANTS, inputs.token_tensors(), strict=False):
        if x is not None:
            check_constant(field, x, device)
            check_shape(field, x, shape, f"the shape of {name}")
    if inputs.mask is not None:
        check_mask(inputs.mask, tokens, name)
    if inputs.advantages is not None:
        check_advantages(inputs.advantages, n_sequences, shape, device)
    if inputs.groups is not None:
        rewards = inputs.groups.rewards
        check_tensor("rewards", rewards, device)
        expected = (n_sequences, *rewards.shape[1:])
        check_shape("rewards", rewards, expected, f"those of each sequence of {name}")
    if inputs.normalizer is not None and not is_global(inputs.normalizer):
        check_normalizer(inputs.normalizer, tokens.device)
    _check_spec(inputs, spec)


def check_no_bonus(spec: LossSpec) -> None:
    """Raise if the spec asks for an entropy bonus where there are no logits to take it from."""
    if spec.entropy_coef != 0:
        raise ValueError(
            f"entropy_coef: expected 0 where only log-probs are seen (entropy needs logits), got "
            f"{spec.entropy_coef!r}"
        )


def _check_spec(inputs: Batch, spec: LossSpec) -> None:
    if spec.beta != 0 and inputs.ref_logprobs is None:
        raise ValueError(f"ref_logprobs: expected a tensor because beta is {spec.beta:g}, got None")
    _check_rollout(inputs, spec)
    if (
        spec.aggregation == "seq-mean-token-sum-norm"
        and spec.max_tokens is None
        and inputs.cu_seqlens is not None
    ):
        raise ValueError(
            "max_tokens: expected a number for 'seq-mean-token-sum-norm' of packed input, got None"
        )


def _check_rollout(inputs: Batch, spec: LossSpec) -> None:
    """Raise unless there are rollout log-probs exactly where the spec has a use for them."""
    wanted = {"rollout_cap": spec.rollout_cap, "rollout_mask": spec.rollout_mask}
    given = {name: value for name, value in wanted.items() if value is not None}
    if not given and inputs.rollout_logprobs is not None:
        raise ValueError(
            "spec.rollout_cap: expected a number because rollout_logprobs are given, got None"
        )
    for name, value in given.items():
        if inputs.rollout_logprobs is None:
            shown = f"{value:g}" if isinstance(value, float) else f"{value}"
            raise ValueError(
                f"rollout_logprobs: expected a tensor because spec.{name} is {shown}, got None"
            )
    if spec.rollout_mask is not None and inputs.old_logprobs is None:
        raise ValueError(
            f"old_logprobs: expected a tensor because spec.rollout_mask is {spec.rollout_mask} "
            f"(the ratio of the two is known before the loss), got None"
        )
