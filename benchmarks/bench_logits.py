"""The loss from logits, and scoring, against what a trainer would otherwise run.

    pytest benchmarks --benchmark-only

The copy of the logits moves the bytes that the loss must move: each logit read once, its gradient
written once. Its time is the roof; ours over it is the share of the device's bandwidth that is
reached. Every provider's gradient is compared with ours before it is timed.
"""

import pytest
import torch

import mapo_kernels as mk
from benchmarks import peers
from benchmarks.bench_logprobs import DEVICE, SPEC, timed

ON_GPU = DEVICE.type == "cuda"
# B, T, V and dtype: what fits a laptop, and on a GPU the heads of Qwen2.5 and Llama-3.
SHAPES = {
    "64 x 32000 float32": (4, 16, 32000, torch.float32),
    "512 x 32000 bfloat16": (8, 64, 32000, torch.bfloat16),
}
if ON_GPU:
    SHAPES = {
        "8192 x 152064 bfloat16": (8, 1024, 152064, torch.bfloat16),
        "8192 x 128256 bfloat16": (8, 1024, 128256, torch.bfloat16),
        "8192 x 50257 bfloat16": (8, 1024, 50257, torch.bfloat16),
        "4096 x 152064 float32": (8, 512, 152064, torch.float32),
    }


def make_batch(shape, live=1.0):
    """Logits with a last position that predicts nothing, ids, old log-probs, advantages, mask."""
    n_sequences, length, vocab, dtype = shape
    logits = torch.randn(n_sequences, length + 1, vocab, dtype=dtype, device=DEVICE) * 2
    ids = torch.randint(0, vocab, (n_sequences, length), device=DEVICE)
    old = mk.token_logprobs(logits[:, :-1], ids)
    old = old + torch.randn_like(old) * 0.1
    advantages = torch.randn(n_sequences, device=DEVICE)
    mask = torch.rand(n_sequences, length, device=DEVICE) < live
    return logits, ids, old, advantages, mask


def ours(logits, ids, old, advantages, mask, inplace=False):
    # All positions, the last of them masked: no view whose gradient autograd would copy.
    padded = [torch.nn.functional.pad(x, (0, 1)) for x in (ids, old, mask)]
    return mk.mapo_loss_from_logits(
        logits,
        padded[0],
        old_logprobs=padded[1],
        mask=padded[2],
        advantages=advantages,
        spec=SPEC,
        inplace=inplace,
    ).loss


def in_place(*batch):
    return ours(*batch, inplace=True)


def plain(logits, ids, old, advantages, mask):
    logp = peers.plain_token_logprobs(logits[:, :-1], ids)
    return peers.plain_loss(logp, advantages, mask, SPEC, old=old)


def trl(logits, ids, old, advantages, mask):
    logp, entropy = peers.trl_token_logprobs(logits[:, :-1], ids, mask)
    return peers.trl_loss(logp, advantages, mask, SPEC, old, entropy)


def liger(logits, ids, old, advantages, mask):
    return peers.liger_loss(logits, ids, advantages, mask, SPEC, old)


LOSSES = {
    "mapo_kernels": ours,
    "mapo_kernels in place": in_place,
    "plain PyTorch": plain,
    "torch.compile of plain PyTorch": torch.compile(plain),
    "TRL": trl,
    "Liger": liger,
}


def skip_without(provider, dtype):
    if provider == "TRL":
        pytest.importorskip("trl", reason="TRL is not installed")
        if not ON_GPU and dtype == torch.bfloat16:
            pytest.skip("without its kernel TRL computes in bfloat16: its gradient is too far off")
    if provider == "Liger":
        pytest.importorskip("liger_kernel", reason="Liger is not installed")
        if not ON_GPU:
            pytest.skip("Liger's kernel needs a GPU")


def forward_and_backward(loss, logits, *rest):
    leaf = logits.detach().requires_grad_()
    return torch.autograd.grad(loss(leaf, *rest), leaf)[0]


@pytest.mark.parametrize("provider", ["copy of the logits", *LOSSES])
@pytest.mark.parametrize("live", [1.0, 0.5], ids=["all live", "half live"])
@pytest.mark.parametrize("shape", SHAPES)
def bench_loss(benchmark, shape, live, provider):
    benchmark.group = f"loss and gradient of {shape} logits, {live:.0%} live"
    skip_without(provider, SHAPES[shape][3])
    batch = make_batch(SHAPES[shape], live)
    logits = batch[0]
    benchmark.extra_info["bytes"] = int(2 * live * logits.numel() * logits.element_size())
    if provider == "copy of the logits":
        room = torch.empty_like(logits)
        timed(benchmark, lambda: room.copy_(logits))
        return
    expected = forward_and_backward(ours, logits.clone(), *batch[1:])
    actual = forward_and_backward(LOSSES[provider], logits.clone(), *batch[1:])
    tolerance = 1e-4 if logits.dtype == torch.float32 else 2**-6
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * scale)
    del actual, expected
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward_and_backward(LOSSES[provider], *batch)
        extra = torch.cuda.max_memory_allocated() - before
        benchmark.extra_info["extra_bytes"] = extra
    timed(benchmark, lambda: forward_and_backward(LOSSES[provider], *batch))


SCORES = {
    "mapo_kernels": lambda logits, ids, mask: mk.token_logprobs(logits[:, :-1], ids),
    "plain PyTorch": lambda logits, ids, mask: peers.plain_token_logprobs(logits[:, :-1], ids),
    "TRL": lambda logits, ids, mask: peers.trl_token_logprobs(logits[:, :-1], ids, mask)[0],
}


@pytest.mark.parametrize("provider", SCORES)
@pytest.mark.parametrize("shape", SHAPES)
def bench_scoring(benchmark, shape, provider):
    benchmark.group = f"log-probs of {shape} logits, no gradient"
    skip_without(provider, SHAPES[shape][3])
    logits, ids, _, _, mask = make_batch(SHAPES[shape])
    with torch.no_grad():
        expected = SCORES["mapo_kernels"](logits, ids, mask)
        actual = SCORES[provider](logits, ids, mask)
        # TRL computes in the dtype of the logits where it has no kernel.
        tolerance = 1e-4 if logits.dtype == torch.float32 else 2**-5
        torch.testing.assert_close(actual.float(), expected, rtol=tolerance, atol=tolerance)
        timed(benchmark, lambda: SCORES[provider](logits, ids, mask))
