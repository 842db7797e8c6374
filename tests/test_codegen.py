"""Machine code of what the public functions launch, for GPUs that are not there."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
TOKENS_PER_THREAD = 4


@cache
def compile_for(target):
    root = Path(__file__).parents[1]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(root / "tests/codegen.py"), target],
        capture_output=True,
        text=True,
        cwd=root,
        env=environment | {"PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def compile_case(target, case):
    return compile_for(target)[case]


def wide(accesses):
    """Accesses of 16 bytes, and narrower ones, of the kernel's vector loads and stores."""
    return sum(n for name, n in accesses.items() if name.endswith((".128", "x4")))


@pytest.mark.parametrize(
    "case",
    ["clip", "bfloat16", "odd length", "packed", "sequence level", "sapo", "cispo"]
    + ["groups of 16", "groups of 4096", "ids", "many ids"],
)
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_leaves_the_registers(target, case):
    for name, variants in compile_case(target, case)["kernels"].items():
        for variant in variants:
            assert variant["stack"] == 0, (name, variant)
            assert variant["spills"] == 0, (name, variant)
            assert variant.get("local", 0) == 0, (name, variant)
            assert variant.get("registers", 0) <= 128, (name, variant)


@pytest.mark.parametrize("target", TARGETS)
def test_aligned_rows_are_read_and_written_16_bytes_at_a_time(target):
    kernels = compile_case(target, "clip")["kernels"]
    (loss,) = kernels["token_loss_kernel"]
    # A thread holds 4 tokens: 16 bytes each of logp, old, ref and the gradient, 4 of the mask.
    assert wide(loss["accesses"]) >= 4
    (scale,) = kernels["scale_kernel"]
    assert wide(scale["accesses"]) >= 2
    (groups,) = compile_case(target, "groups of 4096")["kernels"]["advantages_kernel"]
    assert wide(groups["accesses"]) > 0


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_arithmetic_budget_of_the_loss(target):
    """On an H200 13 bytes of memory traffic take as long as about 90 instructions of one token."""
    (loss,) = compile_case(target, "clip")["kernels"]["token_loss_kernel"]
    assert loss["exponentials"] <= 5 * TOKENS_PER_THREAD
    assert max(loss["loops"]) <= 130 * TOKENS_PER_THREAD
    (plain,) = compile_case(target, "no reference")["kernels"]["token_loss_kernel"]
    assert plain["exponentials"] <= 2 * TOKENS_PER_THREAD
    assert max(plain["loops"]) <= 90 * TOKENS_PER_THREAD


def test_a_loss_is_two_launches():
    for case in ("clip", "sequence level", "packed"):
        launches = compile_case("sm_90", case)["launches"]
        assert launches == ["token_loss_kernel", "scale_kernel"]
    assert compile_case("sm_90", "groups of 16")["launches"] == ["advantages_kernel"]


def test_lengths_and_hyper_parameters_do_not_recompile():
    report = compile_case("sm_90", "ten lengths")
    assert len(report["launches"]) == 20
    assert len(report["kernels"]["token_loss_kernel"]) == 1
    # One more variant where the number of tokens happens to be a multiple of 16.
    assert len(report["kernels"]["scale_kernel"]) <= 2
