"""The backend `inductor` has the numbers of the eager backend, from a few graphs per kind of call.

Most tests trace and run the graphs without compiling them to machine code, which takes long.
"""

import itertools
from functools import partial

import pytest
import torch
from support import make_batch, make_logits, pack
from torch._dynamo.backends.debugging import aot_eager

import mapo_kernels as mk
from mapo_kernels import doctor
from mapo_kernels.eager import compiled

SPECS = {
    "clip": mk.LossSpec(),
    "sequence, KL": mk.LossSpec(importance_level="sequence", beta=0.1),
    "cispo": mk.LossSpec(objective="cispo", aggregation="seq-mean-token-mean"),
}


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are made, which run without being compiled."""
    made = []

    def engine(graph, inputs):
        made.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(compiled, "ENGINE", engine)
    monkeypatch.setattr(compiled, "_compiled", {})
    torch.compiler.reset()
    return made


@pytest.fixture
def really_compiled(monkeypatch):
    monkeypatch.setattr(compiled, "_compiled", {})
    torch.compiler.reset()


def on(backend, function):
    """What `function` returns on a backend."""
    mk.set_backend(backend)
    try:
        return function()
    finally:
        mk.set_backend(None)


def assert_same(function, rtol=1e-5):
    expected, actual = on("eager", function), on("inductor", function)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-6, equal_nan=True)


def token_loss(spec, layout, n=6, length=9, source="advantages", **specs):
    torch.manual_seed(n)
    batch = make_batch(n, length, torch.float32)
    names = ("logp", "old", "mask", "ref")
    some, bounds = {name: batch[name] for name in names}, None
    if layout == "packed":
        some, bounds, _ = pack(some, [length] * n)
    leaf = some["logp"].detach().requires_grad_()
    rewards = torch.rand(n).round()
    given = {
        "advantages": {"advantages": torch.randn(n)},
        "rewards": {"rewards": rewards, "group_size": 2},
        "ids": {"rewards": rewards, "group_ids": torch.arange(n) % 3},
    }[source]
    out = mk.mapo_loss(
        leaf,
        old_logprobs=some["old"],
        ref_logprobs=some["ref"] if spec.beta else None,
        mask=some["mask"],
        cu_seqlens=bounds,
        spec=spec,
        **specs,
        **given,
    )
    (grad,) = torch.autograd.grad(out.loss * 3, leaf)
    return {"loss": out.loss.detach(), "grad": grad, "own": out.advantages, **out.metrics}


# Each value once: a combination compiles for seconds, and the rest of the suite has them all.
QUICK = (
    ("sequence, KL", "padded", "rewards"),
    ("cispo", "packed", "ids"),
    ("clip", "padded", "advantages"),
)
COMBINATIONS = [
    pytest.param(*x, marks=[] if x in QUICK else [pytest.mark.slow])
    for x in itertools.product(SPECS, ("padded", "packed"), ("advantages", "rewards", "ids"))
]


@pytest.mark.parametrize(("name", "layout", "source"), COMBINATIONS)
def test_log_probs(name, layout, source, graphs):
    assert_same(lambda: token_loss(SPECS[name], layout, source=source))
    assert graphs


@pytest.mark.parametrize(
    "rewards",
    [
        pytest.param([1, 0, 0.5, 1], marks=pytest.mark.slow),
        [1, float("nan"), 0, 1],
        pytest.param([1e25, 0, -1e25, 1], marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("estimator", ["mapo", pytest.param("grpo", marks=pytest.mark.slow)])
def test_advantages(estimator, rewards, graphs):
    rewards = torch.tensor(rewards * 3)
    for stats in (False, True):
        assert_same(
            lambda stats=stats: mk.group_advantages(
                rewards, group_size=4, estimator=estimator, return_stats=stats
            )
        )
    assert graphs


@pytest.mark.parametrize("level", [pytest.param("token", marks=pytest.mark.slow), "sequence"])
def test_logits_and_hidden_states(level, graphs):
    batch = make_logits(4, 3, 50, torch.float32)
    spec = mk.LossSpec(importance_level=level, entropy_coef=0.1)
    hidden, weight = torch.randn(4, 3, 8), torch.randn(50, 8)
    given = {"advantages": torch.randn(4), "mask": batch["mask"], "old_logprobs": batch["old"]}

    def of_logits():
        leaf = batch["logits"].detach().requires_grad_()
        out = mk.mapo_loss_from_logits(leaf, batch["ids"], spec=spec, **given)
        return out.loss.detach(), dict(out.metrics), torch.autograd.grad(out.loss, leaf)

    def of_hidden():
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        out = mk.mapo_loss_from_hidden(*leaves, batch["ids"], spec=spec, **given)
        return out.loss.detach(), dict(out.metrics), torch.autograd.grad(out.loss, leaves)

    def scores():
        return mk.token_logprobs(batch["logits"], batch["ids"], return_entropy=True)

    for function in (of_logits, of_hidden, scores):
        assert_same(function)
    # Those of hidden states serve logits, too, where a sequence has to be known first.
    assert graphs


def test_twenty_sizes_and_other_numbers_take_two_graphs_of_a_function(graphs):
    for n in range(4, 44, 2):
        spec = mk.LossSpec(eps_low=n / 100, eps_high=n / 50)
        on("inductor", lambda n=n, spec=spec: token_loss(spec, "padded", n, n + 3, "rewards"))
    # Advantages, loss, and the scaling of backward.
    assert len(compiled._compiled) == 3 and len(graphs) <= 6


@pytest.mark.parametrize(
    "numbers",
    [
        {"dual_clip": 2.0, "beta": 0.1, "eps_low": 0.1, "eps_high": 0.3},
        pytest.param({"objective": "cispo", "eps_high_cispo": 2.0}, marks=pytest.mark.slow),
        pytest.param(
            {"objective": "sapo", "sapo_tau_pos": 0.5, "sapo_tau_neg": 1.5}, marks=pytest.mark.slow
        ),
    ],
    ids=lambda numbers: numbers.get("objective", "clip"),
)
def test_every_number_of_a_spec_may_change(numbers, graphs):
    for step in (1.0, 1.1, 1.2, 1.3):
        some = {k: v * step if isinstance(v, float) else v for k, v in numbers.items()}
        own = mk.AdvantageSpec(eps=1e-6 * step, max_abs=step, success_threshold=0.5 * step)
        call = partial(token_loss, mk.LossSpec(**some), "padded", source="rewards")
        assert_same(partial(call, advantage_spec=own))
    assert len(compiled._compiled) == 3 and len(graphs) <= 6


@pytest.mark.slow
def test_many_kinds_are_compiled(graphs):
    """More than torch compiles of one function."""
    kinds = [
        mk.LossSpec(objective=objective, aggregation=aggregation)
        for objective in ("clip", "cispo", "sapo", "none")
        for aggregation in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum")
    ]
    for spec in kinds:
        assert_same(lambda spec=spec: token_loss(spec, "padded"))
    assert len(compiled._compiled) == len(kinds) + 1


def test_what_is_not_compiled(graphs):
    def advantages(rewards):
        return on("inductor", lambda: mk.group_advantages(rewards, group_size=2))

    assert advantages(torch.rand(4, dtype=torch.float64)).dtype == torch.float64
    logp = torch.zeros(4, 3, requires_grad=True)
    mk.set_backend("inductor")
    step = torch.compile(
        lambda x: mk.mapo_loss(x, advantages=torch.ones(4)).loss,
        fullgraph=True,
        backend="aot_eager",
    )
    assert step(logp) == -1
    assert not graphs


def test_machine_code_of_log_probs(really_compiled):
    for _ in range(2):
        assert_same(lambda: token_loss(SPECS["clip"], "padded", source="rewards"))


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_machine_code_of_packed_log_probs(name, really_compiled):
    assert_same(lambda: token_loss(SPECS[name], "packed", source="rewards"))


@pytest.mark.slow
def test_machine_code_of_all_levels(really_compiled):
    mk.set_backend("inductor")
    assert all(error < 2e-6 for error in doctor.parity().values())
    assert len(compiled._compiled) > 5


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-such-compiler"))
    mk.set_backend("inductor")
    with pytest.raises(RuntimeError, match=r"backend 'inductor': .* C\+\+ compiler .*no-such-comp"):
        mk.group_advantages(torch.rand(4), group_size=2)
    assert mk.describe_backend().startswith("none (backend 'inductor': expected a C++ compiler")
