"""What pytest collects: every provider on every case of the suite that `harness.Run` brings."""

import pytest

# On a GPU the fixture of pytest-benchmark stays unused: it would time the launches.
pytestmark = pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")


def bench_level(run, benchmark, case, name):
    run.bench(case, name, benchmark)
