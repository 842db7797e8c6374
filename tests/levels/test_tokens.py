import pytest
import torch
from backends import with_two_threads_too
from support import (
    AGGREGATIONS,
    KLS,
    MASKS,
    POLICIES,
    assert_accurate,
    assert_close,
    assert_same_metrics,
    make_batch,
    oracle,
    pack,
    plain,
    run,
    tensors_of,
    tune,
)

import mapo_kernels as mk
from mapo_kernels.spec import OBJECTIVES


def check_against_oracle(batch, spec, device, tolerance, on_policy=False):
    given = tensors_of(batch, spec)
    if on_policy:
        del given["old_logprobs"]
    loss, grad, metrics = run(batch, spec, device, upstream=-2.5, **given)
    exact_loss, exact_grad, exact_metrics = oracle(batch, spec, upstream=-2.5, **given)
    assert_close(loss, exact_loss, tolerance)
    assert_close(grad, exact_grad, tolerance)
    assert (grad.cpu()[~batch["mask"]] == 0).all()
    for name, value in exact_metrics.items():
        assert_close(metrics[name], value, tolerance)
    assert set(metrics) == set(exact_metrics)


@pytest.mark.pairwise
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kl", KLS, ids=str)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_every_combination_equals_the_oracle_in_float64(policy, kl, level, aggregation, mask):
    spec = mk.LossSpec(**policy, **kl, importance_level=level, aggregation=aggregation)
    check_against_oracle(make_batch(mask=mask), spec, torch.device("cpu"), 1e-12)


@pytest.mark.pairwise
# Each aggregation meets one mask here; the float64 test above has the full product.
@pytest.mark.parametrize(("aggregation", "mask"), list(zip(AGGREGATIONS, MASKS, strict=True)))
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kl", KLS, ids=str)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_every_combination_equals_the_oracle(policy, kl, level, aggregation, mask, device):
    spec = mk.LossSpec(**policy, **kl, importance_level=level, aggregation=aggregation)
    batch = make_batch(mask=mask, dtype=torch.float32)
    check_against_oracle(batch, spec, device, 2e-6)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_on_policy(policy, aggregation, device):
    spec = mk.LossSpec(**policy, aggregation=aggregation, beta=0.1, kl_importance_correction=True)
    check_against_oracle(make_batch(dtype=torch.float32), spec, device, 2e-6, on_policy=True)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("per_token", [False, True])
def test_rollout_weights_and_per_token_advantages(level, per_token, device):
    spec = mk.LossSpec(rollout_cap=1.2, importance_level=level, aggregation="seq-mean-token-mean")
    batch = make_batch(dtype=torch.float32)
    if per_token:
        batch["advantages"] = torch.randn(batch["logp"].shape) * (torch.rand(5, 7) < 0.7)
        batch["weights"] = batch["weights"] * (torch.rand(5, 7) < 0.7)
    check_against_oracle(batch, spec, device, 2e-6)


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_accuracy_rule(policy, level, dtype, device):
    spec = mk.LossSpec(**policy, importance_level=level, beta=0.05, rollout_cap=2.0)
    batch = make_batch(n_sequences=6, length=130, dtype=dtype, spread=0.8)
    given = tensors_of(batch, spec)
    loss, grad, _ = run(batch, spec, device, **given)
    exact_loss, exact_grad, _ = oracle(batch, spec, **given)
    plain_loss, plain_grad = plain(batch, spec, **given)
    assert loss.dtype == torch.float32
    assert grad.dtype == dtype
    assert_accurate(loss, exact_loss, plain_loss)
    assert_accurate(grad, exact_grad, plain_grad)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_extreme_ratios_saturate_as_the_clamp_says(policy, device):
    batch = make_batch(mask="none", dtype=torch.float32)
    jumps = torch.tensor([0.0, 19.0, 21.0, 60.0, -19.0, -21.0, float("inf")])
    batch["old"] = batch["logp"] - jumps
    batch["weights"] = torch.ones_like(batch["old"])
    spec = mk.LossSpec(**policy)
    given = {"old_logprobs": batch["old"]}
    loss, grad, _ = run(batch, spec, device, **given)
    exact_loss, exact_grad, _ = oracle(batch, spec, **given)
    plain_loss, plain_grad = plain(batch, spec, **given)
    assert_accurate(loss, exact_loss, plain_loss)
    for i in range(len(jumps)):
        assert_accurate(grad[:, i], exact_grad[:, i], plain_grad[:, i])


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("correction", [False, True])
def test_gradcheck(objective, level, correction):
    batch = make_batch(n_sequences=3, length=4)
    # Away from the kinks: ratios between 1.02 and 1.15, inside the clip range.
    batch["old"] = batch["logp"] - 0.02 - 0.12 * torch.rand(3, 4, dtype=torch.float64)
    for aggregation in AGGREGATIONS:
        spec = mk.LossSpec(
            objective=objective,
            importance_level=level,
            beta=0.2,
            kl_importance_correction=correction,
            aggregation=aggregation,
        )

        def loss(logp, spec=spec):
            return mk.mapo_loss(
                logp,
                advantages=batch["advantages"],
                mask=batch["mask"],
                spec=spec,
                **tensors_of(batch, spec),
            ).loss

        logp = batch["logp"].nan_to_num(0.0).requires_grad_()
        if objective == "cispo":
            # Its ratio is a constant by definition, which finite differences cannot know.
            assert torch.autograd.grad(loss(logp), logp)[0].isfinite().all()
        else:
            assert torch.autograd.gradcheck(loss, (logp,))


@pytest.mark.pairwise
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_packed_equals_padded(aggregation, level, masked, device):
    lengths = [3, 7, 0, 5, 1]
    batch = make_batch(mask="random" if masked else "none", dtype=torch.float32)
    packed, cu_seqlens, keep = pack(batch, lengths)
    spec = mk.LossSpec(aggregation=aggregation, importance_level=level, beta=0.1, max_tokens=9)
    batch["mask"] = batch["mask"] & keep
    loss, grad, metrics = run(batch, spec, device, **tensors_of(batch, spec))
    given = tensors_of(packed, spec) | {"cu_seqlens": cu_seqlens}
    if not masked:
        given["mask"] = None
    packed_loss, packed_grad, packed_metrics = run_packed(packed, spec, device, given)
    assert_close(packed_loss, loss, 1e-6)
    assert_close(packed_grad, grad[keep], 1e-6)
    for name, value in metrics.items():
        assert_close(packed_metrics[name], value, 1e-6)


def run_packed(packed, spec, device, given):
    logp = packed["logp"].to(device, copy=True).requires_grad_()
    given = {"mask": packed["mask"]} | given
    given = {k: None if v is None else v.to(device) for k, v in given.items()}
    out = mk.mapo_loss(logp, advantages=packed["advantages"].to(device), spec=spec, **given)
    out.loss.backward()
    return out.loss, logp.grad, out.metrics


def test_packed_tokens_outside_every_sequence_do_not_count(device):
    logp = torch.randn(12)
    cu_seqlens = torch.tensor([2, 5, 9])
    spec = mk.LossSpec()
    packed = {"logp": logp, "mask": None, "advantages": torch.tensor([1.0, -2.0])}
    poisoned = logp.clone()
    poisoned[[0, 1, 9, 10, 11]] = float("nan")
    packed["logp"] = poisoned
    loss, grad, metrics = run_packed(packed, spec, device, {"mask": None, "cu_seqlens": cu_seqlens})
    assert metrics["active_tokens"] == 7
    assert_close(loss, torch.tensor(-(3 * 1.0 - 4 * 2.0) / 7), 1e-6)
    assert (grad[[0, 1, 9, 10, 11]] == 0).all()


@pytest.mark.parametrize("length", [1, 2, 255, 256, 257, 1025, 3000])
def test_lengths_around_the_block_size(length, device):
    batch = make_batch(n_sequences=2, length=length, dtype=torch.float32, mask="random")
    batch["advantages"] = torch.tensor([0.7, -1.3])
    # The largest ratio comes first, to be kept over all blocks that follow.
    batch["mask"][:, 0] = True
    for name, value in {"logp": -1.0, "old": -4.0, "ref": -1.0, "weights": 1.0}.items():
        batch[name][:, 0] = value
    spec = mk.LossSpec(beta=0.1)
    given = tensors_of(batch, spec)
    loss, grad, metrics = run(batch, spec, device, **given)
    assert_close(metrics["ratio_max"], torch.tensor(3.0).exp(), 1e-6)
    plain_loss, plain_grad = plain(batch, spec, **given)
    assert_close(loss, plain_loss, 2e-6)
    assert_close(grad, plain_grad, 2e-6)
    assert metrics["active_tokens"] == batch["mask"].sum()


def test_long_sequences_are_shared_by_several_programs(device):
    batch = make_batch(n_sequences=2, length=9000, dtype=torch.float32, mask="random")
    batch["advantages"] = torch.tensor([0.7, -1.3])
    for aggregation in AGGREGATIONS:
        spec = mk.LossSpec(aggregation=aggregation)
        loss, grad, _ = run(batch, spec, device, **tensors_of(batch, spec))
        plain_loss, plain_grad = plain(batch, spec, **tensors_of(batch, spec))
        assert_close(loss, plain_loss, 2e-6)
        assert_close(grad, plain_grad, 2e-6)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_one_program_takes_every_block_of_every_sequence(level, device, monkeypatch):
    tune(monkeypatch, "LOGPROBS", multiprocessors=1, registers=255, unaligned_registers=255)
    batch = make_batch(n_sequences=3, length=1100, dtype=torch.float32, mask="random")
    batch["advantages"] = torch.tensor([0.7, -1.3, 0.4])
    # The largest ratio comes first, to be kept over all blocks that follow.
    batch["mask"][0, 0] = True
    for name, value in {"logp": -1.0, "old": -4.0, "weights": 1.0}.items():
        batch[name][0, 0] = value
    spec = mk.LossSpec(importance_level=level, aggregation="seq-mean-token-mean")
    given = tensors_of(batch, spec)
    found = run(batch, spec, device, **given)
    mk.set_backend("eager")
    loss, grad, metrics = run(batch, spec, torch.device("cpu"), **given)
    assert_close(found[0], loss, 2e-6)
    assert_close(found[1], grad, 2e-6)
    for name, value in metrics.items():
        assert_close(found[2][name], value, 2e-6)


def test_strided_inputs(device):
    batch = make_batch(n_sequences=4, length=10, dtype=torch.float32)
    wide = {k: torch.full((4, 33), 7.0).to(v.dtype) for k, v in batch.items() if v.dim() == 2}
    for name, x in wide.items():
        x[:, 5:15] = batch[name]
        wide[name] = x[:, 5:15]
    transposed = {k: v.t().contiguous().t() for k, v in batch.items() if v.dim() == 2}
    spec = mk.LossSpec(beta=0.1)
    loss, grad, _ = run(batch, spec, device, **tensors_of(batch, spec))
    for views in (wide, transposed):
        view = batch | views
        assert not view["logp"].is_contiguous()
        logp = view["logp"].detach().to(device).requires_grad_()
        given = {k: v.to(device) for k, v in tensors_of(view, spec).items()}
        out = mk.mapo_loss(
            logp,
            advantages=view["advantages"].to(device),
            mask=view["mask"].to(device),
            spec=spec,
            **given,
        )
        out.loss.backward()
        assert torch.equal(out.loss, loss)
        assert torch.equal(logp.grad, grad)


def test_strided_boundaries(device):
    wide = torch.tensor([0, 9, 3, 9, 7, 9, 12, 9], device=device)
    logp = -torch.rand(12, device=device)
    advantages = torch.tensor([1.0, -2.0, 0.5], device=device)
    strided, dense = (
        mk.mapo_loss(
            logp,
            advantages=advantages,
            cu_seqlens=bounds,
            spec=mk.LossSpec(objective="cispo", aggregation="seq-mean-token-mean"),
        ).loss
        for bounds in (wide[::2], wide[::2].clone())
    )
    assert torch.equal(strided, dense)


def test_expanded_mask_and_integer_masks(device):
    batch = make_batch(mask="none", dtype=torch.float32)
    row = torch.tensor([1, 1, 0, 1, 0, 1, 1])
    expected = None
    for mask in (row.bool(), row, row.to(torch.int32), row.float(), row.to(torch.uint8)):
        batch["mask"] = mask.expand(5, 7)
        loss, grad, _ = run(batch, mk.LossSpec(), device, old_logprobs=batch["old"])
        expected = (loss, grad) if expected is None else expected
        assert torch.equal(loss, expected[0])
        assert torch.equal(grad, expected[1])


@with_two_threads_too
def test_micro_batches_with_a_normalizer_add_up(device):
    for aggregation in AGGREGATIONS:
        batch = make_batch(n_sequences=6, dtype=torch.float32, mask="row")
        spec = mk.LossSpec(aggregation=aggregation)
        whole, grad, _ = run(batch, spec, device, old_logprobs=batch["old"])
        count = batch["mask"].sum() if aggregation == "token-mean" else torch.tensor(6)
        for normalizer in (count, float(count), count.float()):
            parts = []
            for rows in (slice(0, 2), slice(2, 6)):
                part = {k: v[rows] for k, v in batch.items()}
                parts.append(
                    run(part, spec, device, old_logprobs=part["old"], normalizer=normalizer)
                )
            assert_close(parts[0][0] + parts[1][0], whole, 1e-6)
            assert_close(torch.cat([parts[0][1], parts[1][1]]), grad, 1e-6)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_all_masked_and_empty_batches_give_zero(level, device):
    spec = mk.LossSpec(importance_level=level)
    batch = make_batch(mask="all", dtype=torch.float32)
    loss, grad, metrics = run(batch, spec, device, **tensors_of(batch, spec))
    assert loss == 0 and (grad == 0).all() and metrics["active_tokens"] == 0
    loss, grad, _ = run(batch, spec, device, normalizer=torch.tensor(0.0))
    assert loss == 0 and (grad == 0).all()
    empty = {
        "logp": torch.zeros(3, 0),
        "mask": torch.zeros(3, 0, dtype=torch.bool),
        "advantages": torch.ones(3),
    }
    loss, grad, metrics = run(empty, spec, device)
    assert loss == 0 and grad.shape == (3, 0) and metrics["ratio_max"].isnan()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_tokens_without_signal_are_not_read(level, device):
    batch = make_batch(mask="none", dtype=torch.float32)
    batch["logp"][-1] = float("nan")  # its advantage is 0
    for aggregation in AGGREGATIONS:
        spec = mk.LossSpec(importance_level=level, aggregation=aggregation)
        loss, grad, metrics = run(batch, spec, device, old_logprobs=batch["old"])
        assert loss.isfinite() and grad.isfinite().all() and (grad[-1] == 0).all()
        assert metrics["active_tokens"] == 35 and metrics["scored_tokens"] == 28
    spec = mk.LossSpec(importance_level=level, score_all=True)
    _, _, scored = run(batch, spec, device, old_logprobs=batch["old"])
    assert scored["scored_tokens"] == 35 and scored["ratio_mean"].isnan()


def test_a_nan_at_a_live_token_is_not_hidden(device):
    for name in ("logp", "old"):
        for policy in POLICIES:
            batch = make_batch(mask="none", dtype=torch.float32)
            batch[name][0, 0] = float("nan")
            loss, _, _ = run(batch, mk.LossSpec(**policy), device, old_logprobs=batch["old"])
            assert loss.isnan()


@with_two_threads_too
def test_on_policy_ratio_is_exactly_one(device):
    batch = make_batch(mask="none", dtype=torch.float32)
    batch["advantages"] = torch.ones(5)
    for old in (None, batch["logp"]):
        loss, grad, metrics = run(batch, mk.LossSpec(), device, old_logprobs=old)
        assert loss == -1
        assert metrics["ratio_mean"] == 1 and metrics["ratio_max"] == 1
        assert metrics["approx_kl"] == 0
        assert_close(grad, torch.full((5, 7), -1 / 35), 1e-7)


@with_two_threads_too
def test_two_runs_are_bitwise_equal(device):
    batch = make_batch(n_sequences=3, length=5000, dtype=torch.float32)
    for level in ("token", "sequence"):
        spec = mk.LossSpec(beta=0.1, importance_level=level)
        runs = [run(batch, spec, device, **tensors_of(batch, spec)) for _ in range(3)]
        for loss, grad, metrics in runs[1:]:
            assert torch.equal(loss, runs[0][0]) and torch.equal(grad, runs[0][1])
            assert all(torch.equal(metrics[k], runs[0][2][k]) for k in metrics)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mask", MASKS)
def test_every_output_is_written(mask, level, device):
    """With uninitialised memory full of NaN, as torch leaves it in its deterministic mode."""
    spec = mk.LossSpec(importance_level=level, aggregation="seq-mean-token-mean")
    batch = make_batch(mask=mask, dtype=torch.float32)
    packed, cu_seqlens, _ = pack(batch, [3, 7, 0, 5, 1])
    cu_seqlens = cu_seqlens.clamp(1, 15)  # a token before all sequences, and one behind
    expected = [
        run(batch, spec, device),
        run_packed(packed, spec, device, {"cu_seqlens": cu_seqlens}),
    ]
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        actual = [
            run(batch, spec, device),
            run_packed(packed, spec, device, {"cu_seqlens": cu_seqlens}),
        ]
        rewards = torch.rand(12, device=device)
        ids = torch.arange(12, device=device) % 5
        for grouping in ({"group_size": 4}, {"group_ids": ids}):
            advantages, stats = mk.group_advantages(rewards, return_stats=True, **grouping)
            assert advantages.isfinite().all() and all(x.isfinite().all() for x in stats)
    finally:
        torch.use_deterministic_algorithms(False)
    for (loss, grad, metrics), (loss0, grad0, metrics0) in zip(actual, expected, strict=True):
        assert torch.equal(loss, loss0) and torch.equal(grad, grad0)
        assert_same_metrics(metrics, metrics0)


def test_backward_twice_and_without_grad(device, monkeypatch):
    batch = make_batch(dtype=torch.float32)
    logp = batch["logp"].to(device).requires_grad_()
    tensors = {k: batch[k].to(device) for k in ("advantages", "mask")}
    out = mk.mapo_loss(logp, **tensors)
    first = torch.autograd.grad(out.loss, logp, retain_graph=True)[0]
    second = torch.autograd.grad(out.loss, logp)[0]
    assert torch.equal(first, second)
    asked = []
    original = mk.operators.token_loss
    monkeypatch.setattr(mk.operators, "token_loss", lambda *a: asked.append(a[-1]) or original(*a))
    with torch.no_grad():
        quiet = mk.mapo_loss(logp, **tensors)
    mk.mapo_loss(logp.detach(), **tensors)
    mk.mapo_loss(logp, **tensors)
    assert asked == [False, False, True]
    assert not quiet.loss.requires_grad and torch.equal(quiet.loss, out.loss)
    assert not any(value.requires_grad for value in out.metrics.values())
    assert torch.equal(out.advantages, tensors["advantages"])


@pytest.mark.parametrize("grouping", ["contiguous", "ids"])
def test_from_rewards_equals_from_advantages(grouping, device):
    batch = make_batch(n_sequences=12, length=9, dtype=torch.float32)
    rewards = torch.tensor([1, 0, 0, 0, 1, 1, 1, 1, 0.1, float("nan"), 1, 0.0])
    groups = {"group_size": 4}
    order = torch.arange(12)
    if grouping == "ids":
        order = torch.randperm(12)
        groups = {"group_ids": (torch.arange(12) // 4 + 5)[order].to(device)}
    advantages, stats = mk.group_advantages(
        rewards.to(device), group_size=4, certainty="linear", return_stats=True
    )
    batch["advantages"] = advantages.cpu()[order]
    old = batch["old"]
    loss, grad, _ = run(batch, mk.LossSpec(), device, old_logprobs=old)
    logp = batch["logp"].to(device).requires_grad_()
    out = mk.mapo_loss(
        logp,
        rewards=rewards[order].to(device),
        mask=batch["mask"].to(device),
        old_logprobs=old.to(device),
        advantage_spec=mk.AdvantageSpec(certainty="linear"),
        **groups,
    )
    out.loss.backward()
    assert_close(out.advantages, advantages.cpu()[order], 1e-6)
    assert_close(out.loss, loss, 1e-6)
    assert_close(logp.grad, grad, 1e-6)
    assert_close(out.metrics["success_ratio_mean"], stats.success_ratio.mean(), 1e-6)
    assert_close(out.metrics["lambda_mean"], stats.certainty.mean(), 1e-6)
    assert out.metrics["zero_advantage_groups"] == 1
    assert out.metrics["nonfinite_rewards"] == 1


@pytest.mark.parametrize("n", [60, pytest.param(4100, marks=pytest.mark.slow)])
def test_large_batches_with_ids_take_the_sorted_path(n, device, monkeypatch):
    tune(monkeypatch, "ADVANTAGES", match_limit=min(n - 1, 4096))
    rewards = (torch.rand(n) < 0.4).float()
    ids = torch.randint(0, n // 4, (n,))
    logp = -torch.rand(n, 2)
    out = mk.mapo_loss(logp.to(device), rewards=rewards.to(device), group_ids=ids.to(device))
    advantages, stats = mk.group_advantages(rewards, group_ids=ids, return_stats=True)
    assert_close(out.advantages, advantages, 1e-6)
    assert_close(out.loss, -advantages.mean(), 1e-6)
    assert_close(out.metrics["success_ratio_mean"], stats.success_ratio.mean(), 1e-6)
    assert out.metrics["zero_advantage_groups"] > 0


def test_autograd_function_and_module(device):
    from mapo_kernels.batch import Batch

    batch = make_batch(mask="none", dtype=torch.float32)
    advantages = batch["advantages"].to(device)
    logp = batch["logp"].to(device).requires_grad_()
    spec = mk.LossSpec(eps_high=0.28)
    expected = mk.mapo_loss(logp, advantages=advantages, spec=spec)
    loss, _, _ = mk.MapoLossFunction.apply(
        logp, Batch(advantages=advantages), spec, mk.AdvantageSpec()
    )
    assert torch.equal(loss, expected.loss)
    module = mk.MapoLoss(spec)
    assert torch.equal(module(logp, advantages=advantages).loss, expected.loss)
    assert "eps_high=0.28" in repr(module)
