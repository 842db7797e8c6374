"""What a loss returns of its tokens: log-probs and entropies as it took them, sums of squares."""

import pytest
import torch
from hidden import logits_of, make_hidden
from support import assert_close, keep, make_logits

import mapo_kernels as mk
from mapo_kernels import config

LEVELS = ("token", "sequence")


def call_of(batch, device, **given):
    """A loss of the batch, and what the same log-probs are scored by."""
    named = {"mask": batch["mask"], "advantages": batch["advantages"], **given}
    named = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in named.items()}
    names = ("hidden", "weight", "bias") if "hidden" in batch else ("logits",)
    leaves = [batch[k].to(device, copy=True).requires_grad_() for k in names]
    ids = batch["ids"].to(device)
    if "hidden" in batch:
        out = mk.mapo_loss_from_hidden(*leaves[:2], ids, bias=leaves[2], chunk_rows=5, **named)
    else:
        out = mk.mapo_loss_from_logits(*leaves, ids, **named)
    return out, torch.autograd.grad(out.loss, leaves)


def exact_squares(batch, temperature, lists):
    x = logits_of(batch)[1].detach() if "hidden" in batch else batch["logits"].double()
    x = x.where(batch["mask"][..., None], 0.0) / temperature
    if lists is not None:
        columns = torch.zeros(x.flatten(0, 1).shape, dtype=torch.bool)
        for row, kept in zip(columns, lists, strict=True):
            row[kept] = True
            row |= not kept
        x = x.masked_fill(~columns.view(x.shape), -torch.inf)
    return x.softmax(-1).square().sum(-1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("where", ["logits", "hidden"])
def test_they_are_those_inside_the_loss(where, level, masked, device):
    batch = make_hidden(4, 3) if where == "hidden" else make_logits(4, 3, 50, torch.float32)
    batch["advantages"] = torch.tensor([1.0, -0.5, 0.0, 2.0])
    spec = mk.LossSpec(importance_level=level, entropy_coef=0.0 if masked else 0.1)
    given = {"spec": spec, "old_logprobs": batch["old"], "temperature": 0.8}
    lists = None
    if masked:
        lists = keep(batch["ids"], 50, (1, 2, 5, 0, 30))
        given["sampling_mask"] = mk.SamplingMask.from_lists(lists, device)
    with config.override({"KEPT.cpu_share": 4, "KEPT.gpu_share": 4}):
        plain, plain_grads = call_of(batch, device, **given)
        some, _ = call_of(batch, device, **given, return_logprobs=True)
        out, grads = call_of(batch, device, **given, return_sum_pi_squared=True)
    assert type(plain) is mk.LossOutput and len(plain) == 3 and some.sum_pi_squared is None
    assert torch.equal(some.logprobs, out.logprobs) and torch.equal(some.entropy, out.entropy)
    assert_close(out.loss, plain.loss, 1e-6)
    for a, b in zip(grads, plain_grads, strict=True):
        assert_close(a, b, 2e-6)
    for name, value in plain.metrics.items():
        assert_close(out.metrics[name], value, 1e-6)
    scored = batch["mask"] & ((batch["advantages"] != 0)[:, None] | (spec.entropy_coef != 0))
    on_device = scored.to(device)
    of_rows = {"mask": on_device, "temperature": 0.8, "return_entropy": True}
    of_rows["sampling_mask"] = given.get("sampling_mask")
    names = ("hidden", "weight", "bias", "ids", "logits")
    x = {k: batch[k].to(device) for k in names if k in batch}
    with config.override({"KEPT.cpu_share": 4, "KEPT.gpu_share": 4}):
        if where == "logits":
            found = mk.token_logprobs(x["logits"], x["ids"], **of_rows)
        else:
            found = mk.token_logprobs_from_hidden(
                x["hidden"], x["weight"], x["ids"], bias=x["bias"], chunk_rows=5, **of_rows
            )
    assert torch.equal(out.logprobs, found[0]) and torch.equal(out.entropy, found[1])
    assert not out.logprobs.requires_grad
    squares = exact_squares(batch, 0.8, lists).where(scored, 0.0)
    assert_close(out.sum_pi_squared, squares, 2e-6)


def test_packed_planned_and_without_gradients(device):
    batch = make_hidden(1, 9, torch.float32, mask="none")
    bounds = torch.tensor([0, 3, 5, 9], device=device)
    advantages = torch.tensor([1.0, 0.0, -1.0], device=device)
    weights = torch.tensor([1.0, 0, 1, 1, 1, 1, 1, 0, 1], device=device)
    hidden, ids, weight = (
        batch["hidden"][0].to(device), batch["ids"][0].to(device), batch["weight"].to(device),
    )  # fmt: skip
    plan = mk.make_plan(advantages=advantages, cu_seqlens=bounds)
    live = (weights != 0) & torch.tensor([1, 1, 1, 0, 0, 1, 1, 1, 1], device=device).bool()
    expected = mk.token_logprobs_from_hidden(hidden, weight, ids, mask=live)
    for wanted in (True, False):
        weight.requires_grad_(wanted)
        given = {"plan": plan, "token_weights": weights, "return_sum_pi_squared": True}
        out = mk.mapo_loss_from_hidden(hidden, weight, ids, **given)
        logits = (hidden @ weight.detach().t()).requires_grad_(wanted)
        same = mk.mapo_loss_from_logits(logits, ids, **given)
        assert_close(out.logprobs, expected, 1e-6)
        assert_close(same.logprobs, expected, 1e-6)
        squares = logits.detach().double().softmax(-1).square().sum(-1)
        for found in (out, same):
            assert_close(found.sum_pi_squared, squares.where(live, 0.0), 2e-6)
            assert (found.logprobs[~live] == 0).all() and (found.entropy[~live] == 0).all()
    with pytest.raises(TypeError, match="return_logprobs"):
        mk.mapo_loss_from_logits(logits, ids, plan=plan, return_logprobs=1)


@pytest.mark.parametrize("peak", [0.0, 8.0, 40.0, 3e3])
def test_sums_of_squares_of_certain_and_shifted_rows(peak, device):
    x = torch.randn(1, 6, 300)
    x[..., 7] += peak
    x += torch.tensor([0.0, 1e3, -1e3, 0.0, 0.0, 0.0])[:, None]
    ids = torch.full((1, 6), 7)
    ids[0, 4:] = 3
    given = {"advantages": torch.ones(1, device=device), "return_sum_pi_squared": True}
    out = mk.mapo_loss_from_logits(x.to(device), ids.to(device), **given)
    assert_close(out.sum_pi_squared, x.double().softmax(-1).square().sum(-1), 3e-6)


def test_the_module_of_logits_is_the_function(device):
    logits = torch.randn(4, 3, 7, device=device, requires_grad=True)
    ids = torch.randint(0, 7, (4, 3), device=device)
    spec = mk.LossSpec(eps_high=0.28)
    told = {"mask": torch.ones(4, 3, device=device)}
    told |= {"rewards": torch.tensor([1.0, 0, 0, 1], device=device), "group_size": 2}
    expected = mk.mapo_loss_from_logits(logits, ids, temperature=0.7, spec=spec, **told)
    (gradient,) = torch.autograd.grad(expected.loss, [logits])
    module = mk.MapoLogitsLoss(spec, temperature=0.7)
    found = module(logits, ids, **told)
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(torch.autograd.grad(found.loss, [logits])[0], gradient)
    assert module(logits, ids, return_logprobs=True, **told).logprobs.shape == (4, 3)
    # A call may say otherwise.
    other = module(logits, ids, temperature=1.0, **told)
    assert other.loss != found.loss or other.metrics["entropy"] != found.metrics["entropy"]
    assert "eps_high=0.28" in repr(module)
    with pytest.raises(TypeError, match="did you mean 'temperature'"):
        mk.MapoLogitsLoss(spec, temprature=0.7)
