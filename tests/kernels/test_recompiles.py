"""torch.compile makes two graphs of the eager backend: a static one, then one for every size.

The static one is of the sizes that came first. Torch gives sizes of 1 graphs of their own, in every
program: here also a batch of one group, two sequences with `group_ids`, and a packed batch of as
many tokens as sequences. Sizes below avoid them.
"""

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

import mapo_kernels as mk

GROUP = 2
VOCAB = 11
SIZES = list(zip(range(4, 44, 2), range(23, 3, -1), strict=True))
# What varies from call to call: sequences, tokens of a sequence, or both.
VARIED = {
    "sequences": [(n, 9) for n, _ in SIZES],
    "tokens": [(6, t) for _, t in SIZES],
    "both": SIZES,
}
# Packed batches have a number of tokens and one of sequences, padded ones as many rows a sequence.
LAYOUTS = [pytest.param("padded", marks=pytest.mark.slow), "packed"]
TOKEN = mk.LossSpec(aggregation="seq-mean-token-mean")
NORM = mk.LossSpec(aggregation="seq-mean-token-sum-norm")
SEQUENCE = mk.LossSpec(importance_level="sequence")


@pytest.fixture(autouse=True)
def eager():
    mk.set_backend("eager")
    torch.compiler.reset()
    yield
    mk.set_backend(None)
    torch.compiler.reset()


def with_gradient(found, leaf):
    """What a step found, its loss first, and the gradient of that."""
    if not found[0].requires_grad:
        return found
    return found[0].detach(), *found[1:], torch.autograd.grad(found[0], leaf)[0]


def check_two_graphs(function, calls):
    """Compile `function` no more than twice for all calls; each equals what is not compiled."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for given in calls:
        expected, actual = (with_gradient(f(*given), given[0]) for f in (function, compiled))
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
        assert len(graphs) <= 2


def tokens(n, length, packed):
    """Boundaries (None if padded) and log-probs, old log-probs and mask."""
    bounds = None
    shape = (n, length)
    if packed:
        lengths = torch.randint(1, length + 1, (n,))
        bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        shape = (int(bounds[-1]),)
    logp = (-torch.rand(shape)).requires_grad_()
    return bounds, logp, -torch.rand(shape), torch.rand(shape) < 0.8


def source(name, n, tokens=()):
    """Where advantages of `n` sequences come from; `tokens` is the shape of theirs."""
    rewards = torch.rand(n)
    return {
        "advantages": {"advantages": torch.randn(n)},
        "per_token": {"advantages": torch.randn(tokens), "normalizer": n + 0.5},
        "group_size": {"rewards": rewards, "group_size": GROUP},
        "group_ids": {"rewards": rewards, "group_ids": torch.randint(0, 3, (n,))},
        "success": {"rewards": rewards, "group_size": GROUP, "success": rewards > 0.5},
    }[name]


@pytest.mark.parametrize(
    ("where", "layout", "varied", "spec"),
    [
        pytest.param("advantages", "padded", "sequences", TOKEN, marks=pytest.mark.slow),
        ("group_size", "padded", "tokens", NORM),
        pytest.param("plan", "padded", "both", SEQUENCE, marks=pytest.mark.slow),
        ("plan", "packed", "both", SEQUENCE),
        pytest.param("per_token", "packed", "both", mk.LossSpec(), marks=pytest.mark.slow),
    ],
)
def test_mapo_loss(where, layout, varied, spec):
    def step(logp, old, given):
        out = mk.mapo_loss(logp * 1.5, old_logprobs=old, spec=spec, **given)
        return out.loss, dict(out.metrics), out.advantages

    def calls():
        for n, length in VARIED[varied]:
            bounds, logp, old, mask = tokens(n, length, layout == "packed")
            given = {"mask": mask, "cu_seqlens": bounds}
            given |= source("success" if where == "plan" else where, n, logp.shape)
            if where == "plan":
                given = {"plan": mk.make_plan(spec=spec, **given)}
            yield logp, old, given

    check_two_graphs(step, calls())


@pytest.mark.parametrize("where", [pytest.param("success", marks=pytest.mark.slow), "group_ids"])
def test_group_advantages(where):
    def step(given):
        return (mk.group_advantages(**given),)

    check_two_graphs(step, ((source(where, n),) for n, _ in SIZES))


def rows(n, length, packed):
    """What `tokens` makes, and logits and token ids."""
    bounds, logp, old, mask = tokens(n, length, packed)
    logits = torch.randn(*logp.shape, VOCAB, requires_grad=True)
    return logits, torch.randint(0, VOCAB, logp.shape), old, mask, bounds


@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_logits(layout):
    def step(logits, ids, old, given):
        out = mk.mapo_loss_from_logits(logits * 1.5, ids, old_logprobs=old, **given)
        return out.loss, dict(out.metrics), out.advantages

    def calls():
        for n, length in SIZES:
            logits, ids, old, mask, bounds = rows(n, length, layout == "packed")
            given = {"mask": mask, "cu_seqlens": bounds} | source("advantages", n)
            yield logits, ids, old, given

    check_two_graphs(step, calls())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_token_logprobs(layout):
    def step(logits, ids, mask):
        return mk.token_logprobs(logits, ids, mask=mask, temperature=0.7, return_entropy=True)

    def calls():
        for n, length in SIZES:
            logits, ids, _, mask, _ = rows(n, length, layout == "packed")
            yield logits.detach(), ids, mask

    check_two_graphs(step, calls())
