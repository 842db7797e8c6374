"""Rows that keep few columns: the launchers of their kernels."""

from __future__ import annotations

import torch

from mapo_kernels import config
from mapo_kernels._triton import on_device_of, warp_size
from mapo_kernels.kernels.kept import gather_products_kernel, gather_sums_kernel
from mapo_kernels.launch.direct import Direct

_products, _sums = Direct(gather_products_kernel), Direct(gather_sums_kernel)


def _width(block: int, width: int) -> int:
    """Columns of a hidden state at once, a power of 2."""
    return min(block, 1 << max(0, width - 1).bit_length())


def launch_gather_products(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    source: torch.Tensor,
    row: torch.Tensor,
    columns: torch.Tensor,
    bounds: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Write to `out` [nnz] the product of hidden state and row of the weight of each entry.

    Args:
        hidden: [.., H].
        weight: [V, H].
        source: [n] int64, which hidden state each row has.
        row: [nnz] int64, the row of each entry, ascending.
        columns: [nnz] int64, its row of the weight.
        bounds: [n + 1] int64, where each row's entries begin.
        out: [nnz] float32.
    """
    n = source.shape[0]
    if n == 0 or out.shape[0] == 0:
        return
    tuning = config.KEPT
    with on_device_of(hidden):
        _products[(n,)](
            hidden,
            weight,
            source,
            columns,
            bounds,
            out,
            hidden.shape[1],
            hidden.stride(0),
            weight.stride(0),
            BLOCK_K=tuning.columns,
            BLOCK_H=_width(tuning.width, hidden.shape[1]),
            num_warps=tuning.threads // warp_size(),
        )


def launch_gather_sums(
    matrix: torch.Tensor,
    index: torch.Tensor | None,
    factor: torch.Tensor | None,
    bounds: torch.Tensor,
    place: torch.Tensor | None,
    add: bool,
    out: torch.Tensor,
) -> None:
    """Write to rows of `out` sums of rows of a matrix.

    Args:
        matrix: [.., H].
        index: [nnz] int64, the row that each entry adds; or None: each its own.
        factor: [nnz] float32, what it is multiplied by; or None.
        bounds: [n + 1] int64, where the entries of each sum begin.
        place: [n] int64, where each sum goes; or None: in order.
        add: whether to what is there, or in its place.
        out: [.., H].
    """
    n, width = bounds.shape[0] - 1, matrix.shape[1]
    if n == 0:
        return
    tuning = config.KEPT
    block = _width(tuning.width, width)
    with on_device_of(matrix):
        _sums[(n * -(-width // block),)](
            matrix,
            index,
            factor,
            bounds,
            place,
            out,
            width,
            matrix.stride(0),
            out.stride(0),
            ADD=add,
            UNROLL=tuning.unroll,
            BLOCK_H=block,
            num_warps=tuning.threads // warp_size(),
        )
