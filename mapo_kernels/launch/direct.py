"""Launches that go straight to a compiled kernel, once Triton has compiled it.

Of the 26 us that Triton 3.8 takes to launch the log-prob kernel 3 are the launch. The others find
out, argument by argument, which compiled variant it is, and call lists of hooks that are empty.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from mapo_kernels._triton import HAS_TRITON, triton

# What `Direct` repeats of Triton's own launch: where it differs, Triton launches.
_ITS_LAUNCH = (
    "kernel_cache,kernel_key_cache,target,backend,binder=self.device_caches[device]",
    "kernel.run(grid_0,grid_1,grid_2,stream,kernel.function,kernel.packed_metadata,launch_metadata,"
    "knobs.runtime.launch_enter_hook,knobs.runtime.launch_exit_hook,*bound_args.values())",
)


def _is_understood(run: Any) -> bool:
    """Whether this Triton launches as `Direct` does; not if a tool has taken its place, either."""
    if getattr(run, "__qualname__", "") != "JITFunction.run":
        return False
    try:
        source = "".join(inspect.getsource(run).split())
    except (OSError, TypeError):
        return False
    knobs = triton.knobs
    return (
        all(part in source for part in _ITS_LAUNCH)
        and hasattr(jit, "native_specialize_impl")
        and hasattr(knobs.runtime, "debug")
        and hasattr(knobs.runtime, "add_stages_inspection_hook")
        and hasattr(knobs.compilation, "instrumentation_mode")
    )


_run: Any = None
if HAS_TRITON:
    from triton.runtime import jit

    if _is_understood(jit.JITFunction.run):
        _run = jit.JITFunction.run


class _Variant(NamedTuple):
    """A compiled variant of a kernel: under which key Triton keeps it, and what its launch takes.

    Triton calls `launch` with these too, and with the arguments in the order of the signature.
    """

    compiled: Any
    key: str
    launch: Callable[..., None]
    function: int
    metadata: Any
    constants: tuple[Any, ...]


class Direct:
    """`Direct(kernel)[grid](...)` is `kernel[grid](...)`, and sooner from the second time on.

    Positional arguments are what the kernel takes at run time, keywords are its compile-time
    arguments, which come last in its signature, and options. The grid has one dimension.

    A variant is found by the device, what Triton specialises on (dtypes, alignment, what is None,
    integers that are 1 or multiples of 16), keywords and settings. It counts only while Triton
    itself keeps it. Triton launches what is new or interpreted, all that a hook or a tool wants to
    see, and everything if it is a Triton that launches in another way. The stream is the current
    one, so that it can be captured; threads share the variants, and none is ever changed.
    """

    def __init__(self, kernel: Any) -> None:
        """Of a kernel that `jit` made."""
        self._kernel = kernel
        self._variants: dict[Any, _Variant] = {}
        self._compiles = _run is not None and isinstance(kernel, jit.JITFunction)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        """What launches so many programs."""
        return lambda *arguments, **keywords: self._launch(grid, arguments, keywords)

    def _launch(
        self, grid: tuple[int], arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> None:
        kernel = self._kernel
        if not self._compiles or _is_watched(kernel):
            kernel[grid](*arguments, **keywords)
            return
        driver, knobs = triton.runtime.driver.active, triton.knobs
        device = driver.get_current_device()
        kept, _, _, backend, _ = kernel.device_caches[device]
        key = (
            device,
            # Of every argument, be it specialised or not: at worst there are more keys than needed.
            jit.native_specialize_impl(backend, arguments, False, True, True),
            knobs.runtime.debug,
            knobs.compilation.instrumentation_mode,
            *keywords,
            *keywords.values(),
        )
        found = self._variants.get(key)
        if found is None or kept.get(found.key) is not found.compiled:
            compiled = kernel[grid](*arguments, **keywords)
            self._keep(key, compiled, kept, keywords)
            return
        found.launch(
            grid[0], 1, 1, driver.get_current_stream(device), found.function, found.metadata,
            None, None, None, *arguments, *found.constants,
        )  # fmt: skip

    def _keep(self, key: Any, compiled: Any, kept: Any, keywords: dict[str, Any]) -> None:
        """Note a variant that Triton has just launched, if it keeps it too."""
        names = [param.name for param in self._kernel.params if param.is_constexpr]
        for its_key, variant in kept.items():
            if variant is compiled:
                self._variants[key] = _Variant(
                    compiled,
                    its_key,
                    compiled.run,
                    compiled.function,
                    compiled.packed_metadata,
                    tuple(keywords[name] for name in names),
                )
                return


def _is_watched(kernel: Any) -> bool:
    """Whether a hook or a tool wants to see launches."""
    runtime = triton.knobs.runtime
    return (
        jit.JITFunction.run is not _run
        or bool(kernel.pre_run_hooks)
        or runtime.add_stages_inspection_hook is not None
        or _is_set(runtime.launch_enter_hook)
        or _is_set(runtime.launch_exit_hook)
    )


def _is_set(hook: Any) -> bool:
    """Whether a launch hook, be it None, a function or a list of functions, does something."""
    return hook is not None and bool(getattr(hook, "calls", True))
