"""The levels without a vocabulary: group advantages, and the loss from log-probs.

`ALL` in `vocabulary.py` has these and the levels from logits and hidden states.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch

import mapo_kernels as mk

from . import peers, shapes
from .case import COMPILED, OURS, PLAIN, Case, Counts, Inputs, Level, Provider

SPEC = mk.LossSpec(eps_low=0.2, eps_high=0.28)


def compiled(function: Callable[..., torch.Tensor]) -> Provider:
    """The provider that is `torch.compile` of a function."""
    return Provider(torch.compile(function), compiles=True)


def _advantage_inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    batch = case.batch
    rewards = shapes.rewards(batch, generator).to(device)
    ids = np.repeat(np.arange(batch.n_sequences // batch.group_size), batch.group_size)
    rest = SimpleNamespace(
        group_size=batch.group_size,
        ids=ids.astype(object),
        mask=torch.ones(batch.n_sequences, 1, device=device),
    )
    return Inputs(case, (rewards,), rest, 1.0)


def _few_groups(case: Case) -> str | None:
    if case.batch.n_sequences > 1 << 14:
        return "a Python loop over groups: minutes at this size"
    return None


def advantages_level(estimator: str, others: dict[str, Provider]) -> Level:
    """The level of group advantages by one estimator; 8 bytes a reward, one launch."""

    def ours(rewards, rest):
        return mk.group_advantages(rewards, group_size=rest.group_size, estimator=estimator)

    def plain(rewards, rest):
        return peers.plain_advantages(rewards, rest.group_size, estimator)

    def truth(inputs):
        (rewards,) = inputs.leaves
        return [peers.plain_advantages(rewards.double(), inputs.rest.group_size, estimator)]

    return Level(
        f"advantages, {estimator.upper()}",
        _advantage_inputs,
        truth,
        {
            OURS: Provider(ours),
            PLAIN: Provider(plain),
            COMPILED: compiled(plain),
            **others,
        },
        lambda case, live, direction: Counts(8 * case.batch.n_sequences),
    )


def draw_policy(case: Case, generator: torch.Generator, device: torch.device) -> SimpleNamespace:
    """What every loss level reads beside its leaves.

    Ids, mask [B, T], and per-sequence advantages [B] of a micro-batch whose sequences come from
    different groups, as trainers that shuffle have them; `live` is the share of positions that
    change something.
    """
    batch, size = case.batch, (case.batch.n_sequences, case.batch.length)
    mask = torch.arange(batch.length) < shapes.lengths(batch, generator)[:, None]
    whole = shapes.Batch(
        batch.n_sequences * batch.group_size, 1, batch.group_size, no_signal=batch.no_signal
    )
    advantages = peers.plain_advantages(shapes.rewards(whole, generator), batch.group_size)
    advantages = advantages.view(-1, batch.group_size)[:, 0].contiguous()
    live = float((mask & (advantages[:, None] != 0)).float().mean())
    ids = torch.randint(0, max(case.head.vocab, 1), size, generator=generator)
    noise = torch.randn(size, generator=generator) * 0.1
    rest = SimpleNamespace(ids=ids, mask=mask, advantages=advantages, noise=noise)
    rest.__dict__.update({k: x.to(device) for k, x in rest.__dict__.items()})
    rest.live = live
    return rest


def _logprob_inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    rest = draw_policy(case, generator, device)
    logp = -torch.rand(rest.mask.shape, generator=generator).to(device) * 2
    rest.old = logp + rest.noise
    rest.rewards = shapes.rewards(case.batch, generator).to(device)
    rest.group_size = case.batch.group_size
    signal = peers.plain_advantages(rest.rewards, rest.group_size) != 0
    return Inputs(case, (logp,), rest, float((rest.mask & signal[:, None]).float().mean()))


def _ours_from_logprobs(logp, rest):
    given = {"rewards": rest.rewards, "group_size": rest.group_size, "mask": rest.mask}
    return mk.mapo_loss(logp, old_logprobs=rest.old, spec=SPEC, **given).loss


def _plain_from_logprobs(logp, rest):
    advantages = peers.plain_advantages(rest.rewards.to(logp.dtype), rest.group_size)
    return peers.plain_loss(logp, advantages, rest.mask, SPEC, old=rest.old)


def _trl_from_logprobs(logp, rest):
    advantages = peers.plain_advantages(rest.rewards, rest.group_size)
    return peers.trl_loss(logp, advantages, rest.mask, SPEC, rest.old)


def _verl_from_logprobs(logp, rest):
    advantages = peers.plain_advantages(rest.rewards, rest.group_size)
    return peers.verl_loss(logp, advantages, rest.mask, SPEC, rest.old)


def _logprob_truth(inputs: Inputs) -> list[torch.Tensor]:
    leaf = inputs.leaves[0].double().requires_grad_()
    return list(torch.autograd.grad(_plain_from_logprobs(leaf, inputs.rest), [leaf]))


def count_logprobs(case: Case, live: float, direction: str) -> Counts:
    """Mask byte of every position, two float32 log-probs of live ones, gradients written."""
    tokens = case.batch.tokens
    written = 0 if direction == "forward" else 4 * tokens
    return Counts(tokens + round(8 * live * tokens) + written)


ADVANTAGES = advantages_level(
    "mapo",
    {
        "authors' loop": Provider(
            lambda rewards, rest: peers.looped_advantages(rewards, rest.group_size),
            beyond=_few_groups,
        )
    },
)
GRPO_ADVANTAGES = advantages_level(
    "grpo", {"verl": Provider(peers.verl_advantages, package="verl", beyond=_few_groups)}
)
LOGPROBS = Level(
    "log-probs",
    _logprob_inputs,
    _logprob_truth,
    {
        OURS: Provider(_ours_from_logprobs),
        "torch.compile of mapo_kernels": compiled(_ours_from_logprobs),
        PLAIN: Provider(_plain_from_logprobs),
        COMPILED: compiled(_plain_from_logprobs),
        "TRL": Provider(_trl_from_logprobs, package="trl"),
        "verl": Provider(_verl_from_logprobs, package="verl"),
    },
    count_logprobs,
)
