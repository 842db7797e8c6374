"""All runs of one demo: for each seed a warm-up, then every estimator from the same start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch
from rich.status import Status

from mapo_kernels import resolve_backend
from mapo_kernels.demo import folder, plots, report
from mapo_kernels.demo.settings import FORMAT, WARM_UP, Record, Settings
from mapo_kernels.demo.tasks import TASKS, held_out_problems
from mapo_kernels.demo.train import Run
from mapo_kernels.doctor import versions
from mapo_kernels.files import CommandError, naming, one_line

SAVE_EVERY = 25  # steps
INTERRUPTED = 130  # what shells report for a process ended by Ctrl-C


def run_experiment(
    settings: Settings,
    *,
    estimators: Sequence[str],
    seeds: int,
    device: torch.device,
    out: Path,
    resume: bool,
) -> int:
    """Train every estimator (with REPLAY behind it, on replayed masks) from seed 0 on.

    Log, models and plots go to the folder `out`, whose runs are continued or replaced.

    Returns:
        The exit code: 0, or 130 after Ctrl-C.

    Raises:
        CommandError: `resume` with other settings than those of the log in `out`; a file or folder
            that cannot be used, or is not the demo's own.
    """
    with folder.opened(out, resume=resume) as earlier:
        if resume:
            _require_same_settings(earlier["configuration"], settings)
        paths = {name: out / f"{name}.pt" for name in earlier["runs"]}
        begun: dict[str, Run] = {}
        # All at once: a damaged file must not be found after hours of training.
        for name, path in paths.items():
            if resume and path.exists():
                phase, seed = name.split("_seed")
                begun[name] = Run(settings, phase, int(seed), device)
                begun[name].load(path)
        log = {
            "format": FORMAT,
            "status": "running",
            "configuration": asdict(settings),
            "versions": versions() | {"reasoning-gym": metadata.version("reasoning-gym")},
            "backend": resolve_backend(device.type),
            "held_out_problems": len(
                held_out_problems(TASKS[settings.task], settings.eval_prompts)
            ),
            "runs": {run.name: run.record for run in begun.values()},
        }
        folder.write_log(out, log)
        for path in () if resume else paths.values():
            with naming(path):
                path.unlink(missing_ok=True)
        try:
            with report.console().status("") as status:
                for seed in range(seeds):
                    start = None
                    for phase in (WARM_UP, *estimators):
                        run = Run(settings, phase, seed, device, start)
                        run = begun.get(run.name, run)
                        _train(run, out, log, status)
                        start = start or run
            log["status"] = "finished"
        except KeyboardInterrupt:
            log["status"] = "interrupted"
        folder.write_log(out, log)
        report.print_summary(log, out, plots.draw_all(log, out))
    return INTERRUPTED if log["status"] == "interrupted" else 0


def _train(run: Run, out: Path, log: Record, status: Status) -> None:
    """Step until the run is finished, saving it now and then."""

    def save() -> None:
        folder.write_log(out, log)  # first: it lists the files that may be discarded
        run.save(out / f"{run.name}.pt")

    log["runs"][run.name] = run.record
    run.begin()
    save()
    while not run.record["finished"]:
        run.step()
        line = report.progress(run.record, run.settings)
        status.update(line)
        if run.record["finished"] or len(run.record["steps"]) % SAVE_EVERY == 0:
            save()
            status.console.print(line)


def _require_same_settings(before: Record, settings: Settings) -> None:
    changed = [
        f"{name} was {before.get(name)!r}, is {now!r}"
        for name, now in asdict(settings).items()
        if before.get(name) != now
    ]
    if changed:
        raise CommandError(f"--resume: expected the earlier settings, but {'; '.join(changed)}")


def usable_device(name: str) -> torch.device:
    """A device by name, or what `auto` finds; CommandError if it cannot compute."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
        torch.ones(1, device=device).item()  # the device `meta` has no numbers
        torch.Generator(device)
    except Exception as error:  # Backends that are not there fail in many ways.
        reason = one_line(str(error).split("\n")[0] or error)
        raise CommandError(f"--device: expected a usable device, got {name!r}: {reason}") from error
    return device
