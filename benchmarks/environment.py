"""What a number depends on; and nothing about whose machine it was."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import mapo_kernels
from mapo_kernels.doctor import versions

GPU_STATE = ("driver_version", "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


def output_of(*command: str) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    folder = Path(__file__).parent
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=folder)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def gpu_state() -> dict[str, str] | None:
    """Driver, clocks, power and temperature now, as nvidia-smi says, or None without it."""
    if not torch.cuda.is_available():
        return None
    query = f"--query-gpu={','.join(GPU_STATE)}"
    device = f"--id={torch.cuda.current_device()}"
    found = output_of("nvidia-smi", query, "--format=csv,noheader", device)
    return dict(zip(GPU_STATE, found.split(", "), strict=False)) if found else None


def device_name() -> str:
    return (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    )


def describe(commit: str | None = None) -> dict[str, Any]:
    """Versions, device, backend and commit; `commit` stands in where git knows none."""
    known = output_of("git", "rev-parse", "HEAD")
    processors = None
    if torch.cuda.is_available():
        processors = torch.cuda.get_device_properties(0).multi_processor_count
    return {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "multiprocessors": processors,
        "commit": known or commit,
        "dirty": bool(output_of("git", "status", "--porcelain")) if known else None,
        "backend": mapo_kernels.describe_backend(),
        "versions": versions(),
        "gpu_state": gpu_state(),
    }
