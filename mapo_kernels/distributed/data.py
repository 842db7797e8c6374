"""Data parallel: what ranks that hold parts of one batch have to tell each other.

One collective carries it all: from every rank a header (how it was called, how many sequences and
tokens it holds), then its rewards. The message has the same size whatever a rank was called with,
so that ranks that disagree meet in it and can say so, where a second collective would hang.
"""

from __future__ import annotations

from dataclasses import fields
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from mapo_kernels import checks, checks_groups
from mapo_kernels.batch import GroupInputs
from mapo_kernels.checks import GLOBAL
from mapo_kernels.distributed.agreement import all_gather, check_facts, facts_of, meeting_place
from mapo_kernels.spec import AdvantageSpec, LossSpec
from mapo_kernels.tracing import outside_graphs

# A message's first numbers; how the rank was called follows, then a row per reward.
_COUNTS = ("sequences", "tokens", "rewards", "dtype", "success")
# The bits of the reward as float64; with a sequence's first: group's id, success, valid tokens.
_ROW = 4
_FIRST_CAPACITY = 64
# Settings that a rank remembers per group: those of a trainer's losses, and not one more for each
# step of a coefficient that is annealed.
_REMEMBERED = 16
# Every real dtype that float64 holds exactly (int64 up to 2^53); 0 in a message means no rewards.
_DTYPES = (
    None,
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
)
_SUCCESS = (None, "none", "given")


class Part(NamedTuple):
    """What a rank holds of the batch.

    Attributes:
        n_sequences: B here, which may be 0; those that the denominator counts.
        n_tokens: likewise of tokens, a number or a 0-d tensor.
        groups: the rewards here; or None where advantages are known.
        lengths: [B] valid tokens of each sequence, where they have to be known; then `groups` may
            have another number per sequence in place of rewards.
    """

    n_sequences: torch.Tensor | int
    n_tokens: torch.Tensor | int = 0
    groups: GroupInputs | None = None
    lengths: torch.Tensor | None = None


class Call(NamedTuple):
    """What every rank has to be called with alike; a field that plays no part is None.

    Attributes:
        function: which computation.
        spec: the loss.
        advantage_spec: the advantages.
        normalizer: what kind of denominator.
        source: of advantages, if not what is said by the presence of groups.
    """

    function: str
    spec: LossSpec | None
    advantage_spec: AdvantageSpec
    normalizer: str | None = None
    source: str | None = None

    @classmethod
    def of_loss(
        cls,
        spec: LossSpec,
        advantage_spec: AdvantageSpec,
        normalizer: object,
        source: str | None = None,
    ) -> Call:
        """The call of a loss, or of a plan for one."""
        kind = "counted" if normalizer is None else "given"
        kind = GLOBAL if checks.is_global(normalizer) else kind
        return cls("loss", spec, advantage_spec, kind, source)

    def settings(self, groups: GroupInputs | None) -> dict[str, str]:
        """Names and values of all settings: the same names whatever the call."""
        found: dict[str, object] = {"function": self.function, "normalizer": self.normalizer}
        found["source"] = self.source or ("advantages" if groups is None else "rewards")
        found["group_size"] = groups and (groups.group_size or None)
        found["rewards per sequence"] = groups and _per_sequence(groups)
        for name, kind in (("spec", LossSpec), ("advantage_spec", AdvantageSpec)):
            for field in fields(kind):
                found[f"{name}.{field.name}"] = getattr(getattr(self, name), field.name, None)
        return {name: repr(value) for name, value in found.items()}


class _Memory:
    """What a rank remembers of a process group, the same on all of its ranks.

    Attributes:
        capacity: rewards that a message has room for.
        calls: facts of the last settings by settings and device, once the ranks were seen to
            agree. What is forgotten is read again, which waits for the device and is no collective.
    """

    def __init__(self) -> None:
        self.capacity = _FIRST_CAPACITY
        self.calls: dict[tuple[tuple[str, ...], torch.device], torch.Tensor] = {}

    def keep(self, key: tuple[tuple[str, ...], torch.device], facts: torch.Tensor) -> None:
        """Remember settings that were used just now, and forget those that were not for longest."""
        self.calls.pop(key, None)
        self.calls[key] = facts
        while len(self.calls) > _REMEMBERED:
            del self.calls[next(iter(self.calls))]


_memories: WeakKeyDictionary[dist.ProcessGroup, _Memory] = WeakKeyDictionary()


def _per_sequence(groups: GroupInputs) -> int:
    return 1 if groups.rewards.dim() == 1 else groups.rewards.shape[1]


def _sent_dtype(rewards: torch.Tensor) -> torch.dtype:
    return rewards.dtype if rewards.dtype in _DTYPES else torch.float64


def _write_message(part: Part, facts: torch.Tensor, capacity: int) -> torch.Tensor:
    """A rank's message: counts, facts, and its rewards if they fit; nothing waits."""
    groups = part.groups
    n_rewards, dtype, success = 0, 0, 0
    if groups is not None and groups.rewards.shape[0]:
        n_rewards = groups.rewards.numel()
        dtype = _DTYPES.index(_sent_dtype(groups.rewards))
        success = _SUCCESS.index("none" if groups.success is None else "given")
    n_header = len(_COUNTS) + facts.numel()
    message = facts.new_zeros(n_header + _ROW * capacity)
    counts = (part.n_sequences, part.n_tokens, n_rewards, dtype, success)
    for i, count in enumerate(counts):
        message[i] = count
    message[len(_COUNTS) : n_header] = facts
    if groups is not None and n_rewards <= capacity:
        rows = message[n_header:].view(capacity, _ROW)[:n_rewards]
        sent = groups.rewards.to(facts.device).double().contiguous()
        rows[:, 0] = sent.view(torch.int64).view(-1)
        first = rows[:: _per_sequence(groups)]
        if groups.group_ids is not None:
            first[:, 1] = groups.group_ids
        if groups.success is not None:
            first[:, 2] = groups.success
        if part.lengths is not None:
            first[:, 3] = part.lengths
    return message


def _check_agreement(headers: list[list[int]], settings: dict[str, str]) -> None:
    """Raise unless every rank was called with the same settings, and rewards of one kind."""
    for name, kinds in (("dtype", _DTYPES), ("success", _SUCCESS)):
        # A rank without rewards says nothing about them.
        found = {header[_COUNTS.index(name)] for header in headers} - {0}
        if len(found) > 1:
            came = ", ".join(str(kinds[code]) for code in sorted(found))
            raise ValueError(f"rewards: expected the same {name} on every rank, got {came}")
    check_facts("process_group", settings, (), [header[len(_COUNTS) :] for header in headers])


@outside_graphs
def _exchange(
    part: Part, call: Call, process_group: dist.ProcessGroup, device: torch.device
) -> tuple[torch.Tensor, list[list[int]] | None]:
    """Every rank's message, and on the host its header where that had to be read.

    It has to be for rewards, whose number differs from rank to rank, and for settings that this
    group has not agreed on before: only then is the device waited for. Otherwise the denominator
    says it where ranks differ, so a call that gets none from here reads every time.
    """
    memory = _memories.setdefault(process_group, _Memory())
    settings = call.settings(part.groups)
    place = meeting_place(process_group, device)
    key = (tuple(settings.values()), place)
    agreed = key in memory.calls
    facts = memory.calls[key] if agreed else facts_of(settings, {}, place)
    n_header = len(_COUNTS) + len(settings)
    while True:
        table = all_gather(_write_message(part, facts, memory.capacity), process_group)
        if agreed and part.groups is None and call.normalizer == GLOBAL:
            memory.keep(key, facts)
            return table, None
        headers = table[:, :n_header].tolist()
        _check_agreement(headers, settings)
        memory.keep(key, facts)
        most = max(header[2] for header in headers)
        if most <= memory.capacity:
            return table, headers
        # All ranks see this, and all come back with larger messages.
        memory.capacity = 1 << (most - 1).bit_length()


def _whole_groups(
    table: torch.Tensor, headers: list[list[int]], groups: GroupInputs, pass_at_k: int | None
) -> tuple[GroupInputs, torch.Tensor]:
    """The rewards of all ranks, in the order of the ranks, and the lengths of their sequences."""
    n_header = len(headers[0])
    counts = [header[2] for header in headers]
    rows = torch.cat(
        [x[n_header : n_header + _ROW * n] for x, n in zip(table, counts, strict=True)]
    ).view(-1, _ROW)
    dtype = _DTYPES[max(header[3] for header in headers)] or groups.rewards.dtype
    has_success = max(header[4] for header in headers) == _SUCCESS.index("given")
    first = rows[:: _per_sequence(groups)]
    rewards = rows[:, 0].contiguous().view(torch.float64).to(dtype)
    whole = groups._replace(
        rewards=rewards.view(-1, *groups.rewards.shape[1:]),
        group_ids=None if groups.group_ids is None else first[:, 1].contiguous(),
        success=first[:, 2] != 0 if has_success else None,
    )
    checks_groups.check_group_count(whole.rewards.shape[0], whole.group_size, pass_at_k)
    return whole, first[:, 3]


def _denominator(table: torch.Tensor, call: Call) -> torch.Tensor:
    """Tokens or sequences of all ranks per rank, [] float64; NaN where a rank was called otherwise.

    Ranks that agreed once do not read each other's settings again: the loss says it, by being NaN.
    """
    assert call.spec is not None
    spec = call.spec
    total = table.new_ones(())
    if spec.how.denominator in _COUNTS:
        total = table[:, _COUNTS.index(spec.how.denominator)].sum()
    if spec.needs_count:
        total = total.clamp(min=1)
    first, last = len(_COUNTS), len(_COUNTS) + len(call.settings(None))
    agree = (table[:, first:last] == table[0, first:last]).all()
    return (total.double() / table.shape[0]).where(agree, float("nan"))


class Shared(NamedTuple):
    """What a rank knows about the batch once all ranks have met.

    Attributes:
        groups: the groups of all ranks, where collectives of the group take place; None without
            rewards.
        own: which of their rewards are this rank's.
        normalizer: [] float64 if one of all ranks was asked for, else None.
        lengths: [B of all ranks] float64, if they were told.
        n_ranks: how many ranks have met.
    """

    groups: GroupInputs | None
    own: slice
    normalizer: torch.Tensor | None
    lengths: torch.Tensor | None = None
    n_ranks: int = 1


def share(part: Part, call: Call, process_group: dist.ProcessGroup, device: torch.device) -> Shared:
    """Meet the other ranks of the batch, in one collective."""
    table, headers = _exchange(part, call, process_group, device)
    normalizer = None
    if call.normalizer == GLOBAL:
        normalizer = _denominator(table, call).to(device)
    if part.groups is None:
        return Shared(None, slice(None), normalizer)
    assert headers is not None
    rank = dist.get_rank(process_group)
    per_sequence = _per_sequence(part.groups)
    start = sum(header[2] for header in headers[:rank]) // per_sequence
    own = slice(start, start + headers[rank][2] // per_sequence)
    whole, lengths = _whole_groups(table, headers, part.groups, call.advantage_spec.pass_at_k)
    if whole.weight is not None:
        # Weights play no part in statistics: those of other ranks' rows are not needed here.
        weight = whole.weight.new_ones(whole.rewards.shape[0]).to(whole.rewards.device)
        weight[own] = whole.weight.to(weight.device)
        whole = whole._replace(weight=weight)
    told = None if part.lengths is None else lengths.to(torch.float64)
    return Shared(whole, own, normalizer, told, table.shape[0])
