"""The open questions of MAPO's paper, answered by experiments: `mapo-kernels study`.

A subcommand is a module here with `add_arguments(parser)` and `main(args)`, which returns the exit
code. It imports torch and the packages of the `demo` extra in `main` only, so that `--help` is
quick.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any

__all__ = ["add_arguments", "main"]

# Module and what it does.
COMMANDS: dict[str, str] = {
    "ablation": "train every estimator from the same starts, several seeds each",
    "synthetic": "advantages of groups that are known in closed form, beside what they must be",
    "extreme": "rollouts that nearly always fail or succeed: signal, first success, options",
    "report": "a page of what the results say, as HTML and Markdown",
}


def _module(name: str) -> Any:
    return import_module(f"mapo_kernels.study.{name}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands and their options to a parser."""
    commands = parser.add_subparsers(dest="study", required=True)
    for name, summary in COMMANDS.items():
        shown = argparse.ArgumentDefaultsHelpFormatter
        _module(name).add_arguments(
            commands.add_parser(
                name,
                help=summary,
                description=summary,
                formatter_class=shown,
                allow_abbrev=False,
            )
        )


def main(args: argparse.Namespace) -> int:
    """Run the subcommand that was named; returns its exit code."""
    return _module(args.study).main(args)
