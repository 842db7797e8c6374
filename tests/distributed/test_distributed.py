"""Data parallel: ranks that hold parts of a batch equal one process that holds all of it."""

from dataclasses import fields

import distributed_worker as worker
import pytest
from backends import HAS_GPU, INTERPRETS
from spawn import run_ranks

from mapo_kernels import AdvantageSpec, LossSpec

# Interpreted kernels know nothing of ranks: they are quick with two.
FOUR_INTERPRETED = pytest.param((4, "interpreter"), marks=pytest.mark.slow)
SETTINGS = [(2, "eager"), (4, "eager"), (2, "interpreter"), FOUR_INTERPRETED]


@pytest.fixture(
    params=[*SETTINGS, pytest.param((1, "gpu"), marks=pytest.mark.gpu)],
    ids=lambda setting: f"{setting[1]}-{setting[0]}",
)
def on_ranks(request):
    """Runs a function of the worker on gloo ranks, or on a GPU on one NCCL rank."""
    n_ranks, kind = request.param
    if kind == "gpu" and not HAS_GPU:
        pytest.skip("needs a GPU")
    if kind == "interpreter" and not INTERPRETS:
        pytest.skip("Triton compiles here (the gpu variant runs instead) or is not installed")
    on_gpu = kind == "gpu"
    given = ("eager" if kind == "eager" else "triton", "cuda" if on_gpu else "cpu")

    def run(function):
        return run_ranks(n_ranks, function, *given, backend="nccl" if on_gpu else "gloo")

    return run


def test_losses(on_ranks):
    on_ranks(worker.check_losses)


def test_plans_and_micro_batches(on_ranks):
    on_ranks(worker.check_plans)


def test_advantages(on_ranks):
    on_ranks(worker.check_advantages)


def test_logits_and_hidden_states(on_ranks):
    on_ranks(worker.check_other_levels)


def test_distributed_data_parallel(on_ranks):
    on_ranks(worker.check_ddp)


def test_documentation(on_ranks):
    on_ranks(worker.check_documentation)


def test_metrics_of_own_groups(on_ranks):
    on_ranks(worker.check_metrics_of_own_groups)


def test_ranks_that_disagree_are_told(on_ranks):
    answers = on_ranks(worker.disagreements)
    last = len(answers) - 1
    if last == 0:
        pytest.skip("one rank agrees with itself")
    for told in answers:
        later = told.pop("later")
        for name, text in told.items():
            assert name in text and "every rank" in text, (name, text)
        if told is not answers[last]:
            assert later == "nan"
    assert f"ranks [{last}] of {last + 1}" in answers[0]["spec.eps_high"]
    assert "spec.eps_high = 0.2" in answers[0]["spec.eps_high"]
    assert "spec.eps_high = 0.28" in answers[last]["spec.eps_high"]
    assert "spec.aggregation" in later


def test_collectives_of_a_step_are_few_and_small(on_ranks):
    settings = len(fields(LossSpec)) + len(fields(AdvantageSpec)) + 5
    header, room = 8 * (5 + settings), 32 * 64
    for found in on_ranks(worker.collectives_of_a_step):
        assert found == {
            "advantages": [header + room],
            "many": [header + room, header + 2 * room],
            "many again": [header + 2 * room],
            "plan": [header + 2 * room],
            "micro-batches": [],
            "metrics": [152],
            "two losses": [header + 2 * room] * 2,
        }


def test_a_failing_rank_is_told_and_those_that_wait_for_it_end():
    assert run_ranks(2, worker.sum_of_ranks) == [3.0, 3.0]
    with pytest.raises(AssertionError, match="(?s)rank 1:.*a message to look for.*rank 0: no answ"):
        run_ranks(2, worker.fail_on_last_rank)
