"""Named shapes of RL training steps: model heads, batches, and which tokens of them matter."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

# Spread of answer lengths: a heavy tail up to the limit, as reasoning models have.
LENGTH_SIGMA = 0.6


@dataclass(frozen=True)
class Head:
    """An lm_head: hidden size H, vocabulary V, Gemma's cap on logits where there is one."""

    name: str
    width: int
    vocab: int
    softcap: float | None = None


# Of levels without a vocabulary.
NO_HEAD = Head("", 0, 0)
HEADS = {
    head.name: head
    for head in (
        Head("Qwen3-0.6B", 1024, 151936),
        Head("Qwen2.5-7B", 3584, 152064),
        Head("Llama-3-8B", 4096, 128256),
        Head("Gemma-2-9B", 3584, 256000, softcap=30.0),
        Head("laptop", 256, 32000),
        Head("laptop with softcap", 256, 32000, softcap=30.0),
    )
}
GROUP_SIZES = (8, 12, 16)
PADDING = (0.4, 0.5, 0.6)
NO_SIGNAL = (0.0, 0.3, 0.6)


@dataclass(frozen=True)
class Batch:
    """B answers padded to T tokens, in groups of G; shares of padding and of silent groups.

    A silent group's rewards are all equal: its advantages are 0, its tokens change nothing.
    """

    n_sequences: int
    length: int
    group_size: int = 16
    padding: float = 0.0
    no_signal: float = 0.0

    @property
    def tokens(self) -> int:
        """Positions, padding included."""
        return self.n_sequences * self.length

    def tiny(self) -> Batch:
        """The same batch where every kernel is interpreted: a few tokens."""
        return replace(self, n_sequences=2 * self.group_size, length=min(self.length, 3))


def lengths(batch: Batch, generator: torch.Generator) -> torch.Tensor:
    """Answer lengths [B] in 1..T: log-normal, cut at T, whose mean leaves the batch's padding."""
    if batch.padding == 0:
        return torch.full((batch.n_sequences,), batch.length)
    quantiles = (torch.arange(batch.n_sequences) + 0.5) / batch.n_sequences
    shape = torch.exp(LENGTH_SIGMA * torch.special.ndtri(quantiles.double()))

    def scaled(log_scale: float) -> torch.Tensor:
        return (shape * math.exp(log_scale)).clamp(1, batch.length)

    low, high = 0.0, math.log(batch.length) + 10
    for _ in range(60):
        middle = (low + high) / 2
        too_long = float(scaled(middle).mean()) > (1 - batch.padding) * batch.length
        low, high = (low, middle) if too_long else (middle, high)
    order = torch.randperm(batch.n_sequences, generator=generator)
    return scaled(low).round().long()[order]


def rewards(batch: Batch, generator: torch.Generator) -> torch.Tensor:
    """Rewards [B] of 0 and 1, groups contiguous: the batch's share silent, the others mixed."""
    n_groups, size = batch.n_sequences // batch.group_size, batch.group_size
    successes = torch.randint(1, size, (n_groups, 1), generator=generator)
    found = (torch.arange(size) < successes).float()
    silent = torch.randperm(n_groups, generator=generator)[: round(batch.no_signal * n_groups)]
    found[silent] = (silent % 2).float()[:, None].expand(-1, size)
    return found.flatten()
