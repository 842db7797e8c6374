"""Rows that are split over ranks: each rank of a group holds some adjacent columns of every row.

A rank sums over its own columns; what the ranks found is gathered, four numbers a row, and every
rank merges it in the same order into the same statistics (`rows_merged`). From there on each knows
the whole loss, and the gradient by its own columns.

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

from mapo_kernels.batch import Batch, VocabShare
from mapo_kernels.distributed.agreement import all_gather, check_facts, facts_of, meeting_place
from mapo_kernels.masks import SamplingMask
from mapo_kernels.spec import AdvantageSpec, LossSpec, describe
from mapo_kernels.tracing import outside_graphs


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
        head: softcap, logit_scale, whether there is a bias, and batch_invariant.
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

    @outside_graphs
    def agree(
        self,
        token_ids: torch.Tensor,
        inputs: Batch,
        temperature: torch.Tensor | float,
        sampling_mask: SamplingMask | None = None,
    ) -> VocabShare:
        """This rank's share, after making sure that all ranks were called alike.

        One collective of the same size for every call, on which the host waits.

        Raises:
            ValueError: the ranks disagree; on every rank alike.
        """
        settings = self._settings(token_ids, inputs, temperature)
        tensors = _tensors(token_ids, inputs, temperature, sampling_mask)
        place = meeting_place(self.group, token_ids.device)
        facts = facts_of(settings, tensors, place)
        message = torch.cat([facts.new_full((1,), self.columns), facts])
        headers = all_gather(message, self.group).tolist()
        check_facts("vocab_group", settings, list(tensors), [header[1:] for header in headers])
        sizes = [header[0] for header in headers]
        if self.vocab and sum(sizes) != self.vocab:
            raise ValueError(
                f"vocab_group: expected shares of {self.vocab} columns (V of the DTensor) in all, "
                f"got {sizes}"
            )
        return VocabShare(self.group, dist.get_rank(self.group), tuple(sizes))

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
            "softcap, logit_scale, presence of a bias and batch_invariant": self.head,
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
    token_ids: torch.Tensor,
    inputs: Batch,
    temperature: torch.Tensor | float,
    sampling_mask: SamplingMask | None = None,
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
    kept = None
    if sampling_mask is not None:
        kept = torch.cat([sampling_mask.token_ids.long(), sampling_mask.offsets.long()])
    return {
        "token ids where the mask is not 0": ids,
        "sampling_mask": kept,
        "cu_seqlens": inputs.cu_seqlens,
        "temperature of each sequence": _if_tensor(temperature),
        "advantages": inputs.advantages,
        "rewards": None if groups is None else groups.rewards,
        "group_ids": None if groups is None else groups.group_ids,
        "success": None if groups is None else groups.success,
        "group_weight": None if groups is None else groups.weight,
        "token_weights that are 0": None if weights is None else weights == 0,
        "value of normalizer": _if_tensor(normalizer),
    }


def _if_tensor(x: object) -> torch.Tensor | None:
    return x if isinstance(x, torch.Tensor) else None


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
