"""Compiles what the public functions launch, for a GPU that is not there, and reads the code.

The real launchers run, so sizes, strides and alignments are what a user gets; only the driver is
replaced, and a launch ends after compilation. It changes Triton for the whole process: use a
process of its own, without TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import jit
from triton.runtime.driver import driver

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


# What is counted in a loop, and the instructions that are it.
_SASS = {
    "exponentials": r"MUFU\.EX2$",
    "wide_loads": r"LDG.*\.128$",
    "stores": r"STG",
    "barriers": r"BAR",
}
_GCN = {
    "exponentials": r"v_exp_f32",
    "wide_loads": r".*_load_dwordx4",
    "stores": r"(global|buffer)_store",
    "barriers": r"s_barrier$",
}


class CompileOnlyDriver:
    """Answers the questions that Triton asks before it compiles."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def record_compilations(target: GPUTarget) -> list[tuple[str, Any]]:
    """Make every launch compile for `target` and stop there; the list that it fills."""
    driver.set_active(CompileOnlyDriver(target))
    compiled = []
    original = jit.JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.fn.__name__, kernel))
        return kernel

    jit.JITFunction.run = run
    return compiled


def nvidia_report(kernel: Any) -> dict[str, Any]:
    """Registers, memory accesses, instructions and loops of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        usage = tool("cuobjdump", "-res-usage", path)
        sass = tool("nvdisasm", "-c", path)
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    code = parse(
        sass,
        label=r"\s*(\.L_x_\d+):",
        instruction=r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)",
        branch=r".*BRA.*`\((\.L_x_\d+)\)",
    )
    names = [name for name, _ in code]
    return {
        "registers": int(numbers["REG"]),
        "stack": int(numbers["STACK"]),
        "local": int(numbers["LOCAL"]),
        "spills": sum(1 for name in names if name.startswith(("LDL", "STL"))),
        "accesses": Counter(name for name in names if name.startswith(("LDG", "STG"))),
        "instructions": len(names),
        "exponentials": names.count("MUFU.EX2"),
        "loops": _loop_reports(code, _SASS),
    }


def parse(text: str, label: str, instruction: str, branch: str) -> list[tuple[str, Any]]:
    """Instructions in order: their names, and where each jumps back to (a position, or None)."""
    labels: dict[str, int] = {}
    code: list[tuple[str, Any]] = []
    for line in text.splitlines():
        if found := re.match(label, line):
            labels[found.group(1)] = len(code)
        elif found := re.match(instruction, line):
            jump = re.match(branch, line)
            code.append((found.group(1), labels.get(jump.group(1)) if jump else None))
    return code


def _loop_reports(code: list[tuple[str, Any]], kinds: dict[str, str]) -> list[dict[str, int]]:
    """Instructions of each loop, in all and of each kind."""
    return [
        {"instructions": len(body)}
        | {kind: sum(bool(re.match(p, name)) for name in body) for kind, p in kinds.items()}
        for body in loops(code)
    ]


def loops(code: list[tuple[str, Any]]) -> list[list[str]]:
    """Names of the instructions between each backward branch and its target, empty loops apart."""
    names = [name for name, _ in code]
    spans = [(start, end) for end, (_, start) in enumerate(code) if start not in (None, end)]
    return [names[start : end + 1] for start, end in spans]


def tool(name: str, *arguments: Any) -> str:
    """What one of the tools in Triton's wheel prints."""
    done = subprocess.run(
        [NVIDIA_TOOLS / name, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout


def amd_report(kernel: Any) -> dict[str, Any]:
    """The same of AMD's assembly, as far as it says."""
    text = kernel.asm["amdgcn"]
    numbers = dict(re.findall(r"\.(vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", text))
    code = parse(
        text,
        label=r"(\.LBB\d+_\d+):",
        instruction=r"\s+((?:[sv]|global|buffer|ds|flat)_\w+)",
        branch=r"\s+s_c?branch\w*\s+(\.LBB\d+_\d+)",
    )
    return {
        "stack": int(numbers["private_segment_fixed_size"]),
        "spills": int(numbers["vgpr_spill_count"]),
        "accesses": Counter(re.findall(r"\b(?:global|buffer)_(?:load|store)_\w+", text)),
        "loops": _loop_reports(code, _GCN),
    }


def report(kernel: Any) -> dict[str, Any]:
    """What the machine code of a compiled kernel holds, for either maker's GPUs."""
    return nvidia_report(kernel) if "cubin" in kernel.asm else amd_report(kernel)


def compile_launches(target: str) -> list[tuple[str, Any]]:
    """Make the package's launchers compile for a target, from CPU tensors; the list it fills."""
    compiled = record_compilations(TARGETS[target])
    import mapo_kernels as mk
    from mapo_kernels import backend

    mk.set_backend("triton")
    # The tensors are on the CPU; what would run on them is compiled for the target instead.
    backend.is_eager = lambda x: False
    return compiled
