"""Correctness first, then time and peak memory of one provider on one case."""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .case import TOLERANCE, Case, Inputs, Level, Provider, evaluate, fresh_leaves, relative_error
from .memory import MemoryOfTensors
from .roofs import Roofs

# Input sets that a rotation holds at most; beyond it the cache is overwritten between samples.
MAX_SETS = 4
SEED = 20250923


@dataclass(frozen=True)
class Effort:
    """How long one measurement may take: its samples stop at `seconds` or at `most`."""

    seconds: float = 0.3
    least: int = 5
    most: int = 50
    warmup: int = 2


def cache_bytes(device: torch.device) -> int:
    """Bytes of the last cache before memory: what rotating inputs must exceed."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    name = "SC_LEVEL3_CACHE_SIZE"
    known = os.sysconf(name) if name in getattr(os, "sysconf_names", {}) else 0
    # A server's cache is shared by cores that are not ours.
    return min(max(known, 1 << 22), 1 << 25)


class Clock:
    """Times regions on a device: with events on a GPU, by the wall on a CPU."""

    def __init__(self, device: torch.device) -> None:
        """`device` is where the regions' work runs."""
        self.on_gpu = device.type == "cuda"
        self.device = device
        self._eraser = torch.empty(2 * cache_bytes(device), dtype=torch.uint8, device=device)

    def synchronize(self) -> None:
        """Wait for what was queued."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def samples(
        self,
        prepare: Callable[[int], Any],
        region: Callable[[Any], Any],
        effort: Effort,
        erase: bool = False,
    ) -> tuple[list[float], list[float]]:
        """Milliseconds of the device, and of the calling thread, in each run of `region`.

        `prepare(i)` makes its argument outside the time. With `erase` the device's cache is
        overwritten before each run.
        """
        device_ms: list[Any] = []
        host_ms: list[float] = []
        for i in range(effort.warmup):
            region(prepare(i))
        self.synchronize()
        began = time.perf_counter()
        for i in range(effort.most):
            given = prepare(i)
            if erase:
                self._eraser.zero_()
            start, end = self._mark(), None
            host = time.perf_counter()
            region(given)
            host_ms.append((time.perf_counter() - host) * 1e3)
            end = self._mark()
            device_ms.append((start, end))
            del given
            if i + 1 >= effort.least and time.perf_counter() - began > effort.seconds:
                break
            if self.on_gpu and i % 8 == 7:
                # Bounds the queue, so that the clock on the wall sees the work.
                self.synchronize()
        self.synchronize()
        return [self._between(*pair) for pair in device_ms], host_ms

    def _mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) if self.on_gpu else (end - start) * 1e3


def quantiles(samples: list[float]) -> dict[str, float]:
    """Median with the 20% and 80% quantiles."""
    if len(samples) < 2:
        return {"median_ms": samples[0], "p20_ms": samples[0], "p80_ms": samples[0]}
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return {
        "median_ms": statistics.median(samples),
        "p20_ms": fifths[0],
        "p80_ms": fifths[3],
    }


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """Peak bytes that a call allocates beside what exists already."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with MemoryOfTensors() as memory:
        function()
    return memory.peak


class CaseRun:
    """One case, its inputs drawn and its truth computed once for all providers."""

    def __init__(self, level: Level, case: Case, clock: Clock, roofs: Roofs) -> None:
        """Draw the first set of inputs and compute the exact gradients."""
        self.level, self.case, self.clock, self.roofs = level, case, clock, roofs
        self.inputs = [self._draw(0)]
        self.truth = level.truth(self.inputs[0])

    def _draw(self, i: int) -> Inputs:
        torch.manual_seed(SEED + i)
        generator = torch.Generator().manual_seed(SEED + i)
        return self.level.make(self.case, generator, self.clock.device)

    def _rotate(self) -> bool:
        """Draw sets of inputs until they exceed the cache; whether it must be erased instead."""
        enough = 2 * cache_bytes(self.clock.device)
        size = self.inputs[0].nbytes
        if size * MAX_SETS < enough:
            return True
        while len(self.inputs) * size < enough:
            self.inputs.append(self._draw(len(self.inputs)))
        return False

    def describe(self, name: str, direction: str) -> dict[str, Any]:
        """The part of a row that needs no measurement."""
        case, first = self.case, self.inputs[0]
        return {
            "level": case.level,
            "shape": case.shape,
            "direction": direction,
            "provider": name,
            "sweep": case.sweep,
            "dtype": str(case.dtype).removeprefix("torch."),
            "tokens": case.batch.tokens,
            "group_size": case.batch.group_size,
            "padding": case.batch.padding,
            "no_signal": case.batch.no_signal,
            "live": first.live,
            "head": case.head.name or None,
            "width": case.head.width or None,
            "vocab": case.head.vocab or None,
        }

    def measure(self, name: str, provider: Provider, effort: Effort) -> list[dict[str, Any]]:
        """A row for each direction; what cannot run or is wrong is a row that says so."""
        rows = [self.describe(name, direction) for direction in self.case.directions]
        reason = provider.unavailable(self.case, self.clock.device)
        if reason:
            return [row | {"status": "unavailable", "reason": reason} for row in rows]
        try:
            error = self._gate(provider)
            if not error <= TOLERANCE[self.case.dtype]:
                wrong = {"status": "wrong", "error": error if math.isfinite(error) else None}
                return [row | wrong | {"reason": "its result is off"} for row in rows]
            memory = self._memory(provider)
            return [
                row | {"status": "ok", "error": error, "peak_bytes": memory}
                | self._time(provider, row["direction"], effort)
                for row in rows
            ]  # fmt: skip
        except torch.OutOfMemoryError:
            failed = {"status": "failed", "reason": "out of memory"}
        except Exception as exception:  # A peer's failure is a finding about the peer.
            first_line = (str(exception).splitlines() or [""])[0]
            failed = {"status": "failed", "reason": f"{type(exception).__name__}: {first_line}"}
        finally:
            gc.collect()
            if self.clock.on_gpu:
                torch.cuda.empty_cache()
        return [row | failed for row in rows]

    def _gate(self, provider: Provider) -> float:
        direction = self.case.directions[0]
        return relative_error(evaluate(provider, self.inputs[0], direction), self.truth)

    def _memory(self, provider: Provider) -> int | None:
        if not self.clock.on_gpu and provider.compiles:
            return None  # Counting tensors on a CPU needs every operation to be seen.
        inputs, direction = self.inputs[0], self.case.directions[0]
        if not provider.consumes or direction == "score":
            return peak_bytes(lambda: evaluate(provider, inputs, direction), self.clock.device)
        leaves = fresh_leaves(provider, inputs)
        return peak_bytes(
            lambda: torch.autograd.grad(provider.call(*leaves, inputs.rest), leaves),
            self.clock.device,
        )

    def _time(self, provider: Provider, direction: str, effort: Effort) -> dict[str, Any]:
        erase = self._rotate()
        prepare, region = regions(provider, self.inputs, direction)
        device_ms, host_ms = self.clock.samples(prepare, region, effort, erase)
        counts = self.level.count(self.case, self.inputs[0].live, direction)
        found = quantiles(device_ms)
        return (
            found
            | {
                "samples_ms": [float(f"{x:.5g}") for x in device_ms],
                "host_ms": statistics.median(host_ms),
            }
            | self.roofs.compare(self.case, counts, found["median_ms"])
        )


def regions(
    provider: Provider, inputs: list[Inputs], direction: str
) -> tuple[Callable[[int], Any], Callable[[Any], Any]]:
    """What is prepared outside the time, and what is timed; input sets take turns."""

    def leaves_of(i: int) -> Any:
        given = inputs[i % len(inputs)]
        return fresh_leaves(provider, given), given.rest

    def forward(given: Any) -> Any:
        leaves, rest = given
        return provider.call(*leaves, rest), leaves

    def score(given: Any) -> Any:
        with torch.no_grad():
            return provider.call(*given.leaves, given.rest)

    def backward(given: Any) -> Any:
        return torch.autograd.grad(*given)

    if direction == "score":
        return lambda i: inputs[i % len(inputs)], score
    if direction == "forward":
        return leaves_of, forward
    if direction == "backward":
        return lambda i: forward(leaves_of(i)), backward
    return leaves_of, lambda given: backward(forward(given))
