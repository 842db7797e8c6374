"""What the ablation compares, and the format of its records; needs no torch.

`OUT/ablation.jsonl` has one JSON object a line, one line a finished run, in the order in which the
runs ended. `RECORD_SCHEMA` is the contract with whoever reads them.

The points that `partial` rewards are the share of characters in place times the solution's length
over 4, and solutions have 3 to 6 characters. Within a group this is partial credit times a factor,
which z-score and percent deviation do not see. But the threshold does: a reward of 1 is out of
reach for 3 characters, the solution alone for 4, and 80% or more in place for 5 and 6. So MAPO
reads a success ratio that is wrong in both directions, and with `success=` the right one, all else
equal.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mapo_kernels.demo.settings import Settings

FORMAT = "mapo-kernels study 1"
RECORDS_NAME = "ablation.jsonl"

STARTS_NAME = "starts"  # the folder of the warm-ups

ESTIMATORS = {  # of advantages: the name in records, and what it is
    "mapo": "MAPO, lambda(p) quadratic, as in the paper",
    "mapo-linear": "MAPO, lambda(p) = |2p - 1|",
    "mapo-entropy": "MAPO, lambda(p) = 1 - H2(p)",
    "mapo-step": "MAPO, lambda(p) = 0 for 0.25 <= p <= 0.75, else 1",
    "mapo-0.5": "MAPO, lambda = 0.5 for every p",
    "grpo": "GRPO, the z-score alone (lambda = 0)",
    "apd": "the percent deviation alone (lambda = 1)",
    "mean": "r - mean, as in Dr.GRPO",
    "rloo": "r - mean of the other rewards",
    "dapo": "GRPO with DAPO's dynamic sampling and clip-higher",
}
# The estimator that the library knows, and what else differs from the default settings.
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "mapo": ("mapo", {}),
    "mapo-linear": ("mapo", {"certainty": "linear"}),
    "mapo-entropy": ("mapo", {"certainty": "entropy"}),
    "mapo-step": ("mapo", {"certainty": "step"}),
    "mapo-0.5": ("mapo", {"certainty": 0.5}),
    **{name: (name, {}) for name in ("grpo", "apd", "mean", "rloo")},
    "dapo": ("grpo", {"draws": 3, "eps_high": 0.28}),
}
# Adam's, to choose from. At 3e-3 a first trial lost all that the warm-up had learned, in every
# regime, and at 1e-3 much of it in the easy one.
RATES = {
    "hard": (3e-4, 8e-4, 2e-3),
    "mixed": (3e-4, 8e-4, 2e-3),
    "easy": (1e-4, 3e-4, 8e-4),
}
NORM_RATE = 8e-4  # of the comparison at one gradient norm
RATE_SEEDS = (100, 101)
SEEDS = 5  # of a comparison other than the main one: the mixed regime with binary rewards
# Those whose lambda depends on the success ratio; to the others `success=` changes nothing.
READ_SUCCESS = ("mapo", "mapo-linear", "mapo-entropy", "mapo-step")
REGIMES = {  # sampled success at which the supervised warm-up ends, and RL starts
    "hard": 0.02,
    "mixed": 0.3,
    "easy": 0.9,
}
REWARDS = {
    "binary": "1 for the solution, else 0",
    "partial": "characters in place / 4; a success is a reward of 1 or more",
    "partial-success": "characters in place / 4; a success is the solution (success=)",
}
STAGES = {
    "rate": "learning rates tried on seeds of their own",
    "main": "each estimator at its own learning rate",
    "norm": "one learning rate, and every gradient rescaled to one norm",
}

_NUMBER: dict[str, Any] = {"type": ["number", "null"]}  # null: not a number
_LIST: dict[str, Any] = {"type": "array", "items": _NUMBER}
# What steps of RL record. Each number is the mean of a block of steps; null if all of it is NaN.
STEP_LISTS = {
    "step": "the last step of the block, counted from 1",
    "reward": "mean over the sampled answers",
    "success": "share of exactly right answers",
    "groups": "groups sampled; more than the batch has where dynamic sampling drew again",
    "groups_without_signal": "of these, groups whose rewards are all equal",
    "lambda_mean": "mean of lambda(p) over the groups that are trained on",
    "advantage_abs": "mean of |A| over the answers that are trained on",
    "gradient_norm": "of the gradient before it is clipped or rescaled, mean over minibatches",
    "update_norm": "of the change of the parameters, mean over minibatches",
    "clip_fraction_low": "share of tokens clipped below, mean over minibatches",
    "clip_fraction_high": "share of tokens clipped above",
}
RECORD_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": [
        *("format", "stage", "estimator", "regime", "reward", "seed", "learning_rate"),
        *("settings", "warmup", "evals", "steps", "seconds", "commit", "versions", "machine"),
    ],
    "additionalProperties": False,
    "properties": {
        "format": {"const": FORMAT},
        "stage": {"enum": list(STAGES)},
        "estimator": {"enum": list(ESTIMATORS)},
        "regime": {"enum": list(REGIMES)},
        "reward": {"enum": list(REWARDS)},
        "seed": {"type": "integer", "minimum": 0},
        "learning_rate": {"type": "number"},
        # Of the demo's `Settings`, with what the estimator changes in them.
        "settings": {"type": "object"},
        # Shared by all runs of a seed and a regime: supervised updates, and success at their end.
        "warmup": {
            "type": "object",
            "required": ["updates", "success"],
            "properties": {"updates": {"type": "integer"}, "success": {"type": "number"}},
        },
        # On held-out problems, before the first step, in between, and after the last.
        "evals": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["step", "success_sampled", "success_greedy"],
                "properties": {
                    "step": {"type": "integer"},
                    "success_sampled": {"type": "number"},
                    "success_greedy": {"type": "number"},
                },
            },
        },
        "steps": {
            "type": "object",
            "required": list(STEP_LISTS),
            "properties": dict.fromkeys(STEP_LISTS, _LIST),
        },
        "seconds": {"type": "number"},  # of the run on one core, its evaluations included
        "commit": {"type": "string"},  # of the checkout that ran, "unknown" outside one
        "versions": {"type": "object"},  # of packages, by name
        "machine": {"type": "string"},
    },
}


@dataclass(frozen=True, kw_only=True)
class StudySettings(Settings):
    """The demo's settings at the study's size, and what the study adds to them."""

    steps: int = 60
    prompts: int = 16
    minibatches: int = 2
    eps_high: float = 0.2  # symmetric, for all but `dapo`
    warmup_steps: int = 4000
    eval_prompts: int = 256
    eval_every: int = 15
    reward: str = "binary"  # a name in REWARDS
    learning_rate: float = 5e-4  # of the warm-up
    draws: int = 1  # batches of prompts sampled at most, until every group has signal
    equal_norm: bool = False  # rescale every gradient to the norm at which others are clipped


@dataclass(frozen=True)
class Cell:
    """One run: what tells its record from the others'."""

    stage: str
    estimator: str
    regime: str
    reward: str
    seed: int
    learning_rate: float

    def settings(self, base: StudySettings) -> StudySettings:
        """What decides the result of the run, apart from its seed."""
        own = ARMS[self.estimator][1] | {"equal_norm": self.stage == "norm"}
        return replace(
            base,
            warmup_success=REGIMES[self.regime],
            reward=self.reward,
            learning_rate=self.learning_rate,
            **own,
        )

    @classmethod
    def of(cls, record: dict[str, Any]) -> Cell:
        """The cell that a record is of."""
        return cls(*(record[name] for name in cls.__annotations__))
