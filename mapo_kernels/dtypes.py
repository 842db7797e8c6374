"""Which dtypes an argument may have."""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SIGNED = (torch.int64, torch.int32, torch.int16, torch.int8)
_UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
INTEGERS = _SIGNED + _UNSIGNED

FLOATING = "a floating-point dtype"
INTEGER = "an integer dtype"
NUMBER = "a floating-point or integer dtype"
REAL = "a real dtype"
_KINDS = {
    FLOATING: FLOATS,
    INTEGER: INTEGERS,
    NUMBER: FLOATS + INTEGERS,
    REAL: FLOATS + INTEGERS + (torch.bool,),
}
# A bool has no sign that a kernel could take, and torch compares no unsigned integers of more than
# a byte. All but uint64 are exact.
_COMPARABLE = {
    torch.bool: torch.uint8,
    torch.uint16: torch.int32,
    torch.uint32: torch.int64,
    torch.uint64: torch.float32,
}


def require_dtype(name: str, x: torch.Tensor, kind: str) -> None:
    """Raise unless `x` has a dtype of this kind; no kind has complex, quantised or 8-bit floats."""
    if x.dtype not in _KINDS[kind]:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in _KINDS[kind])
        raise TypeError(f"{name}: expected {kind} ({accepted}), got {x.dtype}")


def comparable(rewards: torch.Tensor) -> torch.Tensor:
    """Rewards of a real dtype in one that kernels and torch compare with a threshold."""
    dtype = _COMPARABLE.get(rewards.dtype)
    return rewards if dtype is None else rewards.to(dtype)


def signed(ids: torch.Tensor) -> torch.Tensor:
    """Integer ids in a dtype that kernels compare with -1; those past the largest int64 wrap."""
    return ids.long() if ids.dtype in _UNSIGNED else ids


def result_dtype(x: torch.Tensor) -> torch.dtype:
    """What the eager backend computes in for inputs like `x`: float64 stays, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
