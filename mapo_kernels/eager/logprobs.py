"""The token loss on torch tensors: the fused kernel's numbers on any device, in float64 too."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mapo_kernels import config
from mapo_kernels.batch import Batch, TokenResults
from mapo_kernels.dtypes import result_dtype
from mapo_kernels.eager import formula
from mapo_kernels.eager.advantages import eager_advantages
from mapo_kernels.formula import GROUP_METRICS, LARGEST, SLOTS
from mapo_kernels.groups import group_metrics
from mapo_kernels.layout import Layout, loss_denominator
from mapo_kernels.spec import AdvantageSpec, LossSpec


class _Chunk(NamedTuple):
    """What some sequences contribute: sums in the order of `RESULTS`, the largest, gradient."""

    sums: torch.Tensor
    largest: torch.Tensor
    grad: torch.Tensor


def _score_chunk(
    logprobs: torch.Tensor,
    inputs: Batch,
    advantages: torch.Tensor,
    spec: LossSpec,
    dtype: torch.dtype,
    need_grad: bool,
) -> _Chunk:
    """Apply the formula to some sequences; `advantages` are theirs, [b] or per token."""
    layout = Layout(logprobs, inputs)

    def clean(x: torch.Tensor | None, where: torch.Tensor, default: torch.Tensor) -> torch.Tensor:
        # Whatever lies at a token that is not scored, NaN included, stays out of every sum.
        return default if x is None else x.to(dtype).where(where, 0.0)

    advantage = advantages if inputs.per_token else layout.spread(advantages)
    weight = clean(inputs.token_weights, layout.valid, layout.valid.to(dtype))
    scored = layout.contributing(spec, advantage, weight)
    advantage = formula.signal_behind_weight(advantage.to(dtype).where(scored, 0.0), weight)
    logp = clean(logprobs, scored, advantage)
    old = clean(inputs.old_logprobs, scored, logp)
    ref = clean(inputs.ref_logprobs, scored, logp)
    entropy = clean(inputs.entropy, scored, torch.zeros_like(logp))
    if inputs.rollout_logprobs is not None:
        rollout = clean(inputs.rollout_logprobs, scored, logp)
        weight = weight * formula.rollout_weight(old, rollout, float(spec.rollout_cap or 0.0))

    n_valid = layout.n_valid().to(dtype)
    log_ratio = logp - old
    level_ratio = log_ratio
    if spec.importance_level == "sequence":
        mean = layout.sum(log_ratio) / n_valid.clamp(min=1.0)
        level_ratio = layout.spread(mean).where(scored, 0.0)
    found = formula.token_loss(
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
    metrics = formula.token_metrics(found, log_ratio, entropy, scored)
    if inputs.loss_weights is not None:
        factor = clean(inputs.loss_weights, scored, logp)
        loss, d_log_ratio, d_logp = loss * factor, d_log_ratio * factor, d_logp * factor
    divisor = layout.divisor(spec).to(dtype)
    grad = logprobs.new_empty(0, dtype=dtype)
    if need_grad:
        if spec.importance_level == "sequence":
            slope = layout.sum(d_log_ratio.where(scored, 0.0)) / n_valid.clamp(min=1.0)
            d_log_ratio = layout.spread(slope)
        grad = ((d_log_ratio + d_logp) / layout.spread(divisor)).where(scored, 0.0)
    values = [x.to(dtype).where(scored, 0.0) for x in metrics]
    sums = [
        (layout.sum(loss.where(scored, 0.0)) / divisor).sum(),
        n_valid.sum(),
        *(x.sum() for x in (scored.to(dtype), *values[: -len(LARGEST)])),
    ]
    # An empty batch has no largest; a leading 0 stands in for it.
    flat = [torch.nn.functional.pad(x.reshape(-1), (1, 0)) for x in values[-len(LARGEST) :]]
    return _Chunk(torch.stack(sums), torch.stack([x.amax() for x in flat]), grad)


def _chunks(logprobs: torch.Tensor, inputs: Batch) -> list[slice]:
    """Rows of a padded batch that fit the cache together; none where the batch is one chunk."""
    # Tracing must not count chunks: a graph would hold for one number of rows.
    if torch.compiler.is_compiling() or inputs.cu_seqlens is not None or logprobs.is_cuda:
        return []
    n_rows, length = logprobs.shape
    rows = max(1, config.EAGER.chunk_tokens // max(length, 1))
    return [slice(first, first + rows) for first in range(0, n_rows, rows)]


def eager_token_loss(
    logprobs: torch.Tensor,
    inputs: Batch,
    spec: LossSpec,
    advantage_spec: AdvantageSpec,
    need_grad: bool,
    out: None = None,
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
    denominator = loss_denominator(inputs, spec, inputs.n_sequences(logprobs), active)
    # What is said of no scored token is NaN.
    means = [x / scored for x in sums]
    largest = torch.stack([part.largest for part in parts]).amax(0).where(scored > 0, torch.nan)
    values = [1.0 / denominator, active, scored, *means, *largest, *group_values]
    results = torch.stack(values + [torch.zeros_like(active)] * (SLOTS - len(values)))
    grad = parts[0].grad if len(parts) == 1 else torch.cat([part.grad for part in parts])
    return TokenResults(total / denominator, results, computed, grad)
