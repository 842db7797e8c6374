"""`study ablation --model`: a Hugging Face causal LM, a reasoning-gym task, TRL's trainer.

One run for each estimator and seed, from the same weights; a line of `OUT/models.jsonl` each. What
else decides a run stands in a yaml file: `examples/paper_setting.yaml` has the paper's.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from mapo_kernels import files
from mapo_kernels.files import CommandError, append_line, drop_cut_off_line, read_lines
from mapo_kernels.study.analytic import VARIANTS

FORMAT = "mapo-kernels study models 1"
RECORDS_NAME = "models.jsonl"
CONFIG_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["task", "prompt", "format_weight", "evaluation", "trainer"],
    "additionalProperties": False,
    "properties": {
        "task": {
            "type": "object",
            "required": ["name", "problems"],
            "additionalProperties": False,
            "properties": {
                "name": {"type": "string"},  # of a dataset of reasoning-gym
                "problems": {"type": "integer", "minimum": 1},  # to train on
                "options": {"type": "object"},  # of the dataset
            },
        },
        "prompt": {"type": "string", "pattern": r"\{question\}"},
        "format_weight": {"type": "number", "minimum": 0, "maximum": 1},
        "evaluation": {
            "type": "object",
            "required": ["problems", "batch", "temperature", "top_p"],
            "additionalProperties": False,
            "properties": {
                "problems": {"type": "integer", "minimum": 1},
                "batch": {"type": "integer", "minimum": 1},
                "temperature": {"type": "number", "exclusiveMinimum": 0},
                "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
            },
        },
        "trainer": {"type": "object"},  # fields of MAPOConfig
    },
}
RECORD_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": [
        *("format", "model", "estimator", "seed", "config", "before", "after", "log"),
        *("seconds", "environment"),
    ],
    "additionalProperties": False,
    "properties": {
        "format": {"const": FORMAT},
        "model": {"type": "string"},
        "estimator": {"enum": list(VARIANTS)},
        "seed": {"type": "integer", "minimum": 0},
        "config": {"type": "object"},
        "before": {"type": "number"},  # share of right answers to held-out problems
        "after": {"type": "number"},
        "log": {"type": "array", "items": {"type": "object"}},  # of the trainer
        "seconds": {"type": "number"},
        "environment": {"type": "object"},
    },
}
# What the study sets itself.
RESERVED = ("output_dir", "estimator", "certainty", "seed", "use_cpu", "report_to", "save_strategy")
SHAPE = re.compile(r"<think>.*</think>.*\\boxed\{.*\}.*", re.DOTALL)
HELD_OUT_SEED = 10**6  # far from the seeds of runs


def run(
    model: str,
    config: Path,
    *,
    estimators: Sequence[str],
    seeds: int,
    device: str,
    out: Path,
) -> int:
    """Train what is missing of `out`; returns the exit code.

    Args:
        model: a name on the Hugging Face hub, or a folder with a model and its tokenizer.
        config: a yaml file as CONFIG_SCHEMA has it.
        estimators: names in `VARIANTS`.
        seeds: seeds 0 .. seeds - 1.
        device: a torch device.
        out: the folder of the results.

    Raises:
        CommandError: a file that cannot be used, or an estimator that TRL's trainer has not.
    """
    files.require("trl", "trl", "transformers", "datasets")
    files.require("demo", "reasoning_gym", "jsonschema")
    unknown = [name for name in estimators if name not in VARIANTS]
    if unknown:
        expected = f"--estimators: expected some of {list(VARIANTS)} with --model"
        raise CommandError(f"{expected}, got {unknown[0]!r}")
    settings = read_config(config)
    with files.naming(out):
        out.mkdir(parents=True, exist_ok=True)
    path = out / RECORDS_NAME
    records = read_records(path) if path.exists() else []
    done = {(x["model"], x["estimator"], x["seed"]) for x in records}
    name = Path(model).name if Path(model).exists() else model
    for record in records:
        if record["model"] == name and record["config"] != settings:
            reason = f"has runs of {name} with other settings: choose another --out"
            raise CommandError(f"{path}: {reason}")
    if path.exists():
        drop_cut_off_line(path)
    for seed in range(seeds):
        for estimator in estimators:
            if (name, estimator, seed) not in done:
                found = {"model": name, **_train(model, settings, estimator, seed, device)}
                append_line(path, found)
                print(
                    f"{name} {estimator} seed {seed}: success {found['before']:.3f} -> "
                    f"{found['after']:.3f} in {found['seconds']:.0f} s",
                    flush=True,
                )
    return 0


def read_config(path: Path) -> dict[str, Any]:
    """A yaml file of settings.

    Raises:
        CommandError: it cannot be read, or does not follow CONFIG_SCHEMA, or has a field of the
            trainer that there is not, or that the study sets.
    """
    import yaml

    from mapo_kernels.integrations.trl import MAPOConfig

    content = files.read_whole(path)
    try:
        found = yaml.safe_load(content)
        files.check(found, CONFIG_SCHEMA)
        known = {field.name for field in fields(MAPOConfig)} - {*RESERVED}
        for name in found["trainer"]:
            if name not in known:
                raise ValueError(f"trainer: {name!r} is no field of MAPOConfig that may be set")
    except (ValueError, yaml.YAMLError) as error:
        reason = files.one_line(error)
        raise CommandError(f"{path}: expected settings of a study, got {reason}") from error
    return found


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of earlier runs; see `files.read_lines`."""
    return read_lines(path, RECORD_SCHEMA)


class Reward:
    """Weighted format and accuracy of answers to reasoning-gym problems, as in the paper.

    An answer has the format if it thinks between tags and then boxes its result; what it boxes last
    is given to the dataset's own verifier.
    """

    __name__ = "format_and_accuracy"  # in TRL's logs

    def __init__(self, dataset: Any, format_weight: float) -> None:
        """For the problems of a reasoning-gym dataset."""
        self.dataset, self.format_weight = dataset, format_weight

    def accuracy(self, answer: str, problem: int) -> float:
        """What the dataset's verifier says of the boxed result, in [0, 1]."""
        boxed = re.findall(r"\\boxed\{(.*?)\}", answer)
        if not boxed:
            return 0.0
        return float(self.dataset.score_answer(boxed[-1].strip(), self.dataset[problem]))

    def __call__(self, completions: list[Any], problem: list[int], **_: Any) -> list[float]:
        """One number in [0, 1] for each completion; TRL passes the dataset's column `problem`."""
        texts = [x if isinstance(x, str) else x[-1]["content"] for x in completions]
        weight = self.format_weight
        return [
            (1 - weight) * self.accuracy(text, index) + weight * bool(SHAPE.fullmatch(text))
            for text, index in zip(texts, problem, strict=True)
        ]


def _prompt(template: str, question: str, tokenizer: Any) -> Any:
    """A chat where the tokenizer has a template for one, else the text alone."""
    text = template.replace("{question}", question)
    return [{"role": "user", "content": text}] if tokenizer.chat_template else text


def _train(
    model_name: str, settings: dict[str, Any], estimator: str, seed: int, device: str
) -> dict[str, Any]:
    """One run; returns its record but for the model's name."""
    import transformers
    from datasets import Dataset
    from reasoning_gym import create_dataset

    from mapo_kernels.integrations.trl import MAPOConfig, MAPOTrainer
    from mapo_kernels.study.results import environment

    began = time.perf_counter()
    transformers.set_seed(seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_name, padding_side="left")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(model_name)
    model.to(device)
    task, variant = settings["task"], VARIANTS[estimator]
    made = {"name": task["name"], **task.get("options", {})}
    problems = create_dataset(**made, seed=seed, size=task["problems"])
    columns = {
        "prompt": [_prompt(settings["prompt"], x["question"], tokenizer) for x in problems],
        "problem": list(range(len(problems))),
    }
    held_out = create_dataset(**made, seed=HELD_OUT_SEED, size=settings["evaluation"]["problems"])
    with tempfile.TemporaryDirectory() as scratch:
        config = MAPOConfig(
            output_dir=scratch,
            estimator=variant.estimator,
            certainty=str(variant.certainty),
            seed=seed,
            use_cpu=model.device.type == "cpu",
            report_to=[],
            save_strategy="no",
            **settings["trainer"],
        )
        trainer = MAPOTrainer(
            model=model,
            reward_funcs=Reward(problems, settings["format_weight"]),
            args=config,
            train_dataset=Dataset.from_dict(columns),
            processing_class=tokenizer,
        )
        before = _success(model, tokenizer, held_out, settings, config.max_completion_length)
        trainer.train()
        after = _success(model, tokenizer, held_out, settings, config.max_completion_length)
    return {
        "format": FORMAT,
        "estimator": estimator,
        "seed": seed,
        "config": settings,
        "before": before,
        "after": after,
        "log": [_without_nan(x) for x in trainer.state.log_history],
        "seconds": time.perf_counter() - began,
        "environment": environment(),
    }


def _without_nan(entry: dict[str, Any]) -> dict[str, Any]:
    """What JSON can hold: a mean over nothing is None."""
    return {name: None if value != value else value for name, value in entry.items()}


def _success(
    model: Any, tokenizer: Any, problems: Any, settings: dict[str, Any], length: int
) -> float:
    """The share of held-out problems that are answered right, the format apart."""
    import torch

    evaluation, reward = settings["evaluation"], Reward(problems, settings["format_weight"])
    right = 0
    devices = [model.device] if model.device.type == "cuda" else []
    was_training = model.training
    model.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(HELD_OUT_SEED)  # the same draws before and after, and for all estimators
        for rows in _batches(len(problems), evaluation["batch"]):
            prompts = [
                _prompt(settings["prompt"], problems[i]["question"], tokenizer) for i in rows
            ]
            if tokenizer.chat_template:
                options = {"tokenize": False, "add_generation_prompt": True}
                prompts = [tokenizer.apply_chat_template(x, **options) for x in prompts]
            inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
            sampled = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                do_sample=True,
                temperature=evaluation["temperature"],
                top_p=evaluation["top_p"],
                top_k=0,
                max_new_tokens=length,
                pad_token_id=tokenizer.pad_token_id,
            )
            texts = tokenizer.batch_decode(
                sampled[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            right += sum(reward.accuracy(text, i) >= 1 for i, text in zip(rows, texts, strict=True))
    model.train(was_training)
    return right / len(problems)


def _batches(count: int, size: int) -> Iterator[range]:
    for first in range(0, count, size):
        yield range(first, min(first + size, count))
