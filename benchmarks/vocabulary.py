"""The levels with a vocabulary: the loss from logits and from hidden states, and scoring."""

from __future__ import annotations

import torch

import mapo_kernels as mk

from . import peers
from .case import COMPILED, OURS, PLAIN, Case, Counts, Inputs, Level, Provider
from .levels import ADVANTAGES, GRPO_ADVANTAGES, LOGPROBS, SPEC, compiled, draw_policy


def _sequences_truth(inputs: Inputs, loss_of) -> list[torch.Tensor]:
    """Float64 gradients of the token mean, a sequence at a time: all logits would not fit.

    `loss_of(leaves, row)` is the loss of one sequence by itself; leaves with a row for every
    sequence are given as that row, others (a weight) whole.
    """
    counts = inputs.rest.mask.sum(1)
    n_sequences = len(counts)
    found = [torch.zeros_like(x, dtype=torch.float32) for x in inputs.leaves]
    shared = [torch.zeros_like(x, dtype=torch.float64) for x in inputs.leaves[1:]]
    for row in range(n_sequences):
        leaves = [inputs.leaves[0][row : row + 1], *inputs.leaves[1:]]
        leaves = [x.double().requires_grad_() for x in leaves]
        share = counts[row] / counts.sum()
        first, *rest = torch.autograd.grad(loss_of(leaves, slice(row, row + 1)) * share, leaves)
        found[0][row] = first[0]
        for total, part in zip(shared, rest, strict=True):
            total += part
    return [found[0], *shared]


def _plain_row(inputs: Inputs, logits: torch.Tensor, row: slice) -> torch.Tensor:
    rest = inputs.rest
    logp = torch.log_softmax(logits, -1).gather(-1, rest.ids[row, :, None]).squeeze(-1)
    return peers.plain_loss(logp, rest.advantages[row], rest.mask[row], SPEC, old=rest.old[row])


def _logit_inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    """Logits of T + 1 positions, as a model returns them: the last predicts nothing."""
    rest = draw_policy(case, generator, device)
    n_sequences, length = rest.mask.shape
    logits = torch.randn(n_sequences, length + 1, case.head.vocab, device=device, dtype=case.dtype)
    logits *= 2
    rest.old = mk.token_logprobs(logits[:, :-1], rest.ids) + rest.noise
    # All positions, the last of them masked: no view whose gradient autograd would copy.
    rest.padded = [torch.nn.functional.pad(x, (0, 1)) for x in (rest.ids, rest.old, rest.mask)]
    return Inputs(case, (logits,), rest, rest.live)


def _logit_truth(inputs: Inputs) -> list[torch.Tensor]:
    if "score" in inputs.case.directions:
        logits = inputs.leaves[0][:, :-1].double()
        return [peers.plain_token_logprobs(logits, inputs.rest.ids)]
    return _sequences_truth(inputs, lambda leaves, row: _plain_row(inputs, leaves[0][:, :-1], row))


def _ours_from_logits(logits, rest, inplace=False):
    ids, old, mask = rest.padded
    given = {"old_logprobs": old, "mask": mask, "advantages": rest.advantages}
    return mk.mapo_loss_from_logits(logits, ids, spec=SPEC, inplace=inplace, **given).loss


def _plain_from_logits(logits, rest):
    logp = peers.plain_token_logprobs(logits[:, :-1], rest.ids)
    return peers.plain_loss(logp, rest.advantages, rest.mask, SPEC, old=rest.old)


def _trl_from_logits(logits, rest):
    logp, entropy = peers.trl_token_logprobs(logits[:, :-1], rest.ids, rest.mask)
    return peers.trl_loss(logp, rest.advantages, rest.mask, SPEC, rest.old, entropy)


def _liger_from_logits(logits, rest):
    return peers.liger_loss(logits, rest.ids, rest.advantages, rest.mask, SPEC, rest.old)


def count_logits(case: Case, live: float, direction: str) -> Counts:
    """Live rows read once; every row's gradient written, of dead ones zeros."""
    batch, size = case.batch, case.dtype.itemsize
    if direction == "score":
        return Counts(batch.tokens * case.head.vocab * size)
    read = round(live * batch.tokens) * case.head.vocab * size
    rows = batch.tokens + batch.n_sequences
    written = 0 if direction == "forward" else rows * case.head.vocab * size
    return Counts(read + written)


LOGITS = Level(
    "logits",
    _logit_inputs,
    _logit_truth,
    {
        OURS: Provider(_ours_from_logits),
        "mapo_kernels in place": Provider(
            lambda logits, rest: _ours_from_logits(logits, rest, inplace=True), consumes=True
        ),
        PLAIN: Provider(_plain_from_logits),
        COMPILED: compiled(_plain_from_logits),
        "TRL": Provider(_trl_from_logits, package="trl"),
        "Liger": Provider(_liger_from_logits, package="liger_kernel", needs_gpu=True),
    },
    count_logits,
)


def _plain_scores(logits, rest):
    return peers.plain_token_logprobs(logits[:, :-1], rest.ids)


SCORING = Level(
    "scoring logits",
    _logit_inputs,
    _logit_truth,
    {
        OURS: Provider(lambda logits, rest: mk.token_logprobs(logits[:, :-1], rest.ids)),
        PLAIN: Provider(_plain_scores),
        COMPILED: compiled(_plain_scores),
        "TRL": Provider(
            lambda logits, rest: peers.trl_token_logprobs(
                logits[:, :-1], rest.ids, torch.ones_like(rest.mask)
            )[0],
            package="trl",
        ),
    },
    count_logits,
)


def _hidden_inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    rest = draw_policy(case, generator, device)
    width, vocab = case.head.width, case.head.vocab
    hidden = torch.randn(*rest.mask.shape, width, device=device).to(case.dtype)
    weight = (torch.randn(vocab, width, device=device) * width**-0.5).to(case.dtype)
    rest.softcap = case.head.softcap
    logp = mk.token_logprobs_from_hidden(hidden, weight, rest.ids, softcap=rest.softcap)
    rest.old = logp + rest.noise
    return Inputs(case, (hidden, weight), rest, rest.live)


def _logits_of(hidden, weight, softcap):
    logits = torch.nn.functional.linear(hidden, weight)
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _hidden_truth(inputs: Inputs) -> list[torch.Tensor]:
    return _sequences_truth(
        inputs,
        lambda leaves, row: _plain_row(
            inputs, _logits_of(leaves[0], leaves[1], inputs.rest.softcap), row
        ),
    )


def _ours_from_hidden(hidden, weight, rest):
    plan = mk.make_plan(advantages=rest.advantages, mask=rest.mask, spec=SPEC)
    return mk.mapo_loss_from_hidden(
        hidden, weight, rest.ids, old_logprobs=rest.old, plan=plan, softcap=rest.softcap
    ).loss


def _plain_from_hidden(hidden, weight, rest):
    logp = peers.plain_token_logprobs(_logits_of(hidden, weight, rest.softcap), rest.ids)
    return peers.plain_loss(logp, rest.advantages, rest.mask, SPEC, old=rest.old)


def _trl_from_hidden(hidden, weight, rest):
    logp, entropy = peers.trl_hidden_logprobs(
        hidden, weight, rest.ids, rest.mask, softcap=rest.softcap
    )
    return peers.trl_loss(logp, rest.advantages, rest.mask, SPEC, rest.old, entropy.detach())


def _verl_from_hidden(hidden, weight, rest):
    logp = peers.verl_hidden_logprobs(hidden, weight, rest.ids)
    return peers.plain_loss(logp, rest.advantages, rest.mask, SPEC, old=rest.old)


def _cce_from_hidden(hidden, weight, rest):
    logp = peers.cce_hidden_logprobs(hidden, weight, rest.ids, rest.mask, rest.softcap)
    return peers.plain_loss(logp, rest.advantages, rest.mask, SPEC, old=rest.old)


def _liger_from_hidden(hidden, weight, rest):
    given = rest.ids, rest.advantages, rest.mask, SPEC, rest.old
    return peers.liger_hidden_loss(hidden, weight, *given)


def _softcapped(case: Case) -> str | None:
    return "has no cap on logits" if case.head.softcap is not None else None


def count_hidden(case: Case, live: float, direction: str) -> Counts:
    """One product of the live rows with the head forward, two backward; no logits in memory."""
    rows = round(live * case.batch.tokens)
    products = {"forward": 1, "backward": 2, "both": 3}[direction]
    width, vocab, size = case.head.width, case.head.vocab, case.dtype.itemsize
    inputs = (rows * width + vocab * width) * size
    outputs = 0 if direction == "forward" else (case.batch.tokens + vocab) * width * size
    return Counts(inputs + outputs, 2 * products * rows * width * vocab)


HIDDEN = Level(
    "hidden states",
    _hidden_inputs,
    _hidden_truth,
    {
        OURS: Provider(_ours_from_hidden),
        PLAIN: Provider(_plain_from_hidden),
        COMPILED: compiled(_plain_from_hidden),
        "TRL": Provider(_trl_from_hidden, package="trl"),
        "Liger": Provider(_liger_from_hidden, package="liger_kernel", beyond=_softcapped),
        "verl": Provider(_verl_from_hidden, package="verl", needs_gpu=True, beyond=_softcapped),
        "cut-cross-entropy": Provider(
            _cce_from_hidden, package="cut_cross_entropy", needs_gpu=True
        ),
    },
    count_hidden,
)

ALL = {x.name: x for x in (ADVANTAGES, GRPO_ADVANTAGES, LOGPROBS, LOGITS, SCORING, HIDDEN)}
