"""Batches with hidden states and a head, the oracle on them, and the package."""

import torch
from support import (
    NAN,
    assert_close,
    make_logits,
    tensors_of,
)

import mapo_kernels as mk
import reference

H, V = 16, 50


def make_hidden(n_sequences=4, length=3, dtype=torch.float32, mask="random", bias=True):
    """A batch with hidden states instead of logits; what is masked is poisoned with NaN."""
    # In float64 unless that is asked for: the same values then exist in every dtype.
    batch = make_logits(n_sequences, length, V, torch.float32, mask)
    live = batch["mask"]
    hidden = torch.randn(n_sequences, length, H) * 0.7
    batch["hidden"] = hidden.where(live[..., None], NAN).to(dtype)
    batch["weight"] = torch.randn(V, H).to(dtype)
    batch["bias"] = torch.randn(V).to(dtype) if bias else None
    batch["advantages"] = torch.randn(n_sequences)
    if dtype == torch.float64:
        for name in ("old", "ref", "rollout", "weights", "advantages"):
            batch[name] = batch[name].double()
    return batch


def logits_of(batch, softcap=None, logit_scale=1.0, dtype=torch.float64, leaves=None):
    """Full logits by plain PyTorch, from leaves that will get gradients."""
    names = ("hidden", "weight", "bias")
    if leaves is None:
        leaves = [None if batch[k] is None else batch[k].to(dtype) for k in names]
        leaves = [None if x is None else x.detach().clone().requires_grad_() for x in leaves]
    hidden = leaves[0].masked_fill(~batch["mask"][..., None], 0.0)
    x = torch.nn.functional.linear(hidden, leaves[1], leaves[2]) * logit_scale
    return leaves, x if softcap is None else softcap * torch.tanh(x / softcap)


def oracle(batch, spec, temperature=1.0, head=None, **given):
    leaves, x = logits_of(batch, **(head or {}))
    logp, entropy = reference.token_logprobs(x, batch["ids"], temperature, batch["mask"])
    settings = {name: getattr(spec, name) for name in spec.__dataclass_fields__}
    loss, metrics = reference.mapo_loss(
        logp, batch["advantages"], batch["mask"], entropy=entropy, **given, **settings
    )
    loss.backward()
    return loss, [None if x is None else x.grad for x in leaves], metrics


def run(batch, spec, device, mask=True, wanted=(True, True, True), **given):
    leaves = [
        None if batch[k] is None else batch[k].detach().to(device, copy=True).requires_grad_(want)
        for k, want in zip(("hidden", "weight", "bias"), wanted, strict=True)
    ]
    given = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    if "plan" not in given:
        given["advantages"] = batch["advantages"].to(device)
        given["mask"] = batch["mask"].to(device) if mask else None
    out = mk.mapo_loss_from_hidden(
        leaves[0], leaves[1], batch["ids"].to(device), bias=leaves[2], spec=spec, **given
    )
    if any(wanted):
        out.loss.backward()
    grads = [None if x is None else x.grad for x in leaves]
    return out.loss.detach(), grads, out.metrics


def check_against_oracle(batch, spec, device, tolerance, temperature=1.0, **head):
    given = tensors_of(batch, spec)
    loss, grads, metrics = run(
        batch, spec, device, temperature=temperature, chunk_rows=5, **head, **given
    )
    exact_loss, exact_grads, exact_metrics = oracle(batch, spec, temperature, head, **given)
    assert_close(loss, exact_loss, tolerance)
    for grad, exact in zip(grads, exact_grads, strict=True):
        assert_close(grad, exact, tolerance)
    assert (grads[0].cpu()[~batch["mask"]] == 0).all()
    assert set(metrics) == set(exact_metrics)
    for name, value in exact_metrics.items():
        assert_close(metrics[name], value, tolerance)


HEADS = ({}, {"logit_scale": 0.6}, {"softcap": 4.0, "logit_scale": 0.6})
