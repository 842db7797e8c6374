"""Group advantages and the log-prob loss against what a trainer would otherwise run.

    pytest benchmarks --benchmark-only

Every provider's result is compared with ours before it is timed: a peer that computes something
else is a failure, not a fast row. A peer that is not installed is a skip that says so.
"""

import pytest
import torch

import mapo_kernels as mk
from benchmarks import peers

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GROUP_SIZE = 16
SPEC = mk.LossSpec(eps_low=0.2, eps_high=0.28)


def timed(benchmark, function, rounds=15):
    """Time `function`; on a GPU until it is done, kernels that were queued included."""

    def run():
        result = function()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return result

    benchmark.pedantic(run, rounds=rounds, warmup_rounds=3)


ADVANTAGES = {
    "mapo_kernels": lambda rewards: mk.group_advantages(rewards, group_size=GROUP_SIZE),
    "plain PyTorch": lambda rewards: peers.plain_advantages(rewards, GROUP_SIZE),
    "authors' loop": lambda rewards: peers.looped_advantages(rewards, GROUP_SIZE),
}


@pytest.mark.parametrize("provider", ADVANTAGES)
@pytest.mark.parametrize("log2_rewards", [10, 14, 18, 22])
def bench_advantages(benchmark, log2_rewards, provider):
    benchmark.group = f"advantages of 2^{log2_rewards} rewards"
    if provider == "authors' loop" and log2_rewards > 14:
        pytest.skip("a Python loop over groups: minutes at this size")
    rewards = (torch.rand(1 << log2_rewards, device=DEVICE) < 0.4).float()
    # No group without signal: a peer divides 0 by eps there, which is 0 too, or rounding noise.
    rewards.view(-1, GROUP_SIZE)[:, 0], rewards.view(-1, GROUP_SIZE)[:, 1] = 0, 1
    ours = mk.group_advantages(rewards, group_size=GROUP_SIZE)
    torch.testing.assert_close(ADVANTAGES[provider](rewards), ours, rtol=1e-4, atol=1e-4)
    timed(benchmark, lambda: ADVANTAGES[provider](rewards))


def make_batch(n_sequences, length):
    """Log-probs, old log-probs, rewards and a mask in which half of the tokens are padding."""
    logp = -torch.rand(n_sequences, length, device=DEVICE) * 2
    old = logp + torch.randn_like(logp) * 0.1
    rewards = (torch.rand(n_sequences, device=DEVICE) < 0.4).float()
    lengths = torch.randint(1, length + 1, (n_sequences, 1), device=DEVICE)
    mask = torch.arange(length, device=DEVICE) < lengths
    return logp.requires_grad_(), old, rewards, mask


def ours(logp, old, rewards, mask):
    return mk.mapo_loss(
        logp, rewards=rewards, group_size=GROUP_SIZE, mask=mask, old_logprobs=old, spec=SPEC
    ).loss


def plain(logp, old, rewards, mask):
    advantages = peers.plain_advantages(rewards, GROUP_SIZE)
    return peers.plain_loss(logp, advantages, mask, SPEC, old=old)


def trl(logp, old, rewards, mask):
    advantages = peers.plain_advantages(rewards, GROUP_SIZE)
    return peers.trl_loss(logp, advantages, mask, SPEC, old)


LOSSES = {
    "mapo_kernels": ours,
    "torch.compile of mapo_kernels": torch.compile(ours),
    "plain PyTorch": plain,
    "torch.compile of plain PyTorch": torch.compile(plain),
    "TRL": trl,
}


def forward_and_backward(loss, batch):
    return torch.autograd.grad(loss(*batch), batch[0])[0]


@pytest.mark.parametrize("provider", LOSSES)
@pytest.mark.parametrize("shape", [(64, 2048), (1024, 4096)], ids=["131k", "4M"])
def bench_loss(benchmark, shape, provider):
    benchmark.group = f"loss and gradient of {shape[0]} x {shape[1]} log-probs"
    if provider == "TRL":
        pytest.importorskip("trl", reason="TRL is not installed")
    batch = make_batch(*shape)
    expected = forward_and_backward(ours, batch)
    actual = forward_and_backward(LOSSES[provider], batch)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    timed(benchmark, lambda: forward_and_backward(LOSSES[provider], batch))
