"""verl 0.9.1, from nothing to the whole launch command: data, model, reward function, settings.

`python examples/verl_launch.py FOLDER` writes all of it and prints the command; `--run` runs it,
which takes a GPU and has not been tried. Checked on a CPU: verl validates the settings and loads
the model, the data and the reward function.
"""

import shlex
import subprocess
import sys
from pathlib import Path

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

LETTERS = "abcdefghijklmnop"


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return float(solution_str.startswith(ground_truth))


def write_data(path):  # the right answer is the next letter of the alphabet
    rows = []
    for letter, following in zip(LETTERS, LETTERS[1:] + LETTERS[:1], strict=True):
        prompt = [{"role": "user", "content": letter}]
        truth = {"style": "rule", "ground_truth": following}
        rows.append({"data_source": "letters", "prompt": prompt, "reward_model": truth})
    Dataset.from_list(rows * 64).to_parquet(path)


def write_model(folder):
    words = {word: i for i, word in enumerate(["<pad>", "<end>", *LETTERS])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    names = {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **names)
    tokenizer.chat_template = "{% for x in messages %}{{ x['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    ids = {"vocab_size": len(words), "pad_token_id": 0, "eos_token_id": 1}
    config = Qwen2Config(**sizes, **ids, num_attention_heads=2, num_key_value_heads=2)
    Qwen2ForCausalLM(config).save_pretrained(folder)


def command_for(folder):
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    settings = {
        "algorithm.adv_estimator": "mapo",
        "+algorithm.mapo.success_threshold": 1.0,  # any field of AdvantageSpec
        f"{actor}.policy_loss.loss_mode": "mapo_fused",
        f"{actor}.clip_ratio_high": 0.28,
        f"{actor}.optim.lr": 1e-3,
        f"{actor}.ppo_mini_batch_size": 64,
        f"{actor}.use_dynamic_bsz": True,
        "actor_rollout_ref.model.path": folder / "model",
        f"{rollout}.name": "vllm",
        f"{rollout}.n": 8,  # answers per prompt
        f"{rollout}.tensor_model_parallel_size": 1,
        "data.train_files": folder / "train.parquet",
        "data.val_files": folder / "train.parquet",
        "data.train_batch_size": 128,
        "data.max_response_length": 8,
        "reward.custom_reward_function.path": Path(__file__).resolve(),
        "trainer.n_gpus_per_node": 1,
        "trainer.logger": "[console]",
    }
    words = (f"{name}={value}" for name, value in settings.items())
    return [sys.executable, "-m", "verl.trainer.main_ppo", *words]


if __name__ == "__main__":
    folder = Path(sys.argv[1]).resolve()
    write_model(folder / "model")
    write_data(folder / "train.parquet")
    print(shlex.join(command := command_for(folder)))
    if "--run" in sys.argv:
        subprocess.run(command, check=True)
