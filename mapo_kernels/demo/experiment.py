"""All runs of one demo: for each seed a warm-up, then every estimator from the same start."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import mapo_kernels
from mapo_kernels.demo import plots, report
from mapo_kernels.demo.runs import Record, Run, Settings, Workbench
from mapo_kernels.demo.train import WARM_UP, reinforce, warm_up

LOG_NAME = "log.json"
INTERRUPTED = 130  # what shells report for a process ended by Ctrl-C


class SetupError(Exception):
    """The demo cannot start as asked; the message is for the user."""


class Journal:
    """The JSON log: every run's record, rewritten as a whole so that the file is always valid."""

    def __init__(self, path: Path, settings: Settings, device: torch.device) -> None:
        """Describe the experiment; nothing is written yet."""
        self.path = path
        self.data: dict[str, Any] = {
            "status": "running",
            "configuration": asdict(settings),
            "device": _describe_device(device),
            "backend": mapo_kernels.resolve_backend(device.type),
            "versions": _versions(),
            "runs": [],
        }

    def write(self, status: str = "running") -> None:
        """Flush to disk; a crash in the middle leaves the previous file."""
        self.data["status"] = status
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data) + "\n")
        os.replace(partial, self.path)


class Reporter:
    """Passes what the training loops report on to the terminal and the log file."""

    def __init__(self, journal: Journal, progress: report.Progress) -> None:
        """Connect the two."""
        self._journal = journal
        self._progress = progress

    def step(self, run: Run, record: Record) -> None:
        """Show one step."""
        self._progress.step(run.title, record)

    def checkpoint(self) -> None:
        """Flush the log."""
        self._journal.write()


def run_experiment(
    settings: Settings,
    *,
    estimators: Sequence[str],
    seeds: int,
    device: torch.device,
    out: Path,
    resume: bool,
) -> int:
    """Train every estimator on every seed, then write log, models and plots and print a table.

    Args:
        settings: what decides the results.
        estimators: names that `AdvantageSpec` knows.
        seeds: seeds 0 .. seeds - 1.
        device: where to train.
        out: the folder that gets everything.
        resume: continue from the checkpoints in `out`.

    Returns:
        The exit code: 0, or 130 after Ctrl-C.

    Raises:
        SetupError: `resume` with other settings than those of the log in `out`.
    """
    out.mkdir(parents=True, exist_ok=True)
    if resume:
        _require_same_settings(out / LOG_NAME, settings)
    else:
        for stale in (out / "checkpoints").glob("*.pt"):
            stale.unlink()
    journal = Journal(out / LOG_NAME, settings, device)
    journal.write()
    status = "finished"
    try:
        bench = Workbench(settings, device)
        journal.data["held_out_problems"] = len(bench.held_out)
        with report.Progress(settings) as progress:
            reporter = Reporter(journal, progress)
            for seed in range(seeds):
                _run_seed(bench, seed, estimators, journal, reporter, out)
    except KeyboardInterrupt:
        status = "interrupted"
    journal.write(status)
    drawn = plots.draw_all(journal.data, out)
    report.print_summary(journal.data, out, drawn)
    return INTERRUPTED if status == "interrupted" else 0


def _run_seed(
    bench: Workbench,
    seed: int,
    estimators: Sequence[str],
    journal: Journal,
    reporter: Reporter,
    out: Path,
) -> None:
    start = Run(bench, WARM_UP, seed, out)
    journal.data["runs"].append(start.record)
    warm_up(start, reporter)
    for estimator in estimators:
        run = Run(bench, estimator, seed, out, start)
        journal.data["runs"].append(run.record)
        if bench.settings.trainer == "trl":
            from mapo_kernels.demo.trl_train import reinforce_with_trl

            reinforce_with_trl(run, reporter)
        else:
            reinforce(run, reporter)
        run.save_model()


def _require_same_settings(log: Path, settings: Settings) -> None:
    if not log.exists():
        raise SetupError(f"--resume: expected a log of an earlier run at {log}, found none")
    before = json.loads(log.read_text())["configuration"]
    now = asdict(settings)
    changed = [
        f"{name} was {before.get(name)!r}, is {now[name]!r}"
        for name in now
        if before.get(name) != now[name]
    ]
    if changed:
        raise SetupError(f"--resume: expected the earlier settings, but {'; '.join(changed)}")


def _describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    versions["mapo-kernels"] = mapo_kernels.__version__
    for package in ("torch", "triton", "reasoning-gym"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions
