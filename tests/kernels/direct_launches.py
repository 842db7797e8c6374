"""Launches a small kernel through `Direct` on GPUs that are not there; run as a subprocess.

    python tests/kernels/direct_launches.py

prints one JSON object: for each case the launches that reached the driver, and how many of them
Triton looked up itself.
"""

import json
import threading
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime import jit
from triton.runtime.driver import driver

from benchmarks.machine_code import TARGETS
from mapo_kernels.launch import direct


class Pair(NamedTuple):
    x: Any
    y: Any


@triton.jit(do_not_specialize=["n"])
def add_kernel(pair, n, step, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(pair.x + offs * step, mask=offs < n)
    if pair.y is not None:
        x = x + tl.load(pair.y + offs, mask=offs < n)
    tl.store(pair.x + offs * step, x, mask=offs < n)


class Driver:
    """Two GPUs, on which a launch is a line in a list; each thread has a device and a stream."""

    def __init__(self):
        self.current = threading.local()
        self.launches = []
        self.modules = 0
        self.utils = SimpleNamespace(
            load_binary=self.load, unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 232448},
        )  # fmt: skip

    def load(self, name, binary, shared, device):
        self.modules += 1
        return self.modules, self.modules, 0, 0, 1024

    def get_current_target(self):
        return TARGETS["sm_90"]

    def get_current_device(self):
        return getattr(self.current, "device", 0)

    def get_current_stream(self, device=None):
        return getattr(self.current, "stream", 0)

    def launcher_cls(self, source, metadata):
        def launch(x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
            for hook in (enter, leave):
                if hook is not None:
                    hook(metadata)
            pair, n, step, block = arguments
            line = {"grid": [x, y, z], "stream": stream, "function": function, "n": n}
            line |= {"x": pair.x.data_ptr(), "y": pair.y is not None, "step": step, "block": block}
            line["device"] = self.get_current_device()
            self.launches.append(line)

        return launch


gpu = Driver()
driver.set_active(gpu)
launch = direct.Direct(add_kernel)
ROOM = torch.zeros(64)
found = {}
looked_up = 0


def count_look_ups(device=0):
    """Counts what Triton looks up for a device, in the first step that `Direct` leaves out."""
    *rest, binder = add_kernel.device_caches[device]

    def counted(*arguments, **keywords):
        global looked_up
        looked_up += 1
        return binder(*arguments, **keywords)

    add_kernel.device_caches[device] = (*rest, counted)


def add(x=ROOM, y=None, n=5, step=2, grid=3, **options):
    launch[(grid,)](Pair(x, y), n, step, BLOCK=options.pop("block", 16), **options)


def case(name, *calls):
    global looked_up
    gpu.launches, looked_up = [], 0
    for call in calls:
        call()
    found[name] = {"launches": gpu.launches, "looked_up": looked_up}


def on(**place):
    """A launch on another device or stream."""

    def call():
        vars(gpu.current).update(place)
        add()
        vars(gpu.current).clear()

    return call


def after(change, undo=lambda: None):
    def call():
        change()
        add()
        undo()

    return call


def again():
    """Triton forgets what it has compiled."""
    add_kernel.device_caches.clear()
    count_look_ups()


def in_threads():
    """Eight threads, each with a stream of its own and tensors of two kinds."""

    def work(stream):
        gpu.current.stream = stream
        for i in range(50):
            add(ROOM[4 * stream + i % 2 :], n=stream)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def replace_run():
    """A tool that sees every launch, as `benchmarks.machine_code` does."""
    jit.JITFunction.run = lambda self, *_, grid, warmup, **__: seen.append(grid)


seen: list[Any] = []
known = jit.JITFunction.run
enter = knobs.runtime.launch_enter_hook
count_look_ups(0)
count_look_ups(1)

case("again", add, add, add)
case("values", lambda: add(n=7, grid=4), lambda: add(ROOM[4:], n=9))
case("alignment", add, lambda: add(ROOM[1:]), lambda: add(ROOM[5:]), add)
case("arguments", *[lambda y=y: add(y=y) for y in (ROOM, None, ROOM.half(), ROOM, ROOM.half())])
case("integers", *[lambda step=step: add(step=step) for step in (1, 16, 3, 1, 48, 5)])
case("keywords", *[lambda w=w: add(num_warps=w) for w in (4, 8, 4, 8)], lambda: add(block=32))
case("devices", on(device=0), on(device=1), on(device=1), on(device=0))
case("streams", on(stream=7), on(stream=8))
case("compiled again", add, after(again), add)
case("threads", lambda: add(ROOM[1:]), in_threads)
case("hook", after(lambda: enter.add(seen.append), lambda: enter.remove(seen.append)), add)
found["hook"]["seen"] = len(seen)
case("pre-run hook", after(lambda: add_kernel.pre_run_hooks.append(lambda *_, **__: None)))
add_kernel.pre_run_hooks.clear()
case("debug", after(lambda: setattr(knobs.runtime, "debug", True)))
knobs.runtime.debug = False
seen.clear()
case("tool", after(replace_run))
found["tool"]["seen"] = seen
jit.JITFunction.run = known
found["is_understood"] = direct._is_understood(known)
found["takes a tool for Triton"] = direct._is_understood(lambda self, *_, **__: None)
print(json.dumps(found))
