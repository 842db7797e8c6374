"""Two processes (gloo, DDP) whose groups straddle the ranks train as one process does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed")

from trl_support import norm, relative_gap

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def run(out, world, **options):
    """Train with `world` ranks; what each of them saved."""
    out.mkdir()
    shared = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]),
    }
    if world > 1:
        shared |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": str(free_port()), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, str(HERE / "trl_worker.py"), str(out), json.dumps(options)]
    ranks = []
    for rank in range(world):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
        ranks.append(
            subprocess.Popen(
                command,
                env={**shared, **place},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        printed = [process.communicate(timeout=120)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for process, text in zip(ranks, printed, strict=True):
        assert process.returncode == 0, text[-3000:]
    return [torch.load(out / f"rank{rank}.pt", weights_only=False) for rank in range(world)]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """3 groups of 4 in a batch of one process, nothing dropped."""
    out = tmp_path_factory.mktemp("one") / "out"
    return run(out, 1, per_device_train_batch_size=6, gradient_accumulation_steps=2)[0]


@pytest.mark.parametrize(
    "level, drop",
    (("hidden", False), ("hidden", True), ("logits", True), ("logprobs", False)),
)
def test_two_processes_are_one(level, drop, one_process, tmp_path):
    # 6 rows a rank: the second group has two rows on each. It and the first are without signal, so
    # that the first rank has nothing to learn from, and still has to run.
    ranks = run(
        tmp_path / "two",
        2,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        fused=level,
        drop_zero_signal=drop,
    )
    assert [rank["world"] for rank in ranks] == [2, 2]
    for rank in ranks:
        assert relative_gap(rank["weights"], one_process["weights"]) < 1e-6
    if drop:
        assert ranks[0]["forward_rows"] == [1] * 6
        assert sum(ranks[1]["forward_rows"]) < 18
    else:
        assert ranks[0]["forward_rows"] == [3] * 6
    for ours, theirs in zip(ranks[0]["log"], one_process["log"], strict=True):
        for name in ("reward", "mapo/lambda", "mapo/success_ratio", "mapo/zero_signal"):
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


def test_the_comparison_has_something_to_compare(one_process):
    from trl_support import new_model

    start = new_model().state_dict()
    assert relative_gap(one_process["weights"], start) > 1e-3
    assert norm(start) > 0
    first = one_process["log"][0]
    assert 0.5 < first["mapo/zero_signal"] < 1 and first["mapo/lambda"] > 0
