"""Result files of the study: what a number depends on, and how the files are written and read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mapo_kernels.files import CommandError, check, naming, one_line, read_whole, write_whole

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


def append_line(path: Path, record: Found) -> None:
    """Add a record as a line of JSON, flushed to disk.

    Raises:
        CommandError: the file cannot be written to.
    """
    with naming(path), path.open("ab") as file:
        file.write((json.dumps(record, separators=(",", ":")) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path, schema: Found) -> list[Found]:
    """The records of a file with one a line; a last line that was cut off is left out.

    Raises:
        CommandError: the file cannot be read, or a line of it is no record.
    """
    records = []
    for number, line in enumerate(read_whole(path).split(b"\n")[:-1], start=1):
        try:
            records.append(json.loads(line))
            check(records[-1], schema)
        except (ValueError, RecursionError) as error:
            reason = one_line(error)
            raise CommandError(f"{path}: line {number} is no record: {reason}") from error
    return records


def drop_cut_off_line(path: Path) -> None:
    """End a file of such lines with a whole one, so that another can be added."""
    whole, _, cut_off = read_whole(path).rpartition(b"\n")
    if cut_off:
        write_whole(path, whole + b"\n" if whole else b"")
