"""What the user sees in the terminal: progress, and at the end what was measured."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from statistics import mean, stdev

import torch
from rich.console import Console
from rich.table import Table

from mapo_kernels.demo.settings import LOG_NAME, REPLAY, WARM_UP, Record, Settings

Final = dict[str, dict[int, float]]  # phase -> seed -> held-out success at the end


def console() -> Console:
    """The terminal; names in brackets are no markup, and lines are not broken."""
    return Console(markup=False, highlight=False, soft_wrap=True)


def progress(run: Record, settings: Settings) -> str:
    """What the last step of a run did, in a line."""
    last = run["steps"][-1]
    # A warm-up has no total in advance.
    step = last["step"] if run["phase"] == WARM_UP else f"{last['step'] + 1}/{settings.steps}"
    return (
        f"{run['phase']}, seed {run['seed']}  step {step}  reward {last['reward']:.2f}  "
        f"success {last['success']:.2f}  "
        f"no signal {last['groups_without_signal']:2d}/{settings.prompts}"
    )


def print_summary(log: Record, out: Path, drawn: Sequence[Path]) -> None:
    """Print the table of results, what they allow to conclude, and where the files are."""
    show, runs = console().print, log["runs"].values()
    if log["status"] == "interrupted":
        show("Interrupted. Continue with --resume; what follows is partial.")
    evaluated = [run for run in runs if run["evals"]]
    if evaluated:
        show(_results_table(log, evaluated))
    final: Final = {}
    for run in evaluated:
        if run["finished"]:
            by_seed = final.setdefault(run["phase"], {})
            by_seed[run["seed"]] = run["evals"][-1]["success_sampled"]
    truncated = log["configuration"]["top_p"] < 1
    phases = dict.fromkeys(run["phase"] for run in evaluated if truncated)
    for line in [*(_truncation(phase, evaluated) for phase in phases), *conclusion(final)]:
        show(line)
    seconds = sum(map(_seconds, runs))
    show(f"{seconds:.0f} s of training in all, on the {log['backend']} backend")
    written = [f"{name}.pt" for name in log["runs"]] + [path.name for path in drawn]
    show(f"In {out}: {', '.join([LOG_NAME, *sorted(written)])}")


def _seconds(run: Record) -> float:
    return sum(step["seconds"] for step in run["steps"])


def _results_table(log: Record, runs: Sequence[Record]) -> Table:
    count = log["held_out_problems"]
    table = Table(title=f"{log['configuration']['task']}: success on {count} held-out problems")
    table.add_column("estimator")
    for name in ("seed", "step", "sampled", "greedy", "seconds"):
        table.add_column(name, justify="right")
    for run in runs:
        first, last = run["evals"][0], run["evals"][-1]
        kinds = ("success_sampled", "success_greedy")
        changes = [f"{first[kind]:.3f} -> {last[kind]:.3f}" for kind in kinds]
        numbers = [str(run["seed"]), str(last["step"]), *changes, f"{_seconds(run):.0f}"]
        table.add_row(run["phase"], *numbers)
    return table


def _truncation(phase: str, runs: Sequence[Record]) -> str:
    """What sampling from some columns alone does to the runs of a phase, over all their steps."""
    steps = [step for run in runs if run["phase"] == phase for step in run["steps"]]
    names = ("on_policy_ratio", "kept_columns")
    ratio, kept = (torch.tensor([step[name] for step in steps]).nanmean() for name in names)
    return f"{phase}: mean importance ratio before any update {ratio:.4f}, {kept:.2f} columns kept"


def conclusion(final: Final) -> list[str]:
    """What the final successes allow to say about the estimators, and no more.

    Every estimator is compared with grpo (or with the first one), and a replay with its estimator
    without one, seed by seed: both start from the same warm-up there. A difference counts only if
    its mean exceeds the standard deviation over seeds and every seed agrees on its sign.
    """
    baseline = "grpo" if "grpo" in final else next(iter(final), "")
    pairs = [(x, x.removesuffix(REPLAY) if x.endswith(REPLAY) else baseline) for x in final]
    several = {name: by_seed.values() for name, by_seed in final.items() if len(by_seed) > 1}
    return [
        *(f"{name}: {_mean_and_spread(values)}" for name, values in several.items()),
        *(_compare(x, y, final) for x, y in pairs if x != y and y in final),
    ]


def _mean_and_spread(values: Collection[float], sign: str = "") -> str:
    return (
        f"mean {mean(values):{sign}.3f}, standard deviation {stdev(values):.3f} "
        f"over {len(values)} seeds"
    )


def _compare(estimator: str, baseline: str, final: Final) -> str:
    ours, theirs = final[estimator], final[baseline]
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if len(differences) < 2:
        return (
            f"{estimator} against {baseline}: one seed cannot rank the estimators; "
            "--seeds 5 shows how far seeds differ."
        )
    verdict = "within the spread of the seeds: no ranking"
    of_one_sign = min(differences) > 0 or max(differences) < 0
    if of_one_sign and abs(mean(differences)) > stdev(differences):
        verdict = "larger than the spread and of one sign in every seed, on this task and settings"
    return f"{estimator} - {baseline}: {_mean_and_spread(differences, '+')}; {verdict}."
