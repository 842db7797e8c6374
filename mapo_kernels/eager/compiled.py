"""The backend `inductor`: functions of the eager backend, compiled by torch.compile.

A function is compiled once for each kind of call: which tensors there are, their dtypes and
dimensions, and the choices of the specs. Sizes and numbers vary within a kind. As in every program,
torch gives sizes of 1, and a number that changes, a graph of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import FunctionType
from typing import Any

import torch

from mapo_kernels import backend
from mapo_kernels.spec import AdvantageSpec, LossSpec

# What makes machine code of a graph, as torch.compile takes it.
ENGINE: Any = "inductor"
_compiled: dict[Any, Callable[..., Any]] = {}


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which is compiled where the backend is `inductor`.

    Its arguments are tensors, numbers, choices, specs and tuples of them; the first, or the first
    of that, is a tensor.
    """

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        first = arguments[0]
        x = first if isinstance(first, torch.Tensor) else first[0]
        # What traces this call already compiles it, too.
        if torch.compiler.is_compiling() or not backend.is_compiled(x):
            return function(*arguments, **named)
        kind = (function, _kind(arguments))
        if kind not in _compiled:
            _compiled[kind] = torch.compile(
                _copy(function), backend=ENGINE, dynamic=True, fullgraph=True
            )
        with torch.no_grad():
            return _compiled[kind](*_apart(arguments), **named)

    return call


def _copy(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with code of its own: torch compiles one code object only a few times."""
    code = function.__code__.replace(co_name=f"{function.__name__}_{len(_compiled)}")
    own = FunctionType(code, function.__globals__, code.co_name, function.__defaults__)
    own.__module__ = function.__module__
    return own


def _apart(value: Any) -> Any:
    """`value` with no tensor that torch knows as a view: a graph is for one shape of the base."""
    if isinstance(value, torch.Tensor):
        return value.detach() if value._is_view() else value
    if not isinstance(value, tuple):
        return value
    parts = [_apart(x) for x in value]
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)


def _kind(value: Any) -> Any:
    """What a graph is made for, in `value`."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.dim(), value.device
    if isinstance(value, (LossSpec, AdvantageSpec)):
        return type(value), value.pack()[1]
    if isinstance(value, tuple):
        return type(value), tuple(_kind(x) for x in value)
    return type(value) if type(value) in (int, float) else value
