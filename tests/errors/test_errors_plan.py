"""What make_plan, Plan.micro_batch and a loss with a plan refuse, and which sequences they take."""

import numpy as np
import pytest
import torch

import mapo_kernels as mk
from mapo_kernels.eager import advantages

A, R = torch.tensor([1.0, -0.5, 0.0, 2.0]), torch.tensor([1.0, 0, 0, 1])
MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]])
CU = torch.tensor([0, 2, 3, 6, 8])
LOGP = torch.linspace(-2, -0.5, 12).reshape(4, 3)
X, IDS = torch.zeros(4, 3, 7), torch.zeros(4, 3, dtype=torch.int64)
HIDDEN, WEIGHT = torch.zeros(4, 3, 5), torch.zeros(7, 5)
STEP = mk.AdvantageSpec(certainty="step")


def plan(**given):
    given = {"rewards": R, "group_size": 2, "mask": MASK, **given}
    return mk.make_plan(**{k: v for k, v in given.items() if v is not None})


def refuses(call, error, *words):
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    for word in words:
        assert word in message, message


LEVELS = {
    "logprobs": lambda **given: mk.mapo_loss(LOGP, **given),
    "logits": lambda **given: mk.mapo_loss_from_logits(X, IDS, **given),
    "hidden": lambda **given: mk.mapo_loss_from_hidden(HIDDEN, WEIGHT, IDS, **given),
}


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_given_beside_a_plan(level):
    loss = LEVELS[level]
    made = plan(advantage_spec=STEP)
    assert made.advantage_spec == STEP
    refuses(
        lambda: loss(plan=made, advantage_spec=mk.AdvantageSpec(estimator="rloo")),
        ValueError,
        "advantage_spec: expected the plan's advantage_spec AdvantageSpec(",
        "certainty='step'",
        "got AdvantageSpec(estimator='rloo'",
    )
    expected = loss(plan=made).loss
    for same in (mk.AdvantageSpec(), mk.AdvantageSpec(certainty="step")):
        assert torch.equal(loss(plan=made, advantage_spec=same).loss, expected)
    part = made.micro_batch(slice(0, 4))
    refuses(
        lambda: loss(plan=part, advantage_spec=mk.AdvantageSpec(eps=1e-3)),
        ValueError,
        "advantage_spec: expected the plan's",
        "eps=0.001",
    )
    refuses(lambda: loss(plan="x"), TypeError, "plan: expected a Plan from make_plan, got str 'x'")
    refuses(lambda: loss(plan=made, spec="x"), TypeError, "spec: expected a LossSpec, got str 'x'")
    refuses(
        lambda: loss(plan=made, advantage_spec="x"),
        TypeError,
        "advantage_spec: expected an AdvantageSpec, got str 'x'",
    )


def test_modules_take_a_plan_that_has_their_specs():
    made = plan(advantage_spec=STEP)
    expected = mk.mapo_loss(LOGP, plan=made).loss
    for module in (mk.MapoLoss(), mk.MapoLoss(advantage_spec=STEP)):
        assert torch.equal(module(LOGP, plan=made).loss, expected)
    other = mk.MapoLoss(advantage_spec=mk.AdvantageSpec(max_abs=2.0))
    refuses(lambda: other(LOGP, plan=made), ValueError, "advantage_spec: expected the plan's")
    head = torch.nn.Linear(5, 7)
    for module in (mk.MapoLinearLoss(head), mk.MapoLinearLoss(head, advantage_spec=STEP)):
        assert module(HIDDEN, IDS, plan=made).loss.isfinite()
    other = mk.MapoLinearLoss(head, advantage_spec=mk.AdvantageSpec(max_abs=2.0))
    refuses(
        lambda: other(HIDDEN, IDS, plan=made), ValueError, "advantage_spec: expected the plan's"
    )


GROUPING = {"group_size": 2, "group_ids": torch.zeros(4, dtype=torch.int64), "success": R > 0}


@pytest.mark.parametrize("name", GROUPING)
def test_a_plan_of_advantages_has_no_groups(name):
    refuses(
        lambda: mk.make_plan(advantages=A, mask=MASK, **{name: GROUPING[name]}),
        ValueError,
        "group_size, group_ids, success, group_weight: expected None with advantages",
        f"got a value for {name}",
    )
    refuses(
        lambda: mk.mapo_loss(LOGP, advantages=A, **{name: GROUPING[name]}),
        ValueError,
        "group_size, group_ids, success, group_weight: expected None with advantages",
        f"got a value for {name}",
    )


def meta(x):
    return x.to("meta")


ELSEWHERE = {
    "rewards": {"rewards": meta(R)},
    "advantages": {"rewards": None, "group_size": None, "advantages": meta(A)},
    "success": {"success": meta(R > 0)},
    "group_ids": {"group_size": None, "group_ids": meta(IDS[:, 0])},
    "normalizer": {"normalizer": meta(torch.ones(()))},
}
LAYOUTS = {
    "padded": {},
    "packed": {"mask": None, "cu_seqlens": CU},
    "packed and masked": {"mask": torch.ones(8), "cu_seqlens": CU},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ELSEWHERE)
def test_tensors_of_a_plan_are_on_one_device(name, layout, nothing_computes):
    refuses(
        lambda: plan(**LAYOUTS[layout], **ELSEWHERE[name]),
        ValueError,
        f"{name}: expected a tensor on cpu, got one on meta",
    )


def test_boundaries_are_on_the_device_of_the_mask(nothing_computes):
    refuses(
        lambda: plan(mask=torch.ones(8), cu_seqlens=meta(CU)),
        ValueError,
        "cu_seqlens: expected a tensor on cpu, got one on meta",
    )


def test_arguments_of_a_plan(nothing_computes):
    refuses(lambda: plan(spec="x"), TypeError, "spec: expected a LossSpec, got str 'x'")
    refuses(
        lambda: plan(advantage_spec="x"),
        TypeError,
        "advantage_spec: expected an AdvantageSpec, got str 'x'",
    )
    refuses(lambda: plan(normalizer=-1.0), ValueError, "normalizer: expected a positive", "-1.0")
    for wrong in (torch.zeros(8, 2), torch.zeros(()), torch.zeros(4, 1)):
        refuses(
            lambda wrong=wrong: mk.make_plan(advantages=wrong, cu_seqlens=CU),
            ValueError,
            "advantages: expected shape [4] (per sequence) or [total] (per token)",
            f"got {list(wrong.shape)}",
        )
    assert mk.make_plan(advantages=torch.ones(8), cu_seqlens=CU).live_counts == (2, 1, 3, 2)


# What says the same as each of these: a list of sequences.
SELECTIONS = [
    ([2, 0], [2, 0]),
    ((2, 0), [2, 0]),
    (range(1, 4), [1, 2, 3]),
    (range(3, 0, -2), [3, 1]),
    (np.array([3, 1]), [3, 1]),
    (np.array([3, 1], dtype=np.uint8), [3, 1]),
    ([np.int64(3), 1], [3, 1]),
    ([-1, 0], [3, 0]),
    ((-4,), [0]),
    ([1, 1], [1, 1]),
    ([], []),
    (range(0), []),
    (torch.tensor([3, 1]), [3, 1]),
    (torch.tensor([3, -3], dtype=torch.int32), [3, 1]),
    (torch.tensor([3, 1], dtype=torch.uint8), [3, 1]),
    (torch.tensor([], dtype=torch.int64), []),
    (torch.tensor([True, False, False, True]), [0, 3]),
    (np.array([True, False, False, True]), [0, 3]),
    ([True, False, False, True], [0, 3]),
    (slice(None, None, -1), [3, 2, 1, 0]),
    (slice(3, 0, -2), [3, 1]),
    (slice(1, None, 2), [1, 3]),
    (slice(2, 1), []),
    (slice(-2, None), [2, 3]),
    (slice(2, 100), [2, 3]),
]


@pytest.mark.parametrize(("given", "meant"), SELECTIONS, ids=str)
def test_sequences_of_a_micro_batch(given, meant):
    made = mk.make_plan(advantages=A, mask=MASK, spec=mk.LossSpec(score_all=True))
    part = made.micro_batch(given)
    assert torch.equal(part.advantages, A[meant]) and torch.equal(part.mask, MASK[meant])
    assert part.live_counts == tuple(MASK.sum(1)[meant].tolist())
    assert torch.equal(part.live_rows, MASK[meant].reshape(-1).nonzero().squeeze(1))
    assert part.n_sequences == len(meant)
    loss = mk.mapo_loss(LOGP[meant].requires_grad_(), plan=part).loss
    loss.backward()
    expected = sum([-A[i] * MASK[i].sum() for i in meant]) / MASK.sum()
    torch.testing.assert_close(loss, torch.as_tensor(expected, dtype=torch.float32))


ADJACENT = [
    (slice(1, 3), [1, 2]),
    (range(1, 3), [1, 2]),
    ([1, 2], [1, 2]),
    ((3,), [3]),
    ((-2, -1), [2, 3]),
    (np.array([2, 3]), [2, 3]),
    ([], []),
    (range(3, 3), []),
    (slice(2, 1), []),
    (slice(2, 2), []),
    (slice(0, 0), []),
    (slice(7, 9), []),
    (slice(-1, None), [3]),
    ([False, True, True, False], [1, 2]),
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("given", "meant"), ADJACENT, ids=str)
def test_adjacent_sequences_of_a_packed_batch(given, meant, masked):
    mask = torch.tensor([1, 0, 1, 1, 1, 0, 1, 1]) if masked else None
    made = mk.make_plan(advantages=A, cu_seqlens=CU, mask=mask, spec=mk.LossSpec(score_all=True))
    part = made.micro_batch(given)
    tokens = [t for i in meant for t in range(int(CU[i]), int(CU[i + 1]))]
    assert torch.equal(part.advantages, A[meant]) and part.n_sequences == len(meant)
    assert part.bounds == tuple(part.cu_seqlens.tolist()) and part.bounds[0] == 0
    assert part.bounds[-1] == len(tokens)
    if masked:
        assert torch.equal(part.mask, mask[tokens])
    logp = LOGP.reshape(-1)[tokens].requires_grad_()
    loss = mk.mapo_loss(logp, plan=part).loss
    loss.backward()
    kept = torch.ones(8) if mask is None else mask
    expected = -sum([kept[CU[i] : CU[i + 1]].sum() * A[i] for i in meant]) / kept.sum()
    torch.testing.assert_close(loss, torch.as_tensor(expected, dtype=torch.float32))


REFUSED = [
    (1, TypeError, "int 1"),
    (None, TypeError, "None"),
    (True, TypeError, "bool True"),
    (np.int64(1), TypeError, "int64"),
    ("01", TypeError, "str '01'"),
    (1.0, TypeError, "float 1.0"),
    ({0, 1}, TypeError, "set {0, 1}"),
    ([0.0, 1.0], TypeError, "torch.float32"),
    (["a"], TypeError, "list ['a']"),
    ([[0], [1, 2]], TypeError, "list [[0], [1, 2]]"),
    (np.array([0.5]), TypeError, "torch.float32"),
    (torch.tensor([0.0]), TypeError, "torch.float32"),
    (torch.tensor(1), ValueError, "[]"),
    (np.array(1), TypeError, "int 1"),
    (torch.tensor([[0, 1]]), ValueError, "[1, 2]"),
    ([[0, 1]], ValueError, "[1, 2]"),
    ([0, 4], ValueError, "4"),
    ([-5], ValueError, "-5"),
    (range(2, 6), ValueError, "4"),
    (torch.tensor([4]), ValueError, "4"),
    (torch.tensor([True, False]), ValueError, "[2]"),
    (torch.ones(4, 3).bool(), ValueError, "[4, 3]"),
]
PLANS = {
    "padded": {"mask": MASK},
    "packed": {"cu_seqlens": CU},
}


@pytest.mark.parametrize("layout", PLANS)
@pytest.mark.parametrize(("given", "error", "came"), REFUSED, ids=str)
def test_what_is_no_selection_of_sequences(given, error, came, layout):
    made = mk.make_plan(advantages=A, **PLANS[layout])
    refuses(lambda: made.micro_batch(given), error, "sequences: expected", f"got {came}")


@pytest.mark.parametrize(
    "given", [[0, 2], [1, 0], range(0, 4, 2), slice(0, 4, 2), torch.tensor([1, 2]), [1, 1]], ids=str
)
def test_other_sequences_of_a_packed_batch(given):
    made = mk.make_plan(advantages=A, cu_seqlens=CU)
    refuses(
        lambda: made.micro_batch(given), ValueError, "sequences: expected a plain slice", "got "
    )


class Waits(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes what makes the host wait for a device: its values are asked for on the host."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.found = []
        for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__"):
            monkeypatch.setattr(torch.Tensor, name, self.noting(name, getattr(torch.Tensor, name)))

    def noting(self, name, method):
        def call(x, *arguments, **named):
            self.found.append(name)
            return method(x, *arguments, **named)

        return call

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if function.__name__.split(".")[0] in ("nonzero", "masked_select", "unique", "_unique2"):
            self.found.append(function.__name__)
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("source", ["rewards", "advantages"])
def test_making_a_plan_waits_for_the_device_once(layout, source, monkeypatch):
    mk.set_backend("eager")
    given = {**LAYOUTS[layout]}
    if source == "advantages":
        given |= {"rewards": None, "group_size": None, "advantages": A}
    # On a CPU, where looking costs nothing, the extremes of the rewards decide what to compute.
    monkeypatch.setattr(advantages, "_of_chunk", lambda x, spec, _: advantages._of_any(x, spec))
    waits = Waits(monkeypatch)
    with waits:
        made = plan(**given)
    assert waits.found == ["tolist"]
    with waits:
        part = made.micro_batch(slice(1, 3))
        part.live_rows  # noqa: B018  computed when asked for
    assert waits.found == ["tolist"]
    assert "waits for the device once" in " ".join(mk.make_plan.__doc__.split())
