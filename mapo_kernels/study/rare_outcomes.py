"""Rare successes and rare failures: how much signal there is, and what is made of the first one.

The policy is a softmax over a few answers, one of which is right, so that its success probability
is exact. Advantages, losses, gradients and metrics are the package's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from mapo_kernels import AdvantageSpec, LossSpec, group_advantages, mapo_loss_from_logits
from mapo_kernels.study import analytic
from mapo_kernels.study.analytic import VARIANTS

Row = dict[str, Any]

PROBABILITIES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.25, 0.5, 0.75, 0.9, 0.97, 0.99, 0.997, 0.999)
ANSWERS = 32  # of the policy; answer 0 is the right one
RATES = {"sgd": 1.0, "adam": 0.1}  # learning rates of the one update
CLIP = LossSpec(eps_low=0.2, eps_high=0.28)  # DAPO's clip-higher, as in the demo
CONFIDENCE = 0.95
SAME = 1e-6  # advantages that differ by less are the same
# What may be set against huge advantages, as keywords of `AdvantageSpec`.
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "max_abs = 5": {"max_abs": 5.0},
    "difficulty = focal": {"difficulty": "focal"},
    "difficulty = power": {"difficulty": "power"},
}


def signal(sizes: Sequence[int], steps: int, groups: int, seed: int) -> Iterator[Row]:
    """The share of groups and of steps with a gradient, over the probability of a success.

    Args:
        sizes: answers per prompt.
        steps: simulated for each probability.
        groups: in a step.
        seed: of the draws.
    """
    for size in sizes:
        for p in PROBABILITIES:
            generator = torch.Generator().manual_seed(seed)
            shape = (steps, groups, size)
            rewards = (torch.rand(shape, generator=generator, dtype=torch.float64) < p).float()
            found, weights = {}, {}
            for variant in VARIANTS:
                advantages, stats = _advantages(rewards, variant)
                live = (advantages != 0).any(dim=2)  # [steps, groups]
                found[variant] = live
                weights[variant] = stats.certainty.view_as(live)[live].double().mean().item()
            live = found["grpo"]
            known = analytic.signal_share(p, size)
            yield {
                "group_size": size,
                "p": p,
                "groups": _share(live, known),
                "steps": _share(live.any(dim=1), 1 - (1 - known) ** groups),
                # Which groups have a gradient must not depend on the estimator.
                "same_for_all": all(torch.equal(live, x) for x in found.values()),
                "lambda": {
                    x: [
                        None if math.isnan(weights[x]) else weights[x],
                        analytic.mean_weight(VARIANTS[x], p, size),
                    ]
                    for x in VARIANTS
                    if VARIANTS[x].estimator == "mapo"
                },
            }


def _advantages(rewards: Tensor, variant: str, **options: Any) -> tuple[Tensor, Any]:
    """Advantages in the shape of the rewards [..., group size], and statistics."""
    advantages, stats = group_advantages(
        rewards.flatten(),
        group_size=rewards.shape[-1],
        return_stats=True,
        **VARIANTS[variant].settings,
        **options,
    )
    return advantages.view_as(rewards), stats


def _share(found: Tensor, expected: float) -> Row:
    """A share with its Wilson interval, beside the analytic one."""
    n, k = found.numel(), int(found.sum())
    z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    middle = (k + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    low, high = middle - half, middle + half
    return {"simulated": k / n, "interval": [low, high], "expected": expected, "count": n}


def first_success(sizes: Sequence[int]) -> Iterator[Row]:
    """One success among failures: its advantage, the gradient, and one update of the policy.

    The policy gave the right answer the probability 1 / G; the failures are spread evenly over the
    other answers. Clipping is that of a second update on the same answers.
    """
    for size in sizes:
        ids = torch.tensor([0] + [1 + i % (ANSWERS - 1) for i in range(size - 1)])
        rewards = (ids == 0).float()
        start = torch.full((ANSWERS,), (1 - 1 / size) / (ANSWERS - 1)).log()
        start[0] = math.log(1 / size)
        for variant in VARIANTS:
            advantages, _ = _advantages(rewards, variant)
            known = analytic.binary(VARIANTS[variant], 1, size, 1)
            gradient, _ = _gradient(start, ids, rewards, variant, start)
            row: Row = {
                "group_size": size,
                "variant": variant,
                "success": [advantages[0].item(), known[0]],
                "failure": [advantages[1].item(), known[1]],
                "gradient_norm": gradient.norm().item(),
                "p_before": 1 / size,
            }
            for optimizer, rate in RATES.items():
                moved = _one_update(start, gradient, optimizer, rate)
                _, metrics = _gradient(moved, ids, rewards, variant, start)
                row[optimizer] = {
                    "p_after": moved.softmax(0)[0].item(),
                    "update_norm": (moved - start).norm().item(),
                    "clip_fraction": metrics["clip_fraction_low"].item()
                    + metrics["clip_fraction_high"].item(),
                    "kl": (start.exp() * (start - moved.log_softmax(0))).sum().item(),
                }
            yield row


def _gradient(
    logits: Tensor, ids: Tensor, rewards: Tensor, variant: str, old: Tensor
) -> tuple[Tensor, Any]:
    """The loss's gradient at the policy's logits [answers], and the loss's metrics."""
    leaf = logits.clone().requires_grad_()
    output = mapo_loss_from_logits(
        leaf.expand(len(ids), 1, ANSWERS),
        ids[:, None],
        rewards=rewards,
        group_size=len(ids),
        old_logprobs=old.log_softmax(0)[ids][:, None],
        spec=CLIP,
        advantage_spec=AdvantageSpec(**VARIANTS[variant].settings),
    )
    output.loss.backward()
    assert leaf.grad is not None
    return leaf.grad, output.metrics


def _one_update(start: Tensor, gradient: Tensor, optimizer: str, rate: float) -> Tensor:
    leaf = start.clone().requires_grad_()
    leaf.grad = gradient.clone()
    known = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    known[optimizer]([leaf], lr=rate).step()  # type: ignore[operator]
    return leaf.detach()


def reductions(size: int) -> Iterator[Row]:
    """Where MAPO is a single function: the largest difference of the advantages from it."""
    half = torch.tensor([1.0] * (size // 2) + [0.0] * (size - size // 2))
    graded = torch.linspace(0, 0.9, size)  # partial credit, none of it a success
    shaped = torch.linspace(0.5, 1.0, size)
    every = torch.ones(size, dtype=torch.bool)
    one, most = (torch.tensor([1.0] * n + [0.0] * (size - n)) for n in (1, size - 1))
    cases: list[tuple[str, str, str, Tensor, dict[str, Any]]] = [
        ("no reward reaches the threshold (partial credit)", "mapo", "apd", graded, {}),
        ("every answer is right by success=, rewards differ", "mapo", "apd", shaped)
        + ({"success": every},),
        ("none is right by success=, rewards differ", "mapo", "apd", shaped, {"success": ~every}),
        ("half of the answers are right", "mapo", "grpo", half, {}),
        ("one is right, lambda is a step", "mapo-step", "apd", one, {}),
        ("half are right, lambda is a step", "mapo-step", "grpo", half, {}),
        ("one is right", "mapo", "apd", one, {}),
        ("all but one are right", "mapo", "apd", most, {}),
        ("all are right", "mapo", "grpo", torch.ones(size), {}),
        ("none is right, rewards 0", "mapo", "grpo", torch.zeros(size), {}),
    ]
    for case, variant, single, rewards, given in cases:
        ours, stats = _advantages(rewards, variant, **given)
        theirs, _ = _advantages(rewards, single, **given)
        gap = (ours - theirs).abs().max().item()
        yield {
            "case": case,
            "variant": variant,
            "single": single,
            "lambda": stats.certainty.item(),
            "difference": gap,
            "same": gap <= SAME,
            "any_signal": bool((ours != 0).any()),
        }


def options(sizes: Sequence[int]) -> Iterator[Row]:
    """What the options make of the first success, and of one 0.1 of format credit."""
    for size in sizes:
        success, credit = torch.zeros(size), torch.zeros(size)
        success[0], credit[0] = 1.0, 0.1
        for option, settings in OPTIONS.items():
            for variant in ("mapo", "grpo"):
                yield {
                    "group_size": size,
                    "variant": variant,
                    "option": option,
                    "success": _advantages(success, variant, **settings)[0][0].item(),
                    "credit": _advantages(credit, variant, **settings)[0][0].item(),
                }


def shaped_rewards(size: int) -> Iterator[Row]:
    """Right answers that lose up to 0.3 by their length: with the threshold, and with success=.

    None reaches 1, the default threshold, though all but one quarter are right.
    """
    n_right = size - size // 4
    right = torch.arange(size) < n_right
    rewards = torch.where(right, 0.95 - 0.25 * torch.arange(size) / size, 0.0)
    ways: dict[str, dict[str, Any]] = {
        "success_threshold = 1 (default)": {},
        "success_threshold = 0.7": {"success_threshold": 0.7},
        "success = correct": {"success": right},
    }
    for way, given in ways.items():
        advantages, stats = _advantages(rewards, "mapo", **given)
        yield {
            "way": way,
            "group_size": size,
            "right": n_right,
            "p": stats.success_ratio.item(),
            "lambda": stats.certainty.item(),
            "best": advantages.max().item(),
            "worst": advantages.min().item(),
        }
