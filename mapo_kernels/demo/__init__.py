"""The demo: MAPO and GRPO trained from one start on a verifiable task, on the device at hand.

Only the standard library and torch are imported here; reasoning-gym, matplotlib and rich come with
the `demo` extra and are imported when the demo runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import torch

from mapo_kernels import AdvantageSpec, resolve_backend
from mapo_kernels.demo.tasks import TASKS
from mapo_kernels.files import CommandError, one_line

__all__ = ["add_arguments", "main"]

ESTIMATORS = ("mapo", "grpo", "apd", "mean", "rloo")
EXTRA_MODULES = ("reasoning_gym", "matplotlib", "rich", "jsonschema")
# More threads slow a model this small down, and a fixed number makes CPU results repeatable.
MAX_THREADS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options to a parser."""
    tasks = "; ".join(f"{task.name}: {task.description}" for task in TASKS.values())
    parser.add_argument(
        "--estimator",
        nargs="+",
        choices=ESTIMATORS,
        default=["mapo", "grpo"],
        help="what to train and compare (default: mapo grpo)",
    )
    parser.add_argument(
        "--certainty",
        type=_certainty,
        default="quadratic",
        help="lambda(p) of mapo: quadratic (the paper), linear, entropy, step, or a number in "
        "[0, 1]",
    )
    parser.add_argument("--task", choices=tuple(TASKS), default="number_sorting", help=tasks)
    parser.add_argument("--steps", type=int, default=300, help="RL steps (default: 300)")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds (default: 1)")
    parser.add_argument("--prompts", type=int, default=32, help="groups per step (default: 32)")
    parser.add_argument(
        "--group-size", type=int, default=16, help="answers per prompt (default: 16)"
    )
    parser.add_argument(
        "--warmup-success",
        type=float,
        default=0.1,
        help="sampled success at which the supervised warm-up ends (default: 0.1)",
    )
    parser.add_argument(
        "--trainer",
        choices=("torch", "trl"),
        default="torch",
        help="what runs the RL steps: a plain loop, or TRL with MAPOTrainer (default: torch)",
    )
    parser.add_argument(
        "--device", default="auto", help="a torch device; auto takes a GPU if there is one"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo_out"),
        help="output folder, an empty one or that of an earlier demo (default: demo_out)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue from the checkpoints in --out"
    )


def main(args: argparse.Namespace) -> int:
    """Run the demo; returns the exit code (0, 2 for wrong usage, 130 after Ctrl-C)."""
    missing = [name for name in EXTRA_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        return _refuse(f"{', '.join(missing)} not installed: pip install mapo-kernels[demo]")

    if args.trainer == "trl" and importlib.util.find_spec("trl") is None:
        return _refuse("trl not installed: pip install mapo-kernels[trl]")
    if args.trainer == "trl" and args.resume:
        return _refuse("--resume: expected --trainer torch, whose runs have checkpoints, got trl")

    from mapo_kernels.demo.experiment import run_experiment
    from mapo_kernels.demo.runs import Settings

    try:
        settings = Settings(
            task=args.task,
            steps=args.steps,
            certainty=args.certainty,
            prompts=args.prompts,
            group_size=args.group_size,
            warmup_success=args.warmup_success,
            trainer=args.trainer,
        )
        device = _device(args.device)
        resolve_backend(device.type)
    except (ValueError, RuntimeError) as error:
        return _refuse(str(error))
    if args.seeds < 1:
        return _refuse(f"--seeds: expected at least 1, got {args.seeds}")
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
    except CommandError as error:
        return _refuse(str(error))
    finally:
        torch.set_num_threads(threads)


def _refuse(reason: str) -> int:
    print(f"mapo-kernels demo: {reason}", file=sys.stderr)
    return 2


def _device(name: str) -> torch.device:
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
    try:
        value: str | float = float(text)
    except ValueError:
        value = text
    try:
        AdvantageSpec(certainty=value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return value
