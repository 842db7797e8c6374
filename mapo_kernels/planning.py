"""The steps of `make_plan`: each takes the call's arguments by name, `given`, as they came."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from mapo_kernels import checks, checks_groups, counting, operators
from mapo_kernels.batch import Batch, GroupInputs
from mapo_kernels.distributed import data, sequences
from mapo_kernels.groups import Signal
from mapo_kernels.layout import scalar
from mapo_kernels.live_counts import count_tokens
from mapo_kernels.spec import AdvantageSpec, LossSpec


class Members(NamedTuple):
    """Who belongs together: `groups` have rewards (or are None), `prompts` are asked for by a loss.

    Where there are groups, they are the prompts.
    """

    groups: GroupInputs | None
    prompts: GroupInputs | None


class Signals(NamedTuple):
    """Advantages of this rank's sequences: of float64 statistics, and (or None) of float32 ones.

    `of_all_ranks` has those of the whole batch, in this order, where they come from rewards.
    """

    wide: Signal
    narrow: Signal | None
    of_all_ranks: tuple[torch.Tensor | None, torch.Tensor | None]


class Denominators(NamedTuple):
    """Of losses in float64 and in float32, [] each; `weights` [B] multiply sequences, or None."""

    wide: torch.Tensor
    narrow: torch.Tensor
    weights: torch.Tensor | None = None


def groups_of(
    given: Mapping[str, Any], is_double: bool, device: torch.device | None = None
) -> GroupInputs | None:
    """The validated groups (on `device`) that a batch is `given`; None if it has advantages.

    `is_double` says whether all else of the call is float64.
    """
    rewards, process_group = given["rewards"], given["process_group"]
    names = ("group_size", "group_ids", "success", "group_weight")
    grouping = {name: given[name] for name in names}
    beside = grouping
    if given["spec"].how.denominator == "prompts":
        # With advantages, too, groups say which sequences answer the same prompt.
        beside = {name: given[name] for name in ("success", "group_weight")}
    checks.check_source(rewards, given["advantages"], beside)
    checks.check_process_group(process_group, given["normalizer"])
    if rewards is None:
        return None
    is_part = process_group is not None
    return checks_groups.check_groups(
        rewards,
        **grouping,
        is_part=is_part,
        device=device,
        is_double=is_double,
        spec=given["advantage_spec"],
    )


def prompts_of(
    given: Mapping[str, Any], n_sequences: int, device: torch.device
) -> GroupInputs | None:
    """Which sequences of a batch with advantages belong together, where its loss asks for that."""
    if given["rewards"] is not None or given["spec"].how.denominator != "prompts":
        return None
    nothing = torch.zeros(n_sequences, dtype=torch.float64, device=device)
    is_part = given["process_group"] is not None
    ids, size = given["group_ids"], given["group_size"]
    return checks_groups.check_groups(
        nothing, size, ids, None, is_part, device=device, are_rewards=False
    )


def sequences_of(given: Mapping[str, Any]) -> tuple[int, torch.device]:
    """The number of sequences that a validated mask, or validated boundaries, tell; their device.

    The normalizer is validated with them.
    """
    mask, cu_seqlens, normalizer = given["mask"], given["cu_seqlens"], given["normalizer"]
    is_part = given["process_group"] is not None
    if mask is not None:
        checks.check_tensor("mask", mask)
        checks.check_mask(mask, mask, "mask")
        n_sequences, device = checks.check_layout("mask", mask, cu_seqlens, is_part), mask.device
    elif cu_seqlens is not None:
        n_sequences = checks.check_bounds(cu_seqlens, is_part=is_part)
        device = cu_seqlens.device
    else:
        raise ValueError("mask, cu_seqlens: expected at least one of them, got neither")
    if normalizer is not None and not checks.is_global(normalizer):
        checks.check_normalizer(normalizer, device)
        checks.check_denominator(normalizer, mask)
    return n_sequences, device


def batch_of(
    given: Mapping[str, Any], groups: GroupInputs | None, n_sequences: int, device: torch.device
) -> Batch:
    """Mask, boundaries and given advantages; raises where these or the rewards do not fit them."""
    mask, cu_seqlens, advantages = given["mask"], given["cu_seqlens"], given["advantages"]
    per_token = False
    if groups is not None:
        expected = (n_sequences, *groups.rewards.shape[1:])
        checks.check_shape("rewards", groups.rewards, expected, "those of each sequence")
    else:
        # Without a mask the number of tokens is on the device: any length of advantages may be it.
        shape = None if mask is None else mask.shape
        checks.check_advantages(advantages, n_sequences, shape, device)
        per_token = checks.is_per_token(
            advantages, advantages if mask is None else mask, cu_seqlens
        )
    return Batch(mask=mask, advantages=advantages, cu_seqlens=cu_seqlens, per_token=per_token)


def tokens_of(batch: Batch) -> torch.Tensor | None:
    """A tensor in the shape of the tokens; None where only the device knows how many there are."""
    return batch.advantages if batch.mask is None and batch.per_token else batch.mask


def with_parts(
    batch: Batch, given: Mapping[str, Any], groups: GroupInputs | None, device: torch.device
) -> Batch:
    """The batch, told how its sequences lie on the ranks of a `sequence_group`, if there is one."""
    group, spec, advantage_spec = (
        given[name] for name in ("sequence_group", "spec", "advantage_spec")
    )
    if group is None:
        return batch
    tokens = tokens_of(batch)
    if tokens is None:
        tokens = torch.empty(int(given["cu_seqlens"][-1]), device=device)
    called = batch._replace(groups=groups, normalizer=given["normalizer"])
    return batch._replace(parts=sequences.meet(group, tokens, called, spec, advantage_spec))


def share(
    batch: Batch,
    given: Mapping[str, Any],
    members: Members,
    n_sequences: int,
    device: torch.device,
) -> data.Shared | None:
    """What the ranks of a `process_group` tell each other, if there is one."""
    process_group, spec = given["process_group"], given["spec"]
    if process_group is None:
        return None
    if spec.needs_count:
        part = counting.part_of(batch, tokens_of(batch), spec, members.prompts)
    else:
        part = data.Part(n_sequences, _n_tokens(batch).long(), members.groups)
    kind = "advantages" if members.groups is None else "rewards"
    call = data.Call.of_loss(spec, given["advantage_spec"], given["normalizer"], kind)
    return data.share(part, call, process_group, device)


def _n_tokens(batch: Batch) -> torch.Tensor:
    """Valid tokens [] of the batch, on whichever ranks they lie."""
    if batch.parts is not None:
        return batch.parts.n_valid.sum()
    return count_tokens(batch.mask, batch.cu_seqlens)


def signals_of(
    batch: Batch, spec: AdvantageSpec, groups: GroupInputs | None, shared: data.Shared | None
) -> Signals:
    """The advantages of this rank's sequences: as given, or of the groups of all ranks."""
    if groups is None:
        assert batch.advantages is not None
        return Signals(Signal(batch.advantages), None, (None, None))
    device = groups.rewards.device
    if shared is not None and shared.groups is not None:
        groups = shared.groups
    wide, narrow = operators.group_signals(groups, spec)
    of_all_ranks = wide.advantages, (narrow or wide).advantages
    if shared is not None:
        wide = wide.of_rows(shared.own, device)
        narrow = narrow and narrow.of_rows(shared.own, device)
    return Signals(wide, narrow, of_all_ranks)


def denominators(
    batch: Batch,
    given: Mapping[str, Any],
    members: Members,
    shared: data.Shared | None,
    signals: Signals,
    n_valid: torch.Tensor | None,
) -> Denominators:
    """What the batch is divided by: as given, as all ranks said, or counted here.

    `n_valid` has the valid tokens of each sequence here, if they are known.
    """
    spec: LossSpec = given["spec"]
    normalizer = given["normalizer"]
    if shared is not None and shared.normalizer is not None:
        normalizer = shared.normalizer
    if not spec.needs_count:
        # Of packed tokens advantages may be the tokens' own: only the boundaries count sequences.
        n_sequences = batch.n_sequences(signals.wide.advantages)
        found = Batch(normalizer=normalizer).denominator(spec, n_sequences)
        if found is None:
            here = None if batch.parts is not None else n_valid
            found = _n_tokens(batch) if here is None else here.sum()
        wide = scalar(found, torch.float64, signals.wide.advantages.device)
        return Denominators(wide, wide)
    scope = counting.Scope(spec, members.prompts, shared, normalizer)
    own = signals.wide, signals.narrow or signals.wide
    (weights, wide), (_, narrow) = [
        scope.found(batch._replace(advantages=x.advantages), tokens_of(batch), of_all)
        for x, of_all in zip(own, signals.of_all_ranks, strict=True)
    ]
    return Denominators(wide, narrow, weights)
