"""What is measured: the batches of RL training steps, and which of them a suite has."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

import mapo_kernels as mk

from .names import GRPO, HIDDEN, KEPT, LOGITS, LOGPROBS, MAPO, SCORING

BF16 = torch.bfloat16


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
    first column is among them in every row, as a line break nearly is. With `from_rewards`
    advantages are not given, but a part of the work.
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
    from_rewards: bool = False

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

    def shrunk(self, n_sequences: int, length: int, vocab: int) -> Case:
        """The same level with other sizes, and with a hidden size of 16."""
        head = self.head if self.head is NO_HEAD else self.head._replace(width=16, vocab=vocab)
        kept = min(self.kept, vocab)
        return replace(self, n_sequences=n_sequences, length=length, head=head, kept=kept)

    def tiny(self) -> Case:
        """The same case with a few tokens and words, for Triton's interpreter."""
        return self.shrunk(2 * self.group_size, min(self.length, 3), 50)


def answer_lengths(case: Case, generator: torch.Generator) -> torch.Tensor:
    """Lengths [B] in 1..T, in any order: quantiles of a power law whose mean leaves the padding."""
    quantiles = (torch.arange(case.n_sequences) + 0.5) / case.n_sequences
    lengths = case.length * quantiles ** (case.padding / (1 - case.padding))
    order = torch.randperm(case.n_sequences, generator=generator)
    return lengths.round().clamp(min=1).long()[order]


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


def with_live(cases: list[Case], *shares: float) -> list[Case]:
    """The cases, and the last but one with no padding and shares of sequences without signal."""
    one = replace(cases[-2], padding=0.0, sweep="live")
    return [*cases, *[replace(one, no_signal=share) for share in shares]]


def kept(head: Head, length: int = 128, **more: Any) -> list[Case]:
    """Rows of few columns, all of them alive: as rollouts keep them, and a sweep of numbers."""
    drawn = Case(KEPT, 16, length, 8, head=head, **more)
    numbers = (1, 2, 8, 32, 128, 512)
    common = replace(drawn, common=True, sweep="common")
    return [drawn, common, *[replace(drawn, sweep="kept", kept=n) for n in numbers]]


# Under a minute on two CPU cores.
QUICK = [
    *advantages(10, 14, 18),
    *logprobs((16, 512), (64, 2048)),
    *policy(LOGITS, 8, (8, 16, 32), LAPTOP),
    Case(SCORING, 8, 16, head=LAPTOP),
    *with_live(policy(HIDDEN, 8, (16, 32), LAPTOP), 0.0, 0.5),
    kept(LAPTOP, 16)[0],
]
# Minutes on a CPU: larger batches, bfloat16, every share of silent groups, softcap.
FULL = [
    *advantages(10, 14, 18, 22),
    *logprobs((16, 512), (64, 2048), (1024, 4096)),
    *with_live(policy(LOGITS, 16, (4, 8, 16, 32), LAPTOP), 0.0, 0.25, 0.5, 0.75, 1.0),
    *policy(LOGITS, 16, (32,), LAPTOP, dtype=BF16, sweep="dtype"),
    *[Case(SCORING, 16, length, head=LAPTOP) for length in (8, 32)],
    *with_live(policy(HIDDEN, 16, (16, 32, 64, 128), LAPTOP), 0.0, 0.25, 0.5, 0.75, 1.0),
    *policy(HIDDEN, 16, (64,), CAPPED_LAPTOP, sweep="heads"),
    *kept(LAPTOP),
]
# Minutes on one H200: the heads of production models, 131k and 4M log-probs.
ON_GPU = [
    *advantages(10, 14, 18, 22),
    *logprobs((64, 2048), (1024, 4096)),
    *with_live(policy(LOGITS, 16, (128, 256, 512), QWEN2, dtype=BF16), 0.0, 0.3, 0.6, 1.0),
    *policy(LOGITS, 16, (512,), LLAMA, dtype=BF16, sweep="heads"),
    *policy(LOGITS, 16, (256,), QWEN2, sweep="dtype"),
    Case(SCORING, 16, 512, head=QWEN2, dtype=BF16),
    *with_live(policy(HIDDEN, 16, (256, 512, 1024), QWEN3, dtype=BF16), 0.0, 0.3, 0.6, 1.0),
    *policy(HIDDEN, 16, (512,), QWEN2, dtype=BF16, sweep="heads"),
    *policy(HIDDEN, 16, (512,), LLAMA, dtype=BF16, sweep="heads"),
    *policy(HIDDEN, 16, (512,), GEMMA, dtype=BF16, sweep="heads"),
    *kept(QWEN3_8B, 512, dtype=BF16),
]


def cases_of(suite: str, on_gpu: bool) -> list[Case]:
    """The cases of a suite on a GPU or a CPU."""
    return QUICK if suite == "quick" else ON_GPU if on_gpu or suite == "gpu" else FULL


class Effort(NamedTuple):
    """How long one measurement may take, in seconds, and how many samples it has."""

    seconds: float
    least: int = 5
    most: int = 50


EFFORTS = {"quick": Effort(0.1, least=3), "gpu": Effort(0.2), "full": Effort(0.3)}
