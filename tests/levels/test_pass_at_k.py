"""Advantages for pass@k, against all k-subsets of a group, one by one."""

from itertools import combinations

import pytest
import torch
from support import NAN, assert_close

import mapo_kernels as mk
import reference
from mapo_kernels.spec import ESTIMATORS
from reference import certainty_weight


def advantages(rewards, device, **settings):
    settings = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in settings.items()}
    return mk.group_advantages(rewards.to(device), **settings)


def by_enumeration(succeeded, k, estimator, c, eps=1e-6):
    """Advantages [G], and the share of the k-subsets with a success: every subset is looked at."""
    n = len(succeeded)
    subsets = list(combinations(range(n), k))
    of_subset = [float(any(succeeded[i] for i in subset)) for subset in subsets]
    own = torch.tensor(
        [
            sum(r for s, r in zip(subsets, of_subset, strict=True) if i in s)
            / sum(i in s for s in subsets)
            for i in range(n)
        ],
        dtype=torch.float64,
    )
    r = torch.tensor(of_subset, dtype=torch.float64)
    deviation = own - r.mean()
    if n < 2 or r.max() == r.min():
        return torch.zeros_like(own), float(r.mean())
    z = deviation / (((r - r.mean()) ** 2).sum().div(len(r) - c).sqrt() + eps)
    percent = deviation / (r.mean() + eps)
    lam = certainty_weight(sum(succeeded) / n)
    found = {
        "mapo": (1 - lam) * z + lam * percent,
        "grpo": z,
        "apd": percent,
        "mean": deviation,
        "rloo": deviation * n / max(n - k, 1),
    }
    return found[estimator], float(r.mean())


@pytest.mark.pairwise
@pytest.mark.parametrize("k", [1, 2, 3, 7])
@pytest.mark.parametrize("std_correction", [0, 1])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_number_of_successes(estimator, std_correction, k, device):
    """Groups of 7 with 0 to 7 successes, whatever the rewards are beyond that."""
    successes = torch.tensor([[i < c for i in range(7)] for c in range(8)])
    rewards = torch.rand(8, 7) + successes
    settings = {"estimator": estimator, "std_correction": std_correction, "pass_at_k": k}
    found, stats = advantages(
        rewards.reshape(-1), device, group_size=7, return_stats=True, **settings
    )
    for i in range(8):
        told = (successes[i].tolist(), k, estimator, std_correction)
        expected, rate = by_enumeration(*told)
        assert_close(found.view(8, 7)[i], expected, 2e-6)
        assert torch.equal(found.view(8, 7)[i].cpu() == 0, expected == 0)
        assert_close(stats.mean[i], torch.tensor(rate), 1e-6)
    exact, exact_stats = reference.group_advantages(
        rewards.reshape(-1), torch.arange(56) // 7, **settings
    )
    assert_close(found, exact, 2e-6)
    for name in ("mean", "std"):
        expected = torch.tensor([getattr(s, name) for s in exact_stats.values()])
        assert_close(getattr(stats, name), expected, 2e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_float64_is_exact_on_the_eager_backend(estimator):
    rewards = (torch.rand(24) < 0.3).double()
    for k in (1, 2, 5):
        found = mk.group_advantages(rewards, group_size=8, estimator=estimator, pass_at_k=k)
        for i in range(3):
            succeeded = (rewards.view(3, 8)[i] == 1).tolist()
            expected, _ = by_enumeration(succeeded, k, estimator, 1)
            torch.testing.assert_close(found.view(3, 8)[i], expected, rtol=1e-12, atol=1e-13)


def test_the_papers_closed_form(device):
    """Equations 8 to 15 of arXiv 2508.10751: two numbers, of successes and of failures."""
    from math import comb, sqrt

    n, c, k = 16, 3, 4
    fail = comb(n - c, k) / comb(n, k)
    sigma = sqrt((1 - fail) * fail)
    positive = fail / sigma
    negative = (fail - comb(n - c - 1, k - 1) / comb(n - 1, k - 1)) / sigma
    rewards = (torch.arange(n) < c).float()
    settings = {"estimator": "grpo", "std_correction": 0, "eps": 1e-12, "pass_at_k": k}
    found = advantages(rewards, device, group_size=n, **settings)
    assert_close(found, torch.tensor([positive] * c + [negative] * (n - c)), 1e-6)


def test_k_times_rloo_is_an_unbiased_gradient_of_pass_at_k():
    """In expectation, over all outcomes of a group (PKPO, arXiv 2505.15201).

    One parameter: the probability q of a success. d/dq (1 - (1-q)^k) = k (1-q)^(k-1).
    """
    n, q = 6, 0.3
    for k in (1, 2, 4):
        total = {"rloo": 0.0, "mean": 0.0}
        for outcome in range(2**n):
            s = torch.tensor([float(outcome >> i & 1) for i in range(n)], dtype=torch.float64)
            probability = (s * q + (1 - s) * (1 - q)).prod()
            score = s / q - (1 - s) / (1 - q)
            for estimator in total:
                A = mk.group_advantages(s, group_size=n, estimator=estimator, pass_at_k=k)
                total[estimator] += float(probability * (k * A * score).mean())
        slope = k * (1 - q) ** (k - 1)
        assert abs(total["rloo"] / slope - 1) < 1e-12
        assert abs(total["mean"] / slope - (1 - k / n)) < 1e-12


def test_k_of_1_is_the_success_itself(device):
    rewards = (torch.rand(32) < 0.4).float()
    for estimator in ESTIMATORS:
        told = {"group_size": 8, "estimator": estimator}
        plain = advantages(rewards, device, **told)
        assert_close(advantages(rewards, device, pass_at_k=1, **told), plain, 2e-6)


def test_groups_where_every_subset_has_a_success_teach_nothing(device):
    rewards = torch.tensor([1.0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0])
    found, stats = advantages(rewards, device, group_size=4, pass_at_k=2, return_stats=True)
    assert not found.view(3, 4)[[0, 2]].any() and found.view(3, 4)[1].all()
    assert stats.mean.tolist() == [1.0, 0.5, 0.0]
    # A ragged group smaller than k.
    ids = torch.tensor([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1])
    rewards[10] = 1.0
    assert not advantages(rewards, device, group_ids=ids, pass_at_k=3)[10:].any()


def test_absent_rewards_and_given_success(device):
    rewards = torch.tensor([1.0, NAN, 0, 0, 0.2, 0.1, 0.9, 0.3])
    settings = {"pass_at_k": 2, "estimator": "grpo"}
    found = advantages(rewards, device, group_size=4, **settings)
    alone = advantages(rewards[[0, 2, 3]], device, group_size=3, **settings)
    assert found[1] == 0 and torch.equal(found[[0, 2, 3]], alone)
    success = torch.tensor([True, True, False, False, False, False, False, True])
    told = {"group_size": 4, "success": success, **settings}
    assert torch.equal(advantages(rewards, device, **told)[[0, 2, 3]], alone)
    assert advantages(rewards, device, **told).argmax() == 7


@pytest.mark.parametrize("k", [1, 8, 64])
def test_large_groups(k, device):
    rewards = (torch.arange(1024) % 512 < 5).float()
    settings = {"estimator": "grpo", "pass_at_k": k}
    exact, _ = reference.group_advantages(rewards, torch.arange(1024) // 512, **settings)
    assert_close(advantages(rewards, device, group_size=512, **settings), exact, 1e-5)


def test_order_of_rows_does_not_matter(device):
    rewards, ids = (torch.rand(20) < 0.4).float(), torch.randint(0, 3, (20,))
    order = torch.randperm(20)
    settings = {"pass_at_k": 2, "difficulty": "focal"}
    straight = advantages(rewards, device, group_ids=ids, **settings)
    permuted = advantages(rewards[order], device, group_ids=ids[order], **settings)
    assert torch.equal(permuted, straight[order.to(device)])


def test_losses_and_plans(device):
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 0], device=device)
    spec = mk.AdvantageSpec(pass_at_k=2)
    logits = torch.randn(8, 3, 11, device=device)
    ids, mask = torch.randint(0, 11, (8, 3), device=device), torch.ones(8, 3, device=device)
    found = mk.group_advantages(rewards, group_size=4, pass_at_k=2)
    source = {"rewards": rewards, "group_size": 4, "advantage_spec": spec, "mask": mask}
    expected = mk.mapo_loss_from_logits(logits, ids, advantages=found, mask=mask)
    plan = mk.make_plan(**source)
    for told in (source, {"plan": plan}):
        out = mk.mapo_loss_from_logits(logits, ids, **told)
        assert_close(out.loss, expected.loss, 1e-6)
        assert torch.equal(out.advantages, found)


@pytest.mark.parametrize("k", [2, 3])
def test_compiled_calls(k):
    rewards = (torch.rand(24) < 0.4).float()
    torch.compiler.reset()
    compiled = torch.compile(mk.group_advantages, backend="eager", fullgraph=True)
    found = compiled(rewards, group_size=8, pass_at_k=k)
    assert_close(found, mk.group_advantages(rewards, group_size=8, pass_at_k=k), 1e-6)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"pass_at_k": 0}, ValueError, "pass_at_k: expected an int from 1 up, got 0"),
        ({"pass_at_k": True}, TypeError, "pass_at_k: expected an int or None, got bool"),
        ({"pass_at_k": 2.0}, TypeError, "pass_at_k: expected an int or None, got float"),
        ({"pass_at_k": 5}, ValueError, "pass_at_k: expected at most the 4 sequences of a group"),
        ({"pass_at_k": 10**30}, ValueError, "pass_at_k: expected at most the 4 sequences of a gr"),
        ({"pass_at_k": 2, "scale": "batch"}, ValueError, "pass_at_k: expected None with scale"),
        (
            {"pass_at_k": 2, "multi_objective_aggregation": "normalize_then_sum"},
            ValueError,
            "pass_at_k: expected None with",
        ),
    ],
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        mk.group_advantages(torch.ones(8), group_size=4, **settings)


def test_more_than_the_batch_has_is_refused():
    """A kernel that drew as many would not come back."""
    ids = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2])
    for k in (9, 10**30):
        with pytest.raises(ValueError, match="pass_at_k: expected at most the 8 sequences of a b"):
            mk.group_advantages(torch.ones(8), group_ids=ids, pass_at_k=k)
    assert not mk.group_advantages(torch.arange(8.0), group_ids=ids, pass_at_k=8).any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.bool])
@pytest.mark.parametrize("threshold, ratio", [(-1.0, 1.0), (300.0, 0.0), (1.0, 0.5)])
def test_a_threshold_beyond_the_dtype_of_rewards_is_no_other_number(
    device, dtype, threshold, ratio
):
    rewards = torch.tensor([0, 1, 0, 1], dtype=dtype, device=device)
    settings = {"success_threshold": threshold, "return_stats": True, "group_size": 4}
    for more in ({}, {"pass_at_k": 2, "estimator": "grpo"}):
        assert mk.group_advantages(rewards, **settings, **more)[1].success_ratio.item() == ratio
