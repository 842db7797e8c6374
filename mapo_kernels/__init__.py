"""MAPO advantages and clipped policy losses in fused Triton kernels.

CPU tensors, and machines without Triton, take the eager backend: same functions, same numbers.

What is exported is imported when it is first asked for: a trainer's plugin (`integrations`) is
loaded in every process of a run, and few of those processes compute a loss.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from mapo_kernels._version import __version__

if TYPE_CHECKING:
    from mapo_kernels.advantages import group_advantages
    from mapo_kernels.autograd import (
        MapoLinearLossFunction,
        MapoLogitsLossFunction,
        MapoLossFunction,
    )
    from mapo_kernels.backend import describe_backend, resolve_backend, set_backend
    from mapo_kernels.calls import LossOutput, TokenLossOutput
    from mapo_kernels.groups import GroupStats
    from mapo_kernels.losses import mapo_loss, mapo_loss_from_hidden, mapo_loss_from_logits
    from mapo_kernels.masks import SamplingMask
    from mapo_kernels.metrics import Metrics
    from mapo_kernels.modules import MapoLinearLoss, MapoLogitsLoss, MapoLoss
    from mapo_kernels.plan import Plan, make_plan
    from mapo_kernels.scoring import token_logprobs, token_logprobs_from_hidden
    from mapo_kernels.spec import AdvantageSpec, LossSpec

__all__ = [
    "AdvantageSpec",
    "GroupStats",
    "LossOutput",
    "LossSpec",
    "MapoLinearLoss",
    "MapoLinearLossFunction",
    "MapoLogitsLoss",
    "MapoLogitsLossFunction",
    "MapoLoss",
    "MapoLossFunction",
    "Metrics",
    "Plan",
    "SamplingMask",
    "TokenLossOutput",
    "__version__",
    "describe_backend",
    "group_advantages",
    "make_plan",
    "mapo_loss",
    "mapo_loss_from_hidden",
    "mapo_loss_from_logits",
    "resolve_backend",
    "set_backend",
    "token_logprobs",
    "token_logprobs_from_hidden",
]

_HOMES = {
    "AdvantageSpec": "spec",
    "GroupStats": "groups",
    "LossOutput": "calls",
    "LossSpec": "spec",
    "MapoLinearLoss": "modules",
    "MapoLogitsLoss": "modules",
    "MapoLinearLossFunction": "autograd",
    "MapoLogitsLossFunction": "autograd",
    "MapoLoss": "modules",
    "MapoLossFunction": "autograd",
    "Metrics": "metrics",
    "Plan": "plan",
    "SamplingMask": "masks",
    "TokenLossOutput": "calls",
    "describe_backend": "backend",
    "group_advantages": "advantages",
    "make_plan": "plan",
    "mapo_loss": "losses",
    "mapo_loss_from_hidden": "losses",
    "mapo_loss_from_logits": "losses",
    "resolve_backend": "backend",
    "set_backend": "backend",
    "token_logprobs": "scoring",
    "token_logprobs_from_hidden": "scoring",
}


if not TYPE_CHECKING:  # which would take any name for an exported one

    def __getattr__(name: str) -> object:
        """An exported name, or a module of this package, imported now."""
        if name in _HOMES:
            value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
            globals()[name] = value
            return value
        if name.startswith("__") or find_spec(f"{__name__}.{name}") is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
