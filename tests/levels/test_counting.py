"""Aggregations and denominators that are counted before a loss: by prompts, or by advantages."""

import pytest
import torch
from support import assert_close, make_batch
from test_linear import NoWaiting

import mapo_kernels as mk

IDS = torch.tensor([7, -3, 7, 2, -3, 7, 5])
ADVANTAGES = torch.tensor([1.0, 0.0, -0.5, 2.0, 0.0, 0.0, 0.3])


def batch_of(mask="row"):
    """Seven sequences of four prompts, one of which gets no signal; a sequence is masked."""
    torch.manual_seed(1)
    batch = make_batch(7, 5, torch.float32, mask)
    return batch, {"old_logprobs": batch["old"], "mask": batch["mask"], "advantages": ADVANTAGES}


def token_losses(batch):
    """Of the default objective, 0 where masked."""
    live = batch["mask"]
    ratio = (batch["logp"] - batch["old"]).masked_fill(~live, 0.0).double().exp()
    A = ADVANTAGES.double()[:, None]
    return -torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A) * live


def loss_of(batch, given, device, **settings):
    given = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    return mk.mapo_loss(batch["logp"].to(device), spec=mk.LossSpec(**settings), **given).loss


def test_token_sum_divides_by_nothing(device):
    batch, given = batch_of()
    assert_close(
        loss_of(batch, given, device, aggregation="token-sum"), token_losses(batch).sum(), 2e-6
    )


@pytest.mark.parametrize("denominator", ["all", "contributing"])
def test_prompt_mean_is_a_mean_over_prompts_of_the_mean_over_their_tokens(denominator, device):
    batch, given = batch_of()
    losses, means = token_losses(batch), []
    for name in IDS.unique():
        own = name == IDS
        if denominator == "all" or (ADVANTAGES[own, None] * batch["mask"][own]).any():
            means.append(losses[own].sum() / batch["mask"][own].sum().clamp(min=1))
    assert len(means) == {"all": 4, "contributing": 3}[denominator]
    settings = {"aggregation": "prompt-mean", "denominator": denominator}
    found = loss_of(batch, given | {"group_ids": IDS}, device, **settings)
    assert_close(found, torch.stack(means).mean(), 2e-6)


def test_a_prompt_without_a_token_counts():
    batch, given = batch_of()
    given["mask"] = batch["mask"] & (IDS != 2)[:, None]
    given |= {"advantages": torch.ones(7), "group_ids": IDS, "old_logprobs": None}
    spec = mk.LossSpec(aggregation="prompt-mean", objective="none")
    loss = mk.mapo_loss(torch.zeros(7, 5), spec=spec, **given)
    assert_close(loss.loss, torch.tensor(-0.75), 1e-6)


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_what_does_not_contribute_does_not_count(aggregation, device):
    batch, given = batch_of()
    losses, live = token_losses(batch), batch["mask"]
    with_signal = live & (ADVANTAGES != 0)[:, None]
    count = with_signal.sum() if aggregation == "token-mean" else with_signal.any(1).sum()
    if aggregation == "seq-mean-token-mean":
        losses = losses / live.sum(1, keepdim=True).clamp(min=1)
    settings = {"aggregation": aggregation, "denominator": "contributing"}
    assert_close(loss_of(batch, given, device, **settings), losses.sum() / count, 2e-6)
    nothing = loss_of(batch, given | {"advantages": torch.zeros(7)}, device, **settings)
    assert nothing == 0
    # The KL term acts on all tokens, and is divided by 1 at least.
    given |= {"advantages": torch.zeros(7), "ref_logprobs": batch["ref"]}
    assert torch.isfinite(loss_of(batch, given, device, **settings, beta=0.1))


def test_dead_groups_do_not_dilute_a_loss(device):
    """The example of TRL #6367: two groups, of which one has equal rewards."""
    rewards = torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 1])
    logp = torch.randn(8, 3)
    given = {"rewards": rewards.to(device), "group_size": 4, "old_logprobs": logp.to(device) - 0.1}
    diluted = mk.mapo_loss(logp.to(device), **given)
    spec = mk.LossSpec(denominator="contributing")
    found = mk.mapo_loss(logp.to(device), spec=spec, **given)
    assert_close(found.loss, 2 * diluted.loss, 1e-6)
    assert set(found.metrics) == set(diluted.metrics)
    for name, value in diluted.metrics.items():
        assert_close(found.metrics[name], value, 1e-6)


@pytest.mark.parametrize("aggregation", ["token-sum", "prompt-mean", "token-mean"])
def test_levels_and_plans_agree(aggregation, device):
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 5, 6, device=device), torch.randn(33, 6, device=device)
    ids = torch.randint(0, 33, (7, 5), device=device)
    batch, given = batch_of()
    logp = mk.token_logprobs_from_hidden(hidden, weight, ids)
    given["old_logprobs"] = (logp - 0.1 * torch.rand(7, 5, device=device)).detach()
    given["group_ids" if aggregation == "prompt-mean" else "mask"] = (
        IDS if aggregation == "prompt-mean" else batch["mask"]
    )
    given = {k: v.to(device) for k, v in given.items()}
    counted = "all" if aggregation == "token-sum" else "contributing"
    spec = mk.LossSpec(aggregation=aggregation, denominator=counted)
    leaf = hidden.clone().requires_grad_()
    logits = (hidden @ weight.t()).requires_grad_()
    expected = mk.mapo_loss(logp, spec=spec, **given).loss
    found = [
        mk.mapo_loss_from_logits(logits, ids, spec=spec, **given).loss,
        mk.mapo_loss_from_hidden(leaf, weight, ids, spec=spec, **given).loss,
    ]
    old = given.pop("old_logprobs")
    plan = mk.make_plan(spec=spec, **given)
    parts = [slice(0, 3), slice(3, 4), slice(4, 7)]
    found.append(
        sum(
            mk.mapo_loss_from_logits(
                logits[p], ids[p], plan=plan.micro_batch(p), old_logprobs=old[p]
            ).loss
            for p in parts
        )
    )
    for loss in found:
        assert_close(loss, expected, 5e-6)
    (by_logits,) = torch.autograd.grad(found[0], logits, retain_graph=True)
    (by_parts,) = torch.autograd.grad(found[2], logits)
    assert_close(by_parts, by_logits, 5e-6)
    found[1].backward()
    assert_close(leaf.grad, by_logits @ weight, 5e-6)


def test_what_makes_no_sense_is_an_error():
    logp = torch.zeros(4, 3)
    given = {"advantages": torch.ones(4), "spec": mk.LossSpec(aggregation="prompt-mean")}
    with pytest.raises(ValueError, match="group_size, group_ids: expected exactly one.*neither"):
        mk.mapo_loss(logp, **given)
    with pytest.raises(ValueError, match="group_size: expected a positive divisor"):
        mk.mapo_loss(logp, group_size=3, **given)
    with pytest.raises(ValueError, match="success.*: expected None with advantages"):
        mk.mapo_loss(logp, group_size=2, success=torch.ones(4) > 0, **given)
    with pytest.raises(ValueError, match="expected None with advantages, got .*group_size"):
        mk.mapo_loss(logp, advantages=torch.ones(4), group_size=2)
    with pytest.raises(ValueError, match="denominator: expected 'all' with aggregation"):
        mk.LossSpec(aggregation="token-sum", denominator="contributing")
    with pytest.raises(ValueError, match="denominator: expected one of"):
        mk.LossSpec(denominator="active")


@pytest.mark.parametrize("aggregation", ["token-mean", "prompt-mean"])
def test_a_denominator_that_is_a_number_waits_for_nothing(aggregation, device):
    if mk.resolve_backend(device.type) != "triton":
        pytest.skip("on a CPU there is nobody to wait for")
    batch = make_batch(4, 3, dtype=torch.float32)
    logp, mask = batch["logp"].to(device), batch["mask"].to(device)
    spec = mk.LossSpec(aggregation=aggregation, denominator="contributing")
    given = {"rewards": torch.rand(4, device=device), "group_size": 2, "mask": mask, "spec": spec}
    if device.type == "cuda":
        mk.mapo_loss(logp, normalizer=3.0, **given)
        torch.cuda.set_sync_debug_mode("error")
    try:
        with NoWaiting():
            mk.mapo_loss(logp, normalizer=3.0, **given)
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
