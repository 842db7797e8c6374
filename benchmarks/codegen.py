"""`mapo-kernels bench codegen`: what the compiler makes of our kernels, and how fast that can be.

Each kernel is compiled on the spot for the architecture of each GPU. A bound is the largest of
three times an element: its bytes over the memory's bandwidth, its instructions over the issue rate
(four warps a clock and multiprocessor), its exponentials over the units that take 16 a clock.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from mapo_kernels.config import LOGITS as RECORD

from .cases import BF16, LOGITS, LOGPROBS, MAPO, QWEN2, Case
from .harness import work_of
from .levels import draw
from .machine_code import COMPILED, compile_launches, in_processes, report
from .providers import OURS, PROVIDERS

Row = dict[str, Any]


class Gpu(NamedTuple):
    """What bounds a kernel, by its data sheet: TB/s, multiprocessors, boost clock in GHz."""

    name: str
    target: str
    terabytes_per_second: float
    multiprocessors: int
    gigahertz: float

    def bounds(self, work: Row) -> dict[str, float]:
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
# A thread has 4 rewards or tokens, or the tiles of a step, each of 8 bfloat16 logits and one store.
# Of the two passes of a loss over a row, one reads memory and the other writes it. A token is 13
# bytes: logp, old, mask and gradient.
ROW, STORES = 8 * RECORD.tiles, RECORD.tiles
# Kernel, its name for people, what is counted, its bytes, how many of them a thread has, and the
# loops that are read, by how often they store: without any all of the kernel.
PARTS: tuple[tuple[str, str, str, int, int, tuple[int, ...]], ...] = (
    ("advantages_kernel", "group advantages, groups of 16", "a reward", 8, 4, ()),
    ("token_loss_kernel", "loss from float32 log-probs", "a token", 13, 4, (1,)),
    ("score_kernel", "log-probs of bfloat16 logits", "statistics pass", 2, ROW, (0,)),
    ("logits_loss_kernel", "loss from bfloat16 logits", "statistics pass", 2, ROW, (0,)),
    ("logits_loss_kernel", "loss from bfloat16 logits", "gradient pass", 2, ROW, (STORES,)),
    ("logits_loss_kernel", "loss from bfloat16 logits", "both passes", 4, ROW, (0, STORES)),
)
# One call of each level on small tensors; nothing runs, everything is compiled.
CASES = (
    Case(MAPO, 1 << 14),
    Case(LOGPROBS, 16, 1024, 8),
    Case(LOGITS, 16, 1, 8, head=QWEN2, dtype=BF16),
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


def main_loop(found: Row, stores: int, elements: int) -> Row:
    """The unmasked loop: wide loads, that many stores, the fewest instructions."""
    wide = [
        loop
        for loop in found["loops"]
        if loop["wide_loads"] and loop["stores"] == stores and loop["exponentials"] >= elements
    ]
    return min(wide, key=lambda loop: loop["instructions"])


def compile_parts(target: str) -> list[Row]:
    """Rows of the table for the architecture that this process compiles for."""
    for case in CASES:
        inputs = draw(case, torch.device("cpu"))
        work_of(PROVIDERS[case.level][OURS], [inputs], case.direction)()
    reports = {name: report(kernel) for name, kernel in COMPILED}
    rows = []
    for kernel, title, element, nbytes, elements, stores in PARTS:
        found = reports[kernel]
        loops = [main_loop(found, n, elements) for n in stores] or [found]
        counts = {
            name: sum(loop[name] for loop in loops) / elements
            for name in ("instructions", "exponentials")
        }
        same = {name: found[name] for name in ("registers", "stack", "spills")}
        about = {"kernel": title, "part": element, "target": target, "bytes": nbytes}
        rows.append(about | same | counts)
    return rows


def compile_for(target: str) -> list[Row]:
    """Rows of the table for one architecture, compiled in a process of its own."""
    return next(in_processes(compile_parts, [target], target, compile_launches))


def static_table() -> list[Row]:
    """For each kernel, pass and GPU: counts an element and the bound they give, in picoseconds."""
    by_target = {target: compile_for(target) for target in dict.fromkeys(g.target for g in GPUS)}
    rows = []
    for gpu in GPUS:
        for row in by_target[gpu.target]:
            bounds = gpu.bounds(row)
            binding = max(bounds, key=lambda name: bounds[name])
            rows.append({**row, "gpu": gpu.name, "bound_ps": bounds[binding], "bound_by": binding})
    return rows
