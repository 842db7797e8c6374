"""The logits level on torch tensors: chunks of rows, one float32 temporary, any device, float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from mapo_kernels import config
from mapo_kernels.batch import RowInputs
from mapo_kernels.dtypes import result_dtype
from mapo_kernels.eager import formula
from mapo_kernels.eager.compiled import fused
from mapo_kernels.eager.sums import row_sum

_Index = tuple[torch.Tensor, ...]
_Sums = tuple[torch.Tensor, ...]


def _is_matrix(x: torch.Tensor) -> bool:
    """Whether the rows of [.., V] are those of a matrix, from which they are copied much faster."""
    return x.dim() == 2 or x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)


class _Rows:
    """The rows of [.., V] logits that are not masked, by chunks of bounded size."""

    def __init__(self, logits: torch.Tensor, rows: RowInputs, mask: torch.Tensor | None) -> None:
        self._logits, self._rows, self._mask = logits, rows, mask
        self._shape = rows.token_ids.shape
        self._vocab = logits.shape[-1]
        self._is_matrix = _is_matrix(logits)
        self.n = rows.token_ids.numel()

    def chunks(self, temporaries: int) -> Iterator[tuple[torch.Tensor, _Index]]:
        """Positions [n] in the flattened batch, and index tensors of these rows, per chunk.

        Tracing sees the whole batch as one chunk of rows that are all live: how many are is not
        known to it, and it plans the memory itself.
        """
        live = torch.arange(self.n, device=self._logits.device)
        if torch.compiler.is_compiling():
            yield live, self._index(live)
            return
        if self._mask is not None:
            live = live[self._mask.reshape(-1) != 0]
        for positions in live.split(
            max(1, config.EAGER.chunk_logits // (temporaries * self._vocab))
        ):
            yield positions, self._index(positions)

    def _index(self, positions: torch.Tensor) -> _Index:
        if len(self._shape) == 1:
            return (positions,)
        return positions // self._shape[1], positions % self._shape[1]

    def tempered(self, positions: torch.Tensor, index: _Index, dtype: torch.dtype) -> torch.Tensor:
        """A copy of some rows over their temperature, [n, V]."""
        if self._is_matrix:
            x = self._logits.view(-1, self._vocab).index_select(0, positions).to(dtype)
        else:
            x = self._logits[index].to(dtype)
        temperature = self._rows.temperature
        if isinstance(temperature, torch.Tensor):
            return x.div_(temperature.to(dtype)[index[0]][:, None])
        return x if temperature == 1.0 else x.div_(temperature)

    def inverse_temperature(self, index: _Index, dtype: torch.dtype) -> torch.Tensor | float:
        """Its inverse, a number or [n]."""
        temperature = self._rows.temperature
        if isinstance(temperature, torch.Tensor):
            return 1.0 / temperature.to(dtype)[index[0]]
        return 1.0 / temperature

    def targets(self, index: _Index) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids [n, 1], 0 for those that do not exist, and which of them do, [n]."""
        ids = self._rows.token_ids[index].long()
        known = (ids >= 0) & (ids < self._vocab)
        return ids.where(known, 0)[:, None], known


def eager_scores(
    logits: torch.Tensor, rows: RowInputs, mask: torch.Tensor | None, columns: int, out: None = None
) -> torch.Tensor:
    """What `launch_scores` computes; the table's rows differ from it past the first two."""
    return _tabulate(logits, rows, mask, columns, columns > 1, scores_of)


def eager_shares(
    logits: torch.Tensor, rows: RowInputs, mask: torch.Tensor | None, columns: int, out: None = None
) -> torch.Tensor:
    """What `launch_shares` computes, but for the unit of the references: nats."""
    return _tabulate(logits, rows, mask, columns, columns > 3, shares_of)


def _tabulate(
    logits: torch.Tensor,
    rows: RowInputs,
    mask: torch.Tensor | None,
    columns: int,
    with_entropy: bool,
    entries: Callable[[_Sums, torch.Tensor], _Sums],
) -> torch.Tensor:
    """Table [columns, rows] of the first of the rows' `entries`; 0 where masked."""
    dtype = result_dtype(logits)
    pieces = _Rows(logits, rows, mask)
    table = logits.new_zeros((columns, pieces.n), dtype=dtype)
    for positions, index in pieces.chunks(2 if with_entropy else 1):
        x = pieces.tempered(positions, index, dtype)
        token, known = pieces.targets(index)
        table[:, positions] = _tabulated(x, token, known, columns, with_entropy, entries)
        del x  # before the next chunk is there
    if mask is not None and torch.compiler.is_compiling():
        table = table.where(mask.reshape(-1) != 0, 0.0)
    return table


@fused
def _tabulated(
    x: torch.Tensor,
    token: torch.Tensor,
    known: torch.Tensor,
    columns: int,
    with_entropy: bool,
    entries: Callable[[_Sums, torch.Tensor], _Sums],
) -> torch.Tensor:
    """The first `columns` entries of the rows x [n, V], which are overwritten."""
    if torch.compiler.is_compiling():
        # What is overwritten would be written back.
        x = x.clone()
    return torch.stack(entries(_sums(x, token, known, with_entropy), known)[:columns])


def _sums(x: torch.Tensor, token: torch.Tensor, known: torch.Tensor, with_entropy: bool) -> _Sums:
    """As `formula.row_summary` takes them: reference, others, gap, weighted, tail of x [n, V].

    `x` is overwritten. Where the target is not `known`, it is none of the columns.
    """
    column = x.gather(1, token).squeeze(1)
    target = column.where(known, -torch.inf)
    # The target is kept apart from the sums: see `formula.row_summary`.
    x.scatter_(1, token, column.masked_fill(known, -torch.inf)[:, None])
    # The lowest number stands for a row of -inf, from which -inf cannot be taken.
    top = torch.maximum(x.amax(1), target).clamp(min=torch.finfo(x.dtype).min)
    gap = target - top
    x.sub_(top[:, None])
    if not with_entropy:
        others = row_sum(x.exp_())
        return top, others, gap, torch.zeros_like(others), others
    # e^-inf times -inf is meant to be 0.
    powers = x.clamp_(min=-1e30).exp()
    others = row_sum(powers)
    tail = _tail(powers, others, gap)
    return top, others, gap, row_sum(powers.mul_(x)), tail


def _tail(powers: torch.Tensor, others: torch.Tensor, gap: torch.Tensor) -> torch.Tensor:
    """The others without the largest, whose power is 1: right in rows that are certain of it."""
    if torch.compiler.is_compiling():
        return powers.masked_fill(powers == 1.0, 0.0).sum(1)
    tail = others - 1.0
    rare = formula.certain_elsewhere(others, gap).nonzero().squeeze(1)
    if rare.shape[0]:
        rows = powers[rare]
        tail[rare] = row_sum(rows.masked_fill_(rows == 1.0, 0.0))
    return tail


def shares_of(sums: _Sums, known: torch.Tensor) -> _Sums:
    """Reference, the others' sum, gap of the target, entropy of the others."""
    top, others, gap, weighted, tail = sums
    log_others = formula.log1p(tail).where(formula.certain_elsewhere(others, gap), others.log())
    # Others so rare have next to no part in the entropy of the row.
    entropy = (log_others - weighted / others).where(others > 1e-37, 0.0)
    return top, others, gap, entropy


def scores_of(sums: _Sums, known: torch.Tensor) -> _Sums:
    """Log-prob, entropy, reference, sum over all columns, probability of the others."""
    top, others, gap, weighted, tail = sums
    logp, rest, total, entropy = formula.row_summary(others, tail, weighted, gap)
    return logp.where(known, torch.nan), entropy, top, total, rest


def eager_gradient(
    logits: torch.Tensor,
    rows: RowInputs,
    mask: torch.Tensor | None,
    table: torch.Tensor,
    slope: torch.Tensor,
    bonus: torch.Tensor | None,
    results: torch.Tensor,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """What `launch_gradient` writes."""
    if out is None:
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    dtype = result_dtype(logits)
    pieces = _Rows(logits, rows, mask)
    flat = out.view(-1, out.shape[-1]) if _is_matrix(out) else None
    for positions, index in pieces.chunks(1 if bonus is None else 2):
        factor = results[0] * pieces.inverse_temperature(index, dtype)
        g = slope.reshape(-1)[positions] * factor
        b = None if bonus is None else bonus.reshape(-1)[positions] * factor
        x = pieces.tempered(positions, index, dtype)
        x = gradient_of(x, *pieces.targets(index), table[:, positions], g, b).to(out.dtype)
        if flat is not None:
            flat.index_copy_(0, positions, x)
        else:
            out[index] = x
        del x
    if mask is not None and flat is not None and not torch.compiler.is_compiling():
        flat.index_fill_(0, (mask.reshape(-1) == 0).nonzero().squeeze(1), 0.0)
    elif mask is not None:
        out.masked_fill_((mask == 0)[..., None], 0.0)
    return out


@fused
def gradient_of(
    x: torch.Tensor,
    token: torch.Tensor,
    known: torch.Tensor,
    table: torch.Tensor,
    g: torch.Tensor,
    bonus: torch.Tensor | None,
) -> torch.Tensor:
    """Gradient [n, V] as `rows_device.write_gradient` has it; `x` is overwritten."""
    if torch.compiler.is_compiling():
        x = x.clone()
    logp, entropy, top, total, rest = table.unbind(0)
    at_target = g * rest
    x.sub_(top[:, None])
    if bonus is None:
        x.exp_().mul_((-g / total)[:, None])
    else:
        at_target = at_target + bonus * formula.exp(logp) * (logp.clamp(min=-1e30) + entropy)
        powers = x.clamp_(min=-1e30).exp()
        flat = (bonus * (entropy - total.log()) - g) / total
        x.mul_((bonus / total)[:, None]).add_(flat[:, None]).mul_(powers)
    return x.scatter_(1, token, at_target.where(known, x.gather(1, token).squeeze(1))[:, None])
