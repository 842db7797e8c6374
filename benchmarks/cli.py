"""`mapo-kernels bench`: run a suite, redraw its report, read machine code, time the host, tune.

Each action has options of its own. It imports torch and the packages of the `bench` extra when it
runs, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from mapo_kernels.files import CommandError, read_whole, require, write_figure, write_whole

from .names import FAMILIES, LEVELS, SUITES, TARGETS

# Exit statuses of pytest.
FINISHED, FAILED, INTERRUPTED = 0, 1, 2
ONCE = "only this one; may be given several times"
SEVERAL = {"action": "append", "default": []}
FLAG = {"action": "store_true"}
# Every option by what argparse takes; an action of `ACTIONS` names those that it has.
OPTIONS: dict[str, dict[str, Any]] = {
    "files": {"nargs": "+", "type": Path, "metavar": "FILE", "help": "result files (JSON)"},
    "--suite": {
        "choices": SUITES,
        "default": "quick",
        "help": "quick: under a minute on a CPU; gpu: parity tests, then all levels, under 8 "
        "minutes on one H200; full: everything",
    },
    "--level": SEVERAL | {"choices": LEVELS, "help": ONCE},
    "--family": SEVERAL | {"choices": FAMILIES, "help": ONCE},
    "--target": {"choices": TARGETS, "default": "sm_90", "help": "architecture to compile for"},
    "--jobs": {"type": int, "default": 1, "help": "processes that compile; 0: one a core"},
    "--minutes": {"type": float, "default": math.inf, "help": "until it stops, to go on later"},
    "--dry-run": FLAG
    | {"help": "everything once and small, without a GPU: the times mean nothing"},
    "--commit": {"help": "where the code has no git history to ask"},
    "--notes": {"help": "kept in the result file: what was predicted, and found"},
    "--out": {"type": Path, "default": Path(), "help": "folder of the files; of tune, or its file"},
    "--name": {"help": "of the files; without one it is what is measured, device and time"},
    "--readme": {"type": Path, "help": "a page to write the tables to, between its markers"},
    "--no-plots": FLAG | {"help": "tables only"},
}
RESULT = ("--dry-run", "--commit", "--notes", "--out", "--name")
POINTS = ("--family", "--target", "--jobs")
Main = Callable[[argparse.Namespace], int]
# By name: what it does, in words and as a function, and its options.
ACTIONS: dict[str, tuple[str, Main, tuple[str, ...]]] = {}


def action(name: str, summary: str, *options: str) -> Callable[[Main], Main]:
    """Make a function an action of the command."""

    def register(main: Main) -> Main:
        ACTIONS[name] = summary, main, options
        return main

    return register


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions and their options to a parser."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    shown = argparse.ArgumentDefaultsHelpFormatter
    for name, (summary, _, options) in ACTIONS.items():
        found = actions.add_parser(
            name, help=summary, description=summary, formatter_class=shown, allow_abbrev=False
        )
        for option in options:
            found.add_argument(option, **OPTIONS[option])


def completed(words: Sequence[str]) -> list[str]:
    """The words of a command line behind `bench`, with the action where it is left out."""
    left_out = not words or (words[0].startswith("-") and words[0] not in ("-h", "--help"))
    return ["run", *words] if left_out else list(words)


def _name(given: argparse.Namespace) -> str:
    """The name of the result's files: that of `tune` has no time, as it goes on with its file."""
    from .environment import device_name

    kind = given.suite if given.action == "run" else given.action
    device = re.sub(r"\W+", "_", device_name()).strip("_").lower()
    when = [] if given.action == "tune" else [time.strftime("%Y%m%d_%H%M%S")]
    return given.name or "_".join([kind, *["dry"] * given.dry_run, device, *when])


def measure(given: argparse.Namespace, path: Path) -> int:
    """Measure into `path`, row by row: a suite under pytest, whose exit status it returns."""
    from . import results

    about = results.About(given.action, given.dry_run, given.commit, given.notes)
    if given.action != "run":
        import_module(f".{given.action}", __package__).measure(path, about)
        return FINISHED
    import pytest

    from . import harness

    run = harness.Run(path, about._replace(suite=given.suite), given.level)
    # The settings of this folder, whatever project it is installed in. On a GPU the fixture of
    # pytest-benchmark stays unused: it would time the launches.
    options = ["--override-ini=python_functions=bench_*", "--override-ini=addopts="]
    options += ["-p", "no:cacheprovider", "-W", "ignore:Benchmark fixture was not used"]
    options += ["--benchmark-quiet", "--tb=short", harness.__file__]
    return int(pytest.main(options, plugins=[run]))


def _print(markdown: str) -> None:
    """Markdown for the terminal, or 150 columns wide in a file."""
    from rich.console import Console
    from rich.markdown import Markdown

    Console(width=None if sys.stdout.isatty() else 150).print(Markdown(markdown))


def _show(found: dict[str, Any], path: Path, plots: bool) -> None:
    """Print a result's tables, write them as CSV, and draw its plots beside its file."""
    from . import report, results

    figures = {}
    if plots and found["suite"] in SUITES:
        from .plots import draw

        with results.of_whole_file(path):
            figures = draw(found)
    _print(report.markdown(found))
    print(f"{path} and .csv")
    results.write_table(found, path)
    for kind, figure in figures.items():
        place = path.with_name(f"{path.stem}_{kind}.png")
        write_figure(figure, place, dpi=100)
        print(place)


@action("run", "run a suite (`bench` alone, too)", "--suite", "--level", *RESULT, "--no-plots")
def _run(given: argparse.Namespace) -> int:
    if not given.dry_run:
        import torch

        from mapo_kernels import resolve_backend

        try:
            resolve_backend("cuda" if torch.cuda.is_available() else "cpu")
        except (ValueError, RuntimeError) as error:
            raise CommandError(str(error)) from error
    return _measured(given)


@action("host", "what a call costs its caller, over a driver that does nothing", *RESULT)
@action("startup", "what imports, the first use and the help of commands take", *RESULT)
def _measured(given: argparse.Namespace) -> int:
    """Measure, and show what was measured."""
    from . import results
    from .providers import OURS

    path = results.reserve(given.out, _name(given))
    status = measure(given, path)
    if status not in (FINISHED, FAILED, INTERRUPTED):
        return status  # Nothing was measured.
    found = results.read(path)
    _show(found, path, plots=not getattr(given, "no_plots", True))
    ours = {row["status"] for row in found["rows"] if row["provider"].startswith(OURS)}
    is_wrong = status == FAILED or ours & {"wrong", "failed"} or found.get("parity") is False
    if found.get("parity") is False:
        print("The parity tests failed.")
    return 130 if status == INTERRUPTED else int(bool(is_wrong))


@action("report", "tables and plots of result files again", "files", "--readme", "--no-plots")
def _report(given: argparse.Namespace) -> int:
    from . import report, results

    # All is read before anything is written.
    every = {path: results.read(path) for path in given.files}
    text = None
    if given.readme is not None:
        content = read_whole(given.readme)
        try:
            text = content.decode()
            for path, found in every.items():
                text = report.insert(text, path.stem, report.markdown(found))
        except ValueError as error:
            raise CommandError(f"{given.readme}: {error}") from error
    for path, found in every.items():
        _show(found, path, plots=not given.no_plots)
    if text is not None:
        # Where it is a link, what it points to is written.
        write_whole(given.readme.resolve(), text.encode())
    return 0


@action("codegen", "what the compiler makes of the kernels for A100, H100, H200 and B200")
def _codegen(given: argparse.Namespace) -> int:
    from .codegen import static_table

    _print(static_table())
    return 0


@action("warm", "compile what tune measures into TRITON_CACHE_DIR, without a GPU", *POINTS)
def _warm(given: argparse.Namespace) -> int:
    from . import tune

    print(tune.build(), flush=True)
    rows = tune.compile_points(given.target, given.family, given.jobs)
    failed, spills = (sum(bool(row.get(k)) for row in rows) for k in ("reason", "spills"))
    print(f"{len(rows)} points for {given.target}: {spills} spill, {failed} failed")
    return 0


@action("tune", "measure values of the fields in config.py, and write the fastest to a file",
        "--dry-run", "--minutes", *POINTS, "--out", "--name")  # fmt: skip
def _tune(given: argparse.Namespace) -> int:
    import torch

    import mapo_kernels

    from . import tune

    if not given.dry_run and not torch.cuda.is_available():
        raise CommandError("tune: expected a GPU, or --dry-run, which needs none")
    mapo_kernels.set_backend("triton")
    path = given.out if given.out.suffix else given.out / f"{_name(given)}.jsonl"
    found = tune.Tuning(path, given.dry_run)
    if given.dry_run:
        _warm(given)
    else:
        print(tune.build(), flush=True)
    finished = found.measure(given.family, given.minutes)
    rows = list(found.rows.values())
    text, chosen = tune.winners(rows)
    _print(text)
    for status in ("wrong", "failed"):
        print(f"{status}: {sum(row['status'] == status for row in rows)}")
    if not finished:
        print("The time was not enough for all points: run it again to go on.")
    print(f"{path}\nMAPO_KERNELS_TUNING={path.with_suffix('.tuning.json')}")
    write_whole(path.with_suffix(".tuning.json"), (json.dumps(chosen, indent=1) + "\n").encode())
    return int(any(row["status"] == "wrong" for row in rows))


def main(given: argparse.Namespace) -> int:
    """Run the command; 1 if our own numbers are wrong, else 0."""
    drawing = () if getattr(given, "no_plots", True) else ("matplotlib",)
    require("bench", "rich", "jsonschema", "pytest", "pytest_benchmark", *drawing)
    if given.action in ("run", "tune") and given.dry_run:
        # Triton decides at import whether it interprets: nothing may have imported it yet.
        os.environ["TRITON_INTERPRET"] = "1"
    return ACTIONS[given.action][1](given)
