"""Scoring: log-probs, entropies and their gradients against the oracle, on rows of every kind."""

import math
from dataclasses import dataclass, field

import torch
from batches import Numbers, constants, draw_kept, garbage
from calls import TOLERANCES, assert_within
from cases import Rows, lists_of
from hypothesis import strategies as st
from oracle import leaf_scales, leaves_of, logits_gradient_scale, logits_of, row_scales
from strategies import NARROW, input_dtypes, one_of, seeds

import mapo_kernels as mk
import reference
from mapo_kernels.config import override


@dataclass
class Scoring:
    """A scoring call: its rows as [N, 1, ...] with a temperature each, and how it is made.

    Attributes:
        rows: canonical rows; garbage where masked.
        live: [N, 1].
        shape: of the token ids: [B, T], or [N] if packed.
        temperature: as the call takes it.
        mask: whether the call has a mask.
        upstream: [2, N, 1] float64, gradients by log-probs and by entropies.
        constants: package constants that are shrunk.
        options: of the hidden level.
    """

    rows: Rows
    live: torch.Tensor
    shape: tuple[int, ...]
    temperature: float | torch.Tensor
    mask: bool
    upstream: torch.Tensor
    constants: dict
    options: dict = field(default_factory=dict)

    def given(self, device):
        """Positional and keyword arguments, the logits or hidden states first."""
        rows, shape = self.rows, self.shape
        ids = rows.ids.view(shape).to(device)
        temperature = self.temperature
        if isinstance(temperature, torch.Tensor):
            temperature = temperature.to(device)
        named = {"temperature": temperature, "mask": None, **self.options}
        if rows.kept is not None:
            kept = lists_of(rows.kept)
            named["sampling_mask"] = mk.SamplingMask.from_lists(kept, device)
        if self.mask:
            named["mask"] = self.live.view(shape).to(device)
        if rows.logits is not None:
            return (rows.logits.view(*shape, rows.vocab).to(device), ids), named
        named |= {"softcap": rows.softcap, "logit_scale": rows.logit_scale}
        named["bias"] = None if rows.bias is None else rows.bias.to(device)
        hidden = rows.hidden.view(*shape, rows.hidden.shape[-1]).to(device)
        return (hidden, rows.weight.to(device), ids), named


# Rows as [B, T] or [N], some of them none.
SHAPES = ((2, 3), (9,), (1, 1), (4, 5), (1,), (3, 1), (1, 7), (4,), (0,), (3, 0))


# Of the gradients by log-probs, and by entropies.
WEIGHTS = st.sampled_from(((1.0, 0.0), (0.0, 1.0), (1.0, 0.3)))

KINDS = ("plain", "offset", "certain", "forbidden", "lost", "abyss", "nan", "infinite", "no id")


def fill_row(x, token, kind, numbers):
    """Make a row of logits [V] one of a kind, in place; its token id, which may be none."""
    vocab = len(x)
    other = int(numbers.integers(vocab))
    if kind == "offset":
        x += float(numbers.normal(1).sign()) * 3e3
    elif kind == "certain":
        x[other if numbers.uniform(1) < 0.5 else token] += 40.0
    elif kind == "forbidden":
        x[(numbers.uniform(vocab) < 0.5) & (torch.arange(vocab) != token)] = -math.inf
    elif kind == "lost" and vocab > 1:
        x[token] = -math.inf
    elif kind == "abyss":
        x *= 1e34
        x -= 1e36
    elif kind == "nan":
        x[other] = math.nan
    elif kind == "infinite":
        x[other] = math.inf
    elif kind == "no id":
        return [-1, vocab, 127][int(numbers.integers(3))] if vocab < 127 else -1
    return token


@st.composite
def scorings(draw, device, hidden):
    """Scoring calls of either level."""
    shape, dtype = draw(st.sampled_from(SHAPES)), draw(input_dtypes(device))
    vocab, numbers = draw(st.integers(1, 70) | one_of(600)), Numbers(draw(seeds))
    n = math.prod(shape)
    ids = numbers.integers(vocab, n, 1)
    temperature = draw(one_of(1.0, 0.3, 1.7, 1))
    of_rows = temperature
    if draw(st.booleans()):
        kept = draw(one_of(torch.float32, dtype, *NARROW))
        temperature = (numbers.uniform(shape[0]) * 1.5 + 0.4).to(kept)
        of_rows = temperature.repeat_interleave(shape[1]) if len(shape) == 2 else temperature
    live = torch.ones(n, 1, dtype=torch.bool)
    has_mask = draw(st.booleans())
    if has_mask:
        live = numbers.uniform(n, 1) < draw(one_of(0.5, 1.0, 0.0))
    rows, options = Rows(ids, of_rows), {}
    if hidden:
        width = draw(st.integers(1, 9))
        rows.hidden = numbers.normal(n, 1, width).to(dtype)
        rows.weight = numbers.normal(vocab, width).to(dtype)
        rows.bias = numbers.normal(vocab).to(dtype) if draw(st.booleans()) else None
        rows.softcap = draw(one_of(None, 4.0, 30))
        rows.logit_scale = draw(one_of(1.0, 1, 0.6))
        options["chunk_rows"] = draw(one_of(None, 1, 3))
        rows.hidden = garbage(rows.hidden, live, numbers.generator)
    else:
        x = numbers.normal(n, 1, vocab) * draw(one_of(2.0, 0.1, 6.0))
        kinds = [draw(st.sampled_from(KINDS)) for _ in range(n)]
        for i, kind in enumerate(kinds):
            # Numbers of float16 end at 65504.
            if kind != "abyss" or dtype != torch.float16:
                ids[i, 0] = fill_row(x[i, 0], int(ids[i, 0]), kind, numbers)
        rows.logits = garbage(x.to(dtype), live, numbers.generator)
    rows.kept = draw_kept(draw, ids, vocab, numbers)
    rows.ids = garbage(ids.to(draw(one_of(torch.int64, torch.int32))), live, numbers.generator)
    upstream = numbers.normal(2, n, 1).double() * torch.tensor(draw(WEIGHTS)).view(2, 1, 1)
    return Scoring(rows, live, shape, temperature, has_mask, upstream, draw(constants()), options)


def check_scores(scoring, device):
    rows, live = scoring.rows, scoring.live
    given, named = scoring.given(device)
    call = mk.token_logprobs if rows.logits is not None else mk.token_logprobs_from_hidden
    with override(scoring.constants):
        logp, entropy = (x.cpu() for x in call(*given, return_entropy=True, **named))
        alone = call(*given, **named).cpu()
    assert torch.equal(alone.nan_to_num(7.0), logp.nan_to_num(7.0))
    dtype = torch.float64 if given[0].dtype == torch.float64 else torch.float32
    assert logp.dtype == entropy.dtype == dtype and logp.shape == scoring.shape
    leaves = leaves_of(rows)
    x = logits_of(rows, live, leaves)
    given = (rows.ids, rows.temperature, live, lists_of(rows.kept))
    exact, exact_entropy = reference.token_logprobs(x, *given)
    scales = row_scales(rows, x, leaves, exact)
    logp, entropy = logp.view(-1, 1), entropy.view(-1, 1)
    tolerance = TOLERANCES[dtype]
    # Near certainty a log-prob is exact to its last digits; the reference rounds it to 1e-15.
    scale = scales.logp.where(live, 0.0) + 1e-14 / tolerance
    assert_within("log-prob", logp, exact, scale, tolerance)
    known = (rows.ids >= 0) & (rows.ids < rows.vocab) | ~live
    scale = scales.entropy.where(live, 0.0)[known]
    assert_within("entropy", entropy[known], exact_entropy[known], scale, tolerance)
    assert not (entropy < 0).any()


def check_gradients(scoring, device):
    rows, live = scoring.rows, scoring.live
    given, named = scoring.given(device)
    call = mk.token_logprobs if rows.logits is not None else mk.token_logprobs_from_hidden
    leaves = {k: x.requires_grad_() for k, x in leaves_of(rows).items()}
    x = logits_of(rows, live, leaves)
    logp, entropy = reference.token_logprobs(
        x, rows.ids, rows.temperature, live, lists_of(rows.kept)
    )
    constants = {k: v.detach() for k, v in leaves.items()}
    scales = row_scales(rows, x, constants, logp)
    # Of rows that have no log-prob, or none that is finite, nobody wants a gradient.
    known = (logp.isfinite() & entropy.isfinite()).detach()
    upstream = scoring.upstream.where(known & live, 0.0)
    exact = torch.autograd.grad((logp, entropy), list(leaves.values()), list(upstream))
    mine = {"token_ids": given[-1], **named, "return_entropy": True}
    inputs = list(given[:-1])
    inputs += [] if (bias := mine.pop("bias", None)) is None else [bias]
    inputs = [v.to(device, copy=True).requires_grad_() for v in inputs]
    names = ("hidden", "lm_head_weight", "bias") if rows.hidden is not None else ("logits",)
    with override(scoring.constants):
        found = call(**dict(zip(names, inputs, strict=False)), **mine)
        # Where a token is masked there may be anything.
        grads = [u.where(live, torch.nan).view(scoring.shape).to(found[0]) for u in upstream]
        grads = torch.autograd.grad(found, inputs, grads)
    at_logits = logits_gradient_scale(rows, scales, *upstream.abs())
    at_logits = torch.where((live & known)[..., None], at_logits, 0.0)
    allowed = leaf_scales(rows, at_logits, constants, live)
    # Rows without an id, or with NaN in them, are NaN as their losses are.
    finite = x.detach().isfinite().all(-1) & known
    for name, grad, expected in zip(leaves, grads, exact, strict=True):
        grad = grad.cpu().view(expected.shape)
        scale, tolerance = allowed[name], TOLERANCES[found[0].dtype]
        if rows.logits is not None:
            grad, expected, scale = grad[finite], expected[finite], scale[finite]
        assert_within(f"gradient of {name}", grad, expected, scale, tolerance, upstream=1.0)


def test_gradients_of_token_logprobs(device, search):
    search(lambda x: check_gradients(x, device), scorings(device, hidden=False), examples=30)


def test_gradients_of_token_logprobs_from_hidden(device, search):
    search(lambda x: check_gradients(x, device), scorings(device, hidden=True), examples=20)


def test_token_logprobs(device, search):
    search(lambda x: check_scores(x, device), scorings(device, hidden=False), examples=80)


def test_token_logprobs_from_hidden(device, search):
    search(lambda x: check_scores(x, device), scorings(device, hidden=True), examples=60)
