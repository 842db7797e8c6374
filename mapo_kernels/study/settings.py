"""What the ablation compares, and the format of its records; needs no torch.

`OUT/ablation.jsonl` has one JSON object a line, one line a finished run, in the order in which the
runs ended. `RECORD_SCHEMA` is the contract with whoever reads them.
"""

from __future__ import annotations

from typing import Any

FORMAT = "mapo-kernels study 1"
RECORDS_NAME = "ablation.jsonl"

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
# What a step of RL records, one number a step.
STEP_LISTS = {
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
