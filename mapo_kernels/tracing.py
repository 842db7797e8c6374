"""What torch.compile is told about a function, without importing it: that takes seconds.

The decorators of `torch.compiler` import torch._dynamo where they are written. Few processes that
compute a loss compile anything.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch


class _Operator(threading.local):
    runs = False


# Whether this thread runs an operator of a compiled graph: what it allocates may belong to that.
operator = _Operator()

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])


def constant_in_graphs(function: F) -> F:
    """`torch.compiler.assume_constant_result`: tracing calls it, and keeps what it returned."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def outside_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """`torch.compiler.disable`: a graph ends before `function` and another begins behind it."""

    @wraps(function)
    def call(*arguments: P.args, **named: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*arguments, **named)
        return function(*arguments, **named)

    return call
