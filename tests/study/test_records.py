"""The records of the ablation: what their schema accepts and refuses."""

import copy

import pytest

pytest.importorskip("jsonschema")

from jsonschema import Draft202012Validator

from mapo_kernels import files
from mapo_kernels.study import settings

RECORD = {
    "format": settings.FORMAT,
    "stage": "main",
    "estimator": "mapo",
    "regime": "mixed",
    "reward": "binary",
    "seed": 0,
    "learning_rate": 1e-3,
    "settings": {},
    "warmup": {"updates": 10, "success": 0.3},
    "evals": [{"step": 0, "success_sampled": 0.3, "success_greedy": 0.5}],
    "steps": {name: [0.5, None] for name in settings.STEP_LISTS},
    "seconds": 1.0,
    "commit": "unknown",
    "versions": {},
    "machine": "2 cores",
}


def test_the_schema_is_one_and_accepts_a_record():
    Draft202012Validator.check_schema(settings.RECORD_SCHEMA)
    files.check(RECORD, settings.RECORD_SCHEMA)


@pytest.mark.parametrize(
    "name, value",
    [
        ("estimator", "ppo"),
        ("regime", "harder"),
        ("reward", "length"),
        ("stage", "other"),
        ("format", "mapo-kernels demo 2"),
        ("seed", -1),
        ("evals", []),
        ("steps", {}),
        ("colour", "red"),
    ],
)
def test_the_schema_refuses_what_is_none(name, value):
    record = copy.deepcopy(RECORD) | {name: value}
    with pytest.raises(ValueError, match=name):
        files.check(record, settings.RECORD_SCHEMA)
