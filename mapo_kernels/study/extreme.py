"""`study extreme`: rollouts that nearly always fail, or nearly always succeed.

The numbers come from `rare_outcomes`.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

from mapo_kernels.files import CommandError, require

FORMAT = "mapo-kernels study extreme 1"
NAME = "extreme.json"
PARTS = ("signal", "first", "reductions", "options", "shaped")
SCHEMA = {
    "type": "object",
    "required": ["format", "settings", *PARTS, "seconds", "environment"],
    "properties": {
        "format": {"const": FORMAT},
        "settings": {"type": "object", "required": ["group_sizes", "steps", "groups", "seed"]},
        **{name: {"type": "array", "minItems": 1, "items": {"type": "object"}} for name in PARTS},
        "seconds": {"type": "number"},
        "environment": {"type": "object"},
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to a parser."""
    add = parser.add_argument
    add("--group-sizes", type=int, nargs="+", default=[16, 64, 256], help="answers per prompt")
    add("--steps", type=int, default=200, help="simulated steps for each success probability")
    add("--groups", type=int, default=8, help="groups per step")
    add("--seed", type=int, default=0, help="of the simulation")
    add("--out", type=Path, default=Path("study_out"), help="output folder")


def main(args: argparse.Namespace) -> int:
    """Simulate, print the tables, and write the numbers and their plots.

    Returns:
        The exit code: 1 if an advantage of the first success differs from its closed form.

    Raises:
        CommandError: a number that is too small, or a folder that cannot be written to.
    """
    require("demo", "matplotlib", "rich", "jsonschema")
    from mapo_kernels.demo.report import console
    from mapo_kernels.study import extreme_figures, extreme_findings, rare_outcomes
    from mapo_kernels.study.figures import write_all
    from mapo_kernels.study.results import environment, write

    sizes = sorted(set(args.group_sizes))
    for name, value, least in (
        ("--group-sizes", sizes[0], 4),
        ("--steps", args.steps, 1),
        ("--groups", args.groups, 1),
    ):
        if value < least:
            raise CommandError(f"{name}: expected at least {least}, got {value}")
    began = time.perf_counter()
    with warnings.catch_warnings():
        # Groups without a success are what this is about.
        warnings.filterwarnings("ignore", "success_threshold: no reward")
        found: dict[str, Any] = {
            "format": FORMAT,
            "settings": {
                "group_sizes": sizes,
                "steps": args.steps,
                "groups": args.groups,
                "seed": args.seed,
            },
            "signal": list(rare_outcomes.signal(sizes, args.steps, args.groups, args.seed)),
            "first": list(rare_outcomes.first_success(sizes)),
            "reductions": list(rare_outcomes.reductions(sizes[0])),
            "options": list(rare_outcomes.options(sizes)),
            "shaped": list(rare_outcomes.shaped_rewards(sizes[0])),
        }
    found |= {"seconds": time.perf_counter() - began, "environment": environment()}
    write(args.out, NAME, found)
    drawn = write_all(extreme_figures.draw(found), args.out)
    show = console().print
    for table in extreme_findings.tables(found):
        show(table.rich())
    for line in extreme_findings.sentences(found):
        show(line)
    show(f"In {args.out}: {', '.join([NAME, *(path.name for path in drawn)])}")
    return int(not extreme_findings.is_right(found))
