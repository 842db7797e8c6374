"""All runs of one demo: for each seed a warm-up, then every estimator from the same start."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import mapo_kernels
from mapo_kernels.demo import plots, report
from mapo_kernels.demo.folder import LOG_NAME, discard_checkpoints, opened
from mapo_kernels.demo.runs import FORMAT, Record, Run, Settings, Workbench, checkpoint_path
from mapo_kernels.demo.train import WARM_UP, reinforce, warm_up
from mapo_kernels.files import CommandError, write_whole

INTERRUPTED = 130  # what shells report for a process ended by Ctrl-C


class Journal:
    """The JSON log: every run's record, rewritten as a whole so that the file is always valid."""

    def __init__(self, path: Path, bench: Workbench, earlier: Record | None) -> None:
        """Describe the experiment; `earlier` is the log that it continues. Nothing is written."""
        self.path = path
        self.data: dict[str, Any] = {
            "format": FORMAT,
            "status": "running",
            "configuration": asdict(bench.settings),
            "device": _describe_device(bench.device),
            "backend": mapo_kernels.resolve_backend(bench.device.type),
            "versions": _versions(),
            "held_out_problems": len(bench.held_out),
            "runs": [] if earlier is None else list(earlier["runs"]),
        }

    def include(self, record: Record) -> None:
        """Add a run's record, in place of the one that an earlier log has of the same run."""
        runs = self.data["runs"]
        names = [(run["phase"], run["seed"]) for run in runs]
        name = record["phase"], record["seed"]
        at = names.index(name) if name in names else len(runs)
        runs[at : at + 1] = [record]

    def write(self, status: str = "running") -> None:
        """Flush to disk; a crash in the middle leaves the previous file."""
        self.data["status"] = status
        write_whole(self.path, (json.dumps(self.data) + "\n").encode())


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
        CommandError: `resume` with other settings than those of the log in `out`; a file or folder
            that cannot be used, or is not the demo's own.
    """
    with opened(out, resume=resume) as earlier:
        if resume and earlier is not None:
            _require_same_settings(earlier["configuration"], settings)
        bench = Workbench(settings, device)
        if resume:
            _require_whole_checkpoints(bench, estimators, seeds, out)
        journal = Journal(out / LOG_NAME, bench, earlier if resume else None)
        journal.write()
        if not resume:
            discard_checkpoints(out)
        status = "finished"
        try:
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
    journal.include(start.record)
    warm_up(start, reporter)
    for estimator in estimators:
        run = Run(bench, estimator, seed, out, start)
        journal.include(run.record)
        if bench.settings.trainer == "trl":
            from mapo_kernels.demo.trl_train import reinforce_with_trl

            reinforce_with_trl(run, reporter)
        else:
            reinforce(run, reporter)
        run.save_model()


def _require_same_settings(before: Record, settings: Settings) -> None:
    now = asdict(settings)
    changed = [
        f"{name} was {before.get(name)!r}, is {now[name]!r}"
        for name in now
        if before.get(name) != now[name]
    ]
    if changed:
        raise CommandError(f"--resume: expected the earlier settings, but {'; '.join(changed)}")


def _require_whole_checkpoints(
    bench: Workbench, estimators: Sequence[str], seeds: int, out: Path
) -> None:
    """Read every checkpoint once, so that a damaged one is not found after hours of training."""
    for seed in range(seeds):
        for phase in (WARM_UP, *estimators):
            if checkpoint_path(out, phase, seed).exists():
                Run(bench, phase, seed, out)


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
