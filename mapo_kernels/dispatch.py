"""Who computes: the eager backend, a Triton launch, or the launch as a torch operator.

Inside a compiled graph a launch is an operator, so that `torch.compile` sees it whole. Outside it
the launcher is called directly: an operator costs tens of microseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mapo_kernels import backend, tracing
from mapo_kernels._ops import add_op_namespace_prefix
from mapo_kernels.batch import Batch, GroupInputs, RowInputs, TokenResults
from mapo_kernels.spec import AdvantageSpec, LossSpec

_TUPLES = {x.__name__: x for x in (Batch, GroupInputs, RowInputs, TokenResults, tuple)}
_SPECS = {x.__name__: x for x in (LossSpec, AdvantageSpec)}
_SCHEMA = "(Tensor[] tensors, Tensor(a!)[] out, float[] numbers, str form) -> ()"


def dispatched(
    launch: Callable[..., None],
    eager: Callable[..., Any] | None,
    allocate: Callable[..., Any] | None,
) -> Callable[..., Any]:
    """A function of the arguments of `launch`, but for `out`, that returns what was computed.

    Args:
        launch: `launch(*arguments, out)` writes to `out`, a tensor or a tuple of tensors. Its first
            argument, or the first in that, is a tensor, which decides where it runs.
        eager: `eager(*arguments, out)` returns what `launch` writes, to `out` where one is given;
            None if the caller sees to the eager backend.
        allocate: `allocate(*arguments)` makes `out`, so that no operator needs to say what it
            returns; None if the caller always gives one.
    """
    name = launch.__name__.removeprefix("launch_")

    @torch.library.custom_op(add_op_namespace_prefix(name), mutates_args=("out",), schema=_SCHEMA)
    def operator(tensors, out, numbers, form):  # type: ignore[no-untyped-def]
        fields, reads, writes = iter(form.split()), iter(tensors), iter(out)
        values = iter(numbers)
        arguments = _unpack(fields, reads, values)
        tracing.operator.runs = True
        try:
            launch(*arguments, _unpack(fields, writes, values))
        finally:
            tracing.operator.runs = False

    operator.register_fake(lambda tensors, out, numbers, form: None)

    def call(*arguments: Any, out: Any = None) -> Any:
        first = arguments[0]
        if eager and backend.is_eager(first if isinstance(first, torch.Tensor) else first[0]):
            return eager(*arguments, out=out)
        if out is None:
            assert allocate is not None
            out = allocate(*arguments)
        if not torch.compiler.is_compiling():
            launch(*arguments, out)
            return out
        operator(*packed(arguments, out))
        return out

    call.__name__, call.__doc__ = name, launch.__doc__
    return call


def packed(
    arguments: tuple[Any, ...], out: Any
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[float], str]:
    """The arguments of a launch, and `out`, as its operator takes them."""
    form: list[str] = []
    reads: list[torch.Tensor] = []
    writes: list[torch.Tensor] = []
    numbers: list[float] = []
    _pack(arguments, form, reads, numbers)
    _pack(out, form, writes, numbers)
    return reads, writes, numbers, " ".join(form)


def _pack(value: Any, form: list[str], tensors: list[torch.Tensor], numbers: list[float]) -> None:
    """Take `value` apart: its tensors, its numbers (a graph may hold them as symbols), its form."""
    if isinstance(value, torch.Tensor):
        form.append("tensor")
        tensors.append(value)
    elif value is None or isinstance(value, (bool, str, torch.dtype)):
        form.append(str(value))
    elif isinstance(value, tuple):
        form.append(type(value).__name__)
        form.append(str(len(value)))
        for x in value:
            _pack(x, form, tensors, numbers)
    elif type(value).__name__ in _SPECS:
        own, kinds = value.pack()
        form += [type(value).__name__, kinds]
        numbers += own
    else:
        form.append("int" if isinstance(value, int) else "float")
        numbers.append(float(value))


def _unpack(form: Any, tensors: Any, numbers: Any) -> Any:
    """What `_pack` took apart."""
    word = next(form)
    if word == "tensor":
        return next(tensors)
    if word in ("int", "float"):
        return (int if word == "int" else float)(next(numbers))
    if word in _TUPLES:
        values = [_unpack(form, tensors, numbers) for _ in range(int(next(form)))]
        return tuple(values) if word == "tuple" else _TUPLES[word](*values)
    if word in _SPECS:
        kinds = next(form)
        own = [next(numbers) for _ in range(_SPECS[word].count(kinds))]
        return _SPECS[word].unpack(own, kinds)
    if word.startswith("torch."):
        return getattr(torch, word.removeprefix("torch."))
    return {"None": None, "True": True, "False": False}.get(word, word)
