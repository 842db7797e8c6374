"""The logits level against the oracle, and against everything that has broken such kernels."""

import pytest
import torch
from backends import with_two_threads_too
from support import (
    AGGREGATIONS,
    KLS,
    MASKS,
    NAN,
    POLICIES,
    assert_accurate,
    assert_close,
    logits_oracle,
    logits_plain,
    logits_run,
    make_logits,
    pack,
    tensors_of,
    tune,
)

import mapo_kernels as mk
import reference
from mapo_kernels._triton import HAS_TRITON, interprets, jit, tl
from mapo_kernels.kernels.gradient import narrow

LEVELS = ("token", "sequence")
BONUSES = (0.0, 0.1, 0.0, 0.1)  # one for each mask
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_against_oracle(batch, spec, device, tolerance, temperature=1.0):
    given = tensors_of(batch, spec)
    loss, grad, metrics = logits_run(
        batch, spec, device, upstream=-2.5, temperature=temperature, **given
    )
    exact_loss, exact_grad, exact_metrics = logits_oracle(
        batch, spec, temperature, upstream=-2.5, **given
    )
    assert_close(loss, exact_loss, tolerance)
    assert_close(grad, exact_grad, tolerance)
    assert (grad.cpu()[~batch["mask"]] == 0).all()
    assert set(metrics) == set(exact_metrics)
    for name, value in exact_metrics.items():
        assert_close(metrics[name], value, tolerance)


@pytest.mark.pairwise
@pytest.mark.parametrize(("mask", "bonus"), list(zip(MASKS, BONUSES, strict=True)))
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kl", KLS, ids=str)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_every_combination_equals_the_oracle_in_float64(
    policy, kl, level, aggregation, mask, bonus
):
    spec = mk.LossSpec(
        **policy, **kl, importance_level=level, aggregation=aggregation, entropy_coef=bonus
    )
    batch = make_logits(mask=mask, vocab=11)
    check_against_oracle(batch, spec, torch.device("cpu"), 1e-11, temperature=0.7)


@pytest.mark.pairwise
@pytest.mark.parametrize(
    ("aggregation", "mask", "bonus"), list(zip(AGGREGATIONS, MASKS, BONUSES, strict=True))
)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kl", [KLS[0], KLS[-1]], ids=str)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_every_objective_equals_the_oracle(policy, kl, level, aggregation, mask, bonus, device):
    spec = mk.LossSpec(
        **policy, **kl, importance_level=level, aggregation=aggregation, entropy_coef=bonus
    )
    batch = make_logits(2, 3, mask=mask, dtype=torch.float32)
    check_against_oracle(batch, spec, device, 3e-6, temperature=1.3)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("per_token", [False, True])
def test_rollout_weights_and_per_token_advantages(level, per_token, device):
    spec = mk.LossSpec(rollout_cap=1.2, importance_level=level, aggregation="seq-mean-token-mean")
    batch = make_logits(dtype=torch.float32)
    if per_token:
        batch["advantages"] = torch.randn(4, 3) * (torch.rand(4, 3) < 0.7)
        batch["weights"] = batch["weights"] * (torch.rand(4, 3) < 0.7)
    check_against_oracle(batch, spec, device, 3e-6)


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bonus", [0.0, 0.05])
@pytest.mark.parametrize("vocab", [5, 128, 1000, 5003])
def test_accuracy_rule(vocab, bonus, dtype, device):
    spec = mk.LossSpec(entropy_coef=bonus)
    batch = make_logits(3, 4, vocab, dtype, scale=5.0)
    # All of one sign: the loss is no difference of large terms, whose error would be compared.
    batch["advantages"] = torch.tensor([0.5, 1.0, 2.0])
    given = {"old_logprobs": batch["old"]}
    loss, grad, _ = logits_run(batch, spec, device, **given)
    exact_loss, exact_grad, _ = logits_oracle(batch, spec, **given)
    plain_loss, plain_grad = logits_plain(batch, spec, **given)
    assert loss.dtype == torch.float32 and grad.dtype == dtype
    assert_accurate(loss, exact_loss, plain_loss)
    assert_accurate(grad, exact_grad, plain_grad.where(batch["mask"][..., None], 0.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 7, 64, 511, 512, 513, 1024, 2049])
def test_scores_of_any_vocabulary(vocab, dtype, device):
    batch = make_logits(2, 3, vocab, dtype)
    logits, ids, mask = (batch[k].to(device) for k in ("logits", "ids", "mask"))
    logp, entropy = mk.token_logprobs(logits, ids, mask=mask, return_entropy=True, temperature=0.5)
    exact, exact_entropy = reference.token_logprobs(
        batch["logits"], batch["ids"], 0.5, batch["mask"]
    )
    assert logp.dtype == torch.float32 and not logp.requires_grad
    assert_close(logp, exact, 1e-6)
    assert_close(entropy, exact_entropy, 1e-6)
    assert torch.equal(mk.token_logprobs(logits, ids, mask=mask, temperature=0.5), logp)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_certain_tokens(dtype, device):
    """At a margin of 30 nats float32's 1 - p is 0; the gradient of the target is not."""
    logits = torch.zeros(1, 3, 300, dtype=dtype)
    ids = torch.tensor([[7, 299, 130]])
    # Beyond 30 nats the float64 oracle's own 1 - p loses digits.
    for t, margin in enumerate((10.0, 20.0, 30.0)):
        logits[0, t, ids[0, t]] = margin
    logits = logits + 64
    batch = {"logits": logits, "ids": ids, "mask": torch.ones(1, 3, dtype=torch.bool)}
    batch["advantages"] = torch.tensor([1.0])
    for bonus in (0.0, 0.1):
        spec = mk.LossSpec(entropy_coef=bonus)
        _, grad, _ = logits_run(batch, spec, device)
        _, exact, _ = logits_oracle(batch, spec)
        tolerance = 1e-3 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(grad.cpu().double(), exact, rtol=tolerance, atol=0)
    logp, entropy = mk.token_logprobs(logits.to(device), ids.to(device), return_entropy=True)
    margin = torch.tensor([[10.0, 20.0, 30.0]], dtype=torch.float64)
    others = 299 * torch.exp(-margin)
    torch.testing.assert_close(logp.cpu().double(), -torch.log1p(others), rtol=1e-6, atol=0)
    exact = torch.log1p(others) + others / (1 + others) * margin
    torch.testing.assert_close(entropy.cpu().double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("offset", [-110.0, 90.0])
def test_large_logits_of_one_sign(offset, device):
    batch = make_logits(3, 4, 600, torch.float32)
    batch["logits"] = batch["logits"] + offset
    spec = mk.LossSpec(entropy_coef=0.1)
    given = {"old_logprobs": batch["old"]}
    loss, grad, _ = logits_run(batch, spec, device, **given)
    exact_loss, exact_grad, _ = logits_oracle(batch, spec, **given)
    plain_loss, plain_grad = logits_plain(batch, spec, **given)
    assert_accurate(loss, exact_loss, plain_loss)
    assert_accurate(grad, exact_grad, plain_grad.where(batch["mask"][..., None], 0.0))


def test_infinities_behave_as_in_float64(device):
    inf, lowest = float("inf"), torch.finfo(torch.float32).min
    logits = torch.randn(7, 600)
    ids = torch.randint(0, 600, (7,))
    others = (ids + 1) % 600
    logits[0, others[0]] = -inf
    logits[1, ids[1]] = -inf
    logits[2, others[2]] = inf
    logits[3, ids[3]] = inf
    logits[4] = -inf  # what is left of sampling by top-k
    logits[4, [ids[4], others[4], 5]] = torch.tensor([1.0, 2.0, 0.5])
    logits[5] = lowest
    logits[5, [ids[5], others[5]]] = torch.tensor([1.0, 2.0])
    logits[6, others[6]] = NAN
    logp, entropy = mk.token_logprobs(logits.to(device), ids.to(device), return_entropy=True)
    exact, exact_entropy = reference.token_logprobs(logits, ids)
    torch.testing.assert_close(logp.cpu().double(), exact, rtol=1e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(
        entropy.cpu().double(), exact_entropy, rtol=1e-6, atol=1e-6, equal_nan=True
    )
    for row in (0, 1, 4, 5):
        batch = {"logits": logits[None, row : row + 1], "ids": ids[None, row : row + 1]}
        batch |= {"mask": torch.ones(1, 1, dtype=torch.bool), "advantages": torch.ones(1)}
        for bonus in (0.0, 0.1):
            spec = mk.LossSpec(objective="none", entropy_coef=bonus)
            given = {"old_logprobs": torch.full((1, 1), -3.0)}
            _, grad, _ = logits_run(batch, spec, device, **given)
            _, exact_grad, _ = logits_oracle(batch, spec, **given)
            assert_close(grad, exact_grad, 1e-6)
    for row in (2, 3, 6):
        batch = {"logits": logits[None, row : row + 1], "ids": ids[None, row : row + 1]}
        batch |= {"mask": torch.ones(1, 1, dtype=torch.bool), "advantages": torch.ones(1)}
        assert logits_run(batch, mk.LossSpec(objective="none"), device)[0].isnan()


@pytest.mark.parametrize("bad", [-1, 600, 1 << 40])
def test_an_id_out_of_range_makes_the_loss_nan(bad, device, monkeypatch):
    batch = make_logits(2, 3, 600, torch.float32, mask="none")
    batch["ids"][0, 1] = bad
    for level in LEVELS:
        loss, _, _ = logits_run(batch, mk.LossSpec(importance_level=level), device)
        assert loss.isnan()
    logp = mk.token_logprobs(batch["logits"].to(device), batch["ids"].to(device))
    assert logp[0, 1].isnan() and logp.isfinite().sum() == 5
    batch["mask"][0, 1] = False
    assert logits_run(batch, mk.LossSpec(), device)[0].isfinite()
    monkeypatch.setenv("MAPO_KERNELS_VALIDATE", "1")
    assert logits_run(batch, mk.LossSpec(), device)[0].isfinite()
    batch["mask"][0, 1] = True
    with pytest.raises(ValueError, match=r"token_ids: expected ids in \[0, 600\) where live, got"):
        logits_run(batch, mk.LossSpec(), device)


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [37, 1024])
@pytest.mark.parametrize("level", LEVELS)
@with_two_threads_too
def test_scored_log_probs_are_those_of_the_loss(level, vocab, dtype, device):
    batch = make_logits(2, 3, vocab, dtype)
    logits, ids, mask = (batch[k].to(device) for k in ("logits", "ids", "mask"))
    for temperature in (1.0, 0.8):
        old = mk.token_logprobs(logits, ids, mask=mask, temperature=temperature)
        spec = mk.LossSpec(importance_level=level)
        _, _, metrics = logits_run(batch, spec, device, old_logprobs=old, temperature=temperature)
        assert metrics["approx_kl"] == 0
        assert metrics["ratio_mean"] == 1 and metrics["ratio_max"] == 1


def test_clipped_tokens_get_exactly_zero(device):
    batch = make_logits(2, 3, 600, torch.float32, mask="none")
    batch["advantages"] = torch.tensor([1.0, -1.0])
    old = batch["old"] - 3 * torch.tensor([[1.0], [-1.0]])
    _, grad, metrics = logits_run(batch, mk.LossSpec(), device, old_logprobs=old)
    assert (grad == 0).all()
    assert metrics["clip_fraction_high"] + metrics["clip_fraction_low"] == 1


@pytest.mark.pairwise
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_packed_equals_padded(aggregation, level, masked, device):
    lengths = [2, 3, 0, 1]
    batch = make_logits(4, 3, 40, torch.float32, mask="random" if masked else "none")
    packed, cu_seqlens, keep = pack(batch, lengths)
    spec = mk.LossSpec(
        aggregation=aggregation, importance_level=level, max_tokens=9, entropy_coef=0.1
    )
    batch["mask"] = batch["mask"] & keep
    temperature = torch.tensor([0.5, 1.0, 2.0, 1.5])
    given = {"old_logprobs": batch["old"], "temperature": temperature}
    loss, grad, metrics = logits_run(batch, spec, device, **given)
    given = {"old_logprobs": packed["old"], "temperature": temperature, "cu_seqlens": cu_seqlens}
    actual, packed_grad, packed_metrics = logits_run(packed, spec, device, mask=masked, **given)
    assert_close(actual, loss, 1e-6)
    assert_close(packed_grad, grad.cpu()[keep], 1e-6)
    for name, value in metrics.items():
        assert_close(packed_metrics[name], value, 1e-6)


def test_packed_tokens_outside_every_sequence_do_not_count(device):
    batch = make_logits(1, 9, 40, torch.float32, mask="none")
    packed = {"logits": batch["logits"][0], "ids": batch["ids"][0]}
    packed["logits"][[0, 1, 7, 8]] = NAN
    packed["advantages"] = torch.tensor([1.0, -2.0])
    for aggregation in AGGREGATIONS[:2]:
        spec = mk.LossSpec(aggregation=aggregation)
        _, grad, metrics = logits_run(
            packed, spec, device, mask=False, cu_seqlens=torch.tensor([2, 5, 7])
        )
        assert metrics["active_tokens"] == 5
        assert (grad[[0, 1, 7, 8]] == 0).all() and (grad[2:7] != 0).all()


def test_a_temperature_per_sequence(device):
    batch = make_logits(4, 3, 600, torch.float32)
    temperature = torch.tensor([0.5, 1.0, 2.0, 1.5])
    for level in LEVELS:
        spec = mk.LossSpec(importance_level=level, entropy_coef=0.1)
        check_against_oracle(batch, spec, device, 3e-6, temperature=temperature)
    logits, ids, mask = (batch[k].to(device) for k in ("logits", "ids", "mask"))
    logp = mk.token_logprobs(logits, ids, temperature=temperature.to(device), mask=mask)
    exact, _ = reference.token_logprobs(batch["logits"], batch["ids"], temperature, batch["mask"])
    assert_close(logp, exact, 1e-6)
    per_row = temperature.to(device).repeat_interleave(3)
    flat = mk.token_logprobs(
        logits.flatten(0, 1), ids.flatten(), temperature=per_row, mask=mask.flatten()
    )
    assert torch.equal(flat.view(4, 3), logp)


@pytest.mark.parametrize("fused_rows", [0, 2048])
def test_micro_batches_with_a_normalizer_add_up(fused_rows, device, monkeypatch):
    tune(monkeypatch, "LOGITS", fused_rows=fused_rows)
    for aggregation in AGGREGATIONS:
        batch = make_logits(4, 3, 40, torch.float32, mask="row")
        spec = mk.LossSpec(aggregation=aggregation)
        whole, grad, _ = logits_run(batch, spec, device, old_logprobs=batch["old"])
        count = batch["mask"].sum() if aggregation == "token-mean" else torch.tensor(4)
        for normalizer in (count, float(count)):
            parts = []
            for rows in (slice(0, 2), slice(2, 4)):
                part = {k: v[rows] for k, v in batch.items()}
                given = {"old_logprobs": part["old"], "normalizer": normalizer}
                parts.append(logits_run(part, spec, device, **given))
            assert_close(parts[0][0] + parts[1][0], whole, 1e-6)
            assert_close(torch.cat([parts[0][1], parts[1][1]]), grad, 1e-6)


def test_a_plan_stands_for_its_arguments(device):
    batch = make_logits(4, 3, 40, torch.float32, mask="random")
    rewards = torch.tensor([1.0, 0.0, 0.3, 1.0], device=device)
    mask, ids = batch["mask"].to(device), batch["ids"].to(device)
    spec = mk.LossSpec(entropy_coef=0.1)
    plan = mk.make_plan(rewards=rewards, group_size=2, mask=mask, spec=spec)
    logits = batch["logits"].to(device)
    whole = mk.mapo_loss_from_logits(logits, ids, plan=plan)
    direct = mk.mapo_loss_from_logits(
        logits, ids, rewards=rewards, group_size=2, mask=mask, spec=spec
    )
    assert_close(whole.loss, direct.loss, 1e-6)
    for name, value in direct.metrics.items():
        assert_close(whole.metrics[name], value, 1e-6)
    parts = [
        mk.mapo_loss_from_logits(logits[rows], ids[rows], plan=plan.micro_batch(rows)).loss
        for rows in (slice(0, 1), slice(1, 4))
    ]
    assert_close(sum(parts), direct.loss, 1e-6)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("grouping", ["contiguous", "ids", "many ids", "packed"])
def test_from_rewards_equals_from_advantages(grouping, level, device, monkeypatch):
    batch = make_logits(8, 2, 40, torch.float32, mask="row")
    rewards = torch.tensor([1, 0, 0, 1, 1, 1, 0.1, float("nan")])
    groups = {"group_size": 4}
    order = torch.arange(8)
    if "ids" in grouping:
        order = torch.randperm(8)
        groups = {"group_ids": (torch.arange(8) // 4 + 5)[order].to(device)}
    if grouping == "many ids":
        tune(monkeypatch, "LOGITS", match_limit=2)
    advantages, stats = mk.group_advantages(rewards.to(device), group_size=4, return_stats=True)
    batch["advantages"] = advantages.cpu()[order]
    spec = mk.LossSpec(importance_level=level)
    loss, grad, _ = logits_run(batch, spec, device, old_logprobs=batch["old"])
    layout = {"mask": batch["mask"].to(device)}
    shape = (8, 2)
    if grouping == "packed":
        layout = {"mask": layout["mask"].flatten(), "cu_seqlens": torch.arange(0, 17, 2)}
        layout["cu_seqlens"] = layout["cu_seqlens"].to(device)
        shape = (16,)
    logits = batch["logits"].view(*shape, 40).to(device).requires_grad_()
    out = mk.mapo_loss_from_logits(
        logits,
        batch["ids"].view(shape).to(device),
        rewards=rewards[order].to(device),
        old_logprobs=batch["old"].view(shape).to(device),
        spec=spec,
        **groups,
        **layout,
    )
    (actual,) = torch.autograd.grad(out.loss, logits)
    assert_close(out.advantages, advantages.cpu()[order], 1e-6)
    assert_close(out.loss, loss, 1e-6)
    assert_close(actual.view(8, 2, 40), grad, 1e-6)
    assert_close(out.metrics["success_ratio_mean"], stats.success_ratio.mean(), 1e-6)
    assert_close(out.metrics["lambda_mean"], stats.certainty.mean(), 1e-6)
    assert out.metrics["zero_advantage_groups"] == 0 and out.metrics["nonfinite_rewards"] == 1


@pytest.mark.parametrize("level", LEVELS)
def test_all_masked_and_empty_batches_give_zero(level, device):
    spec = mk.LossSpec(importance_level=level)
    batch = make_logits(2, 3, 40, torch.float32, mask="all")
    loss, grad, metrics = logits_run(batch, spec, device)
    assert loss == 0 and (grad == 0).all() and metrics["active_tokens"] == 0
    assert metrics["entropy"].isnan()  # the mean over no token
    empty = {
        "logits": torch.zeros(2, 0, 40),
        "ids": torch.zeros(2, 0, dtype=torch.int64),
        "mask": torch.zeros(2, 0, dtype=torch.bool),
        "advantages": torch.ones(2),
    }
    loss, grad, _ = logits_run(empty, spec, device)
    assert loss == 0 and grad.shape == (2, 0, 40)
    assert mk.token_logprobs(empty["logits"].to(device), empty["ids"].to(device)).shape == (2, 0)


def test_autograd_function(device):
    from mapo_kernels.batch import Batch, RowInputs

    batch = make_logits(2, 3, 40, torch.float32, mask="none")
    advantages = batch["advantages"].to(device)
    logits, ids = batch["logits"].to(device).requires_grad_(), batch["ids"].to(device)
    spec = mk.LossSpec(eps_high=0.28)
    expected = mk.mapo_loss_from_logits(logits, ids, advantages=advantages, spec=spec)
    loss, _, _ = mk.MapoLogitsLossFunction.apply(
        logits, RowInputs(ids), Batch(advantages=advantages), spec, mk.AdvantageSpec(), False
    )
    assert torch.equal(loss, expected.loss)


@jit
def round_all(X, Y):
    offs = tl.arange(0, 4096)
    tl.store(Y + offs, narrow(tl.load(X + offs), tl.bfloat16, False))


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_bfloat16_is_rounded_to_even_without_an_instruction_for_it():
    device = "cpu" if interprets() else "cuda"
    x = torch.randn(4096) * torch.logspace(-40, 38, 4096)
    halfway = torch.arange(256).bfloat16().float() * (1 + 2**-8)
    x[:256] = halfway
    x[256:261] = torch.tensor([float("inf"), -float("inf"), 3.4e38, 0.0, -0.0])
    x[261] = torch.tensor(NAN).bfloat16().float()
    y = torch.empty(4096, dtype=torch.bfloat16, device=device)
    round_all[(1,)](x.to(device), y)
    torch.testing.assert_close(y.cpu(), x.bfloat16(), rtol=0, atol=0, equal_nan=True)
