"""Correctness first, then memory and time: a row for every provider, case and direction."""

from __future__ import annotations

import gc
import itertools
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

import mapo_kernels

from . import environment, results
from .cases import Case, Effort, cases_of
from .levels import LEVELS, OURS, Inputs, Level, Provider
from .memory import MemoryOfTensors
from .roofs import Roofs
from .timers import Samples, Work

# Relative error of gradients in norm, above which a provider computes something else. Rounding the
# result to bfloat16 makes 0.2%, a softmax of logits rounded to bfloat16 about 1%.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
# Input sets that take turns, at most: small ones stay in the cache, and are bound by their launch.
MAX_SETS = 64
SEED = 20250923
DRY = Effort(0.0, least=1, most=1)
Timer = Callable[[Work, Effort], Samples]
Row = dict[str, Any]


def cache_bytes(device: torch.device) -> int:
    """Bytes of the last cache before memory: what inputs that take turns must exceed."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    name = "SC_LEVEL3_CACHE_SIZE"
    known = os.sysconf(name) if name in getattr(os, "sysconf_names", {}) else 0
    # A server's cache is shared by cores that are not ours.
    return min(max(known, 1 << 22), 1 << 25)


def fresh_leaves(provider: Provider, inputs: Inputs) -> list[torch.Tensor]:
    """Leaves that require a gradient and have none yet; copies where the provider destroys them."""
    return [
        (x.clone() if provider.consumes else x.detach()).requires_grad_() for x in inputs.leaves
    ]


def copy_of(inputs: Inputs) -> Inputs:
    """The same inputs at other addresses."""
    leaves, rest = tree_map_only(torch.Tensor, torch.clone, (inputs.leaves, vars(inputs.rest)))
    return Inputs(leaves, SimpleNamespace(**rest), inputs.live)


def work_of(provider: Provider, inputs: list[Inputs], direction: str) -> Work:
    """What is timed of a provider in a direction; the sets of inputs take turns."""
    turns = itertools.cycle(inputs)

    def leaves() -> Any:
        given = next(turns)
        return fresh_leaves(provider, given), given.rest

    def forward(given: Any) -> Any:
        leaves, rest = given
        return provider.call(*leaves, rest), leaves

    def score(given: Inputs) -> Any:
        with torch.no_grad():
            return provider.call(*given.leaves, given.rest)

    def backward(given: Any) -> Any:
        return torch.autograd.grad(*given)

    if direction == "score":
        return Work(score, lambda: next(turns))
    if direction == "forward":
        return Work(forward, leaves, repeatable=not provider.consumes)
    if direction == "backward":
        return Work(backward, lambda: forward(leaves()), repeatable=False)
    return Work(lambda given: backward(forward(given)), leaves, not provider.consumes)


def evaluate(provider: Provider, inputs: Inputs, direction: str) -> list[torch.Tensor]:
    """The gradients of the leaves, or [values] where the direction has none."""
    found = work_of(provider, [inputs], "score" if direction == "score" else "both")()
    return [found] if direction == "score" else list(found)


def relative_error(actual: list[Any], expected: list[torch.Tensor]) -> float:
    """Largest of ||actual - expected|| / ||expected|| over the tensors; NaN where one has NaN."""
    worst = 0.0
    for a, e in zip(actual, expected, strict=True):
        if a.shape != e.shape:
            return float("nan")
        difference = norm = torch.zeros((), dtype=torch.float64, device=e.device)
        # A part at a time: float64 copies of all logits would be four times their size.
        rows = max(1, (1 << 27) // max(1, e[0].numel()))
        for part, exact in zip(a.split(rows), e.split(rows), strict=True):
            exact = exact.double()
            difference = difference + (part.double() - exact).square().sum()
            norm = norm + exact.square().sum()
        error = float((difference / norm).sqrt()) if float(norm) else float(difference.sqrt())
        if math.isnan(error):
            return error
        worst = max(worst, error)
    return worst


def peak_bytes(work: Work, device: torch.device) -> int:
    """Peak bytes that a call allocates beside what exists already, its argument included."""
    given = work.prepare()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work.region(given)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with MemoryOfTensors() as memory:
        work.region(given)
    return memory.peak


class CaseRun:
    """One case, its inputs drawn and its truth computed once for all providers."""

    def __init__(self, level: Level, case: Case, roofs: Roofs, effort: Effort) -> None:
        self.level, self.case, self.roofs, self.effort = level, case, roofs, effort
        self.device = roofs.device
        torch.manual_seed(SEED)
        self.inputs = [level.make(case, torch.Generator().manual_seed(SEED), self.device)]
        self.truth = level.truth(self.inputs[0])
        self._checked: dict[str, tuple[float, int | None]] = {}

    def fill_cache(self) -> None:
        """Copy the inputs until together they exceed the cache twice."""
        size = sum(x.nbytes for x in self.inputs[0].leaves)
        wanted = min(MAX_SETS, -(-2 * cache_bytes(self.device) // size))
        self.inputs += [copy_of(self.inputs[0]) for _ in range(len(self.inputs), wanted)]

    def measure(self, name: str, direction: str, timer: Timer) -> Row:
        """One row; what cannot run or is wrong is a row that says so, and has no time."""
        row = results.describe(self.case, direction, name, self.inputs[0].live)
        reason = self.level.providers[name].unavailable(self.case, self.device)
        if reason:
            return row | {"status": "unavailable", "reason": reason}
        try:
            return row | self._measure(name, direction, timer)
        except torch.OutOfMemoryError:
            reason = "out of memory"
        except Exception as exception:  # A peer's failure is a finding about the peer.
            first_line = (str(exception).splitlines() or [""])[0]
            reason = f"{type(exception).__name__}: {first_line}"
        finally:
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return row | {"status": "failed", "reason": reason}

    def _measure(self, name: str, direction: str, timer: Timer) -> Row:
        provider = self.level.providers[name]
        error, memory = self._check(name)
        if not error <= TOLERANCE[self.case.dtype]:
            known = error if math.isfinite(error) else None
            return {"status": "wrong", "error": known, "reason": "its result is off"}
        self.fill_cache()
        samples = timer(work_of(provider, self.inputs, direction), self.effort)
        p20, median, p80 = (float(x) for x in np.quantile(samples.ms, (0.2, 0.5, 0.8)))
        counts = self.level.count(self.case, self.inputs[0].live, direction)
        return {
            "status": "ok",
            "error": error,
            "peak_bytes": memory,
            "median_ms": median,
            "p20_ms": p20,
            "p80_ms": p80,
            "timer": samples.timer,
            "launched_ms": samples.launched_ms,
            "samples_ms": [float(f"{x:.5g}") for x in samples.ms],
            **self.roofs.compare(self.case, counts, median),
        }

    def _check(self, name: str) -> tuple[float, int | None]:
        """The error of its result and its peak bytes, found once for all directions."""
        if name not in self._checked:
            provider, direction = self.level.providers[name], self.case.directions[0]
            work = work_of(provider, self.inputs[:1], direction)
            error = relative_error(evaluate(provider, self.inputs[0], direction), self.truth)
            # Counting tensors on a CPU needs every operation to be seen.
            counted = self.device.type == "cuda" or not provider.compiles
            self._checked[name] = error, peak_bytes(work, self.device) if counted else None
        return self._checked[name]


class Run:
    """A suite on this machine: its cases, roofs, and a result that is written as it grows.

    A dry run walks every case of the suite for a GPU with tiny shapes, its kernels interpreted.
    """

    def __init__(self, suite: str, levels: list[str], dry_run: bool) -> None:
        on_gpu = torch.cuda.is_available() and not dry_run
        self.device = torch.device("cuda" if on_gpu else "cpu")
        self.suite, self.dry_run = suite, dry_run
        cases, effort = cases_of(suite, torch.device("cuda") if dry_run else self.device)
        cases = [case for case in cases if not levels or case.level in levels]
        self.cases = list(dict.fromkeys(case.tiny() for case in cases)) if dry_run else cases
        self.effort = DRY if dry_run else effort
        self.began = time.perf_counter()
        self.path: Path | None = None
        self._current: CaseRun | None = None

    @property
    def items(self) -> list[tuple[Case, str, str]]:
        """What is measured, in order: case, provider, direction."""
        return [
            (case, name, direction)
            for case in self.cases
            for name in LEVELS[case.level].providers
            for direction in case.directions
        ]

    def start(self, path: Path | None, commit: str | None = None, **about: Any) -> None:
        """Measure the roofs; from here on each row is written to `path`, where there is one."""
        if self.dry_run:
            mapo_kernels.set_backend("triton")
        self.path, self.roofs = path, Roofs(self.device, self.effort, tiny=self.dry_run)
        self.result: dict[str, Any] = {
            "format": results.FORMAT,
            "suite": self.suite,
            "dry_run": self.dry_run,
            **about,
            "environment": environment.describe(commit),
            "rows": [],
        }
        self.save()

    def save(self) -> None:
        """Write what there is; it is finished once it has a row for every item."""
        finished = len(self.result["rows"]) == len(self.items)
        if finished:
            self.result["environment"]["gpu_state_after"] = environment.gpu_state()
        self.result["finished"] = finished
        self.result["seconds"] = time.perf_counter() - self.began
        self.result["roofs"] = self.roofs.as_dict()
        if self.path is not None:
            results.write(self.result, self.path)

    def measure(self, case: Case, name: str, direction: str, timer: Timer) -> Row:
        """Measure one item and write its row."""
        if self._current is None or self._current.case != case:
            if self._current is None or self._current.case.level != case.level:
                # What one level compiled would count against the next one's recompilations.
                torch.compiler.reset()
            self._current = None  # Its tensors go before the next ones come.
            self._current = CaseRun(LEVELS[case.level], case, self.roofs, self.effort)
        row = self._current.measure(name, direction, timer)
        self.result["rows"].append(row)
        self.save()
        return row


def is_bad(row: Row) -> bool:
    """Whether our own numbers are wrong or missing: a run with such a row fails."""
    return row["provider"].startswith(OURS) and row["status"] in ("wrong", "failed")
