"""Sums of rows on torch tensors in an order that depends on nothing but the row's length."""

from __future__ import annotations

import torch

from mapo_kernels._ops import add_op_namespace_prefix

# From as many numbers on, one sum is shared by torch's threads.
_SHARED = 32768


def row_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum of each row of `x` [n, m], [n]: of one row alone, bit for bit that in any batch.

    On a CPU. A graph that is compiled has the order that its compiler chooses.
    """
    if torch.compiler.is_compiling():
        return x.sum(1)
    if x.stride(1) != 1:
        # Torch adds columns in another order than rows, and the last columns in yet another.
        x = x.contiguous()
    if x.shape[0] != 1 or x.shape[1] < _SHARED:
        return x.sum(1)
    # Of two sums, each is one thread's.
    return x.expand(2, -1).sum(1)[:1]


def sum_by(index: torch.Tensor, x: torch.Tensor, n: int) -> torch.Tensor:
    """Sums [n] of the values of `x` that have each index."""
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        return _sum_by(index, x, n)
    return x.new_zeros(n).index_add(0, index, x)


# A graph's own loop would add from several threads, in the order in which they come.
@torch.library.custom_op(add_op_namespace_prefix("sum_by"), mutates_args=())
def _sum_by(index: torch.Tensor, x: torch.Tensor, n: int) -> torch.Tensor:
    return x.new_zeros(n).index_add(0, index, x)


@_sum_by.register_fake
def _(index: torch.Tensor, x: torch.Tensor, n: int) -> torch.Tensor:
    return x.new_empty(n)


def total(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sum [] of all of `x`; of bools, how many there are."""
    if torch.compiler.is_compiling():
        # Along rows first, in the loop that adds up their losses too.
        x = x.to(dtype)
        return x.sum() if x.dim() == 1 else x.sum(1).sum()
    # Counting is exact, and quicker than making numbers of bools.
    return x.count_nonzero().to(dtype) if x.dtype == torch.bool else x.sum()


def top(x: torch.Tensor) -> torch.Tensor:
    """The largest [] of `x`, which is not empty."""
    return x.amax(1).amax() if torch.compiler.is_compiling() and x.dim() > 1 else x.amax()


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """What the eager backend adds long runs of scattered values in; Apple's GPU has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
