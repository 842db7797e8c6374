"""The token loss on torch tensors: the fused kernel's numbers on any device, in float64 too."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mapo_kernels import twin
from mapo_kernels.advantages import (
    accumulator_dtype,
    eager_advantages,
    group_metrics,
    result_dtype,
)
from mapo_kernels.formula import LARGEST
from mapo_kernels.inputs import GROUP_METRICS, SLOTS, TokenInputs, TokenResults
from mapo_kernels.spec import AdvantageSpec, LossSpec
from mapo_kernels.sums import row_sum

# Some hundred elementwise operations touch every token: chunks that stay in the cache are more than
# twice as fast on a CPU as 4M tokens at once.
_CHUNK_TOKENS = 1 << 18


class TokenLayout:
    """Which tokens are live, and how to go between tokens and sequences, padded or packed."""

    def __init__(self, logprobs: torch.Tensor, inputs: TokenInputs) -> None:
        """Of `logprobs`, only the shape and the device matter."""
        self.n_sequences = inputs.n_sequences(logprobs)
        self._sequence: torch.Tensor | None = None
        live = torch.ones_like(logprobs, dtype=torch.bool)
        if inputs.cu_seqlens is not None:
            positions = torch.arange(logprobs.shape[0], device=logprobs.device)
            bounds = inputs.cu_seqlens.to(positions.dtype)
            sequence = torch.searchsorted(bounds[1:].contiguous(), positions, right=True)
            live = (positions >= bounds[0]) & (positions < bounds[-1])
            self._sequence = sequence.clamp(max=self.n_sequences - 1)
        self.live = live if inputs.mask is None else live & (inputs.mask != 0)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of a token tensor over each sequence, [B]."""
        if self._sequence is None:
            return row_sum(x)
        wide = x.to(accumulator_dtype(x.device))
        return wide.new_zeros(self.n_sequences).index_add(0, self._sequence, wide).to(x.dtype)

    def n_live(self) -> torch.Tensor:
        """Live tokens of each sequence, [B] float32: exact up to 2^24."""
        return self.sum(self.live.to(torch.float32))

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """Values of sequences [B] in a shape that broadcasts against token tensors."""
        return x[:, None] if self._sequence is None else x[self._sequence]


class _Chunk(NamedTuple):
    """What some sequences contribute: sums in the order of `RESULTS`, the largest, gradient."""

    sums: torch.Tensor
    largest: torch.Tensor
    grad: torch.Tensor


def length_weight(layout: TokenLayout, spec: LossSpec, length: int) -> torch.Tensor:
    """What each sequence's token losses are divided by, [B], beside the batch's denominator."""
    n_live = layout.n_live().clamp(min=1.0)
    return twin.sequence_divisor(n_live, spec.fixed_length(length), spec.kind)


def entropy_weights(
    layout: TokenLayout, inputs: TokenInputs, spec: LossSpec, like: torch.Tensor
) -> torch.Tensor | None:
    """Weight of each token's entropy bonus, the shape of the tokens; None if there is no bonus.

    Before the batch's denominator, in the dtype of `like`.
    """
    if spec.entropy_coef == 0:
        return None
    shape = layout.live.shape
    divisor = length_weight(layout, spec, shape[-1]).to(like.dtype)
    weights = layout.spread(spec.entropy_coef / divisor).expand(shape).contiguous()
    return weights if inputs.loss_weights is None else weights * inputs.loss_weights


def denominator_of(
    inputs: TokenInputs, spec: LossSpec, n_sequences: int, active: torch.Tensor
) -> torch.Tensor:
    """The batch's denominator []; `active` [] is its number of live tokens."""
    denominator = inputs.denominator(spec, n_sequences)
    if denominator is None:
        denominator = active
    elif isinstance(denominator, torch.Tensor):
        denominator = denominator.to(active.dtype).reshape(())
    else:
        denominator = torch.full_like(active, denominator)
    return twin.loss_denominator(denominator, active)


def scored_tokens(
    layout: TokenLayout, advantage: torch.Tensor, weight: torch.Tensor, spec: LossSpec
) -> torch.Tensor:
    """Which tokens can change the loss, its gradient, or a metric that was asked for."""
    if spec.needs_every_token:
        return layout.live
    with_signal = layout.live & (advantage != 0) & (weight != 0)
    if spec.importance_level == "token":
        return with_signal
    # Every token moves its sequence's ratio, so a sequence is scored whole or not at all.
    in_sequence = layout.sum(with_signal.to(advantage.dtype)) > 0
    return layout.live & layout.spread(in_sequence)


def _score_chunk(
    logprobs: torch.Tensor,
    inputs: TokenInputs,
    advantages: torch.Tensor,
    spec: LossSpec,
    dtype: torch.dtype,
    need_grad: bool,
) -> _Chunk:
    """Apply the formula to some sequences; `advantages` are theirs, [b] or per token."""
    layout = TokenLayout(logprobs, inputs)

    def clean(x: torch.Tensor | None, where: torch.Tensor, default: torch.Tensor) -> torch.Tensor:
        # Whatever lies at a token that is not scored, NaN included, stays out of every sum.
        return default if x is None else x.to(dtype).where(where, 0.0)

    advantage = advantages if inputs.per_token else layout.spread(advantages)
    weight = clean(inputs.token_weights, layout.live, layout.live.to(dtype))
    scored = scored_tokens(layout, advantage, weight, spec)
    advantage = twin.signal_behind_weight(advantage.to(dtype).where(scored, 0.0), weight)
    logp = clean(logprobs, scored, advantage)
    old = clean(inputs.old_logprobs, scored, logp)
    ref = clean(inputs.ref_logprobs, scored, logp)
    entropy = clean(inputs.entropy, scored, torch.zeros_like(logp))
    if inputs.rollout_logprobs is not None:
        rollout = clean(inputs.rollout_logprobs, scored, logp)
        weight = weight * twin.rollout_weight(old, rollout, float(spec.rollout_cap or 0.0))

    n_live = layout.n_live().to(dtype)
    log_ratio = logp - old
    level_ratio = log_ratio
    if spec.importance_level == "sequence":
        mean = layout.sum(log_ratio) / n_live.clamp(min=1.0)
        level_ratio = layout.spread(mean).where(scored, 0.0)
    found = twin.token_loss(
        logp,
        level_ratio,
        None if inputs.ref_logprobs is None else ref,
        advantage,
        weight,
        entropy if inputs.entropy is not None and spec.entropy_coef else None,
        spec.numbers,
        spec.kind,
    )
    loss, d_log_ratio, d_logp = found.loss, found.d_log_ratio, found.d_logp
    metrics = twin.token_metrics(found, log_ratio, entropy, scored)
    if inputs.loss_weights is not None:
        factor = clean(inputs.loss_weights, scored, logp)
        loss, d_log_ratio, d_logp = loss * factor, d_log_ratio * factor, d_logp * factor
    divisor = length_weight(layout, spec, logprobs.shape[-1]).to(dtype)
    grad = logprobs.new_empty(0, dtype=dtype)
    if need_grad:
        if spec.importance_level == "sequence":
            slope = layout.sum(d_log_ratio.where(scored, 0.0)) / n_live.clamp(min=1.0)
            d_log_ratio = layout.spread(slope)
        grad = ((d_log_ratio + d_logp) / layout.spread(divisor)).where(scored, 0.0)
    values = [x.to(dtype).where(scored, 0.0) for x in metrics]
    sums = [
        (layout.sum(loss.where(scored, 0.0)) / divisor).sum(),
        n_live.sum(),
        *(x.sum() for x in (scored.to(dtype), *values[: -len(LARGEST)])),
    ]
    # An empty batch has no largest; a leading 0 stands in for it.
    flat = [torch.nn.functional.pad(x.reshape(-1), (1, 0)) for x in values[-len(LARGEST) :]]
    return _Chunk(torch.stack(sums), torch.stack([x.amax() for x in flat]), grad)


def _chunks(logprobs: torch.Tensor, inputs: TokenInputs) -> list[slice]:
    """Rows of a padded batch that fit the cache together; none where the batch is one chunk."""
    # Tracing must not count chunks: a graph would hold for one number of rows.
    if torch.compiler.is_compiling() or inputs.cu_seqlens is not None or logprobs.is_cuda:
        return []
    n_rows, length = logprobs.shape
    rows = max(1, _CHUNK_TOKENS // max(length, 1))
    return [slice(first, first + rows) for first in range(0, n_rows, rows)]


def eager_token_loss(
    logprobs: torch.Tensor,
    inputs: TokenInputs,
    spec: LossSpec,
    advantage_spec: AdvantageSpec,
    need_grad: bool,
) -> TokenResults:
    """What the token loss kernel computes; see `TokenResults` for what comes back."""
    dtype = result_dtype(logprobs)
    computed = logprobs.new_empty(0, dtype=dtype)
    group_values = [logprobs.new_zeros((), dtype=dtype)] * len(GROUP_METRICS)
    if inputs.groups is not None:
        computed, table = eager_advantages(inputs.groups, advantage_spec)
        group_values = [x.to(dtype) for x in group_metrics(table)]
    given = computed if inputs.advantages is None else inputs.advantages
    pieces = _chunks(logprobs, inputs)
    if len(pieces) <= 1:
        parts = [_score_chunk(logprobs, inputs, given, spec, dtype, need_grad)]
    else:
        parts = [
            _score_chunk(logprobs[r], inputs.of_rows(r), given[r], spec, dtype, need_grad)
            for r in pieces
        ]
    total, active, scored, *sums = torch.stack([part.sums for part in parts]).sum(0)
    denominator = denominator_of(inputs, spec, inputs.n_sequences(logprobs), active)
    # What is said of no scored token is NaN.
    means = [x / scored for x in sums]
    largest = torch.stack([part.largest for part in parts]).amax(0).where(scored > 0, torch.nan)
    values = [1.0 / denominator, active, scored, *means, *largest, *group_values]
    results = torch.stack(values + [torch.zeros_like(active)] * (SLOTS - len(values)))
    grad = parts[0].grad if len(parts) == 1 else torch.cat([part.grad for part in parts])
    return TokenResults(total / denominator, results, computed, grad)
