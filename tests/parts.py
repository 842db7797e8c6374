"""The parts of the suite: `--part quick` (the default), `--part rest`, `--part all`.

| marker | in the quick part |
|---|---|
| none | every case |
| `pairwise` | on each backend, so few combinations that any two values of two arguments meet |
| `slow` | none: another test reaches the same branches in less time |

The rest is what the quick part leaves out; `make test` runs the one and `make test-full` the other.

With several processes, the tests of a file stay in one, and those that start ranks, too: ranks take
longer to start than most of what they do. What takes the longest goes first.
"""

import math
from collections import defaultdict

import pytest
from allpairspy import AllPairs

# What one process runs, by its first folders and files; the longest first.
LONGEST = (
    "tests/distributed/",
    "tests/kernels/test_codegen.py",
    "tests/kernels/test_compile.py",
    "tests/benchmarks/test_benchmarks.py",
    "tests/property/test_property_invariants.py",
    "tests/levels/",
)
TOGETHER = "tests/distributed/"


def pytest_addoption(parser):
    parser.addoption(
        "--part",
        choices=("quick", "rest", "all"),
        default="quick",
        help="which part of the tests to run: tests/parts.py says what is in them",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "pairwise: quick with combinations that cover all pairs")
    config.addinivalue_line("markers", "slow: not in the quick part")


def pytest_report_header(config):
    return f"part: {config.getoption('--part')} (make test runs quick, make test-full the rest)"


def cover(sizes):
    """Combinations, one index for each of `sizes`, in which every two values of two axes meet."""
    axes = [range(size) for size in sizes if size > 1]
    if len(axes) < 2:
        chosen = [(i,) * len(axes) for i in range(max(sizes, default=1))]
    else:
        chosen = [tuple(values) for values in AllPairs(axes)]
    return {tuple(next(row) if n > 1 else 0 for n in sizes) for row in map(iter, chosen)}


def column(values):
    """Each value's number in order of appearance; values are compared by identity."""
    numbers = {}
    return tuple(numbers.setdefault(id(value), len(numbers)) for value in values)


def quick_of(cases):
    """Of one test's cases on one backend: those in the quick part.

    Cases that are no full product (some were named on the command line) are all quick.
    """
    params = [case.callspec.params for case in cases]
    columns = []
    for numbers in sorted((column(p[name] for p in params) for name in params[0]), key=max)[::-1]:
        # Of arguments that are parametrized together, one decides the others.
        pairs = [len(set(zip(x, numbers, strict=True))) for x in columns]
        if all(n > max(x) + 1 for n, x in zip(pairs, columns, strict=True)):
            columns.append(numbers)
    sizes = [max(numbers) + 1 for numbers in columns]
    if len(cases) != math.prod(sizes):
        return cases
    chosen = cover(sizes)
    return [
        case for case, row in zip(cases, zip(*columns, strict=True), strict=True) if row in chosen
    ]


def place_of(nodeid):
    """Where a test comes in the order of `LONGEST`."""
    return next((i for i, name in enumerate(LONGEST) if nodeid.startswith(name)), len(LONGEST))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return TOGETHER if nodeid.startswith(TOGETHER) else nodeid.split("::")[0]

    return Scheduler(config, log)


# Before the selections by name and by marker, which would leave no full product.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    part = config.getoption("--part")
    tests = defaultdict(list)
    for item in items:
        if item.get_closest_marker("pairwise"):
            tests[item.nodeid.split("[")[0], item.callspec.params.get("device")].append(item)
    cut = {item for item in items if item.get_closest_marker("slow")}
    cut |= {item for cases in tests.values() for item in set(cases) - set(quick_of(cases))}
    items.sort(key=lambda item: place_of(item.nodeid))
    if part == "all":
        return
    config.hook.pytest_deselected(items=[x for x in items if (x in cut) == (part == "quick")])
    items[:] = [item for item in items if (item in cut) == (part == "rest")]
