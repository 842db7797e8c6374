"""Result files: one JSON with every sample, one CSV with the medians, and what JSON must hold."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

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
MEASURED = ("error", "median_ms", "p20_ms", "p80_ms", "samples_ms", "roof", "percent_of_roof")
SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "required": ["format", "suite", "dry_run", "environment", "roofs", "seconds", "rows"],
    "properties": {
        "format": {"const": FORMAT},
        "suite": {"enum": ["quick", "gpu", "full"]},
        "dry_run": {"type": "boolean"},
        "notes": _TEXT,
        "seconds": {"type": "number"},
        "environment": {
            "type": "object",
            "required": ["device", "threads", "commit", "dirty", "backend", "versions"],
        },
        "roofs": {
            "type": "object",
            "required": ["copy_gigabytes_per_second", "launch_microseconds"],
        },
        "parity": {"type": ["object", "null"], "required": ["passed", "summary"]},
        "rows": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["level", "shape", "direction", "provider", "status", "tokens", "live"],
                "additionalProperties": False,
                "properties": {
                    **ROW_COLUMNS,
                    "samples_ms": {"type": "array", "items": {"type": "number"}, "minItems": 1},
                },
                "if": {"properties": {"status": {"const": "ok"}}},
                "then": {"required": list(MEASURED)},
                "else": {"required": ["reason"]},
            },
        },
    },
}


def write(results: dict[str, Any], folder: Path, name: str) -> Path:
    """Write NAME.json and NAME.csv; returns the JSON's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(ROW_COLUMNS), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(results["rows"])
    return path


def read(path: Path) -> dict[str, Any]:
    """A result file's contents; ValueError where it is none of ours."""
    results = json.loads(path.read_text())
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        raise ValueError(
            f"{path}: expected a result file of `mapo-kernels bench` in format {FORMAT}"
        )
    return results
