"""Which cases are measured: quick on any machine, gpu in minutes on one, full for all of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .shapes import GROUP_SIZES, HEADS, NO_HEAD, NO_SIGNAL, PADDING, Batch, Head

SUITES = ("quick", "gpu", "full")
MAPO, GRPO = "advantages, MAPO", "advantages, GRPO"
LOGPROBS, LOGITS, SCORING, HIDDEN = "log-probs", "logits", "scoring logits", "hidden states"
NAMES = (MAPO, GRPO, LOGPROBS, LOGITS, SCORING, HIDDEN)
STEPS = ("both", "forward", "backward")
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One level at one shape; `directions` of score, forward, backward, both; `sweep` is its plot.

    `compile` is whether providers that compile take part.
    """

    level: str
    batch: Batch
    head: Head = NO_HEAD
    dtype: torch.dtype = torch.float32
    directions: tuple[str, ...] = ("both",)
    sweep: str = "tokens"
    compile: bool = True

    @property
    def shape(self) -> str:
        """The case's name for people."""
        batch = self.batch
        size = f"{batch.n_sequences}" + (f" x {batch.length}" if batch.length > 1 else "")
        head = f", {self.head.name}" if self.head.name else ""
        return f"{size}{head}, {self.dtype_name}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def tiny(self) -> Case:
        """The same case with a few tokens and words, for Triton's interpreter."""
        head = self.head if self.head is NO_HEAD else replace(self.head, width=16, vocab=50)
        return replace(self, batch=self.batch.tiny(), head=head)


@dataclass(frozen=True)
class Effort:
    """How long one measurement may take, in seconds, and how many samples it has."""

    seconds: float = 0.3
    least: int = 5
    most: int = 50


def advantages(powers: tuple[int, ...]) -> list[Case]:
    return [
        Case(level, Batch(1 << power, 1), directions=("score",))
        for level in (MAPO, GRPO)
        for power in powers
    ]


def logprobs(*sizes: tuple[int, int]) -> list[Case]:
    batches = [Batch(*size, padding=0.5, no_signal=0.3) for size in sizes]
    return [Case(LOGPROBS, batch, directions=STEPS) for batch in batches]


def policy(level: str, n: int, lengths: tuple[int, ...], head: str, **more) -> list[Case]:
    """Micro-batches of `n` sequences, half padding, a third without signal."""
    return [Case(level, Batch(n, t, 8, 0.5, 0.3), HEADS[head], **more) for t in lengths]


def in_steps(cases: list[Case]) -> list[Case]:
    """The last case forward and backward too."""
    return [*cases[:-1], replace(cases[-1], directions=STEPS)]


def live(case: Case, shares: tuple[float, ...]) -> list[Case]:
    """The case with every position in the mask and shares of its sequences without signal."""
    batches = [replace(case.batch, padding=0.0, no_signal=share) for share in shares]
    return [replace(case, batch=batch, directions=("both",), sweep="live") for batch in batches]


def quick_cases() -> list[Case]:
    """Under a minute on two CPU cores; compiling would take longer than all of them."""
    hidden = policy(HIDDEN, 8, (16, 32), "laptop")
    cases = [
        *advantages((10, 14, 18)),
        *logprobs((16, 512), (64, 2048)),
        *policy(LOGITS, 8, (8, 16, 32), "laptop"),
        Case(SCORING, Batch(8, 16), HEADS["laptop"], directions=("score",)),
        *hidden,
        *live(hidden[0], (0.0, 0.5)),
    ]
    return [replace(case, compile=False) for case in cases]


def cpu_cases() -> list[Case]:
    """Minutes on a CPU: larger batches, bfloat16, every share of silent groups, softcap."""
    logits = policy(LOGITS, 16, (4, 8, 16, 32), "laptop")
    hidden = policy(HIDDEN, 16, (16, 32, 64, 128), "laptop")
    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    scoring = [Case(SCORING, Batch(16, t), HEADS["laptop"]) for t in (8, 32)]
    return [
        *advantages((10, 14, 18, 22)),
        *logprobs((16, 512), (64, 2048), (1024, 4096)),
        *in_steps(logits),
        replace(logits[-1], dtype=BF16, sweep="dtype"),
        *live(logits[-2], shares),
        *[replace(case, directions=("score",)) for case in scoring],
        *in_steps(hidden),
        *live(hidden[-2], shares),
        *policy(HIDDEN, 16, (64,), "laptop with softcap", sweep="heads"),
    ]


def gpu_cases() -> list[Case]:
    """Minutes on one H200: the heads of production models, 131k and 4M log-probs."""
    logits = policy(LOGITS, 16, (128, 256, 512), "Qwen2.5-7B", dtype=BF16)
    hidden = policy(HIDDEN, 16, (256, 512, 1024), "Qwen3-0.6B", dtype=BF16)
    shares = (0.0, 0.3, 0.6, 1.0)
    heads = {"dtype": BF16, "sweep": "heads"}
    return [
        *advantages((10, 14, 18, 22)),
        *logprobs((64, 2048), (1024, 4096)),
        *in_steps(logits),
        *live(logits[-1], shares),
        *policy(LOGITS, 16, (512,), "Llama-3-8B", **heads),
        *policy(LOGITS, 16, (256,), "Qwen2.5-7B", sweep="dtype"),
        Case(SCORING, Batch(16, 512), HEADS["Qwen2.5-7B"], BF16, directions=("score",)),
        *in_steps(hidden),
        *live(hidden[-2], shares),
        *policy(HIDDEN, 16, (512,), "Qwen2.5-7B", **heads),
        *policy(HIDDEN, 16, (512,), "Llama-3-8B", **heads),
        *policy(HIDDEN, 16, (512,), "Gemma-2-9B", **heads),
    ]


def full_gpu_cases() -> list[Case]:
    """All of `gpu_cases`, and every group size, padding and share of silent groups."""
    batches = [
        Batch(48, 256, size, padding, share)
        for size in GROUP_SIZES
        for padding in PADDING
        for share in NO_SIGNAL
    ]
    return [
        *gpu_cases(),
        *logprobs(*[(1 << power, 2048) for power in (5, 7, 9, 11)]),
        *[Case(LOGITS, b, HEADS["Qwen2.5-7B"], BF16, sweep="batches") for b in batches],
        *[Case(HIDDEN, b, HEADS["Qwen3-0.6B"], BF16, sweep="batches") for b in batches],
    ]


def cases_of(suite: str, device: torch.device) -> tuple[list[Case], Effort]:
    """The cases of a suite on a device, and how long each measurement may take."""
    if suite == "quick":
        return quick_cases(), Effort(0.1, least=3)
    if suite == "gpu":
        return gpu_cases(), Effort(0.2)
    return (full_gpu_cases() if device.type == "cuda" else cpu_cases()), Effort(0.3)
