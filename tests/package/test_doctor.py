"""`mapo-kernels doctor` finds what is right right, and what is wrong wrong."""

import pytest

from mapo_kernels import doctor
from mapo_kernels.__main__ import main

LEVELS = ("advantages", "log-probs", "logits, token level", "logits, sequence level")
LEVELS += ("hidden states, token level", "hidden states, sequence level")


def test_it_reports_versions_backend_and_errors(device, capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "torch" in out and "backend" in out and "WRONG" not in out
    for level in LEVELS:
        (line,) = [x for x in out.splitlines() if x.startswith(f"  {level}")]
        assert line.endswith("ok") and 0 <= float(line.split()[-2]) < 2e-6


@pytest.mark.parametrize("error", [1e-3, float("nan")])
def test_a_wrong_number_is_an_exit_code(error, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "parity", lambda: {"logits": error, "advantages": 0.0})
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "WRONG" in out and out.count("ok") == 1
