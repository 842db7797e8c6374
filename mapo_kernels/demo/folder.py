"""The demo's output folder: whose it is, what its files hold, one run at a time."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from mapo_kernels import files
from mapo_kernels.demo.settings import ESTIMATORS, WARM_UP
from mapo_kernels.files import CommandError, naming

Record = dict[str, Any]

FORMAT = "mapo-kernels demo 1"  # in the log and in checkpoints: what tells them from others' files
LOG_NAME = "log.json"
LOCK_NAME = ".lock"
CHECKPOINTS = "checkpoints"
PHASES = [WARM_UP, *ESTIMATORS]
OWN_CHECKPOINT = re.compile(rf"({'|'.join(PHASES)})_seed\d+\.pt({files.PARTIAL})?")


def _object(**properties: Any) -> Record:
    """The JSON schema of an object that must have these."""
    return {"type": "object", "required": list(properties), "properties": properties}


def _list(items: Record) -> Record:
    return {"type": "array", "items": items}


_COUNT: Record = {"type": "integer", "minimum": 0}
_NUMBER: Record = {"type": "number"}
_STEP = {"step": _COUNT, "success": _NUMBER, "groups_without_signal": _COUNT}
# What figures and tables are drawn from.
RECORD_SCHEMA = _object(
    phase={"enum": PHASES},
    seed=_COUNT,
    finished={"type": "boolean"},
    seconds=_NUMBER,
    steps=_list(_object(successes_per_group=_list(_COUNT), **_STEP)),
    evals=_list(_object(step=_COUNT, success_sampled=_NUMBER, success_greedy=_NUMBER)),
)
LOG_SCHEMA = _object(
    format={"const": FORMAT},
    status={"enum": ["running", "interrupted", "finished"]},
    configuration={"type": "object"},
    runs=_list(RECORD_SCHEMA),
)


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
    _earlier_log(path, resume)
    lock = FileLock(path / LOCK_NAME, blocking=False)
    with naming(path / LOCK_NAME):
        try:
            lock.acquire()
        except Timeout as error:
            raise CommandError(f"{path}: another run is using it") from error
    try:
        yield _earlier_log(path, resume)  # once more: another run may have ended since
    finally:
        lock.release()


def _earlier_log(path: Path, needed: bool) -> Record | None:
    """The log of the run that a folder is of; None where the folder is empty."""
    log, checkpoints = path / LOG_NAME, path / CHECKPOINTS
    with naming(path):
        names = {entry.name for entry in path.iterdir()}
    if LOG_NAME in names:
        found = files.read_json(log, LOG_SCHEMA, "the log of a demo (or choose another --out)")
        if checkpoints.is_symlink() or (checkpoints.exists() and not checkpoints.is_dir()):
            raise CommandError(f"{checkpoints}: expected a folder, got something else")
        return found
    foreign = sorted(names - {LOCK_NAME, LOG_NAME + files.PARTIAL})
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
    for entry in path.glob(f"{CHECKPOINTS}/*"):
        if OWN_CHECKPOINT.fullmatch(entry.name):
            with naming(entry):
                entry.unlink()


def model_path(out: Path, phase: str, seed: int) -> Path:
    """Where the weights of a run go."""
    return out / f"{phase}_seed{seed}.pt"


def checkpoint_path(out: Path, phase: str, seed: int) -> Path:
    """Where what a run continues from goes."""
    return model_path(out / CHECKPOINTS, phase, seed)


def save(path: Path, state: Record) -> None:
    """`torch.save`, whole or not at all; the folder is made."""
    with naming(path.parent):
        path.parent.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    files.write_whole(path, buffer.getvalue())


def load(path: Path, restore: Callable[[Record], None]) -> None:
    """Pass what `save` wrote to `restore`.

    Raises:
        CommandError: the file is damaged, or `restore` fails.
    """
    content = files.read_whole(path)
    try:
        damaged = zipfile.ZipFile(io.BytesIO(content)).testzip()
        if damaged is not None:  # torch does not compare checksums
            raise ValueError(f"one with a damaged {damaged}")
        restore(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    except Exception as error:  # A file may hold anything, and fail in any way.
        raise CommandError(
            f"{path}: expected a checkpoint of this demo, got {files.one_line(error)}"
        ) from error
