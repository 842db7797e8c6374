"""One batch, every way into the package: the same advantages, tokens and denominator."""

import warnings

import numpy as np
import pytest
import torch
from support import assert_close

import mapo_kernels as mk
from mapo_kernels._triton import interprets

NAN = float("nan")
# A tenth added up ten times (from Python 3.12 on `sum` rounds once), a difference that float32
# cannot hold, and one that only looks like one.
REWARDS = {
    "sum of tenths": [0.9999999999999999, 0.0, 0.0, 0.0],
    "large offset": [1e9 + 1, 1e9, 1e9, 1e9],
    "nearly equal": [0.1 + 0.2, 0.3, 0.3, 0.3],
}


def advantages_by_every_way(rewards, dtype, device, **grouping):
    """Advantages as every function computes or uses them, for a loss in `dtype`."""
    n = len(rewards)
    grouping = grouping or {"group_size": n}
    given = {"rewards": rewards, **grouping}
    logp = torch.full((n, 2), -1.0, dtype=dtype, device=device)
    hidden = torch.randn(n, 2, 5, dtype=dtype, device=device)
    logits, weight = hidden[..., :4], torch.randn(7, 5, dtype=dtype, device=device)
    ids = torch.ones(n, 2, dtype=torch.int64, device=device)
    spec = mk.LossSpec(aggregation="seq-mean-token-sum", objective="none")
    plan = mk.make_plan(mask=torch.ones(n, 2, device=device), spec=spec, **given)
    leaf = logp.clone().requires_grad_()
    out = mk.mapo_loss(leaf, spec=spec, **given)
    out.loss.backward()
    # The gradient by a log-prob is minus the advantage over the number of sequences.
    found = {"mapo_loss": out.advantages, "gradient": -leaf.grad[:, 0] * n}
    for name, source in (("", {"spec": spec, **given}), (" with a plan", {"plan": plan})):
        found[f"mapo_loss{name}"] = mk.mapo_loss(logp, **source).advantages
        found[f"from_logits{name}"] = mk.mapo_loss_from_logits(logits, ids, **source).advantages
        found[f"from_hidden{name}"] = mk.mapo_loss_from_hidden(
            hidden, weight, ids, **source
        ).advantages
    return {name: x.cpu() for name, x in found.items()}


@pytest.mark.parametrize("grouping", ["size", "ids"])
@pytest.mark.parametrize("case", REWARDS)
def test_float64_rewards_mean_the_same_to_a_float32_loss_everywhere(case, grouping, device):
    rewards = torch.from_numpy(np.array(REWARDS[case])).to(device)
    how = {"group_ids": torch.zeros(4, dtype=torch.int64, device=device)}
    found = advantages_by_every_way(
        rewards, torch.float32, device, **(how if grouping == "ids" else {})
    )
    # Statistics in float32; success in the rewards' own dtype, where 1 - 2^-53 is not 1.
    success = rewards >= 1.0
    expected = mk.group_advantages(rewards.float(), group_size=4, success=success).cpu()
    for name, advantages in found.items():
        assert_close(advantages, expected, 1e-6)
        assert ((advantages == 0) == (expected == 0)).all(), name
    assert len({tuple(x.tolist()) for name, x in found.items() if name != "gradient"}) == 1
    if case == "sum of tenths":
        assert expected[0] == pytest.approx(3.0, abs=1e-4)


@pytest.mark.parametrize("case", REWARDS)
def test_float64_rewards_of_a_float64_loss_keep_their_digits(case, device):
    rewards = torch.tensor(REWARDS[case], dtype=torch.float64, device=device)
    expected = mk.group_advantages(rewards, group_size=4).cpu()
    assert expected.dtype == torch.float64 and expected[0] > 0
    for name, advantages in advantages_by_every_way(rewards, torch.float64, device).items():
        assert advantages.dtype == torch.float64, name
        assert_close(advantages, expected, 1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_rewards_of_a_float64_loss_have_float32_statistics(dtype, device):
    rewards = torch.tensor([0.1, 0.2, 0.7, 1.0], device=device)
    expected = mk.group_advantages(rewards, group_size=4)
    assert expected.dtype == torch.float32
    for name, advantages in advantages_by_every_way(rewards, dtype, device).items():
        assert_close(advantages, expected, 1e-6 if name == "gradient" else 0)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64]
)
def test_a_reward_at_the_threshold_in_its_own_dtype_is_a_success(dtype, device):
    threshold = 0.9 if dtype.is_floating_point else 16777217
    rewards = torch.tensor([threshold, 0, 0, 0], device=device, dtype=torch.float64).to(dtype)
    spec = mk.AdvantageSpec(success_threshold=threshold)
    below = rewards.clone()
    below[0] = threshold - 1e-12 if dtype == torch.float64 else 0 if dtype != torch.int64 else 2**24
    for given, expected in ((rewards, 0.25), (below, 0.0)):
        logp = torch.zeros(4, 2, device=device)
        loss = mk.mapo_loss(logp, rewards=given, group_size=4, advantage_spec=spec)
        mask = torch.ones(4, 2, device=device)
        plan = mk.make_plan(rewards=given, group_size=4, mask=mask, advantage_spec=spec)
        stats = mk.group_advantages(
            given, group_size=4, success_threshold=threshold, return_stats=True
        )[1]
        for p in (
            loss.metrics["success_ratio_mean"],
            plan.metrics["success_ratio_mean"],
            stats.success_ratio[0],
        ):
            assert p == expected


@pytest.mark.parametrize("masked", [False, True])
def test_a_plan_knows_that_advantages_are_the_tokens(masked, device):
    """Also where a micro-batch has as many tokens as sequences."""
    bounds = torch.tensor([0, 0, 2, 5], device=device)
    advantages = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], device=device)
    logp = torch.randn(5, device=device)
    mask = torch.ones(5, dtype=torch.bool, device=device) if masked else None
    spec = mk.LossSpec(objective="cispo")
    given = {"advantages": advantages, "mask": mask, "cu_seqlens": bounds, "spec": spec}
    plan = mk.make_plan(**given)
    part = plan.micro_batch(slice(0, 2))
    expected = -(logp[:2] * advantages[:2]).sum() / 5
    ids = torch.zeros(2, dtype=torch.int64, device=device)
    logits = torch.stack([logp[:2], torch.log1p(-logp[:2].exp().clamp(max=0.9))], 1)
    by_logits = -(mk.token_logprobs(logits, ids) * advantages[:2]).sum() / 5
    assert_close(mk.mapo_loss(logp[:2], plan=part).loss, expected, 1e-6)
    assert_close(mk.mapo_loss_from_logits(logits, ids, plan=part).loss, by_logits, 1e-6)
    eye = torch.eye(2, device=device)
    assert_close(mk.mapo_loss_from_hidden(logits, eye, ids, plan=part).loss, by_logits, 1e-6)
    assert part.live_rows.tolist() == [0, 1] and part.micro_batch(slice(1, 2)).per_token
    rest = mk.mapo_loss(logp[2:], plan=plan.micro_batch(slice(2, 3))).loss
    assert_close(expected + rest, mk.mapo_loss(logp, **given).loss, 1e-6)


def test_a_compiled_loss_with_such_a_plan(device):
    torch.compiler.reset()
    plan = mk.make_plan(
        advantages=torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], device=device),
        cu_seqlens=torch.tensor([0, 0, 2, 5], device=device),
        spec=mk.LossSpec(objective="cispo"),
    ).micro_batch(slice(0, 2))
    logp = torch.tensor([-0.5, -0.25], device=device)
    compiled = torch.compile(
        lambda x: mk.mapo_loss(x, plan=plan).loss, fullgraph=True, backend="aot_eager"
    )
    assert_close(compiled(logp), torch.tensor(1.0 / 5), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_temperature_is_divided_in_float32(dtype, device):
    hidden, weight = torch.randn(3, 4, 8, device=device), torch.randn(50, 8, device=device) * 2
    ids = torch.randint(0, 50, (3, 4), device=device)
    temperature = torch.tensor([0.7, 1.3, 0.9], device=device).to(dtype)
    for options in ({"logit_scale": 0.3}, {"logit_scale": 0.3, "softcap": 5.0}):
        narrow, wide = (
            mk.token_logprobs_from_hidden(hidden, weight, ids, temperature=t, **options)
            for t in (temperature, temperature.float())
        )
        assert torch.equal(narrow, wide)


def test_a_plan_counts_no_token_outside_every_sequence(device):
    bounds = torch.tensor([1, 3, 5], device=device)
    mask = torch.ones(8, device=device)
    given = {
        "advantages": torch.tensor([1.0, 1.0], device=device),
        "mask": mask,
        "cu_seqlens": bounds,
    }
    logp = torch.full((8,), -1.0, device=device)
    loss = mk.mapo_loss(logp, spec=mk.LossSpec(objective="cispo"), **given).loss
    plan = mk.make_plan(spec=mk.LossSpec(objective="cispo"), **given)
    assert plan.normalizer == 4 and loss == 1
    assert mk.mapo_loss(logp, plan=plan).loss == loss


def test_a_plan_has_the_denominator_of_a_float64_loss(device):
    dtype = torch.float64 if mk.resolve_backend(device.type, True) == "eager" else torch.float32
    logp = torch.zeros(1, 1, dtype=dtype, device=device)
    given = {
        "advantages": torch.ones(1, device=device),
        "mask": torch.ones(1, 1, device=device),
        "normalizer": 3.7,
    }
    loss = mk.mapo_loss(logp, **given).loss
    assert mk.mapo_loss(logp, plan=mk.make_plan(**given)).loss == loss
    assert loss == torch.tensor(-1.0, dtype=dtype) / 3.7


def test_a_kernel_that_fails_leaves_the_next_loss_alone(monkeypatch):
    if not interprets():
        pytest.skip("only the interpreter stops in the middle of a grid and goes on living")
    from triton.runtime.interpreter import InterpreterBuilder

    mk.set_backend("triton")
    try:
        logp, advantages = torch.randn(4, 3), torch.randn(4)
        expected = mk.mapo_loss(logp, advantages=advantages)
        calls = []

        def fails_in_the_last_program(*arguments):
            calls.append(1)
            if len(calls) == 4:
                raise ArithmeticError("a test")
            return atomic(*arguments)

        atomic = InterpreterBuilder.create_atomic_rmw
        monkeypatch.setattr(InterpreterBuilder, "create_atomic_rmw", fails_in_the_last_program)
        with pytest.raises(Exception, match="a test"):
            mk.mapo_loss(logp, advantages=advantages)
        monkeypatch.undo()
        again = mk.mapo_loss(logp, advantages=advantages)
        assert torch.equal(again.loss, expected.loss)
        assert all(torch.equal(v, expected.metrics[k]) for k, v in again.metrics.items())
    finally:
        mk.set_backend(None)


@pytest.fixture
def forgets_warnings():
    from mapo_kernels import groups

    groups.forget_warnings()
    yield
    groups.forget_warnings()


def never_reached(device, **settings):
    rewards = torch.tensor([0.0, 0.5, 0.5, 0.0], device=device)
    mask = torch.ones(4, 2, device=device)
    spec = mk.AdvantageSpec(**settings)
    return mk.make_plan(rewards=rewards, group_size=4, mask=mask, advantage_spec=spec)


def test_rewards_that_never_reach_the_threshold_are_told_once(device, forgets_warnings):
    with pytest.warns(UserWarning, match="success_threshold") as told:
        never_reached(device)
    (text,) = [str(w.message) for w in told if "success_threshold" in str(w.message)]
    assert all(word in text for word in ("success=", "success_reward", "lambda", "1"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="success_threshold")
        never_reached(device)


@pytest.mark.parametrize(
    "settings",
    [{"estimator": "grpo"}, {"certainty": 0.5}, {"success_threshold": 0.5}, {"estimator": "apd"}],
    ids=str,
)
def test_nothing_is_told_where_the_threshold_plays_no_part(settings, device, forgets_warnings):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="success_threshold")
        never_reached(device, **settings)
        rewards, mask = torch.zeros(4, device=device), torch.ones(4, 2, device=device)
        mk.make_plan(rewards=rewards, group_size=4, mask=mask)
        success = torch.tensor([True, False, True, False], device=device)
        mk.make_plan(rewards=rewards + success, group_size=4, mask=mask, success=success)


def test_group_statistics_tell_it_too(device, forgets_warnings):
    rewards = torch.tensor([0.0, 0.5, 0.5, 0.0], device=device)
    ids = torch.zeros(4, dtype=torch.int64, device=device)
    with pytest.warns(UserWarning, match="success_threshold"):
        mk.group_advantages(rewards, group_ids=ids, return_stats=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [7, 16, 60])
def test_the_order_of_rows_does_not_show(size, dtype, device):
    torch.manual_seed(size)
    ids = torch.randint(0, 1 + 60 // size, (60,))
    rewards = (torch.rand(60, dtype=torch.float64) * 3).round(decimals=2).to(dtype)
    rewards[::29] = NAN
    rewards, ids = rewards.to(device), ids.to(device)
    for want_stats in (False, True):
        given = {"group_ids": ids, "return_stats": want_stats}
        expected = mk.group_advantages(rewards, **given)
        for _ in range(2):
            order = torch.randperm(60, device=device)
            actual = mk.group_advantages(rewards[order], **{**given, "group_ids": ids[order]})
            if want_stats:
                assert all(map(torch.equal, actual[1], expected[1]))
                assert torch.equal(actual[0], expected[0][order])
            else:
                assert torch.equal(actual, expected[order])


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_a_plan_and_hidden_states_of_nan_behind_a_weight_of_0(level, softcap, device):
    spec = mk.LossSpec(importance_level=level)
    hidden, weight = torch.randn(3, 2, 5, device=device), torch.randn(7, 5, device=device)
    ids = torch.zeros(3, 2, dtype=torch.int64, device=device)
    weights = torch.ones(3, 2, device=device)
    weights[0] = 0
    hidden[0] = NAN
    given = {"advantages": torch.ones(3, device=device), "mask": torch.ones(3, 2, device=device)}
    found = []
    for source in ({"plan": mk.make_plan(spec=spec, **given)}, {"spec": spec, **given}):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = mk.mapo_loss_from_hidden(
            *leaves, ids, token_weights=weights, softcap=softcap, **source
        )
        found.append((out.loss, *torch.autograd.grad(out.loss, leaves)))
    for actual, expected in zip(*found, strict=True):
        assert torch.isfinite(actual).all()
        assert_close(actual, expected, 1e-6)


def test_an_empty_batch_in_place(device):
    logits = torch.zeros(2, 0, 1, device=device) * 1
    ids = torch.zeros(2, 0, dtype=torch.int64, device=device)
    given = {"advantages": torch.ones(2, device=device), "inplace": True}
    assert mk.mapo_loss_from_logits(logits, ids, **given).loss == 0
