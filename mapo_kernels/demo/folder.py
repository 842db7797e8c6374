"""The demo's output folder: whose it is, what its files hold, one experiment at a time."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mapo_kernels import files
from mapo_kernels.demo.settings import ESTIMATORS, FORMAT, REPLAY, WARM_UP, Record
from mapo_kernels.files import CommandError, naming, one_line, read_json

LOG_NAME = "log.json"
# Of a run and its file.
RUN_NAME = rf"^({WARM_UP}|({'|'.join(ESTIMATORS)})({REPLAY})?)_seed[0-9]+$"
LOG_SCHEMA = {
    "type": "object",
    "required": ["format", "configuration", "runs"],
    "properties": {
        "format": {"const": FORMAT},
        "configuration": {"type": "object"},
        "runs": {"type": "object", "propertyNames": {"pattern": RUN_NAME}},
    },
}


@contextmanager
def opened(path: Path, *, resume: bool) -> Iterator[Record]:
    """Take an output folder for one experiment, a new one if there is none to `resume`.

    Yields the log of the earlier experiment, without runs if there was none. A `CommandError` says
    that the path is no folder, cannot be written to, is used by another process, or has files but
    no log of the demo; nothing in such a folder is changed.
    """
    with naming(path):
        if not (resume or path.exists()):
            path.mkdir(parents=True)
    _earlier_log(path, resume)
    with files.locked(path):
        yield _earlier_log(path, resume)  # once more: another run may have ended since


def _earlier_log(path: Path, needed: bool) -> Record:
    with naming(path):
        names = {entry.name for entry in path.iterdir()} - {
            files.LOCK_NAME,
            LOG_NAME + files.PARTIAL,
        }
    if needed or LOG_NAME in names:
        return read_json(path / LOG_NAME, LOG_SCHEMA, "the log of a demo (or choose another --out)")
    if names:
        raise CommandError(
            f"{path}: expected an empty folder or one of the demo's own, got one with "
            f"{min(names)!r} and no {LOG_NAME}"
        )
    return {"runs": {}}


def write_log(path: Path, log: Record) -> None:
    """Write the log, whole or not at all."""
    files.write_whole(path / LOG_NAME, (json.dumps(log) + "\n").encode())


def run_path(path: Path, name: str) -> Path:
    """Where a run's model, its record and all that it continues from go."""
    return path / f"{name}.pt"


def discard_runs(path: Path, names: Iterable[str]) -> None:
    """Delete the files of these runs, and nothing else."""
    for file in (run_path(path, name) for name in names):
        with naming(file):
            file.unlink(missing_ok=True)


def save(path: Path, state: Record) -> None:
    """`torch.save`, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    files.write_whole(path, buffer.getvalue())


def load(path: Path, restore: Callable[[Record], None]) -> None:
    """Pass what `save` wrote to `restore`; CommandError if it is damaged or `restore` fails."""
    content = files.read_whole(path)
    try:
        damaged = zipfile.ZipFile(io.BytesIO(content)).testzip()
        if damaged is not None:  # torch does not compare checksums
            raise ValueError(f"one with a damaged {damaged}")
        restore(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    except Exception as error:  # A file may hold anything, and fail in any way.
        raise CommandError(f"{path}: expected a run of this demo, got {one_line(error)}") from error
