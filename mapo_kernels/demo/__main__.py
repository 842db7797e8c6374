"""`python -m mapo_kernels.demo`."""

from __future__ import annotations

import argparse
import sys

from mapo_kernels.demo import add_arguments, main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="mapo-kernels demo", description="Train MAPO and GRPO.")
    add_arguments(parser)
    sys.exit(main(parser.parse_args()))
