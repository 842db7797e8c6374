"""The quick part and the rest are every case, and the quick one meets every pair of values."""

import itertools

import pytest
from parts import cover

pytest_plugins = ["pytester"]


@pytest.mark.parametrize("sizes", [(), (3,), (1, 4), (2, 3), (5, 7, 2), (7, 1, 5, 4, 4, 2)])
def test_every_pair_of_values_meets(sizes):
    rows = cover(sizes)
    assert all(0 <= i < n for row in rows for i, n in zip(row, sizes, strict=True))
    for (a, n), (b, m) in itertools.combinations(enumerate(sizes), 2):
        assert {(row[a], row[b]) for row in rows} == set(itertools.product(range(n), range(m)))
    assert rows == cover(sizes) and len(rows) <= 2 * max([1, *sizes]) ** 2


TESTS = """
import pytest

@pytest.mark.pairwise
@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("a", [1, 2, 3])
@pytest.mark.parametrize("b", [{}, [1], None])
@pytest.mark.parametrize(("c", "same"), [("x", 0), ("y", 0), ("z", 1)])
def test_product(a, b, c, same, device):
    pass

@pytest.mark.slow
def test_slow():
    pass

def test_quick():
    pass
"""


def test_the_parts_are_the_whole(pytester):
    pytester.makepyfile(test_it=TESTS)
    found = {}
    for part in ("quick", "rest", "all"):
        run = pytester.runpytest("--part", part, "-p", "parts", "-v", "-p", "no:cacheprovider")
        found[part] = {x.split()[0] for x in run.outlines if x.endswith("]") and "PASSED" in x}
    assert found["quick"] | found["rest"] == found["all"] and len(found["all"]) == 56
    assert not found["quick"] & found["rest"]
    assert "test_it.py::test_quick" in found["quick"] and "test_it.py::test_slow" in found["rest"]
    for device in ("cpu", "gpu"):
        assert 9 <= sum(f"-{device}]" in name for name in found["quick"]) <= 12
