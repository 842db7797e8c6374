"""Runs a suite under pytest: `pytest benchmarks`, which `mapo-kernels bench` calls."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mapo_kernels.files import CommandError

from . import environment
from .cli import add_suite_arguments
from .harness import Run

ROOT = Path(__file__).parents[1]
RUN: Any = pytest.StashKey()


def pytest_addoption(parser):
    group = parser.getgroup("mapo_kernels", "benchmarks of mapo_kernels")
    add_suite_arguments(group.addoption)
    group.addoption("--result", type=Path, help="JSON file, written after each measurement")


def pytest_configure(config):
    option = config.option
    config.stash[RUN] = Run(option.suite, option.level, option.dry_run)


def pytest_generate_tests(metafunc):
    items = metafunc.config.stash[RUN].items
    names = [f"{case.level}, {case.shape}: {name}, {way}" for case, name, way in items]
    metafunc.parametrize(("case", "name", "direction"), items, ids=names)


@pytest.fixture(scope="session")
def run(request):
    option, run = request.config.option, request.config.stash[RUN]
    parity = None
    if run.suite == "gpu" and run.device.type == "cuda":
        terminal = request.config.pluginmanager.get_plugin("terminalreporter")
        terminal.write_line("parity tests on the device")
        parity = device_parity()
    try:
        run.start(option.result, option.commit, notes=option.notes, parity=parity)
    except CommandError as error:  # Nothing that follows could be kept.
        pytest.exit(str(error), returncode=1)
    return run


def device_parity() -> dict[str, Any] | None:
    """Run the GPU's parity tests; None where the tests are not beside this package."""
    if not (ROOT / "tests/conftest.py").exists():
        return None
    began = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "tests"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()]
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {
        "passed": done.returncode == 0,
        "summary": lines[-1],
        "failures": failures[:50],
        "seconds": time.perf_counter() - began,
    }


def pytest_benchmark_update_machine_info(config, machine_info):
    """What a number depends on; and nothing about whose machine it was."""
    machine_info.clear()
    machine_info.update(environment.describe())


def pytest_benchmark_update_commit_info(config, commit_info):
    commit_info.pop("project", None)
    commit_info.pop("branch", None)
