"""What several tests share: batches, the oracle on a batch, and the one accuracy rule."""

import dataclasses

import mpmath
import torch
from plain import plain_loss

import mapo_kernels as mk
import reference
from mapo_kernels.spec import OBJECTIVES

NAN = float("nan")
KLS = [
    {},
    *(
        {"beta": 0.3, "kl_estimator": estimator, "kl_importance_correction": corrected}
        for estimator in ("k1", "k2", "k3")
        for corrected in (False, True)
    ),
]
POLICIES = [*({"objective": name} for name in OBJECTIVES), {"objective": "clip", "dual_clip": 1.5}]
POLICIES.append({"objective": "cispo", "eps_low_cispo": 0.8, "eps_high_cispo": 1.2})
# The two that are left out differ in weights and denominators alone: see test_counting.py.
AGGREGATIONS = tuple(x for x in mk.spec.AGGREGATIONS if x not in ("token-sum", "prompt-mean"))
MASKS = ("none", "random", "row", "all")


def assert_accurate(actual, exact, plain, floor=1e-6):
    """SPEC 5: the error is at most twice that of plain PyTorch, plus a floor, both against float64.

    `exact` is the oracle on the same rounded inputs, `plain` what PyTorch makes of them in the
    dtype of the computation. A gradient in bfloat16 or float16 may be off by one more rounding of
    that dtype.
    """
    actual64, exact, plain = (x.detach().double().cpu() for x in (actual, exact, plain))
    assert torch.isfinite(actual64).all()
    scale = exact.abs().max() if exact.numel() else torch.zeros(())
    allowed = 2 * (plain - exact).abs().max() + floor * scale if exact.numel() else scale
    rounding = torch.zeros_like(exact)
    if actual.dtype in (torch.bfloat16, torch.float16):
        rounding = exact.abs() * torch.finfo(actual.dtype).eps
        rounding = rounding + torch.finfo(actual.dtype).smallest_normal
    excess = ((actual64 - exact).abs() - allowed - rounding).max() if exact.numel() else 0
    assert excess <= 0, f"error exceeds 2 E + floor by {float(excess):.3g} (allowed {allowed:.3g})"


def assert_close(actual, exact, tolerance):
    """Equal within `tolerance` of the largest value; NaN exactly where that is exact."""
    actual, exact = actual.detach().double().cpu(), exact.detach().double().cpu()
    assert actual.shape == exact.shape
    bound = tolerance * max(1.0, float(exact.nan_to_num().abs().max()) if exact.numel() else 1.0)
    torch.testing.assert_close(actual, exact, rtol=0, atol=bound, equal_nan=True)


def assert_same_metrics(actual, expected):
    """Equal bit for bit, NaN where both have nothing to say."""
    assert set(actual) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=0, equal_nan=True)


def make_batch(n_sequences=5, length=7, dtype=torch.float64, mask="random", spread=0.4):
    """A padded batch as a dict; masked positions are poisoned with NaN and inf."""
    shape = (n_sequences, length)
    logp = -torch.rand(shape, dtype=torch.float64) * 3
    batch = {"logp": logp}
    for name in ("old", "ref", "rollout"):
        batch[name] = logp + torch.randn(shape, dtype=torch.float64) * spread
    batch["weights"] = torch.rand(shape, dtype=torch.float64) + 0.5
    live = {
        "none": torch.ones(shape, dtype=torch.bool),
        "random": torch.rand(shape) < 0.6,
        "row": (torch.rand(shape) < 0.7) & (torch.arange(n_sequences) != 1)[:, None],
        "all": torch.zeros(shape, dtype=torch.bool),
    }[mask]
    for i, name in enumerate(batch):
        poison = torch.tensor([NAN, float("inf"), -float("inf")])[i % 3].double()
        batch[name] = batch[name].where(live, poison).to(dtype)
    batch["mask"] = live
    advantages = torch.randn(n_sequences, dtype=torch.float64)
    advantages[-1] = 0
    batch["advantages"] = advantages.to(dtype)
    return batch


def tensors_of(batch, spec):
    """The keyword arguments of the loss that `spec` has a use for."""
    given = {"old_logprobs": batch["old"], "token_weights": batch["weights"]}
    if spec.beta:
        given["ref_logprobs"] = batch["ref"]
    if spec.rollout_cap:
        given["rollout_logprobs"] = batch["rollout"]
    return given


def oracle(batch, spec, upstream=1.0, **given):
    """Loss, gradient and metrics of the float64 oracle."""
    settings = {name: getattr(spec, name) for name in spec.__dataclass_fields__}
    logp = batch["logp"].detach().double().requires_grad_()
    loss, metrics = reference.mapo_loss(
        logp, batch["advantages"], batch["mask"], **given, **settings
    )
    (loss * upstream).backward()
    return loss, logp.grad, metrics


def plain(batch, spec, **given):
    """Loss and gradient of vectorised PyTorch in float32, whatever the dtype of the batch."""
    names = {
        "old_logprobs": "old",
        "ref_logprobs": "ref",
        "token_weights": "weights",
        "rollout_logprobs": "rollout",
    }
    logp = batch["logp"].detach().float().requires_grad_()
    tensors = {names[k]: v.float() for k, v in given.items()}
    loss = plain_loss(logp, batch["advantages"].float(), batch["mask"], spec, **tensors)
    loss.backward()
    return loss, logp.grad


def run(batch, spec, device, upstream=1.0, **given):
    """Loss, gradient and metrics of the package on `device`."""
    logp = batch["logp"].detach().to(device, copy=True).requires_grad_()
    given = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    out = mk.mapo_loss(
        logp,
        advantages=batch["advantages"].to(device),
        mask=batch["mask"].to(device),
        spec=spec,
        **given,
    )
    (out.loss * upstream).backward()
    return out.loss, logp.grad, out.metrics


def make_logits(n_sequences=4, length=3, vocab=37, dtype=torch.float64, mask="random", scale=3.0):
    """A batch of `make_batch` with logits [B, T, V] and ids; what is masked is poisoned."""
    batch = make_batch(n_sequences, length, torch.float32, mask)
    live = batch["mask"]
    x = (torch.randn(n_sequences, length, vocab, dtype=torch.float64) * scale).to(dtype)
    ids = torch.randint(0, vocab, (n_sequences, length))
    logp, _ = reference.token_logprobs(x, ids)
    for name in ("old", "ref", "rollout"):
        batch[name] = (logp + torch.randn_like(logp) * 0.4).where(live, NAN).to(torch.float32)
    batch["logits"] = x.where(live[..., None], torch.tensor(NAN, dtype=dtype))
    batch["ids"] = ids.where(live, -100)
    if dtype == torch.float64:
        for name in ("old", "ref", "rollout", "weights", "advantages"):
            batch[name] = batch[name].double()
    return batch


def logits_oracle(batch, spec, temperature=1.0, upstream=1.0, **given):
    """Loss, gradient by the logits and metrics of the float64 oracle."""
    settings = {name: getattr(spec, name) for name in spec.__dataclass_fields__}
    x = batch["logits"].detach().double().requires_grad_()
    logp, entropy = reference.token_logprobs(x, batch["ids"], temperature, batch["mask"])
    loss, metrics = reference.mapo_loss(
        logp, batch["advantages"], batch["mask"], entropy=entropy, **given, **settings
    )
    (loss * upstream).backward()
    return loss, x.grad, metrics


def logits_plain(batch, spec, temperature=1.0, dtype=torch.float32, **given):
    """Loss and gradient of vectorised PyTorch from logits, computed in `dtype`."""
    x = batch["logits"].detach().clone().requires_grad_()
    live = batch["mask"]
    clean = x.to(dtype).masked_fill(~live[..., None], 0) / temperature
    every = torch.log_softmax(clean, -1)
    logp = every.gather(-1, batch["ids"].where(live, 0)[..., None]).squeeze(-1)
    names = {
        "old_logprobs": "old",
        "ref_logprobs": "ref",
        "token_weights": "weights",
        "rollout_logprobs": "rollout",
    }
    tensors = {names[k]: v for k, v in given.items()}
    loss = plain_loss(logp, batch["advantages"], live, spec, **tensors)
    if spec.entropy_coef:
        entropy = -(every.exp() * every).sum(-1).masked_fill(~live, 0)
        loss = loss - spec.entropy_coef * entropy.sum() / live.sum()
    loss.backward()
    return loss, x.grad


def logits_run(batch, spec, device, upstream=1.0, mask=True, **given):
    """Loss, gradient by the logits and metrics of the package on `device`."""
    x = batch["logits"].detach().to(device, copy=True).requires_grad_()
    given = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    out = mk.mapo_loss_from_logits(
        x,
        batch["ids"].to(device),
        advantages=batch["advantages"].to(device),
        mask=batch["mask"].to(device) if mask else None,
        spec=spec,
        **given,
    )
    (grad,) = torch.autograd.grad(out.loss * upstream, x)
    return out.loss.detach(), grad, out.metrics


def pack(batch, lengths):
    """The first `lengths[i]` tokens of each row, packed; and the boundaries."""
    keep = torch.arange(batch["logp"].shape[1]) < torch.tensor(lengths)[:, None]
    packed = {
        k: v[keep] if v is not None and v.shape[:2] == keep.shape else v for k, v in batch.items()
    }
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return packed, cu_seqlens, keep


def keep(ids, vocab, sizes=(1, 2, 5), others=()):
    """Columns that each token keeps: lists of these sizes in turn, the token at a random place.

    `others` come right after it, any other columns later.
    """
    lists = []
    for n, y in enumerate(ids.reshape(-1).tolist()):
        y = y if 0 <= y < vocab else 0
        kept = dict.fromkeys([y, *others, *torch.randperm(vocab).tolist()])
        kept = list(kept)[: sizes[n % len(sizes)]]
        lists.append([kept[i] for i in torch.randperm(len(kept)).tolist()])
    return lists


def tune(monkeypatch, record, **fields):
    """Sets some constants of a record of `mapo_kernels.config` for one test."""
    from mapo_kernels import config

    monkeypatch.setattr(config, record, dataclasses.replace(getattr(config, record), **fields))


def exact_scores(row, token):
    """Log-prob and entropy in more digits than float64 has: it loses 1 in 1 + e^-60."""
    with mpmath.workdps(60):
        powers = [mpmath.exp(mpmath.mpf(float(x) - float(row.max()))) for x in row]
        total = mpmath.fsum(powers)
        entropy = -mpmath.fsum(p / total * mpmath.log(p / total) for p in powers)
        return float(mpmath.log(powers[token] / total)), float(entropy)
