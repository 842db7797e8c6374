"""What the ranks of `test_rank_agreement.py` do; every function runs on all of them.

Ranks that are called differently must find out: an error or NaN on each of them, never a number.
"""

import math

import torch
import torch.distributed as dist

import mapo_kernels as mk
from mapo_kernels import parallel


def is_odd():
    """Whether this is the rank that is called otherwise: the last one."""
    return dist.get_rank() == dist.get_world_size() - 1


def outcome(function):
    """The error of a call, or the loss that it returns, as a text; a gradient must agree."""
    try:
        loss, *grads = function()
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    if math.isnan(loss):
        assert all(grad.isnan().all() for grad in grads)
    return str(float(loss))


def plans_and_losses_that_differ(backend, device):
    """What each rank is told by losses of given advantages, of settings that all agreed on."""
    mk.set_backend(backend)
    group = dist.new_group()
    ones = torch.ones(2, 3, device=device)
    pair = torch.tensor([1.0, -2.0], device=device)
    given = {"mask": ones, "advantages": pair, "process_group": group}
    one, other = mk.LossSpec(), mk.LossSpec(aggregation="seq-mean-token-mean")

    def loss(spec, normalizer):
        logp = torch.zeros(2, 3, device=device, requires_grad=True)
        out = mk.mapo_loss(logp, spec=spec, normalizer=normalizer, **given)
        out.loss.backward()
        return out.loss, logp.grad

    def plan(spec, normalizer):
        made = mk.make_plan(spec=spec, normalizer=normalizer, **given)
        logp = torch.zeros(2, 3, device=device, requires_grad=True)
        out = mk.mapo_loss(logp, plan=made)
        out.loss.backward()
        return out.loss, logp.grad

    normalizers = (None, 4.0, "global")
    for spec in (one, other):
        for normalizer in normalizers:
            assert loss(spec, normalizer)[0].isfinite() and plan(spec, normalizer)[0].isfinite()
    told = {}
    for call in (loss, plan):
        for normalizer in normalizers:
            spec = other if is_odd() else one
            told[f"{call.__name__}, spec, {normalizer}"] = outcome(lambda: call(spec, normalizer))  # noqa: B023
            for changed in normalizers:
                if changed != normalizer:
                    mine = changed if is_odd() else normalizer
                    name = f"{call.__name__}, {normalizer} and {changed}"
                    told[name] = outcome(lambda: call(one, mine))  # noqa: B023
    assert loss(one, "global")[0].isfinite()
    return told


def equal_specs(backend, device):
    """Ranks with equal specs that were written in other types agree."""
    mk.set_backend(backend)
    group = dist.new_group()
    spec = mk.LossSpec(beta=0 if is_odd() else 0.0, dual_clip=3 if is_odd() else 3.0)
    threshold = 1 if is_odd() else 1.0
    rewards = torch.tensor([0.0, 1.0], device=device)
    given = {"mask": torch.ones(2, 3, device=device), "process_group": group}
    mk.make_plan(
        rewards=rewards,
        group_size=2,
        spec=spec,
        advantage_spec=mk.AdvantageSpec(success_threshold=threshold),
        **given,
    )
    mk.group_advantages(
        rewards, group_size=2, success_threshold=threshold, max_abs=2 * threshold,
        process_group=group,
    )  # fmt: skip


def annealed(backend, device):
    """How many settings a rank remembers after many steps of a coefficient that is annealed."""
    mk.set_backend(backend)
    group = dist.new_group()
    given = {
        "mask": torch.ones(2, 3, device=device),
        "advantages": torch.ones(2, device=device),
        "ref_logprobs": torch.zeros(2, 3, device=device),
        "process_group": group,
        "normalizer": "global",
    }
    logp = torch.zeros(2, 3, device=device)
    for step in range(100):
        out = mk.mapo_loss(logp, spec=mk.LossSpec(beta=1.0 / (step + 1)), **given)
        assert out.loss.isfinite()
    return len(parallel._memories[group].calls)
