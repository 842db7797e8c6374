"""The demo's RL phase in TRL: the same task, model and start, trained by `MAPOTrainer`.

The demo samples (TRL takes a rollout function) and scores; TRL batches, steps and schedules.
"""

from __future__ import annotations

import os
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from mapo_kernels.demo.model import END, PAD, Characters, Decoder
from mapo_kernels.demo.runs import Record, Run
from mapo_kernels.demo.train import GRADIENT_NORM, Listener, group_summary, note
from mapo_kernels.integrations.trl import MAPOConfig, MAPOTrainer

# TRL announces that rollout functions may change.
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


class _Backbone(nn.Module):
    """The decoder without its head, with the face of a Hugging Face model."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, input_ids: Tensor, **unused: Any) -> BaseModelOutput:
        """[B, S] token ids -> hidden states [B, S, width]; padding is an ordinary token here."""
        # The decoder has no position for the last token: nothing is predicted from it.
        hidden, _ = self.decoder.hidden(input_ids[:, :-1])
        return BaseModelOutput(last_hidden_state=nn.functional.pad(hidden, (0, 0, 0, 1)))


class _CausalLM(PreTrainedModel, GenerationMixin):
    """The demo's decoder as TRL wants a model; the weights stay the decoder's."""

    config_class = PretrainedConfig
    base_model_prefix = "backbone"

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(PretrainedConfig())
        self.backbone = _Backbone(decoder)

    def get_output_embeddings(self) -> nn.Module:
        """The decoder's head."""
        return self.backbone.decoder.head

    def forward(self, input_ids: Tensor, **unused: Any) -> CausalLMOutput:
        """[B, S] token ids -> logits [B, S, V]."""
        hidden = self.backbone(input_ids).last_hidden_state
        return CausalLMOutput(logits=self.get_output_embeddings()(hidden))


def _tokenizer(characters: Characters) -> PreTrainedTokenizerFast:
    """The demo's character ids, for TRL to know the end token and to decode with."""
    words = {"<pad>": PAD, "<end>": END}
    words |= {character: index + 2 for index, character in enumerate(characters.alphabet)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<end>",
        padding_side="left",
    )


class _Session(TrainerCallback):
    """Samples and scores for TRL, and tells the demo's listener about steps and evaluations."""

    def __init__(self, run: Run, listener: Listener) -> None:
        self.run, self.listener = run, listener
        settings = run.bench.settings
        self.problems = run.stream.take(settings.steps * settings.prompts)
        self._summary: Record = {}
        self._began = time.perf_counter()

    def dataset(self) -> Dataset:
        """One row per problem, in the order of the stream."""
        prompts = [problem.prompt for problem in self.problems]
        return Dataset.from_dict({"prompt": prompts, "problem": list(range(len(prompts)))})

    def roll_out(self, prompts: list[str], trainer: Any) -> Record:
        """Answers to prompts that TRL has repeated `group_size` times each."""
        bench, copies = self.run.bench, self.run.bench.settings.group_size
        texts = prompts[::copies]
        tokens = bench.characters.prompts(texts, bench.task.prompt_length).to(bench.device)
        rollouts = bench.sample(self.run.model, tokens, copies, self.run.generator)
        lengths = rollouts.mask.sum(1).tolist()

        def rows(x: Tensor) -> list[list[Any]]:
            return [row[:length] for row, length in zip(x.tolist(), lengths, strict=True)]

        return {
            "prompt_ids": rollouts.prompts.tolist(),
            "completion_ids": rows(rollouts.tokens),
            "logprobs": rows(rollouts.logprobs),
        }

    def correct(self, completion_ids: list[list[int]], problem: list[int], **_: Any) -> list[float]:
        """The verifier's reward of each answer."""
        bench = self.run.bench
        scores = []
        for ids, index in zip(completion_ids, problem, strict=True):
            # Padding after the end is not the model's; before it, it makes an answer wrong.
            answer = bench.characters.decode(torch.tensor([ids]))[0]
            scores.append(bench.verifier.reward(self.problems[index], answer))
        self._summary = group_summary(scores, bench.settings.group_size)
        return scores

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After the last minibatch of a batch of rollouts: one step of the demo."""
        run, settings = self.run, self.run.bench.settings
        if state.global_step % settings.minibatches:
            return
        step = state.global_step // settings.minibatches
        record = {"step": step - 1, **self._summary}
        if step % settings.eval_every == 0 or step == settings.steps:
            run.record["evals"].append(run.bench.evaluate(run.model, step))
            run.model.train()
        note(run, self.listener, record, self._began)
        self._began = time.perf_counter()


def reinforce_with_trl(run: Run, listener: Listener, **changes: Any) -> None:
    """RL steps until `settings.steps` by `MAPOTrainer`, with evaluations at regular intervals.

    Args:
        run: model, optimizer and data position to start from; its record gets steps and
            evaluations, as from `reinforce`.
        listener: hears about every step.
        **changes: options of `MAPOConfig` in place of the demo's.
    """
    bench = run.bench
    run.record["evals"].append(bench.evaluate(run.model, 0))
    session = _Session(run, listener)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = MAPOTrainer(
            model=_CausalLM(run.model),
            reward_funcs=session.correct,
            args=MAPOConfig(**{**_options(run, scratch), **changes}),
            train_dataset=session.dataset(),
            processing_class=_tokenizer(bench.characters),
            optimizers=(run.optimizer, None),
            rollout_func=session.roll_out,
            callbacks=[session],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    run.record["finished"] = True
    listener.checkpoint()


def _options(run: Run, scratch: str) -> dict[str, Any]:
    """The demo's settings in TRL's words."""
    settings, bench = run.bench.settings, run.bench
    return {
        "output_dir": scratch,
        "estimator": run.record["phase"],
        "certainty": str(settings.certainty),
        "epsilon": settings.eps_low,
        "epsilon_high": settings.eps_high,
        "num_generations": settings.group_size,
        "max_completion_length": bench.task.answer_length + 1,
        "per_device_train_batch_size": settings.prompts
        * settings.group_size
        // settings.minibatches,
        "steps_per_generation": settings.minibatches,
        "max_steps": settings.steps * settings.minibatches,
        "learning_rate": settings.learning_rate,
        "max_grad_norm": GRADIENT_NORM,
        "drop_zero_signal": True,
        "shuffle_dataset": False,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": bench.device.type == "cpu",
        "seed": run.record["seed"],
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
