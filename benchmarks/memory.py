"""Peak memory of tensors: by the allocator of a GPU, by torch's profiler elsewhere."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


@contextmanager
def allocations() -> Iterator[SimpleNamespace]:
    """What is allocated on the CPU within it; afterwards it has `peak` and `now`, in bytes."""
    found = SimpleNamespace(peak=0, now=0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield found
    events = profiler.profiler.kineto_results.events()
    changes = sorted((x for x in events if x.name() == "[memory]"), key=lambda x: x.start_ns())
    sizes = list(itertools.accumulate((x.nbytes() for x in changes), initial=0))
    found.peak, found.now = max(sizes), sizes[-1]


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Peak bytes that a call allocates beside what exists already."""
    if device.type != "cuda":
        with allocations() as found:
            call()
        return found.peak
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
