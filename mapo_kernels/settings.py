"""What both specifications stand on: checks of single settings, and specs as numbers and texts."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection
from typing import Any, ClassVar


def require_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise unless `value` is one of `choices`."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected one of {sorted(choices)}, got {describe(value)}")
    if value not in choices:
        raise ValueError(f"{name}: expected one of {sorted(choices)}, got {value!r}")


def require_number(
    name: str,
    value: object,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Raise unless `value` is a finite number in the interval (ends excluded where `open_*`)."""
    # No infinity is inside, so an infinite end is open too.
    open_low, open_high = open_low or low == -math.inf, open_high or high == math.inf
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {describe(value)}")
    inside = (value > low if open_low else value >= low) and (
        value < high if open_high else value <= high
    )
    # An int may be beyond what a float holds.
    if not inside or abs(value) > sys.float_info.max:
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
        raise ValueError(f"{name}: expected a number in {interval}, got {value!r}")


def require_pair(name: str, value: object) -> None:
    """Raise unless `value` is a pair of finite numbers with 0 <= low < high."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name}: expected a pair (low, high) of numbers, got {describe(value)}")
    low, high = value
    for x in value:
        if isinstance(x, bool) or not isinstance(x, (int, float)):
            raise TypeError(
                f"{name}: expected a pair (low, high) of numbers, got {describe(value)}"
            )
    if not 0 <= low < high < math.inf:
        raise ValueError(f"{name}: expected 0 <= low < high < inf, got {value!r}")


def require_weights(name: str, value: object) -> None:
    """Raise unless `value` is a tuple or list of finite numbers, not all of them 0."""
    expected = "a tuple or list of numbers, one per reward"
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name}: expected {expected}, got {describe(value)}")
    for x in value:
        if isinstance(x, bool) or not isinstance(x, (int, float)):
            raise TypeError(f"{name}: expected {expected}, got {describe(value)}")
        if not abs(x) <= sys.float_info.max:
            raise ValueError(f"{name}: expected finite numbers, got {value!r}")
    if not any(value):
        raise ValueError(f"{name}: expected a number that is not 0 among them, got {value!r}")


def require_bool(name: str, value: object) -> None:
    """Raise unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {describe(value)}")


def describe(value: object) -> str:
    """What came, for an error message: the type and, where it is short, the value."""
    text = repr(value)
    return f"{type(value).__name__} {text}" if len(text) <= 60 else type(value).__name__


class Packable:
    """Lets a spec travel through a compiled graph, and, as a text, from rank to rank."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    _INTEGERS: ClassVar[tuple[str, ...]] = ()
    _kind: ClassVar[Any]  # of an instance, but no field
    _numbers: ClassVar[Any]

    def _make_canonical(self) -> None:
        """Give equal values one form, so that equal specs have one text: 0, -0.0 and 0.0 are 0.0.

        Ranks compare these texts. Numbers become floats, but those of `_INTEGERS`.
        """
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if value is None or isinstance(value, bool) or type(value) is str:
                continue
            if isinstance(value, str):
                value = str.__str__(value)  # of an enum or of NumPy
            elif name in self._INTEGERS:
                value = int(value)
            elif isinstance(value, (tuple, list)):
                value = tuple([float(x) + 0.0 for x in value])
            else:
                value = float(value) + 0.0
            object.__setattr__(self, name, value)
        # Once, and not in every call.
        kind, numbers = self._split()
        object.__setattr__(self, "_kind", kind)
        object.__setattr__(self, "_numbers", numbers)

    def _split(self) -> tuple[Any, Any]:
        """The compile-time choices and the run-time numbers."""
        raise NotImplementedError

    def pack(self) -> tuple[list[float], str]:
        """The fields in order: numbers (0 for other fields), and their kinds or other values.

        A graph may hold the numbers as symbols. A tuple has several of them.
        """
        values = [getattr(self, name) for name in self.__dataclass_fields__]
        numbers: list[float] = []
        for value in values:
            if isinstance(value, tuple):
                numbers += value
            else:
                numbers.append(float(value) if _kind(value) in ("int", "float") else 0.0)
        return numbers, ",".join([_kind(value) for value in values])

    @staticmethod
    def count(kinds: str) -> int:
        """How many numbers a spec of these kinds was packed into."""
        sizes = [int(k.removeprefix("tuple")) for k in kinds.split(",") if k.startswith("tuple")]
        return len(kinds.split(",")) - len(sizes) + sum(sizes)

    @classmethod
    def unpack(cls, numbers: list[float], kinds: str) -> Any:
        """The spec that was packed."""
        words = {"None": None, "True": True, "False": False}
        values: list[Any] = []
        i = 0
        for kind in kinds.split(","):
            if kind.startswith("tuple"):
                size = int(kind.removeprefix("tuple"))
                values.append(tuple(numbers[i : i + size]))
                i += size - 1
            elif kind == "int":
                values.append(int(numbers[i]))
            else:
                values.append(numbers[i] if kind == "float" else words.get(kind, kind))
            i += 1
        return cls(**dict(zip(cls.__dataclass_fields__, values, strict=True)))


def _kind(value: Any) -> str:
    if value is None or isinstance(value, (bool, str)):
        return str(value)
    if isinstance(value, tuple):
        return f"tuple{len(value)}"
    return "int" if isinstance(value, int) else "float"
