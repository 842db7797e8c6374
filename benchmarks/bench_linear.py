"""The loss from hidden states, against what a trainer would otherwise run.

    pytest benchmarks --benchmark-only

The bare products are the three that the loss cannot do without, over all tokens; their time is the
roof of the dense case. Every provider's gradients are compared with ours before it is timed, and
its peak memory beside its inputs is taken in a run of its own (`extra_bytes`).
"""

import pytest
import torch

import mapo_kernels as mk
from benchmarks import peers
from benchmarks.bench_logprobs import DEVICE, SPEC, timed
from benchmarks.memory import MemoryOfTensors

ON_GPU = DEVICE.type == "cuda"
# B, T, H, V and dtype: a laptop's, and on a GPU the heads of production models.
SHAPES = {"2048 x 256 x 32000 float32": (8, 256, 256, 32000, torch.float32)}
LIVE = (1.0, 0.5)
if ON_GPU:
    SHAPES = {
        "Qwen3-8B, 8192 tokens": (8, 1024, 4096, 151936, torch.bfloat16),
        "Qwen3-0.6B, 8192 tokens": (8, 1024, 1024, 151936, torch.bfloat16),
        "Qwen2.5-7B, 8192 tokens": (8, 1024, 3584, 152064, torch.bfloat16),
        "Llama-3-8B, 8192 tokens": (8, 1024, 4096, 128256, torch.bfloat16),
    }
    LIVE = (1.0, 0.5, 0.25, 0.0)


def make_batch(shape, live):
    """Hidden states, weight, ids, old log-probs, advantages of which a share is 0, no padding."""
    n_sequences, length, width, vocab, dtype = shape
    hidden = torch.randn(n_sequences, length, width, device=DEVICE).to(dtype)
    weight = (torch.randn(vocab, width, device=DEVICE) * width**-0.5).to(dtype)
    ids = torch.randint(0, vocab, (n_sequences, length), device=DEVICE)
    old = mk.token_logprobs_from_hidden(hidden, weight, ids)
    old = old + torch.randn_like(old) * 0.1
    advantages = torch.randn(n_sequences, device=DEVICE)
    advantages[int(live * n_sequences) :] = 0
    mask = torch.ones(n_sequences, length, dtype=torch.bool, device=DEVICE)
    plan = mk.make_plan(advantages=advantages, mask=mask, spec=SPEC)
    return hidden, weight, ids, old, advantages, mask, plan


def ours(hidden, weight, ids, old, advantages, mask, plan):
    return mk.mapo_loss_from_hidden(hidden, weight, ids, old_logprobs=old, plan=plan).loss


def plain(hidden, weight, ids, old, advantages, mask, plan):
    logp = peers.plain_token_logprobs(torch.nn.functional.linear(hidden, weight), ids)
    return peers.plain_loss(logp, advantages, mask, SPEC, old=old)


def trl(hidden, weight, ids, old, advantages, mask, plan):
    logp, entropy = peers.trl_hidden_logprobs(hidden, weight, ids, mask)
    return peers.trl_loss(logp, advantages, mask, SPEC, old, entropy.detach())


def liger(hidden, weight, ids, old, advantages, mask, plan):
    return peers.liger_hidden_loss(hidden, weight, ids, advantages, mask, SPEC, old)


LOSSES = {"mapo_kernels": ours, "plain PyTorch": plain, "TRL": trl, "Liger": liger}
PACKAGES = {"TRL": "trl", "Liger": "liger_kernel"}


def forward_and_backward(loss, batch):
    leaves = [x.detach().requires_grad_() for x in batch[:2]]
    return torch.autograd.grad(loss(*leaves, *batch[2:]), leaves)


def bare_products(batch):
    """Logits, d hidden and d weight of all tokens, in chunks of ours."""
    hidden, weight = batch[0].flatten(0, 1), batch[1]
    step = 1024
    for rows in hidden.split(step):
        logits = rows @ weight.t()
        logits @ weight
        logits.t() @ rows


def extra_memory(function):
    """Peak bytes that a call allocates beside what exists already."""
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with MemoryOfTensors() as memory:
        function()
    return memory.peak


@pytest.mark.parametrize("provider", ["bare products", *LOSSES])
@pytest.mark.parametrize("live", LIVE)
@pytest.mark.parametrize("shape", SHAPES)
def bench_loss(benchmark, shape, live, provider):
    benchmark.group = f"loss and gradients of {shape} hidden states, {live:.0%} live"
    if provider in PACKAGES:
        pytest.importorskip(PACKAGES[provider], reason=f"{provider} is not installed")
    batch = make_batch(SHAPES[shape], live)
    n_sequences, length, width, vocab, dtype = SHAPES[shape]
    n_live = sum(batch[-1].live_counts)
    benchmark.extra_info["flops"] = 6 * n_live * width * vocab
    if provider == "bare products":
        timed(benchmark, lambda: bare_products(batch), rounds=7)
        return
    expected = forward_and_backward(ours, batch)
    actual = forward_and_backward(LOSSES[provider], batch)
    for a, e in zip(actual, expected, strict=True):
        tolerance = 1e-4 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance * float(e.abs().max()))
    del actual, expected, a, e
    benchmark.extra_info["extra_bytes"] = extra_memory(
        lambda: forward_and_backward(LOSSES[provider], batch)
    )
    timed(benchmark, lambda: forward_and_backward(LOSSES[provider], batch), rounds=7)
