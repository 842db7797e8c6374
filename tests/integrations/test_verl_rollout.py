"""verl 0.9.1's rollout correction against the same fields of `LossSpec`."""

import pytest
import torch

import mapo_kernels as mk

pytest.importorskip("verl", reason="verl is not installed")
helper = pytest.importorskip("verl.trainer.ppo.rollout_corr_helper", reason="verl is another")

# What verl is told, and what a spec says.
SETTINGS = [
    ({"rollout_is": "token", "rollout_is_threshold": 1.5}, {"rollout_cap": 1.5}),
    ({"rollout_is": "token", "rollout_is_threshold": "0.5_1.5"}, {"rollout_mask": (0.5, 1.5)}),
    (
        {"rollout_rs": "token_k1", "rollout_rs_threshold": "0.8_1.6"},
        {"rollout_mask": (1 / 1.6, 1 / 0.8), "rollout_is": False},
    ),
    (
        {"rollout_rs": "seq_mean_k1", "rollout_rs_threshold": "0.8_1.6"}
        | {"rollout_is": "token", "rollout_is_threshold": 2.0},
        {"rollout_mask": (1 / 1.6, 1 / 0.8), "rollout_mask_level": "sequence", "rollout_cap": 2.0},
    ),
]


@pytest.mark.parametrize(("theirs", "ours"), SETTINGS)
def test_rollout_correction_is_verls(theirs, ours):
    generator = torch.Generator().manual_seed(0)
    shape = (40, 6)
    old = -torch.rand(shape, generator=generator, dtype=torch.float64) * 3
    shift = torch.randn(40, 1, generator=generator, dtype=torch.float64)
    rollout = old + 0.4 * torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5 * shift
    mask = torch.rand(shape, generator=generator) < 0.8
    mask[:, 0] = True
    logp = (old + 0.1).requires_grad_()
    given = {"advantages": shift[:, 0], "mask": mask, "old_logprobs": old}
    weights, kept, metrics = helper.compute_rollout_correction_and_rejection_mask(
        old, rollout, mask.double(), **theirs
    )
    factors = kept if weights is None else kept * weights.batch["rollout_is_weights"]
    expected = mk.mapo_loss(logp, token_weights=factors, **given).loss
    found = mk.mapo_loss(logp, rollout_logprobs=rollout, spec=mk.LossSpec(**ours), **given)
    torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad(found.loss, logp)
    (expected_grad,) = torch.autograd.grad(expected, logp)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-12)
    assert found.metrics["rollout_kl"].item() == pytest.approx(metrics["rollout_corr/k3_kl"])
    fraction = found.metrics["rollout_masked_fraction"].item()
    if "rollout_rs" in theirs:
        assert fraction == pytest.approx(metrics["rollout_corr/rollout_rs_masked_fraction"])
    elif "rollout_mask" in ours:
        assert fraction == pytest.approx(metrics["rollout_corr/rollout_is_oob_ratio"])
    assert (fraction > 0.05) == ("rollout_mask" in ours)
