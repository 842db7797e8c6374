"""Real runs of `MAPOTrainer`: rewards rise, adapters and evaluation work, dropping is exact."""

import statistics

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed")

from trl_support import (
    loss_and_gradients,
    new_batch,
    new_config,
    new_model,
    new_tokenizer,
    new_trainer,
    prompts,
    relative_gap,
    share_of_a,
    starts_with_a,
)

from mapo_kernels import group_advantages
from mapo_kernels.integrations.trl import MAPOTrainer

LEVELS = ("hidden", "logits", "logprobs")


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize(
    "options",
    (
        {"fused": "hidden", "drop_zero_signal": True},
        {"fused": "logits", "num_iterations": 2, "loss_type": "grpo", "max_steps": 80},
        {"fused": "logprobs", "certainty": 0.5, "max_abs": 3.0},
    ),
    ids=lambda options: options["fused"],
)
def test_the_reward_rises(options, tmp_path):
    settings = {"max_steps": 40, "learning_rate": 0.01, "gradient_accumulation_steps": 2, **options}
    trainer = new_trainer(tmp_path, **settings)
    trainer.train()
    rewards = logged(trainer, "reward")
    before, after = statistics.mean(rewards[:5]), statistics.mean(rewards[-5:])
    assert before < 0.2 and after > before + 0.4
    assert all(0.0 <= p <= 1.0 for p in logged(trainer, "mapo/success_ratio"))
    assert max(logged(trainer, "mapo/lambda")) > 0.2
    assert logged(trainer, "mapo/zero_signal")[0] > 0


def test_a_reward_function_by_name_says_what_success_is(tmp_path):
    trainer = new_trainer(
        tmp_path,
        rewards=[share_of_a, starts_with_a],
        reward_weights=[1.0, 0.0],
        success_reward="starts_with_a",
    )
    seen = []
    original = trainer._calculate_rewards
    trainer._calculate_rewards = lambda *args: seen.append(original(*args)) or seen[-1]
    trainer.train()
    expected = [float(rewards[:, 1].mean()) for rewards in seen]
    assert logged(trainer, "mapo/success_ratio") == pytest.approx(expected)
    assert len(expected) == 2


@pytest.mark.parametrize("level", LEVELS)
def test_a_run_with_lora_trains_the_adapter_alone(level, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    options = {"beta": 0.04, "max_steps": 3, "learning_rate": 0.05, "num_iterations": 2}
    trainer = new_trainer(tmp_path, rewards=share_of_a, peft_config=adapter, fused=level, **options)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not p.equal(before[name])}
    assert moved and all("lora" in name for name in moved)
    assert "lora_A" in str(moved) and "lora_B" in str(moved)
    assert max(logged(trainer, "kl")) > 0


@pytest.mark.parametrize("level", LEVELS)
def test_a_run_with_gradient_checkpointing_accumulation_and_evaluation(level, tmp_path):
    trainer = new_trainer(
        tmp_path,
        fused=level,
        gradient_checkpointing=True,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        eval_strategy="steps",
        eval_steps=1,
        eval_dataset=prompts(8),
        num_generations_eval=2,
        per_device_eval_batch_size=4,
    )
    trainer.train()
    assert len(logged(trainer, "eval_loss")) == 2
    assert all(value > 0 for value in logged(trainer, "eval_entropy"))
    assert logged(trainer, "eval_reward")
    result = trainer.evaluate()
    assert result["eval_loss"] == result["eval_loss"]


def test_bfloat16_autocast(tmp_path):
    trainer = new_trainer(tmp_path, rewards=share_of_a, bf16=True, learning_rate=0.01)
    trainer.train()
    assert all(0 < norm < 100 for norm in logged(trainer, "grad_norm"))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"))
def test_dropping_sequences_changes_neither_loss_nor_gradients(loss_type, level, tmp_path):
    options = {"fused": level, "loss_type": loss_type}
    whole = new_trainer(tmp_path, **options)
    dropping = new_trainer(tmp_path, drop_zero_signal=True, **options)
    seen = []
    dropping.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    for trainer in (whole, dropping):
        trainer.current_gradient_accumulation_steps = 2
    batch = new_batch(whole, old=True)
    batch["completion_mask"][3] = 0  # truncated: no tokens, whatever its advantage
    expected = loss_and_gradients(whole, whole._compute_loss, batch)
    loss, grads = loss_and_gradients(dropping, dropping._compute_loss, batch)
    assert seen == [5]  # of 8: two have advantage 0, one is masked
    assert loss == pytest.approx(expected[0], abs=1e-7)
    assert relative_gap(grads, expected[1]) < 1e-6
    metrics = dropping._metrics["train"]
    assert metrics["mapo/forward_sequences"] == [5 / 8]
    if level != "logprobs":  # there, whole batches report the entropy of every token
        assert metrics["entropy"] == pytest.approx(whole._metrics["train"]["entropy"], rel=1e-5)

    batch["advantages"][:] = 0.0
    seen.clear()
    loss, grads = loss_and_gradients(dropping, dropping._compute_loss, batch)
    assert seen == [1] and loss == 0.0
    assert grads.keys() == expected[1].keys()
    assert all(not grad.any() for grad in grads.values())


def test_dropping_with_vllm_ratios_and_off_policy_masks(tmp_path):
    options = {"off_policy_mask_threshold": 0.01, "loss_type": "grpo"}
    whole = new_trainer(tmp_path, **options)
    dropping = new_trainer(tmp_path, drop_zero_signal=True, **options)
    batch = new_batch(whole, old=True)
    batch["importance_sampling_ratio"] = torch.rand(8, 1) * 2
    batch["tool_mask"] = (torch.rand(batch["completion_mask"].shape) < 0.7).long()
    found = []
    for trainer in (whole, dropping):
        trainer.current_gradient_accumulation_steps = 1
        trainer.use_vllm = True
        found.append(loss_and_gradients(trainer, trainer._compute_loss, batch))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-7)
    assert relative_gap(found[1][1], found[0][1]) < 1e-6


def test_a_dropping_run_ends_with_the_weights_of_a_whole_one(tmp_path):
    finals = []
    for drop in (False, True):
        trainer = new_trainer(
            tmp_path,
            rewards=share_of_a,
            drop_zero_signal=drop,
            optim="sgd",
            learning_rate=0.5,
            max_steps=4,
        )
        trainer.train()
        finals.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
        if drop:
            assert min(logged(trainer, "mapo/forward_sequences")) < 1
    assert relative_gap(finals[1], finals[0]) < 1e-6
    start = dict(new_model().named_parameters())
    assert relative_gap(finals[0], start) > 1e-3


def weighted_prompts():
    data = prompts()
    return data.add_column("weight", [float(i % 3) for i in range(len(data))])


@pytest.mark.parametrize(
    "options",
    (
        {"group_weight_column": "weight", "max_abs": 1.5},
        {"difficulty": "focal", "difficulty_exponent": 2.0},
        {"pass_at_k": 2},
        {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": [1.0, 0.5]},
    ),
    ids=str,
)
def test_advantages_of_a_run_are_those_of_its_options(options, tmp_path):
    """What the function makes of the rewards that TRL gathered."""

    class Recorded(MAPOTrainer):
        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            weight = torch.tensor([x["weight"] for x in inputs])
            self.seen.append((self._gathered_rewards, weight, batch["advantages"]))
            return batch

    trainer = Recorded(
        model=new_model(),
        reward_funcs=[starts_with_a, share_of_a],
        args=new_config(tmp_path, success_reward="share_of_a", success_threshold=0.05, **options),
        train_dataset=weighted_prompts(),
        processing_class=new_tokenizer(),
    )
    trainer.seen = []
    trainer.train()
    settings = {k: v for k, v in options.items() if k != "group_weight_column"}
    for rewards, weight, found in trainer.seen:
        told = {"success": rewards[:, 1] >= 0.05, "group_size": 4, **settings}
        if "group_weight_column" in options:
            told["group_weight"] = weight
        if "reward_weights" not in options:
            rewards = rewards.sum(1)
        torch.testing.assert_close(found, group_advantages(rewards, **told))
    assert any(found.any() for *_, found in trainer.seen)
