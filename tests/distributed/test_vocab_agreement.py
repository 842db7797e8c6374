"""Ranks of a `vocab_group` that are called differently are all told, and none of them ends."""

import pytest
import torch
import vocab_agreement_ranks as ranks
from backends import INTERPRETS
from spawn import run_ranks

import mapo_kernels as mk
from mapo_kernels.distributed.agreement import digest_of

OTHER_SPEC = mk.LossSpec(eps_low=0.3)
SEQUENCE = mk.LossSpec(importance_level="sequence")
# What the last rank does otherwise: the function that all call, its changed arguments, and the
# function that it calls instead.
LATER = {
    "rows": ("hidden", {"rows": 8}, None),
    "ids": ("hidden", {"ids": (1, 2)}, None),
    "mask": ("hidden", {"masked": ((0, 1),)}, None),
    "mask, as many tokens": ("hidden", {"masked": ((1, 1),), "advantages": (1.0, 0.0)}, None),
    "temperature": ("hidden", {"temperature": 0.7}, None),
    "temperatures": ("hidden", {"temperature": (1.0, 0.9)}, None),
    "spec": ("hidden", {"spec": OTHER_SPEC}, None),
    "level": ("hidden", {"spec": SEQUENCE}, None),
    "chunk_rows": ("hidden", {"chunk_rows": 3}, None),
    "advantages": ("hidden", {"advantages": (1.0, 0.0)}, None),
    "advantages, as many tokens": ("hidden", {"advantages": (1.0, 2.0)}, None),
    "logit_scale": ("hidden", {"logit_scale": 2.0}, None),
    "normalizer": ("hidden", {"normalizer": 3.0}, None),
    "gradient by hidden": ("hidden", {"hidden_grad": False}, None),
    "gradient by the weight": ("hidden", {"weight_grad": False}, None),
    "function": ("hidden", {}, "hidden_scores"),
    "level of input": ("hidden", {}, "logits"),
    "rows of logits": ("logits", {"rows": 8}, None),
    "ids of logits": ("logits", {"ids": (1, 2)}, None),
    "temperature of logits": ("logits", {"temperature": 0.7}, None),
    "spec of logits": ("logits", {"spec": OTHER_SPEC}, None),
    "gradient by logits": ("logits", {"logits_grad": False}, None),
    "function of logits": ("logits", {}, "scores"),
    "rows of scores": ("scores", {"rows": 8}, None),
    "ids of scores": ("scores", {"ids": (1, 2)}, None),
    "temperatures of scores": ("scores", {"temperature": (1.0, 0.9)}, None),
    "entropy of scores": ("scores", {"return_entropy": True}, None),
    "chunks of scores": ("hidden_scores", {"chunk_rows": 3}, None),
}
# Token ids that a sum weighted by position does not tell apart.
FIRST = {
    "equal weighted sums": ({"ids": (3, 5)}, {"ids": (5, 4)}),
    "exchanged": ({"ids": (3, 5)}, {"ids": (5, 3)}),
    "neighbours": ({"ids": (3, 4, 3)}, {"ids": (3, 3, 4)}),
    "far away": ({"rows": 8192}, {"rows": 8192, "ids": (0,) * 8190 + (1,)}),
    "masked": ({"ids": (0, 4), "masked": ((0, 1),)}, {"ids": (0, 4), "masked": ((0, 2),)}),
}


# One later call of each function; the check has no kernel, and compares two ranks as it does four.
QUICK = ("rows", "function of logits", "entropy of scores", "chunks of scores")
WORLDS = ("eager-2", "eager-4", "interpreter-2")
LATER_CASES = [
    pytest.param(
        name, world, marks=[] if world == "eager-2" or name in QUICK else [pytest.mark.slow]
    )
    for name in LATER
    for world in WORLDS
]


@pytest.fixture(params=WORLDS)
def on_ranks(request):
    """Runs a function of the worker on gloo ranks."""
    backend, size = request.param.split("-")
    if backend == "interpreter" and not INTERPRETS:
        pytest.skip("Triton compiles here or is not installed")

    def run(function, *args):
        given = ("eager" if backend == "eager" else "triton", *args)
        return run_ranks(int(size), function, *given)

    return run


@pytest.mark.parametrize(("name", "on_ranks"), LATER_CASES, indirect=["on_ranks"])
def test_later_calls_that_differ(name, on_ranks):
    for told in on_ranks(ranks.told_later, *LATER[name]):
        assert told.startswith("ValueError: vocab_group: expected") and "every rank" in told


@pytest.mark.parametrize("name", FIRST)
def test_first_calls_that_differ(name, on_ranks, request):
    if name == "far away" and "interpreter" in request.node.name:
        pytest.skip("8192 rows take the interpreter minutes; the check has no kernel")
    for told in on_ranks(ranks.told_first, "scores", *FIRST[name]):
        assert told.startswith("ValueError: vocab_group: expected") and "token ids" in told


def test_two_vocabularies_over_the_same_ranks(on_ranks):
    on_ranks(ranks.two_vocabularies)


def test_temperatures_that_differ(on_ranks):
    one, other = {"temperature": (1.0, 0.9)}, {"temperature": (0.9, 1.0)}
    for told in on_ranks(ranks.told_first, "logits", one, other):
        assert told.startswith("ValueError: vocab_group: expected the same temperature of each seq")


def test_what_differs_is_named_with_what_came(on_ranks):
    changed = {"spec": OTHER_SPEC, "rows": 8}
    answers = on_ranks(ranks.told_first, "hidden", {}, changed)
    for rank, told in enumerate(answers):
        assert "number of rows, shape of the token ids, LossSpec on every rank" in told
        assert "token ids where" not in told  # they differ because their number does
        last = rank == len(answers) - 1
        assert ("eps_low=0.3" in told) == last and ("(2, 8)" in told) == last
        assert f"[{', '.join(['12'] * rank)}" in told and "16]" in told


BASE = [3, 5, 5, 0, 2**40, -1, 7]
CHANGED = {
    "weighted sum": [5, 4, 5, 0, 2**40, -1, 7],
    "swapped": [5, 3, 5, 0, 2**40, -1, 7],
    "neighbours": [3, 5, 0, 5, 2**40, -1, 7],
    "reversed": BASE[::-1],
    "longer": [*BASE, 0],
    "shorter": BASE[:-1],
    "leading 0": [0, *BASE],
    "sign": [3, 5, 5, 0, 2**40, 1, 7],
    "high bit": [3, 5, 5, 0, 2**40 - 2**63, -1, 7],
}


@pytest.mark.parametrize("name", CHANGED)
def test_digests_differ_where_values_do(name):
    assert digest_of(torch.tensor(BASE)) != digest_of(torch.tensor(CHANGED[name]))


def test_no_position_of_a_digest_is_without_weight():
    zeros = torch.zeros(16384, dtype=torch.long)
    found = {int(digest_of(zeros))}
    for place in (*range(0, 16384, 97), 8189, 8190, 8191, 16381, 16383):
        for value in (1, 2):
            changed = zeros.clone()
            changed[place] = value
            found.add(int(digest_of(changed)))
    assert len(found) == 1 + 2 * (len(range(0, 16384, 97)) + 5)


def test_equal_values_have_one_digest():
    ids = torch.tensor([3, 0, 7])
    for dtype in (torch.int32, torch.uint8, torch.int16):
        assert digest_of(ids) == digest_of(ids.to(dtype))
    assert digest_of(ids) == digest_of(torch.tensor([[3, 9], [0, 9], [7, 9]])[:, 0])
    x = torch.tensor([0.5, -0.0, float("nan"), float("inf")])
    for other in (x.double(), x.bfloat16(), torch.tensor([0.5, 0.0, -float("nan"), float("inf")])):
        assert digest_of(x) == digest_of(other)
    assert digest_of(x) != digest_of(-x)
    assert digest_of(torch.zeros(0)) != digest_of(torch.zeros(1))
    assert digest_of(torch.ones(())) == digest_of(torch.ones(1))
