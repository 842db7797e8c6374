"""What group advantages should be, from `reference/` in float64, and how exactly they can."""

import math
from dataclasses import dataclass, fields, replace

import torch
from cases import Groups
from hypothesis import assume
from torch import Tensor

import reference

STATS = tuple(f.name for f in fields(reference.GroupStats))
_LARGE = 1e100
_SETTINGS = (
    "estimator",
    "certainty",
    "std_correction",
    "apd",
    "difficulty",
    "difficulty_exponent",
    "pass_at_k",
)


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


def weights(groups: Groups) -> Tensor:
    """What each row's advantage is multiplied by, [B], 1 where nothing is given."""
    given = groups.arguments.get("group_weight")
    if given is None:
        return torch.ones(len(groups.ids), dtype=torch.float64)
    if len(given) == len(groups.ids):
        return given.double()
    names = sorted(set(groups.ids.tolist()))
    return torch.stack([given[names.index(i)] for i in groups.ids.tolist()]).double()


def exact_advantages(groups: Groups, dtype: torch.dtype) -> ExactAdvantages:
    """Advantages and statistics of rewards that are first rounded to `dtype`."""
    if groups.spec.normalizes_first:
        return _of_each_reward(groups, dtype)
    if groups.rewards.dim() == 2:
        groups = _summed(groups, dtype)
    spec, r = groups.spec, groups.rewards.to(dtype).double()
    succeeded = successes(groups)
    in_units = spec.estimator in ("mean", "rloo")
    batch_std, size_of_all = _batch_std(r, spec.std_correction)
    w, weighs_nothing = weights(groups), []
    A, scale, table, sizes = torch.zeros_like(r), torch.zeros_like(r), [], []
    for i in groups.ids.unique():
        rows = groups.ids == i
        finite = rows & r.isfinite()
        sizes.append(float(r[finite].abs().max()) if finite.any() else 0.0)
        # Squares of the largest float64 numbers are none: a power of 2 is taken out, of eps too.
        unit = 2.0 ** (math.frexp(sizes[-1])[1] - 1) if sizes[-1] > _LARGE else 1.0
        if spec.pass_at_k is not None:
            unit, sizes[-1] = 1.0, 1.0
        settings = {k: getattr(spec, k) for k in _SETTINGS} | {"eps": spec.eps / unit}
        # A divisor of 1 is 1 / unit here.
        divisor = {"scale": spec.scale, "batch_std": batch_std * (size_of_all / unit)}
        if unit != 1 and spec.scale == "none" and not in_units:
            divisor = {"scale": "batch", "batch_std": (1 - spec.eps) / unit}
        own, stats = reference.group_advantages(
            r[rows] / unit,
            groups.ids[rows],
            success=succeeded[rows],
            group_weight=w[rows],
            **settings,
            **divisor,
        )
        A[rows] = own * unit if in_units else own
        if spec.pass_at_k is not None:
            # Nothing cancels.
            own_scale = 4 * spec.pass_at_k * float(own.abs().max())
        else:
            own_scale = _scale(r[finite] / unit, spec, unit, dtype, batch_std, size_of_all)
        scale[finite] = own_scale * (unit if in_units else 1.0)
        (found,) = stats.values()
        told = (found.success_ratio, spec.difficulty, spec.difficulty_exponent)
        weight = reference.advantages.difficulty_weight(*told)
        # A power of a ratio carries the rounding of its logarithm.
        scale[finite] *= weight * (1 + 4 * abs(spec.difficulty_exponent))
        weighs_nothing.append(weight == 0 or _has_no_signal(r[finite], succeeded[finite], spec))
        found = replace(found, mean=found.mean * unit, std=found.std * unit)
        table.append([getattr(found, name) for name in STATS])
    scale = scale * w.abs()
    A = A if spec.max_abs is None else A.clamp(-spec.max_abs, spec.max_abs)
    stats = dict(zip(STATS, torch.tensor(table, dtype=torch.float64).T, strict=True))
    size, ones = torch.tensor(sizes, dtype=torch.float64), torch.ones(len(sizes)).double()
    without_signal = sum(weighs_nothing)
    stats_scale = {"mean": size, "std": size, "success_ratio": ones, "certainty": 4 * ones}
    return ExactAdvantages(A, scale, stats, stats_scale, _metrics(stats, without_signal))


def _has_no_signal(r: Tensor, succeeded: Tensor, spec) -> bool:
    """Whether a group's finite rewards r [G] are all equal, or those of all its k-subsets."""
    if len(r) < 2:
        return True
    if spec.pass_at_k is None:
        return float(r.max()) == float(r.min())
    return not succeeded.any() or int((~succeeded).sum()) < spec.pass_at_k


def _summed(groups: Groups, dtype: torch.dtype) -> Groups:
    """The same with one reward a row, the weighted sum: the largest of `dtype` where it is more."""
    spec = groups.spec
    total = reference.objectives.weighted_sum(groups.rewards, spec.reward_weights)
    told = dict(groups.arguments)
    if "success" not in told:
        is_real = groups.rewards.is_floating_point()
        own = total.to(groups.rewards.dtype) if is_real else total
        told["success"] = successes(replace(groups, rewards=own))
    limit = torch.finfo(dtype).max
    spec = replace(spec, reward_weights=None)
    return replace(groups, rewards=total.clamp(-limit, limit), arguments=told, spec=spec)


def _of_each_reward(groups: Groups, dtype: torch.dtype) -> ExactAdvantages:
    """What the rewards come to where each has advantages of its own, whose sum is divided."""
    if groups.rewards.dim() == 1:
        groups = replace(groups, rewards=groups.rewards[:, None])
    spec, rewards = groups.spec, groups.rewards
    weighted = spec.reward_weights or (1.0,) * rewards.shape[1]
    whole = _summed(groups, dtype)
    alone = replace(whole.spec, multi_objective_aggregation="sum_then_normalize", max_abs=None)
    told = {k: v for k, v in whole.arguments.items() if k != "group_weight"}
    whole = replace(whole, spec=alone, arguments=told)
    total = exact_advantages(whole, dtype)
    present = whole.rewards.isfinite()
    S, size = torch.zeros(len(present)).double(), torch.zeros(len(present)).double()
    for k, weight in enumerate(weighted):
        if weight != 0:
            own = torch.where(present, rewards[:, k].double(), math.nan)
            part = exact_advantages(replace(whole, rewards=own), dtype)
            S, size = S + weight * part.advantages, size + abs(weight) * part.scale
    std, c = 0.0, spec.std_correction
    if int(present.sum()) > c:
        std = float(reference.advantages.standard_deviation(S[present], c))
    without_signal = 0
    for i in groups.ids.unique():
        own, most = S[groups.ids == i].abs().max(), size[groups.ids == i].max()
        # Whether advantages cancel exactly is decided by rounding.
        assume(most == 0 or own > 1e-4 * most)
        without_signal += int(most == 0)
    A = S / (std + spec.eps)
    scale = (size + A.abs() * size.max()) / (std + spec.eps)
    A, scale = A * weights(groups), scale * weights(groups).abs()
    A = A if spec.max_abs is None else A.clamp(-spec.max_abs, spec.max_abs)
    metrics = _metrics(total.stats, without_signal)
    return ExactAdvantages(A, scale, total.stats, total.stats_scale, metrics)


def _batch_std(r: Tensor, correction: int) -> tuple[float, float]:
    """The deviation of all finite rewards in units of the largest, and that unit."""
    finite = r[r.isfinite()]
    size = float(finite.abs().max()) if len(finite) else 0.0
    if len(finite) <= correction or size == 0.0:
        return 0.0, 1.0
    return float(reference.advantages.standard_deviation(finite / size, correction)), size


def _scale(
    r: Tensor, spec, unit: float, dtype: torch.dtype, batch_std: float, size_of_all: float
) -> float:
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
    if spec.scale == "batch":
        std = batch_std * (size_of_all / unit)
    elif spec.scale == "none":
        std = 1 / unit - eps
    steep = math.inf if std + eps == 0 else reach / (std + eps)
    cancels = {"group": steep, "batch": 1 / max(batch_std, 1e-300), "none": 0.0}[spec.scale]
    z = steep * (1 + cancels * (dtype == torch.float64))
    D = mu if spec.apd == "paper" else max(abs(mu), float((r - mu).abs().max()) / (G - 1))
    apd = math.inf if D + eps == 0 else reach / abs(D + eps) * (1 + size / abs(D + eps))
    return {"grpo": z, "apd": apd}.get(spec.estimator, 2 * z + 4 * apd)


def _metrics(stats: dict[str, Tensor], without_signal: int) -> dict[str, Tensor]:
    """The metrics about groups of a loss call; means are over groups with a finite reward."""
    active = stats["size"] > 0
    return {
        "success_ratio_mean": stats["success_ratio"][active].mean(),
        "lambda_mean": stats["certainty"][active].mean(),
        "zero_advantage_groups": torch.tensor(float(without_signal), dtype=torch.float64),
        "nonfinite_rewards": stats["nonfinite"].sum(),
        "active_groups": active.sum().double(),
    }
