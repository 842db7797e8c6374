"""Result files: one JSON with every sample, and one CSV with the medians."""

from __future__ import annotations

import csv
import io
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mapo_kernels.files import PARTIAL, CommandError, naming, one_line, read_whole, write_whole

from . import environment, report
from .report import Row

FORMAT = 1


def attempt(measure: Callable[[], Row]) -> Row:
    """What is measured or, where that fails, why: a finding about what was called."""
    try:
        return measure()
    except Exception as error:
        return {"status": "failed", "reason": f"{type(error).__name__}: {one_line(error)}"}


def timed(unit: str, samples: list[float]) -> Row:
    """What a row says of its samples."""
    median = statistics.median(samples)
    return {"status": "ok", f"median_{unit}": median, f"samples_{unit}": samples}


def reserve(folder: Path, name: str) -> Path:
    """FOLDER/NAME.json, which can be written: a CommandError comes before a run of minutes.

    A file of something else is not overwritten.
    """
    path = folder / f"{name}.json"
    table = path.with_suffix(".csv")
    if path.parent != folder:
        raise CommandError(f"--name: expected the name of a file, without folders, got {name!r}")
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            read(path)
        elif table.exists():
            raise CommandError(f"{table}: expected a table beside its {path.name}, got one alone")
    probe = path.with_name(path.name + PARTIAL)
    with naming(path):
        probe.unlink(missing_ok=True)
        probe.open("xb").close()
        probe.unlink()
    return path


def write(found: dict[str, Any], path: Path) -> None:
    """Write a result's JSON, whole or not at all; raises CommandError."""
    write_whole(path, (json.dumps(found, indent=1) + "\n").encode())


class About(NamedTuple):
    """What a result says of its run; `commit` is of code without git history, `notes` free text."""

    suite: str
    dry_run: bool = False
    commit: str | None = None
    notes: str | None = None


class Growing:
    """A result file that is written anew with each of its rows; `found` is what it holds."""

    def __init__(self, path: Path, about: About, n_rows: int, **more: Any) -> None:
        """Write it without rows, with `more` about it; of `n_rows` it is finished."""
        self.path, self.n_rows, self.began = path, n_rows, time.perf_counter()
        self.found = {"format": FORMAT, **about._asdict(), **more, "rows": []}
        self.found["environment"] = environment.describe(self.found.pop("commit"))
        self.add()

    def add(self, *rows: Row) -> None:
        """Write it with more rows; raises CommandError."""
        self.found["rows"] += rows
        self.found["finished"] = len(self.found["rows"]) == self.n_rows
        self.found["seconds"] = time.perf_counter() - self.began
        write(self.found, self.path)


def write_table(found: dict[str, Any], path: Path) -> None:
    """Write the CSV beside a result's JSON, without the samples; raises CommandError."""
    columns = dict.fromkeys(name for row in found["rows"] for name in row if "samples" not in name)
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(columns), extrasaction="ignore")
    writer.writeheader()
    writer.writerows(found["rows"])
    write_whole(path.with_suffix(".csv"), table.getvalue().encode())


@contextmanager
def of_whole_file(path: Path) -> Iterator[None]:
    """Turns the errors of showing a damaged result file, or something else, into a CommandError."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        expected = f"{path}: expected a result file of `mapo-kernels bench` in format {FORMAT}"
        reason = one_line(f"{type(error).__name__}: {error}")
        raise CommandError(f"{expected}, got another or a damaged one ({reason})") from error


def read(path: Path) -> dict[str, Any]:
    """A result file's contents; CommandError where its tables cannot be made."""
    content = read_whole(path)
    with of_whole_file(path):
        found = json.loads(content)
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']!r}")
        report.markdown(found)
    return found
