"""What an optimizer batch needs before any model runs: advantages, live tokens, the denominator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from mapo_kernels import checks, planning
from mapo_kernels.arguments import DEFAULTS, BatchArguments, takes
from mapo_kernels.distributed.agreement import group_ranks
from mapo_kernels.groups import Signal, threshold_decides, warn_of_threshold
from mapo_kernels.live_counts import (
    Source,
    count_live,
    live_tokens,
    spec_of_live,
    valid_tokens,
)
from mapo_kernels.masks import SamplingMask, check_sampling_mask, cut, sequence_starts
from mapo_kernels.selection import select
from mapo_kernels.spec import AdvantageSpec, LossSpec, describe

if TYPE_CHECKING:
    import numpy as np
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
    sequence_group: torch.distributed.ProcessGroup | None = None

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
            here = chosen.rows_on(self.advantages.device)
            return replace(
                self,
                mask=None if self.mask is None else self.mask[here],
                live_counts=tuple(self.live_counts[i] for i in chosen.which),
                sequence_weights=self._weights_of(here),
                **self._advantages_of(here),
                **self._kept_of(chosen.which, here),
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
    spec, advantage_spec = given["spec"], given["advantage_spec"]
    mask, cu_seqlens, process_group = given["mask"], given["cu_seqlens"], given["process_group"]
    checks.check_specs(spec, advantage_spec)
    n_sequences, device = planning.sequences_of(given)
    groups = planning.groups_of(given, True, device)
    batch = planning.batch_of(given, groups, n_sequences, device)
    members = planning.Members(groups, groups or planning.prompts_of(given, n_sequences, device))
    batch = planning.with_parts(batch, given, groups, device)
    shared = planning.share(batch, given, members, n_sequences, device)
    if sampling_mask is not None:
        # Without a mask of tokens their number is on the device, and the loss checks it.
        n_tokens = getattr(sampling_mask, "n_tokens", 0) if mask is None else mask.numel()
        check_sampling_mask(sampling_mask, n_tokens, device, "tokens of the batch")
    signals = planning.signals_of(batch, advantage_spec, groups, shared)
    signal, narrow = signals.wide, signals.narrow
    # Valid tokens of each sequence, where that takes one sum.
    n_valid = None if mask is None or cu_seqlens is not None else valid_tokens(mask).sum(1)
    found = planning.denominators(batch, given, members, shared, signals, n_valid)
    source = Source(signal.advantages, narrow, batch.per_token)
    decides = groups is not None and threshold_decides(advantage_spec, given["success"])
    never = signal.never_successful if decides else None
    live_spec = spec_of_live(spec, batch.per_token, given["sequence_group"])
    counts, bounds, has_no_success = count_live(source, mask, cu_seqlens, live_spec, never, n_valid)
    if has_no_success:
        warn_of_threshold(advantage_spec)
    return Plan(
        spec,
        signal.advantages,
        mask,
        cu_seqlens,
        found.narrow.to(torch.float32),
        signal.metrics,
        live_counts=counts,
        bounds=bounds,
        ranks=None if process_group is None or groups is None else group_ranks(process_group),
        per_token=batch.per_token,
        narrow=narrow,
        advantage_spec=advantage_spec,
        wide_normalizer=found.wide,
        sampling_mask=sampling_mask,
        kept_bounds=sequence_starts(sampling_mask, n_sequences, bounds),
        sequence_weights=found.weights,
        sequence_group=given["sequence_group"],
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
