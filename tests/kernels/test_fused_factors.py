"""Advantages have the same bits in kernels that are compiled with fused multiply-adds or without.

The interpreter fuses what the source says and nothing else. Here the source runs on numbers whose
products are added exactly, as a compiler may have them.
"""

import operator
from types import FunctionType, SimpleNamespace

import numpy as np
import pytest

import mapo_kernels as mk
from mapo_kernels import formula, group_factors, numerics
from mapo_kernels._triton import is_device_function


class Number:
    """Float32 numbers; of products also the exact ones, where a sum may take these.

    `fused` says which of two summands is a product that is not rounded: none, or if it can be
    chosen the first or the second.
    """

    fused = "none"

    def __init__(self, value, exact=None):
        self.value, self.exact = np.float32(value), exact

    def plus(self, other, sign=1):
        other = numbers(other)
        terms = [np.longdouble(x.value) for x in (self, other)]
        products = [x.exact for x in (self, other)]
        order = {"none": (), "first": (0, 1), "second": (1, 0)}[self.fused]
        chosen = next((i for i in order if products[i] is not None), None)
        if chosen is not None:
            terms[chosen] = products[chosen]
        return Number(terms[0] + sign * terms[1])

    def __mul__(self, other):
        exact = np.longdouble(self.value) * np.longdouble(numbers(other).value)
        return Number(exact, exact)

    def __sub__(self, other):
        return self.plus(other, -1)

    def __rsub__(self, other):
        return numbers(other).plus(self, -1)

    def __truediv__(self, other):
        return Number(self.value / numbers(other).value)

    def __rtruediv__(self, other):
        return numbers(other) / self

    def __neg__(self):
        return Number(-self.value, None if self.exact is None else -self.exact)

    __add__ = __radd__ = plus
    __rmul__ = __mul__


def numbers(x):
    return x if isinstance(x, Number) else Number(x)


def compared(compare):
    return lambda a, b: compare(a.value, numbers(b).value)


for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Number, f"__{_name}__", compared(getattr(operator, _name)))


def unary(function):
    return lambda x: Number(function(numbers(x).value))


OPERATIONS = SimpleNamespace(
    abs=unary(np.abs),
    div_rn=operator.truediv,
    exp2=unary(np.exp2),
    fma=lambda x, y, z: Number((numbers(x) * y).exact + np.longdouble(numbers(z).value)),
    log2=unary(np.log2),
    sqrt=unary(np.sqrt),
    where=lambda c, x, y: Number(np.where(c, numbers(x).value, numbers(y).value)),
)
NAMES = {"tl": OPERATIONS}
for _module in (formula, group_factors, numerics):
    for _name, _value in vars(_module).items():
        if is_device_function(_value):
            NAMES[_name] = FunctionType(_value.fn.__code__, NAMES, _name)


def groups():
    """What a kernel knows of 4096 groups of up to 40, some of them far from 0: see `Moments`."""
    draw = np.random.default_rng(0)
    count = draw.integers(2, 41, 4096)
    successes = draw.integers(0, count + 1)
    lowest = draw.standard_normal(4096) * 2.0 ** draw.integers(-8, 8, 4096)
    highest = lowest + draw.random(4096)
    mean = lowest + (highest - lowest) * draw.random(4096)
    squares, batch_std = draw.random(4096) * count, draw.random(4096)
    return [Number(x) for x in (count, lowest, highest, mean, squares, successes, 1.0, batch_std)]


@pytest.mark.parametrize(
    "settings",
    [
        *({"certainty": x} for x in ("quadratic", "linear", "entropy", "step", 0.3)),
        *({"estimator": x} for x in ("grpo", "apd", "mean", "rloo")),
        *({"scale": "batch", "estimator": x} for x in ("mapo", "grpo")),
        {"apd": "paper"},
        {"pass_at_k": 2},
        {"pass_at_k": 5, "std_correction": 0, "estimator": "grpo"},
        {"difficulty": "focal"},
        {"difficulty": "power", "estimator": "grpo"},
    ],
    ids=str,
)
def test_fusing_changes_no_advantage(settings, monkeypatch):
    spec, found = mk.AdvantageSpec(**settings), {}
    for fused in ("none", "first", "second"):
        monkeypatch.setattr(Number, "fused", fused)
        with np.errstate(all="ignore"):
            found[fused] = NAMES["group_advantage"](*groups(), spec.numbers, spec.kind)
    for fused in ("first", "second"):
        for x, y in zip(found["none"], found[fused], strict=True):
            np.testing.assert_array_equal(x.value, y.value)
