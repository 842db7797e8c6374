"""What travels between the layers: the tensors of one call, already validated, and its results."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from mapo_kernels.formula import SLOTS
from mapo_kernels.spec import AdvantageSpec, LossSpec


def replaced(x: Any, **changes: Any) -> Any:
    """The named tuple `x` with some fields changed: `_replace` as every torch.compile can trace."""
    return type(x)(*[changes[k] if k in changes else getattr(x, k) for k in type(x)._fields])


class GroupInputs(NamedTuple):
    """Rewards and which of them belong together.

    Attributes:
        rewards: [B], any real dtype; [B, K] until `groups.decide_rewards` made one of several.
        group_size: members per group where groups are contiguous, else 0.
        group_ids: [B] integers in any order, or None where `group_size` says it.
        success: [B] bool, or None to compare rewards with the threshold.
        wide: whether statistics are float64: every input of the call is. Else they are float32.
        batch_std: [2], the product is the deviation of all rewards where the z-score divides by it;
            else None.
        weight: [B] floating-point, what a row's advantage is multiplied by; None for 1.
    """

    rewards: torch.Tensor
    group_size: int = 0
    group_ids: torch.Tensor | None = None
    success: torch.Tensor | None = None
    wide: bool = False
    weight: torch.Tensor | None = None
    batch_std: torch.Tensor | None = None


class SequenceParts(NamedTuple):
    """How sequences lie on the ranks of a group that each hold some of their tokens.

    Attributes:
        group: the process group.
        rank: this process in it.
        lengths: of each rank, tokens of a padded sequence, or of all packed ones.
        n_valid: valid tokens of each sequence on all ranks together, [B] float32.
    """

    group: Any
    rank: int
    lengths: tuple[int, ...]
    n_valid: torch.Tensor


class Batch(NamedTuple):
    """The tensors of one token loss beside the log-probs themselves.

    Token tensors have the shape of the log-probs: [B, T] padded, or [total] packed with
    `cu_seqlens`.

    Attributes:
        old_logprobs: log-probs of the policy that sampled, or None on-policy.
        ref_logprobs: log-probs of the reference policy, or None.
        rollout_logprobs: log-probs as the sampling engine saw them, or None.
        token_weights: factor of the policy term, or None.
        entropy: of the distribution each token was drawn from, where logits were seen; or None.
        loss_weights: factor of a token's whole loss beside the aggregation's: of its prompt, or
            where a chunk of tokens does not know the sequences it comes from; or None.
        mask: nonzero where a token counts, or None if all do.
        advantages: [B] or per token; or None, then `groups` is there.
        groups: rewards by group, from which the kernel computes the advantages; or None.
        cu_seqlens: [B + 1] boundaries of the packed sequences, or None if padded.
        normalizer: the denominator over the batch: a 0-d tensor, a number, or None to count it
            here.
        per_token: whether the advantages are the tokens' own, and not their sequences'.
        parts: how the sequences lie on ranks that each hold some of their tokens; or None: whole.
    """

    old_logprobs: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None
    rollout_logprobs: torch.Tensor | None = None
    token_weights: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    loss_weights: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    advantages: torch.Tensor | None = None
    groups: GroupInputs | None = None
    cu_seqlens: torch.Tensor | None = None
    normalizer: torch.Tensor | float | None = None
    per_token: bool = False
    parts: SequenceParts | None = None

    def token_tensors(self) -> tuple[torch.Tensor | None, ...]:
        """The fields with one value per token, in order; the mask is the last of them."""
        return (
            self.old_logprobs,
            self.ref_logprobs,
            self.rollout_logprobs,
            self.token_weights,
            self.entropy,
            self.loss_weights,
            self.mask,
        )

    def of_rows(self, rows: slice) -> Batch:
        """The inputs with only some rows of the token tensors."""
        names = self._fields[: len(self.token_tensors())]
        tensors = zip(names, self.token_tensors(), strict=True)
        some: dict[str, Any] = {k: None if x is None else x[rows] for k, x in tensors}
        return self._replace(**some)

    def denominator(self, spec: LossSpec, n_sequences: int) -> torch.Tensor | float | None:
        """What the batch's loss is divided by; None where its valid tokens are to be counted.

        The one place that knows, but for `formula.loss_denominator`, which guards it.
        """
        if self.normalizer is not None:
            return self.normalizer
        if spec.how.denominator == "tokens":
            return None
        return 1.0 if spec.how.denominator == "one" else float(n_sequences)

    def n_sequences(self, logprobs: torch.Tensor) -> int:
        """Number B of sequences in a batch with these log-probs."""
        return logprobs.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1


class TokenResults(NamedTuple):
    """What the token loss leaves on the device.

    Attributes:
        loss: [] float32 (float64 on the eager path for float64 log-probs).
        results: [16], the first of them as `formula.RESULTS` names them.
        advantages: [B] if they were computed from rewards, else empty.
        grad: like the log-probs, d loss / d logp before `gradient_scale`; empty if not needed.
    """

    loss: torch.Tensor
    results: torch.Tensor
    advantages: torch.Tensor
    grad: torch.Tensor


class KnownMetrics(NamedTuple):
    """Metrics that were known before the loss.

    Attributes:
        values: some of `formula.GroupMetrics` and `bounds.RolloutMetrics`, 0-d each.
        ranks: the ranks of the process group of whose groups they speak; None for this rank's own.
    """

    values: dict[str, torch.Tensor]
    ranks: tuple[int, ...] | None = None


def empty_results(
    logprobs: torch.Tensor,
    inputs: Batch,
    spec: LossSpec,
    advantage_spec: AdvantageSpec,
    need_grad: bool,
) -> TokenResults:
    """Uninitialised float32 results of the right shapes."""
    n_sequences = inputs.n_sequences(logprobs) if inputs.groups is not None else 0
    loss = logprobs.new_empty((), dtype=torch.float32)
    # To name a dtype takes half as long as the allocation: the others have that of the loss. Not
    # empty_like: the kernel writes rows of adjacent tokens, whatever the strides of the input.
    new = loss.new_empty
    return TokenResults(loss, new(SLOTS), new(n_sequences), new(logprobs.shape if need_grad else 0))


class VocabShare(NamedTuple):
    """Which columns of every row lie on this rank; shares are adjacent, in the order of the ranks.

    Attributes:
        group: the process group over which rows are split.
        rank: this process in it.
        sizes: columns of each rank.
    """

    group: Any
    rank: int
    sizes: tuple[int, ...]

    @property
    def offset(self) -> int:
        """Columns on the ranks before this one."""
        return sum(self.sizes[: self.rank])

    @property
    def vocab(self) -> int:
        """V, the columns of all ranks."""
        return sum(self.sizes)


class Kept(NamedTuple):
    """The columns that N rows keep: the entries of a sparse matrix, row by row.

    Attributes:
        columns: [nnz] int64 in [0, V); -1 for an entry that does not count.
        row: [nnz] int64 in [0, N), ascending.
        bounds: [N + 1] int64, where each row's entries begin, and where the last one's end.
    """

    columns: torch.Tensor
    row: torch.Tensor
    bounds: torch.Tensor

    @property
    def counts(self) -> torch.Tensor:
        """Kept columns of each row, [N]; 0 where it keeps all."""
        return self.bounds.diff()


class RowInputs(NamedTuple):
    """What turns rows of logits into log-probs.

    Attributes:
        token_ids: [B, T] or [total] integers, the sampled tokens.
        temperature: a number; or a tensor, [B] for padded logits and [total] for packed ones.
        share: which columns are here where rows are split over ranks; None where they are whole.
        bias: [V] that a kernel adds to a row, or None.
        softcap: c of the `c tanh(scale x / c)` that it then makes of it, or None.
        scale: see there.
        kept: the columns that each row keeps, where some keep less than all; else None.
    """

    token_ids: torch.Tensor
    temperature: torch.Tensor | float = 1.0
    share: VocabShare | None = None
    bias: torch.Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    kept: Kept | None = None


class HeadInputs(NamedTuple):
    """The head that turns hidden states into logits: softcap(logit_scale (h W^T + bias)).

    Attributes:
        weight: [V, H].
        bias: [V], or None.
        softcap: c of `c tanh(x / c)`, or None.
        logit_scale: what the product is multiplied by.
        chunk_rows: hidden states per chunk, or None to choose.
        live_rows: positions of the live tokens in the flattened batch, or None to find them, which
            waits for the device.
        batch_invariant: whether every product has the same shape, however many rows there are.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    chunk_rows: int | None = None
    live_rows: torch.Tensor | None = None
    batch_invariant: bool = False


class HeadResults(NamedTuple):
    """What the loss from hidden states leaves on the device.

    Attributes:
        loss: as in `TokenResults`, and so are the next two.
        results: see there.
        advantages: see there.
        d_hidden: gradient like the hidden states, contiguous; None if not asked for.
        d_weight: gradient [V, H] in the dtype of sums, or the weight's where one product gave it;
            None if not asked for.
        d_bias: gradient [V] in the dtype of sums; None if not asked for.
    """

    loss: torch.Tensor
    results: torch.Tensor
    advantages: torch.Tensor
    d_hidden: torch.Tensor | None = None
    d_weight: torch.Tensor | None = None
    d_bias: torch.Tensor | None = None
