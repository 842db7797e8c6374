"""Which columns of the vocabulary each token could have been sampled from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from mapo_kernels import config
from mapo_kernels.batch import Kept
from mapo_kernels.checks import validates_device_data
from mapo_kernels.dtypes import result_dtype
from mapo_kernels.spec import describe, require_number


class SamplingMask(NamedTuple):
    """The kept columns of every token of a batch, in compressed rows.

    Token n of the batch (row by row where it is padded) was sampled from columns
    `token_ids[offsets[n] : offsets[n + 1]]`, in any order, each once. A token without any keeps the
    whole vocabulary.

    Attributes:
        token_ids: [nnz] int32 or int64, in [0, V).
        offsets: [N + 1] int32 or int64, ascending from 0 to nnz.
    """

    token_ids: torch.Tensor
    offsets: torch.Tensor

    @property
    def n_tokens(self) -> int:
        """N, how many tokens the mask speaks of."""
        return self.offsets.shape[0] - 1

    @property
    def counts(self) -> torch.Tensor:
        """Kept columns of each token, [N]; 0 where it keeps the whole vocabulary."""
        return self.offsets[1:] - self.offsets[:-1]

    @classmethod
    def from_lists(
        cls, kept: Iterable[Sequence[int] | None], device: torch.device | str | None = None
    ) -> SamplingMask:
        """From a list of kept columns for each token; None or [] keeps the whole vocabulary."""
        lists = [list(x) if x is not None else [] for x in kept]
        counts = torch.tensor([len(x) for x in lists], dtype=torch.int64)
        ids = torch.tensor([i for x in lists for i in x], dtype=torch.int32)
        return cls.from_counts(ids.to(device), counts.to(device))

    @classmethod
    def from_counts(cls, token_ids: torch.Tensor, counts: torch.Tensor) -> SamplingMask:
        """From all kept columns [nnz], token by token, and how many each token has [N]."""
        return cls(token_ids, torch.nn.functional.pad(counts.long().cumsum(0), (1, 0)))

    @classmethod
    def from_logits(
        cls,
        logits: torch.Tensor,
        *,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        temperature: float = 1.0,
    ) -> SamplingMask:
        """What sampling from these logits [..., V] keeps, as the filters of transformers do it.

        They come in this order: the temperature; `top_k` (0 for all), which keeps whatever ties
        with the k-th; `top_p` of what is left, at least one column; columns at least `min_p` times
        as probable as the most probable one. A token that keeps all columns has none listed.
        """
        require_number("top_p", top_p, 0.0, 1.0, open_low=True)
        require_number("min_p", min_p, 0.0, 1.0)
        require_number("temperature", temperature, 0.0, open_low=True)
        if type(top_k) is not int or top_k < 0:
            raise ValueError(f"top_k: expected an integer of at least 0, got {describe(top_k)}")
        flat = logits.detach().reshape(-1, logits.shape[-1])
        rows = max(1, config.EAGER.chunk_logits // flat.shape[1])
        parts = [_kept(x, top_p, top_k, min_p, temperature) for x in flat.split(rows)]
        ids = torch.cat([x.nonzero()[:, 1] for x in parts]).int()
        return cls.from_counts(ids, torch.cat([x.sum(-1) for x in parts]))

    @classmethod
    def cat(cls, masks: Sequence[SamplingMask]) -> SamplingMask:
        """The tokens of several masks, one mask after the other."""
        ids = torch.cat([x.token_ids for x in masks])
        return cls.from_counts(ids, torch.cat([x.counts for x in masks]))

    def select(self, tokens: torch.Tensor | slice) -> SamplingMask:
        """The mask of some tokens: indices [n], a bool [N], or a slice. Waits for the device."""
        index = torch.arange(self.n_tokens, device=self.offsets.device)[tokens]
        counts = self.counts[index].long()
        starts = self.offsets[:-1][index] - (counts.cumsum(0) - counts)
        pairs = torch.repeat_interleave(starts, counts)
        pairs = pairs + torch.arange(pairs.shape[0], device=pairs.device)
        return self.from_counts(self.token_ids[pairs], counts)

    def to(self, device: torch.device | str) -> SamplingMask:
        """The same on another device."""
        return type(self)(self.token_ids.to(device), self.offsets.to(device))

    def resolve(self, token_ids: torch.Tensor, vocab: int) -> tuple[Kept | None, torch.Tensor]:
        """What computations take of a validated mask; and the ids, -1 where a token is not kept.

        Whatever the tensors hold, no index made from it is out of bounds. None where every token
        keeps the whole vocabulary and the host knows it.
        """
        n, nnz = token_ids.numel(), self.token_ids.shape[0]
        if n == 0 or nnz == 0:
            return None, token_ids
        bounds = self.offsets.long().clamp(0, nnz).cummax(0).values
        place = torch.arange(nnz, device=bounds.device)
        row = torch.searchsorted(bounds[1:].contiguous(), place, right=True)
        # What lies before the first token or behind the last is nobody's.
        is_known = (self.token_ids >= 0) & (self.token_ids < vocab) & (row < n)
        is_known &= place >= bounds[0]
        row = row.clamp(max=n - 1)
        columns = self.token_ids.long().where(is_known, -1)
        ids = token_ids.reshape(-1)
        counts = bounds.diff()
        is_target = ((columns == ids[row]) & is_known).to(torch.int32)
        is_kept = torch.zeros_like(counts, dtype=torch.int32).index_add_(0, row, is_target) > 0
        ids = ids.where((counts == 0) | is_kept, -1).view(token_ids.shape)
        return Kept(columns, row, bounds), ids


def _kept(
    logits: torch.Tensor, top_p: float, top_k: int, min_p: float, temperature: float
) -> torch.Tensor:
    """Which columns of [n, V] are listed, bool."""
    x = logits.to(result_dtype(logits)) / temperature
    kept = x > -torch.inf
    if 0 < top_k < x.shape[1]:
        kept &= x >= x.topk(top_k, dim=-1).values[:, -1:]
    if top_p < 1.0:
        ascending, order = x.masked_fill(~kept, -torch.inf).sort(dim=-1)
        is_dropped = ascending.softmax(-1).cumsum(-1) <= 1.0 - top_p
        is_dropped[:, -1] = False
        kept &= ~torch.zeros_like(kept).scatter_(1, order, is_dropped)
    if min_p > 0.0:
        p = x.masked_fill(~kept, -torch.inf).softmax(-1)
        kept &= p >= min_p * p.amax(-1, keepdim=True)
    return kept & ~kept.all(-1, keepdim=True)


def sequence_starts(
    mask: SamplingMask | None, n_sequences: int, bounds: tuple[int, ...] | None
) -> tuple[int, ...]:
    """Where in a mask each sequence begins, and the last one ends: on the host, which waits.

    `bounds` are those of the tokens of packed sequences; None for padded ones.
    """
    if mask is None:
        return ()
    if bounds is None:
        length = mask.n_tokens // max(1, n_sequences)
        bounds = tuple(i * length for i in range(n_sequences + 1))
    places = torch.tensor(bounds, device=mask.offsets.device).clamp(0, mask.n_tokens)
    return tuple(mask.offsets[places].tolist())


def cut(
    mask: SamplingMask, starts: Sequence[int], which: Sequence[int], counts: torch.Tensor
) -> tuple[SamplingMask, tuple[int, ...]]:
    """The mask of some sequences, whose tokens have these `counts`, and its own starts.

    Waits for nothing.
    """
    parts = [mask.token_ids[starts[i] : starts[i + 1]] for i in which]
    lengths = [starts[i + 1] - starts[i] for i in which]
    ids = torch.cat([mask.token_ids[:0], *parts])
    return SamplingMask.from_counts(ids, counts.reshape(-1)), tuple(accumulate(lengths, initial=0))


def check_sampling_mask(
    mask: object, n_tokens: int, device: torch.device, what: str = "tokens of the call"
) -> SamplingMask:
    """Validate types, shapes and devices of a mask for so many tokens; nothing is waited for."""
    if not isinstance(mask, SamplingMask):
        raise TypeError(f"sampling_mask: expected a SamplingMask or None, got {describe(mask)}")
    for name, x in zip(mask._fields, mask, strict=True):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"sampling_mask.{name}: expected a tensor, got {describe(x)}")
        if x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"sampling_mask.{name}: expected int32 or int64, got {x.dtype}")
        if x.dim() != 1:
            raise ValueError(f"sampling_mask.{name}: expected one dimension, got {list(x.shape)}")
        if x.device != device:
            raise ValueError(f"sampling_mask.{name}: expected {device}, got {x.device}")
    if mask.n_tokens != n_tokens:
        raise ValueError(
            f"sampling_mask.offsets: expected shape [{n_tokens + 1}] ({what} + 1), got "
            f"{list(mask.offsets.shape)}"
        )
    return mask


def one_of_both(given: SamplingMask | None, planned: SamplingMask | None) -> SamplingMask | None:
    """The mask of a call, which its plan may have; ValueError where both have one."""
    if given is not None and planned is not None:
        raise ValueError("sampling_mask: expected None with a plan that has one, got one")
    return planned if given is None else given


def resolved(
    mask: SamplingMask | None, token_ids: torch.Tensor, live: torch.Tensor | None, vocab: int
) -> tuple[Kept | None, torch.Tensor]:
    """What `SamplingMask.resolve` makes of the mask, if there is one, after `check_kept`."""
    if mask is None:
        return None, token_ids
    check_kept(mask, token_ids, live, vocab)
    return mask.resolve(token_ids, vocab)


def check_kept(
    mask: SamplingMask, token_ids: torch.Tensor, live: torch.Tensor | None, vocab: int
) -> None:
    """Under MAPO_KERNELS_VALIDATE=1, raise unless a mask keeps columns that exist, each once.

    And the sampled token, of every token that is `live` (all, if that is None).
    """
    if not validates_device_data():
        return
    ids, offsets = mask.token_ids.long(), mask.offsets.long()
    nnz = ids.shape[0]
    ends = [int(offsets[0]), int(offsets[-1])]
    if ends != [0, nnz] or bool((offsets.diff() < 0).any()):
        raise ValueError(
            f"sampling_mask.offsets: expected numbers that ascend from 0 to {nnz} (the length of "
            f"token_ids), got {offsets.tolist() if len(offsets) < 9 else ends}"
        )
    if nnz and not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
        raise ValueError(
            f"sampling_mask.token_ids: expected ids in [0, {vocab}), got {int(ids.min())} to "
            f"{int(ids.max())}"
        )
    row = torch.repeat_interleave(torch.arange(mask.n_tokens, device=ids.device), mask.counts)
    pairs, times = (row * vocab + ids).unique(return_counts=True)
    if bool((times > 1).any()):
        n, column = divmod(int(pairs[times > 1][0]), vocab)
        raise ValueError(f"sampling_mask: expected each id once, got {column} twice for token {n}")
    _, found = mask.resolve(token_ids, vocab)
    lost = (found != token_ids) & (token_ids >= 0)
    if live is not None:
        lost &= live != 0
    if bool(lost.any()):
        n = int(lost.reshape(-1).nonzero()[0])
        raise ValueError(
            f"sampling_mask: expected the sampled token among those that are kept, got none of "
            f"{int(token_ids.reshape(-1)[n])} for token {n}"
        )
