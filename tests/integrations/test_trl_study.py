"""`study ablation --model`: a random model and its tokenizer from a folder, trained by TRL."""

import json
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="trl is not installed")
pytest.importorskip("reasoning_gym", reason="reasoning_gym is not installed")
pytest.importorskip("yaml")

import torch
import transformers
import yaml
from reasoning_gym import create_dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from mapo_kernels import files
from mapo_kernels.__main__ import main
from mapo_kernels.files import CommandError
from mapo_kernels.integrations.trl import MAPOConfig
from mapo_kernels.integrations.trl_options import advantage_spec_of, loss_spec_of
from mapo_kernels.study import model_runs
from mapo_kernels.study.analytic import VARIANTS

PAPER = Path(__file__).parents[2] / "examples" / "paper_setting.yaml"
# A token is a whole answer in the right form, so that a random model is right now and then.
ANSWERS = [f"<think></think>\\boxed{{{number}}}" for number in range(2, 19)]
SETTINGS = {
    "task": {
        "name": "chain_sum",
        "problems": 16,
        "options": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    },
    "prompt": "{question}",
    "format_weight": 0.1,
    "evaluation": {"problems": 32, "batch": 20, "temperature": 1.0, "top_p": 1.0},
    "trainer": {
        "num_generations": 8,
        "generation_batch_size": 16,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "max_steps": 4,
        "max_completion_length": 1,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tiny random model and its tokenizer."""
    folder = str(tmp_path_factory.mktemp("models") / "tiny")
    words = ["<pad>", "<eos>", *ANSWERS, *"0123456789+-=?. abcdefghijklmnopqrstuvwxyzCSTHPW"]
    raw = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    raw.pre_tokenizer = Split("", "isolated")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    made = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # answers are likely, and other tokens are not
        made.lm_head.weight.zero_()
        made.model.norm.weight.fill_(1.0)
    made.save_pretrained(folder)
    return folder


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    return path


def run(model, config, out, estimators=("mapo-0.5",), seeds=1):
    return model_runs.run(model, config, estimators=estimators, seeds=seeds, device="cpu", out=out)


def test_a_model_from_a_folder_is_trained_and_the_rest_is_resumed(model, config, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(model, config, out) == 0
    assert "tiny mapo-0.5 seed 0: success" in capsys.readouterr().out
    before = (out / "models.jsonl").read_bytes()
    with (out / "models.jsonl").open("a") as file:
        file.write('{"format": "mapo-')  # a run that was cut off
    assert run(model, config, out, ("mapo-0.5", "grpo")) == 0
    assert (out / "models.jsonl").read_bytes().startswith(before)
    records = model_runs.read_records(out / "models.jsonl")
    assert [x["estimator"] for x in records] == ["mapo-0.5", "grpo"]
    for record in records:
        assert record["model"] == "tiny"
        assert record["config"] == SETTINGS
        assert 0 <= record["before"] <= 1 and 0 <= record["after"] <= 1
        steps = [x for x in record["log"] if "loss" in x]
        assert len(steps) == 4
        # Some groups had signal, so that the advantages and the loss of this package ran.
        assert any(x["grad_norm"] > 0 for x in steps)
    # The same start, and the same draws of evaluation.
    assert records[0]["before"] == records[1]["before"]


def test_the_command_line_trains_and_its_report_says_so(model, config, tmp_path):
    given = ["--model", model, "--config", str(config), "--device", "cpu", "--seeds", "1"]
    given += ["--estimators", "mapo-step", "--out", str(tmp_path)]
    assert main(["study", "ablation", *given]) == 0
    assert main(["study", "report", str(tmp_path), "--markdown", str(tmp_path / "page.md")]) == 0
    page = (tmp_path / "page.md").read_text()
    assert "| tiny | MAPO step | 0 |" in page and "study ablation --model tiny" in page


def test_without_a_choice_all_estimators_run_that_trl_has(config, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(model_runs, "run", lambda *_, **given: asked.append(given) or 0)
    given = ["--model", "x", "--config", str(config), "--out", str(tmp_path)]
    assert main(["study", "ablation", *given]) == 0
    assert asked[0]["estimators"] == list(VARIANTS)


def test_other_settings_are_not_continued(model, config, tmp_path):
    run(model, config, tmp_path)
    config.write_text(yaml.safe_dump(SETTINGS | {"format_weight": 0.2}))
    with pytest.raises(CommandError, match="other settings"):
        run(model, config, tmp_path, ("grpo",))


@pytest.mark.parametrize(
    "change, says",
    [
        ({"prompt": "no place"}, "prompt"),
        ({"trainer": {"output_dir": "x"}}, "'output_dir' is no field"),
        ({"trainer": {"colour": "red"}}, "'colour' is no field"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_settings_that_are_none_are_refused(config, change, says):
    config.write_text(yaml.safe_dump(SETTINGS | change))
    with pytest.raises(CommandError, match=says):
        model_runs.read_config(config)
    config.write_text("a: [")
    with pytest.raises(CommandError, match="expected settings of a study"):
        model_runs.read_config(config)


def test_an_estimator_that_the_trainer_has_not_is_refused(model, config, tmp_path):
    with pytest.raises(CommandError, match="'dapo'"):
        run(model, config, tmp_path, ("dapo",))


def test_a_damaged_record_is_named(tmp_path):
    path = tmp_path / "models.jsonl"
    path.write_text(json.dumps({"format": "other"}) + "\n")
    with pytest.raises(CommandError, match="line 1 is no record"):
        model_runs.read_records(path)


def test_rewards_are_format_and_accuracy():
    problems = create_dataset("chain_sum", seed=0, size=2, min_terms=2, max_terms=2)
    right = problems[0]["answer"]
    reward = model_runs.Reward(problems, 0.1)
    answers = [
        f"<think>so</think> \\boxed{{{right}}}",
        f"\\boxed{{{right}}}",
        "<think></think>\\boxed{no}",
        right,
    ]
    found = reward(answers, problem=[0] * 4)
    # A whole reward is exactly 1, which is the threshold of a success.
    assert found[0] == 1.0
    assert found[1:] == pytest.approx([0.9, 0.1 + 0.9 * reward.accuracy(answers[2], 0), 0.0])
    chats = [[{"role": "assistant", "content": text}] for text in answers]
    assert reward(chats, problem=[0] * 4) == found


def test_the_papers_setting_is_one(tmp_path):
    settings = model_runs.read_config(PAPER)
    files.check(settings, model_runs.CONFIG_SCHEMA)
    assert create_dataset(settings["task"]["name"], seed=0, size=1)[0]["question"]
    trainer = settings["trainer"] | {"bf16": False}
    config = MAPOConfig(output_dir=str(tmp_path), use_cpu=True, **trainer)
    loss, advantages = loss_spec_of(config), advantage_spec_of(config)
    assert config.num_generations == 12
    assert advantages.success_threshold == 1.0 and advantages.estimator == "mapo"
    assert config.learning_rate == 1e-6
    assert (loss.beta, loss.eps_low, loss.eps_high, loss.dual_clip) == (0.01, 0.2, 0.3, 3.0)
    assert loss.aggregation == "token-mean"
    # 512 prompts of 12 answers, in 4 updates.
    assert config.steps_per_generation / config.gradient_accumulation_steps == 4
    assert config.generation_batch_size == 512 * 12
