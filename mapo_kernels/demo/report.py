"""What the user sees in the terminal: progress, and at the end what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from rich import progress
from rich.console import Console
from rich.table import Table

from mapo_kernels.demo.folder import LOG_NAME, Record, model_path
from mapo_kernels.demo.settings import WARM_UP, Settings

PLAIN_STRIDE = 25  # steps between two lines where stdout is no terminal


class Progress(progress.Progress):
    """A bar per run in a terminal, a line now and then in a log file."""

    def __init__(self, settings: Settings) -> None:
        """Prepare; the bars appear on entering."""
        super().__init__(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=20),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[status]}"),
            progress.TimeElapsedColumn(),
            disable=not Console().is_terminal,
        )
        self._settings = settings

    def step(self, run: Record) -> None:
        """Show the last step of a run."""
        record, title = run["steps"][-1], f"{run['phase']}, seed {run['seed']}"
        step = record["step"]
        # A warm-up has no total in advance.
        total = None if run["phase"] == WARM_UP else self._settings.steps
        silent = f"{record['groups_without_signal']:2d}/{self._settings.prompts}"
        status = f"reward {record['reward']:.2f}  success {record['success']:.2f}"
        status += f"  no signal {silent}"
        if self.disable:
            if step % PLAIN_STRIDE == 0 or step + 1 == total:
                counter = f"{step}" if total is None else f"{step + 1}/{total}"
                print(f"{title}  step {counter}  {status}", flush=True)
            return
        if title not in [bar.description for bar in self.tasks]:
            for bar in self.tasks:  # a warm-up's is full when the next phase begins
                self.update(bar.id, total=bar.completed)
            self.add_task(title, total=total, status="")
        self.update(self.task_ids[-1], completed=step + 1, status=status)


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
    seconds = sum(run["seconds"] for run in log["runs"])
    where = f"{log['device']}, {log['backend']} backend"
    console.print(f"{seconds:.0f} s of training in all, on {where}", soft_wrap=True)
    models = [model_path(out, run["phase"], run["seed"]) for run in log["runs"]]
    written = sorted(path.name for path in [*models, *drawn] if path.exists())
    # A name is no markup, whatever brackets it has.
    console.print(f"In {out}: {', '.join([LOG_NAME, *written])}", soft_wrap=True, markup=False)


def _results_table(log: Record, runs: Sequence[Record]) -> Table:
    count = log["held_out_problems"]
    table = Table(title=f"{log['configuration']['task']}: success on {count} held-out problems")
    for name in ("estimator", "seed", "step", "sampled", "greedy", "seconds"):
        table.add_column(name, justify="left" if name == "estimator" else "right")
    for run in runs:
        first, last = run["evals"][0], run["evals"][-1]
        changes = [
            f"{first[kind]:.3f} -> {last[kind]:.3f}"
            for kind in ("success_sampled", "success_greedy")
        ]
        numbers = [str(run["seed"]), str(last["step"]), *changes, f"{run['seconds']:.0f}"]
        table.add_row(run["phase"], *numbers)
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
    lines = [
        f"{estimator}: mean {mean(by_seed.values()):.3f}, standard deviation "
        f"{stdev(by_seed.values()):.3f} over {len(by_seed)} seeds"
        for estimator, by_seed in final.items()
        if len(by_seed) > 1
    ]
    baseline = "grpo" if "grpo" in final else next(iter(final), "")
    lines += [_compare(name, baseline, final) for name in final if name != baseline]
    return "\n".join(lines)


def _compare(estimator: str, baseline: str, final: dict[str, dict[int, float]]) -> str:
    ours, theirs = final[estimator], final[baseline]
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if len(differences) < 2:
        return (
            f"{estimator} against {baseline}: one seed cannot rank the estimators; "
            "--seeds 5 shows how far seeds differ."
        )
    center, spread = mean(differences), stdev(differences)
    verdict = "within the spread of the seeds: no ranking"
    if abs(center) > spread and len({difference > 0 for difference in differences}) == 1:
        verdict = "larger than the spread and of one sign in every seed, on this task and settings"
    return (
        f"{estimator} - {baseline}: mean difference {center:+.3f}, standard deviation {spread:.3f} "
        f"over {len(differences)} seeds; {verdict}."
    )
