"""The API reference shows signatures and help as Python has them at run time.

The losses and `make_plan` take the keywords of a TypedDict, and a decorator writes them into their
signature and docstring (`mapo_kernels/arguments.py`). Read from the source alone, they would be
`**arguments`.
"""

import ast
import inspect
from dataclasses import is_dataclass
from typing import Any

import griffe


def _shown(default: object) -> str:
    """A default as one would write it: of a spec whose fields have theirs, the call alone."""
    kind = type(default)
    return f"{kind.__name__}()" if is_dataclass(kind) and default == kind() else repr(default)


def _parameter(one: inspect.Parameter, function: griffe.Function) -> griffe.Parameter:
    """A parameter of a run-time signature, for the reference."""
    annotation: griffe.Expr | str | None = None
    if one.annotation is not inspect.Parameter.empty:
        text = inspect.formatannotation(one.annotation).strip("'")
        text = "Any" if text.startswith("Unpack[") else text
        annotation = griffe.get_annotation(ast.parse(text, mode="eval").body, parent=function)
    return griffe.Parameter(
        one.name,
        kind=griffe.ParameterKind(one.kind.description),
        annotation=annotation,
        default=None if one.default is inspect.Parameter.empty else _shown(one.default),
    )


class RuntimeSignatures(griffe.Extension):
    """Signature and docstring of functions that say `**arguments: Unpack[...]` in the source."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Replace what the source says where the decorator said more."""
        if not any("Unpack[" in str(one.annotation) for one in func.parameters):
            return
        function = griffe.dynamic_import(func.path)
        parameters = inspect.signature(function).parameters.values()
        func.parameters = griffe.Parameters(*(_parameter(one, func) for one in parameters))
        func.docstring.value = inspect.getdoc(function)
