"""What a drawn call consists of, in one canonical form: padded [B, T], whatever the call's layout.

The oracle reads the canonical tensors; `Layout` turns them into those that a call takes, padded or
packed, and what comes back into canonical ones again.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import mapo_kernels as mk


@dataclass
class Layout:
    """Where the tokens of B sequences lie.

    Attributes:
        live: [B, T] bool, which tokens count.
        inside: [B, T] bool, which positions exist: all of them if padded.
        packed: whether sequences follow one another in one dimension.
        before: packed tokens that lie before the first sequence.
        after: packed tokens that lie after the last one.
        mask_dtype: of the mask that calls are given; None to give none.
        bounds_dtype: of cu_seqlens.
    """

    live: Tensor
    inside: Tensor
    packed: bool = False
    before: int = 0
    after: int = 0
    mask_dtype: torch.dtype | None = torch.bool
    bounds_dtype: torch.dtype = torch.int64

    @property
    def n_sequences(self) -> int:
        return self.live.shape[0]

    @property
    def length(self) -> int:
        return self.live.shape[1]

    @property
    def total(self) -> int:
        """Packed tokens, those of no sequence included."""
        return self.before + int(self.inside.sum()) + self.after

    def arrange(self, x: Tensor | None, outside: Any = 0) -> Tensor | None:
        """Canonical [B, T, ...] as a call takes it; `outside` lies at tokens of no sequence."""
        if x is None or not self.packed:
            return x
        shape = x.shape[2:]
        some = torch.as_tensor(outside).to(x.dtype)
        ends = [some.expand(n, *shape) for n in (self.before, self.after)]
        return torch.cat([ends[0], x[self.inside], ends[1]])

    def restore(self, x: Tensor | None) -> Tensor | None:
        """What a call returned, [B, T, ...] again; 0 where no token is."""
        if x is None or not self.packed:
            return x
        out = x.new_zeros(*self.inside.shape, *x.shape[1:])
        out[self.inside] = x[self.before : x.shape[0] - self.after]
        return out

    def strays(self, x: Tensor) -> Tensor:
        """What a call returned for packed tokens of no sequence."""
        if not self.packed:
            return x[:0]
        return torch.cat([x[: self.before], x[x.shape[0] - self.after :]])

    @property
    def cu_seqlens(self) -> Tensor | None:
        if not self.packed:
            return None
        ends = self.before + self.inside.sum(1).cumsum(0)
        return torch.cat([torch.tensor([self.before]), ends]).to(self.bounds_dtype)

    @property
    def mask(self) -> Tensor | None:
        """The mask of a call: what is not 0 counts, whatever its sign and size."""
        if self.mask_dtype is None:
            return None
        values = self.live.to(self.mask_dtype)
        if self.mask_dtype != torch.bool:
            values = values * (1 + torch.arange(self.length) % 7).to(self.mask_dtype)
        if self.mask_dtype.is_floating_point:
            values = -0.25 * values
        return self.arrange(values, 1)

    def arguments(self) -> dict[str, Tensor]:
        given = {"mask": self.mask, "cu_seqlens": self.cu_seqlens}
        return {k: v for k, v in given.items() if v is not None}


@dataclass
class Groups:
    """Rewards [B] and which of them belong together.

    Attributes:
        rewards: [B] or [B, K] in the dtype of the call.
        ids: [B] int64, the group of each row, however the call is told.
        arguments: how it is told: group_size or group_ids, and success where it is given.
        spec: the advantages that are wanted.
    """

    rewards: Tensor
    ids: Tensor
    arguments: dict[str, Any]
    spec: mk.AdvantageSpec


@dataclass
class Batch:
    """One loss call at the level of log-probs; canonical tensors [B, T], garbage where not read.

    Attributes:
        layout: where the tokens lie.
        spec: the loss.
        dtype: of log-probs, logits or hidden states.
        groups: rewards, or None where advantages are given.
        advantages: [B] or [B, T], or None.
        told: who belongs together, where the loss asks beside advantages: `Groups.arguments`.
        ids: [B] likewise, as `Groups.ids`.
        tensors: old_logprobs and so on, by argument name, each [B, T].
        normalizer: a number, a tensor, or None.
        upstream: gradient of the loss.
        constants: package constants that are by record and field of `config`.
        strided: whether the differentiated tensor is a slice of a larger one.
        logprobs: [B, T] at the level of log-probs.
        rows: what turns rows into log-probs at the other levels.
    """

    layout: Layout
    spec: mk.LossSpec
    dtype: torch.dtype
    groups: Groups | None = None
    advantages: Tensor | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    normalizer: float | Tensor | None = None
    upstream: float = 1.0
    constants: dict[tuple[str, str], int] = field(default_factory=dict)
    strided: bool = False
    logprobs: Tensor | None = None
    rows: Any = None
    told: dict[str, Any] = field(default_factory=dict)
    ids: Tensor | None = None

    @property
    def prompts(self) -> Tensor | None:
        """Which prompt each sequence answers, [B]; None where nobody knows."""
        return self.ids if self.groups is None else self.groups.ids


def lists_of(kept: Tensor | None) -> list[list[int]] | None:
    """What rows [..., V] keep, each as a list, the last column first; an empty one for all."""
    if kept is None:
        return None
    flat = kept.reshape(-1, kept.shape[-1])
    return [[] if row.all() else row.nonzero().squeeze(1).flip(0).tolist() for row in flat]


@dataclass
class Rows:
    """Rows of logits [B, T, V], or what makes them, and the tokens that were drawn from them.

    Attributes:
        ids: [B, T] integers.
        temperature: a number, or a tensor [B].
        logits: [B, T, V]; None at the hidden level.
        hidden: [B, T, H].
        weight: [V, H].
        bias: [V], or None.
        softcap: a number, or None.
        logit_scale: a number.
        options: what else the call is told: inplace, chunk_rows.
        frozen: names among hidden, weight and bias that take no gradient.
        kept: [B, T, V] bool, the columns that a token could have been sampled from; or None: all.
    """

    ids: Tensor
    temperature: float | Tensor = 1.0
    logits: Tensor | None = None
    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    kept: Tensor | None = None

    @property
    def vocab(self) -> int:
        return (self.weight.shape[0]) if self.logits is None else self.logits.shape[-1]
