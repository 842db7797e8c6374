"""The token loss on torch tensors: the fused kernel's numbers on any device, in float64 too."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mapo_kernels import config
from mapo_kernels.batch import Batch, TokenResults, replaced
from mapo_kernels.dtypes import result_dtype
from mapo_kernels.eager import formula
from mapo_kernels.eager.advantages import eager_advantages
from mapo_kernels.eager.compiled import fused
from mapo_kernels.eager.select import Only, only
from mapo_kernels.eager.sums import top, total
from mapo_kernels.formula import GROUP_METRICS, LARGEST, RESULTS, SLOTS, TokenMetrics
from mapo_kernels.groups import group_metrics
from mapo_kernels.layout import Layout, loss_denominator
from mapo_kernels.spec import SEQUENCE_OBJECTIVES, AdvantageSpec, LossSpec


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
    advantage = advantages if inputs.per_token else layout.spread(advantages)
    weight = inputs.token_weights
    if weight is not None:
        weight = only(weight.to(dtype), layout.valid)
    scored = layout.contributing(spec, advantage, weight)
    # Whatever lies at a token that is not scored, NaN included, stays out of every sum.
    kept = Only(scored, dtype)

    def clean(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else kept(x.to(dtype))

    advantage = kept(advantage.to(dtype))
    if weight is not None:
        advantage = formula.signal_behind_weight(advantage, weight)
    logp = kept(logprobs.to(dtype))
    old = logp if inputs.old_logprobs is None else kept(inputs.old_logprobs.to(dtype))
    ref, entropy = clean(inputs.ref_logprobs), clean(inputs.entropy)
    rollout = clean(inputs.rollout_logprobs)
    if rollout is not None:
        factor = formula.rollout_weight(old, rollout, spec.numbers.rollout_cap)
        weight = factor if weight is None else weight * factor

    n_valid = layout.n_valid().to(dtype)
    log_ratio = logp - old
    level_ratio = log_ratio
    clipped = None
    if spec.importance_level == "sequence":
        part = log_ratio
        if spec.objective in SEQUENCE_OBJECTIVES:
            part, low, high = formula.ratio_part(log_ratio, advantage, spec.numbers, spec.kind)
            clipped = low | high
        mean = layout.sum(part)
        if spec.objective != "vespo":
            mean = mean / n_valid.clamp(min=1.0)
        level_ratio = kept(layout.spread(mean))
    found = formula.token_loss(
        logp,
        old,
        level_ratio,
        log_ratio,
        ref,
        advantage,
        weight,
        entropy if spec.entropy_coef else None,
        spec.numbers,
        spec.kind,
    )
    metrics = formula.token_metrics(found, log_ratio, entropy, scored)
    if ref is None:
        metrics = replaced(metrics, ref_kl=None)
    loss, d_log_ratio, d_logp = found.loss, found.d_log_ratio, found.d_logp
    factor = clean(inputs.loss_weights)
    if factor is not None:
        loss, d_log_ratio, d_logp = loss * factor, d_log_ratio * factor, d_logp * factor
    divisor = layout.divisor(spec).to(dtype)
    grad = logprobs.new_empty(0, dtype=dtype)
    if need_grad:
        if spec.importance_level == "sequence":
            slope = layout.sum(kept(d_log_ratio)) / n_valid.clamp(min=1.0)
            d_log_ratio = layout.spread(slope)
            if clipped is not None:
                d_log_ratio = d_log_ratio.where(~clipped, 0.0)
        grad = d_log_ratio + d_logp
        grad = kept(grad if spec.how.divisor == "one" else grad / layout.spread(divisor))
    return _Chunk(*_sums(layout.sum(kept(loss)) / divisor, n_valid, scored, metrics), grad)


def _sums(
    losses: torch.Tensor, n_valid: torch.Tensor, scored: torch.Tensor, metrics: TokenMetrics
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of the losses [b] of sequences and of what metrics say of tokens; None is 0 of each."""
    nothing = losses.new_zeros(())
    means, largest = metrics[: -len(LARGEST)], metrics[-len(LARGEST) :]
    sums = [losses.sum(), n_valid.sum()]
    sums += [nothing if x is None else total(x, losses.dtype) for x in (scored, *means)]
    # 0 stands in for the largest of an empty batch.
    tops = [nothing if x.numel() == 0 else top(x).clamp(min=0.0) for x in largest]
    return torch.stack(sums), torch.stack(tops)


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
    group_values = logprobs.new_zeros(len(GROUP_METRICS), dtype=dtype)
    if inputs.groups is not None:
        computed, table = eager_advantages(inputs.groups, advantage_spec, True)
        group_values = torch.stack(group_metrics(table)).to(dtype)
        inputs = replaced(inputs, groups=None, advantages=computed, per_token=False)
    loss, results, grad = _of_tokens(logprobs, inputs, spec, group_values, need_grad)
    return TokenResults(loss, results, computed, grad)


@fused
def _of_tokens(
    logprobs: torch.Tensor,
    inputs: Batch,
    spec: LossSpec,
    group_values: torch.Tensor,
    need_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, results and gradient, from advantages."""
    dtype, given = result_dtype(logprobs), inputs.advantages
    assert given is not None
    pieces = _chunks(logprobs, inputs)
    if len(pieces) <= 1:
        sums, largest, grad = _score_chunk(logprobs, inputs, given, spec, dtype, need_grad)
    else:
        grad = logprobs.new_empty(logprobs.shape if need_grad else 0, dtype=dtype)
        parts = []
        for r in pieces:
            part = _score_chunk(logprobs[r], inputs.of_rows(r), given[r], spec, dtype, need_grad)
            if need_grad:
                grad[r] = part.grad
            parts.append(part[:2])
        sums = torch.stack([x for x, _ in parts]).sum(0)
        largest = torch.stack([x for _, x in parts]).amax(0)
    total, active, scored = sums[:3].unbind(0)
    denominator = loss_denominator(inputs, spec, inputs.n_sequences(logprobs), active)
    results = torch.cat(
        [
            torch.stack([1.0 / denominator, active, scored]),
            # What is said of no scored token is NaN.
            sums[3:] / scored,
            largest.where(scored > 0, torch.nan),
            group_values,
            sums.new_zeros(SLOTS - len(RESULTS)),
        ]
    )
    return total / denominator, results, grad
