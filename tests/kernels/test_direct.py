"""Launches that leave out Triton's own look-up: which they are, and when they are not."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("triton")


@cache
def launched():
    """What `direct_launches.py` prints; compiled for a GPU that is not there."""
    root = Path(__file__).parents[2]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = [str(root), *filter(None, [environment.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, str(root / "tests/kernels/direct_launches.py")],
        capture_output=True,
        text=True,
        cwd=root,
        env=environment | {"PYTHONPATH": os.pathsep.join(path)},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def column(case, name):
    return [line[name] for line in launched()[case]["launches"]]


def looked_up(case):
    return launched()[case]["looked_up"]


def test_this_triton_is_understood():
    assert launched()["is_understood"] and not launched()["takes a tool for Triton"]


def test_the_second_launch_is_direct():
    first, *others = launched()["again"]["launches"]
    assert looked_up("again") == 1 and len(others) == 2
    assert all(line == first for line in others)


def test_values_that_compile_nothing_are_those_of_the_launch():
    assert looked_up("values") == 0
    assert column("values", "n") == [7, 9]
    assert column("values", "grid") == [[4, 1, 1], [3, 1, 1]]
    first, second = column("values", "x")
    assert second == first + 16


def test_another_alignment_is_another_variant():
    aligned, shifted, shifted_too, back = column("alignment", "function")
    assert aligned == back != shifted == shifted_too
    assert looked_up("alignment") == 1


def test_another_dtype_or_an_absent_tensor_is_another_variant():
    some, none, half, again, half_again = column("arguments", "function")
    assert len({some, none, half}) == 3 and (again, half_again) == (some, half)
    assert looked_up("arguments") == 2
    assert column("arguments", "y") == [True, False, True, True, True]


def test_integers_are_specialised_as_triton_does():
    one, many, odd, one_again, many_too, odd_too = column("integers", "function")
    assert len({one, many, odd}) == 3 and (one_again, many_too, odd_too) == (one, many, odd)
    assert column("integers", "step") == [1, 16, 3, 1, 48, 5]


def test_keywords_are_part_of_a_variant():
    four, eight, *again, larger = column("keywords", "function")
    assert four != eight and again == [four, eight] and larger not in (four, eight)
    assert column("keywords", "block") == [16, 16, 16, 16, 32]


def test_each_device_has_its_own():
    first, second, second_again, first_again = column("devices", "function")
    assert first == first_again != second == second_again
    assert column("devices", "device") == [0, 1, 1, 0]


def test_the_stream_is_the_current_one():
    assert column("streams", "stream") == [7, 8]
    assert looked_up("streams") == 0


def test_what_triton_forgot_is_not_launched():
    before, after, again = column("compiled again", "function")
    assert before != after == again
    assert looked_up("compiled again") == 1


def test_threads_do_not_mix_up_variants_or_streams():
    first, *lines = launched()["threads"]["launches"]
    assert len(lines) == 400
    aligned = {line["function"] for line in lines if line["x"] % 16 == 0}
    shifted = {line["function"] for line in lines if line["x"] % 16}
    assert len(aligned) == 1 and shifted == {first["function"]} and aligned != shifted
    start = min(line["x"] for line in lines)
    for line in lines:
        assert line["n"] == line["stream"] == (line["x"] - start) // 16


@pytest.mark.parametrize("case", ["hook", "pre-run hook"])
def test_a_hook_sees_launches(case):
    assert looked_up(case) == 1
    assert launched()["hook"]["seen"] == 1


def test_settings_of_triton_are_part_of_a_variant():
    assert looked_up("debug") == 1


def test_a_tool_that_takes_the_place_of_run_sees_launches():
    assert launched()["tool"] == {"launches": [], "looked_up": 0, "seen": [[3]]}
