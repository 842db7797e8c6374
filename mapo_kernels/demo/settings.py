"""What decides the results of the demo; needs no torch, so that `demo --help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mapo_kernels.choices import ESTIMATORS as ESTIMATORS
from mapo_kernels.choices import Certainty
from mapo_kernels.settings import require_number

Record = dict[str, Any]  # of a run, a step or all of them: what JSON can hold

LOG_NAME = "log.json"
FORMAT = "mapo-kernels demo 2"  # in the log and in runs' files: what tells them from others' files
WARM_UP = "warm-up"
REPLAY = "-replay"  # behind the estimator, in the name of a phase that replays kept sets


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides the result of a run, apart from its estimator and seed."""

    task: str = "number_sorting"  # a name in `TASKS`
    steps: int = 300  # of RL; the learning rate falls linearly to 0 over them
    certainty: Certainty | float = "quadratic"  # lambda(p) of the mapo estimator
    prompts: int = 32  # groups per step
    group_size: int = 16  # answers per prompt
    top_p: float = 1.0  # answers are sampled from the likeliest tokens of so much probability
    minibatches: int = 4  # optimizer steps per batch of rollouts; all but the first are off-policy
    learning_rate: float = 1e-3  # of RL
    eps_low: float = 0.2  # clip range
    eps_high: float = 0.28  # DAPO's clip-higher
    warmup_success: float = 0.1  # sampled success at which the warm-up ends; 0 skips it
    warmup_steps: int = 2000  # its longest duration
    warmup_batch: int = 64  # problems per supervised update
    eval_prompts: int = 512  # held-out prompts (fewer where the task has fewer)
    eval_copies: int = 2  # sampled answers for each of them
    eval_every: int = 25  # RL steps between evaluations
    width: int = 64  # hidden size of the model
    layers: int = 2
    heads: int = 4

    def __post_init__(self) -> None:
        """Refuse what could not run."""
        least = {"steps": 0, "prompts": 1, "group_size": 2, "minibatches": 1, "eval_every": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name}: expected at least {low}, got {getattr(self, name)}")
        require_number("warmup_success", self.warmup_success, 0, 1)
        require_number("top_p", self.top_p, 0, 1, open_low=True)
        if self.prompts % self.minibatches:
            expected = f"a multiple of minibatches = {self.minibatches}"
            raise ValueError(f"prompts: expected {expected}, got {self.prompts}")
