"""`mapo-kernels bench startup`: what a process waits for before this package does its work.

Each row is a command in a process of its own, by the wall clock. Rows take turns, so that what else
runs on the machine meets all of them alike; measure where nothing else does.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mapo_kernels.__main__ import COMMANDS
from mapo_kernels.files import one_line

from . import environment, results
from .environment import ROOT
from .providers import OURS

REPEATS = 15
USE = "import torch, mapo_kernels; mapo_kernels.group_advantages(torch.rand(4), group_size=2)"
PYTHON = "python"
# Rows: whose, what it is, and the arguments of Python.
STATEMENTS = [
    (PYTHON, "nothing", ["-c", "pass"]),
    ("torch", "import torch", ["-c", "import torch"]),
    (OURS, "import mapo_kernels", ["-c", "import mapo_kernels"]),
    (OURS, "import torch, group_advantages", ["-c", USE]),
]
HELP = [["--version"], ["--help"], *([name, "--help"] for name in COMMANDS)]
Row = dict[str, Any]


def calls() -> list[tuple[str, str, list[str]]]:
    """Whose, what it is, and the arguments of Python, of every row."""
    commands = [(OURS, f"mapo-kernels {' '.join(x)}", ["-m", "mapo_kernels", *x]) for x in HELP]
    return STATEMENTS + commands


def seconds_of(arguments: list[str]) -> float:
    """The wall clock's seconds of a Python with these arguments.

    Raises:
        RuntimeError: it failed; with what it said last.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, *arguments]
    began = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    took = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(one_line((done.stderr.splitlines() or ["nothing was said"])[-1]))
    return took


def measure(path: Path, once: bool, commit: str | None = None, notes: str | None = None) -> None:
    """Time every row; the result at `path` is written at the end.

    Raises:
        CommandError: the result cannot be written.
    """
    began = time.perf_counter()
    rows: list[Row] = [{"provider": p, "level": what, "samples_ms": []} for p, what, _ in calls()]
    # The first round compiles Python's own files, and is not kept.
    for n in range(1 if once else REPEATS + 1):
        for row, (_, _, arguments) in zip(rows, calls(), strict=True):
            if "reason" in row:
                continue
            try:
                sample = seconds_of(arguments) * 1e3
            except RuntimeError as error:
                row["reason"] = str(error)
                continue
            if n or once:
                row["samples_ms"].append(sample)
    for row in rows:
        row["status"] = "failed" if "reason" in row else "ok"
        samples = row["samples_ms"] if row["status"] == "ok" else row.pop("samples_ms")
        row["median_ms"] = statistics.median(samples) if row["status"] == "ok" else None
    result = {"format": results.FORMAT, "suite": "startup", "dry_run": once, "notes": notes}
    result |= {"environment": environment.describe(commit), "rows": rows, "finished": True}
    result["seconds"] = time.perf_counter() - began
    results.write(result, path)
