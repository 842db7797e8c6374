"""All runs of one demo: for each seed a warm-up, then every estimator from the same start."""

from __future__ import annotations

import itertools
import json
import platform
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import mapo_kernels
from mapo_kernels.demo import folder, plots, report
from mapo_kernels.demo.folder import Record
from mapo_kernels.demo.settings import WARM_UP, Settings
from mapo_kernels.demo.train import Run, Workbench
from mapo_kernels.files import CommandError, write_whole

CHECKPOINT_STRIDE = 25  # steps
INTERRUPTED = 130  # what shells report for a process ended by Ctrl-C


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
    with folder.opened(out, resume=resume) as earlier:
        if resume and earlier is not None:
            _require_same_settings(earlier["configuration"], settings)
        bench = Workbench(settings, device)
        log = _new_log(bench)
        phases = (WARM_UP, *estimators)
        if resume and earlier is not None:
            log["runs"] = earlier["runs"]
            # A damaged checkpoint must not be found after hours of training.
            for phase, seed in itertools.product(phases, range(seeds)):
                if folder.checkpoint_path(out, phase, seed).exists():
                    Run(bench, phase, seed, out)
        _write(log, out)
        if not resume:
            folder.discard_checkpoints(out)
        status = "finished"
        try:
            with report.Progress(settings) as progress:
                for seed in range(seeds):
                    start = None
                    for phase in phases:
                        run = Run(bench, phase, seed, out, start)
                        _train(run, log, progress, out)
                        start = start or run
        except KeyboardInterrupt:
            status = "interrupted"
        _write(log, out, status)
        report.print_summary(log, out, plots.draw_all(log, out))
    return INTERRUPTED if status == "interrupted" else 0


def _train(run: Run, log: Record, progress: report.Progress, out: Path) -> None:
    """Steps until the run is finished, each noted in its record, with checkpoints in between."""
    _include(run.record, log["runs"])
    run.begin()
    while not run.record["finished"]:
        began = time.perf_counter()
        record = run.step()
        record["seconds"] = time.perf_counter() - began
        run.record["seconds"] += record["seconds"]
        run.record["steps"].append(record)
        progress.step(run.record)
        if run.record["finished"] or len(run.record["steps"]) % CHECKPOINT_STRIDE == 0:
            run.save()
            _write(log, out)
    if run.record["phase"] != WARM_UP:
        run.save_model()


def _include(record: Record, runs: list[Record]) -> None:
    """Add a run's record, in place of the one that an earlier log has of the same run."""
    names = [(run["phase"], run["seed"]) for run in runs]
    name = record["phase"], record["seed"]
    at = names.index(name) if name in names else len(runs)
    runs[at : at + 1] = [record]


def _new_log(bench: Workbench) -> dict[str, Any]:
    device = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    if bench.device.type == "cuda":
        device = torch.cuda.get_device_name(bench.device)
    versions = {"python": platform.python_version(), "mapo-kernels": mapo_kernels.__version__}
    for package in ("torch", "triton", "reasoning-gym"):
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "format": folder.FORMAT,
        "status": "running",
        "configuration": asdict(bench.settings),
        "device": device,
        "backend": mapo_kernels.resolve_backend(bench.device.type),
        "versions": versions,
        "held_out_problems": len(bench.held_out),
        "runs": [],
    }


def _write(log: Record, out: Path, status: str = "running") -> None:
    """Flush the log to disk as a whole; a crash in the middle leaves the previous file."""
    log["status"] = status
    write_whole(out / folder.LOG_NAME, (json.dumps(log) + "\n").encode())


def _require_same_settings(before: Record, settings: Settings) -> None:
    changed = [
        f"{name} was {before.get(name)!r}, is {now!r}"
        for name, now in asdict(settings).items()
        if before.get(name) != now
    ]
    if changed:
        raise CommandError(f"--resume: expected the earlier settings, but {'; '.join(changed)}")
