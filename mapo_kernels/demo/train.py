"""One phase of training for one seed: a supervised warm-up, or RL."""

from __future__ import annotations

import io
import time
import zipfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from mapo_kernels import (
    AdvantageSpec,
    LossSpec,
    SamplingMask,
    mapo_loss_from_logits,
    token_logprobs,
)
from mapo_kernels.demo.model import PAD, Characters, Decoder, answer_logits, sample
from mapo_kernels.demo.settings import FORMAT, REPLAY, WARM_UP, Record, Settings
from mapo_kernels.demo.tasks import TASKS, Problem, ProblemStream, held_out_problems
from mapo_kernels.files import CommandError, one_line, read_whole, write_whole

EVAL_SEED = 10**6
GRADIENT_NORM = 1.0
WARM_UP_STRIDE = 10  # supervised updates between two looks at sampled success


class Rollouts(NamedTuple):
    """Sampled answers: tensors [groups, group_size, ...], or [answers, ...] in a minibatch."""

    prompts: Tensor  # [..., P]
    tokens: Tensor  # [..., T]
    mask: Tensor  # [..., T]
    logp: Tensor  # [..., T, V]: of the distribution sampled from, -inf at columns it did not keep
    rewards: Tensor  # on the CPU
    correct: Tensor  # which are right, whatever their rewards; on the CPU

    def minibatches(self, count: int) -> list[Rollouts]:
        """So many equal parts of whole groups, flat as losses take them."""
        flat = [x.flatten(0, 1).chunk(count) for x in self]
        return [Rollouts._make(part) for part in zip(*flat, strict=True)]


class Run:
    """One phase of training for one seed: model, optimizer, randomness, data position, record.

    Saved and loaded as a whole, so that a resumed run continues exactly where it was saved.

    Attributes:
        knows_success: tell the loss which answers are right, apart from their rewards.
    """

    knows_success = False

    def __init__(
        self,
        settings: Settings,
        phase: str,
        seed: int,
        device: torch.device,
        start: Run | None = None,
    ) -> None:
        """Begin where `start` ended, or afresh; `phase` is WARM_UP or one of RL."""
        self.settings, self.device = settings, device
        self.phase, self.name = phase, f"{phase}_seed{seed}"
        self.replays = phase.endswith(REPLAY)
        self.task = TASKS[settings.task]
        self.characters = Characters(self.task)
        length = self.task.prompt_length + self.task.answer_length
        size = (settings.width, settings.layers, settings.heads)
        with torch.random.fork_rng(devices=[]):  # leaves the global random state alone
            torch.manual_seed(seed)
            self.model = Decoder(self.characters.size, length, *size).to(device)
        self.stream = ProblemStream(self.task, seed)
        self.generator = Generator(device).manual_seed(seed)
        if start is not None:
            self.model.load_state_dict(start.model.state_dict())
            self.stream.position = start.stream.position
            self.generator.set_state(start.generator.get_state())
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95)
        )
        self.record: Record = {"phase": phase, "seed": seed, "finished": False}
        self.record |= {"steps": [], "evals": []}

    @property
    def advantage_spec(self) -> AdvantageSpec:
        """How rewards become advantages, in a phase of RL."""
        estimator: Any = self.phase.removesuffix(REPLAY)
        return AdvantageSpec(estimator=estimator, certainty=self.settings.certainty)

    def save(self, path: Path) -> None:
        """Write all of the run, whole or not at all."""
        buffer = io.BytesIO()
        torch.save(self._state(), buffer)
        write_whole(path, buffer.getvalue())

    def load(self, path: Path) -> None:
        """Continue what was saved; CommandError if the file is damaged or none of this run."""
        content = read_whole(path)
        try:
            damaged = zipfile.ZipFile(io.BytesIO(content)).testzip()
            if damaged is not None:  # torch does not compare checksums
                raise ValueError(f"one with a damaged {damaged}")
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            for name in ("format", "name", "configuration"):
                if state[name] != self._state()[name]:
                    raise ValueError(f"one with another {name}")
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.generator.set_state(state["generator"])
            self.stream.position = state["position"]
            self.record = state["record"]
        except Exception as error:  # A file may hold anything, and fail in any way.
            expected = f"{path}: expected a run of this demo"
            raise CommandError(f"{expected}, got {one_line(error)}") from error

    def _state(self) -> Record:
        return {
            "format": FORMAT,
            "name": self.name,
            "configuration": asdict(self.settings),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "position": self.stream.position,
            "record": self.record,
        }

    def begin(self) -> None:
        """Evaluate before the first step of RL."""
        if self.phase != WARM_UP and not self.record["evals"]:
            self._evaluate(0)

    def step(self) -> None:
        """One step of the phase, which may be its last; the record tells of it."""
        began = time.perf_counter()
        done = self._warm_up() if self.phase == WARM_UP else self._reinforce()
        self.record["steps"].append({**done, "seconds": time.perf_counter() - began})

    def _warm_up(self) -> Record:
        """A look at sampled success, then supervised updates on right answers if it is too low."""
        updates = WARM_UP_STRIDE * len(self.record["steps"])
        done = {"step": updates, **group_summary(self._roll_out())}
        target, most = self.settings.warmup_success, self.settings.warmup_steps
        self.record["finished"] = done["success"] >= target or updates >= most
        if not self.record["finished"]:
            done |= [self._imitate() for _ in range(WARM_UP_STRIDE)][-1]
        return done

    def _imitate(self) -> Record:
        problems = self.stream.take(self.settings.warmup_batch)
        prompts = self.characters.prompts(problems).to(self.device)
        answers = self.characters.answers(problems).to(self.device)
        logits = answer_logits(self.model, prompts, answers)
        return self._update(F.cross_entropy(logits.mT, answers, ignore_index=PAD))

    def _reinforce(self) -> Record:
        """Sample whole groups, score them, and take one optimizer step per minibatch of groups."""
        settings, step = self.settings, len(self.record["steps"])
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = settings.learning_rate * (1 - step / settings.steps)
        batch = self._roll_out()
        parts = batch.minibatches(settings.minibatches)
        kept = [SamplingMask.from_logits(x.logp) if self.replays else None for x in parts]
        # All before the first update.
        old_logprobs = [self._old_logprobs(*x) for x in zip(parts, kept, strict=True)]
        measured = [self._minibatch(*x) for x in zip(parts, kept, old_logprobs, strict=True)]
        # A minibatch without a scored token says NaN; so does a step of such minibatches.
        lists = {name: torch.tensor([values[name] for values in measured]) for name in measured[0]}
        means = {name: values.nanmean().item() for name, values in lists.items()}
        self._evaluate(step + 1)
        # Of the first minibatch, which is of the policy that sampled.
        means["on_policy_ratio"] = measured[0]["ratio_mean"]
        means["kept_columns"] = _mean((batch.logp > -torch.inf).sum(dim=-1)[batch.mask])
        return {"step": step, **group_summary(batch), **means}

    def _roll_out(self) -> Rollouts:
        """The groups of a step."""
        settings = self.settings
        return self.answer(self.stream.take(settings.prompts), settings.group_size, self.generator)

    def answer(
        self, problems: Sequence[Problem], copies: int, generator: Generator | None
    ) -> Rollouts:
        """`copies` answers to each problem, sampled, or greedy without a generator."""
        characters, top_p = self.characters, self.settings.top_p
        prompts = characters.prompts(problems).to(self.device)
        tokens, mask, logp = sample(
            self.model, prompts, characters.length, copies=copies, top_p=top_p, generator=generator
        )
        answers = characters.decode(tokens)
        pairs = [(problems[row // copies], answer) for row, answer in enumerate(answers)]
        rewards = torch.tensor([self.reward(*pair) for pair in pairs])
        correct = torch.tensor([answer == problem.solution for problem, answer in pairs])
        flat = (prompts.repeat_interleave(copies, dim=0), tokens, mask, logp, rewards, correct)
        return Rollouts._make(x.unflatten(0, (-1, copies)) for x in flat)

    def reward(self, problem: Problem, answer: str | None) -> float:
        """What RL maximizes; None is an answer that never ended."""
        return self.task.reward(problem, answer)

    def _evaluate(self, steps: int) -> None:
        """Held-out success after the last step and some others, always with the same randomness."""
        self.record["finished"] = steps == self.settings.steps
        if self.record["finished"] or steps % self.settings.eval_every == 0:
            problems = held_out_problems(self.task, self.settings.eval_prompts)
            generator = Generator(self.device).manual_seed(EVAL_SEED + steps)
            sampled = self.answer(problems, self.settings.eval_copies, generator).correct
            greedy = self.answer(problems, 1, None).correct
            found = {"success_sampled": _mean(sampled), "success_greedy": _mean(greedy)}
            self.record["evals"].append({"step": steps, **found})

    @torch.no_grad()
    def _old_logprobs(self, part: Rollouts, kept: SamplingMask | None) -> Tensor:
        """[B, T]: the sampler's; in a replay the model's, which equal the loss's bit for bit."""
        if kept is None:
            logprobs = part.logp.gather(2, part.tokens[..., None]).squeeze(2)
            return logprobs.masked_fill(~part.mask, 0.0)
        logits = answer_logits(self.model, part.prompts, part.tokens)
        return token_logprobs(logits, part.tokens, mask=part.mask, sampling_mask=kept)

    def _minibatch(
        self, part: Rollouts, kept: SamplingMask | None, old_logprobs: Tensor
    ) -> dict[str, float]:
        """One optimizer step on some groups; returns the loss and its metrics."""
        settings, device = self.settings, self.device
        output = mapo_loss_from_logits(
            answer_logits(self.model, part.prompts, part.tokens),
            part.tokens,
            sampling_mask=kept,
            rewards=part.rewards.to(device),
            success=part.correct.to(device) if self.knows_success else None,
            group_size=settings.group_size,
            mask=part.mask,
            # The policy that sampled: stale from the second minibatch on, which is what is clipped.
            old_logprobs=old_logprobs,
            spec=LossSpec(eps_low=settings.eps_low, eps_high=settings.eps_high),
            advantage_spec=self.advantage_spec,
        )
        metrics = {name: value.item() for name, value in output.metrics.items()}
        return {**self._update(output.loss), **metrics}

    def _update(self, loss: Tensor) -> Record:
        """One optimizer step; returns the loss before it and the norm of its gradient."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = self._limit_gradient()
        self.optimizer.step()
        return {"loss": loss.item(), "gradient_norm": norm.item()}

    def _limit_gradient(self) -> Tensor:
        """Clip the gradient; returns its norm before."""
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM)


def without_signal(rewards: Tensor) -> Tensor:
    """[groups]: of rewards [groups, group_size], those that are all equal."""
    return (rewards == rewards[:, :1]).all(dim=1)


def group_summary(batch: Rollouts) -> Record:
    """What a batch of groups shows; partial credit is no success."""
    return {
        "reward": _mean(batch.rewards),
        "success": _mean(batch.correct),
        "groups_without_signal": int(without_signal(batch.rewards).sum()),
    }


def _mean(values: Tensor) -> float:
    return values.double().mean().item()
