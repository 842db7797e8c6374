"""Choosing between a value and 0 on torch tensors.

On a CPU `torch.where` reads its condition one element at a time, which costs as much as an
exponential, and several times that where the condition changes often. Comparing with a number is an
operation of whole vectors, which `threshold_backward` does in one pass: its first argument where
the second is above the threshold, and else 0, whatever the first one is there.
"""

from __future__ import annotations

import torch

_above = torch.ops.aten.threshold_backward.default
# Below, converting the condition takes longer than reading it.
_SMALL = 4096


def as_numbers(condition: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """1 where a bool `condition` holds, else 0."""
    if torch.compiler.is_compiling():
        return condition.to(dtype)
    # The same bytes, which torch converts faster than bools.
    return condition.view(torch.uint8).to(dtype)


def only(x: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """`x` where the bool tensor says so, else 0."""
    if torch.compiler.is_compiling() or where.device.type != "cpu" or where.numel() < _SMALL:
        return x.where(where, 0.0)
    return _above(x, as_numbers(where, x.dtype), 0.0)


class Only:
    """`only` with one condition for several tensors of one dtype, which is converted once."""

    def __init__(self, where: torch.Tensor, dtype: torch.dtype) -> None:
        """`where` is a bool tensor, `dtype` that of the others."""
        self._where, self._numbers = where, None
        if not torch.compiler.is_compiling() and where.device.type == "cpu":
            self._numbers = as_numbers(where, dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`x` where the condition holds, else 0."""
        if self._numbers is None:
            return x.where(self._where, 0.0)
        return _above(x, self._numbers, 0.0)
