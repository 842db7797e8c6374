"""What a user writes with every public name, for a strict type checker: see `test_types`."""

from __future__ import annotations

import torch
from torch.distributed import ProcessGroup

from mapo_kernels import (
    AdvantageSpec,
    GroupStats,
    LossOutput,
    LossSpec,
    MapoLinearLoss,
    MapoLinearLossFunction,
    MapoLogitsLoss,
    MapoLogitsLossFunction,
    MapoLoss,
    MapoLossFunction,
    Metrics,
    Plan,
    SamplingMask,
    TokenLossOutput,
    __version__,
    describe_backend,
    group_advantages,
    make_plan,
    mapo_loss,
    mapo_loss_from_hidden,
    mapo_loss_from_logits,
    resolve_backend,
    set_backend,
    token_logprobs,
    token_logprobs_from_hidden,
)


def prepare(rewards: torch.Tensor, mask: torch.Tensor, ranks: ProcessGroup | None) -> Plan:
    """Advantages with and without statistics, and the plan of an optimizer batch."""
    set_backend("auto")
    print(__version__, describe_backend(), resolve_backend("cpu").upper())
    advantages: torch.Tensor = group_advantages(rewards, group_size=8, certainty="linear")
    again, stats = group_advantages(rewards, group_size=8, scale="batch", return_stats=True)
    kept: GroupStats = stats
    print((advantages - again).abs().max(), kept.success_ratio)
    spec = LossSpec(objective="clip", aggregation="seq-mean-token-mean", eps_high=0.28, beta=0.01)
    plan: Plan = make_plan(
        rewards=rewards,
        group_size=8,
        mask=mask,
        spec=spec,
        advantage_spec=AdvantageSpec(estimator="mapo", certainty=0.5, difficulty="focal"),
        process_group=ranks,
        normalizer=None if ranks is None else "global",
    )
    return plan.micro_batch(slice(0, 8))


def log(metrics: Metrics, ranks: ProcessGroup | None) -> dict[str, float]:
    """Metrics of all ranks as numbers."""
    return {name: float(value) for name, value in metrics.reduce(ranks).items()}


def step(
    logits: torch.Tensor, ids: torch.Tensor, plan: Plan, kept: SamplingMask
) -> dict[str, float]:
    """The loss from logits and from log-probs, with and without numbers of tokens."""
    with torch.no_grad():
        old = token_logprobs(logits, ids, temperature=0.7, plan=plan)
        ref, entropy = token_logprobs(logits, ids, return_entropy=True)
    out: LossOutput = mapo_loss_from_logits(
        logits, ids, plan=plan, old_logprobs=old, ref_logprobs=ref, sampling_mask=kept
    )
    (gradient,) = torch.autograd.grad(out.loss, [logits])
    more: TokenLossOutput = mapo_loss_from_logits(logits, ids, plan=plan, return_logprobs=True)
    print(gradient, more.logprobs, more.entropy, entropy)
    plain = mapo_loss(ref, plan=plan, old_logprobs=old, ref_logprobs=ref)
    same = MapoLoss(plan.spec)(ref, plan=plan, old_logprobs=old, ref_logprobs=ref)
    third: LossOutput = MapoLogitsLoss(plan.spec, temperature=0.7)(logits, ids, plan=plan)
    print(plain.loss - same.loss, plain.advantages, third.loss)
    both: Metrics = out.metrics | plain.metrics
    return log(both, None)


def step_from_hidden(
    head: torch.nn.Linear, hidden: torch.Tensor, ids: torch.Tensor, plan: Plan, wide: bool
) -> torch.Tensor:
    """The same from hidden states, by a function and by a module."""
    old, _ = token_logprobs_from_hidden(hidden, head.weight, ids, return_entropy=True)
    ref: torch.Tensor = token_logprobs_from_hidden(hidden, head.weight, ids, softcap=30.0)
    out = mapo_loss_from_hidden(
        hidden, head.weight, ids, plan=plan, bias=head.bias, old_logprobs=old, ref_logprobs=ref
    )
    either = mapo_loss_from_hidden(hidden, head.weight, ids, plan=plan, return_logprobs=wide)
    print(isinstance(either, TokenLossOutput))
    policy = MapoLinearLoss(head, plan.spec, chunk_rows=1024, logit_scale=0.5)
    more = policy(hidden, ids, plan=plan, return_sum_pi_squared=True)
    print(more.sum_pi_squared, policy(hidden, ids, plan=plan).loss)
    return out.loss


NODES: tuple[type[torch.autograd.Function], ...] = (
    MapoLossFunction,
    MapoLogitsLossFunction,
    MapoLinearLossFunction,
)
