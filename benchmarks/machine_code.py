"""Compiles what the public functions launch, for a GPU that is not there, and reads the code.

The real launchers run, so sizes, strides and alignments are what a user gets; only the driver is
replaced, and a launch ends after compilation. It changes Triton for the whole process: use a
process of its own, without TRITON_INTERPRET.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import jit
from triton.runtime.driver import driver

from mapo_kernels.files import CommandError, one_line

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# What launches have compiled in this process: names and kernels.
COMPILED: list[tuple[str, Any]] = []
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Assembly(NamedTuple):
    """How a maker writes assembly: patterns of lines, of accesses to memory, of what is counted."""

    label: str
    instruction: str
    branch: str
    access: str
    counted: dict[str, str]

    def parse(self, text: str) -> tuple[list[str], dict[int, int], list[str]]:
        """Instructions by name, where each branch leads, and the lines of the instructions."""
        labels: dict[str, int] = {}
        names: list[str] = []
        lines: list[str] = []
        for line in text.splitlines():
            if found := re.match(self.label, line):
                labels[found[1]] = len(names)
            elif found := re.match(self.instruction, line):
                names.append(found[1])
                lines.append(line)
        jumps = {i: jump[1] for i, x in enumerate(lines) if (jump := re.match(self.branch, x))}
        return names, {i: labels[name] for i, name in jumps.items() if name in labels}, lines

    def counts(self, names: list[str]) -> dict[str, int]:
        """Instructions, in all and of each kind."""
        kinds = self.counted.items()
        return {"instructions": len(names)} | {
            kind: sum(bool(re.match(pattern, name)) for name in names) for kind, pattern in kinds
        }

    def read(self, text: str) -> dict[str, Any]:
        """Counts of the whole code and of each loop: from a branch's target back to the branch."""
        names, jumps, _ = self.parse(text)
        return {
            **self.counts(names),
            "accesses": Counter(name for name in names if re.match(self.access, name)),
            "loops": [
                self.counts(names[start : end + 1]) for end, start in jumps.items() if start < end
            ],
        }


SASS = Assembly(
    label=r"\s*(\.L_x_\d+):",
    instruction=r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)",
    branch=r".*BRA.*`\((\.L_x_\d+)\)",
    access=r"LDG|STG",
    counted={
        "exponentials": r"MUFU\.EX2$",
        "wide_loads": r"LDG.*\.128$",
        "stores": r"STG",
        "barriers": r"BAR",
        "spills": r"LDL|STL",
    },
)
GCN = Assembly(
    label=r"(\.LBB\d+_\d+):",
    instruction=r"\s+((?:[sv]|global|buffer|ds|flat)_\w+)",
    branch=r"\s+s_c?branch\w*\s+(\.LBB\d+_\d+)",
    access=r"(global|buffer)_(load|store)_",
    counted={
        "exponentials": r"v_exp_f32",
        "wide_loads": r".*_load_dwordx4",
        "stores": r"(global|buffer)_store",
        "barriers": r"s_barrier$",
    },
)


@cache
def report(kernel: Any) -> dict[str, Any]:
    """What the machine code of a compiled kernel holds, for either maker's GPUs.

    Returns:
        `stack` and `spills`; on NVIDIA `registers` and `local` too; `accesses` of memory by name;
        and counts of the whole kernel, and in `loops` of each loop.
    """
    if "cubin" not in kernel.asm:
        text = kernel.asm["amdgcn"]
        known = r"\.(vgpr_spill_count|private_segment_fixed_size):\s+(\d+)"
        numbers = dict(re.findall(known, text))
        stack, spills = numbers["private_segment_fixed_size"], numbers["vgpr_spill_count"]
        return GCN.read(text) | {"stack": int(stack), "spills": int(spills)}
    names = {"REG": "registers", "STACK": "stack", "LOCAL": "local"}
    usage = _tool("cuobjdump", "-res-usage", kernel)
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return SASS.read(disassembly(kernel)) | {name: int(numbers[k]) for k, name in names.items()}


def disassembly(kernel: Any) -> str:
    """A kernel's machine code for an NVIDIA GPU."""
    return _tool("nvdisasm", "-c", kernel)


def _tool(name: str, option: str, kernel: Any) -> str:
    """What one of the tools in Triton's wheel prints of a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        command = [str(NVIDIA_TOOLS / name), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compile_launches(target: str) -> list[tuple[str, Any]]:
    """Make the package's launchers compile for a target, from CPU tensors; returns `COMPILED`."""
    from mapo_kernels import backend

    original = jit.JITFunction.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = original(self, *args, **kwargs | {"warmup": True})
        COMPILED.append((self.fn.__name__, kernel))
        return kernel

    jit.JITFunction.run = run
    # Answers what Triton asks before it compiles.
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: TARGETS[target],
            get_current_device=lambda: 0,
            get_current_stream=lambda device=None: 0,
        )
    )
    backend.set_backend("triton")
    # The tensors are on the CPU; what would run on them is compiled for the target instead.
    backend.is_eager = lambda x: False
    return COMPILED


def in_processes(
    call: Callable[[Any], Any], work: Iterable[Any], target: str, prepare: Any, jobs: int = 1
) -> Iterator[Any]:
    """`call(x)` of each piece of work, in processes that `prepare(target)` makes compile for it.

    A process that ends is a CommandError.
    """
    with mock.patch.dict(os.environ):
        os.environ.pop("TRITON_INTERPRET", None)
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(
            jobs if jobs > 0 else None, spawn, prepare, (target,)
        ) as processes:
            try:
                yield from processes.map(call, work)
            except BrokenExecutor as error:
                raise CommandError(f"compiling for {target}: {one_line(error)}") from error
