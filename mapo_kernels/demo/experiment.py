"""All runs of one demo and their folder: for each seed a warm-up, then every estimator from it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch
from rich.status import Status

from mapo_kernels import files, resolve_backend
from mapo_kernels.demo import plots, report
from mapo_kernels.demo.settings import FORMAT, LOG_NAME, WARM_UP, Record, Settings
from mapo_kernels.demo.tasks import TASKS, held_out_problems
from mapo_kernels.demo.train import Run
from mapo_kernels.doctor import versions
from mapo_kernels.files import CommandError, naming, one_line

SAVE_EVERY = 25  # steps
INTERRUPTED = 130  # what shells report for a process ended by Ctrl-C
LOG_SCHEMA = {
    "type": "object",
    "required": ["format", "configuration", "runs"],
    "properties": {
        "format": {"const": FORMAT},
        "configuration": {"type": "object"},
        # Each name is that of a file, too.
        "runs": {"type": "object", "propertyNames": {"pattern": "^[a-z-]+_seed[0-9]+$"}},
    },
}


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
    with opened(out, resume=resume) as earlier:
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
        held_out = held_out_problems(TASKS[settings.task], settings.eval_prompts)
        log = {
            "format": FORMAT,
            "status": "running",
            "configuration": asdict(settings),
            "versions": versions() | {"reasoning-gym": metadata.version("reasoning-gym")},
            "backend": resolve_backend(device.type),
            "held_out_problems": len(held_out),
            "runs": {run.name: run.record for run in begun.values()},
        }
        _write_log(out, log)
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
        _write_log(out, log)
        report.print_summary(log, out, plots.draw_all(log, out))
    return INTERRUPTED if log["status"] == "interrupted" else 0


@contextmanager
def opened(path: Path, *, resume: bool) -> Iterator[Record]:
    """Take an output folder for one experiment, a new one if there is none to `resume`.

    Yields the log of the earlier experiment, without runs if there was none. A `CommandError` says
    that the path is no folder, cannot be written to, is used by another process, or has files but
    no log of the demo; nothing in such a folder is changed.
    """
    with naming(path):
        if not (resume or path.exists()):
            path.mkdir(parents=True)
    _earlier_log(path, resume)
    with files.locked(path):
        yield _earlier_log(path, resume)  # once more: another run may have ended since


def _earlier_log(path: Path, needed: bool) -> Record:
    ignored = {files.LOCK_NAME, LOG_NAME + files.PARTIAL}
    with naming(path):
        names = {entry.name for entry in path.iterdir()} - ignored
    if needed or LOG_NAME in names:
        what = "the log of a demo (or choose another --out)"
        return files.read_json(path / LOG_NAME, LOG_SCHEMA, what)
    if names:
        expected = f"{path}: expected an empty folder or one of the demo's own"
        raise CommandError(f"{expected}, got one with {min(names)!r} and no {LOG_NAME}")
    return {"runs": {}}


def _write_log(out: Path, log: Record) -> None:
    files.write_whole(out / LOG_NAME, (json.dumps(log) + "\n").encode())


def _train(run: Run, out: Path, log: Record, status: Status) -> None:
    """Step until the run is finished, saving it now and then."""

    def save() -> None:
        _write_log(out, log)  # first: it lists the files that may be discarded
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
