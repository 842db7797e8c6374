"""Statistics of rows that are split over ranks, from what each rank found in its own columns."""

from __future__ import annotations

import torch

from mapo_kernels.batch import RowInputs, replaced
from mapo_kernels.eager import formula
from mapo_kernels.eager.sums import row_sum

_LN2 = 0.6931471805599453


def local_rows(rows: RowInputs) -> RowInputs:
    """The rows with token ids counted from this rank's first column; whole rows as they are."""
    if rows.share is None:
        return rows
    return replaced(rows, token_ids=rows.token_ids.long() - rows.share.offset, share=None)


def merge_shares(
    shares: torch.Tensor,
    rows: RowInputs,
    mask: torch.Tensor | None,
    columns: int,
    powers_of_2: bool,
) -> torch.Tensor:
    """Table [columns, n] of `operators.score_rows` from the sums [ranks, 3 or 4, n] of the ranks.

    A rank's sums are the first of (reference, others, gap, entropy): the largest of its tempered
    logits, what `formula.row_summary` takes, relative to that, and the entropy of its columns but
    the target. So the others of a target are summed over all ranks without it, and a certain token
    stays exact. `powers_of_2` says that references are in units of log 2.
    """
    assert rows.share is not None
    references, others, gaps = shares[:, 0], shares[:, 1], shares[:, 2]
    reference = references.amax(0)
    # A rank without a column in the sums has the lowest number for a reference.
    distance = (references - reference).clamp(min=-1e30)
    fade = torch.exp2(distance) if powers_of_2 else torch.exp(distance)
    distance = distance * _LN2 if powers_of_2 else distance
    # Only the rank that has the target knows how far below its reference that is.
    gap = (gaps + distance).amax(0)
    parts = others * fade
    total_others = row_sum(parts.t())
    nothing = torch.zeros_like(reference)
    logp, rest, total, entropy = formula.row_summary(total_others, nothing, nothing, gap)
    if shares.shape[1] > 3:
        entropy = _merged_entropy(parts, others.log() + distance, shares[:, 3], gap)
    if powers_of_2:
        # Beyond, exponents are too coarse to be merged: see `kernels.row.loses_digits`.
        logp = logp.where(reference.abs() <= 2.0**26, torch.nan)
    ids = rows.token_ids.reshape(-1)
    logp = logp.where((ids >= 0) & (ids < rows.share.vocab), torch.nan)
    table = torch.stack([logp, entropy, reference, total, rest][:columns])
    return table if mask is None else table.where(mask.reshape(-1) != 0, 0.0)


def _merged_entropy(
    parts: torch.Tensor, logs: torch.Tensor, entropies: torch.Tensor, gap: torch.Tensor
) -> torch.Tensor:
    """Entropy of rows from those of the ranks' columns: of which rank, and then of which column.

    Args:
        parts: [ranks, n], each rank's share of `others` as `formula.row_summary` takes it.
        logs: [ranks, n], their logarithms; -inf for 0.
        entropies: [ranks, n], of each rank's columns but the target.
        gap: [n], of the target.
    """
    # Relative to the largest part, so that a row which is certain of one rank's columns is exact.
    top = logs.amax(0).clamp(min=-1.0)
    logs = (logs - top).clamp(min=-1e30)
    parts = parts * torch.exp(-top)
    tail = row_sum(parts.masked_fill(logs == 0, 0.0).t())
    weighted = row_sum((parts * (logs - entropies)).t())
    return formula.row_summary(row_sum(parts.t()), tail, weighted, gap - top)[3]
