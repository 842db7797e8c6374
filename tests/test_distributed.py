"""Data parallel: ranks that hold parts of a batch equal one process that holds all of it."""

import distributed_worker as worker
import pytest
from spawn import run_ranks


def test_a_failing_rank_is_told_and_those_that_wait_for_it_end():
    assert run_ranks(2, worker.sum_of_ranks) == [3.0, 3.0]
    with pytest.raises(AssertionError, match="(?s)rank 1:.*a message to look for.*rank 0: no answ"):
        run_ranks(2, worker.fail_on_last_rank)
