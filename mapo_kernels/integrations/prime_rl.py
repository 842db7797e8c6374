"""prime-rl: `[trainer.loss] type = "custom"`.

Contract as in prime-rl 0.8.1.dev9 and its main branch of 2026-08-21,
`src/prime_rl/trainer/rl/loss.py`.
"""

from __future__ import annotations

from typing import Any

import torch

from mapo_kernels.losses import mapo_loss
from mapo_kernels.spec import LossSpec


def policy_loss(inputs: Any, **options: Any) -> Any:
    """The clipped policy loss of one sequence, by `mapo_loss`.

    The ratio is the trainer's policy over the one that generated (`inference_logprobs`).

    Args:
        inputs: prime-rl's `LossInputs` of tensors [T]: `trainer_logprobs`, `inference_logprobs`,
            `advantages`, `loss_mask`, `ref_logprobs` or None, `loss_weights` or None.
        options: fields of `LossSpec`, from `[trainer.loss.kwargs]`; `aggregation` is prime-rl's.

    Returns:
        prime-rl's `LossOutputs`: the sum [] over the sequence's tokens, which prime-rl divides by
        the tokens of the batch, and `mapo_loss`'s metrics.

    Raises:
        ValueError: an option that makes no sense.
        TypeError: an option that `LossSpec` does not have, or `aggregation`.
    """
    from prime_rl.trainer.rl.loss import LossOutputs

    spec = LossSpec(aggregation="token-mean", **options)

    def row(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x[None]

    out = mapo_loss(
        inputs.trainer_logprobs[None],
        advantages=row(inputs.advantages),
        mask=row(inputs.loss_mask),
        old_logprobs=row(inputs.inference_logprobs),
        ref_logprobs=row(inputs.ref_logprobs) if spec.beta else None,
        token_weights=row(inputs.loss_weights),
        normalizer=1.0,
        spec=spec,
    )
    return LossOutputs(loss=out.loss, metrics=out.metrics)
