"""Command line: `mapo-kernels demo`, `mapo-kernels bench` and `mapo-kernels doctor`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

COMMANDS = {
    "demo": "train a small model with MAPO and GRPO",
    "doctor": "versions, backend, and a check of its numbers",
    "bench": "time every level against its peers and limits",
}


def _module(command: str) -> Any:
    if command != "bench":
        return import_module(f"mapo_kernels.{command}")
    # Installed with the package, or beside it in a checkout.
    try:
        return import_module("mapo_kernels.bench.cli")
    except ModuleNotFoundError:
        return import_module("benchmarks.cli")


class _PrintVersion(argparse.Action):
    """Prints the version and the backend, which is looked up when asked for and not before."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from mapo_kernels import __version__, describe_backend

        print(f"mapo-kernels {__version__}, backend {describe_backend()}")
        parser.exit()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code."""
    # Importing torch takes a second, in which Ctrl-C should work too.
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        parser = argparse.ArgumentParser(prog="mapo-kernels", description="MAPO in fused kernels")
        shown = "show the version and the backend, and exit"
        parser.add_argument("--version", action=_PrintVersion, nargs=0, help=shown)
        commands = parser.add_subparsers(dest="command", required=True)
        for name, summary in COMMANDS.items():
            command = commands.add_parser(name, help=summary)
            if name in arguments and name != "doctor":  # others need not be imported
                _module(name).add_arguments(command)
        given = parser.parse_args(arguments)
        return _module(given.command).main(given)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
