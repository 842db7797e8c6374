"""What error messages say: the interval, the argument, why a second backward cannot be."""

import math

import pytest
import torch

import mapo_kernels as mk

A, LOGP = torch.tensor([1.0, -0.5, 0.0, 2.0]), torch.linspace(-2, -0.5, 12).reshape(4, 3)
X, IDS = torch.zeros(4, 3, 7), torch.zeros(4, 3, dtype=torch.int64)
HIDDEN, WEIGHT = torch.zeros(4, 3, 5), torch.zeros(7, 5)
INF = math.inf


def message_of(call, error=ValueError):
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


INTERVALS = [
    (lambda: mk.LossSpec(eps_high=INF), "eps_high: expected a number in (0, inf), got inf"),
    (lambda: mk.LossSpec(beta=INF), "beta: expected a number in [0, inf), got inf"),
    (lambda: mk.LossSpec(beta=-INF), "beta: expected a number in [0, inf), got -inf"),
    (lambda: mk.LossSpec(rollout_cap=INF), "rollout_cap: expected a number in (0, inf), got inf"),
    (lambda: mk.LossSpec(dual_clip=INF), "dual_clip: expected a number in (-inf, inf), got inf"),
    (lambda: mk.LossSpec(eps_low=1), "eps_low: expected a number in (0, 1), got 1"),
    (lambda: mk.LossSpec(eps_low=float("nan")), "eps_low: expected a number in (0, 1), got nan"),
    (
        lambda: mk.AdvantageSpec(success_threshold=-INF),
        "success_threshold: expected a number in (-inf, inf), got -inf",
    ),
    (
        lambda: mk.AdvantageSpec(certainty=1.5),
        "certainty: expected a number in [0, 1], got 1.5",
    ),
    (
        lambda: mk.token_logprobs(X, IDS, temperature=INF),
        "temperature: expected a number in (0, inf), got inf",
    ),
]


@pytest.mark.parametrize(("call", "says"), INTERVALS)
def test_an_interval_holds_what_it_says(call, says):
    assert message_of(call) == says


def test_how_many_temperatures():
    four, ids = torch.ones(4), IDS.reshape(-1)
    packed = X.reshape(12, 7)
    says = "temperature: expected shape [12] (one per token), got [4]"
    assert message_of(lambda: mk.token_logprobs(packed, ids, temperature=four)) == says
    hidden = HIDDEN.reshape(12, 5)
    score = mk.token_logprobs_from_hidden
    assert message_of(lambda: score(hidden, WEIGHT, ids, temperature=four)) == says
    says = "temperature: expected shape [4] (one per sequence), got [3]"
    three, bounds = torch.ones(3), torch.tensor([0, 2, 3, 6, 12])
    given = {"advantages": A, "temperature": three}
    for call in (
        lambda: mk.token_logprobs(X, IDS, temperature=three),
        lambda: score(HIDDEN, WEIGHT, IDS, temperature=three),
        lambda: mk.mapo_loss_from_logits(X, IDS, **given),
        lambda: mk.mapo_loss_from_logits(packed, ids, cu_seqlens=bounds, **given),
        lambda: mk.mapo_loss_from_hidden(hidden, WEIGHT, ids, cu_seqlens=bounds, **given),
    ):
        assert message_of(call) == says


def test_rollout_log_probs_and_their_cap_name_each_other():
    assert message_of(lambda: mk.mapo_loss(LOGP, advantages=A, rollout_logprobs=LOGP)) == (
        "spec.rollout_cap: expected a number because rollout_logprobs are given, got None"
    )
    spec = mk.LossSpec(rollout_cap=2.5)
    assert message_of(lambda: mk.mapo_loss(LOGP, advantages=A, spec=spec)) == (
        "rollout_logprobs: expected a tensor because spec.rollout_cap is 2.5, got None"
    )


def losses(device):
    """Each loss whose backward may run once, and what it is differentiated by."""
    torch.manual_seed(1)
    logits, hidden, weight = torch.randn(4, 3, 7), torch.randn(4, 3, 5), torch.randn(7, 5)
    logits, hidden, weight = [x.to(device).requires_grad_() for x in (logits, hidden, weight)]
    given = {"advantages": A.to(device)}
    ids = IDS.to(device)
    work = (logits * 1.0).view_as(logits)
    yield mk.mapo_loss_from_logits(logits, ids, **given).loss, (logits,)
    yield mk.mapo_loss_from_logits(work, ids, inplace=True, **given).loss, (logits,)
    yield mk.mapo_loss_from_hidden(hidden, weight, ids, **given).loss, (hidden, weight)
    yield mk.mapo_loss_from_hidden(hidden, weight.detach(), ids, **given).loss, (hidden,)


@pytest.mark.parametrize("upstream", [1.0, 3.0])
def test_a_second_backward_says_why_and_what_to_do(upstream, device):
    for loss, leaves in losses(device):
        loss = loss * upstream
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        kept = [x.clone() for x in first]
        says = message_of(
            lambda loss=loss, leaves=leaves: torch.autograd.grad(loss, leaves), RuntimeError
        )
        assert "expected one backward through a loss" in says and "got a second" in says
        assert "retain_graph" in says and "call the loss again" in says
        assert all(torch.equal(x, y) for x, y in zip(first, kept, strict=True))


def test_a_second_backward_without_the_graph(device):
    for loss, leaves in losses(device):
        torch.autograd.grad(loss, leaves)
        says = message_of(
            lambda loss=loss, leaves=leaves: torch.autograd.grad(loss, leaves), RuntimeError
        )
        assert "expected one backward through a loss" in says and "call the loss again" in says


def test_log_probs_may_be_differentiated_again(device):
    logp = LOGP.to(device).requires_grad_()
    loss = mk.mapo_loss(logp, advantages=A.to(device)).loss
    first, second = [torch.autograd.grad(loss, logp, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(first, second)


VALIDATE = "MAPO_KERNELS_VALIDATE"
BAD = torch.full((4, 3), 7)


def validated(monkeypatch, value):
    """Whether token ids are looked at under this value of the environment variable."""
    monkeypatch.setenv(VALIDATE, value)
    try:
        mk.mapo_loss_from_logits(X, BAD, advantages=A)
    except ValueError as error:
        assert "token_ids: expected ids in [0, 7)" in str(error)
        return True
    return False


@pytest.mark.parametrize("value", ["1", "true", "yes", "on", " 1", "TRUE\n", "Yes ", "\tOn"])
def test_what_turns_validation_on(value, monkeypatch):
    assert validated(monkeypatch, value)


@pytest.mark.parametrize("value", ["", " ", "0", "false", "no", "off", "False", " OFF "])
def test_what_leaves_validation_off(value, monkeypatch):
    assert not validated(monkeypatch, value)
    monkeypatch.delenv(VALIDATE)
    assert mk.mapo_loss_from_logits(X, BAD, advantages=A).loss.isnan()


CALLS = {
    "mapo_loss": lambda: mk.mapo_loss(LOGP, advantages=A),
    "rewards": lambda: mk.mapo_loss(LOGP, rewards=A, group_size=2),
    "from_logits": lambda: mk.mapo_loss_from_logits(X, IDS, advantages=A),
    "from_hidden": lambda: mk.mapo_loss_from_hidden(HIDDEN, WEIGHT, IDS, advantages=A),
    "token_logprobs": lambda: mk.token_logprobs(X, IDS),
    "token_logprobs_from_hidden": lambda: mk.token_logprobs_from_hidden(HIDDEN, WEIGHT, IDS),
    "padded plan": lambda: mk.make_plan(advantages=A, mask=LOGP),
    "packed plan": lambda: mk.make_plan(advantages=A, cu_seqlens=torch.tensor([0, 1, 2, 3, 12])),
    "advantages": lambda: mk.group_advantages(A, group_size=2),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("value", ["2", "enabled", "y", "-1", "1,2"])
def test_another_value_is_an_error_of_every_function(value, call, monkeypatch):
    monkeypatch.setenv(VALIDATE, value)
    says = message_of(CALLS[call])
    assert says == (
        f"{VALIDATE}: expected 1, true, yes or on, or (for off) 0, false, no, off or nothing, "
        f"got {value!r}"
    )
