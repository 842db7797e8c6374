"""MAPO advantages and clipped policy losses in fused Triton kernels.

CPU tensors, and machines without Triton, take the eager backend: same functions, same numbers.
"""

from mapo_kernels._version import __version__
from mapo_kernels.advantages import GroupStats
from mapo_kernels.api import (
    LossOutput,
    MapoLoss,
    MapoLossFunction,
    group_advantages,
    mapo_loss,
)
from mapo_kernels.backend import describe_backend, resolve_backend, set_backend
from mapo_kernels.plan import Plan, make_plan
from mapo_kernels.spec import AdvantageSpec, LossSpec

__all__ = [
    "AdvantageSpec",
    "GroupStats",
    "LossOutput",
    "LossSpec",
    "MapoLoss",
    "MapoLossFunction",
    "Plan",
    "__version__",
    "describe_backend",
    "group_advantages",
    "make_plan",
    "mapo_loss",
    "resolve_backend",
    "set_backend",
]
