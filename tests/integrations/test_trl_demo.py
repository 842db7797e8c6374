"""`mapo-kernels demo --trainer trl`: the demo's log and files, trained by TRL."""

import json

import pytest

pytest.importorskip("trl", reason="trl is not installed")
pytest.importorskip("reasoning_gym", reason="reasoning_gym is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")
pytest.importorskip("rich", reason="rich is not installed")

import torch

from mapo_kernels.demo import plots
from mapo_kernels.demo.experiment import run_experiment
from mapo_kernels.demo.runs import Settings


def test_the_demo_trains_in_trl(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "draw_all", lambda log, out: [])
    settings = Settings(
        steps=60, prompts=16, group_size=16, eval_every=30, eval_prompts=128, trainer="trl"
    )
    code = run_experiment(
        settings,
        estimators=["mapo", "grpo"],
        seeds=1,
        device=torch.device("cpu"),
        out=tmp_path,
        resume=False,
    )
    assert code == 0
    log = json.loads((tmp_path / "log.json").read_text())
    assert log["status"] == "finished" and log["configuration"]["trainer"] == "trl"
    warm_up, *runs = log["runs"]
    assert [run["phase"] for run in runs] == ["mapo", "grpo"]
    for run in runs:
        assert run["finished"] and [step["step"] for step in run["steps"]] == list(range(60))
        assert [point["step"] for point in run["evals"]] == [0, 30, 60]
        # Both start where the warm-up ended, and both learn.
        assert run["evals"][0] == runs[0]["evals"][0]
        assert run["evals"][-1]["success_sampled"] > 0.1 + run["evals"][0]["success_sampled"]
        assert sum(run["steps"][0]["successes_per_group"]) == 16
    assert runs[0]["evals"][-1] != runs[1]["evals"][-1]
