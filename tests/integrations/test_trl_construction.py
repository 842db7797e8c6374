"""What cannot work says so when the config or the trainer is built, by the option's name."""

import warnings

import pytest

pytest.importorskip("trl", reason="trl is not installed")

from trl import GRPOConfig, GRPOTrainer, TrlParser
from trl_support import new_config, new_model, new_trainer

from mapo_kernels.integrations.trl import MAPOConfig, MAPOTrainer


@pytest.mark.parametrize(
    "changes, message",
    (
        ({"loss_type": "ppo"}, "loss_type: expected one of .*got 'ppo'"),
        ({"use_adaptive_entropy": True}, "use_adaptive_entropy: expected False .*got True"),
        ({"entropy_coef": 0.1, "loss_type": "grpo", "beta": 0.1}, "beta: expected 0.0 .*got 0.1"),
        ({"entropy_coef": 0.1, "top_entropy_quantile": 0.5}, "top_entropy_quantile: expected 1.0"),
        ({"entropy_coef": 0.1, "drop_zero_signal": True}, "drop_zero_signal: expected False"),
        ({"pass_at_k": 0}, "pass_at_k: expected an int from 1 up"),
        ({"difficulty": "hard"}, "difficulty: expected one of"),
        ({"dual_clip": 1.1}, "delta: expected a number in .1.2"),
        ({"dual_clip": 3.0, "delta": 2.0}, "dual_clip: expected None or TRL's delta 2.0.*got 3.0"),
        ({"scale_rewards": "batch", "estimator": "rloo"}, "scale_rewards: expected.*got 'batch'"),
        ({"drop_zero_signal": True, "beta": 0.1}, "beta: expected 0.0 .*KL term.*got 0.1"),
        ({"estimator": "gae"}, "estimator: expected one of"),
        ({"fused": "everything"}, "fused: expected one of"),
    ),
    ids=str,
)
def test_configs_that_cannot_work(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        new_config(tmp_path, **changes)


def test_dual_clip_is_delta(tmp_path):
    config = new_config(tmp_path, dual_clip=3.0)
    assert config.delta == 3.0
    assert new_trainer(tmp_path, dual_clip=3.0)._loss_spec.dual_clip == 3.0
    assert new_config(tmp_path, delta=3.0, dual_clip=3.0).delta == 3.0


def test_trainers_that_cannot_work(tmp_path):
    with pytest.raises(TypeError, match="args: expected a MAPOConfig, got GRPOConfig"):
        new_trainer(
            tmp_path,
            trainer=lambda args, **named: MAPOTrainer(
                args=GRPOConfig(str(tmp_path), use_cpu=True, bf16=False), **named
            ),
        )
    with pytest.raises(ValueError, match=r"success_reward: .*\['starts_with_a'\], got 'correct'"):
        new_trainer(tmp_path, success_reward="correct")
    experts = new_model("Mixtral", num_local_experts=4, output_router_logits=True)
    with pytest.raises(ValueError, match="drop_zero_signal: expected False with router_aux"):
        new_trainer(tmp_path, model=experts, drop_zero_signal=True)
    split = new_model()
    split.hf_device_map = {"model": 0, "lm_head": 1}
    with pytest.raises(ValueError, match="fused: expected 'logprobs' with a model that is split"):
        new_trainer(tmp_path, model=split)


def test_options_come_from_a_command_line_too(tmp_path):
    parser = TrlParser(MAPOConfig)
    given = "--estimator mapo --certainty 0.25 --success_reward correct --max_abs 4 --dual_clip 3"
    given += f" --fused logits --drop_zero_signal True --use_cpu True --output_dir {tmp_path}"
    (config,) = parser.parse_args_and_config((given + " --bf16 False").split())
    assert config.certainty == "0.25" and config.max_abs == 4.0 and config.drop_zero_signal is True
    assert config.success_reward == "correct" and config.delta == 3.0


@pytest.mark.parametrize("estimator", ("mapo", "grpo", "mean", "rloo", "apd"))
def test_the_recipe_of_dr_grpo(estimator, tmp_path):
    recipe = {"loss_type": "dr_grpo", "scale_rewards": "none", "estimator": estimator}
    if estimator == "apd":
        # It has no z-score that could go without its scale.
        with pytest.raises(ValueError, match="scale_rewards: expected .* with estimator 'apd'"):
            new_config(tmp_path, **recipe)
        return
    trainer = new_trainer(tmp_path, **recipe)
    assert trainer._advantage_spec.scale == "none"
    assert trainer._loss_spec.aggregation == "seq-mean-token-sum-norm"
    trainer.train()


def test_a_config_in_the_wrong_trainer_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="args: GRPOTrainer got a MAPOConfig.*Use MAPOTrainer"):
        new_trainer(tmp_path, trainer=GRPOTrainer)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "args: ")
        new_trainer(tmp_path)


def test_the_defaults_are_mapos(tmp_path):
    trainer = new_trainer(tmp_path)
    assert trainer.args.estimator == "mapo" and trainer.args.fused == "hidden"
    assert trainer.args.certainty == "quadratic" and trainer.args.success_threshold == 1.0
    assert trainer._loss_spec.kl_importance_correction is True
