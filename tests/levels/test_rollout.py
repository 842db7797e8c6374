"""The mask against rollouts: on every level what weights written by hand do, and its metrics."""

import pytest
import torch

import mapo_kernels as mk
from mapo_kernels.metrics import _NAMES, _reduce_table

B, T, H, V = 4, 5, 6, 17
BOUNDS = (0.6, 1.5)


def made(seed=0):
    """Hidden states, a head, ids, and what else a loss takes; ratios reach past the bounds."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    hidden, weight = normal(B, T, H), normal(V, H)
    ids = torch.randint(0, V, (B, T), generator=generator)
    logp = mk.token_logprobs_from_hidden(hidden, weight, ids)
    old = logp + 0.3 * normal(B, T)
    given = {"old_logprobs": old, "rollout_logprobs": old + 0.6 * normal(B, T) + 0.5 * normal(B, 1)}
    given |= {"advantages": normal(B), "mask": torch.rand(B, T, generator=generator) < 0.8}
    return hidden, weight, ids, logp, given


def by_hand(given, spec):
    """The factors [B, T] of the policy term, and which tokens are masked."""
    live = given["mask"]
    log_ratio = given["old_logprobs"] - given["rollout_logprobs"]
    level = log_ratio.exp()
    if spec.rollout_mask_level == "sequence":
        mean = (log_ratio * live).sum(1, keepdim=True) / live.sum(1, keepdim=True)
        level = mean.exp().expand(B, T)
    masked = (level < BOUNDS[0]) | (level > BOUNDS[1])
    factor = log_ratio.exp().clamp(max=spec.rollout_cap or torch.inf)
    if not spec.rollout_is:
        factor = torch.ones(B, T)
    return torch.where(masked, 0.0, factor), masked & live


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize(
    ("level", "cap", "rollout_is"),
    [("token", None, True), ("sequence", None, True), ("sequence", 1.2, True)]
    + [("token", None, False)],
)
def test_it_is_weights_by_hand(level, cap, rollout_is, importance, device):
    settings = {"importance_level": importance, "beta": 0.1 if cap else 0.0}
    spec = mk.LossSpec(
        rollout_mask=BOUNDS,
        rollout_mask_level=level,
        rollout_cap=cap,
        rollout_is=rollout_is,
        **settings,
    )
    hidden, weight, ids, logp, given = (
        {k: x.to(device) for k, x in x.items()} if isinstance(x, dict) else x.to(device)
        for x in made()
    )
    given |= {"ref_logprobs": given["old_logprobs"] - 0.1} if cap else {}
    factors, masked = by_hand({k: x.cpu() for k, x in given.items()}, spec)
    assert 0 < masked.sum() < given["mask"].sum()
    plain = {k: x for k, x in given.items() if k != "rollout_logprobs"}
    plain |= {"token_weights": factors.to(device), "spec": mk.LossSpec(**settings)}
    plan = mk.make_plan(advantages=given["advantages"], mask=given["mask"], spec=spec)
    tensors = {k: x for k, x in given.items() if k.endswith("logprobs")}
    calls = {
        "logp": (logp, lambda x, **kw: mk.mapo_loss(x, **kw)),
        "logits": (hidden @ weight.T, lambda x, **kw: mk.mapo_loss_from_logits(x, ids, **kw)),
        "hidden": (hidden, lambda x, **kw: mk.mapo_loss_from_hidden(x, weight, ids, **kw)),
    }
    for leaf, call in calls.values():
        results = []
        for kw in (plain, {**given, "spec": spec}, {"plan": plan, **tensors}):
            x = leaf.detach().clone().requires_grad_()
            out = call(x, **kw)
            out.loss.backward()
            results.append((out, x.grad))
        (expected, expected_grad), *others = results
        for out, grad in others:
            torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-6)
            assert out.metrics["scored_tokens"] == expected.metrics["scored_tokens"]
            fraction = masked.sum() / given["mask"].cpu().sum()
            torch.testing.assert_close(out.metrics["rollout_masked_fraction"].cpu(), fraction)


def test_micro_batches_and_packed_sequences():
    spec = mk.LossSpec(rollout_mask=BOUNDS, rollout_mask_level="sequence")
    *_, logp, given = made(1)
    tensors = {k: x for k, x in given.items() if k.endswith("logprobs")}
    whole = mk.mapo_loss(logp, spec=spec, **given)
    plan = mk.make_plan(advantages=given["advantages"], mask=given["mask"], spec=spec)
    parts = [
        mk.mapo_loss(logp[r], plan=plan.micro_batch(r), **{k: x[r] for k, x in tensors.items()})
        for r in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(x.loss for x in parts), whole.loss)
    packed = mk.mapo_loss(
        logp.reshape(-1),
        cu_seqlens=torch.arange(B + 1) * T,
        spec=spec,
        **{k: x if k == "advantages" else x.reshape(-1) for k, x in given.items()},
    )
    torch.testing.assert_close(packed.loss, whole.loss)
    table = torch.zeros(2, len(_NAMES) + 1, dtype=torch.float64)
    for row, part in zip(table, parts, strict=True):
        for i, name in enumerate(_NAMES):
            row[i] = part.metrics.get(name, 0.0)
    reduced = _reduce_table(table, 2)
    names = [name for name in whole.metrics if name.startswith("rollout")]
    assert len(names) == 4
    for name in names:
        torch.testing.assert_close(reduced[name].float(), whole.metrics[name])
        torch.testing.assert_close(packed.metrics[name], whole.metrics[name])


def test_metrics_by_hand():
    old = torch.tensor([[0.5, 0.2, 0.4, 0.3]]).log()
    rollout = torch.tensor([[0.5, 0.1, 0.8, 0.01]]).log()
    given = {"old_logprobs": old, "rollout_logprobs": rollout, "advantages": torch.tensor([0.0])}
    mask = torch.tensor([[1, 1, 1, 0]])
    spec = mk.LossSpec(rollout_mask=(0.4, 1.9))
    metrics = mk.mapo_loss(old.clone(), mask=mask, spec=spec, **given).metrics
    expected = {
        "rollout_masked_fraction": 1 / 3,
        "rollout_ratio_mean": (1 + 2 + 0.5) / 3,
        "rollout_ratio_max": 2.0,
        "rollout_kl": (2 - 1 - 0.693147 + 0.5 - 1 + 0.693147) / 3,
    }
    assert {k: metrics[k].item() for k in expected} == pytest.approx(expected, rel=1e-5)
    empty = mk.mapo_loss(old.clone(), mask=mask * 0, spec=spec, **given).metrics
    assert all(empty[name].isnan() for name in expected)
    without = mk.mapo_loss(old.clone(), advantages=given["advantages"]).metrics
    assert not set(expected) & set(without)
