"""Result files of the study: what a number depends on, and how the files are written and read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mapo_kernels.files import naming, write_whole

Found = dict[str, Any]


def environment() -> Found:
    """Commit, versions, device and threads; nothing about whose machine it is."""
    # Installed with the package, or beside it in a checkout.
    try:
        from mapo_kernels.bench.environment import describe
    except ModuleNotFoundError:
        from benchmarks.environment import describe

    return describe()


def write(out: Path, name: str, found: Found) -> None:
    """Write one result file, whole or not at all, into a folder that is made if it is missing.

    Raises:
        CommandError: it cannot be written.
    """
    with naming(out):
        out.mkdir(parents=True, exist_ok=True)
    write_whole(out / name, (json.dumps(found, separators=(",", ":")) + "\n").encode())
