"""Command line: `mapo-kernels demo`, `study`, `bench` and `doctor`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from mapo_kernels._version import __version__
from mapo_kernels.files import CommandError

COMMANDS = {
    "demo": "train a small model with MAPO and GRPO",
    "study": "experiments on what MAPO's paper leaves open",
    "doctor": "versions, backend, and a check of its numbers",
    "bench": "time every level against its peers and limits",
}


def _module(command: str) -> Any:
    if command != "bench":
        return import_module(f"mapo_kernels.{command}")
    # Installed with the package, or beside it in a checkout.
    installed = find_spec("mapo_kernels.bench") is not None
    return import_module("mapo_kernels.bench.cli" if installed else "benchmarks.cli")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="mapo-kernels", description="MAPO in fused kernels", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    named = given[0] if given else None
    try:
        for name, summary in COMMANDS.items():
            command = commands.add_parser(
                name, help=summary, description=summary, allow_abbrev=False
            )
            # Only the command that was named is imported; doctor has no options.
            if name == named != "doctor":
                _module(name).add_arguments(command)
        if named == "bench":
            given = ["bench", *_module("bench").completed(given[1:])]
        args = parser.parse_args(given)
        return _module(args.command).main(args)
    except CommandError as error:
        print(f"mapo-kernels {named}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
