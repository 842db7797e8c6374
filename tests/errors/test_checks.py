"""Every error of SPEC 6, raised before anything is launched: what was expected and what came."""

import pytest
import torch
from support import NAN

import mapo_kernels as mk

MASKED = mk.LossSpec(rollout_mask=(0.5, 2.0))
LOGP = torch.zeros(4, 3)
A = torch.ones(4)
R = torch.ones(4)
PACKED = torch.zeros(12)
CU = torch.tensor([0, 3, 6, 9, 12])


def loss(logp=LOGP, **given):
    if "rewards" not in given and "plan" not in given:
        given.setdefault("advantages", A)
    return mk.mapo_loss(logp, **given)


X = torch.zeros(4, 3, 7)
IDS = torch.zeros(4, 3, dtype=torch.int64)


def from_logits(logits=X, ids=IDS, **given):
    if "plan" not in given:
        given.setdefault("advantages", A)
    return mk.mapo_loss_from_logits(logits, ids, **given)


HIDDEN = torch.zeros(4, 3, 5)
W = torch.zeros(7, 5)


class DTensor(torch.Tensor):
    """Stands for torch.distributed's, which needs processes to exist."""


def from_hidden(hidden=HIDDEN, weight=W, ids=IDS, **given):
    return mk.mapo_loss_from_hidden(hidden, weight, ids, advantages=A, **given)


def groups(rewards=R, **given):
    return mk.group_advantages(rewards, **given)


META = torch.zeros(4, 3, device="meta")

CASES = [
    # what is called, the error, and the words it must say: argument, expectation, what came
    (lambda: loss(torch.zeros(4)), ValueError, "logprobs: expected shape [B, T]", "[4]"),
    (lambda: loss(LOGP.long()), TypeError, "logprobs: expected a floating-point", "int64"),
    (lambda: loss([[0.0]]), TypeError, "logprobs: expected a torch.Tensor", "list"),
    (lambda: loss(torch.zeros(0, 3), advantages=torch.ones(0)), ValueError, "B >= 1", "empty"),
    (lambda: loss(old_logprobs=torch.zeros(4, 2)), ValueError, "old_logprobs: exp", "[4, 2]"),
    (lambda: loss(ref_logprobs=torch.zeros(3, 4)), ValueError, "ref_logprobs: exp", "[3, 4]"),
    (lambda: loss(token_weights=torch.zeros(4)), ValueError, "token_weights: exp", "[4]"),
    (lambda: loss(token_weights=LOGP.long()), TypeError, "token_weights: exp", "int64"),
    (lambda: loss(mask=torch.zeros(4, 2)), ValueError, "mask: expected shape", "[4, 2]"),
    (lambda: loss(mask=[1]), TypeError, "mask: expected a torch.Tensor", "list"),
    (lambda: loss(advantages=torch.ones(5)), ValueError, "advantages: expected shape [4]", "[5]"),
    (lambda: loss(advantages=torch.ones(4).long()), TypeError, "advantages: exp", "int64"),
    (
        lambda: loss(old_logprobs=torch.zeros(4, 3, requires_grad=True)),
        ValueError,
        "old_logprobs: expected a tensor that does not require grad",
        "requires_grad=True",
    ),
    (
        lambda: loss(advantages=torch.ones(4, requires_grad=True)),
        ValueError,
        "advantages: expected a tensor that does not require grad",
        "requires_grad=True",
    ),
    (lambda: loss(old_logprobs=META), ValueError, "old_logprobs: expected a tensor on cpu", "meta"),
    (lambda: loss(mask=META), ValueError, "mask: expected a tensor on cpu", "meta"),
    (lambda: loss(advantages=None), ValueError, "rewards, advantages: exp", "neither"),
    (
        lambda: loss(rewards=R, advantages=A, group_size=2),
        ValueError,
        "rewards, advantages: expected exactly one",
        "both",
    ),
    (lambda: loss(group_size=2), ValueError, "group_size, group_ids, success", "a value"),
    (lambda: loss(rewards=torch.ones(6), group_size=2), ValueError, "rewards: exp", "[6]"),
    (lambda: loss(rewards=R), ValueError, "group_size, group_ids: expected exactly", "neither"),
    (lambda: loss(spec=mk.LossSpec(beta=0.1)), ValueError, "ref_logprobs: expected", "None"),
    (lambda: loss(spec=mk.LossSpec(entropy_coef=0.1)), ValueError, "entropy_coef: exp", "0.1"),
    (lambda: loss(spec=mk.LossSpec(rollout_cap=2.0)), ValueError, "rollout_logprobs: exp", "None"),
    (lambda: loss(spec=MASKED, old_logprobs=LOGP), ValueError, "rollout_logprobs: exp", "None"),
    (lambda: loss(spec=MASKED, rollout_logprobs=LOGP), ValueError, "old_logprobs: exp", "None"),
    (lambda: mk.LossSpec(rollout_mask=2.0), TypeError, "rollout_mask: expected a pair", "2.0"),
    (lambda: mk.LossSpec(rollout_mask=(1, "2")), TypeError, "rollout_mask: expected a", "(1, '2')"),
    (lambda: mk.LossSpec(rollout_mask=(2, 1)), ValueError, "rollout_mask: expected 0", "(2, 1)"),
    (lambda: mk.LossSpec(rollout_mask=(0, NAN)), ValueError, "rollout_mask: expected 0", "nan)"),
    (lambda: mk.LossSpec(rollout_is=False), ValueError, "rollout_mask: expected a pair", "None"),
    (
        lambda: mk.LossSpec(rollout_is=False, rollout_mask=(0, 2), rollout_cap=2.0),
        ValueError,
        "rollout_cap: expected None",
        "2.0",
    ),
    (lambda: mk.LossSpec(rollout_mask_level="batch"), ValueError, "rollout_mask_level", "'batch'"),
    (lambda: loss(rollout_logprobs=LOGP), ValueError, "rollout_cap: expected", "None"),
    (lambda: loss(spec="clip"), TypeError, "spec: expected a LossSpec", "str 'clip'"),
    (lambda: loss(advantage_spec=1), TypeError, "advantage_spec: expected", "int 1"),
    (lambda: loss(normalizer=0), ValueError, "normalizer: expected a positive", "0"),
    (lambda: loss(normalizer=NAN), ValueError, "normalizer: expected a positive", "nan"),
    (lambda: loss(normalizer="x"), TypeError, "normalizer: expected a number", "str 'x'"),
    (lambda: loss(normalizer=torch.ones(2)), ValueError, "normalizer: expected", "[2]"),
    (lambda: loss(PACKED), ValueError, "logprobs: expected shape [B, T]", "[12]"),
    (lambda: loss(LOGP, cu_seqlens=CU), ValueError, "logprobs: expected shape [total]", "[4, 3]"),
    (lambda: loss(PACKED, cu_seqlens=CU.float()), TypeError, "cu_seqlens: expected", "float32"),
    (lambda: loss(PACKED, cu_seqlens=CU[None]), ValueError, "cu_seqlens: exp", "[1, 5]"),
    (
        lambda: loss(
            PACKED, cu_seqlens=CU, spec=mk.LossSpec(aggregation="seq-mean-token-sum-norm")
        ),
        ValueError,
        "max_tokens: expected a number",
        "None",
    ),
    (lambda: loss(plan="plan"), TypeError, "plan: expected a Plan", "str 'plan'"),
    (lambda: groups(group_size=3), ValueError, "group_size: expected a positive divisor", "3"),
    (lambda: groups(group_size=0), ValueError, "group_size: expected a positive divisor", "0"),
    (lambda: groups(group_size=2.0), TypeError, "group_size: expected an int", "float 2.0"),
    (lambda: groups(), ValueError, "group_size, group_ids: expected exactly one", "neither"),
    (
        lambda: groups(group_size=2, group_ids=torch.zeros(4).long()),
        ValueError,
        "group_size, group_ids: expected exactly one",
        "both",
    ),
    (lambda: groups(group_ids=torch.zeros(4)), TypeError, "group_ids: expected an int", "float32"),
    (lambda: groups(group_ids=torch.zeros(3).long()), ValueError, "group_ids: exp", "[3]"),
    (lambda: groups(group_ids=[0, 0, 1, 1]), TypeError, "group_ids: expected a torch", "list"),
    (lambda: groups(torch.ones(2, 2), group_size=2), ValueError, "rewards: expected", "[2, 2]"),
    (lambda: groups(torch.ones(0), group_size=1), ValueError, "rewards: expected", "empty"),
    (lambda: groups([1.0], group_size=1), TypeError, "rewards: expected a torch", "list"),
    (lambda: groups(R + 0j, group_size=2), TypeError, "rewards: expected a real", "complex64"),
    (lambda: groups(group_size=2, success=R), TypeError, "success: expected dtype", "float32"),
    (lambda: groups(group_size=2, success=R[:3] > 0), ValueError, "success: expected", "[3]"),
    (lambda: groups(group_size=2, estimator="ppo"), ValueError, "estimator: expected", "'ppo'"),
    (lambda: groups(group_size=2, certainty=1.5), ValueError, "certainty: expected", "1.5"),
    (lambda: groups(group_size=2, certainty="x"), ValueError, "certainty: expected", "'x'"),
    (lambda: groups(group_size=2, certainty=None), TypeError, "certainty: expected", "None"),
    (lambda: groups(group_size=2, std_correction=2), ValueError, "std_correction: exp", "2"),
    (lambda: groups(group_size=2, eps=0), ValueError, "eps: expected a number in (0", "0"),
    (lambda: groups(group_size=2, max_abs=-1), ValueError, "max_abs: expected", "-1"),
    (lambda: groups(group_size=2, apd="mean"), ValueError, "apd: expected", "'mean'"),
    (lambda: groups(group_size=2, return_stats=1), TypeError, "return_stats: expected", "int 1"),
    (lambda: mk.LossSpec(eps_low=0), ValueError, "eps_low: expected a number in (0, 1)", "0"),
    (lambda: mk.LossSpec(eps_low=1.0), ValueError, "eps_low: expected a number in (0, 1)", "1.0"),
    (lambda: mk.LossSpec(eps_high=-0.1), ValueError, "eps_high: expected", "-0.1"),
    (lambda: mk.LossSpec(eps_high="x"), TypeError, "eps_high: expected a number", "str 'x'"),
    (lambda: mk.LossSpec(dual_clip=1.2), ValueError, "dual_clip: exp", "1 + eps_high = 1.2"),
    (
        lambda: mk.LossSpec(dual_clip=3.0, objective="sapo"),
        ValueError,
        "dual_clip: expected None",
        "'sapo'",
    ),
    (lambda: mk.LossSpec(objective="ppo"), ValueError, "objective: expected one of", "'ppo'"),
    (
        lambda: mk.LossSpec(objective="gmpo"),
        ValueError,
        "importance_level: expected 'sequence' with objective 'gmpo'",
        "'token'",
    ),
    (
        lambda: mk.LossSpec(objective="vespo", importance_level="sequence", rollout_cap=2.0),
        ValueError,
        "rollout_cap, rollout_mask: expected None with objective 'vespo'",
        "2.0",
    ),
    (
        lambda: mk.LossSpec(eps_low_cispo=6.0),
        ValueError,
        "eps_low_cispo: expected a number in [0, 5]",
        "6.0",
    ),
    (lambda: mk.LossSpec(importance_level="x"), ValueError, "importance_level: exp", "'x'"),
    (lambda: mk.LossSpec(kl_estimator="k4"), ValueError, "kl_estimator: expected", "'k4'"),
    (lambda: mk.LossSpec(aggregation="sum"), ValueError, "aggregation: expected", "'sum'"),
    (lambda: mk.LossSpec(beta=-1), ValueError, "beta: expected", "-1"),
    (lambda: mk.LossSpec(beta=NAN), ValueError, "beta: expected", "nan"),
    (lambda: mk.LossSpec(max_tokens=0), ValueError, "max_tokens: expected at least 1", "0"),
    (lambda: mk.LossSpec(max_tokens=1.5), TypeError, "max_tokens: expected an int", "1.5"),
    (lambda: mk.LossSpec(score_all=1), TypeError, "score_all: expected a bool", "int 1"),
    (lambda: mk.LossSpec(rollout_cap=0), ValueError, "rollout_cap: expected", "0"),
    (lambda: mk.make_plan(rewards=R, group_size=2), ValueError, "mask, cu_seqlens", "neither"),
    (lambda: mk.make_plan(mask=LOGP), ValueError, "rewards, advantages: expected", "neither"),
    (
        lambda: mk.make_plan(rewards=R, group_size=2, mask=torch.ones(3, 3)),
        ValueError,
        "rewards: expected shape [3]",
        "[4]",
    ),
    (lambda: from_logits(X.long()), TypeError, "logits: expected a floating-point", "int64"),
    (lambda: from_logits(X[0, 0]), ValueError, "logits: expected shape [B, T, V]", "[7]"),
    (lambda: from_logits(X[..., :0]), ValueError, "logits: expected shape", "[4, 3, 0]"),
    (lambda: from_logits(X[0], IDS[0]), ValueError, "token_ids: expected shape [B, T]", "[3]"),
    (
        lambda: from_logits(X, IDS, cu_seqlens=CU),
        ValueError,
        "logits: expected shape [total, V] with cu_seqlens",
        "[4, 3, 7]",
    ),
    (lambda: from_logits(ids=IDS[:, :2]), ValueError, "token_ids: expected shape [4, 3]", "[4, 2]"),
    (lambda: from_logits(ids=LOGP), TypeError, "token_ids: expected an integer", "float32"),
    (lambda: from_logits(ids=META.long()), ValueError, "token_ids: expected a tensor on", "meta"),
    (lambda: from_logits(temperature=0), ValueError, "temperature: expected a number in", "0"),
    (lambda: from_logits(temperature="x"), TypeError, "temperature: expected a number", "'x'"),
    (lambda: from_logits(temperature=R[:2]), ValueError, "temperature: expected shape [4]", "[2]"),
    (lambda: from_logits(temperature=IDS[:, 0]), TypeError, "temperature: expected", "int64"),
    (lambda: from_logits(inplace=1), TypeError, "inplace: expected a bool", "int 1"),
    (
        lambda: from_logits(X.transpose(1, 2), torch.zeros(4, 7).long(), inplace=True),
        ValueError,
        "logits: expected adjacent columns",
        "stride 7",
    ),
    (
        lambda: from_logits(X[:1].expand(4, 3, 7), inplace=True),
        ValueError,
        "logits: expected memory of their own",
        "a broadcast",
    ),
    (lambda: from_logits(old_logprobs=LOGP[:2]), ValueError, "the shape of token_ids", "[2, 3]"),
    (lambda: from_logits(mask=LOGP[:2]), ValueError, "the shape of token_ids", "[2, 3]"),
    (lambda: from_logits(spec=mk.LossSpec(beta=0.1)), ValueError, "ref_logprobs: exp", "None"),
    (lambda: mk.token_logprobs(X, IDS[0]), ValueError, "token_ids: expected shape", "[3]"),
    (lambda: mk.token_logprobs(X, IDS, mask=LOGP[0]), ValueError, "mask: expected shape", "[3]"),
    (lambda: mk.token_logprobs(X, IDS, return_entropy=1), TypeError, "return_entropy", "int 1"),
    (lambda: from_hidden(HIDDEN.long()), TypeError, "hidden: expected a floating", "int64"),
    (lambda: from_hidden(HIDDEN[0, 0]), ValueError, "hidden: expected shape [B, T, H]", "[5]"),
    (lambda: from_hidden(cu_seqlens=CU), ValueError, "hidden: expected shape [total, H]", "4, 3"),
    (lambda: from_hidden(ids=IDS[:2]), ValueError, "the shape of hidden without H", "[2, 3]"),
    (lambda: from_hidden(weight=W[:, :4]), ValueError, "lm_head_weight: expected shape", "[7, 4]"),
    (lambda: from_hidden(weight=W[0]), ValueError, "lm_head_weight: expected shape", "[5]"),
    (lambda: from_hidden(weight=W.to("meta")), ValueError, "lm_head_weight: expected", "meta"),
    (lambda: from_hidden(weight=W.char()), TypeError, "dequantise", "int8"),
    (lambda: from_hidden(weight=W.half()), TypeError, "expected the dtype of hidden", "float16"),
    (lambda: from_hidden(weight=W.as_subclass(DTensor)), TypeError, "full_tensor", "a DTensor"),
    (lambda: from_hidden(bias=W[:, 0][:6]), ValueError, "bias: expected shape [7]", "[6]"),
    (lambda: from_hidden(softcap=0.0), ValueError, "softcap: expected a number in (0", "0.0"),
    (lambda: from_hidden(logit_scale=-1.0), ValueError, "logit_scale: expected", "-1.0"),
    (lambda: from_hidden(chunk_rows=0), ValueError, "chunk_rows: expected at least 1", "0"),
    (lambda: from_hidden(chunk_rows=2.0), TypeError, "chunk_rows: expected an int", "2.0"),
    (lambda: from_hidden(temperature=0.0), ValueError, "temperature: expected", "0.0"),
    (lambda: mk.set_backend("cuda"), ValueError, "name: expected one of", "'cuda'"),
]


@pytest.mark.parametrize(("call", "error", "says", "came"), CASES)
def test_bad_input(call, error, says, came):
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert says in message
    assert came in message


def test_device_data_is_checked_on_request(monkeypatch):
    bad = torch.tensor([0, 7, 5, 9, 12])
    assert loss(PACKED, cu_seqlens=bad).loss.isfinite()
    monkeypatch.setenv("MAPO_KERNELS_VALIDATE", "1")
    with pytest.raises(ValueError, match=r"cu_seqlens: expected non-decreasing.*0 to 12.*7, 5"):
        loss(PACKED, cu_seqlens=bad)
    assert loss(PACKED, cu_seqlens=CU).loss == -1


def test_token_ids_of_hidden_states_are_checked_on_request(monkeypatch):
    ids = IDS.clone()
    ids[1, 2] = 7
    assert from_hidden(ids=ids).loss.isnan()
    monkeypatch.setenv("MAPO_KERNELS_VALIDATE", "1")
    with pytest.raises(ValueError, match=r"token_ids: expected ids in \[0, 7\) where live, got"):
        from_hidden(ids=ids)


def test_backend_errors(monkeypatch):
    monkeypatch.setenv("MAPO_KERNELS_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"MAPO_KERNELS_BACKEND: expected one of.*'cuda'"):
        mk.resolve_backend("cpu")
    monkeypatch.setenv("MAPO_KERNELS_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="expected tensors on a GPU"):
        mk.resolve_backend("cpu")
    assert mk.resolve_backend("cpu", is_double=True) == "eager"
    monkeypatch.setenv("MAPO_KERNELS_BACKEND", "eager")
    assert mk.resolve_backend("cuda") == "eager"
    monkeypatch.delenv("MAPO_KERNELS_BACKEND")
    assert mk.resolve_backend("cuda") == "triton"
    assert mk.resolve_backend("cuda", is_double=True) == "eager"
    assert mk.resolve_backend("cpu") == "eager"


def test_specs_are_frozen_and_can_be_packed():
    spec = mk.LossSpec(beta=0.1, aggregation="seq-mean-token-sum", rollout_mask=(0.5, 2))
    with pytest.raises(AttributeError):
        spec.beta = 0.2
    assert mk.LossSpec.unpack(*spec.pack()) == spec
    advantage_spec = mk.AdvantageSpec(certainty=0.3, max_abs=2)
    assert mk.AdvantageSpec.unpack(*advantage_spec.pack()) == advantage_spec
