"""verl 0.9.1: `mapo` as the backend of its fused kernels, so that its actor has no logits.

Contract of `verl/utils/experimental/torch_functional.py` and `verl/models/transformers` (0.9.1):
every forward for the backend `torch` makes a `FusedLinearForPPO` and calls it with hidden states,
weight, ids and a temperature, for log-probs and entropies with gradients.
"""

from __future__ import annotations

import importlib
from functools import wraps
from types import ModuleType
from typing import Any

import torch

from mapo_kernels.scoring import token_logprobs_from_hidden

BACKEND = "mapo"


def fused_head(
    hidden_states: torch.Tensor,
    vocab_weights: torch.Tensor,
    input_ids: torch.Tensor,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What verl's `FusedLinearForPPO` computes, by `token_logprobs_from_hidden`.

    Args:
        hidden_states: [B, T, H] or [total, H].
        vocab_weights: [V, H].
        input_ids: [B, T] or [total], the token that each position predicts.
        temperature: what the logits are divided by.

    Returns:
        Log-probs and entropies in the shape of `input_ids`, float32, both differentiable.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: an argument of the wrong type, or dtypes that differ.
    """
    return token_logprobs_from_hidden(
        hidden_states, vocab_weights, input_ids, temperature=temperature, return_entropy=True
    )


def register(monkey_patch: ModuleType) -> None:
    """Let `fused_kernel_options.impl_backend` be `mapo`.

    Every forward that verl has for its backend `torch` makes a `FusedLinearForPPO` of the model's
    backend: that class learns one more.

    Args:
        monkey_patch: the module `verl.models.transformers.monkey_patch`.
    """
    before = monkey_patch.patch_forward_with_backends
    if getattr(before, "knows_mapo", False):
        return

    @wraps(before)
    def patch(
        model: Any, use_fused_kernels: bool = False, fused_kernels_backend: str | None = None
    ) -> None:
        if not use_fused_kernels or fused_kernels_backend != BACKEND:
            before(model, use_fused_kernels, fused_kernels_backend)
            return
        _teach(importlib.import_module("verl.utils.experimental.torch_functional"))
        before(model, use_fused_kernels, "torch")
        model._verl_fused_kernels_backend = BACKEND

    patch.knows_mapo = True  # type: ignore[attr-defined]
    monkey_patch.patch_forward_with_backends = patch  # type: ignore[attr-defined]


def _teach(module: ModuleType) -> None:
    """Replace the module's `FusedLinearForPPO` by one that has the backend `mapo` too."""
    before = module.FusedLinearForPPO
    if getattr(before, "knows_mapo", False):
        return

    class FusedLinearForPPO(before):  # type: ignore[misc, valid-type]
        """verl's own, and `fused_head` where `impl_backend` is `mapo`."""

        knows_mapo = True

        def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
            """As verl's; the chunk size is its own."""
            super().__init__(chunk_size, "torch" if impl_backend == BACKEND else impl_backend)
            self.impl_backend = impl_backend

        def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            """Log-probs and entropies."""
            if self.impl_backend == BACKEND:
                return fused_head(*args, **kwargs)
            return super().forward(*args, **kwargs)

    module.FusedLinearForPPO = FusedLinearForPPO  # type: ignore[attr-defined]
