"""`examples/trl_demo.py`: the demo's task, trained by TRL."""

import runpy
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="trl is not installed")
pytest.importorskip("reasoning_gym", reason="reasoning_gym is not installed")

EXAMPLE = Path(__file__).parents[2] / "examples" / "trl_demo.py"


def test_the_example_trains_in_trl(capsys):
    example = runpy.run_path(str(EXAMPLE))
    before, after = example["main"](["--steps", "80", "--prompts", "16", "--group-size", "16"])
    assert after > before + 0.1
    assert f"mapo: held-out success {before:.3f} -> {after:.3f}" in capsys.readouterr().out
