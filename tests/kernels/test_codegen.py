"""Machine code of what the public functions launch, for GPUs that are not there."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

NVIDIA = [
    pytest.param("sm_80", marks=pytest.mark.slow),
    "sm_90",
    pytest.param("sm_100", marks=pytest.mark.slow),
]
TARGETS = [*NVIDIA, "gfx942"]
TOKENS_PER_THREAD = 4
# Of two targets some cases are quick: those with a budget, and most of sm_90. A case takes seconds.
BUDGETED = ["clip", "logits", "entropy bonus", "split rows", "groups of 4096", "kept columns"]
QUICK = {
    "sm_90": [
        *BUDGETED,
        *("packed", "sequence level", "groups of 16", "ids", "many ids"),
        *("logits view", "logits, given advantages", "float32 logits", "odd vocabulary"),
        *("logits, sequence level", "hidden chunk, entropy bonus", "many rows", "many packed rows"),
    ],
    "gfx942": BUDGETED,
}
EVERY = [
    *QUICK["sm_90"],
    *("bfloat16", "odd length", "sapo", "cispo", "float16 logits", "packed logits"),
    *("cispo, both bounds", "gmpo", "vespo"),
    *("hidden chunk", "hidden chunk, softcap"),
    *("kept columns, float32", "kept columns, odd width"),
]


def on_every_target(cases):
    """Parameters: a target, and a case."""
    return [
        pytest.param(
            target, case, marks=[] if case in QUICK.get(target, ()) else [pytest.mark.slow]
        )
        for target in ("sm_80", "sm_90", "sm_100", "gfx942")
        for case in cases
    ]


@cache
def compiler_for(target):
    """A process that compiles the cases that it is asked for."""
    root = Path(__file__).parents[2]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = [str(root), *filter(None, [environment.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, str(root / "tests/kernels/codegen.py"), target],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env=environment | {"PYTHONPATH": os.pathsep.join(path)},
    )


@cache
def compile_case(target, case):
    compiler = compiler_for(target)
    print(case, file=compiler.stdin, flush=True)
    answer = compiler.stdout.readline()
    assert answer, f"the process that compiles for {target} ended; its error is on stderr"
    return json.loads(answer)


def wide(accesses):
    """Accesses of 16 bytes, and narrower ones, of the kernel's vector loads and stores."""
    return sum(n for name, n in accesses.items() if is_wide(name))


def is_wide(name):
    return name.endswith((".128", "x4"))


@pytest.mark.parametrize(("target", "case"), on_every_target(EVERY))
def test_nothing_leaves_the_registers(target, case):
    for name, variants in compile_case(target, case)["kernels"].items():
        for variant in variants:
            assert variant["stack"] == 0, (name, variant)
            assert variant["spills"] == 0, (name, variant)
            assert variant.get("local", 0) == 0, (name, variant)
            assert variant.get("registers", 0) <= 128, (name, variant)


@pytest.mark.parametrize("case", ["packed, no reference", "odd length, no reference"])
def test_tokens_that_are_read_one_by_one_leave_the_registers_a_little(case):
    """Fewer tokens a thread, or more registers, spill nothing and have less on its way from memory.

    Which is faster a GPU has to say: family "unaligned log-probs" of `mapo-kernels bench tune`.
    """
    (loss,) = compile_case("sm_90", case)["kernels"]["token_loss_kernel"]
    assert loss["registers"] <= 128 and loss["spills"] <= 80


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


@pytest.mark.parametrize("target", TARGETS)
def test_kept_columns_are_read_16_bytes_at_a_time_and_cost_little_else(target):
    """A step of either kernel is 4 rows of 1024 numbers: 32 products a thread."""
    kernels = compile_case(target, "kept columns")["kernels"]
    (products,), sums = kernels["gather_products_kernel"], kernels["gather_sums_kernel"]
    # A thread reads 8 numbers of 4 rows of the weight, and the same 8 of the hidden state.
    assert wide(products["accesses"]) == 5
    assert min(x["instructions"] for x in products["loops"]) <= 4.6 * 32
    for kernel in sums:
        assert wide(kernel["accesses"]) >= 5
        assert min(x["instructions"] for x in kernel["loops"]) <= 5.7 * 32
        assert not [x for x in kernel["accesses"] if x.startswith("STG") and not is_wide(x)]


def longest(kernel):
    """Instructions of the loop over a sequence's tokens: that over sequences has barriers."""
    loops = [x for x in kernel["loops"] if x["exponentials"] and x["stores"] == 1]
    return max(x["instructions"] for x in loops)


@pytest.mark.parametrize("target", NVIDIA)
def test_arithmetic_budget_of_the_loss(target):
    """On an H200 13 bytes of memory traffic take as long as about 90 instructions of one token."""
    (loss,) = compile_case(target, "clip")["kernels"]["token_loss_kernel"]
    assert loss["exponentials"] <= 5 * TOKENS_PER_THREAD
    assert longest(loss) <= 123 * TOKENS_PER_THREAD
    assert loss["registers"] <= 80
    (plain,) = compile_case(target, "no reference")["kernels"]["token_loss_kernel"]
    assert plain["exponentials"] <= 2 * TOKENS_PER_THREAD
    assert longest(plain) <= 90 * TOKENS_PER_THREAD


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


@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize("case", ["logits", "logits, given advantages", "entropy bonus"])
def test_a_multiprocessor_holds_one_row(target, case):
    """Two programs of 512 threads would share it, and their rows the cache, at 64 registers."""
    (loss,) = compile_case(target, case)["kernels"]["logits_loss_kernel"]
    assert loss["registers"] > 64


TILES = 4  # of a step of either pass over a row, 16 bytes a thread each
LOGITS_PER_STEP = 8 * TILES  # of bfloat16


def passes(kernel):
    """The main loops of the two passes over a row: statistics, gradient (None if there is none).

    They are those with wide loads and the fewest instructions; the other such loops are the masked
    ones, which run at most twice a row.
    """
    wide = [x for x in kernel["loops"] if x["wide_loads"] and x["exponentials"] >= LOGITS_PER_STEP]
    reading = [x for x in wide if not x["stores"]]
    writing = [x for x in wide if x["stores"] == TILES]
    shortest = [min(x, key=lambda y: y["instructions"], default=None) for x in (reading, writing)]
    return shortest


@pytest.mark.parametrize("target", TARGETS)
def test_budgets_of_the_two_passes_over_a_row(target):
    """4 bytes an element take 0.93 ps on an H200; within these budgets every pipe takes less."""
    score = compile_case(target, "logits")["kernels"]["score_kernel"][0]
    statistics, _ = passes(score)
    assert statistics["instructions"] <= 6.5 * LOGITS_PER_STEP
    loss = compile_case(target, "logits")["kernels"]["logits_loss_kernel"][0]
    with_entropy, gradient = passes(loss)
    assert with_entropy["instructions"] <= 8.8 * LOGITS_PER_STEP
    # CDNA3 has no instruction that rounds to bfloat16.
    per_gradient, per_bonus = (7, 8.5) if target == "gfx942" else (6, 8)
    assert gradient["instructions"] <= per_gradient * LOGITS_PER_STEP
    bonus = compile_case(target, "entropy bonus")["kernels"]["logits_loss_kernel"][0]
    with_bonus = passes(bonus)[1]
    assert with_bonus["instructions"] <= per_bonus * LOGITS_PER_STEP
    share = compile_case(target, "split rows")["kernels"]["share_kernel"][0]
    assert passes(share)[0]["instructions"] <= 8.8 * LOGITS_PER_STEP
    for loop in (statistics, with_entropy):
        assert loop["exponentials"] <= 1.1 * LOGITS_PER_STEP
    for loop in (gradient, with_bonus):
        assert loop["exponentials"] <= 1.05 * LOGITS_PER_STEP
    for loop in (statistics, with_entropy, gradient, with_bonus):
        # Each thread works alone, 16 bytes at a time.
        assert loop["barriers"] == 0 and loop["wide_loads"] == TILES
    for kernel in (score, loss, bonus):
        assert not any("16" in name for name in kernel["accesses"] if name.startswith("LDG.E.EL"))


@pytest.mark.parametrize("target", NVIDIA)
def test_budget_of_what_every_warp_executes_once_a_row(target):
    """16 warps do it for 152064 logits: at 500 instructions 5% of what the two passes take."""
    (many,) = compile_case(target, "many rows")["scalar"]
    assert many["before"] <= 150 and many["between"] <= 400 and many["after"] <= 40
    assert 16 * sum(many.values()) <= 8600
    few = compile_case(target, "logits")["scalar"][0]
    between = 560 if target == "sm_80" else 440
    assert few["before"] <= 150 and few["between"] <= between and few["after"] <= 60


def test_many_rows_are_three_launches_and_the_rescaling():
    for case in ("many rows", "many packed rows"):
        launches = compile_case("sm_90", case)["launches"]
        assert launches == [
            "prepare_kernel",
            "logits_loss_kernel",
            "finish_kernel",
            "rescale_kernel",
        ]


@pytest.mark.parametrize(
    ("target", "case"),
    on_every_target(["logits", "float32 logits", "float16 logits", "logits view"]),
)
def test_logits_are_read_and_written_16_bytes_at_a_time(target, case):
    (loss,) = compile_case(target, case)["kernels"]["logits_loss_kernel"]
    accesses = loss["accesses"]
    loads = ("LDG.E.EL", "LDG.E.EF", "LDG.E.U16", "buffer_load_ushort", "buffer_load_short")
    narrow = {
        name: n for name, n in accesses.items() if name.startswith(loads) and not is_wide(name)
    }
    # The target's own logit is one number; gfx942 has no hints that tell logits from the rest.
    assert sum(narrow.values()) <= 1, accesses
    assert wide(accesses) >= 7, accesses


def test_a_loss_from_logits_is_one_launch_and_the_rescaling():
    for case in ("logits view", "entropy bonus", "odd vocabulary"):
        launches = compile_case("sm_90", case)["launches"]
        assert launches == ["logits_loss_kernel", "rescale_kernel"]
    launches = compile_case("sm_90", "logits, ids of a byte")["launches"]
    assert launches == ["score_kernel", "logits_loss_kernel", "rescale_kernel"]
    launches = compile_case("sm_90", "logits, sequence level")["launches"]
    assert launches == [
        "advantages_kernel",
        "score_kernel",
        "token_loss_kernel",
        "gradient_kernel",
        "group_summary_kernel",
        "rescale_kernel",
    ]


def test_shapes_of_logits_do_not_recompile():
    report = compile_case("sm_90", "ten shapes of logits")
    assert len(report["launches"]) == 30
    assert {name: len(found) for name, found in report["kernels"].items()} == {
        "score_kernel": 1,
        "logits_loss_kernel": 1,
        "rescale_kernel": 1,
    }
