"""Names of arguments: a misspelt one is an error that says which one is nearest."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=type)


def names_checked(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, which answers an unknown keyword by the nearest one it knows.

    Signature and help stay its own, and torch.compile traces through it.
    """
    known = frozenset(inspect.signature(function).parameters)

    @wraps(function)
    def call(*arguments: P.args, **named: P.kwargs) -> R:
        for name in named:
            if name not in known:
                raise _unknown(function.__qualname__.removesuffix(".__init__"), name, function)
        return function(*arguments, **named)

    return call


def settings_checked(cls: C) -> C:
    """A class whose constructor is `names_checked`."""
    cls.__init__ = names_checked(cls.__init__)  # type: ignore[misc]
    return cls


def require_names(caller: str, names: Iterable[str], function: Callable[..., Any]) -> None:
    """Raise unless all `names`, which `caller` was given, are arguments of `function`."""
    known = inspect.signature(function).parameters
    for name in names:
        if name not in known:
            raise _unknown(caller, name, function)


def _unknown(caller: str, name: str, function: Callable[..., Any]) -> TypeError:
    """The error for an argument `name` that `function` does not have."""
    parameters = inspect.signature(function).parameters
    own = [known for known in parameters if known != "self"]
    meant = {known: repr(known) for known in own}
    for known, parameter in parameters.items():
        # A setting of a spec, such as eps_low of LossSpec, is easily given to the function itself.
        if is_dataclass(parameter.default):
            kind = type(parameter.default).__name__
            for field in fields(parameter.default):
                meant.setdefault(field.name, f"{known}={kind}({field.name}=...)")
    nearest = get_close_matches(name, meant, n=1)
    advice = f"did you mean {meant[nearest[0]]}?" if nearest else f"expected {', '.join(own)}"
    return TypeError(f"{caller}() got an unexpected keyword argument {name!r}: {advice}")
