"""`examples/trl_quickstart.py` learns; run where TRL is installed."""

import pytest

pytest.importorskip("trl", reason="trl is not installed")

from example_files import load


def test_the_model_learns_the_next_letter():
    rewards = load("trl_quickstart").main()
    assert rewards[0] < 0.3 and rewards[-1] > 0.8
