"""Gradients of log-probs and entropies: against the oracle and the losses, and what they cost."""

import pytest
import torch
from hidden import HEADS, H, V, logits_of, make_hidden
from hidden import run as run_hidden
from support import NAN, assert_accurate, assert_close, keep, logits_run, make_logits
from test_linear import LEVELS, NoWaiting, flops_of

import mapo_kernels as mk
import reference
from benchmarks.memory import allocations
from mapo_kernels import config

SIZES = (1, 2, 5, 0, 30)


def upstreams(shape, live, dtype=torch.float32):
    """Gradients by log-probs and entropies; NaN where nothing counts."""
    return [torch.randn(shape, dtype=dtype).where(live, NAN) for _ in range(2)]


def leaves_on(batch, device, names=("hidden", "weight", "bias")):
    return [
        None if batch[k] is None else batch[k].detach().to(device, copy=True).requires_grad_()
        for k in names
    ]


def scored(leaves, batch, device, **given):
    """Log-probs and entropies of a batch of either level."""
    given = {"mask": batch["mask"].to(device), "return_entropy": True, **given}
    ids = batch["ids"].to(device)
    if len(leaves) == 1:
        return mk.token_logprobs(leaves[0], ids, **given)
    return mk.token_logprobs_from_hidden(*leaves[:2], ids, bias=leaves[2], **given)


def gradients(found, leaves, upstream, **options):
    upstream = [x.to(found[0]) for x in upstream]
    return torch.autograd.grad(found, leaves, upstream, **options)


def exact_gradients(batch, head, temperature, upstream, lists=None):
    """Those of the oracle, by the leaves or by the logits that there are."""
    if "hidden" in batch:
        leaves, x = logits_of(batch, **head)
    else:
        leaves = [batch["logits"].double().requires_grad_()]
        x = leaves[0]
    mask = batch["mask"]
    found = reference.token_logprobs(x, batch["ids"], temperature, mask, lists)
    return torch.autograd.grad(found, leaves, [u.double().where(mask, 0.0) for u in upstream])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_gradcheck(head, masked):
    batch = make_hidden(2, 2, torch.float64, mask="none")
    kept = None
    if masked:
        kept = mk.SamplingMask.from_lists(keep(batch["ids"], V, SIZES))
    leaves = leaves_on(batch, "cpu")
    given = {"temperature": 0.7, "sampling_mask": kept, "return_entropy": True}

    def from_hidden(hidden, weight, bias):
        return mk.token_logprobs_from_hidden(
            hidden, weight, batch["ids"], bias=bias, chunk_rows=3, **given, **head
        )

    def from_logits(logits):
        return mk.token_logprobs(logits, batch["ids"], **given)

    with config.override({"KEPT.cpu_share": 4}):
        assert torch.autograd.gradcheck(from_hidden, leaves, fast_mode=True)
    _, x = logits_of(batch, **head)
    assert torch.autograd.gradcheck(from_logits, (x.detach().requires_grad_(),))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", ["logits", "hidden"])
def test_they_equal_the_oracles(level, dtype, masked, device):
    """Padded with a temperature per sequence, packed with one per token; few and many columns."""
    batch = make_hidden(3, 4, dtype) if level == "hidden" else make_logits(3, 4, V, dtype)
    names = ("hidden", "weight", "bias") if level == "hidden" else ("logits",)
    live, temperature = batch["mask"], torch.tensor([0.6, 1.0, 1.8])
    upstream = upstreams(live.shape, live)
    given, lists, head = {}, None, {}
    if level == "hidden":
        head = {"softcap": 4.0, "logit_scale": 0.6} if masked else {"logit_scale": 0.6}
        given = {**head, "chunk_rows": 5}
    if masked:
        lists = keep(batch["ids"], V, SIZES)
        given["sampling_mask"] = mk.SamplingMask.from_lists(lists, device)
    exact = exact_gradients(batch, head, temperature, upstream, lists)
    leaves = leaves_on(batch, device, names)
    with config.override({"KEPT.cpu_share": 4, "KEPT.gpu_share": 4}):
        found = scored(leaves, batch, device, temperature=temperature.to(device), **given)
        padded = gradients(found, leaves, upstream)
        flat = {**batch, **{k: batch[k].flatten(0, 1) for k in (names[0], "ids", "mask")}}
        leaves = leaves_on(flat, device, names)
        per_token = temperature.repeat_interleave(4).to(device)
        found = scored(leaves, flat, device, temperature=per_token, **given)
        packed = gradients(found, leaves, [u.flatten() for u in upstream])
    for a, b, e in zip(padded, packed, exact, strict=True):
        assert a.dtype == dtype and torch.equal(a, b.view_as(a))
        rounding = {torch.float32: 5e-6, torch.bfloat16: 0.02}[dtype]
        assert_close(a, e, rounding)
    assert (padded[0].cpu()[~live] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accuracy_rule(dtype, device):
    batch = make_logits(4, 5, V, dtype)
    upstream = upstreams(batch["mask"].shape, batch["mask"])
    leaves = leaves_on(batch, device, ("logits",))
    (grad,) = gradients(scored(leaves, batch, device), leaves, upstream)
    (exact,) = exact_gradients(batch, {}, 1.0, upstream)
    x = batch["logits"].masked_fill(~batch["mask"][..., None], 0.0).float().requires_grad_()
    logs = x.log_softmax(-1)
    logp = logs.gather(-1, batch["ids"].clamp(0, V - 1)[..., None].long()).squeeze(-1)
    entropy = -(logs.exp() * logs).sum(-1)
    known = [u.where(batch["mask"], 0.0) for u in upstream]
    (plain,) = torch.autograd.grad((logp, entropy), x, known)
    assert_accurate(grad, exact, plain)


@pytest.mark.parametrize("masked", [False, True])
def test_the_same_numbers_with_and_without_gradients(masked, device):
    for batch, names in (
        (make_logits(3, 4, V, torch.float32), ("logits",)),
        (make_hidden(3, 4), ("hidden", "weight", "bias")),
    ):
        leaves, given = leaves_on(batch, device, names), {}
        if masked:
            lists = keep(batch["ids"], V, SIZES)
            given["sampling_mask"] = mk.SamplingMask.from_lists(lists, device)
        found = scored(leaves, batch, device, **given)
        alone = scored(leaves, batch, device, **given, return_entropy=False)
        assert found[0].grad_fn and found[1].grad_fn and torch.equal(alone, found[0])
        with torch.no_grad():
            quiet = scored(leaves, batch, device, **given)
        assert quiet[0].grad_fn is quiet[1].grad_fn is None
        assert all(torch.equal(a, b) for a, b in zip(found, quiet, strict=True))
        # And those inside the loss: the ratio is exactly 1.
        batch["advantages"] = torch.ones(3)
        run = run_hidden if "hidden" in batch else logits_run
        metrics = run(batch, mk.LossSpec(), device, old_logprobs=found[0].detach(), **given)[2]
        assert metrics["ratio_max"] == 1 and metrics["approx_kl"] == 0


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("level", LEVELS)
def test_the_chain_with_the_loss_equals_the_fused_one(level, planned, device):
    batch = make_hidden(4, 3)
    batch["advantages"][2] = 0
    spec = mk.LossSpec(importance_level=level, beta=0.1 * (not planned))
    mask, advantages = batch["mask"].to(device), batch["advantages"].to(device)
    given = {"old_logprobs": batch["old"].to(device)}
    if spec.beta:
        given["ref_logprobs"] = batch["ref"].to(device)
    of_rows, where = {}, {"mask": mask, "advantages": advantages}
    loss, grads, metrics = run_hidden(batch, spec, device, **given)
    if planned:
        where = {"plan": mk.make_plan(**where, spec=spec)}
        of_rows = {"mask": None, **where}
    leaves = leaves_on(batch, device)
    logp = scored(leaves, batch, device, return_entropy=False, **of_rows)
    out = mk.mapo_loss(logp, **given, **where, spec=spec)
    (out.loss * 2).backward()
    assert_close(out.loss, loss, 1e-6)
    for name, value in out.metrics.items():
        assert_close(value, metrics[name], 1e-6)
    for leaf, grad in zip(leaves, grads, strict=True):
        assert_close(leaf.grad, grad * 2, 2e-6)


def test_a_plan_says_which_rows_count(device):
    packed = make_hidden(1, 9, mask="none")
    flat = {k: packed[k][0] for k in ("hidden", "ids")}
    lists = keep(flat["ids"], V, SIZES)
    kept = mk.SamplingMask.from_lists(lists, device)
    bounds = torch.tensor([0, 3, 5, 8], device=device)
    advantages = torch.tensor([1.0, 0.0, -1.0], device=device)
    plan = mk.make_plan(advantages=advantages, cu_seqlens=bounds, sampling_mask=kept)
    live = torch.tensor([1, 1, 1, 0, 0, 1, 1, 1, 0], device=device)
    hidden, weight = flat["hidden"].to(device), packed["weight"].to(device)
    ids = flat["ids"].to(device)
    for call, given in (
        (mk.token_logprobs_from_hidden, (hidden, weight, ids)),
        (mk.token_logprobs, (hidden @ weight.t(), ids)),
    ):
        expected = call(*given, mask=live, sampling_mask=kept)
        assert torch.equal(call(*given, plan=plan), expected)
        with pytest.raises(ValueError, match="mask: expected None with a plan"):
            call(*given, plan=plan, mask=live)
        with pytest.raises(ValueError, match="sampling_mask: expected None with a plan"):
            call(*given, plan=plan, sampling_mask=kept)
        with pytest.raises(TypeError, match="plan: expected a Plan"):
            call(*given, plan=live)
        with pytest.raises(ValueError, match=r"plan: expected one of \[9\] tokens"):
            call(*given, plan=mk.make_plan(advantages=advantages, mask=live[None, :5].expand(3, 5)))


@pytest.mark.parametrize("planned", [False, True])
def test_products_are_those_of_the_rows_that_count(planned, device):
    batch = make_hidden(6, 4, bias=False)
    if planned:
        batch["advantages"][2] = 0
    mask = batch["mask"].to(device)
    given = {"mask": mask}
    n = int(batch["mask"].sum())
    if planned:
        plan = mk.make_plan(mask=mask, advantages=batch["advantages"].to(device))
        given, n = {"mask": None, "plan": plan}, sum(plan.live_counts)
        assert n < int(batch["mask"].sum())
    for wanted, products in (((True, True), 4), ((True, False), 3), ((False, True), 3)):
        leaves = [*leaves_on(batch, device, ("hidden", "weight")), None]
        for leaf, want in zip(leaves[:2], wanted, strict=True):
            leaf.requires_grad_(want)

        def step(leaves=leaves):
            logp, entropy = scored(leaves, batch, device, chunk_rows=5, **given)
            (logp.sum() + entropy.sum()).backward()

        assert flops_of(step) == products * 2 * n * V * H
        with torch.no_grad():
            assert flops_of(lambda x=leaves: scored(x, batch, device, **given)) == 2 * n * V * H


def test_with_a_plan_nothing_waits(device):
    if mk.resolve_backend(device.type) != "triton":
        pytest.skip("on a CPU there is nobody to wait for")
    batch = make_hidden(4, 3)
    mask = batch["mask"].to(device)
    plan = mk.make_plan(advantages=batch["advantages"].to(device), mask=mask)
    leaves = leaves_on(batch, device)
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with NoWaiting():
            logp, entropy = scored(leaves, batch, device, mask=None, plan=plan)
            (logp.sum() + entropy.sum()).backward()
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert leaves[1].grad.isfinite().all()


def test_memory_does_not_grow_with_tokens():
    """Beside hidden states and their gradient: one chunk, the weight's gradient, some rows."""
    mk.set_backend("eager")
    width, vocab, chunk = 8, 3000, 20
    for n in (160, 640):
        hidden = torch.randn(n, width, requires_grad=True)
        weight = torch.randn(vocab, width, requires_grad=True)
        with allocations() as forward:
            logp, entropy = mk.token_logprobs_from_hidden(
                hidden, weight, torch.randint(0, vocab, (n,)), chunk_rows=chunk, return_entropy=True
            )
        # Between forward and backward there are some numbers for each row.
        assert forward.now <= n * 100
        with allocations() as backward:
            (logp.sum() + entropy.sum()).backward()
        known = (hidden.numel() + weight.numel()) * 4
        for peak, kept in ((forward.peak, 0), (forward.now + backward.peak, known)):
            assert peak - kept <= 4 * chunk * vocab * 4 + n * 100


def test_backward_may_run_again_but_not_be_differentiated(device):
    for batch, names in (
        (make_logits(2, 3, V, torch.float32), ("logits",)),
        (make_hidden(2, 3), ("hidden", "weight", "bias")),
    ):
        leaves, live = leaves_on(batch, device, names), batch["mask"]
        upstream = upstreams(live.shape, live)
        found = scored(leaves, batch, device)
        first = gradients(found, leaves, upstream, retain_graph=True)
        # What the caller does with the results does not matter, as with `log_softmax(...).gather`.
        logp, entropy = (x * 1 for x in found)
        with torch.no_grad():
            found[0].fill_(7.0), found[1].fill_(7.0)
        second = gradients(found, leaves, upstream, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        (grad,) = torch.autograd.grad(entropy[live.to(device)].sum(), leaves[:1], retain_graph=True)
        assert grad.isfinite().all() and grad.any()
        grads = gradients(found, leaves, upstream, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
            grads[0].nan_to_num().sum().backward()
        with torch.no_grad():
            leaves[0].add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients(found, leaves, upstream)


def test_batch_invariance(device):
    batch = make_hidden(4, 4, mask="none")
    upstream = upstreams((4, 4), batch["mask"])
    found = []
    for rows in (slice(0, 4), slice(1, 3)):
        some = {**batch, **{k: batch[k][rows] for k in ("hidden", "ids", "mask")}}
        leaves = leaves_on(some, device)
        scores = scored(leaves, some, device, batch_invariant=True, chunk_rows=8)
        found.append((*scores, gradients(scores, leaves, [u[rows] for u in upstream])[0]))
    for whole, part in zip(*found, strict=True):
        assert torch.equal(whole[1:3], part)


def test_autocast_and_checkpointing(device):
    batch = make_hidden(3, 4)
    upstream = upstreams((3, 4), batch["mask"])
    narrow = {**batch, **{k: batch[k].bfloat16() for k in ("hidden", "weight", "bias")}}
    leaves = leaves_on(narrow, device)
    expected = gradients(scored(leaves, narrow, device), leaves, upstream)
    leaves = leaves_on(batch, device)
    with torch.autocast(device.type, torch.bfloat16):
        found = gradients(scored(leaves, batch, device), leaves, upstream)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b.float())
    expected = gradients(scored(leaves, batch, device), leaves, upstream)
    again = torch.utils.checkpoint.checkpoint(
        lambda *x: scored(x, batch, device), *leaves, use_reentrant=False
    )
    for a, b in zip(gradients(again, leaves, upstream), expected, strict=True):
        assert torch.equal(a, b)
