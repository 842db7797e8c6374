"""`mapo-kernels bench startup`: what a process waits for before this package does its work.

Each row is a command in a process of its own, by the wall clock. Rows take turns, so that what else
runs on the machine meets all of them alike; measure where nothing else does.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from mapo_kernels.__main__ import COMMANDS
from mapo_kernels.files import one_line

from .environment import ROOT
from .providers import OURS
from .report import Row
from .results import About, Growing, timed

REPEATS = 15
USE = "import torch, mapo_kernels; mapo_kernels.group_advantages(torch.rand(4), group_size=2)"
HELP = [["--version"], ["--help"], *([name, "--help"] for name in COMMANDS)]
# Rows: whose, what it is, and the arguments of Python.
CALLS = [
    ("python", "nothing", ["-c", "pass"]),
    ("torch", "import torch", ["-c", "import torch"]),
    (OURS, "import mapo_kernels", ["-c", "import mapo_kernels"]),
    (OURS, "import torch, group_advantages", ["-c", USE]),
    *[(OURS, f"mapo-kernels {' '.join(x)}", ["-m", "mapo_kernels", *x]) for x in HELP],
]


def seconds_of(arguments: list[str]) -> float:
    """The wall clock's seconds of a Python; a RuntimeError with what it said last if it failed."""
    command = [sys.executable, *arguments]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    took = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(one_line((done.stderr.splitlines() or ["nothing was said"])[-1]))
    return took


def measure(path: Path, about: About) -> None:
    """Time every row; the result at `path` has them at the end."""
    file = Growing(path, about, len(CALLS))
    samples: list[list[float]] = [[] for _ in CALLS]
    failed: dict[int, Row] = {}
    # The first round compiles Python's own files, and is not kept.
    for _ in range(1 if about.dry_run else REPEATS + 1):
        for i, (_, _, arguments) in enumerate(CALLS):
            try:
                if i not in failed:
                    samples[i].append(seconds_of(arguments) * 1e3)
            except RuntimeError as error:
                failed[i] = {"status": "failed", "reason": str(error)}
    rows = []
    for i, (provider, what, _) in enumerate(CALLS):
        row = failed.get(i) or timed("ms", samples[i][not about.dry_run :])
        rows.append({"provider": provider, "level": what} | row)
    file.add(*rows)
