"""A GRPO trainer that keeps the columns each token was sampled from: `ReplayTrainer`.

They are recorded while transformers generates, or taken from vLLM's outputs or a `rollout_func`,
and go with their completions through TRL's tool loop, its shuffling and its micro-batches. Old and
reference log-probs are computed over them here, those of the loss by the trainer derived from it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import LogitsProcessor
from trl import GRPOTrainer

from mapo_kernels.integrations.trl_options import truncates
from mapo_kernels.masks import SamplingMask

MasksOf = Callable[[Sequence[Any]], "list[SamplingMask | None]"]

_NO_COLUMNS = torch.empty(0, dtype=torch.int32)
_has_warned = False


class ScoredToken(float):
    """The log-prob of a sampled token, and the columns [n] that it was sampled from.

    TRL's tool loop cuts and joins the turns' lists of log-probs as it does their tokens. What a
    log-prob brings along stays with its token.
    """

    kept: torch.Tensor


def as_mask(kept: Any) -> SamplingMask:
    """The mask of one completion, on the CPU, from what an inference engine says of it.

    Args:
        kept: for each of its tokens a list of ids, or an object with these as `token_ids`, as
            vLLM's `SamplingMask` is; or one with all ids in `token_ids`, and `offsets` into them.

    Returns:
        The mask of its tokens.
    """
    ids, offsets = getattr(kept, "token_ids", kept), getattr(kept, "offsets", None)
    if offsets is None:
        return SamplingMask.from_lists(ids)
    ids = torch.as_tensor(ids, dtype=torch.int32).cpu()
    return SamplingMask(ids, torch.as_tensor(offsets, dtype=torch.int64).cpu())


def padded(masks: Sequence[SamplingMask], width: int) -> SamplingMask:
    """The masks of B completions as one of [B, width] tokens; padding has no columns listed."""
    counts = [torch.nn.functional.pad(x.counts, (0, width - x.n_tokens)) for x in masks]
    return SamplingMask.from_counts(torch.cat([x.token_ids for x in masks]), torch.cat(counts))


def attach(
    completion_ids: Sequence[Any], logprobs: Any, masks: Sequence[SamplingMask | None]
) -> list[list[float]]:
    """Log-probs of completions (0 where there are none) that hold what their tokens keep."""
    rows: list[list[float]] = []
    for n, (ids, mask) in enumerate(zip(completion_ids, masks, strict=True)):
        given = [0.0] * len(ids) if logprobs is None else logprobs[n]
        if mask is None:
            rows.append(given)
            continue
        check_length(mask, len(ids), n)
        # Where vLLM had no log-prob, TRL has None, which it later takes for NaN.
        row = [ScoredToken("nan" if x is None else x) for x in given]
        for token, kept in zip(row, mask.token_ids.split(mask.counts.tolist()), strict=True):
            token.kept = kept
        rows.append(list(row))
    return rows


def collect(logprobs: Sequence[Sequence[Any]]) -> list[SamplingMask] | None:
    """The masks of completions whose log-probs hold them; None where not one does."""
    if not any(isinstance(x, ScoredToken) for row in logprobs for x in row):
        return None
    found = []
    for row in logprobs:
        kept = [getattr(x, "kept", _NO_COLUMNS) for x in row]
        counts = torch.tensor([x.shape[0] for x in kept], dtype=torch.int64)
        found.append(SamplingMask.from_counts(torch.cat([_NO_COLUMNS, *kept]), counts))
    return found


def check_length(mask: SamplingMask, n_tokens: int, completion: int) -> None:
    """Raise unless a mask speaks of so many tokens."""
    if mask.n_tokens != n_tokens:
        raise ValueError(
            f"sampling_mask: expected the columns of each of the {n_tokens} tokens of completion "
            f"{completion}, got those of {mask.n_tokens}"
        )


class _Recorder(LogitsProcessor):
    """Stands behind all filters of `generate` and notes which columns they have left."""

    def __init__(self) -> None:
        self._steps: list[SamplingMask] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores [B, V] as they are."""
        kept = scores > -torch.inf
        kept &= ~kept.all(-1, keepdim=True)
        ids = kept.nonzero()[:, 1].int()
        self._steps.append(SamplingMask.from_counts(ids, kept.sum(-1)))
        return scores

    def masks_of(self, completion_ids: Sequence[Any]) -> list[SamplingMask | None]:
        """The masks of the batch's completions, without what was sampled behind their ends.

        None where nothing was noted, or beams, of which nobody knows here which were taken.
        """
        n_rows = len(completion_ids)
        if not self._steps or self._steps[0].n_tokens != n_rows:
            return [None] * n_rows
        found = SamplingMask.cat(self._steps).to("cpu")
        tokens = torch.arange(found.n_tokens).view(-1, n_rows)
        return [found.select(tokens[: len(ids), n]) for n, ids in enumerate(completion_ids)]


@contextmanager
def of_generate(model: Any) -> Iterator[MasksOf]:
    """While it lasts, what `model.generate` filters away is noted. Its steps wait for the device.

    What a token was sampled from is then known bit for bit, without another product by the head.
    """
    recorder, original = _Recorder(), model._get_logits_processor

    def with_recorder(*args: Any, **kwargs: Any) -> Any:
        processors = original(*args, **kwargs)
        processors.append(recorder)
        return processors

    with _replaced(model, "_get_logits_processor", with_recorder):
        yield recorder.masks_of


@contextmanager
def of_vllm(llm: Any) -> Iterator[MasksOf]:
    """While it lasts, masks are taken from the outputs of vLLM's `llm.generate` that have them."""
    # TRL selects among the outputs' lists of tokens, which are then found by what they are.
    found, original = {}, llm.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        outputs = original(*args, **kwargs)
        for completion in (x for output in outputs for x in output.outputs):
            found[id(completion.token_ids)] = completion
        return outputs

    def masks_of(completion_ids: Sequence[Any]) -> list[SamplingMask | None]:
        kept = [getattr(found.get(id(ids)), "sampling_mask", None) for ids in completion_ids]
        return [None if x is None else as_mask(x) for x in kept]

    with _replaced(llm, "generate", generate):
        yield masks_of


@contextmanager
def _replaced(owner: Any, name: str, function: Any) -> Iterator[None]:
    """While it lasts, an object has another method."""
    before = vars(owner).get(name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def warn_of_bias(why: str) -> None:
    """Say, once in a process, that importance ratios are biased."""
    global _has_warned
    if _has_warned:
        return
    _has_warned = True
    warnings.warn(
        f"replay_sampling_mask: completions are sampled from a truncated vocabulary (top_p, top_k, "
        f"min_p or another filter), but log-probs are computed over all of it, {why}. Every "
        f"importance ratio to the policy that sampled is biased.",
        stacklevel=3,
    )


def forget_warnings() -> None:
    """Warn again of what was warned of already: for tests."""
    global _has_warned
    _has_warned = False


class _Scored:
    """Stands where TRL calls the model for log-probs, and asks for those over the kept columns."""

    def __init__(self, model: Any, masks: Sequence[SamplingMask], width: int) -> None:
        self._model, self._masks, self._width = model, masks, width
        self._first = 0

    def __call__(self, **inputs: Any) -> Any:
        """The model's output for the next sequences."""
        ids = inputs["input_ids"]
        rows = slice(self._first, self._first + ids.shape[0])
        self._first = rows.stop
        mask = padded(self._masks[rows], self._width).to(ids.device)
        return self._model(**inputs, sampling_mask=mask)


class ReplayTrainer(GRPOTrainer):
    """`GRPOTrainer` whose batches have a `sampling_mask`: that of each completion, on the CPU."""

    # Of the batch that is being generated and scored.
    _masks: list[SamplingMask] | None = None

    @property
    def _replays(self) -> bool:
        return self.args.replay_sampling_mask and self.args.fused != "logprobs"

    def _recording(self) -> AbstractContextManager[MasksOf]:
        """Notes what the tokens of a turn are sampled from."""
        if self.use_vllm:
            llm = getattr(self.vllm_generation, "llm", None)  # a server has none
            if llm is not None:
                return of_vllm(llm)
        elif truncates(self.args) and not self.use_transformers_continuous_batching:
            model = self.accelerator.unwrap_model(self.model)
            return of_generate(model.get_base_model() if is_peft_model(model) else model)
        return nullcontext(lambda completion_ids: [None] * len(completion_ids))

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """TRL's completions; their log-probs hold the columns that tokens were sampled from."""
        if not self._replays:
            return super()._generate_single_turn(*args, **kwargs)
        with self._recording() as masks_of:
            completion_ids, logprobs = super()._generate_single_turn(*args, **kwargs)
            masks = masks_of(completion_ids)
        if any(mask is not None for mask in masks):
            logprobs = attach(completion_ids, logprobs, masks)
        return completion_ids, logprobs

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        """TRL's completions, whose masks are kept until they are scored."""
        found = list(super()._generate(prompts))
        completion_ids, logprobs, fields = found[1], found[4], found[5]
        self._masks = None
        if self._replays:
            given = fields.pop("sampling_mask", None)
            if given is not None:
                self._masks = [as_mask(x) for x in given]
            elif logprobs is not None:
                self._masks = collect(logprobs)
            for n, mask in enumerate(self._masks or ()):
                check_length(mask, len(completion_ids[n]), n)
            if not self.use_vllm and self.rollout_func is None:
                found[4] = None  # as TRL has it: these log-probs only held the columns
        if truncates(self.args):
            self._log_columns()
            if self._masks is None:
                warn_of_bias(
                    "because the generation brought no sampling masks"
                    if self._replays
                    else "because replay_sampling_mask is False"
                )
        return tuple(found)

    def _log_columns(self) -> None:
        """The mean over the tokens of all ranks, of those that have columns listed."""
        counts = torch.cat([torch.zeros(1), *(x.counts for x in self._masks or ())])
        sums = torch.stack([counts.sum(), (counts > 0).sum()]).to(self.accelerator.device)
        total, n_tokens = self.accelerator.reduce(sums, reduction="sum").tolist()
        if n_tokens > 0:
            mode = "train" if self.model.training else "eval"
            self._metrics[mode]["mapo/kept_columns"].append(total / n_tokens)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Any,
        attention_mask: Any,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """TRL's log-probs and entropies; over the kept columns for a batch that has such."""
        if self._masks is not None:
            model = _Scored(model, self._masks, logits_to_keep)
        return super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch, with a list of the completions' masks, which TRL shuffles and splits."""
        batch = super()._generate_and_score_completions(inputs)
        if self._masks is not None:
            batch["sampling_mask"], self._masks = self._masks, None
        return batch
