"""The demo's output folder: whose it is, and one experiment at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mapo_kernels import files
from mapo_kernels.demo.settings import FORMAT, Record
from mapo_kernels.files import CommandError, naming

LOG_NAME = "log.json"
LOG_SCHEMA = {
    "type": "object",
    "required": ["format", "configuration", "runs"],
    "properties": {
        "format": {"const": FORMAT},
        "configuration": {"type": "object"},
        # Each name is that of a file, too.
        "runs": {"type": "object", "propertyNames": {"pattern": "^[a-z-]+_seed[0-9]+$"}},
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
    ignored = {files.LOCK_NAME, LOG_NAME + files.PARTIAL}
    with naming(path):
        names = {entry.name for entry in path.iterdir()} - ignored
    if needed or LOG_NAME in names:
        what = "the log of a demo (or choose another --out)"
        return files.read_json(path / LOG_NAME, LOG_SCHEMA, what)
    if names:
        expected = f"{path}: expected an empty folder or one of the demo's own"
        raise CommandError(f"{expected}, got one with {min(names)!r} and no {LOG_NAME}")
    return {"runs": {}}


def write_log(path: Path, log: Record) -> None:
    """Write the log, whole or not at all."""
    files.write_whole(path / LOG_NAME, (json.dumps(log) + "\n").encode())
