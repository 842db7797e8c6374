"""What is measured: the batches of RL training steps, and which of them a suite has."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

import mapo_kernels as mk

from .names import GRPO, HIDDEN, KEPT, LOGITS, LOGPROBS, MAPO, SCORING
from .names import LEVELS as LEVELS
from .names import SUITES as SUITES

BF16 = torch.bfloat16
# Spread of answer lengths: a heavy tail up to the limit, as reasoning models have.
LENGTH_SIGMA = 0.6


class Head(NamedTuple):
    """An lm_head: hidden size H, vocabulary V, Gemma's cap on logits where there is one."""

    name: str
    width: int
    vocab: int
    softcap: float | None = None


NO_HEAD = Head("", 0, 0)  # of levels without a vocabulary
LAPTOP = Head("laptop", 256, 32000)
CAPPED_LAPTOP = Head("laptop with softcap", 256, 32000, softcap=30.0)
QWEN3 = Head("Qwen3-0.6B", 1024, 151936)
QWEN3_8B = Head("Qwen3-8B", 4096, 151936)
QWEN2 = Head("Qwen2.5-7B", 3584, 152064)
LLAMA = Head("Llama-3-8B", 4096, 128256)
GEMMA = Head("Gemma-2-9B", 3584, 256000, softcap=30.0)


@dataclass(frozen=True)
class Case:
    """One level at one shape: B answers padded to T tokens, in groups of G.

    `padding` and `no_signal` are shares: of padding, and of silent groups, whose rewards are all
    equal and whose tokens change nothing. `sweep` is the plot that shows the case. `kept` columns
    of every row could be sampled, or as many as rollouts have where it is 0; with `common` the
    first column is among them in every row, as a line break nearly is.
    """

    level: str
    n_sequences: int
    length: int = 1
    group_size: int = 16
    padding: float = 0.0
    no_signal: float = 0.0
    head: Head = NO_HEAD
    dtype: torch.dtype = torch.float32
    sweep: str = "tokens"
    kept: int = 0
    common: bool = False

    @property
    def direction(self) -> str:
        """What is timed: a score without gradients, or both forward and backward."""
        return "score" if self.level in (MAPO, GRPO, SCORING) else "both"

    @property
    def tokens(self) -> int:
        """Positions, padding included."""
        return self.n_sequences * self.length

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def shape(self) -> str:
        """The case's name for people."""
        size = f"{self.n_sequences}" + (f" x {self.length}" if self.length > 1 else "")
        kept = f"{self.kept} kept" if self.kept else ""
        common = "one column in every row" if self.common else ""
        return ", ".join(filter(None, (size, self.head.name, self.dtype_name, common, kept)))

    def as_row(self) -> dict[str, Any]:
        """What a result says of the case."""
        same = ("level", "shape", "direction", "sweep", "tokens", "group_size", "padding")
        return {name: getattr(self, name) for name in (*same, "no_signal")} | {
            "dtype": self.dtype_name,
            "head": self.head.name or None,
            "width": self.head.width or None,
            "vocab": self.head.vocab or None,
        }

    def tiny(self) -> Case:
        """The same case with a few tokens and words, for Triton's interpreter."""
        head = self.head if self.head is NO_HEAD else self.head._replace(width=16, vocab=50)
        length = min(self.length, 3)
        n, kept = 2 * self.group_size, min(self.kept, head.vocab)
        return replace(self, n_sequences=n, length=length, head=head, kept=kept)


def answer_lengths(case: Case, generator: torch.Generator) -> torch.Tensor:
    """Lengths [B] in 1..T: log-normal, cut at T, whose mean leaves the case's padding."""
    if case.padding == 0:
        return torch.full((case.n_sequences,), case.length)
    quantiles = (torch.arange(case.n_sequences) + 0.5) / case.n_sequences
    spread = torch.exp(LENGTH_SIGMA * torch.special.ndtri(quantiles.double()))

    def scaled(log_scale: int) -> torch.Tensor:
        return (spread * math.exp(log_scale / 1000)).clamp(1, case.length)

    wanted = (1 - case.padding) * case.length
    found = bisect_left(range(30_000), wanted, key=lambda x: float(scaled(x).mean()))
    order = torch.randperm(case.n_sequences, generator=generator)
    return scaled(found).round().long()[order]


def draw_rewards(case: Case, generator: torch.Generator) -> torch.Tensor:
    """Rewards [B] of 0 and 1, groups contiguous: the case's share silent, the others mixed."""
    n_groups, size = case.n_sequences // case.group_size, case.group_size
    successes = torch.randint(1, size, (n_groups, 1), generator=generator)
    found = (torch.arange(size) < successes).float()
    silent = torch.randperm(n_groups, generator=generator)[: round(case.no_signal * n_groups)]
    found[silent] = (silent % 2).float()[:, None].expand(-1, size)
    return found.flatten()


def kept_counts(case: Case, generator: torch.Generator) -> torch.Tensor:
    """Columns that each token [N] keeps: 47% one, a median of 2, a mean of 8, 1% above 82.

    As prime-rl measured them in rollouts sampled with top-p; the others are 2 and more, log-normal.
    """
    if case.kept:
        return torch.full((case.tokens,), case.kept)
    spread = torch.randn(case.tokens, generator=generator)
    several = 2 + torch.exp(1.608 + 1.337 * spread).long()
    alone = torch.rand(case.tokens, generator=generator) < 0.47
    return torch.where(alone, 1, several).clamp(max=case.head.vocab // 2)


def draw_kept(case: Case, ids: torch.Tensor, generator: torch.Generator) -> mk.SamplingMask:
    """The columns of each token: itself, and others of which some are kept again and again."""
    counts = kept_counts(case, generator)
    rows = []
    for y, n in zip(ids.flatten().tolist(), counts.tolist(), strict=True):
        kept = {y, 0} if case.common else {y}
        while len(kept) < n:
            # Logarithms of columns are uniform: every sixteenth is the first, of 32000.
            power = torch.rand(n, generator=generator).double()
            kept.update((case.head.vocab**power).long().sub_(1).tolist()[: n - len(kept)])
        rows.append(list(kept))
    return mk.SamplingMask.from_lists(rows, ids.device)


def advantages(*powers: int) -> list[Case]:
    return [Case(level, 1 << power) for level in (MAPO, GRPO) for power in powers]


def logprobs(*sizes: tuple[int, int]) -> list[Case]:
    return [Case(LOGPROBS, *size, padding=0.5, no_signal=0.3) for size in sizes]


def policy(level: str, n: int, lengths: tuple[int, ...], head: Head, **more: Any) -> list[Case]:
    """Micro-batches of `n` sequences, half padding, a third without signal."""
    return [Case(level, n, length, 8, 0.5, 0.3, head, **more) for length in lengths]


def live(case: Case, *shares: float) -> list[Case]:
    """The case with every position in the mask and shares of its sequences without signal."""
    return [replace(case, padding=0.0, no_signal=share, sweep="live") for share in shares]


def kept(head: Head, length: int = 128, **more: Any) -> list[Case]:
    """Rows of few columns, all of them alive: as rollouts keep them, and a sweep of numbers."""
    drawn = Case(KEPT, 16, length, 8, head=head, **more)
    numbers = (1, 2, 8, 32, 128, 512)
    common = replace(drawn, common=True, sweep="common")
    return [drawn, common, *[replace(drawn, sweep="kept", kept=n) for n in numbers]]


def quick_cases() -> list[Case]:
    """Under a minute on two CPU cores."""
    hidden = policy(HIDDEN, 8, (16, 32), LAPTOP)
    return [
        *advantages(10, 14, 18),
        *logprobs((16, 512), (64, 2048)),
        *policy(LOGITS, 8, (8, 16, 32), LAPTOP),
        Case(SCORING, 8, 16, head=LAPTOP),
        *hidden,
        *live(hidden[0], 0.0, 0.5),
        kept(LAPTOP, 16)[0],
    ]


def cpu_cases() -> list[Case]:
    """Minutes on a CPU: larger batches, bfloat16, every share of silent groups, softcap."""
    logits = policy(LOGITS, 16, (4, 8, 16, 32), LAPTOP)
    hidden = policy(HIDDEN, 16, (16, 32, 64, 128), LAPTOP)
    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    return [
        *advantages(10, 14, 18, 22),
        *logprobs((16, 512), (64, 2048), (1024, 4096)),
        *logits,
        replace(logits[-1], dtype=BF16, sweep="dtype"),
        *live(logits[-2], *shares),
        *[Case(SCORING, 16, length, head=LAPTOP) for length in (8, 32)],
        *hidden,
        *live(hidden[-2], *shares),
        *policy(HIDDEN, 16, (64,), CAPPED_LAPTOP, sweep="heads"),
        *kept(LAPTOP),
    ]


def gpu_cases() -> list[Case]:
    """Minutes on one H200: the heads of production models, 131k and 4M log-probs."""
    logits = policy(LOGITS, 16, (128, 256, 512), QWEN2, dtype=BF16)
    hidden = policy(HIDDEN, 16, (256, 512, 1024), QWEN3, dtype=BF16)
    shares = (0.0, 0.3, 0.6, 1.0)
    heads: dict[str, Any] = {"dtype": BF16, "sweep": "heads"}
    return [
        *advantages(10, 14, 18, 22),
        *logprobs((64, 2048), (1024, 4096)),
        *logits,
        *live(logits[-1], *shares),
        *policy(LOGITS, 16, (512,), LLAMA, **heads),
        *policy(LOGITS, 16, (256,), QWEN2, sweep="dtype"),
        Case(SCORING, 16, 512, head=QWEN2, dtype=BF16),
        *hidden,
        *live(hidden[-2], *shares),
        *policy(HIDDEN, 16, (512,), QWEN2, **heads),
        *policy(HIDDEN, 16, (512,), LLAMA, **heads),
        *policy(HIDDEN, 16, (512,), GEMMA, **heads),
        *kept(QWEN3_8B, 512, dtype=BF16),
    ]


def cases_of(suite: str, on_gpu: bool) -> list[Case]:
    """The cases of a suite on a GPU or a CPU."""
    if suite == "quick":
        return quick_cases()
    return gpu_cases() if on_gpu or suite == "gpu" else cpu_cases()


class Effort(NamedTuple):
    """How long one measurement may take, in seconds, and how many samples it has."""

    seconds: float
    least: int = 5
    most: int = 50


EFFORTS = {"quick": Effort(0.1, least=3), "gpu": Effort(0.2), "full": Effort(0.3)}
