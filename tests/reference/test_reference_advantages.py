"""The oracle's advantages against published outputs, closed forms and facts checked by hand."""

import json
import math
from pathlib import Path

import pytest
import torch
from reference_cases import f64, one_group, signed_groups

from reference import certainty_weight, group_advantages

ROOT = Path(__file__).resolve().parents[2]
NAN, INF = math.nan, math.inf
GOLDEN = json.loads((ROOT / "tests" / "golden" / "mapo_official.json").read_text())
GOLDEN_ESTIMATORS = {
    "grpo": {"estimator": "grpo"},
    "apd": {"estimator": "apd"},
    "mean_centered": {"estimator": "mean"},
    "mapo": {"estimator": "mapo"},
    "mapo_linear": {"estimator": "mapo", "certainty": "linear"},
}


@pytest.mark.parametrize("case", GOLDEN)
@pytest.mark.parametrize("name", GOLDEN_ESTIMATORS)
def test_advantages_match_the_published_code(case, name):
    golden = GOLDEN[case]
    rewards = torch.tensor(golden["rewards"], dtype=torch.float64)
    ids = torch.arange(len(rewards)) // golden["group_size"]
    theirs = torch.tensor(golden[name], dtype=torch.float64)
    ours, _ = group_advantages(rewards, ids, **GOLDEN_ESTIMATORS[name])

    # The published code computes sigma = 8e-9 for eight rewards of 0.1 in float32, and divides
    # rounding noise by it: z = 0.007. Here equal rewards carry no signal, exactly.
    by_group = rewards.view(-1, golden["group_size"])
    equal = (by_group.amax(1) == by_group.amin(1))[ids]
    assert (ours[equal] == 0).all()
    assert (theirs[equal].abs() < 0.01).all()

    error = (ours - theirs).abs()[~equal]
    assert (error <= 1e-5 * theirs[~equal].abs().clamp(min=1)).all()


@pytest.mark.parametrize("case", GOLDEN)
def test_statistics_match_the_published_code(case):
    golden = GOLDEN[case]
    rewards = torch.tensor(golden["rewards"], dtype=torch.float64)
    size = golden["group_size"]
    _, stats = group_advantages(rewards, torch.arange(len(rewards)) // size)
    ours = f64(*[[s.mean, s.std, s.success_ratio] for _, s in sorted(stats.items())])
    theirs = f64(golden["mean"], golden["std"], golden["p"][::size]).T
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("G", "mapo", "grpo"), [(16, 12.4, 3.8), (64, 59.6, 7.9), (256, 251, 15.9)]
)
def test_single_success(G, mapo, grpo):
    rewards = [1.0] + [0.0] * (G - 1)
    A, z = one_group(rewards, eps=0)[0], one_group(rewards, estimator="grpo", eps=0)[0]
    p = 1 / G
    exact = 4 * p * (1 - p) * (G - 1) / math.sqrt(G) + (1 - 4 * p * (1 - p)) * (G - 1)
    assert A[0] == pytest.approx(exact, rel=1e-12)
    assert z[0] == pytest.approx((G - 1) / math.sqrt(G), rel=1e-12)
    # The figures quoted for the method, of three and two digits.
    assert (float(A[0]), float(z[0])) == (
        pytest.approx(mapo, rel=5e-3),
        pytest.approx(grpo, rel=0.02),
    )


def test_single_format_credit_in_a_failed_group():
    advantages, stats = one_group([0.1] + [0.0] * 15)
    assert stats.success_ratio == 0
    assert advantages[0] == pytest.approx(15, abs=0.01)


def test_worked_figure_of_the_paper():
    advantages, _ = one_group([0.9, 1, 1, 1], estimator="grpo", std_correction=0, eps=0)
    assert advantages[0] == pytest.approx(-math.sqrt(3), abs=1e-12)


@pytest.mark.parametrize("successes", range(1, 12))
def test_scale_of_mapo_over_grpo_for_binary_rewards(successes):
    rewards = [1.0] * successes + [0.0] * (12 - successes)
    mapo, stats = one_group(rewards, std_correction=0, eps=0)
    grpo, _ = one_group(rewards, estimator="grpo", std_correction=0, eps=0)
    p = successes / 12
    scale = 4 * p * (1 - p) + (1 - 4 * p * (1 - p)) * math.sqrt((1 - p) / p)
    torch.testing.assert_close(mapo, scale * grpo)
    assert stats.success_ratio == pytest.approx(p)
    assert (scale > 1) == (p < 0.5) or p == 0.5


def test_mapo_mixes_z_and_apd():
    rewards = [0.2, 1.0, 0.7, 0.0, 1.0]
    z, _ = one_group(rewards, estimator="grpo")
    apd, _ = one_group(rewards, estimator="apd")
    lam = 1 - 4 * 0.4 * 0.6
    torch.testing.assert_close(one_group(rewards)[0], (1 - lam) * z + lam * apd)
    torch.testing.assert_close(one_group(rewards, certainty=0.3)[0], 0.7 * z + 0.3 * apd)
    torch.testing.assert_close(one_group(rewards, certainty=0)[0], z)
    torch.testing.assert_close(one_group(rewards, certainty=1.0)[0], apd)


def test_rloo_subtracts_the_mean_of_the_others():
    rewards = [0.5, -1.0, 2.0, NAN]
    expected = f64(0.5 - 0.5, -1.0 - 1.25, 2.0 + 0.25, 0.0)
    torch.testing.assert_close(one_group(rewards, estimator="rloo")[0], expected)


@pytest.mark.parametrize(
    ("certainty", "at_0", "at_quarter", "at_half", "at_0_9"),
    [
        ("quadratic", 1, 0.25, 0, 0.64),
        ("linear", 1, 0.5, 0, 0.8),
        ("entropy", 1, 1 - 0.8112781244591328, 0, 1 - 0.4689955935892812),
        ("step", 1, 0, 0, 1),
        (0.3, 0.3, 0.3, 0.3, 0.3),
    ],
)
def test_certainty_functions(certainty, at_0, at_quarter, at_half, at_0_9):
    ours = [certainty_weight(p, certainty) for p in (0, 0.25, 0.5, 0.9)]
    assert ours == pytest.approx([at_0, at_quarter, at_half, at_0_9], abs=1e-12)
    mirrored = [certainty_weight(1 - p, certainty) for p in (0, 0.25, 0.5, 0.9)]
    assert ours == pytest.approx(mirrored, abs=1e-12)


@pytest.mark.parametrize("kwargs", [{"certainty": 1.5}, {"certainty": "cubic"}, {"apd": "none"}])
def test_unknown_choices_are_errors(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        one_group([0.0, 1.0], **kwargs)


def test_bounded_apd_keeps_the_order_of_signed_rewards_and_is_bounded():
    for rewards in signed_groups():
        apd, _ = one_group(rewards, estimator="apd")
        assert torch.equal(apd.argsort(), rewards.argsort())
        assert apd.abs().max() <= len(rewards) - 1


def test_bounded_apd_is_the_papers_where_no_reward_is_negative():
    for rewards in signed_groups().clamp(min=0):
        ours, _ = one_group(rewards, estimator="apd")
        paper, _ = one_group(rewards, estimator="apd", apd="paper")
        torch.testing.assert_close(ours, paper, rtol=1e-12, atol=0)


def test_paper_apd_is_verbatim():
    negative_mean, _ = one_group([-1.0, -3.0], estimator="apd", apd="paper", eps=0)
    torch.testing.assert_close(negative_mean, f64(-0.5, 0.5))
    zero_mean, _ = one_group([1.0, -1.0], estimator="apd", apd="paper")
    torch.testing.assert_close(zero_mean, f64(1e6, -1e6))
    bounded, _ = one_group([1.0, -1.0], estimator="apd", eps=0)
    torch.testing.assert_close(bounded, f64(1, -1))


@pytest.mark.parametrize("estimator", ["mapo", "grpo", "apd", "mean", "rloo"])
@pytest.mark.parametrize(
    "rewards", [[0.1] * 7, [-0.3] * 3, [0.0] * 4, [5.0], [NAN, INF], [NAN, 0.1, 0.1, -INF, 0.1]]
)
def test_groups_without_signal_are_exactly_zero(estimator, rewards):
    for c in (0, 1):
        advantages, stats = one_group(rewards, estimator=estimator, std_correction=c)
        assert (advantages == 0).all()
        assert stats.std == 0
        assert stats.nonfinite == sum(not math.isfinite(r) for r in rewards)
        assert stats.size == len(rewards) - stats.nonfinite


def test_group_without_finite_reward():
    _, stats = one_group([NAN, -INF])
    assert (stats.mean, stats.success_ratio, stats.size, stats.nonfinite) == (0, 0, 0, 2)


@pytest.mark.parametrize("estimator", ["mapo", "grpo", "apd", "mean", "rloo"])
def test_nonfinite_rewards_are_absent(estimator):
    with_them, stats = one_group([NAN, 0.2, INF, 1.0, 0.5, -INF, 1.0], estimator=estimator)
    without, alone = one_group([0.2, 1.0, 0.5, 1.0], estimator=estimator)
    torch.testing.assert_close(with_them[[1, 3, 4, 6]], without, rtol=0, atol=0)
    assert (with_them[[0, 2, 5]] == 0).all()
    assert (stats.mean, stats.std, stats.success_ratio) == (alone.mean, alone.std, 0.5)
    assert (stats.size, stats.nonfinite) == (4, 3)


def test_groups_are_found_by_id_whatever_the_order():
    groups = {7: [0.0, 1.0, 0.3], -2: [2.0, 1.0], 5: [1.0], 0: [0.0, 0.0, 0.0, 1.0]}
    rewards = torch.tensor([r for group in groups.values() for r in group])
    ids = torch.tensor([k for k, group in groups.items() for _ in group])
    expected = torch.cat([one_group(rewards[ids == k])[0] for k in groups])
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(2))
    advantages, stats = group_advantages(rewards[order], ids[order])
    torch.testing.assert_close(advantages, expected[order])
    assert {k: s.size for k, s in stats.items()} == {7: 3, -2: 2, 5: 1, 0: 4}


def test_explicit_success_replaces_the_threshold():
    rewards = [0.1, 0.7, NAN, 0.4]
    success = torch.tensor([False, True, True, False])
    _, stats = one_group(rewards, success=success)
    assert stats.success_ratio == pytest.approx(1 / 3)  # the success without reward is absent
    assert one_group(rewards)[1].success_ratio == 0
    assert one_group(rewards, success_threshold=0.4)[1].success_ratio == pytest.approx(2 / 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_threshold_is_met_by_the_same_number_in_any_dtype(dtype):
    rewards = torch.tensor([0.9, 0.7], dtype=dtype)
    advantages, stats = group_advantages(rewards, torch.zeros(2).long(), success_threshold=0.9)
    assert stats[0].success_ratio == 0.5
    assert advantages.dtype == torch.float64


def test_groups_no_larger_than_the_correction_have_no_baseline():
    advantages, stats = one_group([0.0, 1.0], estimator="grpo", std_correction=2)
    assert (advantages == 0).all()
    assert stats.std == 0


def test_max_abs_clamps_both_signs():
    advantages, _ = one_group([1.0] + [0.0] * 15, max_abs=2.5)
    assert advantages[0] == 2.5
    advantages, _ = one_group([0.0] + [1.0] * 15, estimator="grpo", max_abs=2.5)
    assert advantages[0] == -2.5
