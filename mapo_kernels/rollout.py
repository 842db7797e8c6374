"""The sampling engine's policy against the trainer's: which tokens are masked, and the metrics.

Both need nothing of the new policy: they are decided before the loss, whatever its level, and a
masked token is one of weight 0 to everything that follows.
"""

from __future__ import annotations

import torch

from mapo_kernels.batch import Batch, replaced
from mapo_kernels.bounds import LARGEST_OF_ROLLOUT, RolloutMetrics
from mapo_kernels.distributed.agreement import all_gather
from mapo_kernels.eager import formula
from mapo_kernels.eager.select import only
from mapo_kernels.eager.sums import top, total
from mapo_kernels.layout import Layout
from mapo_kernels.spec import LossSpec


def correct(
    tokens: torch.Tensor, batch: Batch, spec: LossSpec, dtype: torch.dtype
) -> tuple[Batch, dict[str, torch.Tensor]]:
    """The batch with its mask against rollouts in the token weights, and what there is to report.

    Args:
        tokens: [B, T] or [total], of which only shape and device matter.
        batch: validated. Without old or rollout log-probs nothing happens.
        spec: which loss.
        dtype: of the statistics, float32 or float64.

    Returns:
        The batch, and the metrics of `RolloutMetrics` by name, [] each.
    """
    old, rollout = batch.old_logprobs, batch.rollout_logprobs
    if old is None or rollout is None:
        return batch, {}
    layout = Layout(tokens, batch)

    def over_ranks(x: torch.Tensor) -> torch.Tensor:
        """Sums over the tokens of whole sequences, where ranks hold some of them each."""
        return x if batch.parts is None else all_gather(x, batch.parts.group).sum(0)

    valid = layout.valid
    log_ratio = only(old.to(dtype) - rollout.to(dtype), valid)
    log_ratio = formula.clamp(log_ratio, -20.0, 20.0)
    ratio, kl = formula.rollout_ratio(log_ratio)
    masked = None
    if spec.rollout_mask is not None:
        level = ratio
        if spec.rollout_mask_level == "sequence":
            mean = over_ranks(layout.sum(log_ratio)) / layout.n_valid().to(dtype).clamp(min=1.0)
            level = layout.spread(formula.exp(mean)).expand(ratio.shape)
        masked = formula.outside(level, *spec.rollout_mask) & valid
        weights = batch.token_weights
        kept = (~masked).to(dtype) if weights is None else weights.where(~masked, 0.0)
        batch = replaced(batch, token_weights=kept)
    if not spec.rollout_is:
        batch = replaced(batch, rollout_logprobs=None)
    count = layout.n_valid().sum().to(dtype)
    nothing = torch.zeros_like(count)
    means = RolloutMetrics(
        rollout_masked_fraction=nothing if masked is None else total(masked, dtype),
        rollout_ratio_mean=total(only(ratio, valid), dtype),
        rollout_kl=total(kl, dtype),
        rollout_ratio_max=top(only(ratio, valid)) if ratio.numel() else nothing,
    )._asdict()
    if batch.parts is not None:
        every = all_gather(torch.stack(list(means.values())), batch.parts.group)
        sums = zip(means, every.sum(0), every.amax(0), strict=True)
        means = {k: most if k in LARGEST_OF_ROLLOUT else x for k, x, most in sums}
    # What is said of no token is NaN.
    found = {k: x / count for k, x in means.items() if k not in LARGEST_OF_ROLLOUT}
    largest = {k: means[k].where(count > 0, torch.nan) for k in LARGEST_OF_ROLLOUT}
    return batch, found | largest
