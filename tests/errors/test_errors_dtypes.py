"""Which dtypes each argument takes: every integer dtype for ids, no 8-bit float, no complex."""

import pytest
import torch
from support import assert_close

import mapo_kernels as mk
from mapo_kernels.dtypes import FLOATS, INTEGERS

A, R = torch.tensor([1.0, -0.5, 0.0, 2.0]), torch.tensor([1.0, 0, 0, 1])
LOGP = torch.linspace(-2, -0.5, 12).reshape(4, 3)
IDS = torch.tensor([[1, 5, 0], [6, 2, 2], [3, 3, 1], [4, 0, 6]])
GROUPS = torch.tensor([3, 7, 7, 3])
UNSIGNED = tuple(x for x in INTEGERS if not x.is_signed)


def tensors(device):
    torch.manual_seed(1)
    logits, hidden, weight = torch.randn(4, 3, 7), torch.randn(4, 3, 5), torch.randn(7, 5)
    return [x.to(device).requires_grad_() for x in (logits, hidden, weight)]


def everything_of(ids, device, spec):
    """Losses, gradients and log-probs of every function that takes token ids."""
    logits, hidden, weight = tensors(device)
    ids, advantages = ids.to(device), A.to(device)
    given = {"advantages": advantages, "old_logprobs": LOGP.to(device), "spec": spec}
    out = mk.mapo_loss_from_logits(logits, ids, **given).loss
    found = [out, *torch.autograd.grad(out, logits)]
    out = mk.mapo_loss_from_hidden(hidden, weight, ids, **given).loss
    found += [out, *torch.autograd.grad(out, (hidden, weight))]
    found += mk.token_logprobs(logits, ids, return_entropy=True)
    found += mk.token_logprobs_from_hidden(hidden, weight, ids, return_entropy=True)
    return found


@pytest.mark.parametrize(("level", "dtypes"), [("token", INTEGERS[1:]), ("sequence", UNSIGNED[:1])])
def test_token_ids_of_any_integer_dtype(level, dtypes, device, monkeypatch):
    monkeypatch.setenv("MAPO_KERNELS_VALIDATE", "1")
    spec = mk.LossSpec(importance_level=level)
    expected = everything_of(IDS, device, spec)
    for dtype in dtypes:
        for a, e in zip(everything_of(IDS.to(dtype), device, spec), expected, strict=True):
            assert torch.equal(a, e), dtype


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_token_ids_out_of_range_in_any_dtype(dtype, device, monkeypatch):
    ids = IDS.tolist()
    ids[3][1] = torch.iinfo(dtype).max
    ids = torch.tensor(ids, dtype=dtype)
    logits = tensors(device)[0]
    loss = mk.mapo_loss_from_logits(logits, ids.to(device), advantages=A.to(device)).loss
    assert loss.isnan()
    monkeypatch.setenv("MAPO_KERNELS_VALIDATE", "1")
    with pytest.raises(ValueError, match=r"token_ids: expected ids in \[0, 7\) where live, got"):
        mk.mapo_loss_from_logits(logits, ids.to(device), advantages=A.to(device))


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_group_ids_of_any_integer_dtype(dtype, device):
    rewards, logp = R.to(device), LOGP.to(device)
    mask = torch.ones(4, 3, device=device)

    def everything(ids):
        given = {"rewards": rewards, "group_ids": ids.to(device)}
        advantages, stats = mk.group_advantages(**given, return_stats=True)
        out = mk.mapo_loss(logp, mask=mask, **given)
        plan = mk.make_plan(mask=mask, **given)
        alone = mk.group_advantages(**given)
        return [advantages, alone, *stats, out.loss, out.advantages, plan.advantages]

    for a, e in zip(everything(GROUPS.to(dtype)), everything(GROUPS), strict=True):
        assert torch.equal(a, e)


def test_group_ids_that_are_equal_in_64_bits_only(device):
    ids = torch.tensor([2**64 - 1, 5, 2**64 - 1, 5], dtype=torch.uint64).to(device)
    rewards = torch.tensor([1.0, 0, 0, 1], device=device)
    expected = mk.group_advantages(rewards, group_ids=torch.tensor([1, 0, 1, 0], device=device))
    assert torch.equal(mk.group_advantages(rewards, group_ids=ids), expected)


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, torch.bool], ids=str)
def test_rewards_and_masks_of_any_real_dtype(dtype, device):
    rewards, mask = R.to(dtype).to(device), (LOGP > -1.5).to(dtype).to(device)
    advantages = mk.group_advantages(rewards, group_size=2)
    assert_close(advantages, mk.group_advantages(R.to(device), group_size=2), 1e-6)
    given = {"group_size": 2, "mask": mask}
    out = mk.mapo_loss(LOGP.to(device), rewards=rewards, **given)
    plan = mk.make_plan(rewards=rewards, **given)
    expected = mk.mapo_loss(
        LOGP.to(device), rewards=R.to(device), group_size=2, mask=(LOGP > -1.5).to(device)
    )
    assert_close(out.loss, expected.loss, 1e-6)
    assert_close(mk.mapo_loss(LOGP.to(device), plan=plan).loss, expected.loss, 1e-6)


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS], ids=str)
def test_normalizers_of_any_number_dtype(dtype, device):
    normalizer = torch.tensor(7).to(dtype).to(device)
    given = {"advantages": A.to(device), "mask": torch.ones(4, 3, device=device)}
    expected = mk.mapo_loss(LOGP.to(device), normalizer=7.0, **given).loss
    out = mk.mapo_loss(LOGP.to(device), normalizer=normalizer, **given)
    assert_close(out.loss, expected, 1e-6)
    plan = mk.make_plan(normalizer=normalizer, **given)
    assert_close(mk.mapo_loss(LOGP.to(device), plan=plan).loss, expected, 1e-6)


def zeros(*shape):
    return torch.zeros(shape)


TOKENS = {name: zeros(4, 3) for name in ("mask", "old_logprobs", "token_weights")}
BATCH = {"advantages": A, "normalizer": torch.tensor(3.0), **TOKENS}
HEAD = {"lm_head_weight": zeros(7, 5), "bias": zeros(7), "temperature": torch.ones(4)}
SCORED = {"token_ids": IDS, "temperature": torch.ones(4), "mask": zeros(4, 3)}
# Each function, a spec it takes, and all its tensors.
FUNCTIONS = [
    (mk.group_advantages, {"group_size": 2}, {"rewards": R}),
    (mk.group_advantages, {}, {"rewards": R, "group_ids": GROUPS, "success": R > 0}),
    (mk.make_plan, {}, {"advantages": A, "mask": zeros(4, 3), "normalizer": torch.tensor(3.0)}),
    (mk.make_plan, {}, {"rewards": R, "group_ids": GROUPS, "success": R > 0, "mask": zeros(4, 3)}),
    (
        mk.make_plan,
        {},
        {"advantages": zeros(9), "mask": zeros(9), "cu_seqlens": torch.tensor([0, 4, 9])},
    ),
    (mk.mapo_loss, {}, {"logprobs": LOGP, **BATCH}),
    (mk.mapo_loss, {"group_size": 2}, {"logprobs": LOGP, "rewards": R, "success": R > 0}),
    (
        mk.mapo_loss,
        {"spec": mk.LossSpec(beta=0.1, rollout_cap=2.0)},
        {"logprobs": LOGP, "ref_logprobs": LOGP, "rollout_logprobs": LOGP, "advantages": A},
    ),
    (
        mk.mapo_loss_from_logits,
        {},
        {"logits": zeros(4, 3, 7), "token_ids": IDS, "temperature": torch.ones(4), **BATCH},
    ),
    (
        mk.mapo_loss_from_hidden,
        {},
        {"hidden": zeros(4, 3, 5), "token_ids": IDS, **HEAD, **BATCH},
    ),
    (mk.token_logprobs, {}, {"logits": zeros(4, 3, 7), **SCORED}),
    (mk.token_logprobs_from_hidden, {}, {"hidden": zeros(4, 3, 5), **HEAD, **SCORED}),
]
REFUSED = (
    *(getattr(torch, x) for x in dir(torch) if x.startswith(("float8_", "float4_"))),
    torch.complex64,
    torch.complex128,
)
# What each argument also refuses; ids refuse bool, which is no number.
OTHERS = {
    "token_ids": (torch.float32, torch.bool),
    "group_ids": (torch.float64, torch.bool),
    "cu_seqlens": (torch.float32, torch.uint8, torch.bool),
    "success": (torch.float32, torch.int64),
    "normalizer": (torch.bool,),
    "rewards": (),
    "mask": (),
}
ARGUMENTS = [
    pytest.param(call, given, tensors, name, id=f"{call.__name__} {', '.join(tensors)}: {name}")
    for call, given, tensors in FUNCTIONS
    for name in tensors
]


@pytest.mark.parametrize(("call", "given", "tensors", "name"), ARGUMENTS)
def test_what_no_argument_takes(call, given, tensors, name, nothing_computes):
    for dtype in REFUSED + OTHERS.get(name, (torch.int64, torch.bool)):
        x = torch.empty(tensors[name].shape, dtype=dtype)
        with pytest.raises(TypeError) as caught:
            call(**given, **{**tensors, name: x})
        message = str(caught.value)
        assert message.startswith(f"{name}: expected ") and message.endswith(f"got {dtype}")
        accepted = {"success": "bool", "cu_seqlens": "int64"}
        integer = name in ("token_ids", "group_ids")
        assert accepted.get(name, "uint8" if integer else "bfloat16") in message
