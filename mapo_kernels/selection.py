"""Which sequences of a batch: what `Plan.micro_batch` takes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch

from mapo_kernels.dtypes import INTEGERS
from mapo_kernels.spec import describe


class Selection(NamedTuple):
    """Some sequences of a batch.

    Attributes:
        rows: what tensors of sequences are indexed by: a slice that ascends, or [b] int64.
        which: their positions, ascending or not, none of them negative; on the host.
    """

    rows: slice | torch.Tensor
    which: Sequence[int]

    def rows_on(self, device: torch.device) -> slice | torch.Tensor:
        """`rows` for tensors that lie there: an index from the host would be waited for."""
        if isinstance(self.rows, slice) or not self.rows.is_cpu:
            return self.rows
        return self.rows.to(device, non_blocking=True)

    def as_slice(self) -> slice | None:
        """The slice that selects the same sequences in the same order, if there is one."""
        first = self.which[0] if self.which else 0
        after = first + len(self.which)
        return slice(first, after) if list(self.which) == list(range(first, after)) else None


def select(sequences: object, n_sequences: int) -> Selection:
    """What `sequences` (a slice, indices or a mask) selects of so many; tensors are waited for.

    Raises:
        ValueError: an index out of range, or a shape other than [b], or [B] for a mask.
        TypeError: no selection of several sequences.
    """
    if isinstance(sequences, slice):
        try:
            which = range(n_sequences)[sequences]
        except (TypeError, ValueError) as error:
            raise type(error)(f"sequences: expected a slice of integers, got {sequences}") from None
        if which.step > 0:
            stop = max(which.start, which.stop)
            return Selection(slice(which.start, stop, which.step), which)
        sequences = which
    index = _as_tensor(sequences)
    if index.dtype != torch.bool and index.dtype not in INTEGERS:
        raise TypeError(
            f"sequences: expected integers, or one bool per sequence, got {index.dtype}"
        )
    is_mask = index.dtype == torch.bool
    if index.dim() != 1 or (is_mask and index.shape[0] != n_sequences):
        expected = f"[{n_sequences}] (one bool per sequence)" if is_mask else "[b] (indices)"
        raise ValueError(f"sequences: expected shape {expected}, got {list(index.shape)}")
    found = index.tolist()
    if is_mask:
        found = [i for i, chosen in enumerate(found) if chosen]
        return Selection(torch.tensor(found, dtype=torch.int64), found)
    outside = [i for i in found if not -n_sequences <= i < n_sequences]
    if outside:
        raise ValueError(
            f"sequences: expected indices from {-n_sequences} to {n_sequences - 1} (there are "
            f"{n_sequences}), got {outside[0]}"
        )
    return Selection(index.long(), [i % n_sequences for i in found])


def _as_tensor(sequences: object) -> torch.Tensor:
    """Indices or a mask as a tensor, where they lie."""
    if isinstance(sequences, torch.Tensor):
        return sequences
    # Where there is an array, somebody has imported NumPy; torch works without it.
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(sequences, numpy.ndarray):
        sequences = sequences.tolist()
    if isinstance(sequences, (list, tuple, range)):
        try:
            return torch.tensor(list(sequences)) if sequences else torch.zeros(0, dtype=torch.int64)
        except (TypeError, ValueError, RuntimeError):
            pass  # strings, or lists of different lengths
    raise TypeError(
        f"sequences: expected a slice, or a list, range, array or tensor of indices (of one "
        f"sequence i: [i]), got {describe(sequences)}"
    )
