"""Command line: `mapo-kernels demo`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code."""
    # Importing torch takes a second, in which Ctrl-C should work too.
    try:
        from mapo_kernels import __version__, demo, describe_backend

        parser = argparse.ArgumentParser(prog="mapo-kernels", description="MAPO in fused kernels")
        version = f"mapo-kernels {__version__}, backend {describe_backend()}"
        parser.add_argument("--version", action="version", version=version)
        commands = parser.add_subparsers(dest="command", required=True)
        demo.add_arguments(
            commands.add_parser("demo", help="train a small model with MAPO and GRPO")
        )
        return demo.main(parser.parse_args(arguments))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
