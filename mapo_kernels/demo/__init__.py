"""The demo: MAPO and GRPO trained from one start on a verifiable task, on the device at hand.

Here is its command line, which imports torch and the packages of the `demo` extra after parsing.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from mapo_kernels.demo.settings import ESTIMATORS, Settings
from mapo_kernels.demo.tasks import TASKS
from mapo_kernels.files import CommandError, one_line

if TYPE_CHECKING:
    import torch

__all__ = ["add_arguments", "main"]

EXTRA_MODULES = ("reasoning_gym", "matplotlib", "rich", "jsonschema", "filelock")
# More threads slow a model this small down, and a fixed number makes CPU results repeatable.
MAX_THREADS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options to a parser."""
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    add, default = parser.add_argument, Settings()
    add(
        "--estimator",
        nargs="+",
        choices=ESTIMATORS,
        default=["mapo", "grpo"],
        help="what to train and compare",
    )
    certainties = "quadratic (the paper), linear, entropy, step, or a number in [0, 1]"
    shown = f"lambda(p) of mapo: {certainties}"
    add("--certainty", type=_certainty, default=default.certainty, help=shown)
    tasks = "; ".join(f"{task.name}: {task.description}" for task in TASKS.values())
    add("--task", choices=tuple(TASKS), default=default.task, help=tasks)
    add("--steps", type=int, default=default.steps, help="RL steps")
    add("--seeds", type=int, default=1, help="number of seeds")
    add("--prompts", type=int, default=default.prompts, help="groups per step")
    add("--group-size", type=int, default=default.group_size, help="answers per prompt")
    ends = "sampled success at which the supervised warm-up ends"
    add("--warmup-success", type=float, default=default.warmup_success, help=ends)
    add("--device", default="auto", help="a torch device; auto takes a GPU if there is one")
    folder = "output folder, an empty one or that of an earlier demo"
    add("--out", type=Path, default=Path("demo_out"), help=folder)
    add("--resume", action="store_true", help="continue from the checkpoints in --out")


def main(args: argparse.Namespace) -> int:
    """Run the demo; returns the exit code (0, 2 for wrong usage, 130 after Ctrl-C)."""
    try:
        missing = [name for name in EXTRA_MODULES if importlib.util.find_spec(name) is None]
        if missing:
            names = ", ".join(missing)
            raise CommandError(f"{names} not installed: pip install mapo-kernels[demo]")
        return _run(args)
    except CommandError as error:
        print(f"mapo-kernels demo: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    import torch

    from mapo_kernels import AdvantageSpec, resolve_backend
    from mapo_kernels.demo.experiment import run_experiment

    if args.seeds < 1:
        raise CommandError(f"--seeds: expected at least 1, got {args.seeds}")
    names = {field.name for field in fields(Settings)}
    given = {name: value for name, value in vars(args).items() if name in names}
    try:
        settings = Settings(**given)
        AdvantageSpec(certainty=settings.certainty)
        device = _device(args.device)
        resolve_backend(device.type)
    except (ValueError, RuntimeError) as error:
        raise CommandError(str(error)) from error
    threads = torch.get_num_threads()
    torch.set_num_threads(min(MAX_THREADS, threads))
    try:
        return run_experiment(
            settings,
            estimators=list(dict.fromkeys(args.estimator)),
            seeds=args.seeds,
            device=device,
            out=args.out,
            resume=args.resume,
        )
    finally:
        torch.set_num_threads(threads)


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
        torch.ones(1, device=device).item()  # the device `meta` has no numbers
        torch.Generator(device)
    except Exception as error:  # Backends that are not there fail in many ways.
        reason = one_line(str(error).split("\n")[0] or error)
        raise ValueError(f"--device: expected a usable device, got {name!r}: {reason}") from error
    return device


def _certainty(text: str) -> str | float:
    with suppress(ValueError):
        return float(text)
    return text
