"""Which implementation runs: fused Triton kernels, or the eager twin on torch tensors.

The eager twin runs one torch operation after the other, or compiled by torch.compile (`inductor`).
"""

from __future__ import annotations

import torch

from mapo_kernels._triton import (
    HAS_TRITON,
    IS_INSTALLED,
    TRITON_FAULT,
    environment,
    interprets,
)
from mapo_kernels.choices import BACKENDS as BACKENDS
from mapo_kernels.choices import Backend, Computing
from mapo_kernels.tracing import constant_in_graphs

_ENVIRONMENT = "MAPO_KERNELS_BACKEND"
_chosen: Backend | None = None


def set_backend(name: Backend | None) -> None:
    """Choose the backend for this process.

    Args:
        name: `auto` (Triton on a GPU, eager elsewhere and for float64), `triton`, `eager`,
            `inductor` (the eager backend's functions under torch.compile: a C++ compiler and some
            minutes of compiling buy what they need on a CPU), or None to follow the environment
            variable MAPO_KERNELS_BACKEND again (in any case; empty is `auto`).

    Raises:
        ValueError: `name` is none of these.
    """
    global _chosen
    if name is not None and name not in BACKENDS:
        raise ValueError(f"name: expected one of {list(BACKENDS)} or None, got {name!r}")
    _chosen = name


def _setting() -> Backend:
    """What was chosen: by `set_backend`, else by the environment, where empty means unset."""
    if _chosen is not None:
        return _chosen
    written = environment(_ENVIRONMENT)
    choice = written.strip().lower() or "auto"
    if choice not in BACKENDS:
        raise ValueError(f"{_ENVIRONMENT}: expected one of {list(BACKENDS)}, got {written!r}")
    return choice


# The environment cannot be traced by torch.compile, and need not be: tracing settles the backend.
@constant_in_graphs
def resolve_backend(device_type: str, is_double: bool = False) -> Computing:
    """The backend that a call with tensors on `device_type` uses.

    Args:
        device_type: `torch.device.type` of the inputs, such as `cuda` or `cpu`.
        is_double: whether every floating-point input is float64, which only the eager backend
            computes, whatever is chosen.

    Returns:
        `triton`, `eager` or `inductor`.

    Raises:
        ValueError: MAPO_KERNELS_BACKEND is none of auto, triton, eager, inductor.
        RuntimeError: `triton` or `inductor` was asked for and cannot run here.
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
    if choice == "inductor" and device_type == "cpu" and not _has_compiler():
        raise RuntimeError(
            f"backend 'inductor': expected a C++ compiler that runs, got none of "
            f"{_compilers()} (CXX names another); backend 'eager' needs none"
        )
    return choice


def _compilers() -> list[str]:
    """What torch.compile looks for, by name."""
    import torch._inductor.config as inductor

    found = inductor.cpp.cxx
    return [x for x in (found if isinstance(found, (list, tuple)) else [found]) if x]


def _has_compiler() -> bool:
    """Whether one of these is there; torch remembers one that was found."""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return False
    return True


def is_eager(x: torch.Tensor) -> bool:
    """Whether torch, and not Triton's kernels, computes what comes with `x`: the one switch.

    It does where there is no sequence, and so no program to launch, too. Call it through its
    module: tests and tools replace this one name.
    """
    if x.dim() and x.shape[0] == 0:
        return True
    return resolve_backend(x.device.type, x.dtype == torch.float64) != "triton"


def is_compiled(x: torch.Tensor) -> bool:
    """Whether torch computes that in graphs which it compiles."""
    if _setting() != "inductor" or (x.dim() and x.shape[0] == 0):
        return False
    return resolve_backend(x.device.type, x.dtype == torch.float64) == "inductor"


def describe_backend() -> str:
    """One line: which backend this machine uses and why; `none` where the one chosen cannot run."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    why = TRITON_FAULT or f"torch sees device type {device}"
    try:
        return f"{resolve_backend(device)} (setting {_setting()}; {why})"
    except (ValueError, RuntimeError) as error:
        return f"none ({error})"
