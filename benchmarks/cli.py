"""`mapo-kernels bench`, and `python -m benchmarks`: run a suite, redraw its report, read code."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from mapo_kernels import resolve_backend
from mapo_kernels.files import CommandError, read_whole, write_whole

from .cases import NAMES, SUITES

RESULTS = Path("benchmarks/results")
INTERRUPTED = 2  # pytest's exit status


def add_suite_arguments(add: Callable[..., Any]) -> None:
    """What to measure: arguments of `bench`, and options of `pytest benchmarks`."""
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
    add("--level", action="append", default=[], choices=NAMES, help="only this one; repeatable")
    add("--commit", help="where the code has no git history to ask")
    add("--notes", help="kept in the result file: what was predicted, and found")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `bench`."""
    parser.add_argument(
        "action",
        nargs="?",
        default="run",
        choices=["run", "report", "codegen"],
        help="run a suite (default); report: plots and tables of result files again; "
        "codegen: what the compiler makes of the kernels for A100, H100, H200 and B200",
    )
    parser.add_argument("files", nargs="*", type=Path, help="report: result files (JSON)")
    add_suite_arguments(parser.add_argument)
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder (default: {RESULTS})")
    parser.add_argument("--name", help="of the files (default: suite, device and time)")
    parser.add_argument("--no-plots", action="store_true", help="tables only")
    parser.add_argument("--readme", type=Path, help="report: write its tables between its markers")


def _suite_arguments(given: argparse.Namespace) -> list[str]:
    """The suite's arguments of a namespace, as a command line has them."""
    found = [f"--suite={given.suite}", *[f"--level={level}" for level in given.level]]
    found += [f"--{k}={getattr(given, k)}" for k in ("commit", "notes") if getattr(given, k)]
    return [*found, "--dry-run"] if given.dry_run else found


def _name(given: argparse.Namespace) -> str:
    """The name of the result's files."""
    from .environment import device_name

    device = re.sub(r"\W+", "_", device_name()).strip("_").lower()
    kind = "dry" if given.dry_run else given.suite
    return given.name or f"{kind}_{device}_{time.strftime('%Y%m%d_%H%M%S')}"


def measure(arguments: list[str], path: Path) -> int:
    """Run a suite under pytest, which writes `path` after each row; pytest's exit status."""
    import pytest

    # The settings of this folder, whatever project it is installed in.
    settings = ["python_files=bench_*.py", "python_functions=bench_*", "addopts="]
    options = [f"--override-ini={setting}" for setting in settings]
    options += ["-p", "no:cacheprovider", "--benchmark-quiet", "--tb=short", f"--result={path}"]
    return int(pytest.main([str(Path(__file__).parent), *options, *arguments]))


def _run(given: argparse.Namespace) -> int:
    from . import results

    if not given.dry_run:
        try:
            resolve_backend("cuda" if torch.cuda.is_available() else "cpu")
        except (ValueError, RuntimeError) as error:
            raise CommandError(str(error)) from error
    path = results.reserve(given.out, _name(given))
    before = path.read_bytes() if path.exists() else None
    status = measure(_suite_arguments(given), path)
    if not path.exists() or path.read_bytes() == before:
        return status or 1
    found = results.read(path)
    _show(found, path, plots=not given.no_plots)
    parity = found["parity"]
    if parity is not None:
        print(f"parity tests: {'passed' if parity['passed'] else 'FAILED'}, {parity['summary']}")
        status = status or int(not parity["passed"])
    return 130 if status == INTERRUPTED else int(status != 0)


def _print_table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    """A table for the terminal, or 150 columns wide in a file."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*map(escape, heads), box=box.SIMPLE_HEAD)
    for line in lines:
        table.add_row(*map(escape, line))
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def _show(found: dict[str, Any], path: Path, plots: bool) -> None:
    """Print a result's tables, write them as CSV, and draw its plots beside its file."""
    from . import report, results

    print(report.about(found))
    for table in report.tables(found):
        _print_table(*table)
    print(*report.notes(found), f"{path} and .csv", sep="\n")
    results.write_table(found, path)
    if plots:
        from .plots import draw

        print(*draw(found, path.parent, path.stem), sep="\n")


def _report(given: argparse.Namespace) -> int:
    from . import results

    if not given.files:
        raise CommandError("report: expected result files, e.g. benchmarks/results/cpu.json")
    # All is read before anything is written.
    every = {path: results.read(path) for path in given.files}
    readme = None if given.readme is None else _with_tables(given.readme, every)
    for path, found in every.items():
        _show(found, path, plots=not given.no_plots)
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
    from .codegen import COLUMNS, static_table

    rows = [[cell.format(**row) for cell in COLUMNS.values()] for row in static_table()]
    _print_table(list(COLUMNS), rows)
    return 0


def _interpreted(given: argparse.Namespace) -> int:
    """A dry run in a process that interprets Triton, which decides at import."""
    arguments = [*_suite_arguments(given), f"--out={given.out}", f"--name={_name(given)}"]
    if given.no_plots:
        arguments.append("--no-plots")
    code = f"import sys; from {__package__}.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    return subprocess.run([sys.executable, "-c", code, *arguments], env=environment).returncode


def main(arguments: list[str] | argparse.Namespace | None = None) -> int:
    """Run the command; 1 if our own numbers are wrong, 2 for wrong usage, else 0."""
    if isinstance(arguments, argparse.Namespace):
        given = arguments
    else:
        parser = argparse.ArgumentParser(prog="mapo-kernels bench", description=__doc__)
        add_arguments(parser)
        given = parser.parse_args(arguments)
    if given.dry_run and given.action == "run" and os.environ.get("TRITON_INTERPRET") != "1":
        return _interpreted(given)
    try:
        return {"run": _run, "report": _report, "codegen": _codegen}[given.action](given)
    except CommandError as error:
        print(f"mapo-kernels bench: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
