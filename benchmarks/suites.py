"""Which cases a suite has: quick on any machine, gpu in minutes on one, full for all of them."""

from __future__ import annotations

from dataclasses import replace

import torch

from .case import Case
from .harness import Effort
from .shapes import GROUP_SIZES, HEADS, NO_SIGNAL, PADDING, Batch

SUITES = ("quick", "gpu", "full")
STEP = ("forward", "backward", "both")
MAPO, GRPO = "advantages, MAPO", "advantages, GRPO"
BF16 = torch.bfloat16


def _advantages(powers: tuple[int, ...]) -> list[Case]:
    return [
        Case(level, Batch(1 << power, 1), directions=("score",))
        for level in (MAPO, GRPO)
        for power in powers
    ]


def _logprobs(shapes: tuple[tuple[int, int], ...]) -> list[Case]:
    batches = [Batch(*shape, padding=0.5, no_signal=0.3) for shape in shapes]
    return [
        Case("log-probs", batch, directions=("both", "forward", "backward")) for batch in batches
    ]


def _live(case: Case, shares: tuple[float, ...]) -> list[Case]:
    """The case with every position in the mask and shares of its sequences without signal."""
    return [
        replace(
            case,
            batch=replace(case.batch, padding=0.0, no_signal=share),
            directions=("both",),
            sweep="live",
        )
        for share in shares
    ]


def _heads(level: str, batch: Batch, names: tuple[str, ...]) -> list[Case]:
    return [Case(level, batch, HEADS[name], BF16, sweep="heads") for name in names]


def quick_cases() -> list[Case]:
    """Under a minute on two CPU cores."""
    head = HEADS["laptop"]
    logits = [Case("logits", Batch(8, t, 8, 0.5, 0.3), head, sweep="tokens") for t in (8, 16, 32)]
    hidden = [Case("hidden states", Batch(8, t, 8, 0.5, 0.3), head) for t in (16, 32)]
    return [
        *_advantages((10, 14, 18)),
        *_logprobs(((16, 512), (64, 2048))),
        *logits,
        Case("scoring logits", Batch(8, 16), head, directions=("score",)),
        *hidden,
        *_live(hidden[0], (0.0, 0.5)),
    ]


def cpu_cases() -> list[Case]:
    """Minutes on a CPU: larger batches, bfloat16, every share of silent groups, softcap."""
    head = HEADS["laptop"]
    logits = [Case("logits", Batch(16, t, 8, 0.5, 0.3), head) for t in (4, 8, 16, 32)]
    hidden = [Case("hidden states", Batch(16, t, 8, 0.5, 0.3), head) for t in (16, 32, 64, 128)]
    logits[-1] = replace(logits[-1], directions=("both", "forward", "backward"))
    hidden[-1] = replace(hidden[-1], directions=("both", "forward", "backward"))
    return [
        *_advantages((10, 14, 18, 22)),
        *_logprobs(((16, 512), (64, 2048), (1024, 4096))),
        *logits,
        replace(logits[-1], dtype=BF16, sweep="dtype", directions=("both",)),
        *_live(logits[-2], (0.0, 0.25, 0.5, 0.75, 1.0)),
        *[Case("scoring logits", Batch(16, t), head, directions=("score",)) for t in (8, 32)],
        *hidden,
        *_live(hidden[-2], (0.0, 0.25, 0.5, 0.75, 1.0)),
        Case("hidden states", hidden[-2].batch, HEADS["laptop with softcap"], sweep="heads"),
    ]


def gpu_cases() -> list[Case]:
    """Minutes on one H200: the heads of production models, 131k and 4M log-probs."""
    qwen, small = HEADS["Qwen2.5-7B"], HEADS["Qwen3-0.6B"]
    batch = Batch(16, 1024, 8, 0.5, 0.3)
    logits = [Case("logits", replace(batch, length=t), qwen, BF16) for t in (128, 256, 512)]
    logits[-1] = replace(logits[-1], directions=("both", "forward", "backward"))
    hidden = [
        Case("hidden states", replace(batch, length=t), small, BF16) for t in (256, 512, 1024)
    ]
    hidden[-1] = replace(hidden[-1], directions=("both", "forward", "backward"))
    return [
        *_advantages((10, 14, 18, 22)),
        *_logprobs(((64, 2048), (1024, 4096))),
        *logits,
        *_live(logits[-1], (0.0, 0.3, 0.6, 1.0)),
        *_heads("logits", replace(batch, length=512), ("Llama-3-8B",)),
        Case("logits", Batch(16, 256, 8, 0.5, 0.3), qwen, torch.float32, sweep="dtype"),
        Case("scoring logits", Batch(16, 512), qwen, BF16, directions=("score",)),
        *hidden,
        *_live(hidden[-2], (0.0, 0.3, 0.6, 1.0)),
        *_heads("hidden states", replace(batch, length=512), ("Qwen2.5-7B", "Llama-3-8B")),
        *_heads("hidden states", replace(batch, length=512), ("Gemma-2-9B",)),
    ]


def full_gpu_cases() -> list[Case]:
    """All of `gpu_cases`, and every group size, padding and share of silent groups."""
    base = Batch(48, 256, 8, 0.5, 0.3)
    batches = [
        replace(base, group_size=size, padding=padding, no_signal=share)
        for size in GROUP_SIZES
        for padding in PADDING
        for share in NO_SIGNAL
    ]
    return [
        *gpu_cases(),
        *_logprobs(tuple((1 << k, 2048) for k in (5, 7, 9, 11))),
        *[Case("logits", b, HEADS["Qwen2.5-7B"], BF16, sweep="batches") for b in batches],
        *[Case("hidden states", b, HEADS["Qwen3-0.6B"], BF16, sweep="batches") for b in batches],
    ]


def cases_of(suite: str, device: torch.device) -> tuple[list[Case], Effort]:
    """The cases of a suite on a device, and how long each measurement may take."""
    if suite == "quick":
        found = quick_cases()
        # Compiling takes longer than all of them.
        found = [replace(case, compile=False) for case in found]
        return found, Effort(0.1, least=3, warmup=1)
    if suite == "gpu":
        return gpu_cases(), Effort(0.2)
    return (full_gpu_cases() if device.type == "cuda" else cpu_cases()), Effort(0.3)
