"""`mapo-kernels bench tune` and `bench warm`: which values of the fields in config.py are fast.

A point gives fields values. A family has points of the same fields, each value with each other, and
the cases that they are tried on. A point is compared with float64 before it is timed.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from hashlib import sha256
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.cache import triton_key

import mapo_kernels as mk
from mapo_kernels import config, files, head
from mapo_kernels.files import CommandError, one_line

from . import cases, environment
from .cases import BF16, Case
from .harness import DRY, CaseRun, work_of
from .levels import draw
from .machine_code import COMPILED, compile_launches, in_processes, report
from .names import HIDDEN, LOGITS, LOGPROBS, SCORING
from .providers import our_scores, ours_from_hidden, ours_from_logprobs, ours_in_place
from .report import Row, table
from .results import attempt
from .roofs import Roofs
from .timers import on_gpu

Point = dict[str, Any]
NOISE = 0.01  # A point that is faster than the defaults by less than this share is not.
ROW = {"type": "object", "required": ["about", "family", "case", "point", "status"]}


def scores_with_entropy(logits: Tensor, rest: Any) -> Tensor:
    return mk.token_logprobs(logits[:, :-1], rest.ids, return_entropy=True)[0]


class Family(NamedTuple):
    """What is called, on which cases, and the values by RECORD.field that are tried."""

    call: Callable[..., Tensor]
    cases: tuple[Case, ...]
    values: dict[str, tuple[Any, ...]] = {}

    def points(self) -> list[Point]:
        """The defaults, then what differs from them in one field, in two, and so on."""
        default = {key: attrgetter(key)(config) for key in self.values}
        axes = [dict.fromkeys((default[key], *found)) for key, found in self.values.items()]
        every = [dict(zip(self.values, x, strict=True)) for x in itertools.product(*axes)]
        return sorted(every, key=lambda point: sum(point[key] != default[key] for key in point))


ROWS = {
    "LOGITS.max_threads": (256, 512, 1024),
    "LOGITS.tiles": (2, 4),
    "LOGITS.programs": (1, 2),
    "LOGITS.first_hint": ("evict_last", ""),
    "LOGITS.second_hint": ("evict_first", ""),
    "LOGITS.backwards": (True, False),
}
WHOLE = Case(LOGITS, 16, 512, 8, head=cases.QWEN2, dtype=BF16, from_rewards=True)
GIVEN = replace(WHOLE, from_rewards=False)
SCORES = replace(GIVEN, level=SCORING)
# In the order of what they decide: of two families with one field the first decides it for the
# file; the others are for the table of config.py. Ablations have no field.
FAMILIES = {
    "rows": Family(ours_in_place, (WHOLE,), ROWS),
    "scoring": Family(our_scores, (SCORES,), {"LOGITS.score_hint": ("evict_first", "")}),
    "statistics and entropy": Family(scores_with_entropy, (SCORES,)),
    "advantages given": Family(ours_in_place, (GIVEN,)),
    # The last program adds all sums, or a launch of its own.
    "final sum": Family(
        ours_in_place,
        tuple(replace(WHOLE, n_sequences=8, length=n) for n in (31, 95, 191, 383)),
        {"LOGITS.fused_rows": (1, 512, 1024, 2048, 4096)},
    ),
    "log-probs": Family(
        ours_from_logprobs,
        tuple(Case(LOGPROBS, 1024, length) for length in (1024, 4096)),
        {"LOGPROBS.threads": (128, 256, 512), "LOGPROBS.multiprocessors": (88, 132, 176, 264)},
    ),
    # Tokens that are read one by one, as those of packed sequences are.
    "unaligned log-probs": Family(
        ours_from_logprobs,
        (Case(LOGPROBS, 1024, 4095),),
        {
            "LOGPROBS.unaligned_registers": (80, 128, 160),
            "LOGPROBS.unaligned_tokens_per_thread": (1, 2, 4),
            "LOGPROBS.threads": (128, 256),
        },
    ),
    # Bytes that make chunks of 1024, 2048, 4096 and 8192 of these rows.
    "hidden": Family(
        ours_from_hidden,
        (Case(HIDDEN, 16, 512, 8, head=cases.QWEN3_8B, dtype=BF16),),
        {
            "HIDDEN.gpu_chunk": tuple(1 << power for power in (30, 31, 32, 33)),
            "HIDDEN.one_product": (True, False),
        },
    ),
    "rows of 128256": Family(ours_in_place, (replace(WHOLE, head=cases.LLAMA),), ROWS),
    "rows of float32": Family(
        ours_in_place, (replace(WHOLE, length=256, dtype=torch.float32),), ROWS
    ),
}


def tiny(case: Case) -> Case:
    """The case for Triton's interpreter: few rows, but long enough for every number of threads."""
    return replace(case, group_size=2).shrunk(2, 1100 if case.level == LOGPROBS else 1, 70_000)


class Item(NamedTuple):
    """A point of a family on one of its cases."""

    family: str
    call: Callable[..., Tensor]
    case: Case
    point: Point

    @property
    def row(self) -> Row:
        return {"family": self.family, "case": self.case.shape, "point": self.point}


def items(names: list[str]) -> list[Item]:
    """Every point of these families, or of all, on every case."""
    families = {name: FAMILIES[name] for name in names or FAMILIES}
    return [
        Item(name, family.call, case, point)
        for name, family in families.items()
        for case in family.cases
        for point in family.points()
    ]


def key_of(row: Row) -> str:
    return json.dumps([row["family"], row["case"], row["point"]])


def compile_for_gpu(target: str) -> None:
    """Make this process compile what is launched, and compute and write nothing on the way.

    Tensors are as large as on the GPU, but no page of their memory is touched.
    """

    def product(a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)

    compile_launches(target)
    Tensor.normal_ = lambda x, *_, **__: x  # type: ignore[assignment]
    torch.mm = product  # type: ignore[assignment]
    torch.addmm = lambda before, a, b, out_dtype=None, out=None: before  # type: ignore[assignment]
    head.mixes_dtypes = lambda weight: weight.element_size() == 2


drawn = lru_cache(1)(partial(draw, device=torch.device("cpu")))  # once for all points of a case


def compile_point(item: Item) -> Row:
    """The row of a point with what was found in its kernels, or why they cannot be compiled."""

    def compiled() -> Row:
        work = work_of(item.call, [drawn(item.case)], item.case.direction)
        COMPILED.clear()
        with config.override(item.point):
            with config.override({"HIDDEN.cpu_chunk": config.HIDDEN.gpu_chunk}):
                work()
        registers = {name: report(kernel).get("registers") for name, kernel in COMPILED}
        spills = sum(report(kernel)["spills"] for _, kernel in COMPILED)
        return {"status": "ok", "spills": spills, "registers": registers}

    return item.row | attempt(compiled)


def compile_points(target: str, names: list[str], jobs: int) -> list[Row]:
    """Compile all points into Triton's cache, by processes of their own; prints, returns rows."""
    found = []
    for row in in_processes(compile_point, items(names), target, compile_for_gpu, jobs):
        print(json.dumps(row), flush=True)
        found.append(row)
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
        with files.naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        rows = files.read_lines(path, ROW)
        files.drop_cut_off_line(path)  # of a run that was killed
        self.rows = {key_of(row): row for row in rows if row["about"] == self.about}
        self.device = torch.device("cpu" if dry_run else "cuda")
        roofs = Roofs(self.device, DRY if dry_run else cases.EFFORTS["gpu"], tiny=dry_run)
        # Drawn once for all points of a case.
        self.run_of = lru_cache(1)(lambda case: CaseRun(case, roofs))

    def measure(self, names: list[str], minutes: float) -> bool:
        """Measure what has not been measured; whether the time was enough for all."""
        deadline = time.monotonic() + 60 * minutes
        for item in items(names):
            if key_of(item.row) in self.rows:
                continue
            if time.monotonic() > deadline:
                return False
            found = attempt(partial(self._measure, item))
            self._keep(item.row | {"ms": None, "about": self.about} | found)
        return True

    def _measure(self, item: Item) -> Row:
        case = tiny(item.case) if self.dry_run else item.case
        run = self.run_of(case)
        with config.override(item.point):
            row = run.check(item.call)
            if row["status"] != "ok" or self.dry_run:
                return row
            samples = on_gpu(run.work(item.call), run.roofs.effort, graph_below=math.inf)
        return row | {"ms": statistics.median(samples.ms), "timer": samples.timer}

    def _keep(self, row: Row) -> None:
        """Append a row; CommandError where the device does not answer any more."""
        self.rows[key_of(row)] = row
        files.append_line(self.path, row)
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
        times: dict[str, list[float]] = {}
        ours = [row for row in rows if row["family"] == name and row["status"] == "ok"]
        for row in ours:
            times.setdefault(json.dumps(row["point"]), []).append(row["ms"] or 1.0)
        n_cases = len({row["case"] for row in ours})
        means = {x: statistics.geometric_mean(t) for x, t in times.items() if len(t) == n_cases}
        if not means:
            continue
        default, best = json.dumps(family.points()[0]), min(means, key=lambda x: means[x])
        if means[best] > (1 - NOISE) * means.get(default, math.inf):
            best = default
        cells = [f"{means[x]:.4g}" if x in means else "-" for x in (default, best)]
        point, known = json.loads(best), json.loads(default)
        said = ", ".join(f"{k} = {x!r}" for k, x in point.items() if x != known[k])
        lines.append([name, f"{len(means)}", *cells, said or "the defaults"])
        for key, value in point.items():
            record, _, field = key.partition(".")
            chosen.setdefault(record, {}).setdefault(field, value)
    heads = ["family", "points", "defaults, ms", "fastest, ms", "the fastest"]
    return table(heads, lines), chosen
