"""Groups whose advantages are known in closed form, and what the package computes of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from mapo_kernels import AdvantageSpec, LossSpec, group_advantages, mapo_loss
from mapo_kernels.study import analytic
from mapo_kernels.study.analytic import FAILED, HIGH, LOW, PAPER_GROUPS, VARIANTS

Row = dict[str, Any]

TOLERANCE = 1e-5  # absolute or relative: float32 rounding is below 1e-6
PRINTED = 0.01  # the paper prints two decimals, and cuts the third off
CORRECTIONS = (1, 0)  # the default, and the one of the paper's figures
# The z-scores that are printed there.
PRINTED_SCORES = {
    HIGH: (-1.73, 0.57, 0.57, 0.57),
    LOW: (-1.0, -1.0, 1.0, 1.0),
    FAILED: (-1.73, 0.57, 0.57, 0.57),
}


def rows(sizes: Sequence[int]) -> list[Row]:
    """Every number and what it must be.

    Args:
        sizes: numbers of answers per prompt, at least 2.

    Returns:
        Dictionaries with `kind` (binary, paper, printed or gradient), `group`, `variant`,
        `std_correction`, `quantity`, `measured`, `expected`, `tolerance` and `ok`.
    """
    found = [*_paper(), *_printed()]
    for size in sizes:
        found += [*_binary(size), *_gradients(size)]
    return found


def _row(kind: str, group: str, variant: str, correction: int, **fields: Any) -> Row:
    row: Row = {"kind": kind, "group": group, "variant": variant, "std_correction": correction}
    row |= {"tolerance": TOLERANCE} | fields
    off = abs(row["measured"] - row["expected"])
    # A NaN is not within any tolerance.
    row["ok"] = off <= row["tolerance"] * max(1.0, abs(row["expected"]))
    return row


def _measure(
    rewards: Sequence[float], variant: str, correction: int
) -> tuple[list[float], float, float]:
    """Advantages, lambda and p of one group."""
    advantages, stats = group_advantages(
        torch.tensor(rewards),
        group_size=len(rewards),
        std_correction=correction,
        return_stats=True,
        **VARIANTS[variant].settings,
    )
    return advantages.tolist(), stats.certainty.item(), stats.success_ratio.item()


def _binary(size: int) -> Iterator[Row]:
    for successes in range(size + 1):
        rewards = [1.0] * successes + [0.0] * (size - successes)
        for variant, correction in _variants():
            about = ("binary", f"{successes} of {size}", variant, correction)
            sizes: Row = {"group_size": size, "successes": successes}
            advantages, weight, ratio = _measure(rewards, variant, correction)
            known = analytic.binary(VARIANTS[variant], successes, size, correction)
            yield _row(*about, quantity="p", measured=ratio, expected=successes / size, **sizes)
            weighs = analytic.certainty(VARIANTS[variant], successes / size)
            yield _row(*about, quantity="lambda", measured=weight, expected=weighs, **sizes)
            both = {"success": advantages[:successes], "failure": advantages[successes:]}
            for (quantity, measured), expected in zip(both.items(), known, strict=True):
                if measured:
                    worst = _farthest(measured, expected)
                    yield _row(
                        *about, quantity=quantity, measured=worst, expected=expected, **sizes
                    )


def _farthest(measured: Sequence[float], expected: float) -> float:
    """Of equal rewards all advantages must be right: the one that is off, or a NaN, counts."""
    return next(
        (x for x in measured if math.isnan(x)), max(measured, key=lambda x: abs(x - expected))
    )


def _variants() -> list[tuple[str, int]]:
    return [(variant, correction) for variant in VARIANTS for correction in CORRECTIONS]


def _paper() -> Iterator[Row]:
    for group, rewards in PAPER_GROUPS.items():
        for variant, correction in _variants():
            about = ("paper", group, variant, correction)
            advantages, weight, ratio = _measure(rewards, variant, correction)
            weighs = analytic.certainty(VARIANTS[variant], ratio)
            yield _row(*about, quantity="lambda", measured=weight, expected=weighs)
            known = analytic.general(VARIANTS[variant], rewards, correction)
            for i, (measured, expected) in enumerate(zip(advantages, known, strict=True)):
                quantity = f"A_{i + 1} of r = {rewards[i]:g}"
                yield _row(*about, quantity=quantity, measured=measured, expected=expected)


def _printed() -> Iterator[Row]:
    for group, scores in PRINTED_SCORES.items():
        measured, _, _ = _measure(PAPER_GROUPS[group], "grpo", 0)
        for i, (ours, theirs) in enumerate(zip(measured, scores, strict=True)):
            fields = {"quantity": f"z_{i + 1}", "tolerance": PRINTED}
            yield _row("printed", group, "grpo", 0, measured=ours, expected=theirs, **fields)


def _gradients(size: int) -> Iterator[Row]:
    """rho(p): norms of gradients of `mapo_loss` at the log-probs, over GRPO's, rewards 0 or 1."""
    for successes in range(1, size):
        binary = torch.tensor([1.0] * successes + [0.0] * (size - successes))
        for correction in CORRECTIONS:
            base = _gradient_norm(binary, "grpo", correction)
            for variant in (name for name, x in VARIANTS.items() if x.estimator == "mapo"):
                p = successes / size
                yield _row(
                    *("gradient", f"{successes} of {size}", variant, correction),
                    quantity="rho",
                    measured=_gradient_norm(binary, variant, correction) / base,
                    expected=analytic.gradient_scale(VARIANTS[variant], p, size, correction),
                    group_size=size,
                    successes=successes,
                )


def _gradient_norm(rewards: torch.Tensor, variant: str, correction: int) -> float:
    logprobs = torch.full((len(rewards), 1), -1.0, requires_grad=True)
    spec = AdvantageSpec(std_correction=correction, **VARIANTS[variant].settings)
    output = mapo_loss(
        logprobs, rewards=rewards, group_size=len(rewards), spec=LossSpec(), advantage_spec=spec
    )
    (gradient,) = torch.autograd.grad(output.loss, logprobs)
    return gradient.norm().item()
