"""MAPO advantages and clipped policy losses in fused Triton kernels.

CPU tensors, and machines without Triton, take the eager backend: same functions, same numbers.
"""

from mapo_kernels._version import __version__
from mapo_kernels.advantages import GroupStats
from mapo_kernels.api import (
    LossOutput,
    MapoLoss,
    group_advantages,
    mapo_loss,
)
from mapo_kernels.api_linear import (
    MapoLinearLoss,
    mapo_loss_from_hidden,
    token_logprobs_from_hidden,
)
from mapo_kernels.api_logits import mapo_loss_from_logits, token_logprobs
from mapo_kernels.autograd import (
    MapoLinearLossFunction,
    MapoLogitsLossFunction,
    MapoLossFunction,
)
from mapo_kernels.backend import describe_backend, resolve_backend, set_backend
from mapo_kernels.plan import Plan, make_plan
from mapo_kernels.spec import AdvantageSpec, LossSpec

__all__ = [
    "AdvantageSpec",
    "GroupStats",
    "LossOutput",
    "LossSpec",
    "MapoLinearLoss",
    "MapoLinearLossFunction",
    "MapoLogitsLossFunction",
    "MapoLoss",
    "MapoLossFunction",
    "Plan",
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
