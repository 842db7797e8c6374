"""Group advantages against the oracle, and what must not change them."""

from dataclasses import replace

import torch
from advantage_oracle import STATS
from batches import constants
from calls import TOLERANCES, assert_within, check_advantages, shrunk
from hypothesis import strategies as st
from strategies import groups, one_of

import mapo_kernels as mk


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
        with shrunk(constants):
            found, stats = advantages(group, device, return_stats=True)
            alone = advantages(group, device)
        exact = check_advantages(group, found)
        # Without statistics rows are matched by id, with them sorted.
        check_advantages(group, alone)
        for name, value in exact.stats.items():
            assert stats[name].dtype == found.dtype
            if name in exact.stats_scale:
                scale = exact.stats_scale[name]
                assert_within(name, stats[name], value, scale, TOLERANCES[found.dtype])
            else:
                assert torch.equal(stats[name].double(), value), name

    search(check, calls_of_group_advantages(), examples=100)


def exact_sums(draw, n, ids):
    """Rewards whose sums, means and squares float32 holds without rounding."""
    return [draw(st.integers(-8, 8)) / 4 for _ in range(n)]


@st.composite
def permuted_calls(draw):
    n = draw(st.integers(2, 12))
    group = draw(groups(n, wide=False))
    group.arguments["group_ids"] = group.ids
    group.arguments.pop("group_size", None)
    return group, torch.tensor(draw(st.permutations(range(n)))), draw(constants())


def reordered(group, order):
    told = {k: v[order] for k, v in group.arguments.items()}
    return replace(group, rewards=group.rewards[order], ids=group.ids[order], arguments=told)


def test_permuted_rows_have_permuted_advantages(device, search):
    def check(drawn):
        group, order, constants = drawn
        with shrunk(constants):
            straight, permuted = (advantages(x, device) for x in (group, reordered(group, order)))
        assert torch.equal(permuted, straight[order])

    search(check, permuted_calls(), examples=60)
