"""Triton where it can be used; where it cannot, a stand-in that keeps modules importable."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

# What is tested; older ones cannot compile kernels on structs.
_OLDEST = {"torch": (2, 10), "triton": (3, 6)}


def _too_old(**versions: str) -> str:
    """Which of these packages is older than what is tested; empty if none is."""
    return " and ".join(
        f"{name} {version} (expected {'.'.join(map(str, _OLDEST[name]))} or newer)"
        for name, version in versions.items()
        if tuple(int(x) for x in version.split(".")[:2]) < _OLDEST[name]
    )


try:
    import triton
    import triton.language as tl

    # Why the kernels cannot run here; empty if they can.
    TRITON_FAULT = _too_old(torch=torch.__version__, triton=triton.__version__)
    IS_INSTALLED = True
except ImportError:
    TRITON_FAULT = "Triton is not installed"
    IS_INSTALLED = False

HAS_TRITON = not TRITON_FAULT
if HAS_TRITON:
    jit = triton.jit
else:
    triton = None
    tl = SimpleNamespace(constexpr=None)

    def jit(fn: Any = None, **options: Any) -> Any:
        """Keep the Python source of a device function reachable as `.fn`, as `triton.jit` does."""
        if fn is None:
            return lambda function: jit(function, **options)
        return SimpleNamespace(fn=fn, __name__=fn.__name__)


def constant(x: Any) -> Any:
    """A number that kernels may read from their module."""
    return tl.constexpr(x) if HAS_TRITON else x


def environment(name: str) -> str:
    """A variable of the environment as it is now; empty where it is not set.

    Where it is not, `os.environ` takes as long to say so as the smallest tensor to be made.
    """
    raw = getattr(os.environ, "_data", None)
    if raw is not None and os.environ.encodekey(name) not in raw:  # type: ignore[attr-defined]
        return ""
    return os.environ.get(name, "")


def interprets() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return environment("TRITON_INTERPRET").lower() in ("1", "true", "yes", "on")


@cache
def warp_size() -> int:
    """Threads per warp of the GPU at hand."""
    return 32 if interprets() else triton.runtime.driver.active.get_current_target().warp_size


@cache
def architecture() -> str:
    """What the GPU at hand is compiled for, such as sm_90 or gfx942."""
    if interprets():
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


@cache
def converts_bfloat16() -> bool:
    """Whether the GPU at hand has an instruction that rounds to bfloat16; CDNA3 does not."""
    if interprets():
        return True
    target = triton.runtime.driver.active.get_current_target()
    return target.backend != "hip" or str(target.arch) not in (
        "gfx90a",
        "gfx940",
        "gfx941",
        "gfx942",
    )


@cache
def _is_nvidia() -> bool:
    return interprets() or triton.runtime.driver.active.get_current_target().backend == "cuda"


def registers(number: int) -> dict[str, int]:
    """The launch option that lets a thread have so many; only NVIDIA's compiler takes it."""
    return {"maxnreg": number} if _is_nvidia() else {}


def next_power_of_2(n: int) -> int:
    """The smallest that is at least n >= 1. Triton's own is a device function: 2 us to call."""
    return 1 << (n - 1).bit_length()


_HERE = nullcontext()


def on_device_of(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Makes the GPU of `x` the current one: Triton launches there, wherever the tensors are."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(x.device)


def is_device_function(value: Any) -> bool:
    """Whether `value` came out of `jit`."""
    return callable(getattr(value, "fn", None)) and hasattr(value, "__name__")
