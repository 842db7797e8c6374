"""Which tokens of a plan are live, and how many of them each sequence has, on the host."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from mapo_kernels.batch import Batch
from mapo_kernels.groups import Signal
from mapo_kernels.layout import Layout
from mapo_kernels.spec import LossSpec


class Source(NamedTuple):
    """Where a plan's tokens get their advantages: as of the fields of `Plan`."""

    advantages: torch.Tensor
    narrow: Signal | None
    per_token: bool

    def strength(self) -> torch.Tensor:
        """Not 0 where an advantage is not, be it of a float32 or of a float64 loss."""
        if self.narrow is None:
            return self.advantages
        return ((self.advantages != 0) | (self.narrow.advantages != 0)).to(torch.float32)


def spec_of_live(spec: LossSpec, per_token: bool, sequence_group: object) -> LossSpec:
    """What says which tokens here are live.

    Where tokens of a sequence have advantages of their own, another rank may know of its signal.
    """
    is_split = sequence_group is not None and per_token and spec.importance_level == "sequence"
    return replace(spec, score_all=True) if is_split else spec


def valid_tokens(mask: torch.Tensor) -> torch.Tensor:
    """Which tokens of a padded batch count, bool."""
    return mask if mask.dtype == torch.bool else mask != 0


def count_tokens(mask: torch.Tensor | None, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """Tokens of the batch that count, [] on the device."""
    if mask is not None:
        return Layout(mask, Batch(mask=mask, cu_seqlens=cu_seqlens)).valid.sum()
    assert cu_seqlens is not None
    return cu_seqlens[-1] - cu_seqlens[0]


def live_tokens(
    source: Source,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    spec: LossSpec,
    total: int,
) -> torch.Tensor:
    """Which tokens of the batch (`total` of them, if packed without a mask) are live."""
    tokens, advantages = mask, source.strength()
    if tokens is None:
        tokens = torch.ones(total, dtype=torch.bool, device=advantages.device)
    layout = Layout(tokens, Batch(mask=mask, cu_seqlens=cu_seqlens))
    if not source.per_token:
        advantages = layout.spread(advantages)
    return layout.contributing(spec, advantages, None)


def count_live(
    source: Source,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    spec: LossSpec,
    flag: torch.Tensor | None,
    n_valid: torch.Tensor | None,
) -> tuple[tuple[int, ...], tuple[int, ...] | None, bool]:
    """Live tokens of each sequence, the boundaries, a flag [1]: on the host, which waits once."""
    advantages = source.strength()
    told = [] if flag is None else [flag.to(advantages.device, torch.int64)]
    if cu_seqlens is None:
        if n_valid is None or source.per_token:
            n_valid = live_tokens(source, mask, None, spec, 0).sum(1)
        elif not spec.needs_every_token:
            n_valid = n_valid * (advantages != 0)
        numbers = (torch.cat([n_valid, *told]) if told else n_valid).tolist()
        n_sequences = n_valid.shape[0]
        return tuple(numbers[:n_sequences]), None, any(numbers[n_sequences:])
    n_sequences = cu_seqlens.shape[0] - 1
    if mask is None and not source.per_token:
        # How many tokens there are is not known yet, and not needed.
        matters = torch.ones_like(advantages, dtype=torch.bool)
        if not spec.needs_every_token:
            matters = advantages != 0
        counts = cu_seqlens.diff() * matters
    else:
        live = live_tokens(source, mask, cu_seqlens, spec, advantages.shape[0])
        sequences = Layout(live, Batch(cu_seqlens=cu_seqlens))
        counts = sequences.sum(live.to(torch.float32))
    numbers = torch.cat([counts.to(torch.int64), cu_seqlens.to(torch.int64), *told]).tolist()
    end = 2 * n_sequences + 1
    return tuple(numbers[:n_sequences]), tuple(numbers[n_sequences:end]), any(numbers[end:])
