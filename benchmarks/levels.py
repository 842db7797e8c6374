"""The levels of the package: how inputs are drawn, computed exactly, provided and counted."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

import mapo_kernels as mk

from . import peers, shapes
from .cases import GRPO, HIDDEN, LOGITS, LOGPROBS, MAPO, SCORING, Case

OURS = "mapo_kernels"
PLAIN = "plain PyTorch"
COMPILED = "torch.compile of plain PyTorch"
SPEC = mk.LossSpec(eps_low=0.2, eps_high=0.28)


@dataclass
class Inputs:
    """`leaves` are differentiated; `rest` is what else a provider reads.

    `live` is the share of positions that change something.
    """

    leaves: tuple[torch.Tensor, ...]
    rest: SimpleNamespace
    live: float


class Counts(NamedTuple):
    """The least that a case costs: bytes moved, multiply-adds times two, kernels launched."""

    nbytes: int
    flops: int = 0
    launches: int = 1


@dataclass(frozen=True)
class Provider:
    """Who computes it: `call(*leaves, rest)` returns the loss, or the values without a gradient."""

    call: Callable[..., torch.Tensor]
    package: str | None = None
    needs_gpu: bool = False
    compiles: bool = False
    # The leaves' contents are destroyed: every call needs fresh ones.
    consumes: bool = False
    # Why a case is beyond the provider, or None.
    beyond: Callable[[Case], str | None] = lambda case: None

    def unavailable(self, case: Case, device: torch.device) -> str | None:
        """Why it cannot be measured here, or None."""
        if self.package and importlib.util.find_spec(self.package) is None:
            return "not installed"
        if self.needs_gpu and device.type != "cuda":
            return "needs a GPU"
        if self.compiles and not case.compile:
            return "left out of this suite: compiling takes longer than the rest"
        return self.beyond(case)


@dataclass(frozen=True)
class Level:
    """One level; `truth` is in float64: gradients of the leaves, or [values] without a gradient."""

    make: Callable[[Case, torch.Generator, torch.device], Inputs]
    truth: Callable[[Inputs], list[torch.Tensor]]
    count: Callable[[Case, float, str], Counts]
    providers: Mapping[str, Provider]


def compiled(function: Callable[..., torch.Tensor]) -> Provider:
    return Provider(torch.compile(function), compiles=True)


# Group advantages.


def reward_inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    batch = case.batch
    rewards = shapes.rewards(batch, generator).to(device)
    ids = np.repeat(np.arange(batch.n_sequences // batch.group_size), batch.group_size)
    mask = torch.ones(batch.n_sequences, 1, device=device)
    rest = SimpleNamespace(group_size=batch.group_size, ids=ids.astype(object), mask=mask)
    return Inputs((rewards,), rest, 1.0)


def count_rewards(case: Case, live: float, direction: str) -> Counts:
    """A reward read, an advantage written."""
    return Counts(8 * case.batch.n_sequences)


def loops_over_groups(case: Case) -> str | None:
    if case.batch.n_sequences > 1 << 14:
        return "a Python loop over groups: minutes at this size"
    return None


def advantages_level(estimator: str, name: str, peer: Provider) -> Level:
    def ours(rewards, rest):
        return mk.group_advantages(rewards, group_size=rest.group_size, estimator=estimator)

    def plain(rewards, rest):
        return peers.plain_advantages(rewards, rest.group_size, estimator)

    return Level(
        reward_inputs,
        lambda inputs: [plain(inputs.leaves[0].double(), inputs.rest)],
        count_rewards,
        {OURS: Provider(ours), PLAIN: Provider(plain), COMPILED: compiled(plain), name: peer},
    )


# Losses. Their providers read the same `rest`: mask, ids and old log-probs [B, T], spec, and
# rewards or advantages [B].


def draw_policy(case: Case, generator: torch.Generator, device: torch.device) -> SimpleNamespace:
    """What a loss reads beside its leaves, of sequences that come from different groups.

    Trainers that shuffle have such micro-batches: of each group only one sequence is here.
    """
    batch, size = case.batch, (case.batch.n_sequences, case.batch.length)
    mask = torch.arange(batch.length) < shapes.lengths(batch, generator)[:, None]
    whole = shapes.Batch(
        batch.n_sequences * batch.group_size, 1, batch.group_size, no_signal=batch.no_signal
    )
    advantages = peers.plain_advantages(shapes.rewards(whole, generator), batch.group_size)
    tensors = {
        "mask": mask,
        "advantages": advantages.view(-1, batch.group_size)[:, 0].contiguous(),
        "ids": torch.randint(0, max(case.head.vocab, 1), size, generator=generator),
        "noise": torch.randn(size, generator=generator) * 0.1,
    }
    rest = SimpleNamespace(**{name: x.to(device) for name, x in tensors.items()})
    rest.rewards, rest.spec, rest.softcap = None, SPEC, case.head.softcap
    return rest


def live_share(mask: torch.Tensor, advantages: torch.Tensor) -> float:
    return float((mask & (advantages[:, None] != 0)).float().mean())


def logprob_inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    """Log-probs of whole groups: their advantages are a part of the work."""
    rest = draw_policy(case, generator, device)
    logp = -torch.rand(rest.mask.shape, generator=generator).to(device) * 2
    rest.old = logp + rest.noise
    rest.rewards = shapes.rewards(case.batch, generator).to(device)
    rest.group_size = case.batch.group_size
    return Inputs((logp,), rest, live_share(rest.mask, peers.advantages_of(rest, logp.dtype)))


def logprob_truth(inputs: Inputs) -> list[torch.Tensor]:
    leaf = inputs.leaves[0].double().requires_grad_()
    return list(torch.autograd.grad(peers.plain_from_logprobs(leaf, inputs.rest), [leaf]))


def count_logprobs(case: Case, live: float, direction: str) -> Counts:
    """Mask byte of every position, two float32 log-probs of live ones, gradients written."""
    tokens = case.batch.tokens
    written = 0 if direction == "forward" else 4 * tokens
    return Counts(tokens + round(8 * live * tokens) + written)


def ours_from_logprobs(logp, rest):
    given = {"rewards": rest.rewards, "group_size": rest.group_size, "mask": rest.mask}
    return mk.mapo_loss(logp, old_logprobs=rest.old, spec=SPEC, **given).loss


def sequences_truth(inputs: Inputs, logits_of: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
    """Float64 gradients of the token mean, a sequence at a time: all logits would not fit.

    `logits_of(*leaves)` are one sequence's; the first leaf is given as that sequence's part, a
    weight whole.
    """
    first, *shared = inputs.leaves
    rest, counts = inputs.rest, inputs.rest.mask.sum(1)
    of_first = torch.zeros_like(first, dtype=torch.float32)
    of_shared = [torch.zeros_like(x, dtype=torch.float64) for x in shared]
    for i in range(len(counts)):
        row = slice(i, i + 1)
        leaves = [x.double().requires_grad_() for x in (first[row], *shared)]
        logp = torch.log_softmax(logits_of(*leaves), -1)
        logp = logp.gather(-1, rest.ids[row, :, None]).squeeze(-1)
        loss = peers.plain_loss(logp, rest.advantages[row], rest.mask[row], SPEC, old=rest.old[row])
        found = torch.autograd.grad(loss * counts[i] / counts.sum(), leaves)
        of_first[row] = found[0]
        for total, part in zip(of_shared, found[1:], strict=True):
            total += part
    return [of_first, *of_shared]


def logit_inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    """Logits of T + 1 positions, as a model returns them: the last predicts nothing."""
    rest = draw_policy(case, generator, device)
    n_sequences, length = rest.mask.shape
    logits = torch.randn(n_sequences, length + 1, case.head.vocab, device=device, dtype=case.dtype)
    logits *= 2
    rest.old = mk.token_logprobs(logits[:, :-1], rest.ids) + rest.noise
    # All positions, the last of them masked: no view whose gradient autograd would copy.
    rest.padded = [torch.nn.functional.pad(x, (0, 1)) for x in (rest.ids, rest.old, rest.mask)]
    return Inputs((logits,), rest, live_share(rest.mask, rest.advantages))


def logit_truth(inputs: Inputs) -> list[torch.Tensor]:
    return sequences_truth(inputs, lambda logits: logits[:, :-1])


def score_truth(inputs: Inputs) -> list[torch.Tensor]:
    logits, ids = inputs.leaves[0][:, :-1], inputs.rest.ids
    rows = [
        torch.log_softmax(row.double(), -1).gather(-1, tokens[:, None])
        for row, tokens in zip(logits, ids, strict=True)
    ]
    return [torch.stack(rows).squeeze(-1)]


def count_logits(case: Case, live: float, direction: str) -> Counts:
    """Live rows read once; every row's gradient written, of dead ones zeros."""
    batch, row = case.batch, case.head.vocab * case.dtype.itemsize
    if direction == "score":
        return Counts(batch.tokens * row)
    written = 0 if direction == "forward" else (batch.tokens + batch.n_sequences) * row
    return Counts(round(live * batch.tokens) * row + written)


def ours_from_logits(logits, rest, inplace=False):
    ids, old, mask = rest.padded
    given = {"old_logprobs": old, "mask": mask, "advantages": rest.advantages}
    return mk.mapo_loss_from_logits(logits, ids, spec=SPEC, inplace=inplace, **given).loss


def ours_in_place(logits, rest):
    return ours_from_logits(logits, rest, inplace=True)


def our_scores(logits, rest):
    return mk.token_logprobs(logits[:, :-1], rest.ids)


def hidden_inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    rest = draw_policy(case, generator, device)
    width, vocab = case.head.width, case.head.vocab
    hidden = torch.randn(*rest.mask.shape, width, device=device).to(case.dtype)
    weight = (torch.randn(vocab, width, device=device) * width**-0.5).to(case.dtype)
    logp = mk.token_logprobs_from_hidden(hidden, weight, rest.ids, softcap=rest.softcap)
    rest.old = logp + rest.noise
    return Inputs((hidden, weight), rest, live_share(rest.mask, rest.advantages))


def hidden_truth(inputs: Inputs) -> list[torch.Tensor]:
    return sequences_truth(
        inputs, lambda hidden, weight: peers.plain_logits(hidden, weight, inputs.rest.softcap)
    )


def count_hidden(case: Case, live: float, direction: str) -> Counts:
    """One product of the live rows with the head forward, two backward; no logits in memory."""
    rows = round(live * case.batch.tokens)
    products = {"forward": 1, "backward": 2, "both": 3}[direction]
    width, vocab, size = case.head.width, case.head.vocab, case.dtype.itemsize
    inputs = (rows * width + vocab * width) * size
    outputs = 0 if direction == "forward" else (case.batch.tokens + vocab) * width * size
    return Counts(inputs + outputs, 2 * products * rows * width * vocab)


def ours_from_hidden(hidden, weight, rest):
    plan = mk.make_plan(advantages=rest.advantages, mask=rest.mask, spec=SPEC)
    return mk.mapo_loss_from_hidden(
        hidden, weight, rest.ids, old_logprobs=rest.old, plan=plan, softcap=rest.softcap
    ).loss


def without_softcap(case: Case) -> str | None:
    return "has no cap on logits" if case.head.softcap is not None else None


LEVELS = {
    MAPO: advantages_level(
        "mapo",
        "authors' loop",
        Provider(peers.looped_advantages, beyond=loops_over_groups),
    ),
    GRPO: advantages_level(
        "grpo", "verl", Provider(peers.verl_advantages, package="verl", beyond=loops_over_groups)
    ),
    LOGPROBS: Level(
        logprob_inputs,
        logprob_truth,
        count_logprobs,
        {
            OURS: Provider(ours_from_logprobs),
            "torch.compile of mapo_kernels": compiled(ours_from_logprobs),
            PLAIN: Provider(peers.plain_from_logprobs),
            COMPILED: compiled(peers.plain_from_logprobs),
            "TRL": Provider(peers.trl_from_logprobs, package="trl"),
            "verl": Provider(peers.verl_from_logprobs, package="verl"),
        },
    ),
    LOGITS: Level(
        logit_inputs,
        logit_truth,
        count_logits,
        {
            OURS: Provider(ours_from_logits),
            "mapo_kernels in place": Provider(ours_in_place, consumes=True),
            PLAIN: Provider(peers.plain_from_logits),
            COMPILED: compiled(peers.plain_from_logits),
            "TRL": Provider(peers.trl_from_logits, package="trl"),
            "Liger": Provider(peers.liger_from_logits, package="liger_kernel", needs_gpu=True),
        },
    ),
    SCORING: Level(
        logit_inputs,
        score_truth,
        count_logits,
        {
            OURS: Provider(our_scores),
            PLAIN: Provider(peers.plain_scores),
            COMPILED: compiled(peers.plain_scores),
            "TRL": Provider(peers.trl_scores, package="trl"),
        },
    ),
    HIDDEN: Level(
        hidden_inputs,
        hidden_truth,
        count_hidden,
        {
            OURS: Provider(ours_from_hidden),
            PLAIN: Provider(peers.plain_from_hidden),
            COMPILED: compiled(peers.plain_from_hidden),
            "TRL": Provider(peers.trl_from_hidden, package="trl"),
            "Liger": Provider(
                peers.liger_from_hidden, package="liger_kernel", beyond=without_softcap
            ),
            "verl": Provider(
                peers.verl_from_hidden, package="verl", needs_gpu=True, beyond=without_softcap
            ),
            "cut-cross-entropy": Provider(
                peers.cce_from_hidden, package="cut_cross_entropy", needs_gpu=True
            ),
        },
    ),
}
