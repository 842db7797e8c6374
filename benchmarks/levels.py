"""The levels of the package: how their inputs are drawn, computed exactly, and counted."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import mapo_kernels as mk

from .cases import Case, answer_lengths, draw_kept, draw_rewards
from .names import GRPO, KEPT, LOGITS, LOGPROBS, MAPO, SCORING
from .providers import PLAIN, PROVIDERS, advantages_of, our_scores, plain_advantages

SPEC = mk.LossSpec(eps_low=0.2, eps_high=0.28)
# Of what is timed: who writes gradients over its logits finds other ratios there the next time, and
# half of the rows, being clipped, would not be read twice.
NEVER_CLIPPED = replace(SPEC, eps_low=1 - 1e-6, eps_high=1e6)
SEED = 20250923


class Inputs(NamedTuple):
    """`leaves` are differentiated; `rest` is what else a provider reads.

    `live` is the share of positions that change something.
    """

    leaves: tuple[Tensor, ...]
    rest: SimpleNamespace
    live: float = 1.0


def draw(case: Case, device: torch.device) -> Inputs:
    """The case's inputs, the same whenever they are drawn."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    rest = SimpleNamespace(
        group_size=case.group_size,
        estimator="grpo" if case.level == GRPO else "mapo",
        rewards=draw_rewards(case, generator).to(device),
        advantages=None,
        spec=SPEC,
        softcap=case.head.softcap,
        kept=None,
    )
    if case.level in (MAPO, GRPO):
        # verl reads these.
        rest.ids = (np.arange(case.n_sequences) // case.group_size).astype(object)
        rest.mask = torch.ones(case.n_sequences, 1, device=device)
        return Inputs((rest.rewards,), rest)
    mask = torch.arange(case.length) < answer_lengths(case, generator)[:, None]
    ids = torch.randint(0, max(case.head.vocab, 1), mask.shape, generator=generator)
    noise = torch.randn(mask.shape, generator=generator).to(device) * 0.1
    rest.mask, rest.ids = mask.to(device), ids.to(device)
    if case.level == KEPT:
        rest.kept = draw_kept(case, rest.ids, generator)
    if case.level != LOGPROBS and not case.from_rewards:
        # Sequences of different groups, as in the micro-batches of trainers that shuffle.
        whole = replace(case, n_sequences=case.n_sequences * case.group_size)
        every = plain_advantages(draw_rewards(whole, generator), rest)
        rest.advantages = every[:: case.group_size].contiguous().to(device)
    leaves, logp = _leaves(case, rest, device)
    rest.old = logp + noise
    # All positions of logits, the last of them masked: no view whose gradient would be copied.
    rest.padded = [torch.nn.functional.pad(x, (0, 1)) for x in (rest.ids, rest.old, rest.mask)]
    live = rest.mask & (advantages_of(rest)[:, None] != 0)
    return Inputs(leaves, rest, float(live.float().mean()))


def _leaves(case: Case, rest: SimpleNamespace, device: torch.device) -> tuple[Any, Tensor]:
    """What a loss is differentiated by, and its log-probs [B, T]."""
    n, length, (_, width, vocab, softcap) = case.n_sequences, case.length, case.head
    new: Any = {"device": device, "dtype": case.dtype}
    if case.level == LOGPROBS:
        logp = -2 * torch.rand(n, length, device=device)
        return (logp,), logp
    if case.level in (LOGITS, SCORING):
        # As a model returns them, of T + 1 positions: the last predicts nothing.
        logits = torch.empty(n, length + 1, vocab, **new).normal_(std=2)
        return (logits,), our_scores(logits, rest)
    hidden = torch.empty(n, length, width, **new).normal_()
    weight = torch.empty(vocab, width, **new).normal_(std=width**-0.5)
    given = {"softcap": softcap, "sampling_mask": rest.kept}
    return (hidden, weight), mk.token_logprobs_from_hidden(hidden, weight, rest.ids, **given)


def truth(case: Case, inputs: Inputs) -> list[Tensor]:
    """What plain PyTorch makes of it in float64: [values], or the leaves' gradients.

    Gradients of the token mean are computed a sequence at a time, as all logits would not fit. The
    first leaf is given as that sequence's part, a weight whole.
    """
    plain, rest, (first, *shared) = PROVIDERS[case.level][PLAIN].call, inputs.rest, inputs.leaves
    if case.direction == "score":
        return [plain(first.double(), rest)]
    counts, advantages = rest.mask.sum(1), advantages_of(rest, torch.float64)
    of_first = torch.zeros_like(first, dtype=torch.float32)
    of_shared = [torch.zeros_like(x, dtype=torch.float64) for x in shared]
    for i, count in enumerate(counts):
        row = slice(i, i + 1)
        one = {name: getattr(rest, name)[row] for name in ("mask", "ids", "old")}
        one["advantages"] = advantages[row]
        if case.level == KEPT:
            one["kept"] = rest.kept.select(slice(i * case.length, (i + 1) * case.length))
        leaves = [x.double().requires_grad_() for x in (first[row], *shared)]
        loss = plain(*leaves, SimpleNamespace(**vars(rest) | one))
        found = torch.autograd.grad(loss * count / counts.sum(), leaves)
        of_first[row] = found[0]
        for total, part in zip(of_shared, found[1:], strict=True):
            total += part
    return [of_first, *of_shared]


def least(case: Case, live: float) -> tuple[int, int]:
    """The bytes and the flops, multiply-adds times two, that a case costs at least.

    Live rows are read and what comes of all is written; logits of a head are never in memory.
    """
    tokens, rows, size = case.tokens, round(live * case.tokens), case.dtype.itemsize
    _, width, vocab, _ = case.head
    if case.level in (MAPO, GRPO):  # a reward read, an advantage written
        return 8 * tokens, 0
    if case.level == LOGPROBS:  # mask bytes; new and old log-probs of live tokens; gradients
        return tokens + 8 * rows + 4 * tokens, 0
    if case.level == SCORING:
        return tokens * vocab * size, 0
    if case.level == LOGITS:  # gradients of the position that predicts nothing, too
        return (rows + tokens + case.n_sequences) * vocab * size, 0
    if case.level == KEPT:  # three times a row for each column of rows that keep several
        read = round(rows * (case.kept if case.kept else 7.5)) if case.kept != 1 else 0
        return (3 * read + tokens + vocab) * width * size, 6 * read * width
    # Hidden states and weight, the gradients of both; three products of the live rows.
    return (rows + vocab + tokens + vocab) * width * size, 6 * rows * width * vocab
