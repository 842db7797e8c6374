"""`mapo-kernels bench host`: what a call costs its caller, on a machine without a GPU.

Python, PyTorch and Triton's launcher run as they do for an sm_90; under them lies a CUDA driver
that does nothing (stub_cuda.c), so nothing is computed and there is no result to check. A real
driver adds 1 to 2 us a launch, and autograd's own thread. Compare the rows of one file.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer

import mapo_kernels as mk
from mapo_kernels.files import CommandError, one_line

from .cases import BF16, HIDDEN, LOGITS, LOGPROBS, SCORING, Case, Head
from .levels import SPEC, draw
from .providers import OURS, PROVIDERS
from .report import Row
from .results import About, Growing, attempt, timed

CPU = torch.device("cpu")
SIZE = (16, 64, 8)  # sequences, tokens, group
REPEATS, CALLS = 9, 200  # samples, and calls in each
VOCAB, CHUNKS = 1024, 8
FROM_HIDDEN = "mapo_loss_from_hidden"
ANOTHER_CHUNK = f"{FROM_HIDDEN}, each chunk more"
# What the chunk's two products take on this CPU, where a GPU would only be told of them.
PRODUCTS = "... of which its products, on this CPU"
# Where others offer the same: calls by level.
PEERS = {"TRL", "Liger"}
SHARED = {LOGPROBS: "mapo_loss", SCORING: "token_logprobs", LOGITS: "mapo_loss_from_logits"}
# Where packages ask whether a tensor is on a GPU before they launch a kernel of Triton's.
GATES = {"trl.trainer.utils": "_supports_trl_loss_kernel"}
Call = Callable[[], Any]


def install_driver(folder: Path) -> ctypes.CDLL:
    """Build the driver, and make this process launch on it what comes with tensors on the CPU."""
    library = folder / "libcuda.so.1"
    source = Path(__file__).with_name("stub_cuda.c")
    flags = ["-shared", "-fPIC", "-O2", "-Wl,-soname,libcuda.so.1"]
    try:
        subprocess.run(["cc", *flags, "-o", library, source], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CommandError(f"host: expected a C compiler, cc, got {one_line(error)}") from error
    (folder / "libcuda.so").symlink_to(library)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    driver = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0)  # noqa: B010
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.current_device = lambda: 0
    torch.cuda.set_device = lambda device: None
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime.driver import driver as of_triton

    from mapo_kernels import backend

    of_triton.set_active(CudaDriver())
    mk.set_backend("triton")
    backend.is_eager = lambda x: False
    for module, name in GATES.items():
        if importlib.util.find_spec(module.partition(".")[0]):
            setattr(importlib.import_module(module), name, lambda *_: True)
    return driver


def step(call: Callable[..., Any], *leaves: torch.Tensor) -> Call:
    """Forward and backward of a loss by leaves."""
    given = [x.detach().requires_grad_() for x in leaves]
    return lambda: torch.autograd.grad(call(*given), given)


def our_calls() -> dict[str, Call]:
    """What is timed of ours, by name."""
    (logp,), rest, _ = draw(Case(LOGPROBS, *SIZE), CPU)
    logits = torch.zeros(*logp.shape, VOCAB, dtype=BF16)
    groups = {"rewards": rest.rewards, "group_size": rest.group_size}
    given = groups | {"mask": rest.mask, "old_logprobs": rest.old, "spec": SPEC}
    (hidden, weight), more, _ = draw(Case(HIDDEN, *SIZE, head=Head("", 8, 32)), CPU)
    # Made before nothing is computed any more: it says which rows are live.
    plan = mk.make_plan(advantages=more.advantages, mask=more.mask, spec=SPEC)

    rows = hidden.flatten(0, 1)[: logp.numel() // CHUNKS]

    def from_hidden(chunk_rows: int) -> Call:
        head: Any = {"plan": plan, "old_logprobs": more.old, "chunk_rows": chunk_rows}
        return step(
            lambda h, w: mk.mapo_loss_from_hidden(h, w, more.ids, **head).loss, hidden, weight
        )

    return {
        "x + 1": lambda: rest.old + 1,
        "group_advantages": lambda: mk.group_advantages(**groups),
        "token_logprobs": lambda: mk.token_logprobs(logits, rest.ids),
        "make_plan": lambda: mk.make_plan(**groups, mask=rest.mask, spec=SPEC),
        "mapo_loss": step(lambda x: mk.mapo_loss(x, **given).loss, logp),
        "mapo_loss_from_logits": step(
            lambda x: mk.mapo_loss_from_logits(x, rest.ids, **given).loss, logits
        ),
        FROM_HIDDEN: from_hidden(logp.numel()),
        ANOTHER_CHUNK: from_hidden(logp.numel() // CHUNKS),
        PRODUCTS: lambda: torch.mm(torch.mm(rows, weight.t()), weight),
    }


def peer_calls() -> dict[tuple[str, str], tuple[str | None, Call]]:
    """What others offer of the same: why it is not here, or None, and the call."""
    found = {}
    for level, name in SHARED.items():
        case = Case(level, *SIZE, head=Head("", 0, VOCAB), dtype=BF16)
        leaves, rest, _ = draw(case, CPU)
        for peer in sorted(PEERS & PROVIDERS[level].keys()):
            provider = PROVIDERS[level][peer]
            call = step(lambda *x, f=provider.call, rest=rest: f(*x, rest), *leaves)
            if case.direction == "score":
                call = partial(torch.no_grad()(provider.call), *leaves, rest)
            # To what needs a GPU the driver is one.
            found[name, peer] = provider.unavailable(case, torch.device("cuda")), call
    return found


def time_of(call: Call, driver: ctypes.CDLL, once: bool) -> Row:
    """Launches and microseconds of a call, whatever else runs on the machine."""
    for _ in range(3):  # Compiles and warms up.
        call()
    before = driver.count_launches()
    call()
    launches = driver.count_launches() - before
    timer = Timer("call()", globals={"call": call}, timer=time.process_time)
    calls, repeats = (1, 1) if once else (CALLS, REPEATS)
    samples = [timer.timeit(calls).mean * 1e6 for _ in range(repeats)]
    return timed("us", samples) | {"launches": launches}


def each_more(row: Row, one: Row) -> Row:
    """What each of several chunks adds to the first, of a call with several and one with one."""
    if "failed" in (row["status"], one["status"]):
        return {"status": "failed", "reason": row.get("reason", "the call with one chunk failed")}
    pairs = zip(row["samples_us"], one["samples_us"], strict=True)
    samples = [(many - first) / (CHUNKS - 1) for many, first in pairs]
    # A large chunk may take a launch more than a small one.
    launches = round((row["launches"] - one["launches"]) / (CHUNKS - 1))
    return timed("us", samples) | {"launches": launches}


def measure(path: Path, about: About) -> None:
    """Time every call; the result at `path` is written after each."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # What is read of results that nobody computed makes no sense.
    # All is drawn before nothing is computed any more.
    calls = {(name, OURS): (None, call) for name, call in our_calls().items()} | peer_calls()
    file = Growing(path, about, len(calls))
    with tempfile.TemporaryDirectory() as folder:
        driver = install_driver(Path(folder))
        for (name, provider), (reason, call) in calls.items():
            row: Row = {"status": "unavailable", "reason": reason}
            if reason is None:
                row = attempt(partial(time_of, call, driver, about.dry_run))
            if name == ANOTHER_CHUNK:
                row = each_more(row, file.found["rows"][-1])
            file.add({"level": name, "provider": provider, **row})
