"""Sums of rows on torch tensors in an order that depends on nothing but the row's length."""

from __future__ import annotations

import torch


def row_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum of each row of `x` [n, m], [n]: of one row alone, bit for bit that in any batch.

    On a CPU. A graph that is compiled has the order that its compiler chooses.
    """
    if torch.compiler.is_compiling():
        return x.sum(1)
    if x.stride(1) != 1:
        # Torch adds columns in another order than rows, and the last columns in yet another.
        x = x.contiguous()
    if x.shape[0] != 1:
        return x.sum(1)
    # One sum of 32768 numbers or more is shared by torch's threads; of two, each is one thread's.
    return x.expand(2, -1).sum(1)[:1]


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """What the eager backend adds long runs of scattered values in; Apple's GPU has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
