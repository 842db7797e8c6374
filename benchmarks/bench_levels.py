"""A small set of micro-benchmarks, one group a level: `pytest benchmarks --benchmark-only`.

`mapo-kernels bench` measures more, against the roofs of the machine, and writes result files.
"""

from functools import cache

import pytest
import torch

from benchmarks.case import OURS, TOLERANCE, evaluate, relative_error
from benchmarks.harness import Clock, regions
from benchmarks.suites import quick_cases
from benchmarks.vocabulary import ALL

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The quick suite's largest case of each level over tokens.
CASES = {case.level: case for case in quick_cases() if case.sweep == "tokens"}
PAIRS = [(level, name) for level in CASES for name in ALL[level].providers]


@cache
def inputs_and_truth(level):
    torch.manual_seed(0)
    case = CASES[level]
    inputs = ALL[level].make(case, torch.Generator().manual_seed(0), DEVICE)
    return inputs, ALL[level].truth(inputs)


@pytest.mark.parametrize(("level", "name"), PAIRS, ids=[f"{x}: {y}" for x, y in PAIRS])
def bench_level(benchmark, level, name):
    case, provider = CASES[level], ALL[level].providers[name]
    benchmark.group = f"{level}, {case.shape}"
    reason = provider.unavailable(case, DEVICE)
    if reason:
        pytest.skip(f"{name}: {reason}")
    inputs, truth = inputs_and_truth(level)
    direction = case.directions[0]
    error = relative_error(evaluate(provider, inputs, direction), truth)
    if not error <= TOLERANCE[case.dtype]:
        tell = pytest.fail if name == OURS else pytest.skip
        tell(f"{name} is wrong: relative error {error:.1e} of its result")
    benchmark.extra_info.update(error=error, live=inputs.live)
    prepare, region = regions(provider, [inputs], direction)
    clock = Clock(DEVICE)

    def timed(given):
        found = region(given)
        clock.synchronize()
        return found

    benchmark.pedantic(timed, setup=lambda: ((prepare(0),), {}), rounds=10, warmup_rounds=2)
