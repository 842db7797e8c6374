"""torch.compile makes two graphs of the eager backend: a static one, then one for every size.

The static one is of the sizes that came first. Only a dimension of 1 has graphs of its own, which
is torch's rule for every program, and so sizes here start at 2.
"""

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

import mapo_kernels as mk

GROUP = 2
VOCAB = 11
SIZES = [(n, t) for n, t in zip(range(4, 44, 2), range(23, 3, -1), strict=True)]
# What varies from call to call: sequences, tokens of a sequence, or both.
VARIED = {
    "sequences": [(n, 9) for n, _ in SIZES],
    "tokens": [(6, t) for _, t in SIZES],
    "both": SIZES,
}
SPECS = {
    "token": mk.LossSpec(aggregation="seq-mean-token-mean"),
    "norm": mk.LossSpec(aggregation="seq-mean-token-sum-norm", max_tokens=100),
    "sequence": mk.LossSpec(importance_level="sequence", beta=0.1),
}


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
    """Boundaries (None if padded) and log-probs, old log-probs, reference and mask."""
    bounds = None
    shape = (n, length)
    if packed:
        lengths = torch.randint(1, length + 1, (n,))
        bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        shape = (int(bounds[-1]),)
    logp = (-torch.rand(shape)).requires_grad_()
    return bounds, logp, -torch.rand(shape), -torch.rand(shape), torch.rand(shape) < 0.8


def source(name, n):
    """Where advantages come from."""
    rewards = torch.rand(n)
    return {
        "advantages": {"advantages": torch.randn(n)},
        "group_size": {"rewards": rewards, "group_size": GROUP},
        "group_ids": {"rewards": rewards, "group_ids": torch.randint(0, 3, (n,))},
        "success": {"rewards": rewards, "group_size": GROUP, "success": rewards > 0.5},
    }[name]


@pytest.mark.parametrize("varied", VARIED)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("where", ["advantages", "group_size", "group_ids", "success", "plan"])
@pytest.mark.parametrize("spec", SPECS)
def test_mapo_loss(spec, where, packed, varied):
    def step(logp, old, ref, mask, bounds, given):
        if where != "plan":
            given = dict(given, mask=mask, cu_seqlens=bounds)
        out = mk.mapo_loss(
            logp * 1.5, old_logprobs=old, ref_logprobs=ref, spec=SPECS[spec], **given
        )
        return out.loss, dict(out.metrics), out.advantages

    def calls():
        for n, length in VARIED[varied]:
            bounds, logp, old, ref, mask = tokens(n, length, packed)
            if where == "plan":
                given = source("group_size", n)
                plan = mk.make_plan(mask=mask, cu_seqlens=bounds, spec=SPECS[spec], **given)
                given = {"plan": plan}
            else:
                given = source(where, n)
            yield logp, old, ref, mask, bounds, given

    check_two_graphs(step, calls())


@pytest.mark.parametrize("where", ["group_size", "group_ids", "success"])
def test_group_advantages(where):
    def step(given):
        return (mk.group_advantages(**given),)

    check_two_graphs(step, ((source(where, n),) for n in range(4, 44, 2)))


@pytest.mark.parametrize("varied", VARIED)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("where", ["advantages", "group_size", "group_ids"])
@pytest.mark.parametrize("spec", SPECS)
def test_from_logits(spec, where, packed, varied):
    def step(logits, ids, old, ref, mask, bounds, given):
        scored = mk.token_logprobs(logits, ids, mask=mask, temperature=0.7)
        out = mk.mapo_loss_from_logits(
            logits * 1.5,
            ids,
            old_logprobs=old,
            ref_logprobs=ref,
            mask=mask,
            cu_seqlens=bounds,
            spec=SPECS[spec],
            **given,
        )
        return out.loss, dict(out.metrics), out.advantages, scored

    def calls():
        for n, length in VARIED[varied]:
            bounds, logp, old, ref, mask = tokens(n, length, packed)
            logits = torch.randn(*logp.shape, VOCAB, requires_grad=True)
            ids = torch.randint(0, VOCAB, logp.shape)
            yield logits, ids, old, ref, mask, bounds, source(where, n)

    check_two_graphs(step, calls())
