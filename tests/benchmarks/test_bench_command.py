"""`mapo-kernels bench` as a process, and the results that are committed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import names, results
from benchmarks.names import LOGITS
from benchmarks.providers import OURS

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("pytest_benchmark")

ROOT = Path(__file__).parents[2]


def bench(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "mapo_kernels", "bench", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        # Its own pytest is nobody's worker: pytest-benchmark measures nothing in those.
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | environment,
    )


@pytest.mark.slow
@pytest.mark.parametrize("level", [names.SCORING, LOGITS])
def test_dry_run_walks_a_gpu_suite_on_the_interpreter(level, tmp_path):
    pytest.importorskip("triton")
    done = bench(
        "--suite=gpu", "--dry-run", f"--level={level}", f"--out={tmp_path}", "--name=dry",
        "--no-plots", PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        PYTEST_PLUGINS="interpreted",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = results.read(tmp_path / "dry.json")
    assert found["dry_run"] and "triton" in found["environment"]["backend"]
    ours = [row for row in found["rows"] if row["provider"] == OURS]
    assert ours and {(row["status"], row["timer"]) for row in ours} == {("ok", "wall")}
    assert found["finished"] and "Dry run" in done.stdout


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks/results").glob("*.csv")), ids=lambda x: x.stem
)
def test_committed_results_are_whole(path):
    found = results.read(path.with_suffix(".json"))
    assert found["environment"]["dirty"] is False
    if found["suite"] not in names.SUITES:
        return
    assert not [
        r for r in found["rows"] if r["provider"].startswith(OURS) and r["status"] == "wrong"
    ]
    assert {row["level"] for row in found["rows"]} <= set(names.LEVELS)
    assert list(path.parent.glob(f"{path.stem}_*.png"))
