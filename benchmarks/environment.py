"""What a number depends on, and nothing about whose machine it was; the device's parity tests."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import mapo_kernels
from mapo_kernels import config
from mapo_kernels.doctor import versions

ROOT = Path(__file__).parents[1]
GPU_STATE = "driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu"


def output_of(*command: str) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def gpu_state() -> str | None:
    """Driver, clocks, power and temperature now, as nvidia-smi says, or None without it."""
    if not torch.cuda.is_available():
        return None
    device = f"--id={torch.cuda.current_device()}"
    return output_of("nvidia-smi", f"--query-gpu={GPU_STATE}", "--format=csv", device)


def device_name() -> str:
    has_gpu = torch.cuda.is_available()
    return torch.cuda.get_device_name() if has_gpu else f"{platform.machine()} CPU"


def describe(commit: str | None = None) -> dict[str, Any]:
    """Versions, device, backend and commit; `commit` stands in where git knows none."""
    known = output_of("git", "rev-parse", "HEAD")
    return {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "commit": known or commit,
        "dirty": bool(output_of("git", "status", "--porcelain")) if known else None,
        "backend": mapo_kernels.describe_backend(),
        "tuning": config.changed(),
        "versions": versions(),
        "gpu_state": gpu_state(),
    }


def passes_parity() -> bool | None:
    """Whether the GPU's parity tests pass; None where the tests are not beside this package."""
    if not (ROOT / "tests/conftest.py").exists():
        return None
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "tests"]
    command += ["-n", "8"] if importlib.util.find_spec("xdist") else []
    return subprocess.run(command, cwd=ROOT).returncode == 0
