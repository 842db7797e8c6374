"""Group advantages against the oracle, and what must not change them."""

from dataclasses import replace

import torch
from advantage_oracle import STATS
from batches import constants
from calls import TOLERANCES, assert_within, check_advantages, representable
from cases import Groups
from hypothesis import strategies as st
from strategies import groupings, groups, one_of

import mapo_kernels as mk
from mapo_kernels.config import override
from mapo_kernels.spec import ESTIMATORS


def advantages(group, device, **also):
    """What `group_advantages` returns for a `Groups`, on the CPU."""
    told = {
        k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in group.arguments.items()
    }
    settings = {k: getattr(group.spec, k) for k in group.spec.__dataclass_fields__}
    out = mk.group_advantages(group.rewards.to(device), **told, **settings, **also)
    if isinstance(out, torch.Tensor):
        return out.cpu()
    return out[0].cpu(), {name: getattr(out[1], name).cpu() for name in STATS}


@st.composite
def calls_of_group_advantages(draw):
    wide = draw(one_of(True, False))
    return draw(groups(draw(st.integers(1, 12)), wide=wide)), draw(constants())


def test_group_advantages(device, search):
    def check(drawn):
        group, constants = drawn
        with override(constants):
            found, stats = advantages(group, device, return_stats=True)
            alone = advantages(group, device)
        exact = check_advantages(group, found)
        # Without statistics rows are matched by id, with them sorted.
        check_advantages(group, alone)
        for name, value in exact.stats.items():
            assert stats[name].dtype == found.dtype
            if name in exact.stats_scale:
                fits = representable(value, found.dtype)
                scale, tolerance = exact.stats_scale[name][fits], TOLERANCES[found.dtype]
                assert_within(name, stats[name][fits], value[fits], scale, tolerance)
            else:
                assert torch.equal(stats[name].double(), value), name

    search(check, calls_of_group_advantages(), examples=100)


@st.composite
def permuted_calls(draw):
    n = draw(st.integers(2, 12))
    group = draw(groups(n, wide=False))
    group.arguments["group_ids"] = group.ids
    group.arguments.pop("group_size", None)
    return group, torch.tensor(draw(st.permutations(range(n)))), draw(constants())


def reordered(group, order):
    n = len(order)
    told = {k: v[order] if len(v) == n else v for k, v in group.arguments.items()}
    return replace(group, rewards=group.rewards[order], ids=group.ids[order], arguments=told)


def test_permuted_rows_have_permuted_advantages(device, search):
    def check(drawn):
        group, order, constants = drawn
        with override(constants):
            straight, permuted = (advantages(x, device) for x in (group, reordered(group, order)))
        assert torch.equal(permuted, straight[order])

    search(check, permuted_calls(), examples=60)


@st.composite
def shifted_and_scaled(draw):
    """Rewards whose sums with a shift are exact, the shift, and a power of 2."""
    n = draw(st.integers(2, 12))
    ids, told = draw(groupings(n))
    told["success"] = torch.tensor([draw(st.booleans()) for _ in range(n)])
    rewards = torch.tensor([draw(st.integers(-8, 8)) / 4 for _ in range(n)])
    rewards = rewards.to(draw(one_of(torch.float32, torch.float64)))
    estimator, c = draw(st.sampled_from(ESTIMATORS)), draw(one_of(1, 0))
    # Next to the deviations this eps is nothing, so that it has no unit.
    spec = mk.AdvantageSpec(estimator=estimator, std_correction=c, eps=1e-30)
    shift, exponent = draw(one_of(1.0, -3.5, 1024.0, 2.0**20)), draw(st.integers(-40, 40))
    return Groups(rewards, ids, told, spec), shift, exponent, draw(constants())


def test_shifted_and_scaled_rewards(device, search):
    """Bit for bit: z-scores do not feel a shift, and no ratio feels a power of 2."""

    def check(drawn):
        group, shift, exponent, constants = drawn
        factor = 2.0**exponent
        with override(constants):
            plain, shifted, scaled = (
                advantages(replace(group, rewards=r), device)
                for r in (group.rewards, group.rewards + shift, group.rewards * factor)
            )
        if group.spec.estimator in ("grpo", "mean", "rloo"):
            assert torch.equal(shifted, plain)
        in_units = group.spec.estimator in ("mean", "rloo")
        assert torch.equal(scaled, plain * factor if in_units else plain)

    search(check, shifted_and_scaled(), examples=60)
