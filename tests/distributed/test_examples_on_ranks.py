"""What the examples for several ranks say of gradients; tests/examples/ runs them as scripts."""

import example_files
import pytest
from spawn import run_ranks

pytest.importorskip("transformers", reason="transformers is not installed")


def test_ddp_has_the_gradients_of_one_process_unless_reached_through():
    assert min(run_ranks(2, example_files.check_ddp)) > 0.1


def test_fsdp2_has_the_gradients_of_one_process():
    for off in run_ranks(2, example_files.check_fsdp2):
        assert off["float32"] < 1e-5 and off["bfloat16"] < 0.05
