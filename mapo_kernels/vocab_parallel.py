"""Rows that are split over ranks: each rank of a group holds some adjacent columns of every row.

A rank sums over its own columns; what the ranks found is gathered, four numbers a row, and every
rank merges it in the same order into the same statistics. From there on each knows the whole loss,
and the gradient by its own columns.
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from mapo_kernels import twin
from mapo_kernels.inputs import RowInputs, VocabShare
from mapo_kernels.spec import LossSpec, describe
from mapo_kernels.sums import row_sum

_LN2 = 0.6931471805599453


def local_rows(rows: RowInputs) -> RowInputs:
    """The rows with token ids counted from this rank's first column; whole rows as they are."""
    if rows.share is None:
        return rows
    return RowInputs(rows.token_ids.long() - rows.share.offset, rows.temperature)


def gather(x: torch.Tensor, share: VocabShare) -> torch.Tensor:
    """What every rank has in place of `x` [k, n]: [ranks, k, n], in one collective."""
    ranks = len(share.sizes)
    out = x.new_empty((ranks * x.shape[0], x.shape[1]))
    if x.numel():
        dist.all_gather_into_tensor(out, x.contiguous(), group=share.group)
    return out.view(ranks, *x.shape)


def merge_shares(
    shares: torch.Tensor,
    rows: RowInputs,
    mask: torch.Tensor | None,
    columns: int,
    powers_of_2: bool,
) -> torch.Tensor:
    """Table [columns, n] of `ops_logits.score_rows` from the sums [ranks, 3 or 4, n] of the ranks.

    A rank's sums are the first of (reference, others, gap, weighted): the largest of its tempered
    logits, and what `formula.row_summary` takes, relative to that. So the others of a target are
    summed over all ranks without it, and a certain token stays exact. `powers_of_2` says that
    references are in units of log 2.
    """
    assert rows.share is not None
    references, others, gaps = shares[:, 0], shares[:, 1], shares[:, 2]
    reference = references.amax(0)
    distance = references - reference
    fade = torch.exp2(distance) if powers_of_2 else torch.exp(distance)
    distance = distance * _LN2 if powers_of_2 else distance
    weighted = torch.zeros_like(reference)
    if shares.shape[1] > 3:
        weighted = row_sum(((shares[:, 3] + others * distance) * fade).t())
    # Only the rank that has the target knows how far below its reference that is.
    gap = (gaps + distance).amax(0)
    logp, rest, total, entropy = twin.row_summary(row_sum((others * fade).t()), weighted, gap)
    ids = rows.token_ids.reshape(-1)
    logp = logp.where((ids >= 0) & (ids < rows.share.vocab), torch.nan)
    table = torch.stack([logp, entropy, reference, total, rest][:columns])
    return table if mask is None else table.where(mask.reshape(-1) != 0, 0.0)


def sum_over_ranks(x: torch.Tensor, share: VocabShare) -> torch.Tensor:
    """Sum `x` over the ranks, in place."""
    if x.numel():
        dist.all_reduce(x, group=share.group)
    return x


# What every rank of a group must have the same of, in the order in which it is exchanged.
_SAME = (
    "kind of input (0 logits, else the width H of hidden)",
    "number of rows",
    "size V of the DTensor's vocabulary (0 if not a DTensor)",
    "bytes per logit or weight",
    "chunk_rows",
    "LossSpec",
    "token ids where the mask is not 0",
)
# Sizes of the shares that the ranks of a group agreed on, by what this rank came with.
_agreed: WeakKeyDictionary[Any, dict[tuple[Any, ...], tuple[int, ...]]] = WeakKeyDictionary()


class Split(NamedTuple):
    """What a rank comes with to rows that are split over `group`.

    Attributes:
        group: the process group.
        columns: this rank's columns of a row.
        width: H of hidden states, or 0 for logits.
        vocab: V where it is known without asking the other ranks, else 0.
        itemsize: bytes per logit, or per element of the weight.
        chunk_rows: rows per chunk, or 0 where that is left open.
        spec: of the loss; None where log-probs are scored.
    """

    group: Any
    columns: int
    width: int
    vocab: int
    itemsize: int
    chunk_rows: int = 0
    spec: LossSpec | None = None

    def agree(self, token_ids: torch.Tensor, mask: torch.Tensor | None) -> VocabShare:
        """This rank's share, after making sure once that the ranks agree on everything else.

        The first call with a group, and with each new shape, takes one small collective, on which
        the host waits.

        Raises:
            ValueError: the ranks disagree; on every rank alike.
        """
        ranks = dist.get_world_size(self.group)
        known = _agreed.setdefault(self.group, {})
        if self[1:] not in known:
            facts = torch.empty((ranks, 1 + len(_SAME)), dtype=torch.int64, device=token_ids.device)
            mine = self._facts(token_ids, mask)
            dist.all_gather_into_tensor(facts, mine[None], group=self.group)
            known[self[1:]] = _checked_sizes(facts.tolist(), self.vocab)
        return VocabShare(self.group, dist.get_rank(self.group), known[self[1:]])

    def _facts(self, token_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """This rank's columns and what `_SAME` names, [8] int64."""
        ids = token_ids.reshape(-1).long() + 1
        if mask is not None:
            ids = ids.where(mask.reshape(-1) != 0, 0)
        places = torch.arange(1, ids.shape[0] + 1, device=ids.device)
        spec = zlib.crc32(repr(self.spec).encode())
        shape = (self.columns, self.width, ids.shape[0], self.vocab, self.itemsize)
        facts = torch.tensor((*shape, self.chunk_rows, spec), device=ids.device)
        return torch.cat([facts, (ids * (places % 8191)).sum().reshape(1)])


def _checked_sizes(facts: list[list[int]], vocab: int) -> tuple[int, ...]:
    """The ranks' columns, from what each came with; raises where that does not fit together."""
    columns, *others = zip(*facts, strict=True)
    for name, values in zip(_SAME, others, strict=True):
        if len(set(values)) > 1:
            raise ValueError(
                f"vocab_group: expected the same {name} on every rank, got {list(values)}"
            )
    if vocab and sum(columns) != vocab:
        raise ValueError(
            f"vocab_group: expected shares of {vocab} columns (V of the DTensor) in all, got "
            f"{list(columns)}"
        )
    return tuple(columns)


def check_vocab_group(group: Any) -> None:
    """Raise unless `group` is a process group that this rank belongs to."""
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"vocab_group: expected a torch.distributed ProcessGroup of this rank, got "
            f"{describe(group)}"
        )


def is_dtensor(x: Any) -> bool:
    """Whether `x` is a DTensor, without importing what defines it."""
    return type(x).__name__ == "DTensor" and hasattr(x, "placements")


def local_head(
    weight: torch.Tensor, bias: torch.Tensor | None, group: Any
) -> tuple[torch.Tensor, torch.Tensor | None, Any, int]:
    """This rank's weight and bias, the group that rows are split over, and V (0 if not known).

    A DTensor says by itself how it is split: with `Shard(0)` on one mesh dimension that is the
    group, with `Replicate` on all of them the weight is whole. Gradients come back as DTensors of
    the same placements.

    Raises:
        ValueError: another placement, or one that contradicts `vocab_group` or the bias.
    """
    if group is not None:
        check_vocab_group(group)
    if is_dtensor(bias) and not is_dtensor(weight):
        raise TypeError("bias: expected a tensor like lm_head_weight, got a DTensor")
    if not is_dtensor(weight):
        return weight, bias, group, 0
    split = _split_dimension("lm_head_weight", weight)
    mesh_group = None if split is None else weight.device_mesh.get_group(split)  # type: ignore[attr-defined]
    if group is not None and group is not mesh_group:
        raise ValueError(
            f"vocab_group: expected None or the mesh's own group with a DTensor, got another one "
            f"with lm_head_weight of placements {weight.placements}"  # type: ignore[attr-defined]
        )
    if is_dtensor(bias):
        assert bias is not None
        if _split_dimension("bias", bias) != split:
            raise ValueError(
                f"bias: expected the placements of lm_head_weight, {weight.placements}, got "  # type: ignore[attr-defined]
                f"{bias.placements}"  # type: ignore[attr-defined]
            )
        bias = bias.to_local()  # type: ignore[attr-defined]
    return weight.to_local(), bias, mesh_group, 0 if split is None else weight.shape[0]  # type: ignore[attr-defined]


def _split_dimension(name: str, x: Any) -> int | None:
    """The mesh dimension over which the rows of a DTensor are split, or None if it is whole."""
    split = [i for i, place in enumerate(x.placements) if not place.is_replicate()]
    places = [x.placements[i] for i in split]
    if len(split) > 1 or any(type(p).__name__ != "Shard" or p.dim != 0 for p in places):
        raise ValueError(
            f"{name}: expected a DTensor with Shard(0) on at most one mesh dimension and Replicate "
            f"on the others, got {x.placements}"
        )
    if not split:
        return None
    ranks = x.device_mesh.size(split[0])
    if -(-x.shape[0] // ranks) * (ranks - 1) >= x.shape[0]:
        raise ValueError(
            f"{name}: expected at least one row on each of {ranks} ranks, got {x.shape[0]} in all"
        )
    return split[0]
