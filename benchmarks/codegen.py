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
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


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
# What a thread handles in one turn of its loop: bfloat16 logits, tokens.
BF16_STEP, TOKEN_STEP = 16, 4
Work = dict[str, float]


def _element(counts: dict[str, Any], elements: int, nbytes: float) -> Work:
    """Instructions, exponentials and bytes of one element."""
    names = ("instructions", "exponentials")
    return {name: counts[name] / elements for name in names} | {"bytes": nbytes}


def _pass(kernel: dict[str, Any], stores: int) -> Work:
    """The unmasked loop over a row: wide loads, that many stores, the fewest instructions."""
    found = [
        loop
        for loop in kernel["loops"]
        if loop["wide_loads"] and loop["stores"] == stores and loop["exponentials"] >= BF16_STEP
    ]
    return _element(min(found, key=lambda loop: loop["instructions"]), BF16_STEP, 2)


def _row_passes(kernel: dict[str, Any]) -> dict[str, Work]:
    """The fused loss from bfloat16 logits: two passes, of which only one reaches memory."""
    first, second = _pass(kernel, stores=0), _pass(kernel, stores=2)
    both = {name: first[name] + second[name] for name in first}
    return {"statistics pass": first, "gradient pass": second, "both passes": both}


def _tokens(kernel: dict[str, Any]) -> dict[str, Work]:
    """The loss from log-probs: logp, old, mask read and the gradient written."""
    longest = max(kernel["loops"], key=lambda loop: loop["instructions"])
    return {"a token": _element(longest, TOKEN_STEP, 13)}


def _whole(kernel: dict[str, Any]) -> dict[str, Work]:
    """A kernel without a loop over elements: all its code, by the float32 numbers it stores."""
    width = {"64": 2, "128": 4}
    stores = [(name, n) for name, n in kernel["accesses"].items() if name.startswith("STG")]
    stored = sum(n * width.get(name.rpartition(".")[2], 1) for name, n in stores)
    return {"a reward": _element(kernel, stored, 8)}


# What is read of each kernel.
READERS: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Work]]]] = {
    "advantages_kernel": ("group advantages, groups of 16", _whole),
    "token_loss_kernel": ("loss from float32 log-probs", _tokens),
    "score_kernel": (
        "log-probs of bfloat16 logits",
        lambda kernel: {"statistics pass": _pass(kernel, stores=0)},
    ),
    "logits_loss_kernel": ("loss from bfloat16 logits", _row_passes),
}
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
    from .cases import BF16, LOGITS, LOGPROBS, MAPO, QWEN2, Case
    from .harness import work_of
    from .levels import LEVELS, OURS
    from .machine_code import compile_launches, report

    compiled = compile_launches(target)
    # One call of each level on small tensors; nothing runs, everything is compiled.
    for case in (
        Case(MAPO, 1 << 14),
        Case(LOGPROBS, 16, 1024, 8),
        Case(LOGITS, 16, 1, 8, head=QWEN2, dtype=BF16),
    ):
        level = LEVELS[case.level]
        inputs = level.draw(case, torch.Generator(), torch.device("cpu"))
        work_of(level.providers[OURS], [inputs], case.direction)()
    rows = []
    for name, kernel in {name: kernel for name, kernel in compiled if name in READERS}.items():
        title, read = READERS[name]
        found = report(kernel)
        about = {key: found[key] for key in ("registers", "stack", "spills")}
        about |= {"kernel": title, "target": target}
        rows += [{"part": part, **about, **work} for part, work in read(found).items()]
    return rows


def compile_for(target: str) -> list[dict[str, Any]]:
    """Rows of the table for one architecture, compiled in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    code = (
        f"import json; from {__name__} import compile_here as f; print(json.dumps(f('{target}')))"
    )
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
