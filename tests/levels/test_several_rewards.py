"""Rewards [B, K]: summed, or normalised one by one and then summed (GDPO)."""

import numpy as np
import pytest
import torch
from support import NAN, assert_close

import mapo_kernels as mk
import reference
from mapo_kernels.spec import ESTIMATORS

IDS = torch.tensor([4, 4, -1, 9, 4, 9, -1, 4, -1, -1, 9, 9])
BY_SIZE = torch.arange(12) // 4
WEIGHTS = (1.0, 0.5, 2.0)
APART = {"multi_objective_aggregation": "normalize_then_sum"}


def several(dtype=torch.float32, absent=False):
    rewards = torch.rand(12, 3)
    rewards[:, 0] = (rewards[:, 0] < 0.4).float()
    rewards[8:, 1] = 0.25
    if absent:
        rewards[2, 1] = NAN
        rewards[5, 0] = torch.inf
    return rewards.to(dtype)


def advantages(rewards, device, **settings):
    settings = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in settings.items()}
    return mk.group_advantages(rewards.to(device), **settings)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("apart", [{}, APART], ids=["summed", "apart"])
@pytest.mark.parametrize("absent", [False, True])
def test_every_estimator_equals_the_oracle(estimator, apart, absent, device):
    rewards = several(absent=absent)
    settings = {"estimator": estimator, "reward_weights": WEIGHTS, "std_correction": 0, **apart}
    settings |= {"difficulty": "focal", "max_abs": 1.5, "group_weight": torch.linspace(-1, 2, 12)}
    exact, exact_stats = reference.group_advantages(rewards, IDS, **settings)
    for want in (False, True):
        found = advantages(rewards, device, group_ids=IDS, return_stats=want, **settings)
        assert_close(found[0] if want else found, exact, 1e-5)
    for name in ("mean", "std", "success_ratio", "certainty", "size", "nonfinite"):
        expected = torch.tensor([getattr(exact_stats[i], name) for i in sorted(exact_stats)])
        assert_close(getattr(found[1], name), expected.double(), 1e-5)
    exact, _ = reference.group_advantages(rewards, BY_SIZE, **settings)
    assert_close(advantages(rewards, device, group_size=4, **settings), exact, 1e-5)


@pytest.mark.parametrize("apart", [{}, APART], ids=["summed", "apart"])
def test_float64_is_exact_on_the_eager_backend(apart):
    rewards = several(torch.float64, absent=True)
    settings = {"reward_weights": WEIGHTS, **apart}
    exact, _ = reference.group_advantages(rewards, IDS, **settings)
    found = mk.group_advantages(rewards, group_ids=IDS, **settings)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_one_reward_is_that_reward_bit_for_bit(dtype, device):
    rewards = (torch.rand(24) * 3).to(dtype)
    for told in ({"group_size": 4}, {"group_ids": torch.arange(24) % 5}):
        plain = advantages(rewards, device, return_stats=True, **told)
        settings = {"reward_weights": [1], "return_stats": True, **told}
        found = advantages(rewards[:, None], device, **settings)
        assert torch.equal(found[0], plain[0])
        assert all(torch.equal(a, b) for a, b in zip(found[1], plain[1], strict=True))
        one, other = (
            advantages(x, device, estimator="grpo", reward_weights=w, **APART, **told)
            for x, w in ((rewards, None), (rewards[:, None], (1.0,)))
        )
        assert torch.equal(one, other)


@pytest.mark.parametrize("apart", [{}, APART], ids=["summed", "apart"])
def test_a_reward_of_weight_0_plays_no_part(apart, device):
    rewards = several()
    rewards[3, 1] = NAN
    weights = (1.0, 0.0, 2.0)
    found = advantages(rewards, device, group_size=4, reward_weights=weights, **apart)
    kept = advantages(rewards[:, ::2], device, group_size=4, reward_weights=(1.0, 2.0), **apart)
    assert torch.equal(found, kept)
    assert (found != 0).all()


@pytest.mark.parametrize("apart", [{}, APART], ids=["summed", "apart"])
def test_a_sequence_without_one_of_its_rewards_is_absent(apart, device):
    """As if it were not there: the others' advantages are those of the rest of the group."""
    rewards = several()
    rewards[5, 2] = NAN
    rest = torch.arange(12) != 5
    told = {"reward_weights": WEIGHTS, **apart}
    found, stats = advantages(rewards, device, group_ids=BY_SIZE, return_stats=True, **told)
    without = advantages(rewards[rest], device, group_ids=BY_SIZE[rest], **told)
    assert found[5] == 0
    assert_close(found.cpu()[rest], without, 1e-6)
    assert stats.size.tolist() == [4, 3, 4] and stats.nonfinite.tolist() == [0, 1, 0]


def test_the_total_decides_success_unless_it_is_given(device):
    """0.9 + 0.1 in bfloat16 reaches 1: the sum is rounded to the rewards' dtype."""
    for dtype in (torch.float32, torch.bfloat16):
        rewards = torch.tensor([[0.9, 0.1], [0.9, 0.0], [0.0, 0.1], [1.0, 0.1]], dtype=dtype)
        for apart in ({}, APART):
            told = {"group_size": 4, "return_stats": True, "reward_weights": (1, 1), **apart}
            _, stats = advantages(rewards, device, **told)
            assert stats.success_ratio.item() == 0.5
            told["success"] = torch.tensor([True, False, False, False])
            _, stats = advantages(rewards, device, **told)
            assert stats.success_ratio.item() == 0.25


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_reward_that_is_equal_in_a_group_adds_exactly_nothing(estimator, device):
    rewards = several()
    rewards[:4, 1] = 0.1
    rewards[8:] = torch.tensor([1.0, 0.1, 0.3])
    told = {"group_size": 4, "estimator": estimator, "return_stats": True, **APART}
    found, _ = advantages(rewards, device, reward_weights=(1, 1, 1), **told)
    assert (found[8:] == 0).all()
    # Of the first group alone: what the others add is one number, the deviation of the batch.
    without, _ = advantages(rewards[:, ::2], device, reward_weights=(1, 1), **told)
    ratio = (found[:4] / without[:4]).cpu()
    torch.testing.assert_close(ratio, ratio[:1].expand(4), rtol=1e-6, atol=0)
    out = mk.mapo_loss(
        torch.full((12, 1), -1.0, device=device),
        rewards=rewards.to(device),
        group_size=4,
        mask=torch.ones(12, 1, device=device),
        advantage_spec=mk.AdvantageSpec(estimator=estimator, reward_weights=(1, 1, 1), **APART),
    )
    assert out.metrics["zero_advantage_groups"] == 1
    assert torch.equal(out.advantages, found)


@pytest.mark.parametrize("apart", [{}, APART], ids=["summed", "apart"])
def test_order_and_scale(apart, device):
    rewards, order = several(), torch.randperm(12)
    told = {"reward_weights": WEIGHTS, **apart}
    straight = advantages(rewards, device, group_ids=IDS, **told)
    permuted = advantages(rewards[order], device, group_ids=IDS[order], **told)
    assert torch.equal(permuted, straight[order.to(device)])
    # The order of the rewards, with their weights.
    turned = told | {"reward_weights": WEIGHTS[::-1]}
    assert_close(advantages(rewards.flip(1), device, group_ids=IDS, **turned), straight, 1e-6)
    # A larger weight of all is nothing to a deviation.
    large = told | {"reward_weights": tuple(8 * w for w in WEIGHTS)}
    large |= {"estimator": "grpo", "eps": 1e-20}
    small = told | {"estimator": "grpo", "eps": 1e-20}
    success = {"success": rewards[:, 0] == 1}
    one, other = (
        advantages(rewards, device, group_ids=IDS, **x, **success) for x in (small, large)
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("scale", [1e-3, 1e6])
def test_normalised_rewards_do_not_feel_their_unit(scale, device):
    rewards = several()
    other = rewards * torch.tensor([1.0, scale, 1.0])
    told = {
        "group_size": 4,
        "estimator": "grpo",
        "eps": 1e-12,
        "reward_weights": (1, 1, 1),
        **APART,
    }
    success = {"success": rewards[:, 0] == 1}
    one, two = (advantages(x, device, **told, **success) for x in (rewards, other))
    assert_close(two, one, 1e-5)


def test_large_rewards(device):
    top = torch.finfo(torch.float32).max
    rewards = torch.tensor([[top, 1.0], [-top, 0.0], [0.0, 1.0], [top, 0.0]])
    for apart in ({}, APART):
        told = {"group_size": 4, "estimator": "grpo", "reward_weights": (1, 1), **apart}
        found = advantages(rewards, device, **told)
        assert found.isfinite().all() and found[0] > found[2] > found[1]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("aggregation", ["token-mean", "prompt-mean"])
@pytest.mark.parametrize("apart", [{}, APART], ids=["summed", "apart"])
def test_losses_take_several_rewards(apart, aggregation, packed, device):
    """At every level, planned or not: what the same advantages give."""
    rewards = several(absent=True).to(device)
    ids = torch.randint(0, 7, (12, 3), device=device)
    hidden = torch.randn(12, 3, 4, device=device)
    weight = torch.randn(7, 4, device=device)
    mask = (torch.rand(12, 3, device=device) < 0.7).float()
    told = {"group_ids": IDS.to(device)}
    layout = {"mask": mask}
    if packed:
        ids, hidden, mask = ids.reshape(36), hidden.reshape(36, 4), mask.reshape(36)
        layout = {"mask": mask, "cu_seqlens": torch.arange(0, 37, 3, device=device)}
    logits = hidden @ weight.T
    spec = mk.LossSpec(aggregation=aggregation)
    settings = {"reward_weights": WEIGHTS, **apart}
    advantage_spec = mk.AdvantageSpec(**settings)
    source = {"rewards": rewards, **told, "advantage_spec": advantage_spec}
    found = mk.group_advantages(rewards, **told, **settings)
    known = {"advantages": found} | (told if aggregation == "prompt-mean" else {})
    plan = mk.make_plan(**source, **layout, spec=spec)
    assert_close(plan.advantages, found, 1e-6)
    logprobs = mk.token_logprobs(logits, ids)
    calls = {
        "log-probs": lambda **x: mk.mapo_loss(logprobs, **x),
        "logits": lambda **x: mk.mapo_loss_from_logits(logits, ids, **x),
        "hidden": lambda **x: mk.mapo_loss_from_hidden(hidden, weight, ids, **x),
    }
    for call in calls.values():
        expected = call(**known, **layout, spec=spec)
        for out in (call(**source, **layout, spec=spec), call(plan=plan)):
            assert_close(out.loss, expected.loss, 1e-5)
            assert_close(out.advantages, found, 1e-6)
            assert out.metrics["nonfinite_rewards"] == 2
            assert out.metrics["active_groups"] == 3


@pytest.mark.parametrize("apart", [{}, APART], ids=["summed", "apart"])
def test_compiled_calls(apart):
    rewards = several(absent=True)
    settings = {"group_size": 4, "reward_weights": WEIGHTS, **apart}
    expected = mk.group_advantages(rewards, **settings)
    torch.compiler.reset()
    compiled = torch.compile(mk.group_advantages, backend="eager", fullgraph=True)
    assert_close(compiled(rewards, **settings), expected, 1e-6)


@pytest.mark.parametrize(
    ("rewards", "weights", "error", "message"),
    [
        (torch.ones(4, 2, 1), (1, 1), ValueError, r"rewards: expected shape \[B\] .*, or \[B, K\]"),
        (torch.ones(4, 2), None, ValueError, r"rewards: .* or \[B, K\] with K reward_weights"),
        (torch.ones(4, 0), (), ValueError, "reward_weights: expected a number that is not 0"),
        (torch.ones(4), (1.0,), ValueError, "reward_weights: expected one number for each of"),
        (torch.ones(4, 2), (1.0,), ValueError, "reward_weights: .* got 1 with rewards"),
        (torch.ones(4, 2), (0.0, 0), ValueError, "reward_weights: expected a number that is not"),
        (torch.ones(4, 2), (1, NAN), ValueError, "reward_weights: expected finite numbers"),
        (torch.ones(4, 2), (1, True), TypeError, "reward_weights: expected a tuple or list"),
        (torch.ones(4, 2), torch.ones(2), TypeError, "reward_weights: expected a tuple or list"),
        (torch.ones(4, 2), np.ones(2), TypeError, "reward_weights: expected a tuple or list"),
        (torch.ones(4, 2), (1, 10**400), ValueError, "reward_weights: expected finite numbers"),
        (torch.ones(4, 2), "12", TypeError, "reward_weights: expected a tuple or list"),
    ],
)
def test_bad_rewards_and_weights(rewards, weights, error, message):
    with pytest.raises(error, match=message):
        mk.group_advantages(rewards, group_size=2, reward_weights=weights)


def test_bad_combinations():
    with pytest.raises(ValueError, match="scale: expected 'group' with multi_objective_aggreg"):
        mk.AdvantageSpec(scale="none", **APART)
    with pytest.raises(ValueError, match="multi_objective_aggregation: expected one of"):
        mk.AdvantageSpec(multi_objective_aggregation="sum")
    ids, weights = torch.ones(4, 2, dtype=torch.int64), (1, 1)
    with pytest.raises(ValueError, match=r"group_ids: .*one id per sequence"):
        mk.group_advantages(torch.ones(4, 2), group_ids=ids, reward_weights=weights)
    told = {"group_size": 2, "advantage_spec": mk.AdvantageSpec(reward_weights=weights)}
    with pytest.raises(ValueError, match=r"rewards: .*\[12, 2\]"):
        mk.mapo_loss(torch.zeros(12, 1), rewards=torch.ones(6, 2), **told)
    assert mk.AdvantageSpec(reward_weights=[1, 2]) == mk.AdvantageSpec(reward_weights=(1.0, 2.0))
