"""One door per computation: eager twin, Triton launch, or the launch as a torch operator.

Inside a compiled graph a launch is an operator, so that `torch.compile` sees it whole. Outside it
the launcher is called directly: an operator costs tens of microseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mapo_kernels import advantages, tokens
from mapo_kernels.backend import resolve_backend
from mapo_kernels.batch import (
    GROUP_METRICS,
    RESULTS,
    Batch,
    GroupInputs,
    TokenResults,
    empty_results,
    replaced,
)
from mapo_kernels.spec import AdvantageSpec, LossSpec
from mapo_kernels.tokens_eager import eager_token_loss


def is_eager(x: torch.Tensor) -> bool:
    """Whether the eager backend computes what comes with `x`.

    It does where there is no sequence, and so no program to launch, too.
    """
    return x.shape[0] == 0 or resolve_backend(x.device.type, x.dtype == torch.float64) == "eager"


def pack(
    inputs: Batch, need_grad: bool, spec: LossSpec, advantage_spec: AdvantageSpec
) -> tuple[Any, ...]:
    """The arguments of a loss as an operator's schema has them."""
    normalizer, groups = inputs.normalizer, inputs.groups
    is_tensor = isinstance(normalizer, torch.Tensor)
    return (
        *inputs.token_tensors(),
        inputs.advantages,
        inputs.per_token,
        inputs.cu_seqlens,
        normalizer if is_tensor else None,
        0.0 if is_tensor or normalizer is None else float(normalizer),
        None if groups is None else groups.rewards,
        0 if groups is None else groups.group_size,
        None if groups is None else groups.group_ids,
        None if groups is None else groups.success,
        need_grad,
        *spec.pack(),
        *advantage_spec.pack(),
    )


def unpack(*packed: Any) -> tuple[Batch, bool, LossSpec, AdvantageSpec]:
    """What `pack` packed."""
    old, ref, rollout, weights, entropy, loss_weights, mask = packed[:7]
    given, per_token, cu_seqlens, normalizer, number = packed[7:12]
    rewards, group_size, group_ids, success, need_grad = packed[12:17]
    groups = None if rewards is None else GroupInputs(rewards, group_size, group_ids, success)
    if normalizer is None and number != 0:
        normalizer = number
    inputs = Batch(
        old,
        ref,
        rollout,
        weights,
        entropy,
        loss_weights,
        mask,
        given,
        groups,
        cu_seqlens,
        normalizer,
        per_token,
    )
    specs = packed[17:]
    return inputs, need_grad, LossSpec.unpack(*specs[:2]), AdvantageSpec.unpack(*specs[2:])


LOSS_SCHEMA = (
    "Tensor? old_logprobs, Tensor? ref_logprobs, Tensor? rollout_logprobs, "
    "Tensor? token_weights, Tensor? entropy, Tensor? loss_weights, Tensor? mask, "
    "Tensor? advantages, bool per_token, Tensor? cu_seqlens, Tensor? normalizer, "
    "float normalizer_value, "
    "Tensor? rewards, int group_size, Tensor? group_ids, Tensor? success, bool need_grad, "
    "float[] spec_numbers, str spec_kinds, float[] advantage_numbers, str advantage_kinds) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.custom_op(
    "mapo_kernels::token_loss", mutates_args=(), schema=f"(Tensor logprobs, {LOSS_SCHEMA}"
)
def _token_loss(logprobs, *packed):  # type: ignore[no-untyped-def]
    inputs, need_grad, spec, advantage_spec = unpack(*packed)
    return tuple(tokens.launch_token_loss(logprobs, inputs, spec, advantage_spec, need_grad))


@_token_loss.register_fake
def _token_loss_fake(logprobs, *packed):  # type: ignore[no-untyped-def]
    inputs, need_grad, *_ = unpack(*packed)
    return tuple(empty_results(logprobs, inputs, need_grad))


def token_loss(
    logprobs: torch.Tensor,
    inputs: Batch,
    spec: LossSpec,
    advantage_spec: AdvantageSpec,
    need_grad: bool,
) -> TokenResults:
    """Loss, results, advantages and unscaled gradient of a validated batch."""
    if is_eager(logprobs):
        return eager_token_loss(logprobs, inputs, spec, advantage_spec, need_grad)
    groups = inputs.groups
    if groups is not None and groups.group_ids is not None:
        if groups.rewards.shape[0] > advantages.MATCH_LIMIT:
            # Too many rows to look for each one's group in the loss kernel: advantages come first.
            inputs, complete = with_advantages(inputs, groups, advantage_spec)
            return complete(token_loss(logprobs, inputs, spec, advantage_spec, need_grad))
    if not torch.compiler.is_compiling():
        return tokens.launch_token_loss(logprobs, inputs, spec, advantage_spec, need_grad)
    return TokenResults(*_token_loss(logprobs, *pack(inputs, need_grad, spec, advantage_spec)))


def group_signals(
    groups: GroupInputs, spec: AdvantageSpec
) -> tuple[advantages.Signal, advantages.Signal | None]:
    """What rewards come to; and, where that is float64, what they come to in float32."""
    given, table = group_advantages(groups, spec, want_stats=True)
    metrics = dict(zip(GROUP_METRICS, advantages.group_metrics(table), strict=True))
    narrow = group_signals(replaced(groups, wide=False), spec)[0] if groups.wide else None
    return advantages.Signal(given, metrics), narrow


def with_advantages(
    inputs: Batch, groups: GroupInputs, spec: AdvantageSpec
) -> tuple[Batch, Callable[[Any], Any]]:
    """Inputs with the advantages of their groups, and what puts the groups' metrics in results."""
    given, table = group_advantages(groups, spec, want_stats=True)

    def complete(out: Any) -> Any:
        first = len(RESULTS) - len(GROUP_METRICS)
        metrics = torch.stack(advantages.group_metrics(table)).to(out.results.dtype)
        results = torch.cat([out.results[:first], metrics, out.results[len(RESULTS) :]])
        return replaced(out, results=results, advantages=given)

    return replaced(inputs, groups=None, advantages=given, per_token=False), complete


@torch.library.custom_op(
    "mapo_kernels::scale_gradient",
    mutates_args=(),
    schema="(Tensor grad, Tensor upstream, Tensor results, ScalarType dtype) -> Tensor",
)
def _scale_gradient(grad, upstream, results, dtype):  # type: ignore[no-untyped-def]
    return tokens.launch_scale(grad, upstream, results, dtype)


@_scale_gradient.register_fake
def _scale_gradient_fake(grad, upstream, results, dtype):  # type: ignore[no-untyped-def]
    return torch.empty_like(grad, dtype=dtype)


def scale_gradient(
    grad: torch.Tensor, upstream: torch.Tensor, results: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """`grad` times upstream gradient [] and `gradient_scale`, in `dtype`, all on the device."""
    if is_eager(grad):
        return (grad * (upstream * results[0])).to(dtype)
    call = _scale_gradient if torch.compiler.is_compiling() else tokens.launch_scale
    return call(grad, upstream, results, dtype)


@torch.library.custom_op(
    "mapo_kernels::group_advantages",
    mutates_args=(),
    schema="(Tensor rewards, int group_size, Tensor? group_ids, Tensor? success, bool want_stats, "
    "float[] numbers, str kinds) -> (Tensor, Tensor)",
)
def _group_advantages(rewards, group_size, group_ids, success, want_stats, *spec):  # type: ignore[no-untyped-def]
    groups = GroupInputs(rewards, group_size, group_ids, success)
    return advantages.launch_advantages(groups, AdvantageSpec.unpack(*spec), want_stats)


@_group_advantages.register_fake
def _group_advantages_fake(rewards, group_size, group_ids, success, want_stats, *spec):  # type: ignore[no-untyped-def]
    return advantages.empty_advantages(
        GroupInputs(rewards, group_size, group_ids, success), want_stats
    )


def group_advantages(
    groups: GroupInputs, spec: AdvantageSpec, want_stats: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages [B] and, if wanted, the statistics table of `eager_advantages`."""
    groups = advantages.decide_rewards(groups, spec)
    if is_eager(groups.rewards):
        return advantages.eager_advantages(groups, spec)
    if not torch.compiler.is_compiling():
        return advantages.launch_advantages(groups, spec, want_stats)
    return _group_advantages(
        groups.rewards,
        groups.group_size,
        groups.group_ids,
        groups.success,
        want_stats,
        *spec.pack(),
    )
