"""Context parallel: ranks of a group that each hold some tokens of the same sequences.

What a sequence's loss needs of its other tokens is numbers, not logits: how many there are, and
for ratios, means and metrics of whole sequences the log-probs themselves. So ranks first exchange
how they were called and count the valid tokens of each sequence (two collectives, of which the
first is waited for). Where a loss is made of log-probs, they gather these and what else each token
has, some tens of bytes a token; every rank then computes the loss of the whole sequences and keeps
the gradient by its own tokens. Cuts may be of any kind, for no sum depends on the order of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from mapo_kernels.batch import Batch, SequenceParts, replaced
from mapo_kernels.distributed.agreement import all_gather, check_facts, facts_of, meeting_place
from mapo_kernels.dtypes import result_dtype
from mapo_kernels.layout import Layout
from mapo_kernels.spec import AdvantageSpec, LossSpec, describe
from mapo_kernels.tracing import outside_graphs


def check_sequence_group(group: Any) -> None:
    """Raise unless `group` is a process group that this rank belongs to."""
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"sequence_group: expected a torch.distributed ProcessGroup of this rank, got "
            f"{describe(group)}"
        )


@outside_graphs
def meet(
    group: Any, tokens: torch.Tensor, batch: Batch, spec: LossSpec, advantage_spec: AdvantageSpec
) -> SequenceParts:
    """How the sequences of `tokens` ([B, T] or [total] here) lie on the ranks; waits for the host.

    Raises:
        ValueError: the ranks disagree about anything but their tokens; on every rank alike.
        TypeError: `group` is no process group that this rank belongs to.
    """
    check_sequence_group(group)
    groups, normalizer = batch.groups, batch.normalizer
    given = [
        name
        for name, x in batch._asdict().items()
        if isinstance(x, torch.Tensor) and name not in ("mask", "normalizer")
    ]
    settings = {
        "number of sequences": batch.n_sequences(tokens),
        "layout": "padded" if batch.cu_seqlens is None else "packed",
        "dtype": tokens.dtype if tokens.is_floating_point() else "",
        "LossSpec": spec,
        "AdvantageSpec": advantage_spec,
        "arguments that are given": given + ["advantages per token"] * batch.per_token,
        "group_size": None if groups is None else str(groups.group_size),
        "normalizer": None if isinstance(normalizer, torch.Tensor) else normalizer,
    }
    tensors = {
        "advantages": None if batch.per_token else batch.advantages,
        "rewards": None if groups is None else groups.rewards,
        "group_ids": None if groups is None else groups.group_ids,
        "success": None if groups is None else groups.success,
        "group_weight": None if groups is None else groups.weight,
        "value of normalizer": normalizer if isinstance(normalizer, torch.Tensor) else None,
    }
    place = meeting_place(group, tokens.device)
    facts = facts_of(settings, tensors, place)
    message = torch.cat([facts.new_full((1,), tokens.shape[-1]), facts])
    headers = all_gather(message, group).tolist()
    check_facts("sequence_group", settings, list(tensors), [header[1:] for header in headers])
    own = Layout(tokens, replaced(batch, parts=None)).n_valid().to(place)
    n_valid = all_gather(own, group).sum(0).to(tokens.device)
    lengths = tuple(header[0] for header in headers)
    return SequenceParts(group, dist.get_rank(group), lengths, n_valid)


def gather(
    logprobs: torch.Tensor, batch: Batch
) -> tuple[torch.Tensor, Batch, Callable[[torch.Tensor], torch.Tensor]]:
    """Log-probs of the whole sequences, their batch, and what cuts this rank's part of a tensor."""
    parts = batch.parts
    assert parts is not None
    here = replaced(batch, parts=None)
    given = {"logprobs": logprobs, **_token_tensors(here)}
    # Of one rank all tokens may be masked, and of another none: every rank sends which are valid.
    given["mask"] = Layout(logprobs, here).valid
    dtype = result_dtype(logprobs)
    sent = torch.stack([x.detach().to(dtype).expand(logprobs.shape) for x in given.values()])
    n_rows = logprobs.shape[0] if logprobs.dim() == 2 else 1
    sizes = [n_rows * n for n in parts.lengths]
    sent = torch.nn.functional.pad(sent.flatten(1), (0, max(sizes) - logprobs.numel()))
    table = all_gather(sent, parts.group)
    every = [x[:, :n].unflatten(1, (n_rows, -1)) for x, n in zip(table, sizes, strict=True)]
    first = sum(parts.lengths[: parts.rank])
    own = slice(first, first + parts.lengths[parts.rank])
    whole = torch.cat(every, 2)
    if batch.cu_seqlens is None:
        return *_whole(here, given, whole), lambda x: x[:, own].contiguous()
    order, cu_seqlens = _order_of(all_gather(batch.cu_seqlens.long(), parts.group), parts.lengths)
    here, place = replaced(here, cu_seqlens=cu_seqlens), torch.argsort(order)[own]
    return *_whole(here, given, whole[:, 0, order]), lambda x: x[place]


def _order_of(bounds: torch.Tensor, lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed tokens of all ranks by their sequence, and where each of these begins, [B + 1].

    `bounds` [ranks, B + 1] are those of each rank. Tokens of no sequence, which are masked, go with
    the first or the last.
    """
    n_sequences = bounds.shape[1] - 1
    sequence = torch.cat(
        [
            torch.searchsorted(cuts[1:].contiguous(), torch.arange(n).to(cuts), right=True)
            for cuts, n in zip(bounds, lengths, strict=True)
        ]
    ).clamp(max=n_sequences - 1)
    counts = torch.bincount(sequence, minlength=n_sequences)
    cu_seqlens = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return torch.argsort(sequence, stable=True), cu_seqlens


def _token_tensors(batch: Batch) -> dict[str, torch.Tensor]:
    """What each token has beside its log-prob, by the field of a batch."""
    names = batch._fields[: len(batch.token_tensors())]
    found = {k: x for k, x in zip(names, batch.token_tensors(), strict=True) if x is not None}
    if batch.per_token:
        assert batch.advantages is not None
        found["advantages"] = batch.advantages
    return found


def _whole(batch: Batch, names: Iterable[str], values: torch.Tensor) -> tuple[torch.Tensor, Batch]:
    """Log-probs and the batch of whole sequences, from the values that go by these names."""
    tensors = {k: x.contiguous() for k, x in zip(names, values, strict=True)}
    logprobs = tensors.pop("logprobs")
    return logprobs, replaced(batch, **{**tensors, "mask": tensors["mask"] != 0})
