"""What training needs: settings, the workbench shared by all runs, and one resumable run."""

from __future__ import annotations

import io
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mapo_kernels.demo.model import Characters, Decoder, Rollouts, sample
from mapo_kernels.demo.tasks import TASKS, Problem, ProblemStream, Verifier, held_out_problems
from mapo_kernels.files import CommandError, check, naming, one_line, read_whole, write_whole

EVAL_SEED = 10**6
TRAINERS = ("torch", "trl")
FORMAT = "mapo-kernels demo 1"  # in the log and in checkpoints: what tells them from others' files
CHECKPOINTS = "checkpoints"

Record = dict[str, Any]


def _object(**properties: Any) -> dict[str, Any]:
    """The JSON schema of an object that must have these."""
    return {"type": "object", "required": list(properties), "properties": properties}


_COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
_NUMBER: dict[str, Any] = {"type": "number"}
# What figures and tables are drawn from.
RECORD_SCHEMA = _object(
    phase={"type": "string"},
    seed=_COUNT,
    finished={"type": "boolean"},
    seconds=_NUMBER,
    steps={
        "type": "array",
        "items": _object(
            step=_COUNT,
            success=_NUMBER,
            groups_without_signal=_COUNT,
            successes_per_group={"type": "array", "items": _COUNT},
        ),
    },
    evals={
        "type": "array",
        "items": _object(step=_COUNT, success_sampled=_NUMBER, success_greedy=_NUMBER),
    },
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides the result of a run, apart from its estimator and seed.

    Args:
        task: a name in `TASKS`.
        steps: RL steps; the learning rate falls linearly to 0 over them.
        certainty: lambda(p) of the mapo estimator.
        prompts: groups per step.
        group_size: answers per prompt.
        minibatches: optimizer steps per batch of rollouts, each on its share of whole groups; all
            but the first are off-policy.
        learning_rate: of RL.
        eps_low: lower clip range.
        eps_high: upper clip range (DAPO's clip-higher).
        warmup_success: sampled success at which the warm-up ends; 0 skips it.
        warmup_steps: its longest duration.
        warmup_batch: problems per warm-up step.
        eval_prompts: held-out prompts (fewer where the task has fewer).
        eval_copies: sampled answers for each of them.
        eval_every: RL steps between evaluations.
        width: hidden size of the model.
        layers: its number of blocks.
        heads: its attention heads.
        trainer: `torch` (a plain loop) or `trl`, for the RL steps.
    """

    task: str = "number_sorting"
    steps: int = 300
    certainty: str | float = "quadratic"
    prompts: int = 32
    group_size: int = 16
    minibatches: int = 4
    learning_rate: float = 1e-3
    eps_low: float = 0.2
    eps_high: float = 0.28
    warmup_success: float = 0.1
    warmup_steps: int = 2000
    warmup_batch: int = 64
    eval_prompts: int = 512
    eval_copies: int = 2
    eval_every: int = 25
    width: int = 64
    layers: int = 2
    heads: int = 4
    trainer: str = "torch"

    def __post_init__(self) -> None:
        """Refuse what could not run."""
        for name in ("prompts", "minibatches", "warmup_batch", "eval_prompts", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.trainer not in TRAINERS:
            raise ValueError(f"trainer: expected one of {list(TRAINERS)}, got {self.trainer!r}")
        if not 0 <= self.warmup_success <= 1:  # and no NaN
            raise ValueError(
                f"warmup_success: expected a number in [0, 1], got {self.warmup_success}"
            )
        if self.steps < 0:
            raise ValueError(f"steps: expected at least 0, got {self.steps}")
        if self.group_size < 2:
            raise ValueError(f"group_size: expected at least 2, got {self.group_size}")
        if self.prompts % self.minibatches:
            raise ValueError(
                f"prompts: expected a multiple of minibatches = {self.minibatches}, "
                f"got {self.prompts}"
            )


class Workbench:
    """What the runs of one experiment share: the task, its verifier and the held-out problems."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        """Create the task's datasets."""
        self.settings = settings
        self.device = device
        self.task = TASKS[settings.task]
        self.characters = Characters(self.task.alphabet)
        self.verifier = Verifier(self.task)
        self.held_out = held_out_problems(self.task, settings.eval_prompts)

    def new_model(self, seed: int) -> Decoder:
        """A freshly initialized decoder; the global random state is left alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Decoder(**self.model_config())
        return model.to(self.device)

    def model_config(self) -> dict[str, int]:
        """The arguments of `Decoder`."""
        return {
            "vocabulary": self.characters.size,
            "length": self.task.prompt_length + self.task.answer_length,
            "width": self.settings.width,
            "layers": self.settings.layers,
            "heads": self.settings.heads,
        }

    def prompts(self, problems: list[Problem]) -> Tensor:
        """[Q, P] prompt tokens on the device."""
        texts = [problem.prompt for problem in problems]
        return self.characters.prompts(texts, self.task.prompt_length).to(self.device)

    def sample(
        self, model: Decoder, prompts: Tensor, copies: int, generator: torch.Generator | None
    ) -> Rollouts:
        """Sampled answers (greedy without a generator), `copies` per prompt [Q, P]."""
        max_tokens = self.task.answer_length + 1  # the end token
        return sample(model, prompts, max_tokens, copies=copies, generator=generator)

    def roll_out(
        self,
        model: Decoder,
        problems: list[Problem],
        copies: int,
        generator: torch.Generator | None,
    ) -> tuple[Rollouts, list[float]]:
        """Sampled answers (greedy without a generator), `copies` per problem, and their rewards."""
        rollouts = self.sample(model, self.prompts(problems), copies, generator)
        answers = self.characters.decode(rollouts.tokens)
        rewards = [
            self.verifier.reward(problems[row // copies], answer)
            for row, answer in enumerate(answers)
        ]
        return rollouts, rewards

    def evaluate(self, model: Decoder, step: int) -> Record:
        """Held-out success at temperature 1 and greedy; the same random numbers at each `step`."""
        generator = torch.Generator(self.device).manual_seed(EVAL_SEED + step)
        copies = self.settings.eval_copies
        _, sampled = self.roll_out(model, self.held_out, copies, generator)
        _, greedy = self.roll_out(model, self.held_out, 1, None)
        return {
            "step": step,
            "success_sampled": success_share(sampled),
            "success_greedy": success_share(greedy),
            "reward_sampled": sum(sampled) / len(sampled),
        }


class Run:
    """One phase of training for one seed: model, optimizer, randomness, data position, record.

    Saved and loaded as a whole, so that a resumed run continues exactly where the file was written.
    """

    def __init__(
        self, bench: Workbench, phase: str, seed: int, out: Path, start: Run | None = None
    ) -> None:
        """Continue from this run's checkpoint; without one begin where `start` ended, or afresh.

        Raises:
            CommandError: the checkpoint is damaged, of other settings, or none of the demo's.
        """
        self.bench = bench
        self.title = f"{phase}, seed {seed}"
        self._model_path = model_path(out, phase, seed)
        self._checkpoint = checkpoint_path(out, phase, seed)
        self.model = bench.new_model(seed)
        self.stream = ProblemStream(bench.task, seed)
        self.generator = torch.Generator(bench.device).manual_seed(seed)
        if start is not None:
            self.model.load_state_dict(start.model.state_dict())
            self.stream.position = start.stream.position
            self.generator.set_state(start.generator.get_state())
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=bench.settings.learning_rate, betas=(0.9, 0.95)
        )
        self.record: Record = {
            "phase": phase,
            "seed": seed,
            "finished": False,
            "seconds": 0.0,
            "steps": [],
            "evals": [],
        }
        if self._checkpoint.exists():
            self._load()

    def save(self) -> None:
        """Write the checkpoint; a crash in the middle leaves the previous one."""
        with naming(self._checkpoint.parent):
            self._checkpoint.parent.mkdir(exist_ok=True)
        _save(
            self._checkpoint,
            {
                **self._identity(),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "generator": self.generator.get_state(),
                "position": self.stream.position,
                "record": self.record,
            },
        )

    def save_model(self) -> None:
        """Write the weights, with what it takes to rebuild the model and to read its tokens."""
        _save(
            self._model_path,
            {
                "model": self.model.state_dict(),
                "model_config": self.bench.model_config(),
                "task": self.bench.task.name,
                "alphabet": self.bench.task.alphabet,
            },
        )

    def _identity(self) -> Record:
        """What a checkpoint of this demo must say."""
        return {"format": FORMAT, "configuration": asdict(self.bench.settings)}

    def _load(self) -> None:
        content = read_whole(self._checkpoint)
        try:
            damaged = zipfile.ZipFile(io.BytesIO(content)).testzip()
            if damaged is not None:  # torch does not compare checksums
                raise ValueError(f"one with a damaged {damaged}")
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            self._restore(state)
        except Exception as error:  # A file may hold anything, and fail in any way.
            raise CommandError(
                f"{self._checkpoint}: expected a checkpoint of this demo, got {one_line(error)}"
            ) from error

    def _restore(self, state: Record) -> None:
        for name, expected in self._identity().items():
            if state[name] != expected:
                raise ValueError(f"another {name}")
        check(state["record"], RECORD_SCHEMA)
        for name in ("phase", "seed"):
            if state["record"][name] != self.record[name]:
                raise ValueError(f"that of {name} {state['record'][name]!r}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.stream.position = state["position"]
        self.record.update(state["record"])


def model_path(out: Path, phase: str, seed: int) -> Path:
    """Where the weights of a run go."""
    return out / f"{phase}_seed{seed}.pt"


def checkpoint_path(out: Path, phase: str, seed: int) -> Path:
    """Where what a run continues from goes."""
    return model_path(out / CHECKPOINTS, phase, seed)


def _save(path: Path, state: Record) -> None:
    """`torch.save`, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, buffer.getvalue())


def success_share(rewards: list[float]) -> float:
    """The share of exactly right answers: partial credit is not success."""
    return sum(reward >= 1.0 for reward in rewards) / len(rewards)
