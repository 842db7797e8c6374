"""The oracle against published outputs, closed forms and facts that can be checked by hand."""

import ast
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference_cases import (
    AGGREGATIONS,
    expected_weights,
    f64,
    loss_and_grad,
    one_token,
    ragged_batch,
)

from reference import mapo_loss, token_logprobs

ROOT = Path(__file__).resolve().parents[2]
NAN, INF = math.nan, math.inf


def test_reference_imports_only_torch_and_the_standard_library():
    allowed = {"torch", "math", "dataclasses", "typing", "reference", "collections", "fractions"}
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
