"""MAPO in TRL: the demo's task, a transformer of Hugging Face, and `MAPOTrainer`, on a CPU or GPU.

`pip install -e ".[demo,trl]"`, then `python examples/trl_demo.py --steps 100`; or, with an
environment made for it, `make demo-trl DEMO_ARGS="--steps 100"`. A tiny Qwen3 learns to answer a
little by supervised updates, then MAPO trains it on verified rewards; printed is held-out success.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from mapo_kernels.demo.model import END, PAD, Characters
from mapo_kernels.demo.tasks import TASKS, Problem, ProblemStream, held_out_problems
from mapo_kernels.integrations.trl import MAPOConfig, MAPOTrainer

TASK = TASKS["number_sorting"]
CHARACTERS = Characters(TASK)
MINIBATCHES = 4  # optimizer steps per batch of rollouts


def new_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A token per character, with the ids of `CHARACTERS`."""
    words = {"<pad>": PAD, "<end>": END}
    words |= {character: index + 2 for index, character in enumerate(TASK.alphabet)}
    raw = Tokenizer(WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )


def new_model() -> transformers.PreTrainedModel:
    """A random decoder of 0.1M parameters."""
    config = transformers.Qwen3Config(
        vocab_size=CHARACTERS.size,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=64,
        initializer_range=0.1,  # 0.02, the default, is for widths of thousands
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
    )
    return transformers.AutoModelForCausalLM.from_config(config)


class Success:
    """Rewards of answers by token ids; TRL calls it with what its dataset says of each."""

    __name__ = "success"  # of the reward in TRL's logs

    def __init__(self, problems: Sequence[Problem]) -> None:
        """The dataset's column `problem` counts these."""
        self.problems = problems

    def __call__(
        self, completion_ids: list[list[int]], problem: list[int], **_: Any
    ) -> list[float]:
        """1 for the right answer, 0 for another and for one that never ended."""
        answers = [CHARACTERS.decode(torch.tensor([ids]))[0] for ids in completion_ids]
        return [
            TASK.reward(self.problems[index], answer)
            for index, answer in zip(problem, answers, strict=True)
        ]


@torch.no_grad()
def success_of(model: transformers.PreTrainedModel, problems: Sequence[Problem]) -> float:
    """The share of right answers, sampled at temperature 1."""
    prompts = CHARACTERS.prompts(problems).to(model.device)
    sampled = model.generate(
        prompts,
        attention_mask=(prompts != PAD).long(),
        do_sample=True,
        top_k=0,
        max_new_tokens=CHARACTERS.length,
    )
    ids = sampled[:, prompts.shape[1] :].tolist()
    rewards = Success(problems)(ids, list(range(len(problems))))
    return sum(rewards) / len(rewards)


def warm_up(model: transformers.PreTrainedModel, stream: ProblemStream, target: float) -> None:
    """Supervised updates on right answers until sampled success reaches `target`."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    while success_of(model, stream.take(256)) < target:
        for _ in range(20):
            problems = stream.take(64)
            tokens = torch.cat((CHARACTERS.prompts(problems), CHARACTERS.answers(problems)), dim=1)
            labels = tokens.masked_fill(tokens == PAD, -100)
            labels[:, : TASK.prompt_length] = -100
            batch = {"input_ids": tokens, "attention_mask": (tokens != PAD).long()}
            batch = {name: x.to(model.device) for name, x in {**batch, "labels": labels}.items()}
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()


def train(model: transformers.PreTrainedModel, problems: list[Problem], **options: Any) -> None:
    """One pass over the problems with `MAPOTrainer`; `options` are those of `MAPOConfig`."""
    columns = {"prompt": [x.prompt for x in problems], "problem": list(range(len(problems)))}
    with tempfile.TemporaryDirectory() as scratch:
        config = MAPOConfig(
            output_dir=scratch,
            max_completion_length=CHARACTERS.length,
            steps_per_generation=MINIBATCHES,
            epsilon_high=0.28,
            adam_beta2=0.95,
            drop_zero_signal=True,
            gradient_checkpointing=False,
            bf16=False,
            report_to=[],
            save_strategy="no",
            **options,
        )
        trainer = MAPOTrainer(
            model=model,
            reward_funcs=Success(problems),
            args=config,
            train_dataset=Dataset.from_dict(columns),
            processing_class=new_tokenizer(),
        )
        trainer.train()


def main(arguments: Sequence[str] | None = None) -> tuple[float, float]:
    """Warm up, train, and print held-out success; returns it before and after training."""
    parser = argparse.ArgumentParser(description="MAPO in TRL on a verifiable task")
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("--steps", type=int, default=100, help="batches of rollouts")
    parser.add_argument("--prompts", type=int, default=32, help="groups per step")
    parser.add_argument("--group-size", type=int, default=16, help="answers per prompt")
    parser.add_argument("--estimator", default="mapo", help="mapo, grpo, apd, mean or rloo")
    parser.add_argument("--warmup-success", type=float, default=0.1, help="ends the warm-up")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="falls linearly to 0")
    parser.add_argument("--seed", type=int, default=0, help="of model, problems and sampling")
    args = parser.parse_args(arguments)

    transformers.set_seed(args.seed)
    model = new_model().to("cuda" if torch.cuda.is_available() else "cpu")
    stream, held_out = ProblemStream(TASK, args.seed), held_out_problems(TASK, 512)
    warm_up(model, stream, args.warmup_success)
    before = success_of(model, held_out)
    train(
        model,
        stream.take(args.steps * args.prompts),
        estimator=args.estimator,
        num_generations=args.group_size,
        per_device_train_batch_size=args.prompts * args.group_size // MINIBATCHES,
        max_steps=args.steps * MINIBATCHES,
        logging_steps=10 * MINIBATCHES,
        use_cpu=model.device.type == "cpu",
        learning_rate=args.learning_rate,
        seed=args.seed,
    )
    after = success_of(model, held_out)
    print(f"{args.estimator}: held-out success {before:.3f} -> {after:.3f} in {args.steps} steps")
    return before, after


if __name__ == "__main__":
    main()
