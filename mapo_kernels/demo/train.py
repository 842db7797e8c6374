"""One phase of training for one seed: a supervised warm-up, or RL with `mapo_loss`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from mapo_kernels import AdvantageSpec, LossSpec, mapo_loss
from mapo_kernels.demo import folder
from mapo_kernels.demo.folder import Record
from mapo_kernels.demo.model import PAD, Characters, Decoder, Rollouts, answer_logprobs, sample
from mapo_kernels.demo.settings import WARM_UP, Settings
from mapo_kernels.demo.tasks import TASKS, Problem, ProblemStream, Verifier, held_out_problems
from mapo_kernels.files import check

EVAL_SEED = 10**6
LOGGED_METRICS = (
    "clip_fraction_low",
    "clip_fraction_high",
    "ratio_mean",
    "approx_kl",
    "success_ratio_mean",
    "lambda_mean",
    "zero_advantage_groups",
)
GRADIENT_NORM = 1.0
WARM_UP_STRIDE = 10  # supervised updates between two looks at sampled success


class Workbench:
    """What the runs of one experiment share: the task, its verifier and the held-out problems."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        """Create the task's datasets."""
        self.settings = settings
        self.device = device
        self.task = TASKS[settings.task]
        self.characters = Characters(self.task.alphabet)
        self.verifier = Verifier(self.task)
        self.max_tokens = self.task.answer_length + 1  # the end token
        self.held_out = held_out_problems(self.task, settings.eval_prompts)
        self.model_config = {
            "vocabulary": self.characters.size,
            "length": self.task.prompt_length + self.task.answer_length,
            "width": settings.width,
            "layers": settings.layers,
            "heads": settings.heads,
        }

    def new_model(self, seed: int) -> Decoder:
        """A freshly initialized decoder; the global random state is left alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Decoder(**self.model_config).to(self.device)

    def prompts(self, problems: list[Problem]) -> Tensor:
        """[Q, P] prompt tokens on the device."""
        texts = [problem.prompt for problem in problems]
        return self.characters.prompts(texts, self.task.prompt_length).to(self.device)

    def roll_out(
        self, model: Decoder, problems: list[Problem], copies: int, generator: Generator | None
    ) -> tuple[Rollouts, list[float]]:
        """Sampled answers (greedy without a generator), `copies` per problem, and their rewards."""
        prompts = self.prompts(problems)
        rollouts = sample(model, prompts, self.max_tokens, copies=copies, generator=generator)
        rewards = [
            self.verifier.reward(problems[row // copies], answer)
            for row, answer in enumerate(self.characters.decode(rollouts.tokens))
        ]
        return rollouts, rewards

    def evaluate(self, model: Decoder, step: int) -> Record:
        """Held-out success at temperature 1 and greedy; the same random numbers at each `step`."""
        generator = Generator(self.device).manual_seed(EVAL_SEED + step)
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
        self._model_path = folder.model_path(out, phase, seed)
        self._checkpoint = folder.checkpoint_path(out, phase, seed)
        self.model = bench.new_model(seed)
        self.stream = ProblemStream(bench.task, seed)
        self.generator = Generator(bench.device).manual_seed(seed)
        if start is not None:
            self.model.load_state_dict(start.model.state_dict())
            self.stream.position = start.stream.position
            self.generator.set_state(start.generator.get_state())
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=bench.settings.learning_rate, betas=(0.9, 0.95)
        )
        self.record: Record = {"phase": phase, "seed": seed, "finished": False, "seconds": 0.0}
        self.record |= {"steps": [], "evals": []}
        if self._checkpoint.exists():
            folder.load(self._checkpoint, self._restore)

    def save(self) -> None:
        """Write the checkpoint; a crash in the middle leaves the previous one."""
        state = {
            **self._identity(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "position": self.stream.position,
            "record": self.record,
        }
        folder.save(self._checkpoint, state)

    def save_model(self) -> None:
        """Write the weights, with what it takes to rebuild the model and to read its tokens."""
        state = {"model": self.model.state_dict(), "model_config": self.bench.model_config}
        task = self.bench.task
        folder.save(self._model_path, {**state, "task": task.name, "alphabet": task.alphabet})

    def begin(self) -> None:
        """Evaluate before the first step of RL."""
        if self.record["phase"] != WARM_UP:
            if not self.record["evals"]:
                self.record["evals"].append(self.bench.evaluate(self.model, 0))
            self.record["finished"] = len(self.record["steps"]) == self.bench.settings.steps

    def step(self) -> Record:
        """One step of the phase, which may be its last; returns what the log says of it."""
        return _warm_up_step(self) if self.record["phase"] == WARM_UP else _reinforce_step(self)

    def update(self, loss: Tensor) -> None:
        """One optimizer step."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM)
        self.optimizer.step()

    def _identity(self) -> Record:
        """What a checkpoint of this demo must say."""
        return {"format": folder.FORMAT, "configuration": asdict(self.bench.settings)}

    def _restore(self, state: Record) -> None:
        for name, expected in self._identity().items():
            if state[name] != expected:
                raise ValueError(f"another {name}")
        check(state["record"], folder.RECORD_SCHEMA)
        for name in ("phase", "seed"):
            if state["record"][name] != self.record[name]:
                raise ValueError(f"that of {name} {state['record'][name]!r}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.stream.position = state["position"]
        self.record.update(state["record"])


def success_share(rewards: list[float]) -> float:
    """The share of exactly right answers: partial credit is not success."""
    return sum(reward >= 1.0 for reward in rewards) / len(rewards)


def group_summary(rewards: list[float], group_size: int) -> Record:
    """What the rewards of whole groups, in order, show at a glance.

    `groups_without_signal` counts groups of equal rewards, and entry k of `successes_per_group`
    counts groups with k right answers.
    """
    groups = [rewards[row : row + group_size] for row in range(0, len(rewards), group_size)]
    histogram = [0] * (group_size + 1)
    for group in groups:
        histogram[sum(reward >= 1.0 for reward in group)] += 1
    return {
        "reward": sum(rewards) / len(rewards),
        "success": success_share(rewards),
        "groups_without_signal": sum(min(group) == max(group) for group in groups),
        "successes_per_group": histogram,
    }


def _warm_up_step(run: Run) -> Record:
    """A look at sampled success, then supervised updates on right answers if it is too low yet."""
    settings = run.bench.settings
    updates = WARM_UP_STRIDE * len(run.record["steps"])
    problems = run.stream.take(settings.prompts)
    _, rewards = run.bench.roll_out(run.model, problems, settings.group_size, run.generator)
    record = {"step": updates, **group_summary(rewards, settings.group_size)}
    if record["success"] >= settings.warmup_success or updates >= settings.warmup_steps:
        run.record["finished"] = True
    else:
        record["loss"] = [_supervised_update(run) for _ in range(WARM_UP_STRIDE)][-1]
    return record


def _supervised_update(run: Run) -> float:
    bench = run.bench
    problems = run.stream.take(bench.settings.warmup_batch)
    texts = [problem.solution for problem in problems]
    answers = bench.characters.answers(texts, bench.max_tokens).to(bench.device)
    logp = answer_logprobs(run.model, bench.prompts(problems), answers)
    loss = -logp[answers != PAD].mean()
    run.update(loss)
    return loss.item()


def _reinforce_step(run: Run) -> Record:
    """Sample whole groups, score them, and take one optimizer step per minibatch of groups."""
    settings, step = run.bench.settings, len(run.record["steps"])
    for parameters in run.optimizer.param_groups:
        parameters["lr"] = settings.learning_rate * (1 - step / settings.steps)
    problems = run.stream.take(settings.prompts)
    rollouts, scores = run.bench.roll_out(run.model, problems, settings.group_size, run.generator)
    rewards = torch.tensor(scores, device=run.bench.device)
    rows = len(scores) // settings.minibatches
    measured = [
        _minibatch_update(run, Rollouts(*parts[:-1]), parts[-1])
        for parts in zip(*(tensor.split(rows) for tensor in (*rollouts, rewards)), strict=True)
    ]
    # A minibatch without a scored token says NaN; so does a step of such minibatches.
    means = torch.stack(measured).nanmean(dim=0).tolist()
    done = step + 1
    if done % settings.eval_every == 0 or done == settings.steps:
        run.record["evals"].append(run.bench.evaluate(run.model, done))
    run.record["finished"] = done == settings.steps
    summary = group_summary(scores, settings.group_size)
    return {"step": step, **summary, **dict(zip(("loss", *LOGGED_METRICS), means, strict=True))}


def _minibatch_update(run: Run, rollouts: Rollouts, rewards: Tensor) -> Tensor:
    """One optimizer step; returns the loss and `LOGGED_METRICS`, still on the device."""
    settings = run.bench.settings
    estimator: Any = run.record["phase"]
    output = mapo_loss(
        answer_logprobs(run.model, rollouts.prompts, rollouts.tokens),
        rewards=rewards,
        group_size=settings.group_size,
        mask=rollouts.mask,
        # The policy that sampled: stale from the second minibatch on, which is what is clipped.
        old_logprobs=rollouts.logprobs,
        spec=LossSpec(eps_low=settings.eps_low, eps_high=settings.eps_high),
        advantage_spec=AdvantageSpec(estimator=estimator, certainty=settings.certainty),
    )
    run.update(output.loss)
    values = [output.loss.detach(), *(output.metrics[name] for name in LOGGED_METRICS)]
    return torch.stack([value.float() for value in values])
