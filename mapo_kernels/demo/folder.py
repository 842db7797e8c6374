"""The demo's output folder: whose it is, what may be touched in it, one run at a time."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mapo_kernels.demo import ESTIMATORS
from mapo_kernels.demo.runs import CHECKPOINTS, FORMAT, RECORD_SCHEMA, Record
from mapo_kernels.demo.train import WARM_UP
from mapo_kernels.files import PARTIAL, CommandError, naming, read_json

try:
    import fcntl
except ImportError:  # Windows, where two runs in one folder are not told apart
    fcntl = None  # type: ignore[assignment]

LOG_NAME = "log.json"
LOCK_NAME = ".lock"
OWN_CHECKPOINT = re.compile(rf"({'|'.join([WARM_UP, *ESTIMATORS])})_seed\d+\.pt({PARTIAL})?")
_PHASES = {"properties": {"phase": {"enum": [WARM_UP, *ESTIMATORS]}}}
LOG_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["format", "status", "configuration", "runs"],
    "properties": {
        "format": {"const": FORMAT},
        "status": {"enum": ["running", "interrupted", "finished"]},
        "configuration": {"type": "object"},
        "runs": {"type": "array", "items": {"allOf": [RECORD_SCHEMA, _PHASES]}},
    },
}


@contextmanager
def opened(path: Path, *, resume: bool) -> Iterator[Record | None]:
    """Take an output folder for one run; nothing in a folder that is refused is changed.

    Args:
        path: of the folder; made if it does not exist, unless a run is to be resumed.
        resume: whether it must have the log of an earlier run.

    Yields:
        The log of the earlier run, or None if there was none.

    Raises:
        CommandError: it is no folder, cannot be written to, is used by another run, or has files
            but no log of the demo.
    """
    with naming(path):
        if path.exists() and not path.is_dir():
            raise CommandError(f"{path}: expected a folder, got something else")
        if not resume:
            path.mkdir(parents=True, exist_ok=True)
        elif not path.exists():
            raise CommandError(f"{path}: expected a folder with a log to resume from, found none")
    earlier_log(path, resume)
    with _locked(path):
        # Once more: another run may have ended since.
        yield earlier_log(path, resume)


def earlier_log(path: Path, needed: bool = False) -> Record | None:
    """The log of the run that a folder is of; None where the folder is empty.

    Raises:
        CommandError: the folder is not the demo's, or has no log though one is needed.
    """
    log, checkpoints = path / LOG_NAME, path / CHECKPOINTS
    with naming(path):
        names = {entry.name for entry in path.iterdir()}
    if LOG_NAME in names:
        found = read_json(log, LOG_SCHEMA, "the log of a demo (or choose another --out)")
        if checkpoints.is_symlink() or (checkpoints.exists() and not checkpoints.is_dir()):
            raise CommandError(f"{checkpoints}: expected a folder, got something else")
        return found
    foreign = sorted(names - {LOCK_NAME, LOG_NAME + PARTIAL})
    if foreign:
        raise CommandError(
            f"{path}: expected an empty folder or one of the demo's own, got one with "
            f"{foreign[0]!r} and no {LOG_NAME}"
        )
    if needed:
        raise CommandError(f"{log}: expected the log of an earlier run to resume, found none")
    return None


def discard_checkpoints(path: Path) -> None:
    """Delete what earlier runs left to be resumed from, and nothing that is not the demo's own."""
    checkpoints = path / CHECKPOINTS
    with naming(checkpoints):
        entries = list(checkpoints.iterdir()) if checkpoints.exists() else []
    for entry in entries:
        if OWN_CHECKPOINT.fullmatch(entry.name):
            with naming(entry):
                entry.unlink()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the folder's lock; the system frees it when the process ends, however it ends."""
    if fcntl is None:
        yield
        return
    lock = path / LOCK_NAME
    with naming(lock):
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CommandError(f"{path}: another run is using it") from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)
