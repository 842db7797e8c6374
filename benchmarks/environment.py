"""What a number depends on; and nothing about whose machine it was."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import mapo_kernels
from mapo_kernels.doctor import versions

GPU_STATE = ("driver_version", "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


def output_of(command: Sequence[str]) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def gpu_state() -> dict[str, str] | None:
    """Driver, clocks, power and temperature now, as nvidia-smi says, or None without it."""
    if not torch.cuda.is_available():
        return None
    query = ["nvidia-smi", f"--query-gpu={','.join(GPU_STATE)}", "--format=csv,noheader"]
    found = output_of([*query, f"--id={torch.cuda.current_device()}"])
    if not found:
        return None
    return dict(zip(GPU_STATE, (x.strip() for x in found.splitlines()[0].split(",")), strict=False))


def describe(commit: str | None = None) -> dict[str, Any]:
    """Versions, device, backend and commit; `commit` stands in where git knows none."""
    cuda = torch.cuda.is_available()
    known = output_of(["git", "rev-parse", "HEAD"])
    dirty = output_of(["git", "status", "--porcelain"])
    return {
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "multiprocessors": (
            torch.cuda.get_device_properties(0).multi_processor_count if cuda else None
        ),
        "commit": known or commit,
        "dirty": bool(dirty) if known else None,
        "backend": mapo_kernels.describe_backend(),
        "versions": versions(),
        "gpu_state": gpu_state(),
    }
