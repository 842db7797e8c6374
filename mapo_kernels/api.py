"""The public functions, autograd node and module of the advantage and log-prob levels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from mapo_kernels import checks, ops
from mapo_kernels.advantages import GroupStats
from mapo_kernels.inputs import GROUP_METRICS, RESULTS, GroupInputs, TokenInputs
from mapo_kernels.plan import Plan
from mapo_kernels.spec import AdvantageSpec, LossSpec, describe, require_bool

_DEFAULT_SPEC = LossSpec()
_DEFAULT_ADVANTAGE_SPEC = AdvantageSpec()


class LossOutput(NamedTuple):
    """What a loss call returns.

    Attributes:
        loss: [] differentiable scalar, float32 (float64 for float64 log-probs on the eager
            backend).
        metrics: name to 0-d tensor, on the device and detached; see `mapo_loss`.
        advantages: [B] as computed from the rewards, or as they were given.
    """

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]
    advantages: torch.Tensor


def group_advantages(
    rewards: torch.Tensor,
    *,
    group_size: int | None = None,
    group_ids: torch.Tensor | None = None,
    estimator: str = "mapo",
    certainty: str | float = "quadratic",
    success: torch.Tensor | None = None,
    success_threshold: float = 1.0,
    std_correction: int = 1,
    eps: float = 1e-6,
    apd: str = "bounded",
    max_abs: float | None = None,
    return_stats: bool = False,
) -> Any:
    """Advantage of each sequence from the rewards of its group (MAPO, arXiv 2509.18849).

    With mu, sigma and p a group's mean, standard deviation and success ratio:
    `A = (1 - lambda) (r - mu) / (sigma + eps) + lambda (r - mu) / (D + eps)`, lambda = 1 - 4p(1-p).
    A group whose rewards are all equal, or that has one member, gets exactly 0. A NaN or infinite
    reward (a failed verifier) takes no part in its group's statistics and gets 0.

    Args:
        rewards: [B] of any real dtype.
        group_size: G, sequences per group, where each group's rows are contiguous; or give
            `group_ids`.
        group_ids: [B] integers; rows in any order, groups of any size.
        estimator: `mapo`, `grpo`, `apd`, `mean` or `rloo`; see `AdvantageSpec` for this and what
            follows.
        certainty: lambda(p): `quadratic`, `linear`, `entropy`, `step`, or a number in [0, 1].
        success: [B] bool, where success is known apart from the reward.
        success_threshold: otherwise a reward at or above it is a success.
        std_correction: 1 or 0, subtracted from G in the standard deviation.
        eps: added to both denominators.
        apd: `bounded` or `paper`, the denominator D.
        max_abs: optional symmetric clamp.
        return_stats: also return `GroupStats`. With `group_ids` this waits once for the device, to
            learn the number of groups; nothing else here does.

    Returns:
        [B] float32 (float64 for float64 rewards on the eager backend), without gradient; with
        `return_stats` a pair of that and `GroupStats` of [Q] tensors.

    Raises:
        ValueError: a shape, a value or a combination that makes no sense.
        TypeError: an argument of the wrong type.
    """
    spec = AdvantageSpec(
        estimator=estimator,
        certainty=certainty,
        success_threshold=success_threshold,
        std_correction=std_correction,
        eps=eps,
        apd=apd,
        max_abs=max_abs,
    )
    require_bool("return_stats", return_stats)
    groups = checks.check_groups(rewards, group_size, group_ids, success)
    advantages, table = ops.group_advantages(groups, spec, return_stats)
    if not return_stats:
        return advantages
    if group_ids is not None:
        table = table[:, : int((table[4] + table[5] > 0).sum())]
    return advantages, GroupStats(*table[:6].unbind(0))


class MapoLossFunction(torch.autograd.Function):
    """The token loss as an autograd node, for trainers that apply it themselves.

    `MapoLossFunction.apply(logprobs, inputs, spec, advantage_spec)` returns (loss [], results [16]
    in the order of `mapo_kernels.inputs.RESULTS`, advantages [B] or empty). Only the loss is
    differentiable, by `logprobs` [B, T] or [total]. `inputs` is a `TokenInputs`; nothing is
    validated: `mapo_loss` does that.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logprobs: torch.Tensor,
        inputs: TokenInputs,
        spec: LossSpec,
        advantage_spec: AdvantageSpec,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss, results and advantages; keeps d loss / d logp of the tokens for backward."""
        out = ops.token_loss(logprobs, inputs, spec, advantage_spec, ctx.needs_input_grad[0])
        ctx.save_for_backward(out.grad, out.results)
        ctx.dtype = logprobs.dtype
        ctx.mark_non_differentiable(out.results, out.advantages)
        ctx.set_materialize_grads(False)
        return out.loss, out.results, out.advantages

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor | None, *_: Any) -> Any:
        """Scale what forward kept by the upstream gradient, on the device."""
        if upstream is None:
            return None, None, None, None
        grad, results = ctx.saved_tensors
        return ops.scale_gradient(grad, upstream, results, ctx.dtype), None, None, None


def _gather_inputs(
    logprobs: torch.Tensor,
    plan: Plan | None,
    spec: LossSpec,
    rewards: torch.Tensor | None,
    advantages: torch.Tensor | None,
    groups: tuple[Any, Any, Any],
    layout: dict[str, Any],
    tokens: dict[str, Any],
) -> tuple[TokenInputs, LossSpec]:
    """Validated inputs from the arguments of a loss call, or from the plan that stands for them."""
    if plan is not None:
        names = ("group_size", "group_ids", "success")
        given = {**dict(zip(names, groups, strict=True)), **layout}
        given = {**given, "rewards": rewards, "advantages": advantages}
        spec = _check_plan(plan, spec, given)
        advantages, layout = plan.advantages, {name: getattr(plan, name) for name in layout}
        group_inputs: GroupInputs | None = None
    else:
        checks.check_source(rewards, advantages)
        group_inputs = None if rewards is None else checks.check_groups(rewards, *groups)
        if rewards is None and any(x is not None for x in groups):
            raise ValueError(
                "group_size, group_ids, success: expected None with advantages, got a value"
            )
    inputs = TokenInputs(advantages=advantages, groups=group_inputs, **layout, **tokens)
    checks.check_tokens(logprobs, inputs, spec)
    return inputs, spec


def _check_plan(plan: Plan, spec: LossSpec, given: dict[str, Any]) -> LossSpec:
    """The plan's spec, after making sure that nothing contradicts the plan."""
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected a Plan from make_plan, got {describe(plan)}")
    twice = [name for name, value in given.items() if value is not None]
    if twice:
        raise ValueError(f"{', '.join(twice)}: expected None with a plan, which has them already")
    if spec not in (_DEFAULT_SPEC, plan.spec):
        raise ValueError(f"spec: expected the plan's spec {plan.spec}, got {spec}")
    return plan.spec


def mapo_loss(
    logprobs: torch.Tensor,
    *,
    rewards: torch.Tensor | None = None,
    advantages: torch.Tensor | None = None,
    group_size: int | None = None,
    group_ids: torch.Tensor | None = None,
    success: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    old_logprobs: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    rollout_logprobs: torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
    normalizer: torch.Tensor | float | None = None,
    spec: LossSpec = _DEFAULT_SPEC,
    advantage_spec: AdvantageSpec = _DEFAULT_ADVANTAGE_SPEC,
    plan: Plan | None = None,
) -> LossOutput:
    """Clipped policy loss of a batch from its log-probs, group advantages included.

    One launch computes the loss, every metric and the gradient; backward is one more. Neither waits
    for the host. Token tensors have the shape of `logprobs`: [B, T] padded, or [total] packed.

    Args:
        logprobs: log-probs of the sampled tokens under the current policy, float32, bfloat16,
            float16, or float64 (eager backend). Rows may be strided; tokens that are not adjacent
            in memory are copied.
        rewards: [B] any real dtype, whole groups; or give `advantages`.
        advantages: [B] or per token, floating-point.
        group_size: sequences per group, groups contiguous; or give `group_ids`.
        group_ids: [B] integers, rows in any order, ragged groups.
        success: [B] bool, which sequences succeeded; default `rewards >= success_threshold`.
        mask: nonzero where a token counts. Whatever lies elsewhere, NaN included, changes nothing.
        cu_seqlens: [B + 1] int32 or int64, boundaries of the packed sequences.
        old_logprobs: under the policy that sampled; None means on-policy (ratio 1).
        ref_logprobs: under the reference policy; needed if `spec.beta` is not 0.
        rollout_logprobs: as the sampling engine saw them; needed if `spec.rollout_cap` is set.
        token_weights: factor of the policy term (importance, off-policy or entropy masks).
        normalizer: denominator over the batch, a positive number or a 0-d tensor, in place of the
            tokens (`token-mean`) or sequences (other modes) counted here; so micro-batches and
            ranks add up.
        spec: which loss, and how it is aggregated.
        advantage_spec: how rewards become advantages.
        plan: of `make_plan`, in place of rewards, advantages, groups, mask, cu_seqlens and
            normalizer.

    Returns:
        `LossOutput`. Metrics are means over the scored tokens (`scored_tokens` of `active_tokens`;
        a token whose advantage is 0 is not scored unless KL or `score_all` needs it):
        `clip_fraction_low`, `clip_fraction_high`, `ratio_mean`, `ratio_max` (their largest),
        `approx_kl` (k3 of new against old), `ref_kl` with a reference; from rewards also
        `success_ratio_mean`, `lambda_mean` (over groups), `zero_advantage_groups`,
        `nonfinite_rewards` (counts).

    Raises:
        ValueError: a shape, a value, a device or a combination that makes no sense.
        TypeError: an argument of the wrong type.
    """
    inputs, spec = _gather_inputs(
        logprobs,
        plan,
        spec,
        rewards,
        advantages,
        (group_size, group_ids, success),
        {"mask": mask, "cu_seqlens": cu_seqlens, "normalizer": normalizer},
        {
            "old_logprobs": old_logprobs,
            "ref_logprobs": ref_logprobs,
            "rollout_logprobs": rollout_logprobs,
            "token_weights": token_weights,
        },
    )
    if not isinstance(advantage_spec, AdvantageSpec):
        raise TypeError(
            f"advantage_spec: expected an AdvantageSpec, got {describe(advantage_spec)}"
        )
    if not torch.is_grad_enabled():
        # Otherwise the node would be told that a gradient is needed, and write one for nobody.
        logprobs = logprobs.detach()
    loss, results, computed = MapoLossFunction.apply(logprobs, inputs, spec, advantage_spec)
    results = results.detach()[: len(RESULTS)]
    values = dict(zip(RESULTS, results.unbind(0), strict=True))
    del values["gradient_scale"]
    if ref_logprobs is None:
        del values["ref_kl"]
    if inputs.groups is None:
        for name in GROUP_METRICS:
            del values[name]
    if plan is not None:
        values.update(plan.metrics)
    if inputs.advantages is not None:
        computed = inputs.advantages
    return LossOutput(loss, values, computed.detach())


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
        spec: LossSpec = _DEFAULT_SPEC,
        advantage_spec: AdvantageSpec = _DEFAULT_ADVANTAGE_SPEC,
    ) -> None:
        """Keep the specs."""
        super().__init__()
        self.spec = spec
        self.advantage_spec = advantage_spec

    def forward(self, logprobs: torch.Tensor, **arguments: Any) -> LossOutput:
        """The loss of `logprobs` [B, T] or [total]; `arguments` are the keywords of `mapo_loss`."""
        return mapo_loss(logprobs, spec=self.spec, advantage_spec=self.advantage_spec, **arguments)

    def extra_repr(self) -> str:
        """The specs."""
        return f"{self.spec}, {self.advantage_spec}"
