"""What the ranks of `test_rank_agreement.py` do; every function runs on all of them.

Ranks that are called differently must find out: an error or NaN on each of them, never a number.
"""

import copy
import math
import pickle

import torch
import torch.distributed as dist

import mapo_kernels as mk
from mapo_kernels.distributed import data


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

    def rewarded(spec, normalizer):
        rest = {"mask": ones, "process_group": group, "normalizer": normalizer}
        logp = torch.zeros(2, 3, device=device)
        return (mk.mapo_loss(logp, spec=spec, rewards=pair, group_size=2, **rest).loss,)

    normalizers = (None, 4.0, "global")
    for spec in (one, other):
        for normalizer in normalizers:
            for call in (loss, plan, rewarded):
                assert call(spec, normalizer)[0].isfinite()
    told = {}
    for call in (loss, plan):
        for normalizer in normalizers:
            mine = rewarded if is_odd() else call
            told[f"{call.__name__}, rewards, {normalizer}"] = outcome(lambda: mine(one, normalizer))  # noqa: B023
            spec = other if is_odd() else one
            told[f"{call.__name__}, spec, {normalizer}"] = outcome(lambda: call(spec, normalizer))  # noqa: B023
            for changed in normalizers:
                if changed != normalizer:
                    kind = changed if is_odd() else normalizer
                    name = f"{call.__name__}, {normalizer} and {changed}"
                    told[name] = outcome(lambda: call(one, kind))  # noqa: B023
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
    for step in range(40):
        out = mk.mapo_loss(logp, spec=mk.LossSpec(beta=1.0 / (step + 1)), **given)
        assert out.loss.isfinite()
    return len(data._memories[group].calls)


def outcome_of_reduce(metrics, group=None):
    """The error of reducing, or the reduced metrics."""
    try:
        return metrics.reduce(group)
    except ValueError as error:
        return str(error)


def halves():
    """This rank's group when the first and the second half of the ranks have one each."""
    rank, size = dist.get_rank(), dist.get_world_size()
    both = [dist.new_group(list(x)) for x in (range(size // 2), range(size // 2, size))]
    return both[rank >= size // 2]


def metrics_of_a_plan(device, group, **given):
    """Metrics of a loss whose rewards lie on the ranks of `group`."""
    rewards = torch.tensor([1.0, 1.0, 0.0, 0.5], device=device)
    plan = mk.make_plan(
        rewards=rewards, group_size=4, mask=torch.ones(4, 3, device=device),
        process_group=group, **given,
    )  # fmt: skip
    return mk.mapo_loss(torch.zeros(4, 3, device=device), plan=plan).metrics


def reduced_over_other_ranks(backend, device):
    """What ranks are told that reduce over more, fewer or other ranks than their plan had."""
    mk.set_backend(backend)
    world, half, told = dist.group.WORLD, halves(), {}
    told["more"] = outcome_of_reduce(metrics_of_a_plan(device, half))
    told["fewer"] = outcome_of_reduce(metrics_of_a_plan(device, world), half)
    # One rank holds no sequence, and has no metrics that say whose groups they speak of.
    metrics = metrics_of_a_plan(device, half)
    told["more, a rank without metrics"] = outcome_of_reduce(mk.Metrics() if is_odd() else metrics)
    # One rank has groups of its own: it keeps what speaks of tokens, the rest has no meaning.
    own = metrics_of_a_plan(device, None)
    told["more, a rank with groups of its own"] = outcome_of_reduce(own if is_odd() else metrics)
    reduced = metrics_of_a_plan(device, world).reduce(world)
    told["twice"] = outcome_of_reduce(reduced)
    # And every rank is where the others are; the same ranks may have another group.
    metrics = metrics_of_a_plan(device, world).reduce(dist.new_group())
    assert metrics["active_groups"] == dist.get_world_size()
    return told


def copies_of_metrics(backend, device):
    """Whatever makes Metrics of Metrics keeps whose groups they speak of."""
    mk.set_backend(backend)
    metrics = metrics_of_a_plan(device, dist.group.WORLD)
    expected = metrics.reduce()
    assert expected["active_groups"] == dist.get_world_size()
    updated, joined = mk.Metrics(), mk.Metrics()
    updated.update(metrics)
    joined |= metrics
    copies = {
        "copy": metrics.copy(),
        "Metrics": mk.Metrics(metrics),
        "copy.copy": copy.copy(metrics),
        "copy.deepcopy": copy.deepcopy(metrics),
        "pickle": pickle.loads(pickle.dumps(metrics)),
        "or nothing": metrics | {},
        "nothing or": {} | metrics,
        "or itself": metrics | metrics,
        "empty or": mk.Metrics() | metrics,
        "or empty": metrics | mk.Metrics(),
        "update": updated,
        "in place": joined,
        "copy of a copy": metrics.copy().copy(),
    }
    for name, found in copies.items():
        assert type(found) is mk.Metrics and found == metrics, name
        assert found.across_ranks and found.ranks == metrics.ranks, name
        assert found.reduce() == expected, name
    metrics.copy().clear()
    assert metrics and (metrics | {"loss": torch.ones(())})["loss"] == 1
    own = metrics_of_a_plan(device, None)
    for join in (own.__or__, own.__ior__, own.update, lambda x: own.copy() | x):
        try:
            join(metrics)
        except ValueError as error:
            assert "metrics: expected" in str(error)
        else:
            raise AssertionError("metrics of other ranks were mixed")
    assert expected.copy().reduced


def means_of_nothing(backend, device):
    """A rank that scored no token has means of NaN: they count for nothing, if another has some."""
    mk.set_backend(backend)
    metrics = mk.mapo_loss(
        torch.zeros(2, 3, device=device),
        old_logprobs=torch.full((2, 3), -0.1, device=device),
        advantages=torch.ones(2, device=device),
        mask=torch.ones(2, 3, device=device),
    ).metrics
    nothing = metrics.copy()
    for name in ("clip_fraction_low", "clip_fraction_high", "ratio_mean", "approx_kl", "ratio_max"):
        nothing[name] = torch.full((), math.nan, device=device)
    nothing["scored_tokens"] = torch.zeros((), device=device)
    reduced = (nothing if is_odd() else metrics).reduce()
    for name in ("ratio_mean", "ratio_max", "approx_kl"):
        assert torch.isclose(reduced[name], metrics[name]), name
    assert reduced["scored_tokens"] == 6 * (dist.get_world_size() - 1)
    reduced = nothing.reduce()
    assert reduced["ratio_mean"].isnan() and reduced["scored_tokens"] == 0
