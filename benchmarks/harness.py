"""Correctness first, then memory and time: a row for every provider and case of a suite."""

from __future__ import annotations

import copy
import gc
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mapo_kernels
from mapo_kernels.files import CommandError

from . import environment, results
from .cases import EFFORTS, Case, Effort, cases_of
from .levels import NEVER_CLIPPED, Inputs, draw, least, truth
from .memory import peak_bytes
from .providers import OURS, PROVIDERS
from .report import Row
from .roofs import Roofs
from .timers import Samples, Work, on_cpu, on_gpu

# Relative error of gradients in norm, above which a provider computes something else. Rounding the
# result to bfloat16 makes 0.2%, a softmax of logits rounded to bfloat16 about 1%.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
# Input sets that take turns, at most: small ones stay in the cache, and are bound by their launch.
MAX_SETS = 64
DRY = Effort(0.0, least=1, most=1)
Call = Callable[..., Tensor]  # of a provider
Timer = Callable[[Work, Effort], Samples]


def cache_bytes(device: torch.device) -> int:
    """Bytes of the last cache before memory: what inputs that take turns must exceed."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return 1 << 25  # A server's is larger, and shared by cores that are not ours.


def work_of(call: Call, inputs: list[Inputs], direction: str) -> Work:
    """What is timed of a provider: [values], or the leaves' gradients; inputs take turns."""
    turns = itertools.cycle(inputs)

    @torch.no_grad()
    def score() -> list[Tensor]:
        given = next(turns)
        return [call(*given.leaves, given.rest)]

    def both() -> tuple[Tensor, ...]:
        given = next(turns)
        leaves = [x.detach().requires_grad_() for x in given.leaves]
        return torch.autograd.grad(call(*leaves, given.rest), leaves)

    return score if direction == "score" else both


def relative_error(actual: Any, expected: list[Tensor]) -> float:
    """Largest of ||actual - expected|| / ||expected|| over the tensors; NaN where one has NaN."""
    if any(a.shape != e.shape for a, e in zip(actual, expected, strict=True)):
        return math.nan
    norm = partial(torch.linalg.vector_norm, dtype=torch.float64)
    errors = [norm(a - e) / (norm(e) or 1.0) for a, e in zip(actual, expected, strict=True)]
    return float(torch.stack(errors).max())


class CaseRun:
    """One case, its inputs drawn and its truth computed once for all providers.

    What is timed are copies: some write over their input, and together they exceed the cache twice.
    """

    def __init__(self, case: Case, roofs: Roofs) -> None:
        self.case, self.roofs = case, roofs
        self.inputs = draw(case, roofs.device)
        self.truth = truth(case, self.inputs)
        size = sum(x.nbytes for x in self.inputs.leaves)
        n_copies = min(MAX_SETS, -(-2 * cache_bytes(roofs.device) // size))
        self.copies = [copy.deepcopy(self.inputs) for _ in range(n_copies)]
        for found in self.copies:
            found.rest.spec = NEVER_CLIPPED

    def work(self, call: Call) -> Work:
        """What is timed of a provider."""
        return work_of(call, self.copies, self.case.direction)

    def check(self, call: Call) -> Row:
        """Its error against float64."""
        fresh = self.inputs._replace(leaves=tuple(x.clone() for x in self.inputs.leaves))
        error = relative_error(work_of(call, [fresh], self.case.direction)(), self.truth)
        if error <= TOLERANCE[self.case.dtype]:
            return {"status": "ok", "error": error}
        known = error if math.isfinite(error) else None
        return {"status": "wrong", "error": known, "reason": "its result is off"}

    def measure(self, name: str, timer: Timer) -> Row:
        """One row; what cannot run or is wrong is a row that says so, and has no time."""
        provider = PROVIDERS[self.case.level][name]
        row = {**self.case.as_row(), "provider": name, "live": self.inputs.live}
        reason = provider.unavailable(self.case, self.roofs.device)
        if reason is not None:
            return row | {"status": "unavailable", "reason": reason}
        row |= results.attempt(partial(self._measure, provider.call, timer))
        gc.collect()
        torch.cuda.empty_cache()
        return row

    def _measure(self, call: Call, timer: Timer) -> Row:
        row = self.check(call)
        if row["status"] != "ok":
            return row
        row["peak_bytes"] = peak_bytes(self.work(call), self.roofs.device)
        samples = timer(self.work(call), self.roofs.effort)
        low, median, high = (float(x) for x in np.quantile(samples.ms, (0.2, 0.5, 0.8)))
        row |= {"p20_ms": low, "median_ms": median, "p80_ms": high}
        row |= {"timer": samples.timer, "launched_ms": samples.launched_ms}
        row["samples_ms"] = [float(f"{x:.5g}") for x in samples.ms]
        counts = least(self.case, self.inputs.live)
        return row | self.roofs.compare(self.case, *counts, median)


class Run:
    """A suite on this machine, a plugin of pytest; its result is written as it grows.

    A dry run walks every case of the suite for a GPU with tiny shapes, its kernels interpreted.
    """

    def __init__(self, path: Path, about: results.About, levels: Sequence[str] = ()) -> None:
        """Run a GPU's parity tests, measure the roofs; from here on rows are written to `path`."""
        suite, dry_run = about.suite, about.dry_run
        has_gpu = torch.cuda.is_available() and not dry_run
        parity = environment.passes_parity() if has_gpu and suite == "gpu" else None
        if dry_run:
            mapo_kernels.set_backend("triton")
        cases = cases_of(suite, has_gpu or dry_run)
        # What is measured, in order; compiling would take longer than all else that is quick.
        self.items = [
            (case, name)
            for case in dict.fromkeys(case.tiny() if dry_run else case for case in cases)
            if not levels or case.level in levels
            for name, provider in PROVIDERS[case.level].items()
            if not (suite == "quick" and provider.compiles)
        ]
        effort = DRY if dry_run else EFFORTS[suite]
        self.roofs = Roofs(torch.device("cuda" if has_gpu else "cpu"), effort, tiny=dry_run)
        more = {"parity": parity, "roofs": self.roofs.found}
        self.file = results.Growing(path, about, len(self.items), **more)
        self._current: CaseRun | None = None

    def measure(self, case: Case, name: str, timer: Timer) -> Row:
        """Measure one item and write its row."""
        if self._current is None or self._current.case != case:
            if self._current is None or self._current.case.level != case.level:
                # What one level compiled would count against the next one's recompilations.
                torch.compiler.reset()
            self._current = None  # Its tensors go before the next ones come.
            self._current = CaseRun(case, self.roofs)
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
    timer = on_gpu if run.roofs.device.type == "cuda" else partial(on_cpu, benchmark=benchmark)
    try:
        row = run.measure(case, name, timer)
    except CommandError as error:  # Nothing that follows could be kept.
        pytest.exit(str(error), returncode=1)
    # Wrong numbers of ours fail the run; a peer that is wrong is a finding about the peer.
    if row["status"] != "ok" and name.startswith(OURS):
        pytest.fail(f"{name} is {row['status']}: {row['reason']}")
