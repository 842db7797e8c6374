"""Samples of a piece of work: by pytest-benchmark on a CPU, by Triton's do_bench on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch

from .cases import Effort

Work = Callable[[], Any]  # what is timed, as often as it takes
# Below this a call may take its caller longer than the device: it is timed by graph replay.
SHORT_MS = 1.0
GRAPH_MS = 20.0  # of work in one graph


class Samples(NamedTuple):
    """Milliseconds of each sample, and how they were taken: by the wall, by events or by graphs.

    With `graph` a sample is the mean of the calls in one replay, and `launched_ms` is the median of
    the same call launched from Python.
    """

    ms: list[float]
    timer: str
    launched_ms: float | None = None


def on_cpu(work: Work, effort: Effort, benchmark: Any) -> Samples:
    """By the fixture of pytest-benchmark, which is used up."""
    rounds = effort.most
    if effort.least < effort.most:
        began = time.perf_counter()
        work()  # warms up, too
        seconds = time.perf_counter() - began
        rounds = min(max(int(effort.seconds / seconds), effort.least), effort.most)
    benchmark.pedantic(work, rounds=rounds)
    return Samples([x * 1e3 for x in benchmark.stats.stats.data], "wall")


def on_gpu(work: Work, effort: Effort, graph_below: float = SHORT_MS) -> Samples:
    """By graph replay what is shorter than some milliseconds and can be captured.

    Else by events around each call, with the cache overwritten before it.
    """
    from triton import testing

    launched = statistics.median(testing.do_bench(work, warmup=10, rep=10, return_mode="all"))
    if launched < graph_below and _never_waits(work):
        # What cannot be captured for another reason is timed as the rest is.
        with suppress(RuntimeError):
            replayed = testing.do_bench_cudagraph(work, rep=GRAPH_MS, return_mode="all")
            return Samples(replayed, "graph", launched)
    milliseconds = max(effort.seconds * 1e3, effort.least * launched)
    samples = testing.do_bench(work, warmup=10, rep=milliseconds, return_mode="all")
    return Samples(samples, "events")


def _never_waits(work: Work) -> bool:
    """Whether a call waits for the device nowhere: only such a call can be captured into a graph.

    It is asked first because a capture that fails may leave memory behind.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    except RuntimeError:
        return False
    finally:
        torch.cuda.set_sync_debug_mode(before)
        torch.cuda.synchronize()
    return True
