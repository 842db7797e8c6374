"""`mapo-kernels bench codegen`: what the compiler makes of our kernels, and how fast that can be.

Each kernel is compiled on the spot for the architecture of each GPU. A bound is the largest of
three times an element: its bytes over the memory's bandwidth, its instructions over the issue rate
(four warps a clock and multiprocessor), its exponentials over the units that take 16 a clock.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mapo_kernels.config import LOGITS as RECORD

from .cases import BF16, QWEN2, Case
from .harness import work_of
from .levels import draw
from .machine_code import COMPILED, compile_launches, in_processes, report
from .names import LOGITS, LOGPROBS, MAPO
from .providers import OURS, PROVIDERS
from .report import Row, table


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
# One call of each level on small tensors; nothing runs, everything is compiled.
CASES = (
    Case(MAPO, 1 << 14),
    Case(LOGPROBS, 16, 1024, 8),
    Case(LOGITS, 16, 1, 8, head=QWEN2, dtype=BF16),
)
# A thread has 4 rewards or tokens, or the tiles of a step, each of 8 bfloat16 logits and one store.
# Of the two passes of a loss over a row, one reads memory and the other writes it. A token is 13
# bytes: logp, old, mask and gradient.
ROW, STORES = 8 * RECORD.tiles, RECORD.tiles
LOSS = ("logits_loss_kernel", "loss from bfloat16 logits")
# Kernel, its name for people, what is counted, its bytes, how many of them a thread has, and the
# loops that are read, by how often they store: without any all of the kernel.
PARTS: tuple[tuple[str, str, str, int, int, tuple[int, ...]], ...] = (
    ("advantages_kernel", "group advantages, groups of 16", "a reward", 8, 4, ()),
    ("token_loss_kernel", "loss from float32 log-probs", "a token", 13, 4, (1,)),
    ("score_kernel", "log-probs of bfloat16 logits", "statistics pass", 2, ROW, (0,)),
    (*LOSS, "statistics pass", 2, ROW, (0,)),
    (*LOSS, "gradient pass", 2, ROW, (STORES,)),
    (*LOSS, "both passes", 4, ROW, (0, STORES)),
)


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
        work_of(PROVIDERS[case.level][OURS].call, [inputs], case.direction)()
    kernels, rows = dict(COMPILED), []
    for name, title, element, nbytes, elements, stores in PARTS:
        found = report(kernels[name])
        row = {"kernel": title, "part": element, "bytes": nbytes}
        row |= {count: found[count] for count in ("registers", "spills")}
        loops = [main_loop(found, n, elements) for n in stores] or [found]
        for count in ("instructions", "exponentials"):
            row[count] = sum(loop[count] for loop in loops) / elements
        rows.append(row)
    return rows


def compile_for(target: str) -> list[Row]:
    """Rows of the table for one architecture, compiled in a process of its own."""
    return next(in_processes(compile_parts, [target], target, compile_launches))


def static_table() -> str:
    """For each GPU, kernel and pass: counts an element and the bound they give, in picoseconds."""
    by_target = {target: compile_for(target) for target in dict.fromkeys(g.target for g in GPUS)}
    lines = []
    for gpu in GPUS:
        for row in by_target[gpu.target]:
            bounds = gpu.bounds(row)
            slowest = max(bounds, key=lambda name: bounds[name])
            about = [gpu.name, row["kernel"], row["part"], f"{row['registers']}"]
            counts = [f"{row['spills']}", f"{row['instructions']:.1f}"]
            counts += [f"{row['exponentials']:.2f}", f"{row['bytes']}"]
            lines.append([*about, *counts, f"{bounds[slowest]:.2f}", slowest])
    heads = ["GPU", "kernel", "an element of", "registers", "spills", "instructions"]
    return table([*heads, "exponentials", "bytes", "bound, ps", "bound by"], lines)
