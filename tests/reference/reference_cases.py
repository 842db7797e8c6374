"""Small batches for the tests of the oracle, and what it makes of them."""

import torch

from reference import group_advantages, mapo_loss

AGGREGATIONS = [
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
]


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def one_group(rewards, **kwargs):
    """Advantages and statistics of rewards that form a single group."""
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    advantages, stats = group_advantages(rewards, torch.zeros(len(rewards)).long(), **kwargs)
    return advantages, stats[0]


def signed_groups(groups=200, size=7):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(groups, size, generator=generator, dtype=torch.float64)


def loss_and_grad(logprobs, *args, **kwargs):
    logprobs = logprobs.clone().requires_grad_()
    loss, metrics = mapo_loss(logprobs, *args, **kwargs)
    loss.backward()
    return loss.detach(), logprobs.grad, metrics


def one_token(logp, A=1.0, *, log_rho=0.0, **kwargs):
    """Loss and dloss/dlogp of a batch of one token."""
    kwargs["old_logprobs"] = f64([logp - log_rho])
    loss, grad, _ = loss_and_grad(f64([logp]), f64(A), torch.ones(1, 1), **kwargs)
    return float(loss), float(grad)


def ragged_batch():
    """Four sequences of up to five tokens; the third is fully masked, the others have gaps."""
    generator = torch.Generator().manual_seed(1)
    logp, old, ref, rollout = -2 * torch.rand(4, 4, 5, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 1, 1]])
    return (
        logp,
        f64(1.5, -0.5, 2.0, -1.0),
        mask,
        {
            "old_logprobs": old,
            "ref_logprobs": ref,
            "rollout_logprobs": rollout,
        },
    )


def expected_weights(mask, aggregation="token-mean", max_tokens=5):
    """Weight of every token, [B, T], in one expression per aggregation."""
    mask, B = mask.double(), len(mask)
    lengths = mask.sum(1, keepdim=True).clamp(min=1)
    return {
        "token-mean": mask / mask.sum(),
        "seq-mean-token-mean": mask / (B * lengths),
        "seq-mean-token-sum": mask / B,
        "seq-mean-token-sum-norm": mask / (B * max_tokens),
    }[aggregation]
