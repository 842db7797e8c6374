"""`mapo-kernels bench tune` and `bench warm`: which values of the fields in config.py are fast.

A point gives fields values. A family has points of the same fields, each value with each other, and
the cases that they are tried on. A point is compared with float64 before it is timed, and it is
left out where its kernels keep registers in memory.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from dataclasses import replace
from functools import cache, lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.runtime.cache import triton_key
from triton.runtime.jit import JITFunction

import mapo_kernels as mk
from mapo_kernels import config, head
from mapo_kernels.batch import HeadInputs
from mapo_kernels.files import CommandError, naming, one_line, write_whole
from mapo_kernels.head import chunk_rows_of

from . import cases, environment
from .cases import BF16, LOGITS, LOGPROBS, Case
from .harness import DRY, TOLERANCE, CaseRun, relative_error, work_of
from .levels import Inputs, draw
from .machine_code import COMPILED, compile_launches, in_processes, recorder, report
from .providers import Provider, our_scores, ours_from_hidden, ours_from_logprobs, ours_in_place
from .report import table
from .roofs import Roofs
from .timers import on_gpu

Point = dict[str, Any]
Row = dict[str, Any]
NOISE = 0.01  # A point that is faster than the defaults by less than this share is not.


def in_place_from_rewards(logits: Tensor, rest: Any) -> Tensor:
    """The whole step at the logits level: rewards to a gradient over the logits."""
    ids, old, mask = rest.padded
    groups = {"rewards": rest.rewards, "group_size": rest.group_size}
    given = {"old_logprobs": old, "mask": mask, "spec": rest.spec, "inplace": True}
    return mk.mapo_loss_from_logits(logits, ids, **given, **groups).loss


def scores_with_entropy(logits: Tensor, rest: Any) -> Tensor:
    return mk.token_logprobs(logits[:, :-1], rest.ids, return_entropy=True)[0]


class Family(NamedTuple):
    """What is called, on which cases, and the values by RECORD.field that are tried."""

    call: Callable[..., Tensor]
    cases: tuple[Case, ...]
    values: dict[str, tuple[Any, ...]] = {}

    def points(self) -> list[Point]:
        """The defaults, then what differs from them in one field, in two, and so on."""
        default = {}
        for key in self.values:
            record, _, field = key.partition(".")
            default[key] = getattr(getattr(config, record), field)
        axes = [dict.fromkeys((default[key], *found)) for key, found in self.values.items()]
        every = [dict(zip(self.values, x, strict=True)) for x in itertools.product(*axes)]
        return sorted(every, key=lambda point: sum(point[key] != default[key] for key in point))

    def inputs(self, case: Case, device: torch.device) -> Inputs:
        """The case's inputs; rewards too, where advantages are a part of the work."""
        found = draw(case, device)
        if self.call is in_place_from_rewards:
            generator = torch.Generator().manual_seed(0)
            found.rest.rewards = cases.draw_rewards(case, generator).to(device)
        return found


ROWS = {
    "LOGITS.max_threads": (256, 512, 1024),
    "LOGITS.tiles": (2, 4),
    "LOGITS.programs": (1, 2),
    "LOGITS.first_hint": ("evict_last", ""),
    "LOGITS.second_hint": ("evict_first", ""),
    "LOGITS.backwards": (True, False),
}
WHOLE = Case(LOGITS, 16, 512, 8, head=cases.QWEN2, dtype=BF16)
SCORES = replace(WHOLE, level=cases.SCORING)
# In the order of what they decide: of two families with one field the first decides it for the
# file; the others are for the table of config.py. Ablations have no field.
FAMILIES = {
    "rows": Family(in_place_from_rewards, (WHOLE,), ROWS),
    "scoring": Family(our_scores, (SCORES,), {"LOGITS.score_hint": ("evict_first", "")}),
    "statistics and entropy": Family(scores_with_entropy, (SCORES,)),
    "advantages given": Family(ours_in_place, (WHOLE,)),
    # The last program adds all sums, or a launch of its own.
    "final sum": Family(
        in_place_from_rewards,
        tuple(replace(WHOLE, n_sequences=8, length=n) for n in (31, 95, 191, 383)),
        {"LOGITS.fused_rows": (1, 512, 1024, 2048, 4096)},
    ),
    "log-probs": Family(
        ours_from_logprobs,
        tuple(Case(LOGPROBS, 1024, length) for length in (1024, 4096)),
        {"LOGPROBS.threads": (128, 256, 512), "LOGPROBS.multiprocessors": (88, 132, 176, 264)},
    ),
    # Bytes that make chunks of 1024, 2048, 4096 and 8192 of these rows.
    "hidden": Family(
        ours_from_hidden,
        (Case(cases.HIDDEN, 16, 512, 8, head=cases.QWEN3_8B, dtype=BF16),),
        {
            "HIDDEN.gpu_chunk": tuple(1 << power for power in (30, 31, 32, 33)),
            "HIDDEN.one_product": (True, False),
        },
    ),
    "rows of 128256": Family(in_place_from_rewards, (replace(WHOLE, head=cases.LLAMA),), ROWS),
    "rows of float32": Family(
        in_place_from_rewards, (replace(WHOLE, length=256, dtype=torch.float32),), ROWS
    ),
}


def tiny(case: Case) -> Case:
    """The case for Triton's interpreter: few rows, but long enough for every number of threads."""
    head = case.head._replace(width=16, vocab=70_000) if case.head.vocab else case.head
    length = 1100 if case.level == LOGPROBS else 1
    return replace(case, n_sequences=2, group_size=2, length=length, head=head)


def small(case: Case) -> Case:
    """The case for the compiler: fewer logits, by which, `as_on_gpu`, nothing else is compiled."""
    if not case.head.vocab:
        return case
    length = case.length if case.length % 16 else 16
    return replace(case, length=length, head=case.head._replace(width=16))


def as_on_gpu(case: Case) -> Point:
    """What makes a small case on a CPU launch what the case does on a GPU."""
    found = {"HIDDEN.cpu_chunk": config.HIDDEN.gpu_chunk}
    rows = case.n_sequences * (case.length + (case.level == LOGITS))
    if case.level == cases.HIDDEN:
        shape = (case.head.vocab, case.head.width)
        weight = torch.empty(shape, dtype=case.dtype, device="meta")
        with config.override(found):
            rows = chunk_rows_of(HeadInputs(weight, None, None), case.tokens)
    is_fused = rows <= config.LOGITS.fused_rows
    return found | {"LOGITS.fused_rows": 1 << 30 if is_fused else 1}


def items(names: list[str]) -> Iterator[tuple[Family, Case, list[Row]]]:
    """The cases of these families, or of all, each with a row for every point."""
    for name in names or FAMILIES:
        for case in FAMILIES[name].cases:
            points = FAMILIES[name].points()
            rows: list[Row] = [{"family": name, "case": case.shape, "point": x} for x in points]
            yield FAMILIES[name], case, rows


def key_of(row: Row) -> str:
    return json.dumps([row["family"], row["case"], row["point"]])


def reason_of(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


read = cache(report)  # what the machine code of a compiled kernel holds


def compile_products(target: str) -> None:
    """Make this process compile what is launched, products that only a GPU computes included."""

    def product(a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)

    compile_launches(target)
    torch.mm = product  # type: ignore[assignment]
    torch.addmm = lambda before, a, b, out_dtype=None, out=None: before  # type: ignore[assignment]
    head.mixes_dtypes = lambda weight: weight.element_size() == 2


@lru_cache(1)
def small_inputs(family: str, shape: str) -> tuple[Case, Inputs]:
    """A case of a family and the inputs that its points are compiled for, drawn once for all."""
    (case,) = (x for x in FAMILIES[family].cases if x.shape == shape)
    return case, FAMILIES[family].inputs(small(case), torch.device("cpu"))


def compile_point(row: Row) -> Row:
    """The row of a point with what was found in its kernels, or why they cannot be compiled."""
    case, inputs = small_inputs(row["family"], row["case"])
    provider = Provider(FAMILIES[row["family"]].call)
    COMPILED.clear()
    try:
        with config.override(row["point"]), config.override(as_on_gpu(case)):
            work_of(provider, [inputs], case.direction)()
        registers = {name: read(kernel).get("registers") for name, kernel in COMPILED}
        spills = sum(read(kernel)["spills"] for _, kernel in COMPILED)
        return row | {"spills": spills, "registers": registers}
    except Exception as error:  # What cannot be compiled is a finding about the point.
        return row | {"reason": reason_of(error)}


def compile_points(target: str, names: list[str], jobs: int) -> dict[str, Row]:
    """Compile all points into Triton's cache, in processes of their own; prints and returns rows.

    Raises:
        CommandError: a process ended with an error.
    """
    work = [row for *_, rows in items(names) for row in rows]
    found = {}
    try:
        for row in in_processes(compile_point, work, target, compile_products, jobs):
            print(json.dumps(row), flush=True)
            found[key_of(row)] = row
    except BrokenExecutor as error:
        raise CommandError(f"compiling for {target}: {one_line(error)}") from error
    return found


def build() -> str:
    """Names the Triton at hand: kernels in a cache are found by the same one alone."""
    key = triton_key()
    return f"triton {triton.__version__}, build {sha256(key.encode()).hexdigest()[:12]}"


class Tuning:
    """Points measured on this machine; the file at `path` has a line of JSON for each of them."""

    def __init__(self, path: Path, dry_run: bool) -> None:
        """Keep what an earlier run of the same code on the same device has measured."""
        self.path, self.dry_run = path, dry_run
        device = "interpreter" if dry_run else environment.device_name()
        commit = environment.describe()["commit"]
        self.about = {"device": device, "build": build(), "commit": commit}
        self.about["tuning"] = config.changed()
        self.device = torch.device("cpu" if dry_run else "cuda")
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        # A run that was killed may have left a part of a line.
        whole = [line for line in lines if line.endswith("\n")]
        try:
            rows = [row for row in map(json.loads, whole) if row["about"] == self.about]
            self.rows: dict[str, Row] = {key_of(row): row for row in rows}
        except (ValueError, TypeError, KeyError) as error:
            raise CommandError(
                f"{path}: expected a file of `bench tune`, got one of something else"
            ) from error
        write_whole(path, "".join(whole).encode())
        self.effort = DRY if dry_run else cases.EFFORTS["gpu"]
        self.roofs = Roofs(self.device, self.effort, tiny=dry_run)
        self._run: CaseRun | None = None

    def measure(self, names: list[str], minutes: float, compiled: dict[str, Row]) -> bool:
        """Measure what has not been measured; whether the time was enough for all.

        `compiled` has what is known of the code of points: those that spill are left out.
        """
        deadline = time.monotonic() + 60 * minutes
        for family, case, rows in items(names):
            self._run = None
            for row in rows:
                if key_of(row) in self.rows:
                    continue
                if time.monotonic() > deadline:
                    return False
                known = {"spills": 0, "reason": None} | compiled.get(key_of(row), {})
                row |= {"status": "left out", "ms": None, "about": self.about}
                if known["spills"] or known["reason"]:
                    row["reason"] = known["reason"] or "its kernels spill"
                else:
                    try:
                        row |= self._measure(family, case, row["point"])
                    except Exception as error:  # It is a finding about the point.
                        row |= {"status": "failed", "reason": reason_of(error)}
                self._keep(row)
        return True

    def _prepared(self, family: Family, case: Case) -> CaseRun:
        """The case with its inputs and its truth, made once for all its points."""
        if self._run is None:
            case = tiny(case) if self.dry_run else case
            inputs = family.inputs(case, self.device)
            self._run = CaseRun(case, self.roofs, self.effort, inputs)
            self._run.fill_cache()
            # Timing writes over logits; what is compared must keep its own.
            self._timed = copy.deepcopy(self._run.inputs)
        return self._run

    def _measure(self, family: Family, case: Case, point: Point) -> Row:
        run = self._prepared(family, case)
        with config.override(point):
            kernels: list[tuple[str, Any]] = []
            with mock.patch.object(JITFunction, "run", recorder(kernels)):
                once = Provider(family.call, consumes=True)
                found = work_of(once, run.inputs[:1], case.direction)()
            error = relative_error(found, run.truth)
            del found
            if not error <= TOLERANCE[case.dtype]:
                return {"status": "wrong", "reason": f"relative error {error:.1e}"}
            if any(read(kernel)["spills"] for _, kernel in kernels):
                return {"error": error, "reason": "its kernels spill"}
            if self.dry_run:
                return {"status": "ok", "error": error}
            work = work_of(Provider(family.call), self._timed, case.direction)
            samples = on_gpu(work, self.effort, graph_below=math.inf)
        ms = statistics.median(samples.ms)
        return {"status": "ok", "error": error, "ms": ms, "timer": samples.timer}

    def _keep(self, row: Row) -> None:
        """Append a row; CommandError where the device does not answer any more."""
        self.rows[key_of(row)] = row
        with naming(self.path), self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        time_ms = "" if row["ms"] is None else f"{row['ms']:.4g} ms"
        print(key_of(row), row["status"], time_ms, row.get("reason", ""), flush=True)
        if row["status"] == "failed" and self.device.type == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                raise CommandError(f"tune: {one_line(error)}; run it again to go on") from error


def winners(rows: list[Row]) -> tuple[str, dict[str, dict[str, Any]]]:
    """A table of each family's fastest point, and what a file for MAPO_KERNELS_TUNING says.

    The times of several cases count as their geometric mean; of a dry run all are the same.
    """
    lines, chosen = [], {}  # type: list[list[str]], dict[str, dict[str, Any]]
    for name, family in FAMILIES.items():
        logs: dict[str, list[float]] = {}
        ours = [row for row in rows if row["family"] == name and row["status"] == "ok"]
        for row in ours:
            logs.setdefault(json.dumps(row["point"]), []).append(math.log(row["ms"] or 1.0))
        n_cases = len({row["case"] for row in ours})
        means = {x: math.exp(statistics.mean(t)) for x, t in logs.items() if len(t) == n_cases}
        if not means:
            continue
        default, best = json.dumps(family.points()[0]), min(means, key=lambda x: means[x])
        if means[best] > (1 - NOISE) * means.get(default, math.inf):
            best = default
        known = json.loads(default)
        changes = {k: x for k, x in json.loads(best).items() if x != known[k]}
        times = [f"{means[x]:.4g}" if x in means else "-" for x in (default, best)]
        said = ", ".join(f"{k} = {x!r}" for k, x in changes.items()) or "the defaults"
        lines.append([name, f"{len(means)}", *times, said])
        for key, value in json.loads(best).items():
            record, _, field = key.partition(".")
            chosen.setdefault(record, {}).setdefault(field, value)
    heads = ["family", "points", "defaults, ms", "fastest, ms", "the fastest"]
    return table(heads, lines), chosen
