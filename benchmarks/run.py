"""Runs a suite: parity on the device where asked, roofs, then every provider on every case."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import mapo_kernels

from . import environment
from .case import Case
from .harness import CaseRun, Clock, Effort
from .results import FORMAT
from .roofs import Roofs
from .suites import cases_of
from .vocabulary import ALL

ROOT = Path(__file__).parents[1]
DRY = Effort(0.0, least=1, most=2, warmup=0)


def device_parity() -> dict[str, Any] | None:
    """Run the GPU's parity tests; None where the tests are not beside this package."""
    if not (ROOT / "tests/conftest.py").exists():
        return None
    began = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-n", "8", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()]
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {
        "passed": done.returncode == 0,
        "summary": lines[-1],
        "failures": failures[:50],
        "seconds": time.perf_counter() - began,
    }


def run_cases(
    cases: Iterable[Case],
    effort: Effort,
    clock: Clock,
    roofs: Roofs,
    show: Callable[[Case, str, list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """Every provider of every case, in the suite's order."""
    rows: list[dict[str, Any]] = []
    level = None
    for case in cases:
        if case.level != level:
            # What one level compiled would count against the next one's recompilations.
            torch.compiler.reset()
            level = case.level
        measured = CaseRun(ALL[case.level], case, clock, roofs)
        for name, provider in ALL[case.level].providers.items():
            found = measured.measure(name, provider, effort)
            rows.extend(found)
            show(case, name, found)
        del measured
        if clock.on_gpu:
            torch.cuda.empty_cache()
    return rows


def run_suite(
    suite: str,
    dry_run: bool = False,
    levels: tuple[str, ...] = (),
    commit: str | None = None,
    notes: str | None = None,
    show: Callable[[Case, str, list[dict[str, Any]]], None] = lambda *_: None,
    announce: Callable[[int], None] = lambda n: None,
) -> dict[str, Any]:
    """A suite's results, as result files hold them.

    A dry run walks every case of the suite for a GPU with tiny shapes, its kernels interpreted.
    `announce` hears how many steps there are, `show` of each.
    """
    began = time.perf_counter()
    if dry_run:
        mapo_kernels.set_backend("triton")
        device, tested = torch.device("cpu"), torch.device("cuda")
    else:
        device = tested = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases, effort = cases_of(suite, tested)
    cases = [case for case in cases if not levels or case.level in levels]
    if dry_run:
        cases = list(dict.fromkeys(case.tiny() for case in cases))
        effort = DRY
    announce(sum(len(ALL[case.level].providers) for case in cases))
    parity = device_parity() if suite == "gpu" and device.type == "cuda" else None
    where = environment.describe(commit)
    clock = Clock(device)
    roofs = Roofs(clock, effort, tiny=dry_run)
    rows = run_cases(cases, effort, clock, roofs, show)
    return {
        "format": FORMAT,
        "suite": suite,
        "dry_run": dry_run,
        "notes": notes,
        "seconds": time.perf_counter() - began,
        "environment": where | {"gpu_state_after": environment.gpu_state()},
        "roofs": roofs.as_dict(),
        "parity": parity,
        "rows": rows,
    }
