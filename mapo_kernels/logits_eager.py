"""The logits level on torch tensors: chunks of rows, one float32 temporary, any device, float64."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mapo_kernels import twin
from mapo_kernels.inputs import RowInputs

# Logits that a chunk holds in float32: a few megabytes, which stay in a CPU's cache.
_CHUNK_LOGITS = 1 << 20


class _Rows:
    """The rows of [.., V] logits that are not masked, by chunks of bounded size."""

    def __init__(self, logits: torch.Tensor, rows: RowInputs, mask: torch.Tensor | None) -> None:
        self._logits, self._rows, self._mask = logits, rows, mask
        self._shape = rows.token_ids.shape
        self._vocab = logits.shape[-1]
        self.n = rows.token_ids.numel()

    def chunks(self, temporaries: int) -> Iterator[tuple[torch.Tensor, ...]]:
        """Positions [n] in the flattened batch, and index tensors of these rows, per chunk.

        Tracing sees the whole batch as one chunk of rows that are all live: how many are is not
        known to it, and it plans the memory itself.
        """
        live = torch.arange(self.n, device=self._logits.device)
        step = max(1, self.n)
        if not torch.compiler.is_compiling():
            if self._mask is not None:
                live = live[self._mask.reshape(-1) != 0]
            step = max(1, _CHUNK_LOGITS // (temporaries * self._vocab))
        for positions in live.split(step):
            yield positions, *self.index(positions)

    def index(self, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Index tensors of rows by their positions in the flattened batch."""
        if len(self._shape) == 1:
            return (positions,)
        return positions // self._shape[1], positions % self._shape[1]

    def tempered(self, index: tuple[torch.Tensor, ...], dtype: torch.dtype) -> torch.Tensor:
        """A copy of some rows over their temperature, [n, V]."""
        x = self._logits[index].to(dtype)
        temperature = self._rows.temperature
        if isinstance(temperature, torch.Tensor):
            return x.div_(temperature.to(dtype)[index[0]][:, None])
        return x if temperature == 1.0 else x.div_(temperature)

    def inverse_temperature(
        self, index: tuple[torch.Tensor, ...], dtype: torch.dtype
    ) -> torch.Tensor | float:
        """Its inverse, a number or [n]."""
        temperature = self._rows.temperature
        if isinstance(temperature, torch.Tensor):
            return 1.0 / temperature.to(dtype)[index[0]]
        return 1.0 / temperature

    def targets(self, index: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids [n, 1], 0 for those that do not exist, and which of them do, [n]."""
        ids = self._rows.token_ids[index].long()
        known = (ids >= 0) & (ids < self._vocab)
        return ids.where(known, 0)[:, None], known


def _dtype(logits: torch.Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def eager_scores(
    logits: torch.Tensor, rows: RowInputs, mask: torch.Tensor | None, columns: int
) -> torch.Tensor:
    """What `launch_scores` computes; the table's rows differ from it past the first two."""
    dtype = _dtype(logits)
    pieces = _Rows(logits, rows, mask)
    table = logits.new_zeros((columns, pieces.n), dtype=dtype)
    for positions, *index in pieces.chunks(1):
        table[:, positions] = _score_chunk(pieces, tuple(index), dtype, columns)
    if mask is not None and torch.compiler.is_compiling():
        table = table.where(mask.reshape(-1) != 0, 0.0)
    return table


def _score_chunk(
    pieces: _Rows, index: tuple[torch.Tensor, ...], dtype: torch.dtype, columns: int
) -> torch.Tensor:
    x = pieces.tempered(index, dtype)
    token, known = pieces.targets(index)
    target = x.gather(1, token).squeeze(1)
    # The target is kept apart from the sums: see `formula.row_summary`.
    x.scatter_(1, token, -torch.inf)
    top = torch.maximum(x.amax(1), target)
    others = x.sub_(top[:, None]).exp_().sum(1)
    weighted = torch.zeros_like(others)
    if columns > 1:
        weighted = -torch.special.entr(x, out=x).sum(1)
    logp, rest, total, entropy = twin.row_summary(others, weighted, target - top)
    return torch.stack([logp.where(known, torch.nan), entropy, top, total, rest][:columns])


def eager_gradient(
    logits: torch.Tensor,
    out: torch.Tensor,
    rows: RowInputs,
    mask: torch.Tensor | None,
    table: torch.Tensor,
    slope: torch.Tensor,
    bonus: torch.Tensor | None,
    results: torch.Tensor,
) -> None:
    """What `launch_gradient` writes."""
    dtype = _dtype(logits)
    pieces = _Rows(logits, rows, mask)
    for positions, *index in pieces.chunks(1 if bonus is None else 2):
        factor = results[0] * pieces.inverse_temperature(tuple(index), dtype)
        g = slope.reshape(-1)[positions] * factor
        b = None if bonus is None else bonus.reshape(-1)[positions] * factor
        out[tuple(index)] = _gradient_chunk(pieces, tuple(index), table[:, positions], g, b).to(
            out.dtype
        )
    if mask is not None:
        out.masked_fill_((mask == 0)[..., None], 0.0)


def _gradient_chunk(
    pieces: _Rows,
    index: tuple[torch.Tensor, ...],
    table: torch.Tensor,
    g: torch.Tensor,
    bonus: torch.Tensor | None,
) -> torch.Tensor:
    """g (1[j = y] - p_j) + bonus p_j (log p_j + H), the target's column from 1 - p."""
    logp, entropy, top, total, rest = table.unbind(0)
    token, _ = pieces.targets(index)
    p = pieces.tempered(index, table.dtype).sub_(top[:, None]).exp_().div_(total[:, None])
    at_target = g * rest
    if bonus is None:
        p.mul_(-g[:, None])
    else:
        # p log p is 0 where p is.
        p_log_p = torch.special.entr(p).neg_()
        at_target = at_target + bonus * twin.exp(logp) * (logp.clamp(min=-1e30) + entropy)
        p.mul_((bonus * entropy - g)[:, None]).addcmul_(p_log_p, bonus[:, None])
    return p.scatter_(1, token, at_target[:, None])
