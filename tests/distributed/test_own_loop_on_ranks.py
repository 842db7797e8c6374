"""The snippets of docs/own_loop.md on ranks; test_own_loop.py runs them in one process."""

import own_loop
import pytest
from spawn import run_ranks


@pytest.mark.parametrize("check", [own_loop.check_logits, own_loop.check_hidden_states])
def test_gradients_on_ranks_are_those_of_one_process(check):
    run_ranks(2, check)
