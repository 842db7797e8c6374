"""The public functions and the module: validate, compute, name the metrics."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.compiler import is_compiling

from mapo_kernels import checks, ops, parallel
from mapo_kernels.advantages import (
    GroupStats,
    decide_rewards,
    group_metrics,
    never_successful,
    warn_of_threshold,
)
from mapo_kernels.agreement import group_ranks
from mapo_kernels.autograd import MapoLossFunction
from mapo_kernels.inputs import (
    GROUP_METRICS,
    RESULTS,
    KnownMetrics,
    TokenInputs,
    replaced,
)
from mapo_kernels.keywords import names_checked, settings_checked
from mapo_kernels.metrics import as_metrics
from mapo_kernels.plan import Plan, count_tokens, require_plan
from mapo_kernels.spec import AdvantageSpec, LossSpec, require_bool

DEFAULT_SPEC = LossSpec()
DEFAULT_ADVANTAGE_SPEC = AdvantageSpec()


class LossOutput(NamedTuple):
    """What a loss call returns.

    Attributes:
        loss: [] differentiable scalar, float32 (float64 for float64 log-probs on the eager
            backend).
        metrics: name to 0-d tensor, on the device and detached; see `mapo_loss`. They are
            `Metrics`, with `reduce(process_group)`, except from a graph compiled by an old torch.
        advantages: [B] as computed from the rewards, or as they were given.
    """

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]
    advantages: torch.Tensor


@names_checked
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
    process_group: torch.distributed.ProcessGroup | None = None,
    return_stats: bool = False,
) -> Any:
    """Advantage of each sequence from the rewards of its group (MAPO, arXiv 2509.18849).

    With mu, sigma and p a group's mean, standard deviation and success ratio:
    `A = (1 - lambda) (r - mu) / (sigma + eps) + lambda (r - mu) / (D + eps)`, lambda = 1 - 4p(1-p).
    A group whose rewards are all equal, or that has one member, gets exactly 0. A NaN or infinite
    reward (a failed verifier) takes no part in its group's statistics and gets 0.

    Args:
        rewards: [B] of any real dtype. Statistics are float32, or float64 for float64 rewards.
        group_size: G, sequences per group, where each group's rows are contiguous; or give
            `group_ids`.
        group_ids: [B] integers; rows in any order, groups of any size.
        estimator: `mapo`, `grpo`, `apd`, `mean` or `rloo`; see `AdvantageSpec` for this and what
            follows.
        certainty: lambda(p): `quadratic`, `linear`, `entropy`, `step`, or a number in [0, 1].
        success: [B] bool, where success is known apart from the reward.
        success_threshold: otherwise a reward at or above it is a success, in its own dtype.
        std_correction: 1 or 0, subtracted from G in the standard deviation.
        eps: added to both denominators.
        apd: `bounded` or `paper`, the denominator D.
        max_abs: optional symmetric clamp.
        process_group: ranks that each hold a part of the batch, of any size, 0 included; `rewards`
            and what else is given are this rank's. Groups may lie across ranks: ids are the same on
            all of them, and with `group_size` the ranks' rewards follow one another in the order of
            the ranks. One collective gathers them, 24 bytes per reward and some 250 per rank (one
            more when there are more rewards on a rank than ever, from 64 on), and the host waits
            for it. Every rank of the group has to call this.
        return_stats: also return `GroupStats`. With `group_ids` this waits once for the device, to
            learn the number of groups; nothing else here does.

    Returns:
        [B] float32 (float64 for float64 rewards), without gradient; with `return_stats` a pair of
        that and `GroupStats` of [Q] tensors, of the groups of all ranks.

    Raises:
        ValueError: a shape, a value or a combination that makes no sense; or ranks that were called
            with different settings.
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
    checks.check_process_group(process_group, None)
    is_part = process_group is not None
    groups = checks.check_groups(rewards, group_size, group_ids, success, is_part)
    groups = groups._replace(wide=rewards.dtype == torch.float64)
    own = slice(None)
    if process_group is not None:
        call = parallel.Call("group_advantages", None, spec)
        part = parallel.Part(rewards.shape[0], groups=groups)
        shared = parallel.share(part, call, process_group, rewards.device)
        assert shared.groups is not None
        groups, own = shared.groups, shared.own
    advantages, table = ops.group_advantages(groups, spec, return_stats)
    advantages, table = advantages[own].to(rewards.device), table.to(rewards.device)
    if not return_stats:
        return advantages
    if group_ids is not None:
        table = table[:, : int((table[4] + table[5] > 0).sum())]
    if group_ids is not None or rewards.device.type == "cpu":
        # The device has been waited for, or there is none.
        metrics = dict(zip(GROUP_METRICS, group_metrics(table), strict=True))
        never = None if is_compiling() else never_successful(spec, success, metrics)
        if never is not None and never:
            warn_of_threshold(spec)
    return advantages, GroupStats(*table[:6].unbind(0))


def gather_inputs(
    name: str,
    tokens: torch.Tensor,
    plan: Plan | None,
    spec: LossSpec,
    advantage_spec: AdvantageSpec,
    source: dict[str, Any],
    layout: dict[str, Any],
    token_tensors: dict[str, Any],
    dtype: torch.dtype,
) -> tuple[TokenInputs, LossSpec, KnownMetrics]:
    """Validated inputs from the arguments of a loss call, or from the plan that stands for them.

    `source` is where advantages come from, `name` and `tokens` the argument that says which shape
    token tensors have, `dtype` that of what the loss is differentiated by.
    """
    checks.check_specs(spec, advantage_spec)
    process_group = source["process_group"]
    is_double = dtype == torch.float64
    known = KnownMetrics({})
    if plan is not None:
        spec = _check_plan(plan, spec, advantage_spec, {**source, **layout})
        layout = {key: getattr(plan, key) for key in layout}
        signal, per_token = plan.signal(is_double), plan.per_token
        advantages, groups = signal.advantages, None
        known = KnownMetrics(signal.metrics, plan.ranks)
    else:
        rewards, advantages = source["rewards"], source["advantages"]
        grouping = {key: source[key] for key in ("group_size", "group_ids", "success")}
        checks.check_source(rewards, advantages, grouping)
        checks.check_process_group(process_group, layout["normalizer"])
        is_part = process_group is not None
        groups = (
            None if rewards is None else checks.check_groups(rewards, **grouping, is_part=is_part)
        )
        per_token = checks.is_per_token(advantages, tokens, layout["cu_seqlens"])
    inputs = TokenInputs(
        advantages=advantages, groups=groups, per_token=per_token, **layout, **token_tensors
    )
    is_part = process_group is not None or (plan is not None and plan.n_sequences == 0)
    checks.check_tokens(name, tokens, inputs, spec, is_part)
    checks.check_denominator(
        inputs.normalizer, inputs.mask, torch.float64 if is_double else torch.float32
    )
    if inputs.groups is not None:
        wide = is_double and inputs.groups.rewards.dtype == torch.float64
        inputs = replaced(inputs, groups=replaced(inputs.groups, wide=wide))
    if process_group is not None:
        inputs, known = _share(tokens, inputs, spec, advantage_spec, process_group)
    elif inputs.groups is not None:
        inputs = replaced(inputs, groups=decide_rewards(inputs.groups, advantage_spec))
    return inputs, spec, known


def _share(
    tokens: torch.Tensor,
    inputs: TokenInputs,
    spec: LossSpec,
    advantage_spec: AdvantageSpec,
    process_group: torch.distributed.ProcessGroup,
) -> tuple[TokenInputs, KnownMetrics]:
    """Inputs with advantages and denominator of the batch of all ranks, and its group metrics."""
    n_tokens: torch.Tensor | int = tokens.numel()
    if inputs.mask is not None or inputs.cu_seqlens is not None:
        n_tokens = count_tokens(inputs.mask, inputs.cu_seqlens)
    part = parallel.Part(inputs.n_sequences(tokens), n_tokens, inputs.groups)
    call = parallel.Call.of_loss(spec, advantage_spec, inputs.normalizer)
    shared = parallel.share(part, call, process_group, tokens.device)
    known = KnownMetrics({})
    if shared.groups is not None:
        signal = ops.group_signals(shared.groups, advantage_spec)[0]
        signal = signal.of_rows(shared.own, tokens.device)
        inputs = replaced(inputs, groups=None, advantages=signal.advantages)
        known = KnownMetrics(signal.metrics, group_ranks(process_group))
    if shared.normalizer is not None:
        inputs = replaced(inputs, normalizer=shared.normalizer)
    return inputs, known


def _check_plan(
    plan: Plan, spec: LossSpec, advantage_spec: AdvantageSpec, given: dict[str, Any]
) -> LossSpec:
    """The plan's spec, after making sure that nothing contradicts the plan."""
    require_plan(plan)
    twice = [name for name, value in given.items() if value is not None]
    if twice:
        raise ValueError(f"{', '.join(twice)}: expected None with a plan, which has them already")
    if spec not in (DEFAULT_SPEC, plan.spec):
        raise ValueError(f"spec: expected the plan's spec {plan.spec}, got {spec}")
    if advantage_spec not in (DEFAULT_ADVANTAGE_SPEC, plan.advantage_spec):
        raise ValueError(
            f"advantage_spec: expected the plan's advantage_spec {plan.advantage_spec}, got "
            f"{advantage_spec}"
        )
    return plan.spec


@names_checked
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
    normalizer: torch.Tensor | float | str | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
    spec: LossSpec = DEFAULT_SPEC,
    advantage_spec: AdvantageSpec = DEFAULT_ADVANTAGE_SPEC,
    plan: Plan | None = None,
) -> LossOutput:
    """Clipped policy loss of a batch from its log-probs, group advantages included.

    One launch computes the loss, every metric and the gradient; backward is one more. Neither waits
    for the host. Token tensors have the shape of `logprobs`: [B, T] padded, or [total] packed.

    Args:
        logprobs: log-probs of the sampled tokens under the current policy, float32, bfloat16,
            float16, or float64 (eager backend). Rows may be strided; they are copied then.
        rewards: [B] any real dtype, whole groups; or give `advantages`. Their statistics are
            float32, unless rewards and log-probs (logits, hidden states) are float64.
        advantages: [B] or per token, floating-point; [B] where a packed batch allows both readings.
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
            ranks add up. A tensor that is not positive makes the loss NaN, unless all is masked.
            `global` counts those of all ranks of `process_group` and divides by the number of
            ranks, so that the mean over ranks of losses and gradients (DDP, FSDP) is that of the
            whole batch; a trainer that adds them up divides the loss by that number. If
            micro-batches follow, have the batch counted once: by `make_plan`.
        process_group: ranks that each hold a part of the batch, all of which call this: groups may
            lie across them, as in `group_advantages`, and `normalizer` may be `global`. One
            collective; see there. Not inside torch.compile, where a plan made before will do.
        spec: which loss, and how it is aggregated.
        advantage_spec: how rewards become advantages.
        plan: of `make_plan`, in place of rewards, advantages, groups, mask, cu_seqlens, normalizer
            and process_group.

    Returns:
        `LossOutput`. Metrics are means over the scored tokens (`scored_tokens` of `active_tokens`;
        a token whose advantage is 0 is not scored unless KL or `score_all` needs it), NaN if there
        is none:
        `clip_fraction_low`, `clip_fraction_high`, `ratio_mean`, `ratio_max` (their largest),
        `approx_kl` (k3 of new against old), `ref_kl` with a reference; from rewards also
        `success_ratio_mean`, `lambda_mean` (over the `active_groups`, those with a finite reward),
        `zero_advantage_groups`, `nonfinite_rewards` (counts). With `process_group` these speak of
        the groups of all ranks; `metrics.reduce(process_group)` does it for every metric.

    Raises:
        ValueError: a shape, a value, a device or a combination that makes no sense.
        TypeError: an argument of the wrong type.
    """
    inputs, spec, known = gather_inputs(
        "logprobs",
        logprobs,
        plan,
        spec,
        advantage_spec,
        {
            "rewards": rewards,
            "advantages": advantages,
            "group_size": group_size,
            "group_ids": group_ids,
            "success": success,
            "process_group": process_group,
        },
        {"mask": mask, "cu_seqlens": cu_seqlens, "normalizer": normalizer},
        {
            "old_logprobs": old_logprobs,
            "ref_logprobs": ref_logprobs,
            "rollout_logprobs": rollout_logprobs,
            "token_weights": token_weights,
        },
        getattr(logprobs, "dtype", torch.float32),
    )
    checks.check_no_bonus(spec)
    if not torch.is_grad_enabled():
        # Otherwise the node would be told that a gradient is needed, and write one for nobody.
        logprobs = logprobs.detach()
    loss, results, computed = MapoLossFunction.apply(logprobs, inputs, spec, advantage_spec)
    metrics = name_metrics(results, inputs, known)
    del metrics["entropy"]
    return LossOutput(loss, metrics, used_advantages(computed, inputs))


def name_metrics(
    results: torch.Tensor, inputs: TokenInputs, known: KnownMetrics
) -> dict[str, torch.Tensor]:
    """Results by name, without those that this batch has nothing to say about."""
    results = results.detach()[: len(RESULTS)]
    values = dict(zip(RESULTS, results.unbind(0), strict=True))
    del values["gradient_scale"]
    if inputs.ref_logprobs is None:
        del values["ref_kl"]
    if inputs.groups is None:
        for name in GROUP_METRICS:
            del values[name]
    values.update(known.values)
    return as_metrics(values, known.ranks)


def used_advantages(computed: torch.Tensor, inputs: TokenInputs) -> torch.Tensor:
    """The advantages [B] that the loss was computed with, as it returns them."""
    return (computed if inputs.advantages is None else inputs.advantages).detach()


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
        spec: LossSpec = DEFAULT_SPEC,
        advantage_spec: AdvantageSpec = DEFAULT_ADVANTAGE_SPEC,
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
