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
        steps=40, prompts=16, group_size=16, eval_every=20, eval_prompts=128, trainer="trl"
    )
    code = run_experiment(
        settings,
        estimators=["mapo"],
        seeds=1,
        device=torch.device("cpu"),
        out=tmp_path,
        resume=False,
    )
    assert code == 0
    log = json.loads((tmp_path / "log.json").read_text())
    assert log["status"] == "finished" and log["configuration"]["trainer"] == "trl"
    warm_up, *runs = log["runs"]
    assert [run["phase"] for run in runs] == ["mapo"]
    for run in runs:
        assert run["finished"] and [step["step"] for step in run["steps"]] == list(range(40))
        assert [point["step"] for point in run["evals"]] == [0, 20, 40]
        assert run["evals"][-1]["success_sampled"] > 0.1 + run["evals"][0]["success_sampled"]
        assert sum(run["steps"][0]["successes_per_group"]) == 16
