"""Ranks that are called differently find out, and ranks that are called alike are left alone."""

import agreement_ranks as ranks
import pytest
from backends import INTERPRETS
from spawn import run_ranks


@pytest.fixture(params=["eager-2", "eager-4", "interpreter-2"])
def on_ranks(request):
    """Runs a function of the worker on gloo ranks."""
    backend, size = request.param.split("-")
    if backend == "interpreter" and not INTERPRETS:
        pytest.skip("Triton compiles here or is not installed")

    def run(function):
        return run_ranks(int(size), function, "eager" if backend == "eager" else "triton", "cpu")

    return run


def is_refused(outcome):
    """Whether a rank was told by an error, or by a loss of NaN."""
    return outcome == "nan" or (outcome.startswith("ValueError") and "every rank" in outcome)


def test_settings_agreed_before_and_mixed_later(on_ranks):
    answers = on_ranks(ranks.plans_and_losses_that_differ)
    wrong = [
        f"rank {rank}: {name}: {outcome}"
        for rank, told in enumerate(answers)
        for name, outcome in told.items()
        if not is_refused(outcome)
    ]
    assert not wrong, wrong


def test_equal_specs_agree(on_ranks):
    on_ranks(ranks.equal_specs)


def test_what_a_rank_remembers_is_bounded(on_ranks):
    assert all(remembered <= 16 for remembered in on_ranks(ranks.annealed))
