"""How ranks find out whether they were called alike.

A message begins with some counts, then has a number for each setting that is to be the same on all
ranks, and one for each tensor (`facts_of`). All ranks gather all messages (`all_gather`), compare
these numbers, and where one differs all raise the same kind of error (`check_facts`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
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


def facts_of(
    settings: Mapping[str, object],
    tensors: Mapping[str, torch.Tensor | None],
    place: torch.device,
) -> torch.Tensor:
    """Numbers [settings + tensors] int64 on `place` that are equal where the values are.

    An integer stands for itself, everything else has a digest: a setting that of its text.
    """
    known = [x if isinstance(x, int) else digest(str(x)) for x in settings.values()]
    numbers = torch.tensor(known).to(place, non_blocking=True)
    nothing = numbers.new_zeros(())
    found = [nothing if x is None else digest_of(x).to(place) for x in tensors.values()]
    return torch.cat([numbers, torch.stack(found)]) if found else numbers


def check_facts(
    argument: str, settings: Mapping[str, object], tensors: Sequence[str], facts: list[list[int]]
) -> None:
    """Raise unless all ranks have the same `facts`, as `facts_of` makes them of these names.

    Raises:
        ValueError: they do not; it names `argument`, what differs, its value here and the ranks.
    """
    columns = zip((*settings, *tensors), zip(*facts, strict=True), strict=True)
    apart = {name: values for name, values in columns if len(set(values)) > 1}
    if not apart:
        return
    # Where settings differ tensors may well do so for that.
    apart = {k: v for k, v in apart.items() if k in settings} or apart
    came = []
    for name, values in apart.items():
        others = [rank for rank, value in enumerate(values) if value != values[0]]
        if isinstance(settings.get(name), int):
            came.append(f"{name} = {list(values)}")
        else:
            here = f" = {settings[name]} here" if name in settings else ""
            came.append(f"{name}{here}, where ranks {others} of {len(facts)} differ from rank 0")
    raise ValueError(
        f"{argument}: expected the same {', '.join(apart)} on every rank, got {'; '.join(came)}"
    )


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
    """Every rank's `x`, as a table [ranks, *x.shape]; nothing is sent if there is nothing."""
    n_ranks = dist.get_world_size(process_group)
    out = x.new_empty((n_ranks, *x.shape))
    if x.numel():
        # The newer name of the same collective, where there is one.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(out.view(-1), x.reshape(-1), group=process_group)
    return out
