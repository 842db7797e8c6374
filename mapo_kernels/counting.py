"""Weights of prompts, and denominators that depend on prompts or on advantages.

The other denominators are known without a count of this kind: see `Batch.denominator`. Here a batch
is counted once, before its loss, from a few numbers per sequence, which ranks tell each other with
their rewards.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mapo_kernels.batch import Batch, GroupInputs, replaced
from mapo_kernels.distributed.agreement import all_gather
from mapo_kernels.distributed.data import Part, Shared
from mapo_kernels.eager.sums import accumulator_dtype, sum_by
from mapo_kernels.groups import order_by_group
from mapo_kernels.layout import Layout, scalar
from mapo_kernels.spec import LossSpec


class Sequences(NamedTuple):
    """What is counted, of each sequence.

    Attributes:
        n_valid: [B] its valid tokens.
        n_contributing: [B] those whose advantage is not 0.
        prompt: [B] int64, which prompt it answers, counted from 0; None if that plays no part.
        n_prompts: more than any of these.
    """

    n_valid: torch.Tensor
    n_contributing: torch.Tensor
    prompt: torch.Tensor | None
    n_prompts: int

    def of_rows(self, rows: slice) -> Sequences:
        """The same of some of the sequences."""
        prompt = None if self.prompt is None else self.prompt[rows]
        return Sequences(self.n_valid[rows], self.n_contributing[rows], prompt, self.n_prompts)

    def weights(self) -> torch.Tensor | None:
        """What multiplies each sequence's token losses, [B]: 1 over its prompt's valid tokens."""
        if self.prompt is None:
            return None
        tokens = sum_by(self.prompt, self.n_valid, self.n_prompts).clamp(min=1.0)
        return (1.0 / tokens)[self.prompt]

    def denominator(self, spec: LossSpec) -> torch.Tensor:
        """What the sum over these sequences is divided by, []; never less than 1."""
        tokens = self.n_valid
        counts = torch.ones_like(tokens)
        if spec.denominator == "contributing":
            tokens = self.n_contributing
            counts = (tokens > 0).to(tokens.dtype)
        if spec.how.denominator == "tokens":
            counts = tokens
        elif self.prompt is not None:
            counts = (sum_by(self.prompt, counts, self.n_prompts) > 0).to(tokens.dtype)
        return counts.sum().clamp(min=1.0)


def lengths_of(batch: Batch, tokens: torch.Tensor | None) -> torch.Tensor:
    """Valid tokens of each sequence, [B]; without `tokens` all those of a packed batch are."""
    if batch.parts is not None:
        found = batch.parts.n_valid
    elif tokens is None:
        assert batch.cu_seqlens is not None
        found = batch.cu_seqlens.diff()
    else:
        found = Layout(tokens, batch).n_valid()
    return found.to(accumulator_dtype(found.device))


def contributing_of(batch: Batch, tokens: torch.Tensor | None) -> torch.Tensor:
    """Valid tokens of each sequence whose advantage is not 0, [B]."""
    assert batch.advantages is not None
    if tokens is None or not batch.per_token:
        lengths = lengths_of(batch, tokens)
        return lengths * (batch.advantages != 0).to(lengths.device)
    layout = Layout(tokens, batch)
    found = layout.sum(
        (layout.valid & (batch.advantages != 0)).to(accumulator_dtype(tokens.device))
    )
    if batch.parts is not None:
        found = all_gather(found, batch.parts.group).sum(0)
    return found


def prompts_of(groups: GroupInputs | None, spec: LossSpec) -> torch.Tensor | None:
    """Which prompt each sequence answers, [B]; None if the loss does not ask."""
    if groups is None or spec.how.denominator != "prompts":
        return None
    if groups.group_ids is not None:
        return order_by_group(groups.group_ids)[2]
    n_rows = groups.rewards.shape[0]
    return torch.arange(n_rows, device=groups.rewards.device) // groups.group_size


def sequences_of(
    batch: Batch, tokens: torch.Tensor | None, spec: LossSpec, groups: GroupInputs | None
) -> Sequences:
    """The sequences of a batch with these advantages; `groups` says which prompts they answer."""
    lengths, contributing = lengths_of(batch, tokens), contributing_of(batch, tokens)
    return Sequences(lengths, contributing, prompts_of(groups, spec), lengths.shape[0])


def part_of(
    batch: Batch, tokens: torch.Tensor | None, spec: LossSpec, groups: GroupInputs | None
) -> Part:
    """What a rank tells the others of a batch that has to be counted.

    `groups` has the rewards; where advantages were given, only who belongs together.
    """
    lengths = lengths_of(batch, tokens)
    if batch.advantages is None:
        return Part(lengths.shape[0], 0, groups, lengths)
    contributing = contributing_of(batch, tokens)
    if groups is None:
        return Part((contributing > 0).sum(), contributing.sum())
    return Part(lengths.shape[0], 0, groups._replace(rewards=contributing.double()), lengths)


def of_all_ranks(
    shared: Shared, spec: LossSpec, advantages: torch.Tensor | None
) -> Sequences | None:
    """The sequences of all ranks, of which `advantages` [B] were computed from rewards, or given.

    None where the ranks told each other the sums alone.
    """
    if shared.groups is None or shared.lengths is None:
        return None
    lengths = shared.lengths
    contributing = shared.groups.rewards
    if advantages is not None:
        contributing = lengths * (advantages != 0)
    contributing = contributing.to(lengths.dtype)
    return Sequences(lengths, contributing, prompts_of(shared.groups, spec), lengths.shape[0])


class Scope(NamedTuple):
    """How a batch is counted.

    Attributes:
        spec: the loss, which needs it.
        groups: rewards, or who belongs together; None if there are neither.
        shared: what other ranks told, or None.
        normalizer: the denominator, if one was given, or told by all ranks; else None.
    """

    spec: LossSpec
    groups: GroupInputs | None
    shared: Shared | None
    normalizer: torch.Tensor | float | None

    def found(
        self, batch: Batch, tokens: torch.Tensor | None, advantages: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Weights of the batch's sequences [B] (or None), and its denominator [], in float64.

        `advantages` are those of all ranks, if they come from rewards; the batch has its own.
        """
        spec, shared, count = self.spec, self.shared, self.normalizer
        assert batch.advantages is not None
        device = batch.advantages.device
        whole = None if shared is None else of_all_ranks(shared, spec, advantages)
        if whole is None or shared is None:
            own = sequences_of(batch, tokens, spec, self.groups)
            weights = own.weights()
            count = own.denominator(spec) if count is None else count
        else:
            weights = whole.weights()
            weights = None if weights is None else weights[shared.own].to(device)
            if shared.normalizer is not None:
                count = whole.denominator(spec) / shared.n_ranks
            elif count is None:
                count = whole.of_rows(shared.own).denominator(spec)
        return weights, scalar(count, accumulator_dtype(device), device)


def weighted(
    batch: Batch, tokens: torch.Tensor, weights: torch.Tensor | None, dtype: torch.dtype
) -> Batch:
    """The batch whose tokens have the weights [B] of their sequences, in `dtype`."""
    if weights is None:
        return batch
    spread = Layout(tokens, batch).spread(weights.to(dtype))
    return replaced(batch, loss_weights=spread.expand(tokens.shape).contiguous())
