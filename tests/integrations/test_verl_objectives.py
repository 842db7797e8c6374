"""Objectives against verl's own functions of them, by value and by gradient."""

import pytest
import torch

import mapo_kernels as mk

pytest.importorskip("verl", reason="verl is not installed")

from verl.trainer.ppo import core_algos  # noqa: E402
from verl.workers.config import FSDPActorConfig  # noqa: E402
from verl.workers.config.actor import PolicyLossConfig  # noqa: E402


def batch():
    torch.manual_seed(0)
    logp = -torch.rand(6, 9, dtype=torch.float64) * 3
    old = logp + 0.4 * torch.randn(6, 9, dtype=torch.float64)
    mask = torch.arange(9) < torch.tensor([9, 4, 1, 7, 9, 2])[:, None]
    return logp, old, mask, torch.randn(6, dtype=torch.float64)


def of_verl(name, mode="token-mean", **policy):
    logp, old, mask, A = batch()
    logp.requires_grad_()
    config = FSDPActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio=0.2,
        clip_ratio_low=0.2,
        clip_ratio_high=0.3,
        policy_loss=PolicyLossConfig(loss_mode=name, **policy),
    )
    loss, _ = core_algos.get_policy_loss_fn(name)(
        old_log_prob=old,
        log_prob=logp,
        advantages=A[:, None].expand_as(logp) * mask,
        response_mask=mask.double(),
        loss_agg_mode=mode,
        config=config,
    )
    loss.backward()
    return loss.detach(), logp.grad


def ours(spec, **given):
    logp, old, mask, A = batch()
    logp.requires_grad_()
    out = mk.mapo_loss(logp, advantages=A, mask=mask, spec=spec, **({"old_logprobs": old} | given))
    out.loss.backward()
    return out.loss.detach(), logp.grad


def assert_equal(found, expected):
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "token-sum"])
def test_cispo_has_both_bounds(mode):
    spec = mk.LossSpec(objective="cispo", eps_low_cispo=0.8, eps_high_cispo=1.3, aggregation=mode)
    assert_equal(ours(spec), of_verl("cispo", mode))


def test_dro_is_cispo_on_policy_with_k2_to_the_old_policy():
    spec = mk.LossSpec(objective="cispo", kl_estimator="k2", beta=0.7)
    given = {"old_logprobs": None, "ref_logprobs": batch()[1]}
    assert_equal(ours(spec, **given), of_verl("dro", dro_beta=0.7))


def test_gmpo_is_geo_mean():
    spec = mk.LossSpec(
        objective="gmpo",
        importance_level="sequence",
        eps_low=0.2,
        eps_high=0.3,
        aggregation="seq-mean-token-mean",
    )
    assert_equal(ours(spec), of_verl("geo_mean"))
