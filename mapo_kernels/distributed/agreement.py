"""How ranks find out whether they were called alike: digests, and where these are exchanged."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
import torch.distributed as dist

# The constants of splitmix64 (Steele, Lea and Flood 2014), as signed numbers.
_STEP = 0x9E3779B97F4A7C15 - (1 << 64)
_FACTORS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


@lru_cache(maxsize=256)
def digest(text: str) -> int:
    """63 bits that stand for a text, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def digest_of(x: torch.Tensor) -> torch.Tensor:
    """64 bits that stand for the values of a tensor in their order, [] int64 where it lies.

    Every position has a hash of its own, which is mixed with the bits of its value and hashed again
    before all are summed: values that change, come or go, or change places, change the sum, unless
    two hashes of 64 bits happen to be equal. Equal numbers of different dtypes have equal digests.
    Nothing waits for the device.
    """
    flat = x.detach().reshape(-1)
    if flat.is_floating_point():
        # One zero and one NaN, whatever their sign.
        flat = (flat.double() + 0.0).masked_fill(flat.isnan(), torch.nan)
        words = flat.contiguous().view(torch.int64)
    else:
        words = flat.long()
    places = torch.arange(1, words.shape[0] + 1, device=words.device)
    return _mix(_mix(places * _STEP) ^ words).sum() + digest(str(words.shape[0]))


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The last steps of splitmix64: each bit of an int64 changes half of the bits that come out."""
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        x = (x ^ _shifted(x, shift)) * factor
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    """As of an unsigned number: no copies of the sign come in from the left."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def meeting_place(process_group: dist.ProcessGroup | None, device: torch.device) -> torch.device:
    """Where tensors for this group's collectives lie: NCCL takes none from the CPU."""
    if device.type == "cpu" and dist.get_backend(process_group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return device


def group_ranks(process_group: dist.ProcessGroup | None) -> tuple[int, ...]:
    """The ranks of a process group (None: of all), ascending, as the default group counts them."""
    group = dist.group.WORLD if process_group is None else process_group
    return tuple(sorted(dist.get_process_group_ranks(group)))


def all_gather(x: torch.Tensor, process_group: dist.ProcessGroup | None) -> torch.Tensor:
    """Every rank's `x`, as a table [ranks, numel]."""
    n_ranks = dist.get_world_size(process_group)
    out = x.new_empty(n_ranks * x.numel())
    # The newer name of the same collective, where there is one.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(out, x.reshape(-1), group=process_group)
    return out.view(n_ranks, -1)
