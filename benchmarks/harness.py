"""Correctness first, then memory and time: a row for every provider and case of a suite."""

from __future__ import annotations

import copy
import gc
import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mapo_kernels
from mapo_kernels.files import CommandError

from . import environment, results
from .cases import EFFORTS, Case, Effort, cases_of
from .levels import Inputs, draw, least, truth
from .memory import peak_bytes
from .providers import OURS, PROVIDERS, Provider
from .roofs import Roofs
from .timers import Samples, Work, on_cpu, on_gpu

# Relative error of gradients in norm, above which a provider computes something else. Rounding the
# result to bfloat16 makes 0.2%, a softmax of logits rounded to bfloat16 about 1%.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
# Input sets that take turns, at most: small ones stay in the cache, and are bound by their launch.
MAX_SETS = 64
DRY = Effort(0.0, least=1, most=1)
Timer = Callable[[Work, Effort], Samples]
Row = dict[str, Any]


def cache_bytes(device: torch.device) -> int:
    """Bytes of the last cache before memory: what inputs that take turns must exceed."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return 1 << 25  # A server's is larger, and shared by cores that are not ours.


def work_of(provider: Provider, inputs: list[Inputs], direction: str) -> Work:
    """What is timed: [values], or the leaves' gradients; the sets of inputs take turns."""
    turns = itertools.cycle(inputs)
    if direction == "score":

        @torch.no_grad()
        def score(given: Inputs) -> list[torch.Tensor]:
            return [provider.call(*given.leaves, given.rest)]

        return Work(score, lambda: next(turns))

    def with_leaves() -> Inputs:
        """Leaves that have no gradient yet; copies where the provider destroys them."""
        given = next(turns)
        leaves = [x.clone() if provider.consumes else x.detach() for x in given.leaves]
        return given._replace(leaves=tuple(x.requires_grad_() for x in leaves))

    def both(given: Inputs) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(provider.call(*given.leaves, given.rest), given.leaves)

    return Work(both, with_leaves, repeatable=not provider.consumes)


def relative_error(actual: Any, expected: list[torch.Tensor]) -> float:
    """Largest of ||actual - expected|| / ||expected|| over the tensors; NaN where one has NaN."""
    if any(a.shape != e.shape for a, e in zip(actual, expected, strict=True)):
        return math.nan
    norm = partial(torch.linalg.vector_norm, dtype=torch.float64)
    errors = [norm(a - e) / (norm(e) or 1.0) for a, e in zip(actual, expected, strict=True)]
    return float(torch.stack(errors).max())


class CaseRun:
    """One case, its inputs drawn and its truth computed once for all providers."""

    def __init__(
        self, case: Case, roofs: Roofs, effort: Effort, inputs: Inputs | None = None
    ) -> None:
        self.case, self.roofs, self.effort = case, roofs, effort
        self.inputs = [draw(case, roofs.device) if inputs is None else inputs]
        self.truth = truth(case, self.inputs[0])

    def fill_cache(self) -> None:
        """Copy the inputs until together they exceed the cache twice."""
        size = sum(x.nbytes for x in self.inputs[0].leaves)
        wanted = min(MAX_SETS, -(-2 * cache_bytes(self.roofs.device) // size))
        while len(self.inputs) < wanted:
            self.inputs.append(copy.deepcopy(self.inputs[0]))

    def measure(self, name: str, timer: Timer) -> Row:
        """One row; what cannot run or is wrong is a row that says so, and has no time."""
        provider = PROVIDERS[self.case.level][name]
        row = {**self.case.as_row(), "provider": name, "live": self.inputs[0].live}
        reason = provider.unavailable(self.case, self.roofs.device)
        if reason is not None:
            return row | {"status": "unavailable", "reason": reason}
        try:
            return row | self._measure(provider, timer)
        except torch.OutOfMemoryError:
            return row | {"status": "failed", "reason": "out of memory"}
        except Exception as exception:  # A peer's failure is a finding about the peer.
            first_line = (str(exception).splitlines() or [""])[0]
            return row | {"status": "failed", "reason": f"{type(exception).__name__}: {first_line}"}
        finally:
            gc.collect()
            torch.cuda.empty_cache()

    def _measure(self, provider: Provider, timer: Timer) -> Row:
        once = work_of(provider, self.inputs[:1], self.case.direction)
        error = relative_error(once(), self.truth)
        if not error <= TOLERANCE[self.case.dtype]:
            known = error if math.isfinite(error) else None
            return {"status": "wrong", "error": known, "reason": "its result is off"}
        memory = peak_bytes(partial(once.region, once.prepare()), self.roofs.device)
        self.fill_cache()
        samples = timer(work_of(provider, self.inputs, self.case.direction), self.effort)
        quantiles = [float(x) for x in np.quantile(samples.ms, (0.2, 0.5, 0.8))]
        return {
            "status": "ok",
            "error": error,
            "peak_bytes": memory,
            **dict(zip(("p20_ms", "median_ms", "p80_ms"), quantiles, strict=True)),
            "timer": samples.timer,
            "launched_ms": samples.launched_ms,
            "samples_ms": [float(f"{x:.5g}") for x in samples.ms],
            **self.roofs.compare(self.case, least(self.case, self.inputs[0].live), quantiles[1]),
        }


class Run:
    """A suite on this machine, a plugin of pytest; its result is written as it grows.

    A dry run walks every case of the suite for a GPU with tiny shapes, its kernels interpreted.
    """

    def __init__(self, suite: str, levels: list[str], dry_run: bool) -> None:
        self.suite, self.dry_run = suite, dry_run
        has_gpu = torch.cuda.is_available() and not dry_run
        self.device = torch.device("cuda" if has_gpu else "cpu")
        self.effort = DRY if dry_run else EFFORTS[suite]
        cases = [case.tiny() if dry_run else case for case in cases_of(suite, has_gpu or dry_run)]
        # What is measured, in order; compiling would take longer than all else that is quick.
        self.items = [
            (case, name)
            for case in dict.fromkeys(cases)
            if not levels or case.level in levels
            for name, provider in PROVIDERS[case.level].items()
            if not (suite == "quick" and provider.compiles)
        ]
        self._current: CaseRun | None = None

    def start(self, path: Path, commit: str | None = None, notes: str | None = None) -> None:
        """Run a GPU's parity tests, measure the roofs; from here on rows are written to `path`."""
        checked = self.suite == "gpu" and self.device.type == "cuda"
        parity = environment.parity_tests() if checked else None
        if self.dry_run:
            mapo_kernels.set_backend("triton")
        self.roofs = Roofs(self.device, self.effort, tiny=self.dry_run)
        about = {"suite": self.suite, "dry_run": self.dry_run, "notes": notes, "parity": parity}
        about |= {"environment": environment.describe(commit), "roofs": self.roofs.found}
        self.file = results.Growing(path, about, len(self.items))

    def measure(self, case: Case, name: str, timer: Timer) -> Row:
        """Measure one item and write its row."""
        if self._current is None or self._current.case != case:
            if self._current is None or self._current.case.level != case.level:
                # What one level compiled would count against the next one's recompilations.
                torch.compiler.reset()
            self._current = None  # Its tensors go before the next ones come.
            self._current = CaseRun(case, self.roofs, self.effort)
        row = self._current.measure(name, timer)
        if len(self.file.found["rows"]) == len(self.items) - 1:
            self.file.found["environment"]["gpu_state_after"] = environment.gpu_state()
        self.file.add(row)
        return row

    @pytest.fixture
    def run(self):
        return self

    def pytest_generate_tests(self, metafunc):
        names = [f"{case.level}, {case.shape}: {name}" for case, name in self.items]
        metafunc.parametrize(("case", "name"), self.items, ids=names)


def bench_level(run: Run, benchmark: Any, case: Case, name: str) -> None:
    """What pytest collects: an item is measured, and its row told to pytest."""
    timer = on_gpu if run.device.type == "cuda" else partial(on_cpu, benchmark=benchmark)
    try:
        row = run.measure(case, name, timer)
    except CommandError as error:  # Nothing that follows could be kept.
        pytest.exit(str(error), returncode=1)
    if row["status"] == "unavailable":
        pytest.skip(f"{name}: {row['reason']}")
    if row["status"] != "ok":
        # Wrong numbers of ours fail the run; a peer that is wrong is a finding about the peer.
        say = pytest.fail if name.startswith(OURS) else pytest.xfail
        say(f"{name} is {row['status']}: {row['reason']}")
