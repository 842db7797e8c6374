"""Numbers at the ends of float32, batches without tokens, denominators that are none."""

import math

import pytest
import torch
from support import AGGREGATIONS, assert_accurate, assert_close, exact_scores, make_logits

import mapo_kernels as mk
import reference
from mapo_kernels.spec import ESTIMATORS

NAN = float("nan")
LARGEST = torch.finfo(torch.float32).max


@pytest.mark.pairwise
@pytest.mark.parametrize("grouping", ["size", "ids", "stats"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    "rewards",
    [
        [1e20, 0, 0, 0],
        [-1e20, 0, 0, 0],
        [3e30, 1e30, -2e30, 0],
        [1e16, 2e16, 1e16, 1e15],
        [LARGEST, 0, 0, 0],
        [-LARGEST, 0, 0, 0],
        [-LARGEST, LARGEST, 0, 0],
        [1e38, 1e38 * (1 - 1e-6), 1e38, 1e38],
        [1e20, 1e20, 1e20, 1e20],
    ],
    ids=str,
)
def test_advantages_of_large_finite_rewards(rewards, estimator, grouping, device):
    x = torch.tensor(rewards, dtype=torch.float32, device=device)
    how = {"group_ids": torch.zeros(4, dtype=torch.int64, device=device)}
    how = how if grouping == "ids" else {"group_size": 4}
    actual = mk.group_advantages(x, estimator=estimator, return_stats=grouping == "stats", **how)
    stats = None
    if grouping == "stats":
        actual, stats = actual
    exact = mk.group_advantages(x.double(), estimator=estimator, group_size=4).cpu()
    exact = exact.clamp(-LARGEST, LARGEST)
    assert torch.isfinite(actual).all()
    torch.testing.assert_close(actual.cpu().double(), exact, rtol=2e-5, atol=0)
    logp = torch.zeros(4, 2, device=device)
    spec = mk.AdvantageSpec(estimator=estimator)
    inside = mk.mapo_loss(logp, rewards=x, advantage_spec=spec, **how)
    torch.testing.assert_close(inside.advantages, actual, rtol=1e-6, atol=0)
    assert inside.metrics["zero_advantage_groups"] == float(rewards[0] == rewards[1] == 1e20)
    if stats is not None:
        doubled = x.double().cpu()
        torch.testing.assert_close(
            stats.mean.cpu().double(), doubled.mean()[None], rtol=1e-5, atol=LARGEST * 1e-7
        )
        expected = doubled.std().clamp(max=math.inf)[None]
        torch.testing.assert_close(
            stats.std.cpu().double(), expected.float().double(), rtol=2e-5, atol=0
        )


def test_float64_rewards_near_its_end():
    x = torch.tensor([1e200, 0, 0, 0], dtype=torch.float64)
    for estimator in ("grpo", "mapo"):
        small = mk.group_advantages(x / 2.0**600, estimator=estimator, group_size=4, eps=1e-300)
        large = mk.group_advantages(x, estimator=estimator, group_size=4, eps=1e-300)
        assert_close(large, small, 1e-12)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("shape", [(3, 0), (0,)], ids=["padded", "packed"])
def test_a_batch_without_tokens_has_loss_0(shape, aggregation, device):
    packed = len(shape) == 1
    bounds = torch.zeros(4, dtype=torch.int64, device=device) if packed else None
    spec = mk.LossSpec(aggregation=aggregation, max_tokens=5 if packed else None)
    given = {"advantages": torch.ones(3, device=device), "cu_seqlens": bounds, "spec": spec}
    logp = torch.zeros(shape, device=device, requires_grad=True)
    out = mk.mapo_loss(logp, **given)
    out.loss.backward()
    assert out.loss == 0 and logp.grad.shape == shape
    logits = torch.zeros((*shape, 7), device=device, requires_grad=True)
    ids = torch.zeros(shape, dtype=torch.int64, device=device)
    out = mk.mapo_loss_from_logits(logits, ids, **given)
    out.loss.backward()
    assert out.loss == 0
    out = mk.mapo_loss_from_hidden(logits, torch.randn(9, 7, device=device), ids, **given)
    assert out.loss == 0


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_what_a_weight_of_0_leaves_out(level, beta, device):
    """A NaN advantage behind it changes nothing; it takes no part in the metrics of token level."""
    spec = mk.LossSpec(importance_level=level, beta=beta, objective="cispo", eps_high_cispo=0.5)
    logp = torch.tensor([[-1.0, -2.0], [-1.5, -0.5]], device=device)
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0]], device=device)
    advantages = torch.tensor([[1.0, NAN], [math.inf, 2.0]], device=device)
    clean = torch.tensor([[1.0, 0.0], [0.0, 2.0]], device=device)
    outs = []
    for given in (advantages, clean):
        leaf = logp.clone().requires_grad_()
        out = mk.mapo_loss(
            leaf, advantages=given, token_weights=weights, spec=spec, ref_logprobs=logp - 0.1
        )
        out.loss.backward()
        outs.append((out, leaf.grad))
    (actual, grad), (expected, expected_grad) = outs
    assert torch.isfinite(actual.loss) and torch.equal(actual.loss, expected.loss)
    assert torch.equal(grad, expected_grad)
    for name, value in actual.metrics.items():
        assert torch.equal(value, expected.metrics[name]), name
    if level == "token" and not beta:
        assert actual.metrics["clip_fraction_high"] == 1 and actual.metrics["scored_tokens"] == 2


def test_an_advantage_whose_loss_overflows_behind_a_weight_of_0(device):
    spec = mk.LossSpec(objective="sapo")
    leaf = torch.tensor([[-1.0, -2.0]], device=device, requires_grad=True)
    weights = torch.tensor([[0.0, 1.0]], device=device)
    advantages = torch.tensor([[LARGEST, 1.0]], device=device)
    out = mk.mapo_loss(leaf, advantages=advantages, token_weights=weights, spec=spec)
    out.loss.backward()
    assert out.loss.isfinite() and leaf.grad[0, 0] == 0 and leaf.grad[0, 1] != 0


@pytest.mark.parametrize("low", [-1e12, -1e31, -1e35, -2e38, -LARGEST, 1e12, 1e36])
def test_rows_that_lie_wholly_far_below_0(low, device):
    batch = make_logits(3, 2, 40, torch.float32, mask="none")
    shifted = torch.full((3, 2, 40), low)
    shifted[..., 5] = low * 0.5
    ids = torch.tensor([[5, 3], [0, 5], [5, 39]])
    logp, entropy = (
        x.cpu() for x in mk.token_logprobs(shifted.to(device), ids.to(device), return_entropy=True)
    )
    exact, exact_entropy = reference.token_logprobs(shifted.double(), ids)
    torch.testing.assert_close(logp.double(), exact, rtol=1e-6, atol=0)
    assert_close(entropy, exact_entropy, 1e-6)
    equal = torch.full((3, 2, 40), low, device=device, requires_grad=True)
    given = {"advantages": batch["advantages"].to(device)}
    out = mk.mapo_loss_from_logits(equal, ids.to(device), **given)
    out.loss.backward()
    flat = torch.zeros(3, 2, 40, device=device, requires_grad=True)
    expected = mk.mapo_loss_from_logits(flat, ids.to(device), **given)
    expected.loss.backward()
    assert_close(out.loss, expected.loss, 1e-6)
    assert_close(out.metrics["entropy"], torch.tensor(40.0).log(), 1e-6)
    assert_close(equal.grad, flat.grad, 1e-6)


@pytest.mark.parametrize("low", [-1e8, -1e10, -1e20, -1e30, -1e35, -LARGEST, -math.inf])
def test_columns_far_below_the_others(low, device):
    """As masks of a vocabulary write them: some threads of a kernel see nothing else."""
    logits = torch.full((1, 2, 40), low)
    logits[..., :3] = torch.tensor([1.0, 2.0, 3.0])
    ids = torch.tensor([[0, 2]])
    logp, entropy = mk.token_logprobs(logits.to(device), ids.to(device), return_entropy=True)
    exact, exact_entropy = reference.token_logprobs(logits[..., :3].double(), ids)
    assert_close(logp, exact, 1e-6)
    assert_close(entropy, exact_entropy, 1e-6)
    leaf = logits.to(device).requires_grad_()
    mk.mapo_loss_from_logits(
        leaf, ids.to(device), advantages=torch.ones(1).to(device)
    ).loss.backward()
    assert (leaf.grad[..., 3:] == 0).all() and leaf.grad.isfinite().all()


def test_a_row_of_minus_infinity_has_no_log_prob(device):
    logits = torch.full((1, 2, 9), -math.inf, device=device)
    logits[0, 1, 3] = 0.0
    logp = mk.token_logprobs(logits, torch.tensor([[0, 3]], device=device))
    assert logp[0, 0].isnan() and logp[0, 1] == 0


@pytest.mark.parametrize("gap", [8.0, 16.0, 32.0, 60.0])
@pytest.mark.parametrize("offset", [0.0, 30.1, -1000.3])
def test_entropy_of_a_certain_row_whose_token_is_the_unlikely_one(gap, offset, device):
    logits = torch.full((1, 4, 120), offset - 200.0)
    logits[..., 7] = offset
    logits[..., 110] = offset - gap
    logits[0, 3, 99] = offset - gap * 1.25
    ids = torch.tensor([[110, 7, 0, 99]])
    logp, entropy = mk.token_logprobs(logits.to(device), ids.to(device), return_entropy=True)
    scores = [exact_scores(row, int(token)) for row, token in zip(logits[0], ids[0], strict=True)]
    exact_logp, exact = torch.tensor(scores, dtype=torch.float64).t()[:, None]
    # A rounding of an exponent shows in its power that many times; so does one of log2(e).
    rtol = max(2e-6, gap * 1.25 * 1.2e-7)
    torch.testing.assert_close(entropy.cpu().double(), exact, rtol=rtol, atol=0)
    torch.testing.assert_close(logp.cpu().double(), exact_logp, rtol=rtol, atol=0)
    given = {"advantages": torch.ones(1, device=device)}
    out = mk.mapo_loss_from_logits(logits.to(device), ids.to(device), **given)
    torch.testing.assert_close(
        out.metrics["entropy"].cpu().double(), exact.mean(), rtol=rtol, atol=0
    )


def losses_with(device, masked=False, **given):
    """The loss at every level with one denominator, and gradients."""
    mask = torch.zeros(2, 3, device=device) if masked else torch.ones(2, 3, device=device)
    advantages = torch.ones(2, device=device)
    x = torch.randn(2, 3, 6, device=device)
    ids = torch.zeros(2, 3, dtype=torch.int64, device=device)
    leaves = [x[..., 0].clone(), x.clone(), x.clone()]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    given = {"advantages": advantages, "mask": mask, **given}
    eye = torch.eye(6, device=device)
    losses = [
        mk.mapo_loss(leaves[0], **given).loss,
        mk.mapo_loss_from_logits(leaves[1], ids, **given).loss,
        mk.mapo_loss_from_hidden(leaves[2], eye, ids, **given).loss,
    ]
    if "spec" not in given:
        plan = mk.make_plan(**given)
        losses.append(mk.mapo_loss(leaves[0], plan=plan).loss)
    for loss in losses:
        loss.backward()
    return losses, [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("value", [-1.0, 0.0, NAN, 1e-50])
def test_a_denominator_that_is_not_positive_is_told(value, device, monkeypatch):
    normalizer = torch.tensor(value, device=device)
    for spec in ({}, {"spec": mk.LossSpec(importance_level="sequence")}):
        losses, _ = losses_with(device, normalizer=normalizer, **spec)
        assert all(loss.isnan() for loss in losses)
    monkeypatch.setenv("MAPO_KERNELS_VALIDATE", "1")
    with pytest.raises(ValueError, match="normalizer: expected a positive"):
        losses_with(device, normalizer=normalizer)


def test_a_number_that_float32_rounds_to_0_is_no_denominator(device, monkeypatch):
    losses, _ = losses_with(device, normalizer=1e-320)
    assert all(loss.isnan() for loss in losses)
    monkeypatch.setenv("MAPO_KERNELS_VALIDATE", "1")
    with pytest.raises(ValueError, match="normalizer: expected a positive"):
        losses_with(device, normalizer=1e-320)


@pytest.mark.parametrize("normalizer", [None, 4.0, 0.0])
def test_a_batch_that_is_all_masked_has_loss_0(normalizer, device):
    """With a counted denominator of 0 too, be it counted here or by the caller."""
    if normalizer is not None:
        normalizer = torch.tensor(normalizer, device=device)
    for aggregation in AGGREGATIONS:
        spec = mk.LossSpec(aggregation=aggregation)
        losses, grads = losses_with(device, masked=True, normalizer=normalizer, spec=spec)
        assert all(loss == 0 for loss in losses)
        assert all((grad == 0).all() for grad in grads)


def test_means_over_nothing_are_nan(device):
    x = torch.randn(4, 3, 6, device=device)
    ids = torch.zeros(4, 3, dtype=torch.int64, device=device)
    rewards = torch.tensor([1.0, 1.0, 1.0, 1.0], device=device)
    eye = torch.eye(6, device=device)
    given = {"rewards": rewards, "group_size": 4, "old_logprobs": x[..., 1]}
    outs = [
        mk.mapo_loss(x[..., 0], **given),
        mk.mapo_loss_from_logits(x, ids, **given),
        mk.mapo_loss_from_hidden(x, eye, ids, **given),
    ]
    means = ("clip_fraction_low", "clip_fraction_high", "ratio_mean", "ratio_max", "approx_kl")
    for out in outs:
        assert out.loss == 0
        for name in means:
            assert out.metrics[name].isnan(), name
        assert out.metrics["active_tokens"] == 12 and out.metrics["scored_tokens"] == 0
        assert out.metrics["success_ratio_mean"] == 1 and out.metrics["zero_advantage_groups"] == 1
    assert outs[1].metrics["entropy"].isnan()
    nothing = mk.mapo_loss(x[..., 0], **{**given, "rewards": rewards * NAN}).metrics
    assert nothing["success_ratio_mean"].isnan() and nothing["lambda_mean"].isnan()
    assert nothing["active_groups"] == 0 and nothing["nonfinite_rewards"] == 4


def test_a_chunk_without_a_scored_token_leaves_the_means_of_the_others(device):
    """Rows that a plan took for live may turn out to have nothing to score."""
    x = torch.randn(2, 3, 6, device=device)
    ids = torch.zeros(2, 3, dtype=torch.int64, device=device)
    weights = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]], device=device)
    mask = torch.ones(2, 3, device=device)
    plan = mk.make_plan(advantages=torch.ones(2, device=device), mask=mask)
    eye = torch.eye(6, device=device)
    given = {"plan": plan, "token_weights": weights, "old_logprobs": x[..., 2]}
    one, many = (
        mk.mapo_loss_from_hidden(x, eye, ids, chunk_rows=n, **given).metrics for n in (6, 3)
    )
    for name, value in one.items():
        assert_close(many[name], value, 1e-6)


def test_accuracy_of_entropies_by_the_rule(device):
    torch.manual_seed(3)
    logits = torch.randn(2, 40, 500) * 8
    ids = torch.randint(0, 500, (2, 40))
    entropy = mk.token_logprobs(logits.to(device), ids.to(device), return_entropy=True)[1]
    exact = reference.token_logprobs(logits.double(), ids)[1]
    logp = torch.log_softmax(logits, -1)
    for i in range(40):
        plain = -(logp.exp() * logp).sum(-1)[:, i]
        assert_accurate(entropy[:, i], exact[:, i], plain)


@pytest.mark.parametrize("certainty", ["step", 0.0])
def test_a_mean_of_minus_eps_is_not_divided_by_where_it_has_no_weight(certainty, device):
    rewards = torch.tensor([-2.0, 0.0, -2.0, 0.0], device=device)
    success = torch.tensor([True, False, True, False], device=device)
    settings = {"std_correction": 0, "eps": 1.0, "apd": "paper", "certainty": certainty}
    found = mk.group_advantages(rewards, group_size=4, success=success, **settings)
    assert found.tolist() == [-0.5, 0.5, -0.5, 0.5]


def test_a_reward_at_the_mean_is_worth_nothing_whatever_the_factor(device):
    rewards = torch.tensor([-(2.0**127), 1.0, 2.0**127], device=device)
    settings = {"std_correction": 0, "eps": 1e-30, "apd": "paper", "certainty": 0.1}
    found = mk.group_advantages(rewards, group_size=3, **settings)
    # The mean is 0, and eps is 0 in the unit of such rewards.
    assert found[1] == 0 and found[0] == -found[2] == -torch.finfo(torch.float32).max


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_sequence_of_weight_0_that_is_scored_has_its_clip_fraction(level, device):
    given = {
        "old_logprobs": torch.zeros(3, 1, device=device),
        "advantages": torch.tensor([0.0, 1.0, -1.0], device=device),
        "token_weights": torch.tensor([[1.0], [0.0], [1.0]], device=device),
    }
    spec = mk.LossSpec(
        objective="cispo", importance_level=level, eps_high_cispo=0.5, score_all=True
    )
    metrics = mk.mapo_loss(torch.zeros(3, 1, device=device), spec=spec, **given).metrics
    assert abs(float(metrics["clip_fraction_high"]) - 1 / 3) < 1e-6
