"""`mapo-kernels study ablation`: which runs there are, and their order, over all cores.

Every finished run is a line of `ablation.jsonl`. A study that is started again in the same folder
continues with the runs that are missing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mapo_kernels import files
from mapo_kernels.files import CommandError, append_line, drop_cut_off_line, read_lines
from mapo_kernels.study.settings import (
    ESTIMATORS,
    NORM_RATE,
    RATE_SEEDS,
    RATES,
    READ_SUCCESS,
    RECORD_SCHEMA,
    RECORDS_NAME,
    REGIMES,
    SEEDS,
    Cell,
    StudySettings,
)

Record = dict[str, Any]
Runner = Callable[[Iterable[Cell]], Iterator[Record]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the ablation to a parser."""
    add = parser.add_argument
    add("--estimators", nargs="+", choices=ESTIMATORS, default=list(ESTIMATORS), help="which")
    regimes = "how often the start succeeds: " + ", ".join(f"{k} {v}" for k, v in REGIMES.items())
    add("--regimes", nargs="+", choices=REGIMES, default=["mixed", "hard", "easy"], help=regimes)
    add("--seeds", type=int, default=8, help="of the mixed regime with binary rewards")
    add("--other-seeds", type=int, default=SEEDS, help="of everything else, at most --seeds")
    add("--steps", type=int, default=StudySettings.steps, help="RL steps of a run")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    add("--device", default="cpu", help="a torch device; on a CPU runs repeat bit for bit")
    models = "instead of the demo's: a Hugging Face causal LM, by name or folder, and TRL's trainer"
    add("--model", help=models)
    needed = "with --model, yaml that decides all else, as examples/paper_setting.yaml"
    add("--config", type=Path, help=needed)
    folder = "folder of the results; what an earlier study has finished there is kept"
    add("--out", type=Path, default=Path("study_out"), help=folder)


def main(args: argparse.Namespace) -> int:
    """Run what is missing; returns the exit code.

    Raises:
        CommandError: it cannot be run like that, or the folder has records of other settings.
    """
    files.require("demo", "reasoning_gym", "jsonschema", "filelock")
    from mapo_kernels.demo.experiment import usable_device

    for name, least in {"seeds": 1, "other_seeds": 1, "steps": 0, "jobs": 1}.items():
        if getattr(args, name) < least:
            option, given = name.replace("_", "-"), getattr(args, name)
            raise CommandError(f"--{option}: expected at least {least}, got {given}")
    if (args.model is None) != (args.config is None):
        raise CommandError("--model, --config: expected both or neither")
    device = str(usable_device(args.device))
    if args.model is not None:
        return _of_model(args, device)
    return run_study(
        StudySettings(steps=args.steps),
        estimators=list(dict.fromkeys(args.estimators)),
        regimes=list(dict.fromkeys(args.regimes)),
        seeds=args.seeds,
        other_seeds=args.other_seeds,
        jobs=args.jobs,
        out=args.out,
        device=device,
    )


def _of_model(args: argparse.Namespace, device: str) -> int:
    """The runs of a Hugging Face model; TRL's trainer has no dynamic sampling."""
    from mapo_kernels.study import model_runs
    from mapo_kernels.study.analytic import VARIANTS

    every = args.estimators == list(ESTIMATORS)
    return model_runs.run(
        args.model,
        args.config,
        estimators=list(VARIANTS if every else dict.fromkeys(args.estimators)),
        seeds=args.seeds,
        device=device,
        out=args.out,
    )


def run_study(
    base: StudySettings,
    *,
    estimators: Sequence[str],
    regimes: Sequence[str],
    seeds: int,
    other_seeds: int = SEEDS,
    jobs: int,
    out: Path,
    device: str = "cpu",
) -> int:
    """Run every cell whose record is missing; see `main`."""
    with files.naming(out):
        out.mkdir(parents=True, exist_ok=True)
    path = out / RECORDS_NAME
    with files.locked(out), _runner(base, out, jobs, device) as run:
        records = _kept_records(path, base)
        for cells in phases(records, estimators, regimes, seeds, other_seeds):
            done = {Cell.of(record) for record in records}
            missing = [cell for cell in cells if cell not in done]
            for count, record in enumerate(run(missing), start=1):
                append_line(path, record)
                records.append(record)
                print(f"{count}/{len(missing)} {progress(record)}", flush=True)
    print(f"{len(records)} runs in {path}")
    return 0


def phases(
    records: Sequence[Record],
    estimators: Sequence[str],
    regimes: Sequence[str],
    seeds: int,
    other_seeds: int = SEEDS,
) -> Iterator[list[Cell]]:
    """All cells, what matters most first; `records` grows in between, and decides learning rates.

    Seed by seed, so that a study that ends early has whole seeds to compare.
    """
    few = range(min(seeds, other_seeds))
    for regime in regimes:
        yield [
            Cell("rate", estimator, regime, "binary", seed, rate)
            for seed in RATE_SEEDS
            for rate in RATES[regime]
            for estimator in estimators
        ]
        counted = range(seeds) if regime == "mixed" else few
        yield _main(records, estimators, regime, "binary", counted)
    if "mixed" in regimes:
        yield _main(records, estimators, "mixed", "partial", few)
        reading = [name for name in estimators if name in READ_SUCCESS]
        yield _main(records, reading, "mixed", "partial-success", few)
    for regime in regimes:
        if regime != "easy":
            yield [
                Cell("norm", estimator, regime, "binary", seed, NORM_RATE)
                for seed in few
                for estimator in estimators
            ]


def _main(
    records: Sequence[Record],
    estimators: Sequence[str],
    regime: str,
    reward: str,
    seeds: Iterable[int],
) -> list[Cell]:
    """The runs at the learning rates that were chosen in the regime with binary rewards."""
    from mapo_kernels.study.statistics import chosen_rates  # which imports numpy

    rates = chosen_rates(records, regime)
    return [
        Cell("main", estimator, regime, reward, seed, rates[estimator])
        for seed in seeds
        for estimator in estimators
    ]


@contextmanager
def _runner(base: StudySettings, out: Path, jobs: int, device: str = "cpu") -> Iterator[Runner]:
    """What runs cells and yields their records as they end; with one job, in this process."""
    from mapo_kernels.study.runs import run_cell

    if jobs == 1:
        yield lambda cells: (run_cell(cell, base, out, device) for cell in cells)
        return
    # Forked processes would share torch's threads; Ctrl-C is this process's affair.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_ignore_interrupts)

    def run(cells: Iterable[Cell]) -> Iterator[Record]:
        futures = [pool.submit(run_cell, cell, base, out, device) for cell in cells]
        return (future.result() for future in as_completed(futures))

    try:
        yield run
    except BrokenProcessPool as error:
        reason = "a run's process was ended from outside; start again to continue"
        raise CommandError(f"{out}: {reason}") from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()


def _ignore_interrupts() -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)


def read_records(path: Path) -> list[Record]:
    """The records of a study; see `files.read_lines`."""
    return read_lines(path, RECORD_SCHEMA)


def _kept_records(path: Path, base: StudySettings) -> list[Record]:
    """The records to continue from, all of the same settings; the file ends with a whole line."""
    if not path.exists():
        return []
    records = read_records(path)
    for record in records:
        expected = json.loads(json.dumps(asdict(Cell.of(record).settings(base))))
        for name, now in expected.items():
            if record["settings"].get(name) != now:
                before = record["settings"].get(name)
                raise CommandError(
                    f"{path}: has a run whose {name} was {before!r}, now it is {now!r}: "
                    "choose another --out"
                )
    drop_cut_off_line(path)
    return records


def progress(record: Record) -> str:
    """A run in a line."""
    first, last = (record["evals"][i]["success_sampled"] for i in (0, -1))
    return (
        f"{record['stage']} {record['regime']} {record['reward']} {record['estimator']} "
        f"rate {record['learning_rate']:g} seed {record['seed']}: "
        f"success {first:.3f} -> {last:.3f} in {record['seconds']:.0f} s"
    )
