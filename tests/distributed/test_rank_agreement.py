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


def test_metrics_are_reduced_over_the_ranks_of_their_plan(on_ranks):
    answers = on_ranks(ranks.reduced_over_other_ranks)
    for rank, told in enumerate(answers):
        for name in ("more", "fewer", "more, a rank without metrics", "twice"):
            assert isinstance(told[name], str), (rank, name, told[name])
            assert "metrics: expected" in told[name]
        everyone = f"{list(range(len(answers)))}"
        assert everyone in told["more"] and everyone in told["fewer"]
        mixed = told["more, a rank with groups of its own"]
        if rank < len(answers) - 1:
            assert "metrics: expected" in mixed
        else:
            assert mixed["active_groups"].isnan() and mixed["lambda_mean"].isnan()
            assert mixed["active_tokens"] == 12 * len(answers)


def test_copies_of_metrics(on_ranks):
    on_ranks(ranks.copies_of_metrics)


def test_means_of_nothing_are_left_out(on_ranks):
    on_ranks(ranks.means_of_nothing)
