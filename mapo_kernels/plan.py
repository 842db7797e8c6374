"""What an optimizer batch needs before any model runs: advantages, live tokens, the denominator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mapo_kernels import checks, checks_groups, counting, operators
from mapo_kernels.arguments import DEFAULTS, BatchArguments, takes
from mapo_kernels.batch import Batch, GroupInputs
from mapo_kernels.distributed import data, sequences
from mapo_kernels.distributed.agreement import group_ranks
from mapo_kernels.groups import Signal, threshold_decides, warn_of_threshold
from mapo_kernels.live_counts import (
    Source,
    count_live,
    count_tokens,
    live_tokens,
    spec_of_live,
    valid_tokens,
)
from mapo_kernels.masks import SamplingMask, check_sampling_mask, cut, sequence_starts
from mapo_kernels.selection import select
from mapo_kernels.spec import AdvantageSpec, LossSpec, describe

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class Plan:
    """One optimizer batch, made by `make_plan`; pass it to the loss as `plan=`.

    Attributes:
        spec: the loss it was made for.
        advantages: [B], or the shape of the tokens. From float64 rewards they are float64, and
            `narrow` is what a float32 loss takes.
        mask: [B, T] or [total], nonzero where a token counts; None if all of a packed batch do.
        cu_seqlens: [B + 1] if packed, else None.
        normalizer: [] float32, the batch's denominator: its tokens for `token-mean`, prompts for
            `prompt-mean`, 1 for `token-sum`, else its sequences. Micro-batches share it, so their
            losses add up to the loss of the batch. Of all ranks and per rank with
            `normalizer="global"`: then the mean over ranks of what adds up on each is the loss of
            the whole batch.
        metrics: 0-d tensors about the groups (empty if advantages were given).
        live_counts: live tokens of each sequence, on the host. Finding them is the one time that
            `make_plan` waits for the device; nothing that a plan is used for waits again.
        bounds: `cu_seqlens` on the host, or None if padded.
        ranks: the ranks of the process group of whose groups `metrics` speak; None for this rank's
            own.
        per_token: whether `advantages` are the tokens' own, and not their sequences'.
        narrow: advantages and metrics with float32 statistics, which a loss takes that is not
            float64; None where those above are float32 already.
        advantage_spec: how its rewards became advantages.
        wide_normalizer: [] float64, the same for a loss in float64.
        sampling_mask: the columns that each token could have been sampled from, or None.
        kept_bounds: where in it each sequence begins, and the last one ends, on the host.
        sequence_weights: [B] float64 that multiply the tokens' losses: of `prompt-mean`, 1 over the
            valid tokens of each sequence's prompt in the whole batch; or None.
        sequence_group: ranks that hold the other tokens of these sequences; None if there are none.
    """

    spec: LossSpec
    advantages: torch.Tensor
    mask: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    normalizer: torch.Tensor
    metrics: dict[str, torch.Tensor]
    live_counts: tuple[int, ...] = ()
    bounds: tuple[int, ...] | None = None
    ranks: tuple[int, ...] | None = None
    per_token: bool = False
    narrow: Signal | None = None
    advantage_spec: AdvantageSpec = AdvantageSpec()
    wide_normalizer: torch.Tensor | None = None
    sampling_mask: SamplingMask | None = None
    kept_bounds: tuple[int, ...] = ()
    sequence_weights: torch.Tensor | None = None
    sequence_group: Any = None

    def signal(self, is_double: bool) -> Signal:
        """Advantages and metrics for a loss in float64 (`is_double`), or in float32."""
        if self.narrow is None or is_double:
            return Signal(self.advantages, self.metrics)
        return self.narrow

    @property
    def across_ranks(self) -> bool:
        """Whether `metrics` speak of the groups of all ranks of a process group."""
        return self.ranks is not None

    @property
    def n_sequences(self) -> int:
        """Number B of sequences."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens.shape[0] - 1
        return self.advantages.shape[0]

    @cached_property
    def live(self) -> torch.Tensor:
        """Bool, the shape of the tokens: which of them can change the loss or its gradient.

        A token with advantage 0 cannot, unless the KL term or an entropy bonus still acts on it.
        """
        total = 0
        if self.bounds is not None:
            # There may be tokens after those of the last sequence.
            total = self.advantages.shape[0] if self.per_token else self.bounds[-1]
        source = Source(self.advantages, self.narrow, self.per_token)
        spec = spec_of_live(self.spec, self.per_token, self.sequence_group)
        return live_tokens(source, self.mask, self.cu_seqlens, spec, total)

    @cached_property
    def live_rows(self) -> torch.Tensor:
        """Positions [n_live] int64 of the live tokens in the flattened batch, ascending."""
        # Their number is known, so that no `nonzero` has to wait for it.
        dead = (~self.live).reshape(-1).to(torch.uint8)
        return torch.argsort(dead, stable=True)[: sum(self.live_counts)]

    def micro_batch(
        self, sequences: slice | range | Sequence[int] | np.ndarray | torch.Tensor
    ) -> Plan:
        """The plan of some of the sequences, with the denominator (and metrics) of the whole batch.

        Args:
            sequences: a slice; or [b] indices (negative ones count from the end), as a range, list,
                tuple, array or tensor of integers; or one bool per sequence [B]. There may be none.
                Of a packed batch, whose tokens are adjacent: a slice, or what says the same on the
                host, such as range(2, 4) or [2, 3].

        Returns:
            A plan for log-probs of just these sequences, in this order. A tensor that lies on the
            device is waited for.

        Raises:
            ValueError: an index out of range; a mask or tensor of another shape; or for a packed
                batch a tensor, or sequences that are not adjacent.
            TypeError: no selection of sequences, such as one index.
        """
        chosen = select(sequences, self.n_sequences)
        if self.cu_seqlens is None:
            mask = None if self.mask is None else self.mask[chosen.rows]
            return replace(
                self,
                mask=mask,
                live_counts=tuple(self.live_counts[i] for i in chosen.which),
                sequence_weights=self._weights_of(chosen.rows),
                **self._advantages_of(chosen.rows),
                **self._kept_of(chosen.which, chosen.rows),
            )
        rows = chosen.as_slice()
        if rows is None or isinstance(sequences, torch.Tensor):
            raise ValueError(
                f"sequences: expected a plain slice (or a range or list that says the same) for "
                f"packed input, got {describe(sequences)}"
            )
        start, stop = rows.start, rows.stop
        cu_seqlens = self.cu_seqlens[start : stop + 1]
        assert self.bounds is not None
        first, last = self.bounds[start], self.bounds[stop]
        tokens = slice(first, last)
        return replace(
            self,
            **self._advantages_of(tokens if self.per_token else rows),
            mask=None if self.mask is None else self.mask[tokens],
            cu_seqlens=cu_seqlens - cu_seqlens[0],
            live_counts=self.live_counts[rows],
            sequence_weights=self._weights_of(rows),
            **self._kept_of(range(start, stop), tokens),
            bounds=tuple(bound - first for bound in self.bounds[start : stop + 1]),
        )

    def _weights_of(self, rows: Any) -> torch.Tensor | None:
        return None if self.sequence_weights is None else self.sequence_weights[rows]

    def _advantages_of(self, rows: Any) -> dict[str, Any]:
        narrow = self.narrow and self.narrow.of_rows(rows)
        return {"advantages": self.advantages[rows], "narrow": narrow}

    def _kept_of(self, which: Sequence[int], rows: Any) -> dict[str, Any]:
        """The sampling mask of some sequences, whose tokens (padded: sequences) are `rows`."""
        if self.sampling_mask is None:
            return {}
        counts = self.sampling_mask.counts
        if self.cu_seqlens is None and self.mask is not None:
            counts = counts.view(self.mask.shape)
        found, bounds = cut(self.sampling_mask, self.kept_bounds, which, counts[rows])
        return {"sampling_mask": found, "kept_bounds": bounds}


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
        rewards, **grouping, is_part=is_part, device=device, is_double=is_double
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


@takes(BatchArguments)
def make_plan(
    *, sampling_mask: SamplingMask | None = None, **arguments: Unpack[BatchArguments]
) -> Plan:
    """Compute once per optimizer batch what its micro-batches share.

    Args:
        **arguments: those that all losses share, in `arguments.BatchArguments`.
        sampling_mask: as in `mapo_loss_from_logits`; micro-batches cut it as they cut the mask.

    Returns:
        A `Plan`, of the tokens here where a `sequence_group` has the others. This waits for the
        device once, to learn how many tokens of each sequence are live; with a sampling mask or a
        `sequence_group` once more, and with `process_group` where the collective has to be waited
        for, which is whenever there are rewards.

    Raises:
        ValueError: arguments that contradict each other, or whose shapes or devices do not fit.
        TypeError: an argument of the wrong type.
    """
    given: dict[str, Any] = {**DEFAULTS, **arguments}
    mask, cu_seqlens, normalizer = given["mask"], given["cu_seqlens"], given["normalizer"]
    spec, advantage_spec = given["spec"], given["advantage_spec"]
    advantages, process_group = given["advantages"], given["process_group"]
    checks.check_specs(spec, advantage_spec)
    is_part = process_group is not None
    if mask is not None:
        checks.check_tensor("mask", mask)
        checks.check_mask(mask, mask, "mask")
        n_sequences = checks.check_layout("mask", mask, cu_seqlens, is_part)
        device = mask.device
    elif cu_seqlens is not None:
        n_sequences = checks.check_bounds(cu_seqlens, is_part=is_part)
        device = cu_seqlens.device
    else:
        raise ValueError("mask, cu_seqlens: expected at least one of them, got neither")
    if normalizer is not None and not checks.is_global(normalizer):
        checks.check_normalizer(normalizer, device)
        checks.check_denominator(normalizer, mask)
    groups = groups_of(given, True, device)
    per_token = False
    if groups is not None:
        checks.check_shape("rewards", groups.rewards, (n_sequences,), "one reward per sequence")
    else:
        # Without a mask the number of tokens is on the device: any length of advantages may be it.
        shape = None if mask is None else mask.shape
        checks.check_advantages(advantages, n_sequences, shape, device)
        tokens = advantages if mask is None else mask
        per_token = checks.is_per_token(advantages, tokens, cu_seqlens)
    own, shared, parts = None, None, None
    prompts = groups or prompts_of(given, n_sequences, device)
    tokens = advantages if mask is None and per_token else mask
    batch = Batch(mask=mask, advantages=advantages, cu_seqlens=cu_seqlens, per_token=per_token)
    sequence_group = given["sequence_group"]
    if sequence_group is not None:
        called = batch._replace(groups=groups, normalizer=normalizer)
        like = torch.empty(int(cu_seqlens[-1]), device=device) if tokens is None else tokens
        parts = sequences.meet(sequence_group, like, called, spec, advantage_spec)
        batch = batch._replace(parts=parts)
    if process_group is not None:
        n_valid = count_tokens(mask, cu_seqlens) if parts is None else parts.n_valid.sum().long()
        part = data.Part(n_sequences, n_valid, groups)
        if spec.needs_count:
            part = counting.part_of(batch, tokens, spec, prompts)
        kind = "advantages" if groups is None else "rewards"
        call = data.Call.of_loss(spec, advantage_spec, normalizer, kind)
        shared = data.share(part, call, process_group, device)
        if groups is not None:
            groups, own = shared.groups, shared.own
        normalizer = normalizer if shared.normalizer is None else shared.normalizer
    if sampling_mask is not None:
        # Without a mask of tokens their number is on the device, and the loss checks it.
        n_tokens = getattr(sampling_mask, "n_tokens", 0) if mask is None else mask.numel()
        check_sampling_mask(sampling_mask, n_tokens, device, "tokens of the batch")
    narrow = None
    if groups is not None:
        signal, narrow = operators.group_signals(groups, advantage_spec)
    else:
        assert advantages is not None
        signal = Signal(advantages)
    # Of all ranks, where they come from rewards.
    found = [None if groups is None else x.advantages for x in (signal, narrow or signal)]
    if own is not None:
        signal, narrow = signal.of_rows(own, device), narrow and narrow.of_rows(own, device)
    # Valid tokens of each sequence, where that takes one sum.
    n_valid = None if mask is None or cu_seqlens is not None else valid_tokens(mask).sum(1)
    weights = None
    if spec.needs_count:
        scope = counting.Scope(spec, prompts, shared, normalizer)
        own_signals = (signal, narrow or signal)
        (weights, count), (_, narrow_count) = [
            scope.found(batch._replace(advantages=x.advantages), tokens, of_all)
            for x, of_all in zip(own_signals, found, strict=True)
        ]
    else:
        of_all = n_valid if parts is None else parts.n_valid
        count = _denominator(normalizer, mask, cu_seqlens, n_sequences, spec, device, of_all)
        narrow_count = count
    source = Source(signal.advantages, narrow, per_token)
    decides = groups is not None and threshold_decides(advantage_spec, given["success"])
    never = signal.never_successful if decides else None
    live_spec = spec_of_live(spec, per_token, sequence_group)
    counts, bounds, has_no_success = count_live(source, mask, cu_seqlens, live_spec, never, n_valid)
    if has_no_success:
        warn_of_threshold(advantage_spec)
    return Plan(
        spec,
        signal.advantages,
        mask,
        cu_seqlens,
        narrow_count.to(torch.float32),
        signal.metrics,
        counts,
        bounds,
        None if process_group is None or groups is None else group_ranks(process_group),
        per_token,
        narrow,
        advantage_spec,
        count,
        sampling_mask,
        sequence_starts(sampling_mask, n_sequences, bounds),
        weights,
        sequence_group,
    )


def require_plan(plan: object) -> None:
    """Raise unless `plan` is one."""
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected a Plan from make_plan, got {describe(plan)}")


def bounds_of(plan: Plan | None, cu_seqlens: torch.Tensor | None) -> torch.Tensor | None:
    """Boundaries of a packed batch, those of the plan if there is one; None if it is padded."""
    if plan is None:
        return cu_seqlens
    require_plan(plan)
    return plan.cu_seqlens


def _denominator(
    normalizer: torch.Tensor | float | None,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    n_sequences: int,
    spec: LossSpec,
    device: torch.device,
    n_valid: torch.Tensor | None,
) -> torch.Tensor:
    """The batch's denominator [] float64: as given, or its tokens, or its sequences."""
    found = Batch(normalizer=normalizer).denominator(spec, n_sequences)
    if found is None:
        found = count_tokens(mask, cu_seqlens) if n_valid is None else n_valid.sum()
    return torch.as_tensor(found, dtype=torch.float64, device=device)
