"""Result files: one JSON with every sample, one CSV with the medians, and what JSON must hold."""

from __future__ import annotations

import csv
import io
import json
import time
from pathlib import Path
from typing import Any

from mapo_kernels.files import PARTIAL, CommandError, naming, read_json, write_whole

from .names import SUITES

FORMAT = 1
Schema = dict[str, Any]
TEXT, NUMBER, WHOLE = {"type": "string"}, {"type": "number"}, {"type": "integer"}
SOME_TEXT, SOME_NUMBER = {"type": ["string", "null"]}, {"type": ["number", "null"]}
SAMPLES = {"type": "array", "items": NUMBER, "minItems": 1}


def _object(optional: Schema | None = None, /, **required: Any) -> Schema:
    """The schema of an object with these properties, among others."""
    properties = required | (optional or {})
    return {"type": "object", "required": list(required), "properties": properties}


def _rows(every: Schema, measured: Schema, optional: Schema | None = None) -> Schema:
    """The schema of rows: what every one has, what more where it is ok, else a reason."""
    status = {"enum": ["ok", "wrong", "failed", "unavailable"]}
    row = _object(optional, level=TEXT, provider=TEXT, status=status, **every)
    row |= {"if": _object(status={"const": "ok"}), "then": _object(**measured)}
    return {"type": "array", "items": row | {"else": _object(reason=TEXT)}}


# What a file has beside, by what is in it: a suite, or what `bench host` and `startup` measure.
OF_HOST = {"rows": _rows({}, {"launches": WHOLE, "median_us": NUMBER, "samples_us": SAMPLES})}
OF_STARTUP = {"rows": _rows({}, {"median_ms": NUMBER, "samples_ms": SAMPLES})}
OF_SUITE = {
    "roofs": _object(
        copy_gigabytes_per_second=NUMBER,
        launch_microseconds=NUMBER,
        products_teraflops_per_second={"type": "object", "additionalProperties": NUMBER},
    ),
    "parity": {"type": ["object", "null"], "required": ["passed", "summary"]},
    "rows": _rows(
        {
            "shape": TEXT,
            "sweep": TEXT,
            # A provider may do backward's work in forward, which earlier files time apart.
            "direction": {"enum": ["score", "forward", "backward", "both"]},
            **dict.fromkeys(("tokens", "group_size"), WHOLE),
            **dict.fromkeys(("padding", "no_signal"), NUMBER),
            "live": NUMBER | {"minimum": 0, "maximum": 1},
        },
        {
            **dict.fromkeys(("error", "median_ms", "p20_ms", "p80_ms", "percent_of_roof"), NUMBER),
            "samples_ms": SAMPLES,
            "roof": {"enum": ["copy", "launch", "products"]},
            "peak_bytes": SOME_NUMBER,
        },
        {"error": SOME_NUMBER, "head": SOME_TEXT, "timer": SOME_TEXT, "launched_ms": SOME_NUMBER},
    ),
}
KINDS = {"host": OF_HOST, "startup": OF_STARTUP, **dict.fromkeys(SUITES, OF_SUITE)}
SCHEMA: Schema = _object(
    {"notes": SOME_TEXT, "finished": {"type": "boolean"}},  # Earlier files do not say.
    format={"const": FORMAT},
    suite={"enum": list(KINDS)},
    dry_run={"type": "boolean"},
    seconds=NUMBER,
    environment=_object(
        device=TEXT,
        threads=WHOLE,
        commit=SOME_TEXT,
        dirty={"type": ["boolean", "null"]},
        backend=TEXT,
        versions=_object(torch=TEXT, triton=TEXT),
    ),
)
SCHEMA["allOf"] = [
    {"if": _object(suite={"const": suite}), "then": _object(**kind)}
    for suite, kind in KINDS.items()
]


def reserve(folder: Path, name: str) -> Path:
    """FOLDER/NAME.json, found out before a run of minutes to be a file that can be written.

    Raises:
        CommandError: the folder cannot be made or written to, or NAME is no name of a file, or that
            of a file of something else.
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


class Growing:
    """A result file that is written anew with each of its rows; `found` is what it holds."""

    def __init__(self, path: Path, about: dict[str, Any], n_rows: int) -> None:
        """Write it without rows; of `n_rows` it is finished."""
        self.path, self.n_rows, self.began = path, n_rows, time.perf_counter()
        self.found = {"format": FORMAT, **about, "rows": []}
        self.add()

    def add(self, *rows: dict[str, Any]) -> None:
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


def read(path: Path) -> dict[str, Any]:
    """A result file's contents; CommandError where it is none of ours."""
    return read_json(path, SCHEMA, f"a result file of `mapo-kernels bench` in format {FORMAT}")
