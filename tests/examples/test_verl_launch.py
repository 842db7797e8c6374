"""What a CPU can tell of `examples/verl_launch.py`; run where verl is installed."""

import shlex
import subprocess
import sys

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed")
pytest.importorskip("hydra", reason="hydra is not installed")

import hydra
from example_files import FOLDER
from transformers import AutoModelForCausalLM
from verl.trainer.ppo.reward import get_custom_reward_fn
from verl.trainer.ppo.utils import create_rl_dataset, need_critic, need_reference_policy
from verl.utils.config import omega_conf_to_dataclass, validate_config


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The command that the script prints, and its settings as verl composes them."""
    folder = tmp_path_factory.mktemp("verl")
    script = [sys.executable, FOLDER / "verl_launch.py", folder]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        return words, hydra.compose("ppo_trainer", overrides=words[3:])


def test_verls_entry_point_takes_the_command(launched):
    """Hydra prints the settings and ends, before Ray starts."""
    done = subprocess.run([*launched[0], "--cfg", "job"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "adv_estimator: mapo" in done.stdout


def test_verl_validates_the_settings(launched):
    config = launched[1]
    use = {"use_reference_policy": need_reference_policy(config), "use_critic": need_critic(config)}
    validate_config(config=config, **use)
    assert not any(use.values())
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert (actor.policy_loss.loss_mode, actor.clip_ratio_high) == ("mapo_fused", 0.28)
    assert omega_conf_to_dataclass(config.actor_rollout_ref.rollout).n == 8


def test_verl_reads_the_model_the_data_and_the_reward_function(launched):
    config = launched[1]
    model_config = omega_conf_to_dataclass(config.actor_rollout_ref.model)
    tokenizer = model_config.tokenizer
    dataset = create_rl_dataset(config.data.train_files, config.data, tokenizer, None)
    assert len(dataset) == 1024
    row = dataset[0]
    ids = tokenizer.apply_chat_template(row["raw_prompt"], return_dict=False)
    assert tokenizer.decode(ids) == row["raw_prompt"][0]["content"] == "a"
    reward = get_custom_reward_fn(config)
    truth = row["reward_model"]["ground_truth"]
    for answer, expected in (("b", 1.0), ("c", 0.0)):
        given = {"data_source": row["data_source"], "solution_str": answer}
        assert reward(**given, ground_truth=truth, extra_info={}) == expected
    model = AutoModelForCausalLM.from_pretrained(config.actor_rollout_ref.model.path)
    with torch.no_grad():
        assert model(torch.tensor([ids])).logits.shape == (1, 1, len(tokenizer))
