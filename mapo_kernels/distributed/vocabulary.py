"""Rows that are split over ranks: each rank of a group holds some adjacent columns of every row.

A rank sums over its own columns; what the ranks found is gathered, four numbers a row, and every
rank merges it in the same order into the same statistics. From there on each knows the whole loss,
and the gradient by its own columns.

What a rank sends depends on what it was called with: on the number of rows, on which of them matter
and on how they are cut into chunks. Messages of different sizes end processes or leave them waiting
(gloo aborts, NCCL hangs), and equal sizes of different calls give a finite loss that is wrong. So
every call begins with one message of fixed size, a header of digests (`Split.agree`), and nobody
sends anything else before it has seen that all are alike. The host waits for it: sizes that another
rank may not share cannot be sent on trust, and trust in what was agreed on once does not tell
whether all ranks use it at the same time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from mapo_kernels.batch import Batch, RowInputs, VocabShare
from mapo_kernels.distributed.agreement import all_gather, digest, digest_of, meeting_place
from mapo_kernels.eager import formula
from mapo_kernels.eager.sums import row_sum
from mapo_kernels.spec import AdvantageSpec, LossSpec, describe

_LN2 = 0.6931471805599453


def local_rows(rows: RowInputs) -> RowInputs:
    """The rows with token ids counted from this rank's first column; whole rows as they are."""
    if rows.share is None:
        return rows
    return RowInputs(rows.token_ids.long() - rows.share.offset, rows.temperature)


def gather(x: torch.Tensor, share: VocabShare) -> torch.Tensor:
    """What every rank has in place of `x` [k, n]: [ranks, k, n], in one collective."""
    ranks = len(share.sizes)
    if x.numel() == 0:
        return x.new_empty((ranks, *x.shape))
    return all_gather(x, share.group).view(ranks, *x.shape)


def merge_shares(
    shares: torch.Tensor,
    rows: RowInputs,
    mask: torch.Tensor | None,
    columns: int,
    powers_of_2: bool,
) -> torch.Tensor:
    """Table [columns, n] of `ops.score_rows` from the sums [ranks, 3 or 4, n] of the ranks.

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
        # Beyond, exponents are too coarse to be merged: see `rows_device.loses_digits`.
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


def sum_over_ranks(x: torch.Tensor, share: VocabShare) -> torch.Tensor:
    """Sum `x` over the ranks, in place."""
    if x.numel():
        dist.all_reduce(x, group=share.group)
    return x


class Split(NamedTuple):
    """What a rank comes with to rows that are split over `group`.

    Attributes:
        group: the process group.
        columns: this rank's columns of a row.
        function: the name of the public function, and whether entropies are asked for.
        dtype: of the logits, or of hidden states and weight.
        backend: what computes the rows: their references have units of its own.
        width: H of hidden states, or 0 for logits.
        vocab: V where it is known without asking the other ranks, else 0.
        chunk_rows: rows per chunk, or 0 where that is left open.
        head: softcap, logit_scale, and whether there is a bias.
        spec: of the loss; None where log-probs are scored.
        advantage_spec: of the loss's advantages; None where log-probs are scored.
        wanted: which gradients are asked for.
        planned: whether a plan says which rows matter.
    """

    group: Any
    columns: int
    function: str
    dtype: torch.dtype
    backend: str
    width: int = 0
    vocab: int = 0
    chunk_rows: int = 0
    head: tuple[object, ...] = ()
    spec: LossSpec | None = None
    advantage_spec: AdvantageSpec | None = None
    wanted: tuple[bool, ...] = ()
    planned: bool = False

    @torch.compiler.disable
    def agree(
        self,
        token_ids: torch.Tensor,
        inputs: Batch,
        temperature: torch.Tensor | float,
    ) -> VocabShare:
        """This rank's share, after making sure that all ranks were called alike.

        One collective of the same size for every call, on which the host waits.

        Raises:
            ValueError: the ranks disagree; on every rank alike.
        """
        settings = self._settings(token_ids, inputs, temperature)
        tensors = _tensors(token_ids, inputs, temperature)
        place = meeting_place(self.group, token_ids.device)
        known = [x if isinstance(x, int) else digest(str(x)) for x in settings.values()]
        numbers = torch.tensor([self.columns, *known]).to(place, non_blocking=True)
        nothing = numbers.new_zeros(())
        found = [nothing if x is None else digest_of(x).to(place) for x in tensors.values()]
        headers = all_gather(torch.cat([numbers, torch.stack(found)]), self.group).tolist()
        sizes = _checked_sizes(headers, settings, list(tensors), self.vocab)
        return VocabShare(self.group, dist.get_rank(self.group), sizes)

    def _settings(
        self, token_ids: torch.Tensor, inputs: Batch, temperature: torch.Tensor | float
    ) -> dict[str, object]:
        """What every rank has to be called with alike, but for tensors; the host knows it."""
        # A mask of ones equals none.
        given = [
            name
            for name, x in inputs._asdict().items()
            if isinstance(x, torch.Tensor) and name not in ("mask", "normalizer")
        ]
        given += ["advantages per token"] if inputs.per_token else []
        return {
            "function": self.function,
            "kind of input (0 logits, else the width H of hidden)": self.width,
            "number of rows": token_ids.numel(),
            "shape of the token ids": tuple(token_ids.shape),
            "size V of the DTensor's vocabulary (0 if not a DTensor)": self.vocab,
            "dtype": self.dtype,
            "backend": self.backend,
            "chunk_rows": self.chunk_rows,
            "softcap, logit_scale and presence of a bias": self.head,
            "LossSpec": self.spec,
            "AdvantageSpec": self.advantage_spec,
            "gradients (requires_grad)": self.wanted,
            "plan or none": self.planned,
            "arguments that are given": given,
            "group_size": None if inputs.groups is None else str(inputs.groups.group_size),
            "temperature": _number(temperature),
            "normalizer": _number(inputs.normalizer),
        }


def _number(x: torch.Tensor | float | None) -> str | None:
    """A number as a text, the same for equal numbers; a tensor's values are compared elsewhere."""
    if x is None or isinstance(x, torch.Tensor):
        return None if x is None else "a tensor"
    return str(float(x))


def _tensors(
    token_ids: torch.Tensor, inputs: Batch, temperature: torch.Tensor | float
) -> dict[str, torch.Tensor | None]:
    """What every rank has to be called with alike, and the host does not know.

    Hidden states and per-token log-probs and weights are left out: it matters to no message whether
    they differ in a last bit.
    """
    # Twice the id and 1, so that no id is what a masked token has.
    ids = token_ids.long() * 2 + 1
    if inputs.mask is not None:
        ids = ids.where(inputs.mask != 0, 0)
    groups, weights, normalizer = inputs.groups, inputs.token_weights, inputs.normalizer
    return {
        "token ids where the mask is not 0": ids,
        "cu_seqlens": inputs.cu_seqlens,
        "temperature of each sequence": _if_tensor(temperature),
        "advantages": inputs.advantages,
        "rewards": None if groups is None else groups.rewards,
        "group_ids": None if groups is None else groups.group_ids,
        "success": None if groups is None else groups.success,
        "token_weights that are 0": None if weights is None else weights == 0,
        "value of normalizer": _if_tensor(normalizer),
    }


def _if_tensor(x: object) -> torch.Tensor | None:
    return x if isinstance(x, torch.Tensor) else None


def _checked_sizes(
    headers: list[list[int]], settings: dict[str, object], tensors: list[str], vocab: int
) -> tuple[int, ...]:
    """The ranks' columns, from what each came with; raises where that does not fit together."""
    columns, *facts = zip(*headers, strict=True)
    names = (*settings, *tensors)
    apart = {
        name: values for name, values in zip(names, facts, strict=True) if len(set(values)) > 1
    }
    # Where settings differ tensors may well do so for that.
    apart = {k: v for k, v in apart.items() if k in settings} or apart
    came = []
    for name, values in apart.items():
        others = [rank for rank, value in enumerate(values) if value != values[0]]
        if name not in settings:
            came.append(f"others on ranks {others} than on rank 0")
        elif isinstance(settings[name], int):
            came.append(str(list(values)))
        else:
            came.append(f"{settings[name]} here, where ranks {others} differ from rank 0")
    if apart:
        raise ValueError(
            f"vocab_group: expected the same {', '.join(apart)} on every rank, got "
            f"{'; '.join(came)}"
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
