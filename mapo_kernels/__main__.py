"""Command line: `mapo-kernels demo` and `mapo-kernels doctor`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code."""
    # Importing torch takes a second, in which Ctrl-C should work too.
    try:
        from mapo_kernels import __version__, demo, describe_backend, doctor

        parser = argparse.ArgumentParser(prog="mapo-kernels", description="MAPO in fused kernels")
        version = f"mapo-kernels {__version__}, backend {describe_backend()}"
        parser.add_argument("--version", action="version", version=version)
        commands = parser.add_subparsers(dest="command", required=True)
        demo.add_arguments(
            commands.add_parser("demo", help="train a small model with MAPO and GRPO")
        )
        commands.add_parser("doctor", help="versions, backend, and a check of its numbers")
        given = parser.parse_args(arguments)
        return {"demo": demo.main, "doctor": doctor.main}[given.command](given)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
