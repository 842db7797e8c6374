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
from types import SimpleNamespace
from typing import Any, NamedTuple

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


class Assembly(NamedTuple):
    """How a maker writes assembly: patterns of lines, of accesses to memory, of what is counted."""

    label: str
    instruction: str
    branch: str
    access: str
    counted: dict[str, str]

    def counts(self, names: list[str]) -> dict[str, int]:
        """Instructions, in all and of each kind."""
        kinds = self.counted.items()
        return {"instructions": len(names)} | {
            kind: sum(bool(re.match(pattern, name)) for name in names) for kind, pattern in kinds
        }

    def read(self, text: str) -> dict[str, Any]:
        """Counts of the whole code and of each loop: from a branch's target back to the branch."""
        labels: dict[str, int] = {}
        names: list[str] = []
        loops = []
        for line in text.splitlines():
            if found := re.match(self.label, line):
                labels[found[1]] = len(names)
            elif found := re.match(self.instruction, line):
                jump = re.match(self.branch, line)
                start = labels.get(jump[1]) if jump else None
                if start not in (None, len(names)):  # of an empty loop
                    loops.append([*names[start:], found[1]])
                names.append(found[1])
        return {
            **self.counts(names),
            "accesses": Counter(name for name in names if re.match(self.access, name)),
            "loops": [self.counts(body) for body in loops],
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
    usage, text = _disassembly(kernel)
    names = {"REG": "registers", "STACK": "stack", "LOCAL": "local"}
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return SASS.read(text) | {name: int(numbers[key]) for key, name in names.items()}


def _disassembly(kernel: Any) -> tuple[str, str]:
    """What NVIDIA's tools say of a kernel's resources, and its machine code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        return _tool("cuobjdump", "-res-usage", path), _tool("nvdisasm", "-c", path)


def scalar_instructions(kernel: Any, tiles: int, vector: int = 8) -> dict[str, int]:
    """Instructions that a row's program executes outside the main loops of its two passes.

    The fewest on any way through the branches, by NVIDIA's machine code: before the first pass,
    between the two, after the second. A warp executes each of them once a row, whatever the row
    holds; what only some rows need (a mask to count, exact sums) is left out.
    """
    names, following = _flow(_disassembly(kernel)[1])
    loops: dict[int, tuple[int, int, int]] = {}
    for end, after in enumerate(following):
        for start in after:
            body = names[max(start, 0) : end + 1]
            wide = sum(bool(re.match(SASS.counted["wide_loads"], name)) for name in body)
            if 0 <= start < end and wide == tiles and body.count("MUFU.EX2") >= tiles * vector:
                stores = sum(name.startswith("STG") for name in body)
                loops[stores] = min(
                    loops.get(stores, (len(body), start, end)), (len(body), start, end)
                )
    first, second = loops[0], loops[tiles]
    return {
        "before": _fewest(following, 0, first[1]),
        "between": _fewest(following, first[2] + 1, second[1]),
        "after": _fewest(following, second[2] + 1, len(names)),
    }


def _flow(text: str) -> tuple[list[str], list[list[int]]]:
    """Instructions of a kernel, and after each which may follow; its end is one past the last."""
    labels: dict[str, int] = {}
    code: list[tuple[str, str]] = []
    for line in text.splitlines():
        if found := re.match(SASS.label, line):
            labels[found[1]] = len(code)
        elif found := re.match(SASS.instruction, line):
            code.append((found[1], line))
    following = []
    for i, (name, line) in enumerate(code):
        jump = re.match(SASS.branch, line)
        may_pass = re.search(r"\s@!?U?P|BRA(\.DIV)? !?U", line) or re.search(r"BRA !?U?P", line)
        after = [i + 1] if may_pass or not (jump or name in ("EXIT", "RET")) else []
        if jump:
            after.append(labels[jump[1]])
        if name == "EXIT":
            after.append(len(code))
        following.append(after)
    return [name for name, _ in code], following


def _fewest(following: list[list[int]], start: int, goal: int) -> int:
    """Instructions on the shortest way from one to another, which is not counted."""
    steps, seen, reached = 0, {start}, [start]
    while goal not in seen:
        reached = [i for j in reached if j < len(following) for i in following[j] if i not in seen]
        seen.update(reached)
        steps += 1
    return steps


def _tool(name: str, *arguments: Any) -> str:
    """What one of the tools in Triton's wheel prints."""
    command = [NVIDIA_TOOLS / name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compile_launches(target: str) -> list[tuple[str, Any]]:
    """Make the package's launchers compile for a target, from CPU tensors; the list it fills."""
    # Answers what Triton asks before it compiles.
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: TARGETS[target],
            get_current_device=lambda: 0,
            get_current_stream=lambda device=None: 0,
        )
    )
    compiled = []
    original = jit.JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.fn.__name__, kernel))
        return kernel

    jit.JITFunction.run = run
    from mapo_kernels import backend

    backend.set_backend("triton")
    # The tensors are on the CPU; what would run on them is compiled for the target instead.
    backend.is_eager = lambda x: False
    return compiled
