"""Every provider on every case of a suite: a row of the result each."""

from functools import partial

import pytest

from mapo_kernels.files import CommandError

from .harness import is_bad
from .timers import on_cpu, on_gpu

# On a GPU the fixture of pytest-benchmark stays unused: it would time the launches.
pytestmark = pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")


def bench_level(run, benchmark, case, name, direction):
    if benchmark.disabled:
        pytest.skip("pytest-benchmark is disabled")
    benchmark.group = f"{case.level}, {case.shape}, {direction}"
    timer = on_gpu if run.device.type == "cuda" else partial(on_cpu, benchmark=benchmark)
    try:
        row = run.measure(case, name, direction, timer)
    except CommandError as error:  # Nothing that follows could be kept.
        pytest.exit(str(error), returncode=1)
    if row["status"] == "unavailable":
        pytest.skip(f"{name}: {row['reason']}")
    if row["status"] != "ok":
        # A peer that is wrong is a finding about the peer.
        say = pytest.fail if is_bad(row) else pytest.xfail
        say(f"{name} is {row['status']}: {row['reason']}")
    benchmark.extra_info.update(error=row["error"], live=row["live"])
