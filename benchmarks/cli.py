"""`mapo-kernels bench`, and `python -m benchmarks`: run a suite, redraw its report, read code."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from mapo_kernels import resolve_backend
from mapo_kernels.files import CommandError, read_whole, write_whole

from .suites import SUITES
from .vocabulary import ALL

RESULTS = Path("benchmarks/results")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `bench`."""
    parser.add_argument(
        "action",
        nargs="?",
        default="run",
        choices=["run", "report", "codegen"],
        help="run a suite (default); report: plots and README tables of result files again; "
        "codegen: what the compiler makes of the kernels for A100, H100, H200 and B200",
    )
    parser.add_argument("files", nargs="*", type=Path, help="report: result files (JSON)")
    parser.add_argument(
        "--suite",
        choices=SUITES,
        default="quick",
        help="quick: under a minute on a CPU; gpu: parity tests, then all levels, under 8 minutes "
        "on one H200; full: everything (default: quick)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="walk every case that the suite has on a GPU, tiny and interpreted on the CPU",
    )
    parser.add_argument(
        "--level",
        action="append",
        default=[],
        choices=list(ALL),
        help="only this level; repeatable",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder (default: {RESULTS})")
    parser.add_argument("--name", help="of the files (default: suite, device and time)")
    parser.add_argument("--commit", help="where the code has no git history to ask")
    parser.add_argument("--notes", help="kept in the result file: what was predicted, and found")
    parser.add_argument("--no-plots", action="store_true", help="tables only")
    parser.add_argument("--readme", type=Path, help="report: write its tables between its markers")


def _interpreted(arguments: list[str]) -> int:
    """The same command in a process that interprets Triton, which decides at import."""
    code = f"import sys; from {__package__}.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    return subprocess.run([sys.executable, "-c", code, *arguments], env=environment).returncode


def _require_backend() -> None:
    try:
        resolve_backend("cuda" if torch.cuda.is_available() else "cpu")
    except (ValueError, RuntimeError) as error:
        raise CommandError(str(error)) from error


def _run(given: argparse.Namespace) -> int:
    from . import console, results
    from .run import run_suite

    if not given.dry_run:
        _require_backend()
    results.reserve(given.out, given.name)
    terminal = console.terminal()
    with console.Bar(terminal) as bar:
        found = run_suite(
            given.suite,
            given.dry_run,
            tuple(given.level),
            given.commit,
            given.notes,
            bar.show,
            bar.announce,
        )
    console.show(found, terminal)
    device = re.sub(r"\W+", "_", found["environment"]["device"]).strip("_").lower()
    stamp = time.strftime("%Y%m%d_%H%M%S")
    kind = "dry" if given.dry_run else given.suite
    path = results.write(found, given.out, given.name or f"{kind}_{device}_{stamp}")
    # A path is no markup, whatever brackets it has, and is not broken into lines.
    terminal.print(f"{path} and .csv", markup=False, soft_wrap=True)
    if not given.no_plots:
        from .plots import draw

        for plot in draw(found, given.out, path.stem):
            terminal.print(str(plot), markup=False, soft_wrap=True)
    ours_is_wrong = any(
        row["provider"].startswith("mapo_kernels") and row["status"] in ("wrong", "failed")
        for row in found["rows"]
    )
    parity = found["parity"]
    return int(ours_is_wrong or bool(parity and not parity["passed"]))


def _report(given: argparse.Namespace) -> int:
    from . import console, results
    from .plots import draw

    if not given.files:
        raise CommandError("report: expected result files, e.g. benchmarks/results/cpu.json")
    # All is read before anything is written.
    every = {path: results.read(path) for path in given.files}
    readme = None if given.readme is None else _with_tables(given.readme, every)
    for path, found in every.items():
        console.show(found, console.terminal())
        if not given.no_plots:
            for plot in draw(found, path.parent, path.stem):
                print(plot)
    if readme is not None:
        # Where it is a link, what it points to is written.
        write_whole(given.readme.resolve(), readme.encode())
    return 0


def _with_tables(path: Path, every: dict[Path, dict[str, Any]]) -> str:
    """The README's text with the tables of result files in place of the old ones."""
    from . import report

    content = read_whole(path)
    try:
        text = content.decode()
        for result, found in every.items():
            text = report.insert(text, result.stem, report.markdown(found))
    except ValueError as error:
        raise CommandError(f"{path}: {error}") from error
    return text


def _codegen(given: argparse.Namespace) -> int:
    from rich import box
    from rich.table import Table

    from .codegen import COLUMNS, static_table
    from .console import terminal

    table = Table(box=box.SIMPLE_HEAD)
    for name in COLUMNS:
        table.add_column(name, no_wrap=True)
    for row in static_table():
        table.add_row(*(show(row) for show in COLUMNS.values()))
    terminal().print(table)
    return 0


def main(arguments: list[str] | argparse.Namespace | None = None) -> int:
    """Run the command; 1 if our own numbers are wrong, 2 for wrong usage, else 0."""
    if isinstance(arguments, argparse.Namespace):
        given = arguments
    else:
        parser = argparse.ArgumentParser(prog="mapo-kernels bench", description=__doc__)
        add_arguments(parser)
        given = parser.parse_args(arguments)
    if given.dry_run and given.action == "run" and os.environ.get("TRITON_INTERPRET") != "1":
        return _interpreted(_as_arguments(given))
    try:
        return {"run": _run, "report": _report, "codegen": _codegen}[given.action](given)
    except CommandError as error:
        print(f"mapo-kernels bench: {error}", file=sys.stderr)
        return 2


def _as_arguments(given: argparse.Namespace) -> list[str]:
    """The command line that gives the same namespace, for a dry run's own process."""
    found = ["run", "--dry-run", f"--suite={given.suite}", f"--out={given.out}"]
    found += [f"--level={level}" for level in given.level]
    found += [
        f"--{k}={getattr(given, k)}" for k in ("name", "commit", "notes") if getattr(given, k)
    ]
    return found + (["--no-plots"] if given.no_plots else [])
