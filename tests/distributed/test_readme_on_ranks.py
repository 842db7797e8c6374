"""The README's snippets on ranks; `package/test_readme.py` runs them in one process."""

import pytest
import readme
from spawn import run_ranks


@pytest.mark.parametrize("check", [readme.check_logits, readme.check_hidden_states])
def test_gradients_on_ranks_are_those_of_one_process(check):
    run_ranks(2, check)
