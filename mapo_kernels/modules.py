"""The losses as modules of torch; that of hidden states owns the lm_head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from mapo_kernels import checks_head
from mapo_kernels.arguments import DEFAULTS
from mapo_kernels.calls import LossOutput, TokenLossOutput
from mapo_kernels.keywords import require_names, settings_checked
from mapo_kernels.losses import mapo_loss, mapo_loss_from_hidden, mapo_loss_from_logits
from mapo_kernels.spec import AdvantageSpec, LossSpec

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mapo_kernels.arguments import (
        HeadArguments,
        HiddenLossArguments,
        LogitsLossArguments,
        LossArguments,
    )


@settings_checked
class MapoLoss(torch.nn.Module):
    """`mapo_loss` with its specs fixed, as a module.

    Args:
        spec: which loss, and how it is aggregated.
        advantage_spec: how rewards become advantages.

    Shapes, dtypes and errors are those of `mapo_loss`: log-probs [B, T] or [total] in, `LossOutput`
    out.
    """

    def __init__(
        self,
        spec: LossSpec = DEFAULTS["spec"],
        advantage_spec: AdvantageSpec = DEFAULTS["advantage_spec"],
    ) -> None:
        """Keep the specs."""
        super().__init__()
        self.spec = spec
        self.advantage_spec = advantage_spec

    def forward(self, logprobs: torch.Tensor, **arguments: Unpack[LossArguments]) -> LossOutput:
        """The loss of `logprobs` [B, T] or [total]; `arguments` are the keywords of `mapo_loss`."""
        given: LossArguments = {"spec": self.spec, "advantage_spec": self.advantage_spec}
        given.update(arguments)
        return mapo_loss(logprobs, **given)

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        """The specs."""
        return f"{self.spec}, {self.advantage_spec}"


@settings_checked
class MapoLogitsLoss(torch.nn.Module):
    """`mapo_loss_from_logits` with its specs and temperature fixed, as a module.

    Args:
        spec: which loss, and how it is aggregated.
        advantage_spec: how rewards become advantages.
        temperature: what logits are divided by, a number or a tensor: see `mapo_loss_from_logits`.
        inplace: let the gradient overwrite the logits.

    Shapes, dtypes and errors are those of `mapo_loss_from_logits`: logits [B, T, V] or [total, V]
    and token ids in, `LossOutput` out.
    """

    def __init__(
        self,
        spec: LossSpec = DEFAULTS["spec"],
        advantage_spec: AdvantageSpec = DEFAULTS["advantage_spec"],
        *,
        temperature: torch.Tensor | float = 1.0,
        inplace: bool = False,
    ) -> None:
        """Keep the specs and the options."""
        super().__init__()
        self.spec = spec
        self.advantage_spec = advantage_spec
        self.options: dict[str, Any] = {"temperature": temperature, "inplace": inplace}

    @overload
    def forward(
        self,
        logits: torch.Tensor,
        token_ids: torch.Tensor,
        *,
        return_logprobs: Literal[False] = False,
        return_sum_pi_squared: Literal[False] = False,
        **arguments: Unpack[LogitsLossArguments],
    ) -> LossOutput: ...
    @overload
    def forward(
        self,
        logits: torch.Tensor,
        token_ids: torch.Tensor,
        *,
        return_logprobs: Literal[True],
        return_sum_pi_squared: bool = False,
        **arguments: Unpack[LogitsLossArguments],
    ) -> TokenLossOutput: ...
    @overload
    def forward(
        self,
        logits: torch.Tensor,
        token_ids: torch.Tensor,
        *,
        return_logprobs: bool = False,
        return_sum_pi_squared: Literal[True],
        **arguments: Unpack[LogitsLossArguments],
    ) -> TokenLossOutput: ...
    @overload
    def forward(
        self,
        logits: torch.Tensor,
        token_ids: torch.Tensor,
        *,
        return_logprobs: bool,
        return_sum_pi_squared: bool = False,
        **arguments: Unpack[LogitsLossArguments],
    ) -> LossOutput | TokenLossOutput: ...
    def forward(
        self, logits: torch.Tensor, token_ids: torch.Tensor, **arguments: Any
    ) -> LossOutput | TokenLossOutput:
        """The loss of logits [B, T, V] or [total, V]; see `mapo_loss_from_logits`."""
        specs = {"spec": self.spec, "advantage_spec": self.advantage_spec}
        return mapo_loss_from_logits(logits, token_ids, **{**specs, **self.options, **arguments})

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        """The specs and the options."""
        return f"{self.spec}, {self.advantage_spec}, {self.options}"


class MapoLinearLoss(torch.nn.Module):
    """`mapo_loss_from_hidden` as a module that owns the lm_head.

    FSDP2 gathers a sharded weight only inside the forward of a module that owns it: call
    `fully_shard` on this one. Its mixed precision takes `cast_forward_inputs=False`, because
    log-probs in bfloat16 are off by as much as a ratio is clipped at. The head stays the model's
    own (tied embeddings too): nothing is copied.

    Args:
        lm_head: a `torch.nn.Linear` with weight [V, H], with or without bias [V].
        spec: which loss, and how it is aggregated.
        advantage_spec: how rewards become advantages.
        **options: of `mapo_loss_from_hidden`: softcap, logit_scale, chunk_rows,
            batch_invariant, temperature, vocab_group. (A `sampling_mask` comes with each batch.)

    Raises:
        TypeError: an unknown option; or `lm_head` is no plain linear layer. One with an adapter of
            its own has a weight that is not `lm_head.weight`; merge it, or leave lm_head out of the
            adapted modules.
    """

    def __init__(
        self,
        lm_head: torch.nn.Linear,
        spec: LossSpec = DEFAULTS["spec"],
        advantage_spec: AdvantageSpec = DEFAULTS["advantage_spec"],
        **options: Unpack[HeadArguments],
    ) -> None:
        """Keep the head, the specs and the options."""
        super().__init__()
        require_names(type(self).__name__, options, mapo_loss_from_hidden)
        if not isinstance(lm_head, torch.nn.Linear) or hasattr(lm_head, "base_layer"):
            raise TypeError(
                f"lm_head: expected a torch.nn.Linear without adapters, got "
                f"{type(lm_head).__module__}.{type(lm_head).__name__}"
            )
        self.lm_head = lm_head
        self.spec = spec
        self.advantage_spec = advantage_spec
        self.options = options

    @overload
    def forward(
        self,
        hidden: torch.Tensor,
        token_ids: torch.Tensor,
        *,
        return_logprobs: Literal[False] = False,
        return_sum_pi_squared: Literal[False] = False,
        **arguments: Unpack[HiddenLossArguments],
    ) -> LossOutput: ...
    @overload
    def forward(
        self,
        hidden: torch.Tensor,
        token_ids: torch.Tensor,
        *,
        return_logprobs: Literal[True],
        return_sum_pi_squared: bool = False,
        **arguments: Unpack[HiddenLossArguments],
    ) -> TokenLossOutput: ...
    @overload
    def forward(
        self,
        hidden: torch.Tensor,
        token_ids: torch.Tensor,
        *,
        return_logprobs: bool = False,
        return_sum_pi_squared: Literal[True],
        **arguments: Unpack[HiddenLossArguments],
    ) -> TokenLossOutput: ...
    @overload
    def forward(
        self,
        hidden: torch.Tensor,
        token_ids: torch.Tensor,
        *,
        return_logprobs: bool,
        return_sum_pi_squared: bool = False,
        **arguments: Unpack[HiddenLossArguments],
    ) -> LossOutput | TokenLossOutput: ...
    def forward(
        self, hidden: torch.Tensor, token_ids: torch.Tensor, **arguments: Any
    ) -> LossOutput | TokenLossOutput:
        """The loss of hidden states [B, T, H] or [total, H]; see `mapo_loss_from_hidden`."""
        if any(base.__name__ == "FSDPModule" for base in type(self).__mro__):
            checks_head.check_not_rounded(arguments)
        specs = {"spec": self.spec, "advantage_spec": self.advantage_spec}
        return mapo_loss_from_hidden(
            hidden,
            self.lm_head.weight,
            token_ids,
            bias=self.lm_head.bias,
            **{**specs, **self.options, **arguments},
        )

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        """The specs and the options."""
        return f"{self.spec}, {self.advantage_spec}, {self.options}"
