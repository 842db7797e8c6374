"""What the trainer integrations are made of, where no trainer is needed."""

from types import SimpleNamespace

import pytest
import torch

import mapo_kernels as mk
from mapo_kernels.integrations import trl_options as options
from mapo_kernels.integrations.trl_micro_batch import clip_extremes

# The defaults of TRL 1.16, and those of MAPOConfig.
DEFAULTS = {
    "loss_type": "dapo",
    "epsilon": 0.2,
    "epsilon_high": None,
    "delta": None,
    "beta": 0.0,
    "use_bias_correction_kl": True,
    "importance_sampling_level": "token",
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
    "use_vllm": False,
    "vllm_importance_sampling_correction": True,
    "max_completion_length": 512,
    "scale_rewards": "group",
    "multi_objective_aggregation": "sum_then_normalize",
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "top_entropy_quantile": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": None,
    "generation_kwargs": None,
    "estimator": "mapo",
    "certainty": "quadratic",
    "success_threshold": 1.0,
    "max_abs": None,
    "difficulty": None,
    "difficulty_exponent": 0.5,
    "pass_at_k": None,
    "advantage_eps": 1e-6,
    "fused": "hidden",
    "drop_zero_signal": False,
    "score_all": False,
    "replay_sampling_mask": True,
}


def config(**changes):
    return SimpleNamespace(**{**DEFAULTS, **changes})


def test_the_loss_of_each_of_trls_types():
    options.check_config(config())
    spec = options.loss_spec_of(config(epsilon_high=0.28, beta=0.1, delta=3.0))
    expected = mk.LossSpec(
        eps_high=0.28, beta=0.1, dual_clip=3.0, kl_importance_correction=True, eps_high_cispo=0.28
    )
    assert spec == expected
    # TRL caps CISPO's ratio at epsilon_high itself, or at epsilon where that is None.
    assert options.loss_spec_of(config(loss_type="cispo")).eps_high_cispo == 0.2
    spec = options.loss_spec_of(config(loss_type="dr_grpo", max_completion_length=7))
    assert (spec.aggregation, spec.max_tokens) == ("seq-mean-token-sum-norm", 7)
    assert options.loss_spec_of(config(loss_type="sapo")).objective == "sapo"
    spec = options.loss_spec_of(config(loss_type="vespo", vespo_k_pos=1.5))
    assert (spec.objective, spec.importance_level, spec.vespo_k_pos) == ("vespo", "sequence", 1.5)
    assert options.loss_spec_of(config(loss_type="grpo")).aggregation == "seq-mean-token-mean"


@pytest.mark.parametrize(
    "changes, message",
    (
        ({"loss_type": "ppo"}, r"loss_type: expected one of .*'dapo'.*, got 'ppo'"),
        ({"loss_type": "vespo", "importance_sampling_level": "sequence"}, "importance_sampling"),
        ({"loss_type": "vespo", "vespo_k_neg": -1.0}, "vespo_k_neg: expected a number in"),
        ({"loss_type": "vespo", "use_vllm": True, "beta": 0.1}, "use_bias_correction_kl: expected"),
        ({"loss_type": "dr_grpo", "max_completion_length": None}, "max_completion_length"),
        ({"epsilon": 0.0}, r"epsilon: expected a number in \(0, 1\), got 0.0"),
        ({"epsilon_high": -1.0}, "epsilon_high: expected a number in"),
        ({"delta": 1.2}, r"delta: expected a number in \(1.2, inf\]?.*, got 1.2"),
        ({"delta": 2.0, "loss_type": "cispo"}, "delta: expected None with loss_type 'cispo'"),
        ({"sapo_temperature_pos": 0.0}, "sapo_temperature_pos"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level"),
        ({"scale_rewards": "all"}, "scale_rewards: expected one of"),
        ({"scale_rewards": "batch", "estimator": "mean"}, "scale_rewards: expected one of.*'mean'"),
        ({"multi_objective_aggregation": "mean"}, "multi_objective_aggregation: expected one of"),
        ({"entropy_coef": -0.01}, "entropy_coef: expected a number in"),
        ({"entropy_coef": 0.01, "loss_type": "sapo", "beta": 0.1}, "beta: expected 0.0 .*'sapo'"),
        ({"use_adaptive_entropy": True}, "use_adaptive_entropy"),
        ({"fused": "head"}, "fused: expected one of"),
        ({"fused": "logprobs", "top_p": 0.9}, "fused: expected 'hidden' or 'logits' where replay"),
        ({"estimator": "gae"}, "estimator: expected one of"),
        ({"certainty": "cubic"}, "certainty: expected one of"),
        ({"certainty": "1.5"}, r"certainty: expected a number in \[0, 1\], got 1.5"),
        ({"max_abs": 0.0}, "max_abs"),
        ({"advantage_eps": 0.0}, "advantage_eps"),
        ({"drop_zero_signal": True, "beta": 0.04}, "beta: expected 0.0 .*, got 0.04"),
        ({"drop_zero_signal": True, "top_entropy_quantile": 0.5}, "top_entropy_quantile"),
        ({"drop_zero_signal": True, "score_all": True}, "score_all"),
    ),
    ids=str,
)
def test_what_cannot_work_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        options.check_config(config(**changes))


@pytest.mark.parametrize("name", ("drop_zero_signal", "score_all", "replay_sampling_mask"))
def test_switches_are_bools(name):
    with pytest.raises(TypeError, match=f"{name}: expected a bool"):
        options.check_config(config(**{name: "yes"}))


def test_which_settings_truncate():
    for off in ({}, {"top_k": -1}, {"min_p": 0.0}, {"generation_kwargs": {"top_p": None}}):
        assert not options.truncates(config(**off)), off
    filters = ({"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"typical_p": 0.9}, {"top_h": 0.5})
    for name, value in (item for found in filters for item in found.items()):
        assert options.truncates(config(generation_kwargs={name: value})), name
    assert not options.truncates(config(top_p=0.9, generation_kwargs={"top_p": 1.0}))
    options.check_config(config(fused="logprobs", top_p=0.9, replay_sampling_mask=False))


def test_a_function_that_does_not_apply_to_a_group_says_nothing_about_it():
    nan = float("nan")
    given = torch.tensor([[1.0, nan], [0.0, nan], [nan, 2.0], [1.0, 3.0], [nan, nan], [1.0, 2.0]])
    found = options.rewards_of_functions(given, 2)
    expected = given.clone()
    expected[:2, 1] = 0.0
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_shares_of_clipped_tokens_of_sequences():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]])
    old = torch.zeros(3, 3)
    new = torch.log(torch.tensor([[0.5, 1.0, 9.0], [2.0, 0.1, 1.9], [9.0, 9.0, 9.0]]))
    A = torch.tensor([-1.0, 1.0, 1.0])
    low, high = clip_extremes(new, old, A, mask, mk.LossSpec())
    assert (float(low), float(high)) == (0.0, pytest.approx(2 / 3))
    low, _ = clip_extremes(new, old, -A.abs(), mask, mk.LossSpec())
    assert float(low) == pytest.approx(1 / 3)
    low, high = clip_extremes(None, None, A, mask, mk.LossSpec())
    assert (float(low), float(high)) == (0.0, 0.0)
    low, high = clip_extremes(new, old, A, mask * 0, mk.LossSpec())
    assert low.isnan() and high.isnan()


def test_a_certainty_may_come_from_a_command_line():
    assert options.advantage_spec_of(config(certainty="0.25")).certainty == 0.25
    assert options.advantage_spec_of(config(certainty=1)).certainty == 1.0


def test_rewards_are_weighted_and_success_is_a_function_of_its_own():
    nan = float("nan")
    rewards = torch.tensor([[0.5, 1.0], [nan, 0.0], [nan, nan], [1.0, nan]])
    weights = torch.tensor([2.0, 0.5])
    total, success = options.rewards_and_success(rewards, weights, None, 1.0)
    torch.testing.assert_close(total, torch.tensor([1.5, 0.0, nan, 2.0]), equal_nan=True)
    assert success is None
    _, success = options.rewards_and_success(rewards, weights, 1, 1.0)
    assert success.tolist() == [True, False, False, False]
    assert options.success_column("b", ["a", "b"]) == 1
    assert options.success_column(None, ["a", "b"]) is None
    for names in (["a"], ["b", "b"]):
        with pytest.raises(ValueError, match="success_reward: expected the name of one"):
            options.success_column("b", names)


@pytest.mark.parametrize("loss_type", sorted(options.AGGREGATIONS))
def test_denominators_add_micro_batches_and_ranks_up(loss_type):
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    shared = {"steps_per_generation": 4, "num_processes": 2}
    items = torch.tensor(24)

    def of(**changes):
        return float(
            options.denominator(
                loss_type, mask, items, **{**shared, "accumulation": 2, "training": True, **changes}
            )
        )

    per_token = dict.fromkeys(("dapo", "cispo", "vespo"), 24 / 2 * 2 / 4) | {"bnpo": 3 * 2}
    assert of() == per_token.get(loss_type, 2 * 2)
    in_evaluation = dict.fromkeys(("dapo", "cispo", "vespo"), 24 / 2) | {"bnpo": 3}
    assert of(training=False) == in_evaluation.get(loss_type, 2)


def test_rows_without_signal_are_found_but_never_all_of_them():
    mask = torch.tensor([[1, 1], [1, 0], [0, 0], [1, 1]])
    rows = options.rows_with_signal(torch.tensor([0.0, -0.5, 2.0, 1.0]), mask)
    assert rows.tolist() == [1, 3]
    per_token = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    assert options.rows_with_signal(per_token, mask).tolist() == [0]
    assert options.rows_with_signal(torch.zeros(4), mask).tolist() == [0]
    batch = {"mask": mask, "count": torch.tensor(5), "absent": None, "names": list("abcd")}
    taken = options.take_rows(batch, rows)
    assert taken["mask"].tolist() == [[1, 0], [1, 1]]
    assert taken["count"] == 5 and taken["absent"] is None
    assert taken["names"] == ["abcd"[n] for n in rows]


FAMILIES = {
    "Llama": {},
    "Gemma2": {"final_logit_softcapping": 2.0},
    "Cohere": {"logit_scale": 0.4},
    "Granite": {"logits_scaling": 1.7},
}


@pytest.mark.parametrize("level", ("hidden", "logits"))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_patched_forward_returns_the_loss_of_the_models_logits(family, level):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from mapo_kernels.integrations.fused_forward import LossCall, patch_forward

    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}
    sizes |= {"bos_token_id": None, "eos_token_id": 1, "initializer_range": 0.2}
    settings = getattr(transformers, f"{family}Config")(**{**sizes, **FAMILIES[family]})
    model = transformers.AutoModelForCausalLM.from_config(settings)
    ids = torch.randint(2, 31, (4, 9))
    arguments = {
        "advantages": torch.tensor([1.0, -0.5, 0.0, 0.3]),
        "mask": torch.rand(4, 5) < 0.8,
        "old_logprobs": -torch.rand(4, 5) - 3,
        "spec": mk.LossSpec(score_all=True),
    }
    plain = model(input_ids=ids).logits
    expected = mk.mapo_loss_from_logits(
        plain[:, 3:8].clone(), ids[:, 4:], temperature=0.7, **arguments
    )
    expected.loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    patch_forward(model, level=level, temperature=0.7, float32_head=False)
    out = model(input_ids=ids, loss_call=LossCall(ids[:, 4:], arguments))
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.metrics["entropy"], expected.metrics["entropy"])
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-6)

    seen = []

    def weigh(log_probs, entropy):
        seen.append((log_probs, entropy))
        return torch.ones_like(log_probs)

    again = model(input_ids=ids, loss_call=LossCall(ids[:, 4:], arguments, weigh))
    torch.testing.assert_close(again.loss, expected.loss)
    scored = mk.token_logprobs(plain[:, 3:8].detach(), ids[:, 4:], temperature=0.7)
    live = arguments["mask"]
    torch.testing.assert_close(seen[0][0][live], scored[live])
    assert seen[0][0].shape == seen[0][1].shape == (4, 5)
    # Any other call is the model's own.
    torch.testing.assert_close(model(input_ids=ids).logits, plain)


def test_wrappers_see_no_tensors_in_a_loss_call():
    pytest.importorskip("transformers", reason="transformers is not installed")
    from torch.distributed.utils import _apply_to_tensors
    from torch.utils import _pytree

    from mapo_kernels.integrations.fused_forward import LossCall

    call = LossCall(torch.ones(1, 2), {"old_logprobs": torch.rand(1, 2)})
    assert _pytree.tree_leaves({"loss_call": call}) == [call]
    # FSDP casts what it finds in its inputs.
    assert _apply_to_tensors(lambda x: x.bfloat16(), {"loss_call": call})["loss_call"] is call
