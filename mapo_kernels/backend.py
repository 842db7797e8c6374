"""Which implementation runs: fused Triton kernels, or the eager twin on torch tensors."""

from __future__ import annotations

import torch

from mapo_kernels._triton import (
    HAS_TRITON,
    IS_INSTALLED,
    TRITON_FAULT,
    environment,
    interprets,
)

BACKENDS = ("auto", "triton", "eager")
_ENVIRONMENT = "MAPO_KERNELS_BACKEND"
_chosen: str | None = None


def set_backend(name: str | None) -> None:
    """Choose the backend for this process.

    Args:
        name: `auto` (Triton on a GPU, eager elsewhere and for float64), `triton`, `eager`, or None
            to follow the environment variable MAPO_KERNELS_BACKEND again (in any case; empty is
            `auto`).

    Raises:
        ValueError: `name` is none of these.
    """
    global _chosen
    if name is not None and name not in BACKENDS:
        raise ValueError(f"name: expected one of {list(BACKENDS)} or None, got {name!r}")
    _chosen = name


def _setting() -> str:
    """What was chosen: by `set_backend`, else by the environment, where empty means unset."""
    if _chosen is not None:
        return _chosen
    written = environment(_ENVIRONMENT)
    choice = written.strip().lower() or "auto"
    if choice not in BACKENDS:
        raise ValueError(f"{_ENVIRONMENT}: expected one of {list(BACKENDS)}, got {written!r}")
    return choice


# The environment cannot be traced by torch.compile, and need not be: tracing settles the backend.
@torch.compiler.assume_constant_result
def resolve_backend(device_type: str, is_double: bool = False) -> str:
    """The backend that a call with tensors on `device_type` uses.

    Args:
        device_type: `torch.device.type` of the inputs, such as `cuda` or `cpu`.
        is_double: whether every floating-point input is float64, which only the eager backend
            computes, whatever is chosen.

    Returns:
        `triton` or `eager`.

    Raises:
        ValueError: MAPO_KERNELS_BACKEND is none of auto, triton, eager.
        RuntimeError: `triton` was asked for and cannot run here.
    """
    choice = _setting()
    # ROCm calls its devices cuda too.
    on_gpu = device_type in ("cuda", "xpu")
    if is_double:
        return "eager"
    if choice == "auto":
        # A Triton that is there but too old is an error, and not a silent detour.
        choice = "triton" if IS_INSTALLED and on_gpu else "eager"
    if choice == "triton":
        if not HAS_TRITON:
            raise RuntimeError(
                f"backend 'triton': expected a Triton that can be used, got {TRITON_FAULT}; "
                f"backend 'eager' needs none"
            )
        if not on_gpu and not interprets():
            raise RuntimeError(
                f"backend 'triton': expected tensors on a GPU (or TRITON_INTERPRET=1), got "
                f"{device_type}"
            )
    return choice


def is_eager(x: torch.Tensor) -> bool:
    """Whether the eager backend computes what comes with `x`: the one switch between the two.

    It does where there is no sequence, and so no program to launch, too. Call it through its
    module: tests and tools replace this one name.
    """
    if x.dim() and x.shape[0] == 0:
        return True
    return resolve_backend(x.device.type, x.dtype == torch.float64) == "eager"


def describe_backend() -> str:
    """One line: which backend this machine uses and why; `none` where the one chosen cannot run."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    why = TRITON_FAULT or f"torch sees device type {device}"
    try:
        return f"{resolve_backend(device)} (setting {_setting()}; {why})"
    except (ValueError, RuntimeError) as error:
        return f"none ({error})"
