"""The token loss on torch tensors: the fused kernel's numbers on any device, in float64 too."""

from __future__ import annotations

import torch

from mapo_kernels import twin
from mapo_kernels.advantages import accumulator_dtype, eager_advantages, group_metrics
from mapo_kernels.inputs import GROUP_METRICS, SLOTS, TokenInputs, TokenResults, loss_arguments
from mapo_kernels.spec import AdvantageSpec, LossSpec


class _Layout:
    """Which sequence each token belongs to; padded and packed batches look alike from here on."""

    def __init__(self, logprobs: torch.Tensor, inputs: TokenInputs) -> None:
        self.n_sequences = inputs.n_sequences(logprobs)
        self.length = logprobs.shape[-1]
        positions = torch.arange(logprobs.numel(), device=logprobs.device)
        live = torch.ones_like(positions, dtype=torch.bool)
        self.packed = inputs.cu_seqlens is not None
        if inputs.cu_seqlens is None:
            self.sequence = positions // max(self.length, 1)
        else:
            bounds = inputs.cu_seqlens.to(positions.dtype)
            sequence = torch.searchsorted(bounds[1:].contiguous(), positions, right=True)
            live = (positions >= bounds[0]) & (positions < bounds[-1])
            self.sequence = sequence.clamp(max=self.n_sequences - 1)
        if inputs.mask is not None:
            live = live & (inputs.mask.reshape(-1) != 0)
        self.live = live

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of [N] over each sequence, [B]."""
        if not self.packed:
            return x.view(self.n_sequences, self.length).sum(1)
        wide = x.to(accumulator_dtype(x.device))
        return wide.new_zeros(self.n_sequences).index_add(0, self.sequence, wide).to(x.dtype)


def _length_weight(n_live: torch.Tensor, spec: LossSpec, length: int) -> torch.Tensor:
    """What each sequence's token losses are divided by, [B], beside the batch's denominator."""
    if spec.aggregation == "seq-mean-token-mean":
        return n_live.clamp(min=1.0)
    if spec.aggregation == "seq-mean-token-sum-norm":
        return torch.full_like(n_live, float(spec.max_tokens or max(length, 1)))
    return torch.ones_like(n_live)


def _denominator(inputs: TokenInputs, spec: LossSpec, n_live: torch.Tensor) -> torch.Tensor:
    if isinstance(inputs.normalizer, torch.Tensor):
        denominator = inputs.normalizer.to(n_live.dtype)
    elif inputs.normalizer is not None:
        denominator = torch.full_like(n_live[0], float(inputs.normalizer))
    elif spec.aggregation == "token-mean":
        denominator = n_live.sum()
    else:
        denominator = torch.full_like(n_live[0], float(n_live.shape[0]))
    return denominator.where(denominator > 0, 1.0)


def _scored(
    layout: _Layout, advantage: torch.Tensor, weight: torch.Tensor, spec: LossSpec
) -> torch.Tensor:
    """Which tokens [N] can change the loss, its gradient, or a metric that was asked for."""
    if spec.needs_every_token:
        return layout.live
    with_signal = layout.live & (advantage != 0) & (weight != 0)
    if spec.importance_level == "token":
        return with_signal
    # Every token moves its sequence's ratio, so a sequence is scored whole or not at all.
    in_sequence = layout.sum(with_signal.to(advantage.dtype)) > 0
    return layout.live & in_sequence[layout.sequence]


def eager_token_loss(
    logprobs: torch.Tensor,
    inputs: TokenInputs,
    spec: LossSpec,
    advantage_spec: AdvantageSpec,
    need_grad: bool,
) -> TokenResults:
    """What the token loss kernel computes; see `TokenResults` for what comes back."""
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    layout = _Layout(logprobs, inputs)
    advantages = logprobs.new_empty(0, dtype=dtype)
    group_values = [torch.zeros((), dtype=dtype, device=logprobs.device)] * len(GROUP_METRICS)
    if inputs.groups is not None:
        given, table = eager_advantages(inputs.groups, advantage_spec, dtype)
        advantages, group_values = given, group_metrics(table)
    else:
        given = inputs.advantages  # type: ignore[assignment]
    advantage = given.reshape(-1).to(dtype)
    if given.shape != logprobs.shape:
        advantage = advantage[layout.sequence]

    def flat(x: torch.Tensor | None, scored: torch.Tensor, default: torch.Tensor) -> torch.Tensor:
        return default if x is None else x.reshape(-1).to(dtype).where(scored, 0.0)

    weight = flat(inputs.token_weights, layout.live, layout.live.to(dtype))
    scored = _scored(layout, advantage, weight, spec)
    # Whatever lies at a token that is not scored, NaN included, stays out of every sum.
    advantage = advantage.where(scored, 0.0)
    logp = flat(logprobs, scored, advantage)
    old = flat(inputs.old_logprobs, scored, logp)
    ref = flat(inputs.ref_logprobs, scored, logp)
    if inputs.rollout_logprobs is not None:
        rollout = flat(inputs.rollout_logprobs, scored, logp)
        weight = weight * twin.rollout_weight(old, rollout, float(spec.rollout_cap or 0.0))

    n_live = layout.sum(layout.live.to(dtype))
    log_ratio = logp - old
    level_ratio = log_ratio
    if spec.importance_level == "sequence":
        mean = layout.sum(log_ratio) / n_live.clamp(min=1.0)
        level_ratio = mean[layout.sequence].where(scored, 0.0)
    loss, d_log_ratio, d_logp, ratio, ref_kl, clipped_low, clipped_high = twin.token_loss(
        logp,
        level_ratio,
        ref,
        advantage,
        weight,
        *loss_arguments(spec)[:-1],
        spec.objective,
        spec.dual_clip is not None,
        inputs.ref_logprobs is not None,
        spec.kl_estimator,
        spec.kl_importance_correction,
    )
    length_weight = _length_weight(n_live, spec, layout.length)
    denominator = _denominator(inputs, spec, n_live)
    grad = logprobs.new_empty(0, dtype=dtype)
    if need_grad:
        if spec.importance_level == "sequence":
            slope = layout.sum(d_log_ratio.where(scored, 0.0)) / n_live.clamp(min=1.0)
            d_log_ratio = slope[layout.sequence]
        grad = (d_log_ratio + d_logp) / length_weight[layout.sequence]
        grad = grad.where(scored, 0.0).view(logprobs.shape)

    n_scored = scored.sum().clamp(min=1)

    def mean_over_scored(x: torch.Tensor) -> torch.Tensor:
        return x.to(dtype).where(scored, 0.0).sum() / n_scored

    # An empty batch has no largest ratio; a leading 0 stands in for it.
    ratios = torch.nn.functional.pad(ratio.where(scored, 0.0), (1, 0))
    values = [
        1.0 / denominator,
        n_live.sum(),
        scored.sum().to(dtype),
        mean_over_scored(clipped_low),
        mean_over_scored(clipped_high),
        mean_over_scored(ratio),
        mean_over_scored(twin.approx_kl(log_ratio)),
        mean_over_scored(ref_kl),
        ratios.amax(),
        *group_values,
    ]
    results = torch.stack(values + [torch.zeros_like(values[0])] * (SLOTS - len(values)))
    total = (layout.sum(loss.where(scored, 0.0)) / length_weight).sum() / denominator
    return TokenResults(total, results, advantages, grad)
