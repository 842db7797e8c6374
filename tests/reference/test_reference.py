"""The oracle against published outputs, closed forms and facts that can be checked by hand."""

import ast
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reference import certainty_weight, group_advantages, mapo_loss, token_logprobs

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = json.loads((ROOT / "tests" / "golden" / "mapo_official.json").read_text())
GOLDEN_ESTIMATORS = {
    "grpo": {"estimator": "grpo"},
    "apd": {"estimator": "apd"},
    "mean_centered": {"estimator": "mean"},
    "mapo": {"estimator": "mapo"},
    "mapo_linear": {"estimator": "mapo", "certainty": "linear"},
}
AGGREGATIONS = [
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
]
NAN, INF = math.nan, math.inf


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def one_group(rewards, **kwargs):
    """Advantages and statistics of rewards that form a single group."""
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    advantages, stats = group_advantages(rewards, torch.zeros(len(rewards)).long(), **kwargs)
    return advantages, stats[0]


def signed_groups(groups=200, size=7):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(groups, size, generator=generator, dtype=torch.float64)


def loss_and_grad(logprobs, *args, **kwargs):
    logprobs = logprobs.clone().requires_grad_()
    loss, metrics = mapo_loss(logprobs, *args, **kwargs)
    loss.backward()
    return loss.detach(), logprobs.grad, metrics


def one_token(logp, A=1.0, *, log_rho=0.0, **kwargs):
    """Loss and dloss/dlogp of a batch of one token."""
    kwargs["old_logprobs"] = f64([logp - log_rho])
    loss, grad, _ = loss_and_grad(f64([logp]), f64(A), torch.ones(1, 1), **kwargs)
    return float(loss), float(grad)


def ragged_batch():
    """Four sequences of up to five tokens; the third is fully masked, the others have gaps."""
    generator = torch.Generator().manual_seed(1)
    logp, old, ref, rollout = -2 * torch.rand(4, 4, 5, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 1, 1]])
    return (
        logp,
        f64(1.5, -0.5, 2.0, -1.0),
        mask,
        {
            "old_logprobs": old,
            "ref_logprobs": ref,
            "rollout_logprobs": rollout,
        },
    )


def expected_weights(mask, aggregation="token-mean", max_tokens=5):
    """Weight of every token, [B, T], in one expression per aggregation."""
    mask, B = mask.double(), len(mask)
    lengths = mask.sum(1, keepdim=True).clamp(min=1)
    return {
        "token-mean": mask / mask.sum(),
        "seq-mean-token-mean": mask / (B * lengths),
        "seq-mean-token-sum": mask / B,
        "seq-mean-token-sum-norm": mask / (B * max_tokens),
    }[aggregation]


def test_reference_imports_only_torch_and_the_standard_library():
    allowed = {"torch", "math", "dataclasses", "typing", "reference"}
    for path in (ROOT / "reference").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= allowed, path


def test_reference_works_where_the_package_cannot_be_imported():
    code = (
        "import sys; sys.modules['mapo_kernels'] = None\n"
        "import torch, reference\n"
        "ids = torch.zeros(2).long()\n"
        "A, _ = reference.group_advantages(torch.tensor([0.0, 1.0]), ids)\n"
        "reference.mapo_loss(torch.zeros(2, 3), A, torch.ones(2, 3))\n"
        "assert not [name for name in sys.modules if name.startswith('mapo_kernels.')]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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


@pytest.mark.parametrize(
    ("rho", "A", "settings", "loss", "grad"),
    [
        (1.1, 2, {}, -2.2, -2.2),
        (1.5, 1, {}, -1.2, 0),
        (1.5, -1, {}, 1.5, 1.5),
        (0.5, 1, {}, -0.5, -0.5),
        (0.5, -1, {}, 0.8, 0),
        (1.25, 1, {"eps_high": 0.28}, -1.25, -1.25),
        (0.75, -1, {"eps_low": 0.3}, 0.75, 0.75),
        (5, -1, {"dual_clip": 3.0}, 3, 0),
        (2, -1, {"dual_clip": 3.0}, 2, 2),
        (5, 1, {"dual_clip": 3.0}, -1.2, 0),
        (0.5, 1, {"dual_clip": 3.0}, -0.5, -0.5),
        (2, 3, {"objective": "none"}, -6, -6),
        (2, -3, {"objective": "none"}, 6, 6),
        (2, 1, {"objective": "cispo"}, 2 * 0.7, -2),
        (7, 1, {"objective": "cispo"}, 5 * 0.7, -5),
        (7, -2, {"objective": "cispo", "eps_high_cispo": 3.0}, -6 * 0.7, 6),
        (1, 1, {"objective": "sapo"}, -2, -1),
        (1, -1, {"objective": "sapo"}, 2 / 1.05, 1),
        (math.exp(25), 1, {"objective": "none"}, -math.exp(20), 0),
        (math.exp(-25), 1, {"objective": "none"}, -math.exp(-20), 0),
    ],
)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_policy_terms_at_single_points(rho, A, settings, loss, grad, level):
    ours = one_token(-0.7, A, log_rho=math.log(rho), importance_level=level, **settings)
    assert ours == pytest.approx((loss, grad), rel=1e-12)


@pytest.mark.parametrize(("A", "tau"), [(2.0, 1.3), (-2.0, 0.6)])
def test_sapo_away_from_ratio_one(A, tau):
    settings = {"objective": "sapo", "sapo_tau_pos": 1.3, "sapo_tau_neg": 0.6}
    gate = 1 / (1 + math.exp(-tau * (1.7 - 1)))
    expected = (-4 / tau * gate * A, -4 * gate * (1 - gate) * 1.7 * A)
    assert one_token(-0.7, A, log_rho=math.log(1.7), **settings) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("estimator", "kl", "slope"),
    [
        ("k1", -0.3, 1.0),
        ("k2", 0.045, -0.3),
        ("k3", math.exp(0.3) - 1.3, 1 - math.exp(0.3)),
    ],
)
def test_kl_terms(estimator, kl, slope):
    settings = {"beta": 0.5, "kl_estimator": estimator, "ref_logprobs": f64([-0.4])}
    assert one_token(-0.7, 0.0, log_rho=1.0, **settings) == pytest.approx((0.5 * kl, 0.5 * slope))
    # With the correction rho is differentiated and dual clip does not bound it.
    settings |= {"kl_importance_correction": True, "dual_clip": 1.5}
    expected = (0.5 * math.e * kl, 0.5 * math.e * (kl + slope))
    assert one_token(-0.7, 0.0, log_rho=1.0, **settings) == pytest.approx(expected)


def test_k3_of_nearly_equal_policies_does_not_cancel():
    settings = {"beta": 1.0, "ref_logprobs": f64([2.0**-27])}
    assert one_token(0.0, 0.0, **settings)[0] == pytest.approx(2.0**-55, rel=1e-6, abs=0)


def test_weights_multiply_the_policy_term_only():
    settings = {"beta": 0.5, "kl_estimator": "k1", "ref_logprobs": f64([-0.4]), "objective": "none"}
    ours = one_token(-0.7, 2.0, token_weights=f64([0.25]), **settings)
    assert ours == pytest.approx((-0.5 - 0.15, -0.5 + 0.5))
    settings |= {"rollout_logprobs": f64([-0.7 - math.log(3)])}
    ours = one_token(-0.7, 2.0, token_weights=f64([0.25]), rollout_cap=2.0, **settings)
    assert ours == pytest.approx((-1 - 0.15, -1 + 0.5))
    ours = one_token(-0.7, 2.0, rollout_cap=8.0, **settings)
    assert ours == pytest.approx((-6 - 0.15, -6 + 0.5))
    assert one_token(-0.7, 2.0, **settings) == pytest.approx(ours)


def test_rollout_weight_on_policy_has_no_gradient():
    settings = {"rollout_logprobs": f64([-0.7 + math.log(2)]), "rollout_cap": 2.0}
    loss, grad, _ = loss_and_grad(f64([-0.7]), f64(3.0), torch.ones(1, 1), **settings)
    assert (float(loss), float(grad)) == pytest.approx((-1.5, -1.5))


def test_entropy_bonus():
    logp, A, mask, policies = ragged_batch()
    entropy = torch.rand(4, 5, dtype=torch.float64).requires_grad_()
    with_bonus, metrics = mapo_loss(logp, A, mask, entropy=entropy, entropy_coef=0.1, **policies)
    without, _ = mapo_loss(logp, A, mask, **policies)
    weights = expected_weights(mask)
    torch.testing.assert_close(with_bonus, without - 0.1 * (weights * entropy).sum())
    torch.testing.assert_close(metrics["entropy"], (weights * entropy).sum().detach())
    with_bonus.backward()
    torch.testing.assert_close(entropy.grad, -0.1 * weights)


@pytest.mark.parametrize("missing", [{"beta": 0.1}, {"entropy_coef": 0.1}])
def test_terms_without_their_tensor_are_errors(missing):
    with pytest.raises(ValueError, match="expected a tensor"):
        mapo_loss(torch.zeros(1, 1), torch.ones(1), torch.ones(1, 1), **missing)


@pytest.mark.parametrize(
    "name", ["objective", "importance_level", "kl_estimator", "aggregation", "no_such_setting"]
)
def test_unknown_settings_are_errors(name):
    logp, A, mask, policies = ragged_batch()
    with pytest.raises((ValueError, TypeError), match=name):
        mapo_loss(logp, A, mask, beta=0.1, **policies, **{name: "typo"})


@pytest.mark.parametrize("objective", ["clip", "cispo", "sapo", "none"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_on_policy_gradient_is_minus_advantage_times_weight(objective, level, aggregation):
    logp, A, mask, _ = ragged_batch()
    settings = {"objective": objective, "importance_level": level, "aggregation": aggregation}
    _, grad, metrics = loss_and_grad(logp, A, mask, max_tokens=9, **settings)
    torch.testing.assert_close(grad, -A[:, None] * expected_weights(mask, aggregation, 9))
    assert (metrics["ratio_mean"], metrics["ratio_max"], metrics["approx_kl"]) == (1, 1, 0)


def test_max_tokens_defaults_to_the_padded_length():
    logp, A, mask, _ = ragged_batch()
    _, grad, _ = loss_and_grad(logp, A, mask, aggregation="seq-mean-token-sum-norm")
    torch.testing.assert_close(
        grad, -A[:, None] * expected_weights(mask, "seq-mean-token-sum-norm")
    )


def test_sequence_ratio_is_the_geometric_mean_and_reaches_every_token():
    ratio = f64([0.3, 5.0, -0.2])
    mask = torch.tensor([[1, 0, 1]])
    A = f64([3.0, NAN, 0.0])
    settings = {"objective": "none", "importance_level": "sequence"}
    loss, grad, metrics = loss_and_grad(ratio, A, mask, old_logprobs=f64([0.0, 0, 0]), **settings)
    rho = math.exp(0.05)
    assert float(loss) == pytest.approx(-rho * 3 / 2)
    # The last token has no term of its own (A = 0), but moves the ratio of the first.
    torch.testing.assert_close(grad, f64([-rho * 3 / 4, 0, -rho * 3 / 4]))
    # It belongs to a scored sequence, hence is scored too.
    assert metrics["scored_tokens"] == 2
    assert float(metrics["ratio_max"]) == pytest.approx(rho)
    own_ratios = [math.exp(-0.3) + 0.3 - 1, math.exp(0.2) - 0.2 - 1]
    assert float(metrics["approx_kl"]) == pytest.approx(sum(own_ratios) / 2)


def test_sequence_log_ratio_is_clamped_after_the_mean():
    settings = {"objective": "none", "importance_level": "sequence"}
    old = {"old_logprobs": f64([0.0, 0.0])}
    loss, grad, _ = loss_and_grad(f64([30.0, -29.0]), f64(1.0), torch.ones(1, 2), **old, **settings)
    assert float(loss) == pytest.approx(-math.exp(0.5))
    torch.testing.assert_close(grad, f64([-math.exp(0.5) / 2] * 2))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_with_a_normalizer_add_up(aggregation):
    logp, A, mask, policies = ragged_batch()
    settings = {"aggregation": aggregation, "beta": 0.1, "rollout_cap": 2.0}
    whole, whole_grad, _ = loss_and_grad(logp, A, mask, **policies, **settings)
    normalizer = mask.sum() if aggregation == "token-mean" else len(mask)
    parts = [
        loss_and_grad(
            logp[rows],
            A[rows],
            mask[rows],
            normalizer=normalizer,
            **{name: x[rows] for name, x in policies.items()},
            **settings,
        )
        for rows in (slice(0, 1), slice(1, 3), slice(3, 4))
    ]
    torch.testing.assert_close(sum(loss for loss, _, _ in parts), whole)
    torch.testing.assert_close(torch.cat([grad for _, grad, _ in parts]), whole_grad)


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_masked_positions_never_contribute(poison, level):
    logp, A, mask, policies = ragged_batch()
    extras = policies | {"token_weights": torch.rand(4, 5), "entropy": torch.rand(4, 5)}
    settings = {"importance_level": level, "beta": 0.1, "entropy_coef": 0.01}
    clean = loss_and_grad(logp, A[:, None].expand(4, 5), mask, **extras, **settings)

    def spoil(x):
        return x.masked_fill(mask == 0, poison)

    spoiled = {name: spoil(x) for name, x in extras.items()}
    dirty = loss_and_grad(spoil(logp), spoil(A[:, None].expand(4, 5)), mask, **spoiled, **settings)
    torch.testing.assert_close(dirty, clean, rtol=0, atol=0)
    assert (dirty[1][mask == 0] == 0).all()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("normalizer", [None, 0.0, 3.0])
def test_all_masked_batch_gives_zero_loss_and_gradient(aggregation, normalizer):
    logp = torch.full((2, 3), NAN)
    settings = {"aggregation": aggregation, "normalizer": normalizer}
    loss, grad, metrics = loss_and_grad(logp, f64(1, NAN), torch.zeros(2, 3), **settings)
    assert (loss == 0) and loss.dtype == torch.float64
    assert (grad == 0).all()
    counts = {name: metrics.pop(name) for name in ("active_tokens", "scored_tokens")}
    assert all(count == 0 for count in counts.values())
    assert metrics and all(value.isnan() for value in metrics.values())  # means over no token
    assert "ref_kl" not in metrics


def test_upstream_gradient_scales_and_input_dtype_is_kept():
    logp, A, mask, _ = ragged_batch()
    leaf = logp.float().requires_grad_()
    loss, _ = mapo_loss(leaf, A, mask)
    (-3 * loss).backward()
    assert leaf.grad.dtype == torch.float32
    expected = 3 * A[:, None] * expected_weights(mask)
    torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("objective", ["clip", "sapo", "none"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3"])
def test_gradient_is_the_derivative_of_the_loss(objective, level, kl_estimator):
    logp, A, mask, policies = ragged_batch()
    settings = {
        "objective": objective,
        "importance_level": level,
        "kl_estimator": kl_estimator,
        "beta": 0.3,
        "kl_importance_correction": True,
        "dual_clip": 2.0,
        "rollout_cap": 2.0,
    }

    def loss(x):
        return mapo_loss(x, A, mask, **policies, **settings)[0]

    assert torch.autograd.gradcheck(loss, logp.requires_grad_())


def scored_batch():
    """Ratios and advantages whose clip events can be counted by eye; [2, 4], one token masked."""
    ratio = f64([0.5, 0.5, 1.5, 1.5], [1.0, 6.0, 1.1, 9.0])
    A = f64([-1.0, 1.0, -1.0, 1.0], [0.0, 1.0, -1.0, 1.0])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    return ratio.log(), A, mask, torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("objective", "low", "high"),
    [("clip", 1 / 6, 2 / 6), ("cispo", 0, 1 / 6), ("sapo", 0, 0), ("none", 0, 0)],
)
def test_metrics_speak_of_scored_tokens(objective, low, high):
    logp, A, mask, old = scored_batch()
    _, metrics = mapo_loss(logp, A, mask, old_logprobs=old, objective=objective)
    rho = f64(0.5, 0.5, 1.5, 1.5, 6.0, 1.1)
    expected = {
        "clip_fraction_low": low,
        "clip_fraction_high": high,
        "ratio_mean": rho.mean().item(),
        "ratio_max": 6.0,
        "approx_kl": (1 / rho + rho.log() - 1).mean().item(),
        "active_tokens": 7,
        "scored_tokens": 6,
    }
    assert all(v.shape == () and v.dtype == torch.float64 for v in metrics.values())
    assert not any(v.requires_grad for v in metrics.values())
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected)


def test_approx_kl_is_of_the_clamped_ratio():
    _, metrics = mapo_loss(
        f64([-30.0]), f64(1.0), torch.ones(1, 1), old_logprobs=f64([0.0]), objective="cispo"
    )
    assert float(metrics["approx_kl"]) == pytest.approx(math.exp(20) - 21)


def test_ref_kl_is_plain():
    logp, A, mask, old = scored_batch()
    settings = {"beta": 0.3, "kl_importance_correction": True, "kl_estimator": "k2"}
    _, metrics = mapo_loss(logp, A, mask, old_logprobs=old, ref_logprobs=old, **settings)
    assert metrics["scored_tokens"] == 7
    assert float(metrics["ref_kl"]) == pytest.approx(float((logp**2 / 2)[mask != 0].mean()))
    _, metrics = mapo_loss(logp, A, mask, old_logprobs=old, ref_logprobs=old)
    scored = (mask != 0) & (A != 0)
    k3 = torch.exp(-logp) + logp - 1
    assert float(metrics["ref_kl"]) == pytest.approx(float(k3[scored].mean()))


def test_what_counts_as_scored():
    logp, A, mask, old = scored_batch()
    weights = torch.ones(2, 4)
    weights[0, 1:3] = 0

    def scored(**kwargs):
        return int(mapo_loss(logp, A, mask, token_weights=weights, **kwargs)[1]["scored_tokens"])

    assert scored() == 4
    assert scored(score_all=True) == 7
    assert scored(beta=0.1, ref_logprobs=old) == 7
    assert scored(entropy_coef=0.1, entropy=old) == 7
    assert scored(ref_logprobs=old, entropy=old) == 4


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_scoring_all_tokens_changes_neither_loss_nor_gradient(level):
    logp, A, mask, old = scored_batch()
    settings = {"old_logprobs": old, "importance_level": level}
    saving = loss_and_grad(logp, A, mask, **settings)
    scoring = loss_and_grad(logp, A, mask, score_all=True, **settings)
    torch.testing.assert_close(saving[:2], scoring[:2], rtol=0, atol=0)


def test_tokens_without_a_term_are_never_read():
    logp = f64([NAN, -1.0])
    loss, grad, _ = loss_and_grad(logp, f64([0.0, 2.0]), torch.ones(1, 2))
    assert loss == -1
    assert torch.equal(grad, f64([0, -1]))


def random_logits(*shape):
    logits = torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return (3 * logits).requires_grad_(), torch.arange(shape[0] * shape[1]).view(shape[:2]) % 7


@pytest.mark.parametrize("temperature", [1.0, 0.6, f64(0.5, 2.0)])
def test_token_logprobs_and_their_gradient(temperature):
    logits, ids = random_logits(2, 3, 7)
    logp, entropy = token_logprobs(logits, ids, temperature)
    tau = temperature if isinstance(temperature, float) else temperature[:, None, None]
    p = torch.softmax(logits.detach() / tau, dim=-1)
    onehot = torch.nn.functional.one_hot(ids, 7)
    torch.testing.assert_close(logp, (p * onehot).sum(-1).log())
    torch.testing.assert_close(entropy, -(p * p.log()).sum(-1))
    (grad,) = torch.autograd.grad(logp.sum(), logits, retain_graph=True)
    torch.testing.assert_close(grad, (onehot - p) / tau)
    (grad,) = torch.autograd.grad(entropy.sum(), logits)
    torch.testing.assert_close(grad, -p * (p.log() + entropy.detach()[..., None]) / tau)


def test_tokens_that_cannot_be_sampled():
    logits = f64([[0.0, -INF, 0.0]]).requires_grad_()
    logp, entropy = token_logprobs(logits, torch.tensor([[2]]))
    torch.testing.assert_close(torch.cat([logp, entropy]), f64([-math.log(2)], [math.log(2)]))
    (logp + entropy).sum().backward()
    torch.testing.assert_close(logits.grad, f64([[-0.5, 0.0, 0.5]]))


def test_masked_rows_and_ids_outside_the_vocabulary():
    logits = torch.zeros(1, 3, 4)
    logits[0, 0] = NAN
    logits.requires_grad_()
    ids, mask = torch.tensor([[-100, 3, 4]]), torch.tensor([[0, 1, 1]])
    logp, entropy = token_logprobs(logits, ids, mask=mask)
    expected = f64([0.0, -math.log(4), NAN])
    torch.testing.assert_close(logp, expected, equal_nan=True)
    mapo_loss(logp, f64(1.0), mask, entropy=entropy, entropy_coef=0.1)[0].backward()
    assert (logits.grad[0, 0] == 0).all()
    assert logits.grad[0, 1].isfinite().all()


def test_logits_to_loss_matches_the_closed_form_gradient():
    logits, ids = random_logits(2, 3, 7)
    A, mask = f64(1.5, -2.0), torch.tensor([[1, 1, 1], [1, 0, 0]])
    logp, _ = token_logprobs(logits, ids, 0.7, mask)
    mapo_loss(logp, A, mask)[0].backward()
    g = -A[:, None] * expected_weights(mask)
    p = torch.softmax(logits.detach() / 0.7, dim=-1)
    onehot = torch.nn.functional.one_hot(ids, 7)
    torch.testing.assert_close(logits.grad, g[..., None] * (onehot - p) / 0.7)
