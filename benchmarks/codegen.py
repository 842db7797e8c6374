"""`mapo-kernels bench codegen`: what the compiler makes of our kernels, and how fast that can be.

Each kernel is compiled on the spot for the architecture of each GPU. A bound is the largest of
three times an element: its bytes over the memory's bandwidth, its instructions over the issue rate
(four warps a clock and multiprocessor), its exponentials over the units that take 16 a clock.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any, NamedTuple

from mapo_kernels.config import LOGITS


class Gpu(NamedTuple):
    """What bounds a kernel, by its data sheet: TB/s, multiprocessors, boost clock in GHz."""

    name: str
    target: str
    terabytes_per_second: float
    multiprocessors: int
    gigahertz: float

    def bounds(self, work: dict[str, float]) -> dict[str, float]:
        """Picoseconds an element by memory, instructions and exponentials."""
        clocks = self.multiprocessors * self.gigahertz * 1e-3  # clocks of all in a picosecond
        return {
            "memory": work["bytes"] / self.terabytes_per_second,
            "instructions": work["instructions"] / (128 * clocks),
            "exponentials": work["exponentials"] / (16 * clocks),
        }


GPUS = (
    Gpu("A100", "sm_80", 2.04, 108, 1.41),
    Gpu("H100", "sm_90", 3.35, 132, 1.98),
    Gpu("H200", "sm_90", 4.8, 132, 1.98),
    Gpu("B200", "sm_100", 8.0, 148, 1.97),
)


class Part(NamedTuple):
    """What is read of a kernel: code that a thread runs for `elements` of `nbytes` bytes each.

    `stores` names its loops by how often they store; without it is all of the kernel.
    """

    kernel: str
    title: str
    element: str
    nbytes: int
    elements: int
    stores: tuple[int, ...] = ()

    def work(self, found: dict[str, Any]) -> dict[str, float]:
        """Instructions, exponentials and bytes of one element, of a kernel's `report`."""
        loops = [_main_loop(found, stores, self.elements) for stores in self.stores] or [found]
        names = ("instructions", "exponentials")
        counts = {name: sum(loop[name] for loop in loops) / self.elements for name in names}
        return counts | {"bytes": self.nbytes}


def _main_loop(found: dict[str, Any], stores: int, elements: int) -> dict[str, Any]:
    """The unmasked loop: wide loads, that many stores, the fewest instructions."""
    wide = [
        loop
        for loop in found["loops"]
        if loop["wide_loads"] and loop["stores"] == stores and loop["exponentials"] >= elements
    ]
    return min(wide, key=lambda loop: loop["instructions"])


# A thread has 4 rewards or tokens, or the tiles of a step, each of 8 bfloat16 logits and one store.
# Of the two passes of a loss over a row, one reads memory and the other writes it. A token is 13
# bytes: logp, old, mask and gradient.
ROW, STORES = 8 * LOGITS.tiles, LOGITS.tiles
PARTS = (
    Part("advantages_kernel", "group advantages, groups of 16", "a reward", 8, 4),
    Part("token_loss_kernel", "loss from float32 log-probs", "a token", 13, 4, (1,)),
    Part("score_kernel", "log-probs of bfloat16 logits", "statistics pass", 2, ROW, (0,)),
    Part("logits_loss_kernel", "loss from bfloat16 logits", "statistics pass", 2, ROW, (0,)),
    Part("logits_loss_kernel", "loss from bfloat16 logits", "gradient pass", 2, ROW, (STORES,)),
    Part("logits_loss_kernel", "loss from bfloat16 logits", "both passes", 4, ROW, (0, STORES)),
)
# What `bench codegen` shows of a row, by heading.
COLUMNS = {
    "GPU": "{gpu}",
    "kernel": "{kernel}",
    "an element of": "{part}",
    "registers": "{registers}",
    "spills": "{spills}",
    "instructions": "{instructions:.1f}",
    "exponentials": "{exponentials:.2f}",
    "bytes": "{bytes:g}",
    "bound, ps": "{bound_ps:.2f}",
    "bound by": "{bound_by}",
}


def compile_here(target: str) -> list[dict[str, Any]]:
    """Rows of the table for one architecture; changes Triton for the whole process."""
    import torch

    from . import cases
    from .cases import Case
    from .harness import work_of
    from .levels import draw
    from .machine_code import compile_launches, report
    from .providers import OURS, PROVIDERS

    compiled = compile_launches(target)
    # One call of each level on small tensors; nothing runs, everything is compiled.
    for case in (
        Case(cases.MAPO, 1 << 14),
        Case(cases.LOGPROBS, 16, 1024, 8),
        Case(cases.LOGITS, 16, 1, 8, head=cases.QWEN2, dtype=cases.BF16),
    ):
        inputs = draw(case, torch.device("cpu"))
        work_of(PROVIDERS[case.level][OURS], [inputs], case.direction)()
    reports = {name: report(kernel) for name, kernel in compiled}
    same = ("registers", "stack", "spills")
    return [
        {"kernel": part.title, "part": part.element, "target": target}
        | {name: reports[part.kernel][name] for name in same}
        | part.work(reports[part.kernel])
        for part in PARTS
    ]


def compile_for(target: str) -> list[dict[str, Any]]:
    """Rows of the table for one architecture, compiled in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    code = f"import json; from {__name__} import *; print(json.dumps(compile_here('{target}')))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"compiling for {target} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def static_table() -> list[dict[str, Any]]:
    """For each kernel, pass and GPU: counts an element and the bound they give, in picoseconds."""
    by_target = {target: compile_for(target) for target in dict.fromkeys(g.target for g in GPUS)}
    rows = []
    for gpu in GPUS:
        for row in by_target[gpu.target]:
            bounds = gpu.bounds(row)
            binding = max(bounds, key=lambda name: bounds[name])
            rows.append({**row, "gpu": gpu.name, "bound_ps": bounds[binding], "bound_by": binding})
    return rows
