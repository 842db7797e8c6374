"""What group advantages should be, from `reference/` in float64, and how exactly they can."""

import math
from dataclasses import dataclass, fields

import torch
from cases import Groups
from torch import Tensor

import reference

STATS = tuple(f.name for f in fields(reference.GroupStats))
_LARGE = 1e100


@dataclass
class ExactAdvantages:
    """Float64 results and the sizes that rounding errors are relative to.

    Attributes:
        advantages: [B].
        scale: [B], of the advantages.
        stats: [Q] by name, groups by ascending id.
        stats_scale: [Q] by name.
        metrics: about the groups, as a loss call returns them.
    """

    advantages: Tensor
    scale: Tensor
    stats: dict[str, Tensor]
    stats_scale: dict[str, Tensor]
    metrics: dict[str, Tensor]


def statistics_dtype(rewards: Tensor, dtype: torch.dtype | None = None) -> torch.dtype:
    """Of a group's statistics in a loss whose input has `dtype`, or in `group_advantages`."""
    wide = rewards.dtype == torch.float64 and dtype in (None, torch.float64)
    return torch.float64 if wide else torch.float32


def successes(groups: Groups) -> Tensor:
    """Which rows succeeded, [B]: decided before a reward is rounded."""
    if "success" in groups.arguments:
        return groups.arguments["success"]
    rewards, threshold = groups.rewards, groups.spec.success_threshold
    if rewards.is_floating_point():
        return rewards >= torch.tensor(threshold, dtype=rewards.dtype)
    return rewards.double() >= threshold


def exact_advantages(groups: Groups, dtype: torch.dtype) -> ExactAdvantages:
    """Advantages and statistics of rewards that are first rounded to `dtype`."""
    spec, r = groups.spec, groups.rewards.to(dtype).double()
    finite = r.isfinite()
    # Squares of the largest float64 numbers are none: a power of 2 is taken out, of eps as well.
    largest = float(r[finite].abs().max()) if finite.any() else 0.0
    unit = 2.0 ** (math.frexp(largest)[1]) if largest > _LARGE else 1.0
    settings = {k: getattr(spec, k) for k in spec.__dataclass_fields__ if k != "success_threshold"}
    in_units = spec.estimator in ("mean", "rloo")
    settings |= {"eps": spec.eps / unit, "max_abs": None}
    A, by_id = reference.group_advantages(
        r / unit, groups.ids, success=successes(groups), **settings
    )
    A = A * unit if in_units else A
    A = A if spec.max_abs is None else A.clamp(-spec.max_abs, spec.max_abs)
    table = [[getattr(by_id[i], name) for name in STATS] for i in sorted(by_id)]
    stats = dict(zip(STATS, torch.tensor(table, dtype=torch.float64).T, strict=True))
    scale, size = torch.zeros_like(r), torch.zeros(len(by_id), dtype=torch.float64)
    for k, i in enumerate(sorted(by_id)):
        rows = (groups.ids == i) & finite
        if rows.any():
            scale[rows] = _scale(r[rows] / unit, spec, unit, dtype) * (unit if in_units else 1.0)
            size[k] = r[rows].abs().max()
    stats["mean"], stats["std"] = stats["mean"] * unit, stats["std"] * unit
    ones = torch.ones_like(size)
    stats_scale = {"mean": size, "std": size, "success_ratio": ones, "certainty": 4 * ones}
    return ExactAdvantages(A, scale, stats, stats_scale, _metrics(groups, r, stats))


def _scale(r: Tensor, spec, unit: float, dtype: torch.dtype) -> float:
    """What the rounding errors of a group's advantages are relative to, from its rewards r."""
    if len(r) < 2:
        return 0.0
    size, reach = float(r.abs().max()), float(r.max() - r.min())
    # Deviations are those from the lowest reward, of which nothing cancels; the reference takes
    # them from the mean, in float64.
    reach = size if dtype == torch.float64 else reach + 1e-8 * size
    if spec.estimator in ("mean", "rloo"):
        return reach * len(r)
    eps, G, mu = spec.eps / unit, len(r), float(r.mean())
    std = float(reference.advantages.standard_deviation(r, spec.std_correction))
    z = reach / (std + eps) * (1 + reach / (std + eps) * (dtype == torch.float64))
    D = mu if spec.apd == "paper" else max(abs(mu), float((r - mu).abs().max()) / (G - 1))
    apd = math.inf if D + eps == 0 else reach / abs(D + eps) * (1 + size / abs(D + eps))
    return {"grpo": z, "apd": apd}.get(spec.estimator, 2 * z + 4 * apd)


def _metrics(groups: Groups, r: Tensor, stats: dict[str, Tensor]) -> dict[str, Tensor]:
    """The metrics about groups of a loss call; means are over groups with a finite reward."""
    active = stats["size"] > 0
    without_signal = 0
    for i in groups.ids.unique():
        own = r[(groups.ids == i) & r.isfinite()]
        without_signal += len(own) < 2 or float(own.max()) == float(own.min())
    return {
        "success_ratio_mean": stats["success_ratio"][active].mean(),
        "lambda_mean": stats["certainty"][active].mean(),
        "zero_advantage_groups": torch.tensor(float(without_signal), dtype=torch.float64),
        "nonfinite_rewards": stats["nonfinite"].sum(),
        "active_groups": active.sum().double(),
    }
