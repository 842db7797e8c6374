"""The hidden level against the oracle, and what it promises about products, memory and waiting."""

import pytest
import torch
from backends import with_two_threads_too
from hidden import HEADS, H, V, check_against_oracle, logits_of, make_hidden, oracle, run
from support import (
    AGGREGATIONS,
    NAN,
    POLICIES,
    assert_accurate,
    assert_close,
    logits_plain,
    pack,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import mapo_kernels as mk
import reference
from benchmarks.memory import allocations
from mapo_kernels.batch import HeadInputs
from mapo_kernels.head import chunk_rows_of

LEVELS = ("token", "sequence")


@pytest.mark.pairwise
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_every_combination_equals_the_oracle_in_float64(policy, level, head, aggregation):
    spec = mk.LossSpec(
        **policy,
        importance_level=level,
        aggregation=aggregation,
        entropy_coef=0.1,
        beta=0.1,
        rollout_cap=1.2,
    )
    batch = make_hidden(dtype=torch.float64)
    check_against_oracle(batch, spec, torch.device("cpu"), 1e-11, 0.7, **head)


@pytest.mark.pairwise
@pytest.mark.parametrize(
    ("aggregation", "bonus"), list(zip(AGGREGATIONS, (0.0, 0.1, 0.0, 0.1), strict=True))
)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_every_head_equals_the_oracle(head, level, aggregation, bonus, device):
    spec = mk.LossSpec(importance_level=level, aggregation=aggregation, entropy_coef=bonus)
    check_against_oracle(make_hidden(2, 3), spec, device, 5e-6, 1.3, **head)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bonus", [0.0, 0.05])
def test_accuracy_rule(bonus, dtype, device):
    batch = make_hidden(4, 5, dtype)
    # All of one sign: the loss is no difference of large terms, whose error would be compared.
    batch["advantages"] = batch["advantages"].abs()
    spec = mk.LossSpec(entropy_coef=bonus)
    given = {"old_logprobs": batch["old"]}
    loss, grads, _ = run(batch, spec, device, **given)
    exact_loss, exact_grads, _ = oracle(batch, spec, **given)
    leaves, x = logits_of(batch, dtype=dtype)
    batch["logits"] = x.detach()
    plain_loss, d_logits = logits_plain(batch, spec, **given)
    x.backward(d_logits)
    assert_accurate(loss, exact_loss, plain_loss)
    for grad, exact, leaf in zip(grads, exact_grads, leaves, strict=True):
        assert grad.dtype == dtype
        assert_accurate(grad, exact, leaf.grad)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_products_that_come_out_in_float32(softcap, level, device, monkeypatch):
    """As on CUDA: the weight stays narrow, logits do not, their gradient is rounded once."""
    if device.type != "cuda":
        mm, addmm = torch.mm, torch.addmm

        def mixed_mm(a, b, out_dtype=None):
            return mm(a.float(), b.float()) if out_dtype else mm(a, b)

        def mixed_addmm(x, a, b, out_dtype=None, out=None):
            assert out_dtype == torch.float32 and a.dtype == b.dtype == torch.bfloat16
            return addmm(x, a.float(), b.float(), out=out)

        monkeypatch.setattr(torch, "mm", mixed_mm)
        monkeypatch.setattr(torch, "addmm", mixed_addmm)
        monkeypatch.setattr("mapo_kernels.head.mixes_dtypes", lambda weight: True)
    batch = make_hidden(4, 5, torch.bfloat16)
    spec = mk.LossSpec(importance_level=level, objective="none")
    given = {"old_logprobs": batch["old"]}
    loss, grads, _ = run(batch, spec, device, chunk_rows=4, softcap=softcap, **given)
    exact_loss, exact_grads, _ = oracle(batch, spec, head={"softcap": softcap}, **given)
    assert_close(loss, exact_loss, 1e-6)
    for grad, exact in zip(grads, exact_grads, strict=True):
        assert grad.dtype == torch.bfloat16
        # One rounding of the logits' gradient, at random in each of the summed terms, and one more.
        error = (grad.cpu().double() - exact).abs().max()
        assert error <= 2**-7 * exact.abs().max()


def test_the_size_of_chunks():
    def size(n_live, vocab, dtype=torch.float32):
        head = HeadInputs(torch.empty(vocab, 1, dtype=dtype))
        return chunk_rows_of(head, n_live)

    # 64 MiB of float32 logits and their gradient: 262 rows of 32000, hence 256.
    assert size(100_000, 32_000) == 256
    assert size(256, 32_000) == 256 and size(257, 32_000) == 256
    assert size(300, 32_000) == 256 and size(10, 32_000) == 128 and size(0, 32_000) == 128
    assert size(1000, 1 << 20) == 128
    # Two chunks of 384 rather than one of 640 and one of 128.
    assert size(768, 12_000) == 384


@pytest.mark.parametrize("level", LEVELS)
@with_two_threads_too
def test_chunks_change_only_rounding_and_runs_are_bitwise_equal(level, device):
    batch = make_hidden(4, 4)
    spec = mk.LossSpec(importance_level=level)
    loss, grads, metrics = run(batch, spec, device, chunk_rows=16)
    for rows in (1, 3, 7, None):
        runs = [run(batch, spec, device, chunk_rows=rows) for _ in range(2)]
        assert torch.equal(runs[0][0], runs[1][0])
        assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))
        assert_close(runs[0][0], loss, 1e-6)
        for actual, expected in zip(runs[0][1], grads, strict=True):
            assert_close(actual, expected, 1e-6)
        for name, value in metrics.items():
            assert_close(runs[0][2][name], value, 1e-6)


def flops_of(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("level", LEVELS)
def test_products_are_those_of_the_live_rows(level, device):
    batch = make_hidden(6, 4)
    batch["advantages"][2] = 0
    spec = mk.LossSpec(importance_level=level)
    live = int((batch["mask"] & (batch["advantages"] != 0)[:, None]).sum())
    assert 0 < live < 24
    product = 2 * live * V * H
    again = level == "sequence"
    for wanted, products in (
        ((True, True, True), 3 + again),
        ((True, False, False), 2 + again),  # a frozen head
        ((False, True, False), 2 + again),
        ((False, False, False), 1),
    ):
        for rows in (None, 5):
            count = flops_of(
                lambda w=wanted, r=rows: run(batch, spec, device, wanted=w, chunk_rows=r)
            )
            assert count == products * product
    hidden, weight, ids, mask = (batch[k].to(device) for k in ("hidden", "weight", "ids", "mask"))
    count = flops_of(lambda: mk.token_logprobs_from_hidden(hidden, weight, ids, mask=mask))
    assert count == 2 * int(batch["mask"].sum()) * V * H


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dead_rows_spread_nothing_and_all_dead_gives_zero(dtype, level, device):
    batch = make_hidden(3, 4, dtype)
    batch["advantages"][1] = 0
    batch["hidden"][1] = NAN
    spec = mk.LossSpec(importance_level=level)
    loss, grads, _ = run(batch, spec, device)
    assert loss.isfinite() and all(x.isfinite().all() for x in grads)
    assert (grads[0][1] == 0).all() and (grads[0].cpu()[~batch["mask"]] == 0).all()
    batch["advantages"] = torch.zeros(3)
    loss, grads, metrics = run(batch, spec, device)
    assert loss == 0 and metrics["scored_tokens"] == 0
    assert metrics["active_tokens"] == batch["mask"].sum()
    for grad, name in zip(grads, ("hidden", "weight", "bias"), strict=True):
        assert grad.dtype == dtype and grad.shape == batch[name].shape and (grad == 0).all()
    batch = make_hidden(3, 4, dtype, mask="all")
    loss, grads, _ = run(batch, spec, device)
    assert loss == 0 and all((x == 0).all() for x in grads)


@pytest.mark.parametrize("level", LEVELS)
@with_two_threads_too
def test_a_plan_is_equal_and_its_parts_add_up(level, device):
    batch = make_hidden(6, 4)
    spec = mk.LossSpec(importance_level=level, aggregation="seq-mean-token-mean")
    rewards = torch.tensor([1.0, 0.0, 0.3, 1.0, 1.0, 1.0], device=device)
    mask = batch["mask"].to(device)
    plan = mk.make_plan(rewards=rewards, group_size=2, mask=mask, spec=spec)
    batch["advantages"] = plan.advantages.cpu()
    loss, grads, metrics = run(batch, spec, device)
    whole = run(batch, spec, device, plan=plan)
    assert torch.equal(whole[0], loss)
    assert all(torch.equal(a, b) for a, b in zip(whole[1], grads, strict=True))
    for name, value in metrics.items():
        assert_close(whole[2][name], value, 1e-6)
    d_weight, total = torch.zeros_like(grads[1]), 0.0
    for rows in (slice(0, 1), torch.tensor([3, 2]), slice(4, 6)):
        part = {k: v[rows] if k in ("hidden", "ids") else v for k, v in batch.items()}
        found = run(part, spec, device, plan=plan.micro_batch(rows))
        d_weight, total = d_weight + found[1][1], total + found[0]
        rest = {"hidden": found[1][0], "expected": grads[0][rows]}
        assert_close(rest["hidden"], rest["expected"], 1e-6)
    part = {k: v[1:2] if k in ("hidden", "ids") else v for k, v in batch.items()}
    found = run(part, spec, device, plan=plan.micro_batch(slice(1, 2)))
    assert_close(total + found[0], loss, 1e-6)
    assert_close(d_weight + found[1][1], grads[1], 1e-6)


class NoWaiting(TorchDispatchMode):
    """Fails on operations that the host has to wait for on a GPU.

    `lift_fresh` is what Python makes tensors of numbers by, be it for an index: copies to the GPU.
    """

    NAMES = ("nonzero", "_local_scalar_dense", "masked_select", "unique", "lift_fresh")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in self.NAMES, name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("packed", [False, True])
def test_with_a_plan_the_loss_waits_for_nothing(packed, level, device):
    if mk.resolve_backend(device.type) != "triton":
        pytest.skip("on a CPU there is nobody to wait for")
    batch = make_hidden(4, 3, mask="none" if packed else "random")
    spec = mk.LossSpec(importance_level=level, entropy_coef=0.1)
    layout = {"mask": batch["mask"].to(device)}
    if packed:
        batch, cu_seqlens, _ = pack(batch, [3, 1, 0, 2])
        layout = {"cu_seqlens": cu_seqlens.to(device)}
    advantages = batch["advantages"].to(device)
    plan = mk.make_plan(advantages=advantages, spec=spec, **layout)
    hidden, weight = (batch[k].to(device).requires_grad_() for k in ("hidden", "weight"))
    ids, old = batch["ids"].to(device), batch["old"].to(device)
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with NoWaiting():
            out = mk.mapo_loss_from_hidden(hidden, weight, ids, plan=plan, old_logprobs=old)
            (out.loss * 2).backward()
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_packed_equals_padded(aggregation, level, device):
    lengths = [2, 3, 0, 1]
    batch = make_hidden(4, 3, mask="none")
    packed, cu_seqlens, keep = pack(batch, lengths)
    packed["weight"], packed["bias"] = batch["weight"], batch["bias"]
    batch["mask"] = keep
    spec = mk.LossSpec(
        aggregation=aggregation, importance_level=level, max_tokens=9, entropy_coef=0.1
    )
    given = {"temperature": torch.tensor([0.5, 1.0, 2.0, 1.5])}
    loss, grads, metrics = run(batch, spec, device, old_logprobs=batch["old"], **given)
    given |= {"old_logprobs": packed["old"], "cu_seqlens": cu_seqlens}
    actual, packed_grads, packed_metrics = run(packed, spec, device, mask=False, **given)
    assert_close(actual, loss, 1e-6)
    assert_close(packed_grads[0], grads[0].cpu()[keep], 1e-6)
    assert_close(packed_grads[1], grads[1], 1e-6)
    for name, value in metrics.items():
        assert_close(packed_metrics[name], value, 1e-6)


def test_scores(device):
    batch = make_hidden(3, 4)
    temperature = torch.tensor([0.5, 1.0, 2.0])
    hidden, weight, bias, ids, mask = (
        batch[k].to(device) for k in ("hidden", "weight", "bias", "ids", "mask")
    )
    for head in HEADS:
        logp, entropy = mk.token_logprobs_from_hidden(
            hidden,
            weight,
            ids,
            bias=bias,
            mask=mask,
            temperature=temperature.to(device),
            return_entropy=True,
            chunk_rows=5,
            **head,
        )
        _, x = logits_of(batch, **head)
        exact, exact_entropy = reference.token_logprobs(x, batch["ids"], temperature, batch["mask"])
        assert_close(logp, exact, 2e-6)
        assert_close(entropy, exact_entropy, 2e-6)
        assert not logp.requires_grad
    flat = mk.token_logprobs_from_hidden(
        hidden.flatten(0, 1), weight, ids.flatten(), mask=mask.flatten()
    )
    padded = mk.token_logprobs_from_hidden(hidden, weight, ids, mask=mask)
    assert torch.equal(flat.view(3, 4), padded)
    # Scored with the same chunks, the ratio is exactly 1.
    _, _, metrics = run(
        dict(batch, bias=None, advantages=torch.ones(3)),
        mk.LossSpec(),
        device,
        old_logprobs=padded,
        wanted=(True, True, False),
    )
    assert metrics["ratio_mean"] == 1 and metrics["approx_kl"] == 0


def test_strided_hidden(device):
    batch = make_hidden(3, 4, bias=False)
    loss, grads, _ = run(batch, mk.LossSpec(), device, wanted=(True, True, False))
    room = torch.full((3, 6, H + 3), 7.0, device=device)
    room[:, 1:5, :H] = batch["hidden"].to(device)
    view = room[:, 1:5, :H].detach().requires_grad_()
    weight = batch["weight"].to(device).requires_grad_()
    given = {k: batch[k].to(device) for k in ("advantages", "mask")}
    out = mk.mapo_loss_from_hidden(view, weight, batch["ids"].to(device), **given)
    out.loss.backward()
    assert torch.equal(out.loss, loss) and torch.equal(view.grad, grads[0])


@pytest.mark.parametrize("level", LEVELS)
def test_tied_embeddings(level, device):
    """The same parameter embeds and projects."""
    batch = make_hidden(3, 4)
    ids = batch["ids"].where(batch["mask"], 0)
    spec = mk.LossSpec(importance_level=level)
    table = batch["weight"].to(device, copy=True).requires_grad_()
    hidden = torch.nn.functional.embedding(ids.to(device), table)
    given = {k: batch[k].to(device) for k in ("advantages", "mask")}
    mk.mapo_loss_from_hidden(hidden, table, ids.to(device), spec=spec, **given).loss.backward()
    exact = batch["weight"].double().requires_grad_()
    x = torch.nn.functional.embedding(ids, exact) @ exact.t()
    logp, _ = reference.token_logprobs(x, ids, 1.0, batch["mask"])
    settings = {name: getattr(spec, name) for name in spec.__dataclass_fields__}
    loss, _ = reference.mapo_loss(logp, batch["advantages"], batch["mask"], **settings)
    loss.backward()
    assert_close(table.grad, exact.grad, 1e-6)


def test_autocast_casts_as_linear_does(device):
    batch = make_hidden(3, 4)
    names = ("hidden", "weight", "bias")
    rounded = dict(batch, **{k: batch[k].bfloat16() for k in names})
    loss, grads, _ = run(rounded, mk.LossSpec(), device)
    with torch.autocast(device.type, torch.bfloat16):
        actual, cast_grads, _ = run(batch, mk.LossSpec(), device)
    assert torch.equal(actual, loss)
    for a, b in zip(cast_grads, grads, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b.float())


def test_upstream_and_backward_once(device):
    batch = make_hidden(3, 4)
    _, grads, _ = run(batch, mk.LossSpec(), device)
    leaves = [batch[k].to(device).requires_grad_() for k in ("hidden", "weight", "bias")]
    given = {k: batch[k].to(device) for k in ("advantages", "mask")}
    ids = batch["ids"].to(device)
    out = mk.mapo_loss_from_hidden(*leaves[:2], ids, bias=leaves[2], **given)
    scaled = torch.autograd.grad(out.loss * -3.0, leaves, retain_graph=True)
    for a, b in zip(scaled, grads, strict=True):
        assert_close(a, b * -3.0, 1e-6)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.loss, leaves)
    with torch.no_grad():
        quiet = mk.mapo_loss_from_hidden(*leaves[:2], ids, bias=leaves[2], **given)
    assert not quiet.loss.requires_grad and torch.allclose(quiet.loss, out.loss, atol=1e-6)


def test_memory_does_not_grow_with_tokens():
    """Beside hidden states and their gradient: one chunk and the weight's gradient."""
    mk.set_backend("eager")
    peaks = []
    try:
        for length in (40, 160):
            n_sequences, width, vocab, chunk = 4, 8, 3000, 20
            hidden = torch.randn(n_sequences, length, width, requires_grad=True)
            weight = torch.randn(vocab, width, requires_grad=True)
            ids = torch.randint(0, vocab, (n_sequences, length))
            with allocations() as memory:
                out = mk.mapo_loss_from_hidden(
                    hidden, weight, ids, advantages=torch.randn(n_sequences), chunk_rows=chunk
                )
                out.loss.backward()
            kept = hidden.numel() * 4 + weight.numel() * 4
            # The logits, and the copies of them that the eager backend works on.
            peaks.append(memory.peak - kept)
            assert peaks[-1] <= 3 * chunk * vocab * 4 + 60_000
        assert peaks[1] < peaks[0] + 60_000
    finally:
        mk.set_backend(None)


def test_from_rewards(device):
    batch = make_hidden(8, 2, mask="row")
    rewards = torch.tensor([1, 0, 0, 1, 1, 1, 0.1, NAN], device=device)
    advantages, stats = mk.group_advantages(rewards, group_size=4, return_stats=True)
    batch["advantages"] = advantages.cpu()
    loss, grads, _ = run(batch, mk.LossSpec(), device)
    leaves = [batch[k].to(device).requires_grad_() for k in ("hidden", "weight", "bias")]
    out = mk.mapo_loss_from_hidden(
        *leaves[:2],
        batch["ids"].to(device),
        bias=leaves[2],
        rewards=rewards,
        group_size=4,
        mask=batch["mask"].to(device),
    )
    out.loss.backward()
    assert torch.equal(out.loss, loss) and torch.equal(leaves[1].grad, grads[1])
    assert torch.equal(out.advantages, advantages)
    assert_close(out.metrics["success_ratio_mean"], stats.success_ratio.mean(), 1e-6)
    assert out.metrics["nonfinite_rewards"] == 1


def test_module_and_autograd_function(device):
    from mapo_kernels.batch import Batch, HeadInputs, RowInputs

    batch = make_hidden(3, 4)
    head = torch.nn.Linear(H, V).to(device)
    module = mk.MapoLinearLoss(head, mk.LossSpec(eps_high=0.28), softcap=5.0)
    assert [name for name, _ in module.named_parameters()] == ["lm_head.weight", "lm_head.bias"]
    given = {k: batch[k].to(device) for k in ("advantages", "mask")}
    hidden, ids = batch["hidden"].to(device).requires_grad_(), batch["ids"].to(device)
    out = module(hidden, ids, **given)
    out.loss.backward()
    expected = mk.mapo_loss_from_hidden(
        hidden, head.weight, ids, bias=head.bias, softcap=5.0, spec=module.spec, **given
    )
    assert torch.equal(out.loss, expected.loss) and head.weight.grad.isfinite().all()
    assert "softcap" in repr(module)
    loss, _, _ = mk.MapoLinearLossFunction.apply(
        hidden,
        head.weight,
        head.bias,
        HeadInputs(head.weight, softcap=5.0),
        RowInputs(ids),
        Batch(**given),
        module.spec,
        mk.AdvantageSpec(),
    )
    assert torch.equal(loss, expected.loss)
    with pytest.raises(TypeError, match="lm_head: expected a torch.nn.Linear"):
        mk.MapoLinearLoss(torch.nn.Embedding(3, 4))
