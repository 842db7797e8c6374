"""The keyword arguments that the losses and the plan share: names, types, defaults, meaning."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import torch

from mapo_kernels.choices import Normalizer
from mapo_kernels.keywords import names_checked
from mapo_kernels.spec import AdvantageSpec, LossSpec

if TYPE_CHECKING:
    from mapo_kernels.choices import (
        ApdDenominator,
        Certainty,
        Difficulty,
        Estimator,
        MultiObjective,
        Scale,
    )
    from mapo_kernels.masks import SamplingMask
    from mapo_kernels.plan import Plan

F = TypeVar("F", bound=Callable[..., Any])


class BatchArguments(TypedDict, total=False):
    """Which tokens count, what they are worth, and what the loss is divided by.

    Args:
        rewards: [B] any real dtype, whole groups; or [B, K], which `advantage_spec` says how to
            sum; or give `advantages`. Their statistics are float32, unless rewards and log-probs
            (logits, hidden states) are float64.
        advantages: [B] or per token, floating-point; [B] where a packed batch allows both readings.
        group_size: sequences per group, groups contiguous; or give `group_ids`. Beside advantages
            only where the aggregation is `prompt-mean`.
        group_ids: [B] integers, rows in any order, ragged groups.
        success: [B] bool, which sequences succeeded; default `rewards >= success_threshold`.
        group_weight: factors of the advantages, which `AdvantageSpec.max_abs` bounds after them:
            [B], or [Q] one per group, in order or by ascending id; with `process_group` [B]. Such
            as weights from the history of a prompt (HA-DW, arXiv 2601.08521).
        mask: [B, T] or [total], nonzero where a token counts. Whatever lies elsewhere, NaN
            included, changes nothing, and gets a gradient of exactly 0.
        cu_seqlens: [B + 1] int32 or int64, boundaries of the packed sequences.
        normalizer: denominator over the batch, a positive number or a 0-d tensor, in place of the
            tokens (`token-mean`), prompts (`prompt-mean`) or sequences counted here; so
            micro-batches and ranks add up. A tensor that is not positive makes the loss NaN, unless
            all is masked.
            `global` counts those of all ranks of `process_group` and divides by the number of
            ranks, so that the mean over ranks of losses and gradients (DDP, FSDP) is that of the
            whole batch; a trainer that adds them up divides the loss by that number. If
            micro-batches follow, have the batch counted once: by `make_plan`.
        process_group: ranks that each hold a part of the batch, all of which call this: groups may
            lie across them, as in `group_advantages`, and `normalizer` may be `global`. One
            collective; see there. Not inside torch.compile, where a plan made before will do.
        sequence_group: ranks that each hold some tokens of the same sequences (context parallel),
            cut in any way: rewards and all else that is not the tokens' own is the same on these
            ranks. Loss, denominators and metrics are those of the whole sequences, on every rank;
            the gradient is that by the tokens here, so that gradients of parameters are summed over
            the group. Ranks first exchange how they were called, for which the host waits, then
            counts, and log-probs where ratios or metrics need them. Not inside torch.compile.
        spec: which loss, and how it is aggregated.
        advantage_spec: how rewards become advantages.
    """

    rewards: torch.Tensor | None
    advantages: torch.Tensor | None
    group_size: int | None
    group_ids: torch.Tensor | None
    success: torch.Tensor | None
    group_weight: torch.Tensor | None
    mask: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    normalizer: torch.Tensor | float | Normalizer | None
    process_group: torch.distributed.ProcessGroup | None
    sequence_group: torch.distributed.ProcessGroup | None
    spec: LossSpec
    advantage_spec: AdvantageSpec


class LossArguments(BatchArguments, total=False):
    """What every loss takes beside its first arguments; token tensors have the shape of its tokens.

    Args:
        old_logprobs: under the policy that sampled; None means on-policy (ratio 1).
        ref_logprobs: under the reference policy; needed if `spec.beta` is not 0.
        rollout_logprobs: as the sampling engine saw them; needed if `spec.rollout_cap` or
            `spec.rollout_mask` is set (the latter needs `old_logprobs`, too).
        token_weights: factor of the policy term (importance, off-policy or entropy masks).
        plan: of `make_plan`, in place of rewards, advantages, groups, mask, cu_seqlens, normalizer,
            process_group and sequence_group.
    """

    old_logprobs: torch.Tensor | None
    ref_logprobs: torch.Tensor | None
    rollout_logprobs: torch.Tensor | None
    token_weights: torch.Tensor | None
    plan: Plan | None


# The functions whose result depends on a flag have a signature for each value of it. What else they
# take is in the tables below, for type checkers; defaults and meaning are with the function.


class AdvantageArguments(TypedDict, total=False):
    """Of `group_advantages`."""

    group_size: int | None
    group_ids: torch.Tensor | None
    estimator: Estimator
    certainty: Certainty | float
    success: torch.Tensor | None
    success_threshold: float
    std_correction: int
    eps: float
    apd: ApdDenominator
    max_abs: float | None
    difficulty: Difficulty | None
    difficulty_exponent: float
    scale: Scale
    reward_weights: tuple[float, ...] | list[float] | None
    multi_objective_aggregation: MultiObjective
    pass_at_k: int | None
    group_weight: torch.Tensor | None
    process_group: torch.distributed.ProcessGroup | None


class RowArguments(TypedDict, total=False):
    """Of what reads rows of logits."""

    temperature: torch.Tensor | float
    vocab_group: torch.distributed.ProcessGroup | None
    sampling_mask: SamplingMask | None


class HeadArguments(RowArguments, total=False):
    """Of what multiplies by the lm_head."""

    bias: torch.Tensor | None
    softcap: float | None
    logit_scale: float
    chunk_rows: int | None
    batch_invariant: bool


class ScoreArguments(RowArguments, total=False):
    """Of `token_logprobs`."""

    mask: torch.Tensor | None
    plan: Plan | None


class HiddenScoreArguments(ScoreArguments, HeadArguments, total=False):
    """Of `token_logprobs_from_hidden`."""


class LogitsLossArguments(LossArguments, RowArguments, total=False):
    """Of `mapo_loss_from_logits`."""

    inplace: bool


class HiddenLossArguments(LossArguments, HeadArguments, total=False):
    """Of `mapo_loss_from_hidden`."""


DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(LossArguments.__annotations__),
    "spec": LossSpec(),
    "advantage_spec": AdvantageSpec(),
}
_MARK = "    **arguments: "


def takes(table: type) -> Callable[[F], F]:
    """A function whose `**arguments` are those of `table`, in its signature and in its help too.

    An unknown keyword is an error that names the nearest one.
    """
    shared = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=DEFAULTS[name],
            annotation=getattr(hint, "__forward_arg__", hint),
        )
        for name, hint in table.__annotations__.items()
    ]

    def decorate(function: F) -> F:
        plain = inspect.signature(function)
        own = list(plain.parameters.values())[:-1]
        last = [p for p in own if p.kind is inspect.Parameter.KEYWORD_ONLY]
        first = [p for p in own if p not in last]
        function.__signature__ = plain.replace(parameters=[*first, *shared, *last])  # type: ignore[attr-defined]
        if function.__doc__:  # python -OO has none
            # Without the indentation of the source, which compilers of Python 3.13 leave out.
            lines = inspect.cleandoc(function.__doc__).splitlines()
            at = next(i for i, line in enumerate(lines) if line.startswith(_MARK))
            lines[at : at + 1] = _meanings(table)
            function.__doc__ = "\n".join(lines)
        return names_checked(function)  # type: ignore[return-value]

    return decorate


def _meanings(table: type) -> list[str]:
    """The lines of help about the arguments of a table and of those it extends."""
    texts = [
        inspect.cleandoc(x.__doc__ or "").partition("Args:\n")[2]
        for x in dict.fromkeys((BatchArguments, table))
    ]
    return [line for text in texts for line in text.splitlines() if line.strip()]
