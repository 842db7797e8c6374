"""A misspelt argument is an error that names the nearest one; nothing else about calls changes."""

import copy
import dataclasses
import inspect
import pickle
import pydoc

import pytest
import torch

import mapo_kernels as mk

LOGP = torch.zeros(4, 3)
A = torch.ones(4)
X, IDS = torch.zeros(4, 3, 7), torch.zeros(4, 3, dtype=torch.int64)
HIDDEN, WEIGHT = torch.zeros(4, 3, 5), torch.zeros(7, 5)


def head():
    return torch.nn.Linear(5, 7)


CASES = [
    # what is called, by which name it says so, what came, what it says instead
    (lambda: mk.LossSpec(epsilon_low=0.1), "LossSpec", "epsilon_low", "'eps_low'"),
    (lambda: mk.LossSpec(epsilon_high=0.1), "LossSpec", "epsilon_high", "'eps_high'"),
    (lambda: mk.LossSpec(agregation="x"), "LossSpec", "agregation", "'aggregation'"),
    (lambda: mk.AdvantageSpec(certanty="step"), "AdvantageSpec", "certanty", "'certainty'"),
    (
        lambda: mk.group_advantages(A, group_size=2, certanty="step"),
        "group_advantages",
        "certanty",
        "'certainty'",
    ),
    (lambda: mk.mapo_loss(LOGP, advantage=A), "mapo_loss", "advantage", "'advantages'"),
    (
        lambda: mk.mapo_loss(LOGP, advantages=A, old_logps=LOGP),
        "mapo_loss",
        "old_logps",
        "'old_logprobs'",
    ),
    (
        lambda: mk.mapo_loss_from_logits(X, IDS, advantages=A, temprature=1.0),
        "mapo_loss_from_logits",
        "temprature",
        "'temperature'",
    ),
    (
        lambda: mk.mapo_loss_from_hidden(HIDDEN, WEIGHT, IDS, advantages=A, soft_cap=30.0),
        "mapo_loss_from_hidden",
        "soft_cap",
        "'softcap'",
    ),
    (
        lambda: mk.token_logprobs(X, IDS, return_entropies=True),
        "token_logprobs",
        "return_entropies",
        "'return_entropy'",
    ),
    (
        lambda: mk.token_logprobs_from_hidden(HIDDEN, WEIGHT, IDS, chunk_row=8),
        "token_logprobs_from_hidden",
        "chunk_row",
        "'chunk_rows'",
    ),
    (
        lambda: mk.make_plan(advantages=A, masks=LOGP),
        "make_plan",
        "masks",
        "'mask'",
    ),
    (lambda: mk.MapoLoss()(LOGP, advantge=A), "mapo_loss", "advantge", "'advantages'"),
    (lambda: mk.MapoLoss(advantage_specs=1), "MapoLoss", "advantage_specs", "'advantage_spec'"),
    (
        lambda: mk.MapoLinearLoss(head(), logits_scale=2.0),
        "MapoLinearLoss",
        "logits_scale",
        "'logit_scale'",
    ),
    (
        lambda: mk.MapoLinearLoss(head())(HIDDEN, IDS, advantges=A),
        "mapo_loss_from_hidden",
        "advantges",
        "'advantages'",
    ),
    # A setting of a spec that was given to the function beside it.
    (
        lambda: mk.mapo_loss(LOGP, advantages=A, eps_low=0.1),
        "mapo_loss",
        "eps_low",
        "spec=LossSpec(eps_low=...)",
    ),
    (
        lambda: mk.make_plan(advantages=A, mask=LOGP, certanty="step"),
        "make_plan",
        "certanty",
        "advantage_spec=AdvantageSpec(certainty=...)",
    ),
]


@pytest.mark.parametrize(("call", "function", "came", "nearest"), CASES)
def test_a_misspelt_argument(call, function, came, nearest):
    with pytest.raises(TypeError) as caught:
        call()
    message = str(caught.value)
    assert message.startswith(f"{function}() got an unexpected keyword argument '{came}'")
    assert message.endswith(f"did you mean {nearest}?")


def test_a_name_like_no_other_is_answered_with_all_of_them():
    with pytest.raises(TypeError, match=r"'qqq': expected logprobs, rewards, advantages"):
        mk.mapo_loss(LOGP, advantages=A, qqq=1)
    with pytest.raises(TypeError, match=r"'qqq': expected objective.*score_all$"):
        mk.LossSpec(qqq=1)


def test_other_mistakes_keep_pythons_own_words():
    with pytest.raises(TypeError, match="positional argument"):
        mk.mapo_loss(LOGP, A)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'token_ids'"):
        mk.mapo_loss_from_logits(X)
    with pytest.raises(TypeError, match="positional argument"):
        mk.LossSpec("clip")
    with pytest.raises(TypeError, match="multiple values for argument 'logprobs'"):
        mk.mapo_loss(LOGP, logprobs=LOGP)


FUNCTIONS = [
    mk.group_advantages,
    mk.make_plan,
    mk.mapo_loss,
    mk.mapo_loss_from_hidden,
    mk.mapo_loss_from_logits,
    mk.token_logprobs,
    mk.token_logprobs_from_hidden,
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_functions_still_say_what_they_take(function):
    parameters = inspect.signature(function).parameters
    assert inspect.isfunction(function)
    kinds = {p.kind for p in parameters.values()}
    assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
    text = pydoc.render_doc(function, renderer=pydoc.plaintext)
    assert f"{function.__name__}(" in text and all(f"{name}:" in text for name in parameters)
    assert pickle.loads(pickle.dumps(function)) is function


@pytest.mark.parametrize("spec", [mk.LossSpec, mk.AdvantageSpec])
def test_specs_still_are_dataclasses(spec):
    fields = [field.name for field in dataclasses.fields(spec)]
    assert list(inspect.signature(spec).parameters) == fields
    made = spec()
    for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), dataclasses.replace(made)):
        assert again == made and hash(again) == hash(made)
    with pytest.raises(TypeError, match="did you mean"):
        dataclasses.replace(made, **{fields[0] + "s": "clip"})


def test_checked_calls_are_traced_whole(device):
    logp, rewards = torch.zeros(4, 3, device=device), torch.tensor([1.0, 0, 0, 1], device=device)

    def step(x):
        spec = mk.LossSpec(eps_high=0.28)
        out = mk.mapo_loss(x, rewards=rewards, group_size=2, spec=spec)
        return out.loss, mk.group_advantages(rewards, group_size=2, certainty="step")

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, e in zip(compiled(logp), step(logp), strict=True):
        assert torch.equal(a, e)
