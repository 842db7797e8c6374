"""Result files: one JSON with every sample, one CSV with the medians, and what JSON must hold."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from mapo_kernels.files import PARTIAL, CommandError, naming, read_json, write_whole

FORMAT = 1
_NUMBER = {"type": ["number", "null"]}
_TEXT = {"type": ["string", "null"]}
ROW_COLUMNS = {
    "level": {"type": "string"},
    "shape": {"type": "string"},
    "direction": {"enum": ["score", "forward", "backward", "both"]},
    "provider": {"type": "string"},
    "sweep": {"type": "string"},
    "status": {"enum": ["ok", "wrong", "failed", "unavailable"]},
    "reason": _TEXT,
    "dtype": {"type": "string"},
    "tokens": {"type": "integer"},
    "group_size": {"type": "integer"},
    "padding": {"type": "number"},
    "no_signal": {"type": "number"},
    "live": {"type": "number", "minimum": 0, "maximum": 1},
    "head": _TEXT,
    "width": _NUMBER,
    "vocab": _NUMBER,
    "error": _NUMBER,
    "median_ms": _NUMBER,
    "p20_ms": _NUMBER,
    "p80_ms": _NUMBER,
    "host_ms": _NUMBER,
    "bytes": _NUMBER,
    "flops": _NUMBER,
    "gigabytes_per_second": _NUMBER,
    "teraflops_per_second": _NUMBER,
    "roof": {"enum": ["copy", "launch", "products", None]},
    "floor_ms": _NUMBER,
    "percent_of_roof": _NUMBER,
    "peak_bytes": _NUMBER,
}
MEASURED: dict[str, Any] = {
    name: {"type": "number"}
    for name in ("error", "median_ms", "p20_ms", "p80_ms", "percent_of_roof")
} | {
    "samples_ms": {"type": "array", "items": {"type": "number"}, "minItems": 1},
    "roof": {"enum": ["copy", "launch", "products"]},
    "gigabytes_per_second": {"type": "number"},
    "teraflops_per_second": {"type": "number"},
    "peak_bytes": _NUMBER,
}
CASE = ["level", "shape", "direction", "provider", "sweep", "status", "tokens", "live"]
CASE += ["group_size", "padding", "no_signal"]
SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "required": ["format", "suite", "dry_run", "environment", "roofs", "parity", "seconds", "rows"],
    "properties": {
        "format": {"const": FORMAT},
        "suite": {"enum": ["quick", "gpu", "full"]},
        "dry_run": {"type": "boolean"},
        "notes": _TEXT,
        "seconds": {"type": "number"},
        "environment": {
            "type": "object",
            "required": ["device", "threads", "commit", "dirty", "backend", "versions"],
            "properties": {
                "device": {"type": "string"},
                "commit": _TEXT,
                "versions": {"type": "object", "required": ["torch", "triton"]},
            },
        },
        "roofs": {
            "type": "object",
            "required": [
                "copy_gigabytes_per_second",
                "launch_microseconds",
                "products_teraflops_per_second",
            ],
            "properties": {
                "copy_gigabytes_per_second": {"type": "number"},
                "launch_microseconds": {"type": "number"},
                "products_teraflops_per_second": {
                    "type": "object",
                    "additionalProperties": {"type": "number"},
                },
            },
        },
        "parity": {"type": ["object", "null"], "required": ["passed", "summary"]},
        "rows": {
            "type": "array",
            "items": {
                "type": "object",
                "required": CASE,
                "additionalProperties": False,
                "properties": {**ROW_COLUMNS, "samples_ms": MEASURED["samples_ms"]},
                "if": {"properties": {"status": {"const": "ok"}}},
                "then": {"required": list(MEASURED), "properties": MEASURED},
                "else": {"required": ["reason"], "properties": {"reason": {"type": "string"}}},
            },
        },
    },
}


def reserve(folder: Path, name: str | None) -> None:
    """Find out before a run of minutes whether its results can be written.

    Raises:
        CommandError: the folder cannot be made or written to, or NAME is no name of a file, or that
            of a file of something else.
    """
    path = folder / f"{name or 'results'}.json"
    table = path.with_suffix(".csv")
    if path.parent != folder:
        raise CommandError(f"--name: expected the name of a file, without folders, got {name!r}")
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if name and path.exists():
            read(path)
        elif name and table.exists():
            raise CommandError(f"{table}: expected a table beside its {path.name}, got one alone")
    probe = path.with_name(path.name + PARTIAL)
    with naming(path):
        probe.unlink(missing_ok=True)
        probe.open("xb").close()
        probe.unlink()


def write(results: dict[str, Any], folder: Path, name: str) -> Path:
    """Write NAME.json and NAME.csv; returns the JSON's path, or raises CommandError."""
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    write_whole(path, (json.dumps(results, indent=1) + "\n").encode())
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(ROW_COLUMNS), extrasaction="ignore")
    writer.writeheader()
    writer.writerows(results["rows"])
    write_whole(path.with_suffix(".csv"), table.getvalue().encode())
    return path


def read(path: Path) -> dict[str, Any]:
    """A result file's contents; CommandError where it is none of ours."""
    return read_json(path, SCHEMA, f"a result file of `mapo-kernels bench` in format {FORMAT}")
