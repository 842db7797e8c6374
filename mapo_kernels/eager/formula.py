"""The device functions of `mapo_kernels.formula`, run on torch tensors.

Not a second copy: the same code objects, with `tl` bound to the few torch operations they use.
Hence the eager backend works without Triton, on any device, in float64, under autograd and under
`torch.compile`.
"""

from __future__ import annotations

import sys
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch

from mapo_kernels import bounds, formula
from mapo_kernels._triton import is_device_function
from mapo_kernels.eager.select import only


def operand(x: Any, like: torch.Tensor) -> Any:
    """A number as an operand of a function; of an operator it may be one in any case.

    Of a number that changes torch.compile makes an input of the graph where it is added, and else
    a graph for each value.
    """
    return like.new_zeros(()) + x if torch.compiler.is_compiling() else x


def _clamp(x: torch.Tensor, low: Any, high: Any, propagate_nan: None) -> torch.Tensor:
    return torch.clamp(x, operand(low, x), operand(high, x))


def _fma(x: torch.Tensor, y: Any, z: Any) -> torch.Tensor:
    return (x * y).add_(z)


def _maximum(x: torch.Tensor, y: torch.Tensor, propagate_nan: None) -> torch.Tensor:
    return torch.maximum(x, y)


def _where(condition: torch.Tensor, x: Any, y: Any) -> torch.Tensor:
    if isinstance(y, float) and y == 0.0 and isinstance(x, torch.Tensor):
        return only(x, condition)
    if isinstance(x, float) and x == 0.0 and isinstance(y, torch.Tensor):
        return only(y, ~condition)
    if isinstance(x, torch.Tensor):
        y = operand(y, x)
    return torch.where(condition, x, y)


_TORCH = SimpleNamespace(
    # Torch's extrema pass NaN on in any case.
    PropagateNan=SimpleNamespace(ALL=None),
    abs=torch.abs,
    clamp=_clamp,
    div_rn=torch.div,
    exp=torch.exp,
    exp2=torch.exp2,
    floor=torch.floor,
    fma=_fma,
    log=torch.log,
    log2=torch.log2,
    maximum=_maximum,
    sqrt=torch.sqrt,
    where=_where,
)

# A module of its own, because torch.compile looks up a function's globals by its module's name.
_module = ModuleType(f"{__name__}_formula", formula.__doc__)
sys.modules[_module.__name__] = _module
_namespace: dict[str, Any] = vars(_module)
for _source in (formula, bounds):
    _namespace.update({k: v for k, v in vars(_source).items() if k not in _namespace})
_namespace.update(tl=_TORCH, FLOAT32=False)
for _name, _value in list(_namespace.items()):
    if is_device_function(_value):
        _namespace[_name] = FunctionType(_value.fn.__code__, _namespace, _name)

token_loss = _namespace["token_loss"]
ratio_part = _namespace["ratio_part"]
rollout_weight = _namespace["rollout_weight"]
group_advantage = _namespace["group_advantage"]
reward_unit = _namespace["reward_unit"]
row_advantage = _namespace["row_advantage"]
loss_denominator = _namespace["loss_denominator"]
sequence_divisor = _namespace["sequence_divisor"]
token_metrics = _namespace["token_metrics"]
signal_behind_weight = _namespace["signal_behind_weight"]
certainty_weight = _namespace["certainty_weight"]
approx_kl = _namespace["approx_kl"]
kl_term = _namespace["kl_term"]
exp = _namespace["exp"]
log1p = _namespace["log1p"]
row_summary = _namespace["row_summary"]
certain_elsewhere = _namespace["certain_elsewhere"]
outside_trust_region = _namespace["outside_trust_region"]
outside = _namespace["outside"]
rollout_ratio = _namespace["rollout_ratio"]
clamp = _namespace["clamp"]
