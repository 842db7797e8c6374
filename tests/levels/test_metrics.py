"""Metrics are a dict, whoever looks first: until then they are one tensor of all values."""

import copy
import json
import pickle
from collections.abc import MutableMapping

import pytest
import torch

import mapo_kernels as mk

NAMES = {
    "active_tokens",
    "scored_tokens",
    "clip_fraction_low",
    "clip_fraction_high",
    "ratio_mean",
    "ratio_max",
    "approx_kl",
}
LOGPROBS = torch.tensor([[-1.0, -2.0], [-3.0, -0.5]])


def fresh():
    """Metrics that nobody has read."""
    return mk.mapo_loss(LOGPROBS, advantages=torch.tensor([1.0, -1.0])).metrics


def numbers(metrics):
    return {name: float(value) for name, value in metrics.items()}


KNOWN = numbers(fresh())
PLAIN = mk.Metrics(a=torch.ones(()))

READINGS = {
    "dict": dict,
    "unpacked": lambda m: {**m},
    "as keywords": lambda m: (lambda **given: given)(**m),
    "or": lambda m: m | {},
    "or of a dict": lambda m: {} | m,
    "or into": lambda m: {}.__ior__(m),
    "copy": lambda m: m.copy(),
    "copy.copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "Metrics": mk.Metrics,
    "its own type": lambda m: type(m)({k: v for k, v in m.items()}),
    "its own type, of it": lambda m: type(m)(m),
    "update": lambda m: (found := {}, found.update(m))[0],
    "update of Metrics": lambda m: (found := mk.Metrics(), found.update(m))[0],
    "items": lambda m: dict(m.items()),
    "zip": lambda m: dict(zip(m.keys(), m.values(), strict=True)),
    "iteration": lambda m: {name: m[name] for name in m},
    "reversed": lambda m: {name: m[name] for name in reversed(m)},
    "get": lambda m: {name: m.get(name) for name in NAMES},
    "pop": lambda m: {name: m.pop(name) for name in NAMES},
    "popitem": lambda m: dict([m.popitem() for _ in NAMES]),
    "setdefault": lambda m: {name: m.setdefault(name, None) for name in NAMES},
    "json": lambda m: {
        name: torch.tensor(x) for name, x in json.loads(json.dumps(m, default=float)).items()
    },
}


@pytest.mark.parametrize("reading", READINGS)
def test_each_way_of_reading_finds_all(reading):
    metrics = fresh()
    assert isinstance(metrics, dict) and isinstance(metrics, mk.Metrics)
    assert numbers(READINGS[reading](metrics)) == KNOWN
    assert set(KNOWN) == NAMES


def test_other_first_looks():
    assert len(fresh()) == len(NAMES) and fresh() and "ratio_max" in fresh()
    assert repr(fresh()) == repr(dict(fresh()))
    assert fresh() == fresh() and not fresh() != fresh() and dict(fresh()) == fresh()
    assert isinstance(fresh(), MutableMapping)
    with pytest.raises(KeyError):
        fresh()["entropy"]
    with pytest.raises(TypeError, match="unhashable"):
        hash(fresh())


def test_changes_come_on_top():
    metrics = fresh()
    metrics["a"] = torch.ones(())
    assert set(metrics) == NAMES | {"a"}
    metrics = fresh()
    del metrics["ratio_max"]
    assert set(metrics) == NAMES - {"ratio_max"}
    metrics = fresh()
    metrics.clear()
    assert not metrics
    metrics = fresh()
    metrics |= {"a": 1}
    assert set(metrics) == NAMES | {"a"}
    assert set(PLAIN | fresh()) == set(fresh() | PLAIN) == NAMES | {"a"}


def test_what_has_been_read_is_ordinary_and_read_once():
    metrics = fresh()
    first = metrics["ratio_mean"]
    assert type(metrics) is mk.Metrics and metrics["ratio_mean"] is first
    assert vars(metrics) == {}
    assert first.shape == () and not first.requires_grad
