"""What the user sees in the terminal: progress, and at the end what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from mapo_kernels.demo.runs import Record, Settings, model_path
from mapo_kernels.demo.train import WARM_UP

PLAIN_STRIDE = 25  # steps between two lines where stdout is no terminal


class Progress:
    """A bar per run in a terminal, a line now and then in a log file."""

    def __init__(self, settings: Settings) -> None:
        """Prepare; the bars appear on entering."""
        self._settings = settings
        console = Console()
        self._bars: Bars | None = None
        self._tasks: dict[str, Any] = {}
        if console.is_terminal:
            self._bars = Bars(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeElapsedColumn(),
                console=console,
            )

    def __enter__(self) -> Progress:
        """Show the bars."""
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the bars as they stand."""
        if self._bars is not None:
            self._bars.stop()

    def step(self, title: str, record: Record) -> None:
        """One step of the run called `title` is done."""
        reward, success = record["reward"], record["success"]
        silent = f"{record['groups_without_signal']:2d}/{self._settings.prompts}"
        status = f"reward {reward:.2f}  success {success:.2f}  no signal {silent}"
        total = None if title.startswith(WARM_UP) else self._settings.steps
        if self._bars is None:
            self._print_line(title, record["step"], total, status)
            return
        if title not in self._tasks:
            # A warm-up has no total in advance: its bar is full when the next phase begins.
            for earlier in self._bars.tasks:
                self._bars.update(earlier.id, total=earlier.completed)
            self._tasks[title] = self._bars.add_task(title, total=total, status="")
        self._bars.update(self._tasks[title], completed=record["step"] + 1, status=status)

    def _print_line(self, title: str, step: int, total: int | None, status: str) -> None:
        if step % PLAIN_STRIDE == 0 or step + 1 == total:
            counter = f"{step}" if total is None else f"{step + 1}/{total}"
            print(f"{title}  step {counter}  {status}", flush=True)


def print_summary(log: Record, out: Path, drawn: Sequence[Path]) -> None:
    """Print the table of results, what they allow to conclude, and where the files are."""
    console = Console()
    if log["status"] == "interrupted":
        console.print("Interrupted. Continue with --resume; what follows is partial.")
    evaluated = [run for run in log["runs"] if run["evals"]]
    if evaluated:
        console.print(_results_table(log, evaluated))
    verdict = conclusion(final_success(log))
    if verdict:
        console.print(verdict, soft_wrap=True)
    where = f"{log['device']}, {log['backend']} backend"
    console.print(f"{total_seconds(log):.0f} s of training in all, on {where}", soft_wrap=True)
    models = [model_path(out, run["phase"], run["seed"]) for run in log["runs"]]
    written = sorted(path.name for path in [*models, *drawn] if path.exists())
    # A name is no markup, whatever brackets it has.
    console.print(f"In {out}: {', '.join(['log.json', *written])}", soft_wrap=True, markup=False)


def total_seconds(log: Record) -> float:
    """Seconds spent in training steps and evaluations, over all runs."""
    return sum(run["seconds"] for run in log["runs"])


def _results_table(log: Record, runs: Sequence[Record]) -> Table:
    count = log["held_out_problems"]
    table = Table(title=f"{log['configuration']['task']}: success on {count} held-out problems")
    for name in ("estimator", "seed", "step", "sampled", "greedy", "seconds"):
        table.add_column(name, justify="left" if name == "estimator" else "right")
    for run in runs:
        first, last = run["evals"][0], run["evals"][-1]
        table.add_row(
            run["phase"],
            str(run["seed"]),
            str(last["step"]),
            f"{first['success_sampled']:.3f} -> {last['success_sampled']:.3f}",
            f"{first['success_greedy']:.3f} -> {last['success_greedy']:.3f}",
            f"{run['seconds']:.0f}",
        )
    return table


def final_success(log: Record) -> dict[str, dict[int, float]]:
    """Sampled held-out success at the end of every finished run: estimator -> seed -> success."""
    final: dict[str, dict[int, float]] = {}
    for run in log["runs"]:
        if run["finished"] and run["evals"]:
            success = run["evals"][-1]["success_sampled"]
            final.setdefault(run["phase"], {})[run["seed"]] = success
    return final


def conclusion(final: dict[str, dict[int, float]]) -> str:
    """What the final successes allow to say about the estimators, and no more.

    Every estimator is compared with grpo (or with the first one) seed by seed: both start from the
    same warm-up there. A difference counts only if its mean exceeds the standard deviation over
    seeds and every seed agrees on its sign.
    """
    lines = []
    for estimator, by_seed in final.items():
        values = list(by_seed.values())
        if len(values) > 1:
            lines.append(
                f"{estimator}: mean {mean(values):.3f}, standard deviation {stdev(values):.3f} "
                f"over {len(values)} seeds"
            )
    baseline = "grpo" if "grpo" in final else next(iter(final), "")
    for estimator in final:
        if estimator != baseline:
            lines.append(_compare(estimator, baseline, final))
    return "\n".join(lines)


def _compare(estimator: str, baseline: str, final: dict[str, dict[int, float]]) -> str:
    shared = sorted(set(final[estimator]) & set(final[baseline]))
    differences = [final[estimator][seed] - final[baseline][seed] for seed in shared]
    if len(differences) < 2:
        return (
            f"{estimator} against {baseline}: one seed cannot rank the estimators; "
            "--seeds 5 shows how far seeds differ."
        )
    center, spread = mean(differences), stdev(differences)
    agree = len({math.copysign(1, difference) for difference in differences}) == 1
    if abs(center) > spread and agree:
        verdict = "larger than the spread and of one sign in every seed, on this task and settings"
    else:
        verdict = "within the spread of the seeds: no ranking"
    return (
        f"{estimator} - {baseline}: mean difference {center:+.3f}, standard deviation {spread:.3f} "
        f"over {len(differences)} seeds; {verdict}."
    )
