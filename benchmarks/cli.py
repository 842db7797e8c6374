"""`mapo-kernels bench`: run a suite, redraw its report, read machine code, time the host."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from mapo_kernels.files import CommandError, read_whole, write_whole

from .cases import LEVELS, SUITES

RESULTS = Path("benchmarks/results")
# Exit statuses of pytest.
FINISHED, FAILED, INTERRUPTED = 0, 1, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `bench`."""
    add = parser.add_argument
    add(
        "action",
        nargs="?",
        default="run",
        choices=list(ACTIONS),
        help="run a suite (default); report: plots and tables of result files again; "
        "codegen: what the compiler makes of the kernels for A100, H100, H200 and B200; "
        "host: what each call costs its caller, over a driver that does nothing",
    )
    add("files", nargs="*", type=Path, help="report: result files (JSON)")
    add(
        "--suite",
        choices=SUITES,
        default="quick",
        help="quick: under a minute on a CPU; gpu: parity tests, then all levels, under 8 minutes "
        "on one H200; full: everything (default: quick)",
    )
    add(
        "--dry-run",
        action="store_true",
        help="walk every case that the suite has on a GPU, tiny and interpreted on the CPU",
    )
    add("--level", action="append", default=[], choices=LEVELS, help="only this one; repeatable")
    add("--commit", help="where the code has no git history to ask")
    add("--notes", help="kept in the result file: what was predicted, and found")
    add("--out", type=Path, default=RESULTS, help=f"folder (default: {RESULTS})")
    add("--name", help="of the files (default: suite, device and time)")
    add("--no-plots", action="store_true", help="tables only")
    add("--readme", type=Path, help="report: write its tables between its markers")


def _name(given: argparse.Namespace) -> str:
    """The name of the result's files."""
    from .environment import device_name

    device = re.sub(r"\W+", "_", device_name()).strip("_").lower()
    kind = "host" if given.action == "host" else "dry" if given.dry_run else given.suite
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


def _run(given: argparse.Namespace) -> int:
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
    from . import report, results

    if not given.files:
        raise CommandError("report: expected result files, e.g. benchmarks/results/cpu.json")
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
    from .codegen import COLUMNS, static_table
    from .report import table

    rows = [[cell.format(**row) for cell in COLUMNS.values()] for row in static_table()]
    _print(table(list(COLUMNS), rows))
    return 0


def _host(given: argparse.Namespace) -> int:
    from . import host, results

    path = results.reserve(given.out, _name(given))
    host.measure(path, given.dry_run, given.commit, given.notes)
    found = results.read(path)
    _show(found, path, plots=False)
    return int(
        any(row["status"] == "failed" and row["provider"] == host.OURS for row in found["rows"])
    )


ACTIONS = {"run": _run, "report": _report, "codegen": _codegen, "host": _host}


def main(arguments: list[str] | argparse.Namespace | None = None) -> int:
    """Run the command; 1 if our own numbers are wrong, 2 for wrong usage, else 0."""
    given = arguments
    if not isinstance(given, argparse.Namespace):
        parser = argparse.ArgumentParser(prog="mapo-kernels bench", description=__doc__)
        add_arguments(parser)
        given = parser.parse_args(given)
    try:
        return ACTIONS[given.action](given)
    except CommandError as error:
        print(f"mapo-kernels bench: {error}", file=sys.stderr)
        return 2
