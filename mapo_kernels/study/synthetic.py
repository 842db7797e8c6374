"""`study synthetic`: advantages of groups that are known in closed form, beside what they must be.

The numbers come from `known_groups`, the closed forms from `analytic`.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

from mapo_kernels.files import CommandError, require

FORMAT = "mapo-kernels study synthetic 1"
NAME = "synthetic.json"
SCHEMA = {
    "type": "object",
    "required": ["format", "settings", "rows", "seconds", "environment"],
    "properties": {
        "format": {"const": FORMAT},
        "settings": {"type": "object", "required": ["group_sizes"]},
        "rows": {"type": "array", "minItems": 1, "items": {"type": "object"}},
        "seconds": {"type": "number"},
        "environment": {"type": "object"},
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to a parser."""
    sizes = "answers per prompt"
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[8, 12, 16], help=sizes)
    parser.add_argument("--out", type=Path, default=Path("study_out"), help="output folder")


def main(args: argparse.Namespace) -> int:
    """Compare, print the tables, and write the numbers and their plots.

    Returns:
        The exit code: 1 if a number differs from its analytic value.

    Raises:
        CommandError: a group size below 2, or a folder that cannot be written to.
    """
    require("demo", "matplotlib", "rich", "jsonschema")
    from mapo_kernels.demo.report import console
    from mapo_kernels.study import figures, findings, known_groups
    from mapo_kernels.study.results import environment, write

    if min(args.group_sizes) < 2:
        raise CommandError(f"--group-sizes: expected at least 2, got {min(args.group_sizes)}")
    began = time.perf_counter()
    with warnings.catch_warnings():
        # Some of the groups are meant to have no success.
        warnings.filterwarnings("ignore", "success_threshold: no reward")
        rows = known_groups.rows(sorted(set(args.group_sizes)))
    found: dict[str, Any] = {
        "format": FORMAT,
        "settings": {"group_sizes": sorted(set(args.group_sizes))},
        "rows": rows,
        "seconds": time.perf_counter() - began,
        "environment": environment(),
    }
    write(args.out, NAME, found)
    drawn = figures.write_all(figures.of_synthetic(found), args.out)
    show = console().print
    for table in findings.synthetic_tables(found):
        show(table.rich())
    for line in findings.synthetic(found):
        show(line)
    show(f"In {args.out}: {', '.join([NAME, *(path.name for path in drawn)])}")
    return int(not all(row["ok"] for row in rows))
