"""Padded or packed: where sequences lie, which tokens are valid, and which contribute."""

from __future__ import annotations

import torch

from mapo_kernels.batch import Batch
from mapo_kernels.eager import formula
from mapo_kernels.eager.sums import accumulator_dtype, row_sum, sum_by
from mapo_kernels.spec import LossSpec


def loss_denominator(
    batch: Batch, spec: LossSpec, n_sequences: int, n_valid: torch.Tensor
) -> torch.Tensor:
    """The batch's denominator [], of which `n_valid` [] tokens are valid, in their dtype."""
    found = batch.denominator(spec, n_sequences)
    found = n_valid if found is None else scalar(found, n_valid.dtype, n_valid.device)
    return formula.loss_denominator(found, n_valid)


def scalar(x: torch.Tensor | float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A number, or a tensor of one, as a tensor [] there; nothing waits."""
    if isinstance(x, torch.Tensor):
        return x.to(device, dtype).reshape(())
    # Not `as_tensor`, which waits for a copy from the host. torch.compile keeps a number as a
    # symbol where it is a factor, and not as a filling.
    return torch.ones((), dtype=dtype, device=device) * x


class Layout:
    """Which tokens are valid, and how to go between tokens and sequences.

    Attributes:
        n_sequences: B.
        valid: bool, the shape of the tokens: those of a sequence that are not masked.
    """

    def __init__(self, tokens: torch.Tensor, batch: Batch) -> None:
        """Of `tokens`, [B, T] or [total], only the shape and the device matter."""
        self.n_sequences = batch.n_sequences(tokens)
        self._batch = batch
        parts = batch.parts
        self._length = tokens.shape[-1] if parts is None else sum(parts.lengths)
        self._sequence: torch.Tensor | None = None
        self._n_valid = None if parts is None else parts.n_valid
        mask = batch.mask
        if mask is not None and mask.dtype != torch.bool:
            mask = mask != 0
        valid = mask
        if batch.cu_seqlens is not None:
            positions = torch.arange(tokens.shape[0], device=tokens.device)
            bounds = batch.cu_seqlens.to(positions.dtype)
            sequence = torch.searchsorted(bounds[1:].contiguous(), positions, right=True)
            inside = (positions >= bounds[0]) & (positions < bounds[-1])
            valid = inside if mask is None else inside & mask
            self._sequence = sequence.clamp(max=self.n_sequences - 1)
        if valid is None:
            valid = torch.ones_like(tokens, dtype=torch.bool)
        self.valid = valid

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of a token tensor over each sequence, [B]."""
        if self._sequence is None:
            return row_sum(x)
        wide = x.to(accumulator_dtype(x.device))
        return sum_by(self._sequence, wide, self.n_sequences).to(x.dtype)

    def n_valid(self) -> torch.Tensor:
        """Valid tokens of each whole sequence, [B] float32: exact up to 2^24."""
        if self._n_valid is None:
            if self._sequence is None and not torch.compiler.is_compiling():
                # Counting is exact, and quicker than making numbers of bools.
                self._n_valid = self.valid.sum(1).to(torch.float32)
            else:
                self._n_valid = self.sum(self.valid.to(torch.float32))
        return self._n_valid

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """Values of sequences [B] in a shape that broadcasts against token tensors."""
        return x[:, None] if self._sequence is None else x[self._sequence]

    def advantage(self) -> torch.Tensor:
        """The given advantages in a shape that broadcasts against token tensors."""
        given = self._batch.advantages
        assert given is not None
        return given if self._batch.per_token else self.spread(given)

    def contributing(
        self, spec: LossSpec, advantage: torch.Tensor, weight: torch.Tensor | None
    ) -> torch.Tensor:
        """Which tokens can change the loss, its gradient, or a metric that was asked for."""
        if spec.needs_every_token:
            return self.valid
        # Spread first: torch is slow at operations on bools of two shapes.
        with_signal = self.valid & (advantage != 0).expand(self.valid.shape).contiguous()
        if weight is not None:
            with_signal = with_signal & (weight != 0)
        if spec.importance_level == "token":
            return with_signal
        if self._batch.parts is not None and (self._batch.per_token or weight is not None):
            # Whether a sequence has signal may be known to another rank.
            return self.valid
        # Every token moves its sequence's ratio, so a sequence is scored whole or not at all.
        in_sequence = self.sum(with_signal.to(advantage.dtype)) > 0
        return self.valid & self.spread(in_sequence)

    def divisor(self, spec: LossSpec) -> torch.Tensor:
        """What each sequence's token losses are divided by, [B], beside the denominator."""
        n_valid = self.n_valid().clamp(min=1.0)
        length = n_valid
        if spec.how.divisor == "length":
            # A tensor: torch.compile makes a graph for each number that is added to one.
            length = torch.full_like(n_valid, spec.fixed_length(self._length))
        return formula.sequence_divisor(n_valid, length, spec.kind)

    def entropy_weights(self, spec: LossSpec, like: torch.Tensor) -> torch.Tensor | None:
        """Weight of each token's entropy bonus, the shape of the tokens; None if there is none.

        Before the batch's denominator, in the dtype of `like`.
        """
        if spec.entropy_coef == 0:
            return None
        per_sequence = spec.entropy_coef / self.divisor(spec).to(like.dtype)
        weights = self.spread(per_sequence).expand(self.valid.shape).contiguous()
        factor = self._batch.loss_weights
        return weights if factor is None else weights * factor
