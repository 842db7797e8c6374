"""What `drop_zero_signal` saves in a real run: the demo's task trained in TRL, with and without.

`python -m benchmarks.trl_zero_signal` trains both runs from one warm-up and writes
`benchmarks/results/trl_zero_signal.json`. Timed are the model's forward and backward of TRL's
training steps; generation, rewards and old log-probs, which see every sequence, are timed apart.
"""

import json
import subprocess
import tempfile
import time
from pathlib import Path

import torch
import transformers
import trl
from transformers.utils import logging

from mapo_kernels.demo.runs import Run, Settings, Workbench
from mapo_kernels.demo.train import WARM_UP, warm_up
from mapo_kernels.demo.trl_train import reinforce_with_trl
from mapo_kernels.integrations.trl import MAPOTrainer

RESULT = Path(__file__).parent / "results" / "trl_zero_signal.json"
SETTINGS = Settings(steps=60, width=192, layers=4, heads=4, eval_every=60, trainer="trl")


class Silence:
    """Nobody needs to hear about the steps."""

    def step(self, run, record):
        pass

    def checkpoint(self):
        pass


class Clock:
    """Seconds spent in a method of `MAPOTrainer`, per call, while the clock is installed."""

    def __init__(self, name):
        self.name, self.original, self.seconds = name, getattr(MAPOTrainer, name), []

    def __enter__(self):
        def timed(trainer, *args, **kwargs):
            began = time.perf_counter()
            result = self.original(trainer, *args, **kwargs)
            self.seconds.append(time.perf_counter() - began)
            return result

        setattr(MAPOTrainer, self.name, timed)
        return self

    def __exit__(self, *unused):
        delattr(MAPOTrainer, self.name)


def train(bench, start, out, drop):
    """One run from the end of the warm-up; what it cost and how it went."""
    run = Run(bench, "mapo", 0, out, start)
    with Clock("training_step") as whole, Clock("_prepare_inputs") as preparing:
        reinforce_with_trl(run, Silence(), drop_zero_signal=drop)
    model = [a - b for a, b in zip(whole.seconds, preparing.seconds, strict=True)]
    half = len(model) // 2
    silent = [record["groups_without_signal"] / SETTINGS.prompts for record in run.record["steps"]]
    return {
        "drop_zero_signal": drop,
        "model_seconds": sum(model),
        "model_seconds_second_half": sum(model[half:]),
        "preparing_seconds": sum(preparing.seconds),
        "groups_without_signal": sum(silent) / len(silent),
        "groups_without_signal_second_half": sum(silent[len(silent) // 2 :]) * 2 / len(silent),
        "success_before_and_after": [point["success_sampled"] for point in run.record["evals"]],
    }


def main():
    """Both runs, twice, in turn; the smaller time of each counts."""
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    bench = Workbench(SETTINGS, torch.device("cpu"))
    measured = []
    with tempfile.TemporaryDirectory() as scratch:
        start = Run(bench, WARM_UP, 0, Path(scratch))
        warm_up(start, Silence())
        for drop in (False, True, False, True):
            measured.append(train(bench, start, Path(scratch), drop))
            print(json.dumps(measured[-1]), flush=True)
    runs = [
        min(
            (x for x in measured if x["drop_zero_signal"] == drop), key=lambda x: x["model_seconds"]
        )
        for drop in (False, True)
    ]
    commit = subprocess.run(
        ["git", "rev-parse", "--short=9", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    result = {
        "commit": commit,
        "machine": f"CPU, {torch.get_num_threads()} thread",
        "versions": {
            "torch": torch.__version__,
            "trl": trl.__version__,
            "transformers": transformers.__version__,
        },
        "steps": SETTINGS.steps,
        "parameters": sum(p.numel() for p in bench.new_model(0).parameters()),
        "runs": runs,
        "raw": measured,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
