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
from typing import Any, NamedTuple

from mapo_kernels.files import CommandError, read_whole, require, write_whole

from .names import LEVELS, SUITES

# Exit statuses of pytest.
FINISHED, FAILED, INTERRUPTED = 0, 1, 2
DEFAULT = "run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions and their options to a parser."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, action in ACTIONS.items():
        summary = action.summary + (" (what `bench` alone does)" if name == DEFAULT else "")
        shown = argparse.ArgumentDefaultsHelpFormatter
        action.add_arguments(
            actions.add_parser(
                name, help=summary, description=summary, formatter_class=shown, allow_abbrev=False
            )
        )


def completed(words: Sequence[str]) -> list[str]:
    """The words of a command line behind `bench`, with the action where it is left out."""
    left_out = not words or (words[0].startswith("-") and words[0] not in ("-h", "--help"))
    return [DEFAULT, *words] if left_out else list(words)


def _add_nothing(parser: argparse.ArgumentParser) -> None:
    """For an action without options."""


def _add_result(parser: argparse.ArgumentParser) -> None:
    """What every action takes that writes a result file."""
    add = parser.add_argument
    add("--commit", help="where the code has no git history to ask")
    add("--notes", help="kept in the result file: what was predicted, and found")
    add("--out", type=Path, default=Path(), help="folder of the result files")
    add("--name", help="of the files; without one it is what is measured, device and time")


def _add_special(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="each once: the times mean nothing")
    _add_result(parser)


def _add_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--suite",
        choices=SUITES,
        default="quick",
        help="quick: under a minute on a CPU; gpu: parity tests, then all levels, under 8 minutes "
        "on one H200; full: everything",
    )
    add(
        "--dry-run",
        action="store_true",
        help="walk every case that the suite has on a GPU, tiny and interpreted on the CPU",
    )
    once = "only this one; may be given several times"
    add("--level", action="append", default=[], choices=LEVELS, help=once)
    _add_result(parser)
    add("--no-plots", action="store_true", help="tables only")


def _add_report(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("files", nargs="+", type=Path, metavar="FILE", help="result files (JSON)")
    add("--readme", type=Path, help="a page to write the tables to, between its markers")
    add("--no-plots", action="store_true", help="tables only")


def _add_warm(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    once = "only this one; may be given several times"
    add("--family", action="append", default=[], help=once)
    add("--target", default="sm_90", help="architecture")
    add("--jobs", type=int, default=1, help="processes that compile")


def _add_tune(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    dry = "every point, compiled for --target and interpreted on the CPU"
    add("--dry-run", action="store_true", help=dry)
    add("--minutes", type=float, default=math.inf, help="stop after so many; it can go on later")
    _add_warm(parser)
    add("--out", type=Path, default=Path(), help="folder, or the file itself")
    add("--name", help="of the file; without one it is that of the device")


def _name(given: argparse.Namespace) -> str:
    """The name of the result's files."""
    from .environment import device_name

    device = re.sub(r"\W+", "_", device_name()).strip("_").lower()
    if given.action == "tune":  # which goes on with what it finds there
        return given.name or f"tune_{'dry' if given.dry_run else device}"
    kind = given.action
    if kind == "run":
        kind = "dry" if given.dry_run else given.suite
    return given.name or f"{kind}_{device}_{time.strftime('%Y%m%d_%H%M%S')}"


def measure(given: argparse.Namespace, path: Path) -> int:
    """Run a suite under pytest, which writes `path` after each row; pytest's exit status."""
    import pytest

    from . import harness

    run = harness.Run(given.suite, given.level, given.dry_run)
    run.start(path, given.commit, given.notes)
    # The settings of this folder, whatever project it is installed in. On a GPU the fixture of
    # pytest-benchmark stays unused: it would time the launches.
    options = ["--override-ini=python_functions=bench_*", "--override-ini=addopts="]
    options += ["-p", "no:cacheprovider", "-W", "ignore:Benchmark fixture was not used"]
    options += ["--benchmark-quiet", "--tb=short", harness.__file__]
    return int(pytest.main(options, plugins=[run]))


def _require(given: argparse.Namespace, *modules: str) -> None:
    """Raise a CommandError unless there is what results are shown with, and these modules."""
    drawing = () if given.no_plots else ("matplotlib",)
    require("bench", "rich", "jsonschema", *drawing, *modules)


def _run(given: argparse.Namespace) -> int:
    _require(given, "pytest", "pytest_benchmark")
    if given.dry_run:
        # Triton decides at import whether it interprets: nothing may have imported it yet.
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from mapo_kernels import resolve_backend

    from . import results

    if not given.dry_run:
        try:
            resolve_backend("cuda" if torch.cuda.is_available() else "cpu")
        except (ValueError, RuntimeError) as error:
            raise CommandError(str(error)) from error
    path = results.reserve(given.out, _name(given))
    status = measure(given, path)
    if status not in (FINISHED, FAILED, INTERRUPTED):
        return status  # Nothing was measured.
    found = results.read(path)
    _show(found, path, plots=not given.no_plots)
    parity = found["parity"]
    if parity is not None:
        print(f"parity tests: {'passed' if parity['passed'] else 'FAILED'}, {parity['summary']}")
        status = status or int(not parity["passed"])
    return 130 if status == INTERRUPTED else status


def _print(markdown: str) -> None:
    """Markdown for the terminal, or 150 columns wide in a file."""
    from rich.console import Console
    from rich.markdown import Markdown

    Console(width=None if sys.stdout.isatty() else 150).print(Markdown(markdown))


def _show(found: dict[str, Any], path: Path, plots: bool) -> None:
    """Print a result's tables, write them as CSV, and draw its plots beside its file."""
    from . import report, results

    _print(report.markdown(found))
    print(f"{path} and .csv")
    results.write_table(found, path)
    if plots and found["suite"] in SUITES:
        from .plots import draw

        print(*draw(found, path.parent, path.stem), sep="\n")


def _report(given: argparse.Namespace) -> int:
    _require(given)
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


def _codegen(given: argparse.Namespace) -> int:
    require("bench", "rich")
    from .codegen import COLUMNS, static_table
    from .report import table

    rows = [[cell.format(**row) for cell in COLUMNS.values()] for row in static_table()]
    _print(table(list(COLUMNS), rows))
    return 0


def _special(given: argparse.Namespace) -> int:
    """`host` and `startup`: what is measured without cases."""
    require("bench", "rich", "jsonschema")
    from . import results

    measured: Any = import_module(f".{given.action}", __package__)
    path = results.reserve(given.out, _name(given))
    measured.measure(path, given.dry_run, given.commit, given.notes)
    found = results.read(path)
    _show(found, path, plots=False)
    return int(
        any(row["status"] == "failed" and row["provider"] == measured.OURS for row in found["rows"])
    )


def _check_points(given: argparse.Namespace) -> None:
    """Raise a CommandError unless families and target are known; imports what knows them."""
    from .machine_code import TARGETS
    from .tune import FAMILIES

    for name, found, known in (
        *[("--family", x, FAMILIES) for x in given.family],
        ("--target", given.target, TARGETS),
    ):
        if found not in known:
            raise CommandError(f"{name}: expected one of {list(known)}, got {found!r}")
    if given.jobs < 1:
        raise CommandError(f"--jobs: expected a positive number, got {given.jobs}")


def _warm(given: argparse.Namespace) -> int:
    require("bench", "rich", "pytest")
    _check_points(given)
    from . import tune

    print(tune.build(), flush=True)
    rows = tune.compile_points(given.target, given.family, given.jobs)
    failed, spills = (sum(bool(x.get(k)) for x in rows.values()) for k in ("reason", "spills"))
    print(f"{len(rows)} points for {given.target}: {spills} spill, {failed} failed")
    return 0


def _tune(given: argparse.Namespace) -> int:
    require("bench", "rich", "pytest")
    if given.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # as in `_run`
    import torch

    _check_points(given)
    import mapo_kernels

    from . import tune

    if not given.dry_run and not torch.cuda.is_available():
        raise CommandError("tune: expected a GPU, or --dry-run, which needs none")
    mapo_kernels.set_backend("triton")
    path = given.out if given.out.suffix else given.out / f"{_name(given)}.jsonl"
    found = tune.Tuning(path, given.dry_run)
    print(found.about["build"], flush=True)
    known = {}
    if given.dry_run:
        known = tune.compile_points(given.target, given.family, given.jobs)
    finished = found.measure(given.family, given.minutes, known)
    rows = list(found.rows.values())
    text, chosen = tune.winners(rows)
    _print(text)
    for status in ("left out", "wrong", "failed"):
        print(f"{status}: {sum(row['status'] == status for row in rows)}")
    if not finished:
        print("The time was not enough for all points: run it again to go on.")
    print(f"{path}\nMAPO_KERNELS_TUNING={path.with_suffix('.tuning.json')}")
    write_whole(path.with_suffix(".tuning.json"), (json.dumps(chosen, indent=1) + "\n").encode())
    return int(any(row["status"] == "wrong" for row in rows))


class Action(NamedTuple):
    """What `bench ACTION` does."""

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    main: Callable[[argparse.Namespace], int]


ACTIONS = {
    "run": Action("run a suite", _add_run, _run),
    "report": Action("tables and plots of result files again", _add_report, _report),
    "codegen": Action(
        "what the compiler makes of the kernels for A100, H100, H200 and B200",
        _add_nothing,
        _codegen,
    ),
    "host": Action(
        "what each call costs its caller, over a driver that does nothing", _add_special, _special
    ),
    "startup": Action(
        "what imports, the first use and the help of commands take", _add_special, _special
    ),
    "warm": Action(
        "compile what tune measures into TRITON_CACHE_DIR, without a GPU", _add_warm, _warm
    ),
    "tune": Action(
        "measure values of the fields in config.py, and write the fastest to a file",
        _add_tune,
        _tune,
    ),
}


def main(arguments: Sequence[str] | argparse.Namespace) -> int:
    """Run the command; 1 if our own numbers are wrong, 2 for wrong usage, else 0."""
    given = arguments
    if not isinstance(given, argparse.Namespace):
        parser = argparse.ArgumentParser(prog="mapo-kernels bench", allow_abbrev=False)
        add_arguments(parser)
        given = parser.parse_args(completed(given))
    try:
        return ACTIONS[given.action].main(given)
    except CommandError as error:
        print(f"mapo-kernels bench: {error}", file=sys.stderr)
        return 2
