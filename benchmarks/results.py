"""Result files: one JSON with every sample, one CSV with the medians, and what JSON must hold."""

from __future__ import annotations

import csv
import io
import json
import time
from pathlib import Path
from typing import Any

from mapo_kernels.files import PARTIAL, CommandError, naming, read_json, write_whole

from .cases import SUITES

FORMAT = 1
TEXT, NUMBER, WHOLE = {"type": "string"}, {"type": "number"}, {"type": "integer"}
SOME_TEXT, SOME_NUMBER = {"type": ["string", "null"]}, {"type": ["number", "null"]}
SAMPLES = {"type": "array", "items": NUMBER, "minItems": 1}
# What every row has.
OF_CASE: dict[str, Any] = {
    **dict.fromkeys(("level", "shape", "provider", "sweep"), TEXT),
    "direction": {"enum": ["score", "forward", "backward", "both"]},
    "status": {"enum": ["ok", "wrong", "failed", "unavailable"]},
    **dict.fromkeys(("tokens", "group_size"), WHOLE),
    **dict.fromkeys(("padding", "no_signal"), NUMBER),
    "live": NUMBER | {"minimum": 0, "maximum": 1},
}
# What a row has that was measured.
OF_TIME: dict[str, Any] = {
    **dict.fromkeys(("error", "median_ms", "p20_ms", "p80_ms"), NUMBER),
    **dict.fromkeys(("gigabytes_per_second", "teraflops_per_second", "percent_of_roof"), NUMBER),
    "roof": {"enum": ["copy", "launch", "products"]},
    "peak_bytes": SOME_NUMBER,
}
# What it may have; `host_ms` is of earlier files.
OPTIONAL: dict[str, Any] = {
    **dict.fromkeys(("reason", "dtype", "head", "timer"), SOME_TEXT),
    **dict.fromkeys(("width", "vocab", "launched_ms", "host_ms"), SOME_NUMBER),
    **dict.fromkeys(("bytes", "flops", "floor_ms"), SOME_NUMBER),
}
COLUMNS = [*OF_CASE, *OPTIONAL, *OF_TIME]
ROW: dict[str, Any] = {
    "type": "object",
    "required": list(OF_CASE),
    "additionalProperties": False,
    "properties": {
        **OF_CASE,
        **OPTIONAL,
        **dict.fromkeys(OF_TIME, {"type": ["number", "string", "null"]}),
        "samples_ms": SAMPLES,
    },
    "if": {"properties": {"status": {"const": "ok"}}},
    "then": {"required": [*OF_TIME, "samples_ms"], "properties": OF_TIME},
    "else": {"required": ["reason"], "properties": {"reason": TEXT, "error": SOME_NUMBER}},
}


def _object(**required: Any) -> dict[str, Any]:
    """The schema of an object with these properties, all of them required, among others."""
    return {"type": "object", "required": list(required), "properties": required}


ABOUT: dict[str, Any] = {
    "format": {"const": FORMAT},
    "dry_run": {"type": "boolean"},
    "seconds": NUMBER,
    "environment": _object(
        device=TEXT,
        threads=WHOLE,
        commit=SOME_TEXT,
        dirty={"type": ["boolean", "null"]},
        backend=TEXT,
        versions=_object(torch=TEXT, triton=TEXT),
    ),
}
SCHEMA = _object(
    **ABOUT,
    suite={"enum": list(SUITES)},
    roofs=_object(
        copy_gigabytes_per_second=NUMBER,
        launch_microseconds=NUMBER,
        products_teraflops_per_second={"type": "object", "additionalProperties": NUMBER},
    ),
    parity={"type": ["object", "null"], "required": ["passed", "summary"]},
    rows={"type": "array", "items": ROW},
)
HOST_ROW = _object(level=TEXT, provider=TEXT, status={"enum": ["ok", "failed", "unavailable"]}) | {
    "if": {"properties": {"status": {"const": "ok"}}},
    "then": _object(launches=WHOLE, median_us=NUMBER, samples_us=SAMPLES),
    "else": _object(reason=TEXT),
}
OF_SPECIAL = {  # the columns of their tables
    "host": ["level", "provider", "status", "reason", "launches", "median_us"],
    "startup": ["level", "provider", "status", "reason", "median_ms"],
}
# Of `bench host`.
HOST = _object(**ABOUT, suite={"const": "host"}, rows={"type": "array", "items": HOST_ROW})
# Of `bench startup`.
STARTUP_ROW = _object(level=TEXT, provider=TEXT, status={"enum": ["ok", "failed"]}) | {
    "if": {"properties": {"status": {"const": "ok"}}},
    "then": _object(median_ms=NUMBER, samples_ms=SAMPLES),
    "else": _object(reason=TEXT),
}
STARTUP = _object(**ABOUT, suite={"const": "startup"}, rows={"type": "array", "items": STARTUP_ROW})
for schema in (SCHEMA, HOST, STARTUP):
    # Whether no row is missing is not in earlier files.
    schema["properties"] |= {"notes": SOME_TEXT, "finished": {"type": "boolean"}}
EITHER: dict[str, Any] = SCHEMA
for special in (HOST, STARTUP):
    EITHER = {"if": _object(suite=special["properties"]["suite"]), "then": special, "else": EITHER}


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
    """Write the CSV beside a result's JSON; raises CommandError."""
    table = io.StringIO(newline="")
    columns = OF_SPECIAL.get(found["suite"], COLUMNS)
    writer = csv.DictWriter(table, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(found["rows"])
    write_whole(path.with_suffix(".csv"), table.getvalue().encode())


def read(path: Path) -> dict[str, Any]:
    """A result file's contents; CommandError where it is none of ours."""
    return read_json(path, EITHER, f"a result file of `mapo-kernels bench` in format {FORMAT}")
