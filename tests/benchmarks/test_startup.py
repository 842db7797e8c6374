"""`mapo-kernels bench startup`: every command is run, kept and shown; times are not looked at."""

import pytest

from benchmarks import report, results, startup
from benchmarks.providers import OURS
from mapo_kernels.__main__ import COMMANDS, main

pytest.importorskip("rich")


def test_every_command_is_a_row_of_samples(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "startup", "--dry-run", "--name=x", "--notes=y"]) == 0
    found = results.read(tmp_path / "x.json")
    assert found["notes"] == "y" and found["dry_run"] and found["finished"]
    assert {(row["status"], len(row["samples_ms"])) for row in found["rows"]} == {("ok", 1)}
    levels = {row["level"] for row in found["rows"] if row["provider"] == OURS}
    assert {f"mapo-kernels {name} --help" for name in COMMANDS} < levels
    assert {row["provider"] for row in found["rows"]} == {"python", "torch", OURS}
    text = report.markdown(found)
    assert "| import mapo_kernels | mapo_kernels |" in text and "times mean nothing" in text
    assert "mapo-kernels demo --help" in capsys.readouterr().out
    assert len((tmp_path / "x.csv").read_text().splitlines()) == len(found["rows"]) + 1


def test_the_first_round_is_not_kept_and_a_failure_is_a_row(tmp_path, monkeypatch):
    seen = []

    def seconds_of(arguments):
        seen.append(arguments)
        if "demo" in arguments:
            raise RuntimeError("no demo")
        return len(seen) * 1e-3

    monkeypatch.setattr(startup, "seconds_of", seconds_of)
    startup.measure(tmp_path / "x.json", results.About("startup"))
    found = results.read(tmp_path / "x.json")
    by_status = {row["level"]: row for row in found["rows"]}
    demo = by_status.pop("mapo-kernels demo --help")
    assert (demo["status"], demo["reason"]) == ("failed", "no demo")
    assert sum("demo" in x for x in seen) == 1
    for row in by_status.values():
        assert len(row["samples_ms"]) == startup.REPEATS
    # Rows take turns.
    assert seen[: len(startup.CALLS)] == [x for _, _, x in startup.CALLS]
    assert "no demo" in report.markdown(found)


def test_what_python_says_last_is_the_reason():
    with pytest.raises(RuntimeError, match="^x$"):
        startup.seconds_of(["-c", "import sys; sys.exit('x')"])
