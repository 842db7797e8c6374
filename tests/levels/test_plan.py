import itertools

import pytest
import torch
from backends import with_two_threads_too
from support import AGGREGATIONS, assert_close, make_batch, pack

import mapo_kernels as mk
from mapo_kernels import config
from mapo_kernels.selection import select

REWARDS = torch.tensor([1, 0, 0, 0.0, 1, 1, 1, 1, 0.1, 0, 0, 1])


def batch_of(device, **kwargs):
    batch = make_batch(n_sequences=12, length=9, dtype=torch.float32, mask="row", **kwargs)
    return {k: v.to(device) for k, v in batch.items()}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@with_two_threads_too
def test_micro_batches_of_a_plan_add_up_to_the_batch(aggregation, device):
    batch = batch_of(device)
    rewards = REWARDS.to(device)
    spec = mk.LossSpec(aggregation=aggregation, eps_high=0.28)
    logp = batch["logp"].clone().requires_grad_()
    whole = mk.mapo_loss(
        logp,
        rewards=rewards,
        group_size=4,
        mask=batch["mask"],
        old_logprobs=batch["old"],
        spec=spec,
    )
    whole.loss.backward()
    plan = mk.make_plan(rewards=rewards, group_size=4, mask=batch["mask"], spec=spec)
    assert torch.equal(plan.advantages, whole.advantages)
    for name, value in plan.metrics.items():
        assert_close(value, whole.metrics[name], 1e-6)
    parts = torch.zeros((), device=device)
    again = batch["logp"].clone().requires_grad_()
    order = torch.randperm(12, device=device)
    for rows in (slice(0, 3), slice(3, 12)) if aggregation == "token-mean" else order.split(5):
        out = mk.mapo_loss(
            again[rows], old_logprobs=batch["old"][rows], plan=plan.micro_batch(rows)
        )
        out.loss.backward()
        parts = parts + out.loss.detach()
        assert out.metrics["zero_advantage_groups"] == 1
    assert_close(parts, whole.loss, 1e-6)
    assert_close(again.grad, logp.grad, 1e-6)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_a_packed_plan_counts_sequences_where_advantages_are_the_tokens(
    masked, aggregation, device
):
    bounds = torch.tensor([0, 0, 3, 3, 4, 9, 9], device=device)
    logp, old, advantages = torch.randn(3, 9).to(device).unbind(0)
    spec = mk.LossSpec(aggregation=aggregation, max_tokens=5)
    given = {"advantages": advantages, "cu_seqlens": bounds, "spec": spec}
    if masked:
        given["mask"] = torch.arange(9, device=device) != 5
    if aggregation == "prompt-mean":
        given["group_size"] = 2
    plan = mk.make_plan(**given)
    expected = mk.mapo_loss(logp, **given, old_logprobs=old).loss
    assert_close(mk.mapo_loss(logp, plan=plan, old_logprobs=old).loss, expected, 1e-6)


@pytest.mark.parametrize("masked", [False, True])
@with_two_threads_too
def test_packed_plans(masked, device):
    lengths = [3, 9, 0, 4, 5, 1, 2, 9, 9, 6, 7, 8]
    packed, cu_seqlens, _ = pack(make_batch(12, 9, torch.float32, "none"), lengths)
    mask = torch.rand(sum(lengths)) < 0.7 if masked else None
    packed["mask"] = torch.ones(sum(lengths)).bool() if mask is None else mask
    given = {"cu_seqlens": cu_seqlens, "mask": mask, "rewards": REWARDS, "group_size": 4}
    given = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    plan = mk.make_plan(**given)
    logp, old = packed["logp"].to(device), packed["old"].to(device)
    whole = mk.mapo_loss(logp, old_logprobs=old, **given)
    parts = []
    for rows, tokens in ((slice(0, 4), slice(0, 16)), (slice(4, 12), slice(16, None))):
        part = plan.micro_batch(rows)
        parts.append(mk.mapo_loss(logp[tokens], old_logprobs=old[tokens], plan=part).loss)
    assert_close(sum(parts), whole.loss, 1e-6)
    sequence = torch.arange(12).repeat_interleave(torch.tensor(lengths))
    live = packed["mask"] & (whole.advantages.cpu() != 0)[sequence]
    assert torch.equal(plan.live_rows.cpu(), live.nonzero().squeeze(1))
    with pytest.raises(ValueError, match="sequences: expected a plain slice"):
        plan.micro_batch(torch.tensor([1, 2]))


def test_packed_plans_without_a_mask_can_be_validated(monkeypatch):
    monkeypatch.setenv("MAPO_KERNELS_VALIDATE", "1")
    cu_seqlens = torch.tensor([0, 3, 12])
    plan = mk.make_plan(advantages=torch.tensor([1.0, 0.0]), cu_seqlens=cu_seqlens)
    assert plan.live_rows.tolist() == [0, 1, 2]
    assert mk.mapo_loss(torch.zeros(12), plan=plan).metrics["active_tokens"] == 12
    with pytest.raises(ValueError, match="cu_seqlens: expected non-decreasing"):
        mk.make_plan(advantages=torch.tensor([1.0, 0.0]), cu_seqlens=cu_seqlens.flip(0))


def test_live_rows_are_the_tokens_that_get_gradient(device):
    batch = batch_of(device)
    for spec in (mk.LossSpec(), mk.LossSpec(importance_level="sequence")):
        for shape in ("sequence", "token"):
            advantages = batch["advantages"].clone()
            advantages[3] = 0
            if shape == "token":
                keep = torch.rand(12, 9, device=device) < 0.5
                advantages = advantages[:, None] * keep
            plan = mk.make_plan(advantages=advantages, mask=batch["mask"], spec=spec)
            logp = batch["logp"].clone().requires_grad_()
            mk.mapo_loss(logp, plan=plan).loss.backward()
            touched = (logp.grad != 0).reshape(-1).nonzero().squeeze(1)
            assert torch.equal(plan.live_rows, touched)
    plan = mk.make_plan(advantages=advantages, mask=batch["mask"], spec=mk.LossSpec(score_all=True))
    assert len(plan.live_rows) == batch["mask"].sum()


def test_a_given_normalizer_is_kept(device):
    batch = batch_of(device)
    given = {"advantages": batch["advantages"], "mask": batch["mask"]}
    for normalizer in (17.0, torch.tensor(17, device=device)):
        plan = mk.make_plan(normalizer=normalizer, **given)
        assert plan.normalizer == 17
        with_plan = mk.mapo_loss(batch["logp"], plan=plan).loss
        assert torch.equal(with_plan, mk.mapo_loss(batch["logp"], normalizer=17.0, **given).loss)


def test_a_plan_is_not_contradicted():
    advantages, mask = torch.ones(4), torch.ones(4, 3)
    plan = mk.make_plan(advantages=advantages, mask=mask, spec=mk.LossSpec(eps_high=0.28))
    logp = torch.zeros(4, 3)
    for name, value in (("advantages", advantages), ("mask", mask), ("group_size", 2)):
        with pytest.raises(ValueError, match=f"{name}: expected None with a plan"):
            mk.mapo_loss(logp, plan=plan, **{name: value})
    with pytest.raises(ValueError, match="spec: expected the plan's spec"):
        mk.mapo_loss(logp, plan=plan, spec=mk.LossSpec(eps_high=0.3))
    same = mk.mapo_loss(logp, plan=plan, spec=mk.LossSpec(eps_high=0.28))
    assert torch.equal(same.loss, mk.mapo_loss(logp, plan=plan).loss)
    with pytest.raises(ValueError, match="mask: expected shape"):
        mk.mapo_loss(torch.zeros(4, 2), plan=plan)


def check_live_rows(plan):
    """They are what `live` says, and the host knows how many."""
    expected = plan.live.reshape(-1).nonzero().squeeze(1)
    assert torch.equal(plan.live_rows, expected) and sum(plan.live_counts) == len(expected)


@pytest.mark.parametrize("spec", [mk.LossSpec(), mk.LossSpec(beta=0.1)], ids=["signal", "all"])
def test_live_rows_are_counted_in_every_layout(spec, device):
    advantages = torch.tensor([1.0, 0.0, -0.5, 2.0], device=device)
    mask = torch.rand(4, 6, device=device) < 0.6
    per_token = torch.randn(4, 6, device=device) * (torch.rand(4, 6, device=device) < 0.5)
    for given in (advantages, per_token):
        plan = mk.make_plan(advantages=given, mask=mask, spec=spec)
        check_live_rows(plan)
        chosen = torch.tensor([False, True, True, False], device=device)
        picks = [
            slice(1, 3),
            slice(None, None, 2),
            torch.tensor([3, 0]),
            torch.tensor([-1]),
            chosen,
        ]
        for pick in picks:
            check_live_rows(plan.micro_batch(pick))
    bounds = torch.tensor([0, 2, 2, 5, 9], device=device)
    flat = torch.rand(9, device=device) < 0.6
    tokens = torch.randn(9, device=device) * (torch.rand(9, device=device) < 0.5)
    for given, live in itertools.product((advantages, tokens), (None, flat)):
        plan = mk.make_plan(advantages=given, mask=live, cu_seqlens=bounds, spec=spec)
        check_live_rows(plan)
        for pick in (slice(0, 2), slice(1, 4), slice(3, None)):
            part = plan.micro_batch(pick)
            check_live_rows(part)
            assert part.bounds == tuple(part.cu_seqlens.tolist())


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_as_many_packed_tokens_as_sequences(level, device):
    """Though not one each: advantages are then the sequences'."""
    spec = mk.LossSpec(objective="cispo", importance_level=level)
    bounds = torch.tensor([0, 0, 3, 4, 4], device=device)
    advantages = torch.tensor([5.0, 1.0, 0.0, 7.0], device=device)
    logits = torch.randn(4, 9, device=device)
    ids = torch.randint(0, 9, (4,), device=device)
    logp = mk.token_logprobs(logits, ids)
    given = {"advantages": advantages, "cu_seqlens": bounds}
    plan = mk.make_plan(spec=spec, **given)
    assert plan.live_counts == (0, 3, 0, 0) and plan.live_rows.tolist() == [0, 1, 2]
    expected = -logp[:3].sum() / 4
    weight = torch.eye(9, device=device)
    for loss in (
        mk.mapo_loss(logp, spec=spec, **given),
        mk.mapo_loss(logp, plan=plan),
        mk.mapo_loss_from_logits(logits, ids, spec=spec, **given),
        mk.mapo_loss_from_hidden(logits, weight, ids, spec=spec, **given),
        mk.mapo_loss_from_hidden(logits, weight, ids, plan=plan),
    ):
        assert_close(loss.loss, expected, 1e-6)
        assert loss.metrics["scored_tokens"] == 3


@pytest.mark.parametrize("limit", [0, 1000], ids=["torch", "launched"])
def test_metrics_of_many_groups(limit, device):
    """Groups of one member, without a success, without a finite reward; in more than one step."""
    generator = torch.Generator().manual_seed(3)
    rewards = torch.rand(120, generator=generator).round(decimals=1)
    rewards[::7] = float("nan")
    rewards[60:64] = float("inf")
    ids = torch.arange(120) // 4 * (torch.arange(120) % 5 != 0)
    given = {"group_ids": ids.to(device), "mask": torch.ones(120, 3, device=device)}
    with config.override({"ADVANTAGES.summary_block": 16, "ADVANTAGES.summary_limit": limit}):
        plan = mk.make_plan(rewards=rewards.to(device), **given)
    _, stats = mk.group_advantages(rewards, group_ids=ids, return_stats=True)
    active = stats.size > 0
    assert float(plan.metrics["active_groups"]) == int(active.sum())
    assert float(plan.metrics["nonfinite_rewards"]) == int((~rewards.isfinite()).sum())
    for name, values in (("success_ratio_mean", "success_ratio"), ("lambda_mean", "certainty")):
        expected = getattr(stats, values)[active].double().mean()
        assert_close(plan.metrics[name], expected, 1e-6)


@pytest.mark.parametrize("limit", [0, 1000], ids=["torch", "launched"])
def test_metrics_of_no_active_group_are_nan(limit, device):
    rewards = torch.full((4,), float("nan"), device=device)
    mask = torch.ones(4, 3, device=device)
    with config.override({"ADVANTAGES.summary_limit": limit}):
        plan = mk.make_plan(rewards=rewards, group_size=2, mask=mask)
    found = {name: float(value) for name, value in plan.metrics.items()}
    assert found["success_ratio_mean"] != found["success_ratio_mean"]
    assert found["lambda_mean"] != found["lambda_mean"]
    assert found["active_groups"] == 0 and found["zero_advantage_groups"] == 2
    assert found["nonfinite_rewards"] == 4


def test_indices_lie_where_the_plan_does():
    """Tensors on a GPU would wait for an index that lies on the host."""
    there = torch.device("meta")
    for sequences in ([3, 1], (0,), [True, False, True, False, False], range(3, 0, -1)):
        assert select(sequences, 5).rows_on(there).device == there
    assert select(slice(1, 3), 5).rows_on(there) == slice(1, 3, 1)


def test_a_micro_batch_by_indices_waits_for_nothing(device):
    if device.type != "cuda":
        pytest.skip("on a CPU there is nobody to wait for")
    batch = batch_of(device)
    plan = mk.make_plan(rewards=REWARDS.to(device), group_size=4, mask=batch["mask"])
    plan.micro_batch([5, 2])
    torch.cuda.set_sync_debug_mode("error")
    try:
        part = plan.micro_batch([5, 2])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(part.mask, batch["mask"][torch.tensor([5, 2])])
