"""The levels of the package: how inputs are drawn, computed exactly, provided and counted."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

import mapo_kernels as mk

from . import peers
from .cases import GRPO, HIDDEN, LOGITS, LOGPROBS, MAPO, SCORING, Case, answer_lengths, draw_rewards

OURS = "mapo_kernels"
PLAIN = "plain PyTorch"
COMPILED = "torch.compile of plain PyTorch"
SPEC = mk.LossSpec(eps_low=0.2, eps_high=0.28)


class Inputs(NamedTuple):
    """`leaves` are differentiated; `rest` is what else a provider reads.

    `live` is the share of positions that change something.
    """

    leaves: tuple[torch.Tensor, ...]
    rest: SimpleNamespace
    live: float = 1.0


@dataclass(frozen=True)
class Provider:
    """Who computes it: `call(*leaves, rest)` returns the loss, or the values without a gradient."""

    call: Callable[..., torch.Tensor]
    package: str | None = None
    needs_gpu: bool = False
    compiles: bool = False
    consumes: bool = False  # The leaves' contents are destroyed: every call needs fresh ones.
    loops: bool = False  # Over groups, in Python.
    softcap: bool = True  # Whether it knows one.

    def unavailable(self, case: Case, device: torch.device) -> str | None:
        """Why it cannot be measured here, or None."""
        if self.package and importlib.util.find_spec(self.package) is None:
            return "not installed"
        if self.needs_gpu and device.type != "cuda":
            return "needs a GPU"
        if self.loops and case.n_sequences > 1 << 14:
            return "a Python loop over groups: minutes at this size"
        if case.head.softcap is not None and not self.softcap:
            return "has no cap on logits"
        return None


class Level(NamedTuple):
    """One level; `truth` is in float64: gradients of the leaves, or [values] without a gradient."""

    draw: Callable[[Case, torch.Generator, torch.device], Inputs]
    truth: Callable[[Inputs], list[torch.Tensor]]
    providers: Mapping[str, Provider]


def draw_groups(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    """Rewards of whole groups, and what verl reads beside them."""
    ids = np.repeat(np.arange(case.n_sequences // case.group_size), case.group_size)
    mask = torch.ones(case.n_sequences, 1, device=device)
    rest = SimpleNamespace(group_size=case.group_size, ids=ids.astype(object), mask=mask)
    return Inputs((draw_rewards(case, generator).to(device),), rest)


def draw_policy(case: Case, generator: torch.Generator, device: torch.device) -> SimpleNamespace:
    """What a loss reads beside its leaves: mask, ids, noise of old log-probs [B, T], advantages.

    The sequences come from different groups, as in the micro-batches of trainers that shuffle.
    """
    mask = torch.arange(case.length) < answer_lengths(case, generator)[:, None]
    whole = replace(case, n_sequences=case.n_sequences * case.group_size)
    every = peers.plain_advantages(draw_rewards(whole, generator), case.group_size)
    tensors = {
        "mask": mask,
        "advantages": every[:: case.group_size].contiguous(),
        "ids": torch.randint(0, max(case.head.vocab, 1), mask.shape, generator=generator),
        "noise": torch.randn(mask.shape, generator=generator) * 0.1,
    }
    rest = {name: x.to(device) for name, x in tensors.items()}
    return SimpleNamespace(**rest, rewards=None, spec=SPEC, softcap=case.head.softcap)


def with_old(leaves: tuple[torch.Tensor, ...], rest: SimpleNamespace, logp: Any) -> Inputs:
    """The inputs, their old log-probs [B, T] a little off the present ones."""
    rest.old = logp + rest.noise
    live = rest.mask & (peers.advantages_of(rest)[:, None] != 0)
    return Inputs(leaves, rest, float(live.float().mean()))


def draw_logprobs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    """Log-probs of whole groups: their advantages are a part of the work."""
    rest = draw_policy(case, generator, device)
    rest.rewards, rest.group_size = draw_rewards(case, generator).to(device), case.group_size
    logp = -torch.rand(rest.mask.shape, generator=generator).to(device) * 2
    return with_old((logp,), rest, logp)


def draw_logits(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    """Logits of T + 1 positions, as a model returns them: the last predicts nothing."""
    rest = draw_policy(case, generator, device)
    size = (case.n_sequences, case.length + 1, case.head.vocab)
    logits = torch.randn(size, device=device, dtype=case.dtype).mul_(2)
    inputs = with_old((logits,), rest, our_scores(logits, rest))
    # All positions, the last of them masked: no view whose gradient autograd would copy.
    rest.padded = [torch.nn.functional.pad(x, (0, 1)) for x in (rest.ids, rest.old, rest.mask)]
    return inputs


def draw_hidden(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    rest, (_, width, vocab, softcap) = draw_policy(case, generator, device), case.head
    hidden = torch.randn(*rest.mask.shape, width, device=device).to(case.dtype)
    weight = (torch.randn(vocab, width, device=device) * width**-0.5).to(case.dtype)
    logp = mk.token_logprobs_from_hidden(hidden, weight, rest.ids, softcap=softcap)
    return with_old((hidden, weight), rest, logp)


def exact_values(plain: Callable[..., torch.Tensor], inputs: Inputs) -> list[torch.Tensor]:
    """What plain PyTorch makes of the leaves in float64."""
    return [plain(*[x.double() for x in inputs.leaves], inputs.rest)]


def exact_gradients(plain: Callable[..., torch.Tensor], inputs: Inputs) -> list[torch.Tensor]:
    """Float64 gradients of the token mean, a sequence at a time: all logits would not fit.

    The first leaf is given as that sequence's part, a weight whole.
    """
    (first, *shared), rest = inputs.leaves, inputs.rest
    counts, advantages = rest.mask.sum(1), peers.advantages_of(rest, torch.float64)
    of_first = torch.zeros_like(first, dtype=torch.float32)
    of_shared = [torch.zeros_like(x, dtype=torch.float64) for x in shared]
    for i, count in enumerate(counts):
        row = slice(i, i + 1)
        one = {name: getattr(rest, name)[row] for name in ("mask", "ids", "old")}
        given = vars(rest) | one | {"rewards": None, "advantages": advantages[row]}
        leaves = [x.double().requires_grad_() for x in (first[row], *shared)]
        loss = plain(*leaves, SimpleNamespace(**given))
        found = torch.autograd.grad(loss * count / counts.sum(), leaves)
        of_first[row] = found[0]
        for total, part in zip(of_shared, found[1:], strict=True):
            total += part
    return [of_first, *of_shared]


class Counts(NamedTuple):
    """The least that a case costs: bytes moved, multiply-adds times two."""

    nbytes: int
    flops: int = 0


def least(case: Case, live: float) -> Counts:
    """Live rows read and what comes of all written; logits of a head are never in memory."""
    tokens, rows, size = case.tokens, round(live * case.tokens), case.dtype.itemsize
    _, width, vocab, _ = case.head
    if case.level in (MAPO, GRPO):  # a reward read, an advantage written
        return Counts(8 * tokens)
    if case.level == LOGPROBS:  # mask bytes; new and old log-probs of live tokens; gradients
        return Counts(tokens + 8 * rows + 4 * tokens)
    if case.level == SCORING:
        return Counts(tokens * vocab * size)
    if case.level == LOGITS:  # gradients of the position that predicts nothing, too
        return Counts((rows + tokens + case.n_sequences) * vocab * size)
    # Hidden states and weight, the gradients of both; three products of the live rows.
    return Counts((rows + vocab + tokens + vocab) * width * size, 6 * rows * width * vocab)


def ours_from_logprobs(logp, rest):
    given = {"rewards": rest.rewards, "group_size": rest.group_size, "mask": rest.mask}
    return mk.mapo_loss(logp, old_logprobs=rest.old, spec=SPEC, **given).loss


def ours_from_logits(logits, rest, inplace=False):
    ids, old, mask = rest.padded
    given = {"old_logprobs": old, "mask": mask, "advantages": rest.advantages}
    return mk.mapo_loss_from_logits(logits, ids, spec=SPEC, inplace=inplace, **given).loss


ours_in_place = partial(ours_from_logits, inplace=True)


def our_scores(logits, rest):
    return mk.token_logprobs(logits[:, :-1], rest.ids)


def ours_from_hidden(hidden, weight, rest):
    plan = mk.make_plan(advantages=rest.advantages, mask=rest.mask, spec=SPEC)
    return mk.mapo_loss_from_hidden(
        hidden, weight, rest.ids, old_logprobs=rest.old, plan=plan, softcap=rest.softcap
    ).loss


def _compiled(call: Callable[..., torch.Tensor]) -> Provider:
    return Provider(torch.compile(call), compiles=True)


def _level(draw: Any, exact: Any, ours: Any, plain: Any, others: dict[str, Provider]) -> Level:
    """A level that has ours, plain PyTorch, eager and compiled, and others."""
    known = {OURS: Provider(ours), PLAIN: Provider(plain), COMPILED: _compiled(plain)}
    return Level(draw, partial(exact, plain), known | others)


def _advantages(estimator: str, others: dict[str, Provider]) -> Level:
    def ours(rewards, rest):
        return mk.group_advantages(rewards, group_size=rest.group_size, estimator=estimator)

    def plain(rewards, rest):
        return peers.plain_advantages(rewards, rest.group_size, estimator)

    return _level(draw_groups, exact_values, ours, plain, others)


_trl = partial(Provider, package="trl")
_verl = partial(Provider, package="verl")
_liger = partial(Provider, package="liger_kernel")
_cce = partial(Provider, package="cut_cross_entropy")
LEVELS = {
    MAPO: _advantages("mapo", {"authors' loop": Provider(peers.looped_advantages, loops=True)}),
    GRPO: _advantages("grpo", {"verl": _verl(peers.verl_advantages, loops=True)}),
    LOGPROBS: _level(
        draw_logprobs,
        exact_gradients,
        ours_from_logprobs,
        peers.plain_from_logprobs,
        {
            "torch.compile of mapo_kernels": _compiled(ours_from_logprobs),
            "TRL": _trl(peers.trl_from_logprobs),
            "verl": _verl(peers.verl_from_logprobs),
        },
    ),
    LOGITS: _level(
        draw_logits,
        exact_gradients,
        ours_from_logits,
        peers.plain_from_logits,
        {
            "mapo_kernels in place": Provider(ours_in_place, consumes=True),
            "TRL": _trl(peers.trl_from_logits),
            "Liger": _liger(peers.liger_from_logits, needs_gpu=True),
        },
    ),
    SCORING: _level(
        draw_logits, exact_values, our_scores, peers.plain_scores, {"TRL": _trl(peers.trl_scores)}
    ),
    HIDDEN: _level(
        draw_hidden,
        exact_gradients,
        ours_from_hidden,
        peers.plain_from_hidden,
        {
            "TRL": _trl(peers.trl_from_hidden),
            "Liger": _liger(peers.liger_from_hidden, softcap=False),
            "verl": _verl(peers.verl_from_hidden, needs_gpu=True, softcap=False),
            "cut-cross-entropy": _cce(peers.cce_from_hidden, needs_gpu=True),
        },
    ),
}
