"""A loss call: its arguments, validated and resolved once, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any, NamedTuple

import torch

from mapo_kernels import checks, checks_rows, counting, operators
from mapo_kernels.arguments import DEFAULTS
from mapo_kernels.batch import Batch, GroupInputs, KnownMetrics, RowInputs, replaced
from mapo_kernels.distributed import data, sequences
from mapo_kernels.distributed.agreement import group_ranks
from mapo_kernels.distributed.vocabulary import Split
from mapo_kernels.formula import GROUP_METRICS, RESULTS
from mapo_kernels.groups import decide_rewards
from mapo_kernels.layout import Layout
from mapo_kernels.live_counts import count_tokens
from mapo_kernels.masks import SamplingMask, check_sampling_mask, one_of_both, resolved
from mapo_kernels.metrics import Metrics, Slots, as_metrics
from mapo_kernels.plan import Plan, require_plan
from mapo_kernels.planning import groups_of, prompts_of
from mapo_kernels.rollout import correct
from mapo_kernels.spec import AdvantageSpec, LossSpec, require_bool

# What a plan stands for.
_REWARDS = ("rewards", "group_size", "group_ids", "success", "group_weight")
_SOURCE = ("advantages", *_REWARDS)
_GROUPS = ("process_group", "sequence_group")
_LAYOUT = ("mask", "cu_seqlens", "normalizer")
_NOTHING = KnownMetrics({})


def _slots_of(has_reference: bool, has_entropy: bool, has_groups: bool) -> Slots:
    """The metrics that such a loss has, and their slots in its results."""
    absent = {"gradient_scale"}
    absent.update(() if has_reference else ("ref_kl",), () if has_entropy else ("entropy",))
    absent.update(() if has_groups else GROUP_METRICS)
    return Slots({name: slot for slot, name in enumerate(RESULTS) if name not in absent})


_SLOTS = {which: _slots_of(*which) for which in product((False, True), repeat=3)}


class LossOutput(NamedTuple):
    """What a loss call returns.

    Attributes:
        loss: [] differentiable scalar, float32 (float64 for float64 log-probs on the eager
            backend).
        metrics: name to 0-d tensor, on the device and detached; see `mapo_loss`. They are
            `Metrics`, with `reduce(process_group)`, except from a graph compiled by an old torch.
        advantages: [B] as computed from the rewards, or as they were given.
    """

    loss: torch.Tensor
    metrics: Metrics
    advantages: torch.Tensor


class TokenLossOutput(NamedTuple):
    """What a loss call returns that was asked for numbers of its tokens.

    Attributes:
        loss: as in `LossOutput`, and so are the next two.
        metrics: see there.
        advantages: see there.
        logprobs: [B, T] or [total], detached; as the loss took them, bit for bit those of
            `token_logprobs`. 0 for a token that is not scored, as is what follows.
        entropy: of each token's distribution, in nats.
        sum_pi_squared: the sum of its squared probabilities, or None if it was not asked for.
    """

    loss: torch.Tensor
    metrics: Metrics
    advantages: torch.Tensor
    logprobs: torch.Tensor
    entropy: torch.Tensor
    sum_pi_squared: torch.Tensor | None


class LossCall(NamedTuple):
    """One call of a loss.

    Attributes:
        batch: its tensors, and what they are.
        spec: which loss.
        advantage_spec: how rewards become advantages.
        known: metrics about groups that were known before.
        planned: whether they come from a plan.
        sampling_mask: of the plan, if that has one.
    """

    batch: Batch
    spec: LossSpec
    advantage_spec: AdvantageSpec
    known: KnownMetrics
    planned: bool
    sampling_mask: SamplingMask | None = None

    def rows(
        self,
        token_ids: torch.Tensor,
        temperature: torch.Tensor | float,
        vocab: int,
        split: Split | None = None,
        sampling_mask: SamplingMask | None = None,
    ) -> RowInputs:
        """Validated token ids, temperatures, one of these per token where packed, and kept columns.

        `vocab` is the number of columns here: all of them unless rows are split over ranks.
        """
        batch = self.batch
        checks_rows.check_temperature(temperature, batch.n_sequences(token_ids), token_ids.device)
        sampling_mask = one_of_both(sampling_mask, self.sampling_mask)
        if sampling_mask is not None:
            check_sampling_mask(sampling_mask, token_ids.numel(), token_ids.device)
        share = None
        if split is not None:
            split = split._replace(
                spec=self.spec, advantage_spec=self.advantage_spec, planned=self.planned
            )
            share = split.agree(token_ids, batch, temperature, sampling_mask)
            vocab = share.vocab
        checks_rows.check_token_ids(token_ids, batch.mask, vocab)
        kept, token_ids = resolved(sampling_mask, token_ids, batch.mask, vocab)
        if isinstance(temperature, torch.Tensor) and batch.cu_seqlens is not None:
            temperature = Layout(token_ids, batch).spread(temperature)
        return RowInputs(token_ids, temperature, share, kept=kept)

    def output(
        self,
        loss: torch.Tensor,
        results: torch.Tensor,
        own: torch.Tensor,
        scores: torch.Tensor | None = None,
        has_entropy: bool = True,
    ) -> Any:
        """What the call returns, from what its autograd node did."""
        batch = self.batch
        slots = _SLOTS[batch.ref_logprobs is not None, has_entropy, batch.groups is not None]
        metrics = as_metrics(slots, results, self.known.values, self.known.ranks)
        advantages = own if batch.advantages is None else batch.advantages
        if scores is None:
            return LossOutput(loss, metrics, advantages.detach())
        squares = scores[2] if scores.shape[0] > 2 else None
        return TokenLossOutput(loss, metrics, advantages.detach(), scores[0], scores[1], squares)


def n_scores(return_logprobs: bool, return_sum_pi_squared: bool) -> int:
    """How many numbers of each token a call is asked for."""
    require_bool("return_logprobs", return_logprobs)
    require_bool("return_sum_pi_squared", return_sum_pi_squared)
    return 3 if return_sum_pi_squared else 2 * return_logprobs


def resolve(
    name: str, tokens: torch.Tensor, dtype: torch.dtype, arguments: Mapping[str, Any]
) -> LossCall:
    """The validated call that was made with these `arguments`.

    `name` and `tokens` are the argument that says which shape token tensors have, `dtype` is that
    of what the loss is differentiated by.
    """
    given = {**DEFAULTS, **arguments}
    spec, advantage_spec, plan = given["spec"], given["advantage_spec"], given["plan"]
    checks.check_specs(spec, advantage_spec)
    process_group, sequence_group = given["process_group"], given["sequence_group"]
    is_double = dtype == torch.float64
    mask, cu_seqlens, normalizer = given["mask"], given["cu_seqlens"], given["normalizer"]
    known = _NOTHING
    groups: GroupInputs | None = None
    if plan is not None:
        spec = _spec_of(plan, given)
        mask, cu_seqlens, normalizer = plan.mask, plan.cu_seqlens, plan.normalizer
        sequence_group = plan.sequence_group
        if is_double:
            # Not otherwise: torch.compile takes a float64 tensor of no dimension for a number.
            normalizer = plan.wide_normalizer
        signal, per_token = plan.signal(is_double), plan.per_token
        advantages = signal.advantages
        known = KnownMetrics(signal.metrics, plan.ranks)
    else:
        advantages = given["advantages"]
        groups = groups_of(given, is_double)
        per_token = checks.is_per_token(advantages, tokens, cu_seqlens)
    batch = Batch(
        given["old_logprobs"],
        given["ref_logprobs"],
        given["rollout_logprobs"],
        given["token_weights"],
        mask=mask,
        advantages=advantages,
        groups=groups,
        cu_seqlens=cu_seqlens,
        normalizer=normalizer,
        per_token=per_token,
    )
    wide = torch.float64 if is_double else torch.float32
    is_part = process_group is not None or (plan is not None and plan.n_sequences == 0)
    checks.check_tokens(name, tokens, batch, spec, is_part)
    checks.check_denominator(normalizer, mask, wide)
    if sequence_group is not None:
        parts = sequences.meet(sequence_group, tokens, batch, spec, advantage_spec)
        batch = replaced(batch, parts=parts)
    if batch.rollout_logprobs is not None:
        batch, of_rollouts = correct(tokens, batch, spec, wide)
        known = replaced(known, values={**known.values, **of_rollouts})
    kept = None if plan is None else plan.sampling_mask
    call = LossCall(batch, spec, advantage_spec, known, plan is not None, kept)
    if plan is not None:
        batch = counting.weighted(batch, tokens, plan.sequence_weights, wide)
        return replaced(call, batch=batch)
    prompts = groups
    if spec.needs_count and prompts is None:
        prompts = prompts_of(given, batch.n_sequences(tokens), tokens.device)
    if process_group is not None:
        return _among_ranks(call, tokens, process_group, prompts, wide)
    if spec.needs_count:
        return _counted(_with_advantages(call), tokens, prompts, wide, None)
    if groups is not None and advantage_spec.normalizes_first:
        return _with_advantages(call)
    if groups is not None:
        decided = decide_rewards(groups, advantage_spec)
        if decided is not groups:
            call = replaced(call, batch=replaced(batch, groups=decided))
    return call


def _among_ranks(
    call: LossCall,
    tokens: torch.Tensor,
    process_group: torch.distributed.ProcessGroup,
    prompts: GroupInputs | None,
    dtype: torch.dtype,
) -> LossCall:
    """The call with advantages and denominator of the batch of all ranks, and its group metrics."""
    batch, known = call.batch, call.known
    n_tokens: torch.Tensor | int = tokens.numel()
    if batch.parts is not None:
        n_tokens = batch.parts.n_valid.sum().long()
    elif batch.mask is not None or batch.cu_seqlens is not None:
        n_tokens = count_tokens(batch.mask, batch.cu_seqlens)
    part = data.Part(batch.n_sequences(tokens), n_tokens, batch.groups)
    if call.spec.needs_count:
        part = counting.part_of(batch, tokens, call.spec, prompts)
    source = "advantages" if batch.groups is None else "rewards"
    settings = data.Call.of_loss(call.spec, call.advantage_spec, batch.normalizer, source)
    shared = data.share(part, settings, process_group, tokens.device)
    found = None
    if batch.groups is not None:
        assert shared.groups is not None
        signal = operators.group_signals(shared.groups, call.advantage_spec)[0]
        found = signal.advantages
        signal = signal.of_rows(shared.own, tokens.device)
        batch = replaced(batch, groups=None, advantages=signal.advantages)
        values = {**known.values, **signal.metrics}
        known = KnownMetrics(values, group_ranks(process_group))
    if shared.normalizer is not None:
        batch = replaced(batch, normalizer=shared.normalizer)
    call = replaced(call, batch=batch, known=known)
    if call.spec.needs_count:
        call = _counted(call, tokens, prompts, dtype, shared, found)
    return call


def _with_advantages(call: LossCall) -> LossCall:
    """The call with the advantages of its groups, and their metrics."""
    if call.batch.groups is None:
        return call
    signal = operators.group_signals(call.batch.groups, call.advantage_spec)[0]
    batch = replaced(call.batch, groups=None, advantages=signal.advantages, per_token=False)
    values = {**call.known.values, **signal.metrics}
    return replaced(call, batch=batch, known=KnownMetrics(values))


def _counted(
    call: LossCall,
    tokens: torch.Tensor,
    prompts: GroupInputs | None,
    dtype: torch.dtype,
    shared: data.Shared | None,
    advantages: torch.Tensor | None = None,
) -> LossCall:
    """The call with the denominator, and the weights of prompts, that have to be counted.

    `advantages` are those of all ranks, if they come from rewards.
    """
    batch = call.batch
    scope = counting.Scope(call.spec, prompts, shared, batch.normalizer)
    weights, count = scope.found(batch, tokens, advantages)
    batch = replaced(batch, normalizer=count.to(dtype))
    return replaced(call, batch=counting.weighted(batch, tokens, weights, dtype))


def _spec_of(plan: Plan, given: Mapping[str, Any]) -> LossSpec:
    """The plan's spec, after making sure that nothing contradicts the plan."""
    require_plan(plan)
    twice = [name for name in (*_SOURCE, *_GROUPS, *_LAYOUT) if given[name] is not None]
    if twice:
        raise ValueError(f"{', '.join(twice)}: expected None with a plan, which has them already")
    for name in ("spec", "advantage_spec"):
        planned = getattr(plan, name)
        if given[name] not in (DEFAULTS[name], planned):
            raise ValueError(f"{name}: expected the plan's {name} {planned}, got {given[name]}")
    return plan.spec
