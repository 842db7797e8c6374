"""One run of the ablation: the demo's training with a cell's estimator, reward and update."""

from __future__ import annotations

import platform
import subprocess
import time
from dataclasses import asdict, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from mapo_kernels import SamplingMask, group_advantages
from mapo_kernels.demo.settings import WARM_UP, Record
from mapo_kernels.demo.tasks import Problem
from mapo_kernels.demo.train import GRADIENT_NORM, Rollouts, Run, without_signal
from mapo_kernels.doctor import versions
from mapo_kernels.study.settings import (
    ARMS,
    FORMAT,
    REGIMES,
    STARTS_NAME,
    STEP_LISTS,
    Cell,
    StudySettings,
)

POINTS = 4  # characters in place that make a reward of 1
BLOCKS = 25  # into which the steps of a run are averaged, to keep records short
DIGITS = 5  # significant digits in records


class StudyRun(Run):
    """The demo's run with the study's rewards, dynamic sampling, and one norm for every gradient.

    Its record says more, too.
    """

    settings: StudySettings

    def __init__(self, settings: StudySettings, cell: Cell, start: Run) -> None:
        """Begin where the warm-up `start` ended, on its device."""
        super().__init__(settings, ARMS[cell.estimator][0], cell.seed, start.device, start)
        self.knows_success = cell.reward == "partial-success"
        self._credit = replace(self.task, partial_credit=True)

    def reward(self, problem: Problem, answer: str | None) -> float:
        """1 or 0, or points for the characters in place."""
        if self.settings.reward == "binary":
            return float(answer == problem.solution)
        return self._credit.reward(problem, answer) * len(problem.solution) / POINTS

    def _roll_out(self) -> Rollouts:
        """A batch of groups; with more than one draw, those with signal first.

        DAPO samples until the batch is full of groups with signal. Here that ends after `draws`
        batches of prompts, and the last groups without signal fill up what is missing.
        """
        drawn = super()._roll_out()
        count = len(drawn.rewards)
        self._groups = self._silent = 0
        while True:
            silent = without_signal(drawn.rewards)
            self._groups, self._silent = len(silent), int(silent.sum())
            if self._groups - self._silent >= count or self._groups >= count * self.settings.draws:
                break
            more = super()._roll_out()
            drawn = Rollouts._make(torch.cat(x) for x in zip(drawn, more, strict=True))
        first = silent.int().argsort(stable=True)[:count].sort().values
        return Rollouts._make(x[first] for x in drawn)

    def _reinforce(self) -> Record:
        """A step, with what its sampling took."""
        done = super()._reinforce()
        return done | {"groups": self._groups, "groups_without_signal": self._silent}

    def _minibatch(
        self, part: Rollouts, kept: SamplingMask | None, old_logprobs: Tensor
    ) -> dict[str, float]:
        """An optimizer step, with the mean of the absolute advantages."""
        advantages = group_advantages(
            part.rewards,
            group_size=self.settings.group_size,
            success=part.correct if self.knows_success else None,
            **asdict(self.advantage_spec),
        )
        done = super()._minibatch(part, kept, old_logprobs)
        return done | {"advantage_abs": advantages.abs().mean().item()}

    def _update(self, loss: Tensor) -> Record:
        """An optimizer step, with the norm of the parameters' change."""
        before = [x.detach().clone() for x in self.model.parameters()]
        done = super()._update(loss)
        moved = [x.detach() - y for x, y in zip(self.model.parameters(), before, strict=True)]
        return done | {"update_norm": torch.nn.utils.get_total_norm(moved).item()}

    def _limit_gradient(self) -> Tensor:
        """Clip the gradient, or rescale it to the norm at which it would be clipped."""
        if not self.settings.equal_norm:
            return super()._limit_gradient()
        gradients = [x.grad for x in self.model.parameters() if x.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if norm > 0:  # a minibatch without signal has none
            for gradient in gradients:
                gradient.mul_(GRADIENT_NORM / norm)
        return norm


def run_cell(cell: Cell, base: StudySettings, out: Path, device: str = "cpu") -> Record:
    """Train and evaluate one cell; returns its record.

    Args:
        cell: which run.
        base: the settings that all cells share.
        out: the study's folder, which keeps the warm-ups.
        device: a torch device.
    """
    began = time.perf_counter()
    torch.set_num_threads(1)
    settings = cell.settings(base)
    start = _start(cell.regime, cell.seed, base, out, device)
    run = StudyRun(settings, cell, start)
    run.begin()
    while not run.record["finished"]:
        run.step()
    last = start.record["steps"][-1]
    record = {
        "format": FORMAT,
        **asdict(cell),
        "settings": asdict(settings),
        "warmup": {"updates": last["step"], "success": last["success"]},
        "evals": run.record["evals"],
        "steps": _blocks(run.record["steps"]),
        "seconds": time.perf_counter() - began,
        **_environment(device),
    }
    return _rounded(record)


def _start(regime: str, seed: int, base: StudySettings, out: Path, device: str) -> Run:
    """The warm-up of a regime and a seed, made once for all estimators."""
    # Of the settings, only those that a warm-up depends on.
    shared = replace(base, warmup_success=REGIMES[regime], steps=0)
    run = Run(shared, WARM_UP, seed, torch.device(device))
    # A random state is that of a kind of device.
    kind = run.device.type
    of_device = "" if kind == "cpu" else f"_{kind}"
    path = out / STARTS_NAME / f"{regime}_seed{seed}{of_device}.pt"
    path.parent.mkdir(exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if path.exists():
            run.load(path)
        else:
            while not run.record["finished"]:
                run.step()
            run.save(path)
    return run


def _blocks(steps: list[Record]) -> dict[str, list[float]]:
    """Means over blocks of consecutive steps."""
    if not steps:
        return {name: [] for name in STEP_LISTS}
    size = -(-len(steps) // BLOCKS)
    blocks = [steps[i : i + size] for i in range(0, len(steps), size)]
    means = {
        name: [_nanmean([step[name] for step in block]) for block in blocks]
        for name in STEP_LISTS
        if name != "step"
    }
    return {"step": [block[-1]["step"] + 1 for block in blocks], **means}


def _nanmean(values: list[float]) -> float:
    return torch.tensor(values, dtype=torch.float64).nanmean().item()


def _rounded(value: Any) -> Any:
    """What JSON can hold, in few digits; None for NaN."""
    if isinstance(value, dict):
        return {name: _rounded(x) for name, x in value.items()}
    if isinstance(value, list):
        return [_rounded(x) for x in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if value == value else None
    return value


@cache
def _environment(device: str) -> Record:
    """Versions, machine and commit, which do not change while a process lives."""
    found = versions() | {"reasoning-gym": metadata.version("reasoning-gym")}
    return {"commit": _commit(), "versions": found, "machine": _machine(device)}


def _machine(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, one thread a run"


def _commit() -> str:
    """Of the checkout that runs, with a plus where files were changed."""
    command = ("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+")
    options = ("--abbrev=40", "--exclude=*")
    try:
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"
