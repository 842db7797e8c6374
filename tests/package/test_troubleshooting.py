"""What docs/troubleshooting.md says happens does, in the words that it quotes."""

import re
import warnings
from pathlib import Path

import pytest
import torch

import mapo_kernels as mk
from mapo_kernels import backend, checks_head, groups

PAGE = (Path(__file__).parents[2] / "docs/troubleshooting.md").read_text()
SCOPE = {}
for block in re.findall(r"```python\n(.*?)```", PAGE, re.S):
    exec(block, SCOPE)
REWARDS = torch.tensor([1.0, 0, 0, 1])
IDS = torch.arange(12).reshape(4, 3) % 11


def logits():
    return torch.randn(4, 3, 11, generator=torch.Generator().manual_seed(0)).requires_grad_()


def loss_of(x, ids=IDS, **arguments):
    given = {"rewards": REWARDS, "group_size": 2} | arguments
    return mk.mapo_loss_from_logits(x, ids, **given)


def quoted(error):
    """Whether the page has a message: its first sentence."""
    return str(error.value).partition(". ")[0] in PAGE


def test_checks_find_a_token_id_outside_the_vocabulary(monkeypatch):
    ids = IDS.clone()
    ids[0, 0] = -100
    assert loss_of(logits(), ids).loss.isnan()
    monkeypatch.setenv("MAPO_KERNELS_VALIDATE", "1")
    with pytest.raises(ValueError) as error:
        loss_of(logits(), ids)
    assert quoted(error)


@pytest.mark.parametrize(
    "arguments",
    (
        {"normalizer": torch.tensor(0.0)},
        {"temperature": torch.tensor([1.0, 1, 0, 1])},
        {"group_weight": torch.tensor([1.0, float("nan")])},
        {"sampling_mask": mk.SamplingMask.from_lists([[10]] * 12)},
    ),
)
def test_checks_find_what_the_page_lists(arguments, monkeypatch):
    monkeypatch.setenv("MAPO_KERNELS_VALIDATE", "1")
    with pytest.raises(ValueError, match=next(iter(arguments))):
        loss_of(logits(), **arguments)


def test_a_nan_that_came_in_is_found_by_the_function_of_the_page(monkeypatch):
    monkeypatch.setenv("MAPO_KERNELS_VALIDATE", "1")
    logprobs, mask = torch.full((4, 3), -0.5), torch.ones(4, 3)
    logprobs[1, 2] = logprobs[2, 2] = float("nan")
    mask[2, 2] = 0
    out = mk.mapo_loss(logprobs, rewards=REWARDS, group_size=2, mask=mask)
    assert out.loss.isnan()
    assert SCOPE["not_finite"](mask, logprobs=logprobs) == {"logprobs": 1}


def test_a_nan_reward_is_counted():
    out = loss_of(logits(), rewards=torch.tensor([1.0, float("nan"), 0, 1]))
    assert out.loss.isfinite() and out.metrics["nonfinite_rewards"] == 1


def test_metrics_without_signal():
    out = loss_of(logits(), rewards=torch.ones(4))
    assert out.loss == 0 and out.metrics["ratio_mean"].isnan()
    assert out.metrics["zero_advantage_groups"] == out.metrics["active_groups"] == 2
    assert out.metrics["scored_tokens"] == 0 < out.metrics["active_tokens"]


def test_groups_of_one_and_rewards_below_the_threshold_are_warned_of():
    groups.forget_warnings()
    with pytest.warns(UserWarning) as caught:
        loss_of(logits(), group_size=1)
        mk.make_plan(rewards=REWARDS / 2, group_size=4, mask=torch.ones(4, 3))
    messages = [str(x.message) for x in caught]
    for start in ("group_size: expected", "success_threshold: no"):
        (message,) = [x for x in messages if x.startswith(start)]
        assert re.split(r"(?<=2, got 1)|(?<=failed, )", message)[0] in PAGE
    groups.forget_warnings()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = loss_of(logits(), rewards=REWARDS / 2)
    assert out.metrics["success_ratio_mean"] == 0


def test_both_ways_to_say_what_succeeded_agree():
    torch.testing.assert_close(SCOPE["out"].advantages, SCOPE["same"])
    assert SCOPE["out"].metrics["success_ratio_mean"] == 0.5


@pytest.mark.parametrize("retain", (False, True))
def test_backward_twice(retain):
    out = loss_of(logits())
    out.loss.backward(retain_graph=retain)
    with pytest.raises(RuntimeError) as error:
        out.loss.backward()
    assert quoted(error)
    logprobs = torch.full((4, 3), -0.5, requires_grad=True)
    loss = mk.mapo_loss(logprobs, rewards=REWARDS, group_size=2).loss
    loss.backward(retain_graph=True)
    loss.backward()


def test_logits_that_were_saved_are_not_overwritten():
    x = logits().tanh()
    out = loss_of(x, inplace=True)
    with pytest.raises(RuntimeError) as error:
        out.loss.backward()
    assert str(error.value).partition(": ")[0] in PAGE


def test_rounded_log_probs_under_fsdp():
    with pytest.raises(ValueError) as error:
        checks_head.check_not_rounded({"old_logprobs": torch.zeros(2, dtype=torch.bfloat16)})
    assert quoted(error)
    near = torch.linspace(-7.98, -4.02, 9999)
    assert 0.0155 < (near - near.bfloat16()).abs().max() <= 0.016


def test_triton_on_a_cpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(backend, "_chosen", "triton")
    with pytest.raises(RuntimeError) as error:
        backend.resolve_backend("cpu")
    assert str(error.value).partition(": ")[2] in PAGE
