"""The two phases of training: a supervised warm-up, then RL with `mapo_loss`."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch
from torch import Tensor

from mapo_kernels import AdvantageSpec, LossSpec, mapo_loss
from mapo_kernels.demo.model import PAD, Rollouts, answer_logprobs
from mapo_kernels.demo.runs import Record, Run, success_share

LOGGED_METRICS = (
    "clip_fraction_low",
    "clip_fraction_high",
    "ratio_mean",
    "approx_kl",
    "success_ratio_mean",
    "lambda_mean",
    "zero_advantage_groups",
)
WARM_UP = "warm-up"
GRADIENT_NORM = 1.0
WARM_UP_STRIDE = 10  # supervised updates between two looks at sampled success
CHECKPOINT_STRIDE = 25


class Listener(Protocol):
    """Who hears about progress: the terminal and the log file."""

    def step(self, run: Run, record: Record) -> None:
        """One step of `run` is done; `record` is its line in the log."""

    def checkpoint(self) -> None:
        """A checkpoint was written: a good moment to flush the log."""


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


def warm_up(run: Run, listener: Listener) -> None:
    """Supervised updates on right answers until sampled success reaches the target."""
    settings = run.bench.settings
    while not run.record["finished"]:
        began = time.perf_counter()
        updates = WARM_UP_STRIDE * len(run.record["steps"])
        problems = run.stream.take(settings.prompts)
        _, rewards = run.bench.roll_out(run.model, problems, settings.group_size, run.generator)
        record = {"step": updates, **group_summary(rewards, settings.group_size)}
        done = record["success"] >= settings.warmup_success or updates >= settings.warmup_steps
        if not done:
            record["loss"] = [_supervised_update(run) for _ in range(WARM_UP_STRIDE)][-1]
        note(run, listener, record, began)
        if done:
            run.record["finished"] = True
        if done or len(run.record["steps"]) % CHECKPOINT_STRIDE == 0:
            run.save()
            listener.checkpoint()


def _supervised_update(run: Run) -> float:
    bench = run.bench
    problems = run.stream.take(bench.settings.warmup_batch)
    length = bench.task.answer_length + 1  # the end token
    answers = bench.characters.answers([problem.solution for problem in problems], length)
    answers = answers.to(bench.device)
    logp = answer_logprobs(run.model, bench.prompts(problems), answers)
    loss = -logp[answers != PAD].mean()
    _update(run, loss)
    return loss.item()


def reinforce(run: Run, listener: Listener) -> None:
    """RL steps until `settings.steps`, with an evaluation and a checkpoint at regular intervals."""
    settings = run.bench.settings
    if not run.record["evals"]:
        run.record["evals"].append(run.bench.evaluate(run.model, 0))
    while not run.record["finished"]:
        began = time.perf_counter()
        step = len(run.record["steps"])
        if step < settings.steps:
            _set_learning_rate(run, settings.learning_rate * (1 - step / settings.steps))
            record = {"step": step, **_reinforce_step(run)}
            step += 1
            if step % settings.eval_every == 0 or step == settings.steps:
                run.record["evals"].append(run.bench.evaluate(run.model, step))
            note(run, listener, record, began)
        run.record["finished"] = step == settings.steps
        if run.record["finished"] or step % CHECKPOINT_STRIDE == 0:
            run.save()
            listener.checkpoint()


def _reinforce_step(run: Run) -> Record:
    """Sample whole groups, score them, and take one optimizer step per minibatch of groups."""
    settings = run.bench.settings
    problems = run.stream.take(settings.prompts)
    rollouts, scores = run.bench.roll_out(run.model, problems, settings.group_size, run.generator)
    rewards = torch.tensor(scores, device=run.bench.device)
    rows = len(scores) // settings.minibatches
    measured = []
    for first in range(0, len(scores), rows):
        part = slice(first, first + rows)
        minibatch = Rollouts(*(tensor[part] for tensor in rollouts))
        measured.append(_minibatch_update(run, minibatch, rewards[part]))
    # A minibatch without a scored token says NaN; so does a step of such minibatches.
    means = torch.stack(measured).nanmean(dim=0).tolist()
    return {
        **group_summary(scores, settings.group_size),
        **dict(zip(("loss", *LOGGED_METRICS), means, strict=True)),
    }


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
    _update(run, output.loss)
    values = [output.loss.detach(), *(output.metrics[name] for name in LOGGED_METRICS)]
    return torch.stack([value.float() for value in values])


def _update(run: Run, loss: Tensor) -> None:
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), GRADIENT_NORM)
    run.optimizer.step()


def _set_learning_rate(run: Run, rate: float) -> None:
    for group in run.optimizer.param_groups:
        group["lr"] = rate


def note(run: Run, listener: Listener, record: Record, began: float) -> None:
    """Add a step's record to the run, with the seconds since `began`, and pass it on."""
    record["seconds"] = time.perf_counter() - began
    run.record["seconds"] += record["seconds"]
    run.record["steps"].append(record)
    listener.step(run, record)
