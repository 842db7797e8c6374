"""The demo: MAPO and GRPO trained from one start on a verifiable task, on the device at hand.

Here is its command line, which imports torch and the packages of the `demo` extra after parsing.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from mapo_kernels.demo.settings import ESTIMATORS, REPLAY, Settings
from mapo_kernels.demo.tasks import TASKS
from mapo_kernels.files import CommandError, require

__all__ = ["add_arguments", "main"]

# More threads slow a model this small down, and a fixed number makes CPU results repeatable.
MAX_THREADS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options to a parser."""
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    # The fields of Settings that are options.
    parser.set_defaults(**{field.name: field.default for field in fields(Settings)})
    add = parser.add_argument
    what = "what to train and compare"
    add("--estimator", nargs="+", choices=ESTIMATORS, default=["mapo", "grpo"], help=what)
    certainties = "quadratic (the paper), linear, entropy, step, or a number in [0, 1]"
    add("--certainty", type=_number_or_name, help=f"lambda(p) of mapo: {certainties}")
    tasks = "; ".join(f"{task.name}: {task.description}" for task in TASKS.values())
    add("--task", choices=tuple(TASKS), help=tasks)
    add("--steps", type=int, help="RL steps")
    add("--seeds", type=int, default=1, help="number of seeds")
    add("--prompts", type=int, help="groups per step")
    add("--group-size", type=int, help="answers per prompt")
    add("--top-p", type=float, help="sample from the likeliest tokens of so much probability")
    replay = "with --top-p: train each estimator a second time, on replayed sampling masks"
    add("--replay", action="store_true", help=replay)
    ends = "sampled success at which the supervised warm-up ends"
    add("--warmup-success", type=float, help=ends)
    add("--device", default="auto", help="a torch device; auto takes a GPU if there is one")
    folder = "output folder: an empty one, or that of an earlier demo, which is replaced"
    add("--out", type=Path, default=Path("demo_out"), help=folder)
    add("--resume", action="store_true", help="continue the demo in --out instead")


def _number_or_name(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def main(args: argparse.Namespace) -> int:
    """Run the demo; returns the exit code: 0, or 130 after Ctrl-C.

    Raises:
        CommandError: it cannot be run like that.
    """
    require("demo", "reasoning_gym", "matplotlib", "rich", "jsonschema", "filelock")
    import torch

    from mapo_kernels import AdvantageSpec, resolve_backend
    from mapo_kernels.demo.experiment import run_experiment, usable_device

    if args.seeds < 1:
        raise CommandError(f"--seeds: expected at least 1, got {args.seeds}")
    if args.replay and args.top_p == 1:
        raise CommandError("--replay: expected --top-p below 1, got 1.0: nothing to replay")
    try:
        settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
        AdvantageSpec(certainty=settings.certainty)
        device = usable_device(args.device)
        resolve_backend(device.type)
    except (ValueError, RuntimeError) as error:
        raise CommandError(str(error)) from error
    torch.set_num_threads(min(MAX_THREADS, torch.get_num_threads()))
    names = dict.fromkeys(args.estimator)
    return run_experiment(
        settings,
        estimators=[*names, *(name + REPLAY for name in names if args.replay)],
        seeds=args.seeds,
        device=device,
        out=args.out,
        resume=args.resume,
    )
