"""`mapo-kernels bench host`: the caller's side of every call, over a driver that does nothing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import host, report, results
from benchmarks.providers import OURS

ROOT = Path(__file__).parents[2]
CALLS = {
    "x + 1",
    "group_advantages",
    "token_logprobs",
    "make_plan",
    "mapo_loss",
    "mapo_loss_from_logits",
    host.FROM_HIDDEN,
    host.ANOTHER_CHUNK,
    host.PRODUCTS,
}
# PyTorch's own, which launch nothing here.
OF_TORCH = {"x + 1", host.PRODUCTS}


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_every_call_is_launched_and_timed(tmp_path):
    pytest.importorskip("triton")
    pytest.importorskip("rich")
    command = [sys.executable, "-m", "mapo_kernels", "bench", "host", "--dry-run"]
    done = subprocess.run(
        [*command, f"--out={tmp_path}", "--name=x"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = results.read(tmp_path / "x.json")
    assert found["finished"] and "times mean nothing" in report.markdown(found)
    ours = {row["level"]: row for row in found["rows"] if row["provider"] == OURS}
    assert {row["status"] for row in ours.values()} == {"ok"}
    assert set(ours) == CALLS
    # Kernels were launched on the driver, by all but PyTorch's own.
    assert {name for name, row in ours.items() if row["launches"]} == CALLS - OF_TORCH
    peers = [(row["provider"], row["level"]) for row in found["rows"] if row["provider"] != OURS]
    assert ("Liger", "mapo_loss_from_logits") in peers and ("TRL", "mapo_loss") in peers
    assert len((tmp_path / "x.csv").read_text().splitlines()) == len(found["rows"]) + 1


def test_a_row_that_lacks_its_time_is_refused(tmp_path):
    row = {"level": "x + 1", "provider": OURS, "status": "ok"}
    versions = {"torch": "2", "triton": "3"}
    about = {"device": "x", "threads": 1, "commit": None, "dirty": None, "backend": "triton"}
    found = {"format": 1, "suite": "host", "dry_run": False, "seconds": 1, "rows": [row]}
    found["environment"] = about | {"versions": versions}
    path = tmp_path / "x.json"
    path.write_text(json.dumps(found))
    with pytest.raises(results.CommandError, match="median_us"):
        results.read(path)
    row |= {"launches": 0, "median_us": 3.0, "samples_us": [3.0]}
    missing = {"status": "unavailable", "provider": "TRL", "level": "x + 1", "reason": "not here"}
    path.write_text(json.dumps(found | {"rows": [row, missing]}))
    text = report.markdown(results.read(path))
    assert "| x + 1 | 3 (0) |" in text and "TRL: not here" in text
