"""SPEC section 1, line by line: its formulas, its table of what the paper leaves open, figures.

Every line of the table is checked where groups are contiguous, where ids tell them in any order,
and in a loss.
"""

import math

import pytest
import torch

import mapo_kernels as mk
from mapo_kernels.spec import ESTIMATORS

NAN, INF = math.nan, math.inf


class Line:
    """A line of SPEC: rewards, and the advantage that each of them becomes.

    `settings` are those of `AdvantageSpec`; `groups` the group of each reward, one for all if None;
    `success` which rows succeeded, where it is told; `within` is relative to the largest advantage.
    """

    def __init__(self, says, rewards, expected, groups=None, success=None, within=2e-6, **settings):
        self.says, self.settings, self.within = says, settings, within
        self.rewards = torch.tensor(rewards, dtype=torch.float32)
        self.expected = torch.tensor(expected, dtype=torch.float64)
        self.ids = torch.tensor(groups or [0] * len(rewards))
        self.success = None if success is None else torch.tensor(success)

    def __repr__(self):
        return self.says


def z_scores(r, c=1, eps=1e-6):
    mu = sum(r) / len(r)
    sigma = math.sqrt(sum((x - mu) ** 2 for x in r) / (len(r) - c))
    return [(x - mu) / (sigma + eps) for x in r]


def deviations(r, over=1.0):
    mu = sum(r) / len(r)
    return [(x - mu) / over for x in r]


def mixed(r, p, lam=None):
    """Advantages of non-negative rewards, whose D is their mean, at success ratio p."""
    lam = 1 - 4 * p * (1 - p) if lam is None else lam
    apd = deviations(r, sum(r) / len(r) + 1e-6)
    return [(1 - lam) * a + lam * b for a, b in zip(z_scores(r), apd, strict=True)]


def one_success(size):
    return [1.0] + [0.0] * (size - 1)


def entropy_in_bits(p):
    return -sum(q * math.log2(q) for q in (p, 1 - p))


SHAPED, NEGATIVE = [0.2, 1.0, 0.7, 0.0, 1.0], [-1.0, -2.0, -3.0, -6.0]
PAIR, TRIPLE, FOUR = mixed([1, 0], 0.5), mixed([1, 0, 0], 1 / 3), mixed([1, 0, 0, 0], 0.25)

FORMULAS = [
    Line("z = (r - mu) / (sigma + eps)", SHAPED, z_scores(SHAPED), estimator="grpo"),
    Line("c = 0", SHAPED, z_scores(SHAPED, c=0), estimator="grpo", std_correction=0),
    Line("eps", SHAPED, z_scores(SHAPED, eps=0.1), estimator="grpo", eps=0.1),
    Line("apd = (r - mu) / (D + eps)", SHAPED, deviations(SHAPED, 0.580001), estimator="apd"),
    Line("A = (1 - lambda) z + lambda apd", SHAPED, mixed(SHAPED, 0.4)),
    Line("success is r >= success_threshold", SHAPED, mixed(SHAPED, 0.6), success_threshold=0.7),
    Line("explicit success", SHAPED, mixed(SHAPED, 0.2), success=[True] + [False] * 4),
    Line("mean: r - mu", SHAPED, deviations(SHAPED), estimator="mean"),
    Line("rloo: (r - mu) G / (G - 1)", SHAPED, deviations(SHAPED, 4 / 5), estimator="rloo"),
    Line("linear |2p - 1|", SHAPED, mixed(SHAPED, 0.4, 0.2), certainty="linear"),
    Line("1 - H2(p)", SHAPED, mixed(SHAPED, 0.4, 1 - entropy_in_bits(0.4)), certainty="entropy"),
    Line("step: 0 between 0.25 and 0.75", SHAPED, z_scores(SHAPED), certainty="step"),
    Line("step: 0 at 0.25", one_success(4), z_scores(one_success(4)), certainty="step"),
    Line("step: else 1", one_success(5), mixed(one_success(5), 0.2, 1), certainty="step"),
    Line("a fixed float", SHAPED, mixed(SHAPED, 0.4, 0.3), certainty=0.3),
]
TABLE = [
    Line(
        "mu = 0: D = max abs(r - mu) / (G - 1)",
        [-1, 0, 0, 1],
        [-3, 0, 0, 3],
        estimator="apd",
        within=1e-5,
    ),
    Line("mu < 0: D = abs(mu) keeps the order", NEGATIVE, [2 / 3, 1 / 3, 0, -1], estimator="apd"),
    Line("abs(apd) ends at G - 1", [-4, 1, 1, 1], [-3, 1, 1, 1], estimator="apd", within=1e-5),
    Line("paper flips it", NEGATIVE, [-2 / 3, -1 / 3, 0, 1], estimator="apd", apd="paper"),
    Line("paper explodes", [-1, 0, 0, 1], [-1e6, 0, 0, 1e6], estimator="apd", apd="paper"),
    *[Line(f"all equal: {x}", [0.1] * 8, [0.0] * 8, estimator=x, within=0) for x in ESTIMATORS],
    Line("one group equal", [0.1, 0.1, 0.1, 1, 0], [0, 0, 0, *PAIR], groups=[0, 0, 0, 1, 1]),
    Line("G = 1", [1.0, 0.3, 7.0], [0.0] * 3, groups=[0, 1, 2], within=0),
    Line("NaN is absent", [1, NAN, 0, 0], [TRIPLE[0], 0, *TRIPLE[1:]]),
    Line("+-inf as NaN", [INF, 1, -INF, 0], [0, PAIR[0], 0, PAIR[1]]),
    Line("NaN alone", [NAN, NAN, 1, 0], [0, 0, *PAIR], groups=[0, 0, 1, 1]),
    Line(
        "ragged groups, rows in any order: group_ids decides",
        [1, 0, 0, 1, 0, 0.5, 0],
        [FOUR[0], PAIR[1], FOUR[1], PAIR[0], FOUR[2], 0, FOUR[3]],
        groups=[7, -3, 7, -3, 7, 2, 7],
    ),
    Line(
        "max_abs clamps", one_success(16), [2.5] + mixed(one_success(16), 1 / 16)[1:], max_abs=2.5
    ),
    Line(
        "max_abs is symmetric", [0, 1, 1, 1], [-0.2, 0.2, 0.2, 0.2], estimator="rloo", max_abs=0.2
    ),
    Line("a format credit in a failed group", [0.1] + [0.0] * 15, [15] + [-1] * 15, within=1e-3),
    Line(
        "worked figure: z_1 = -1.732",
        [0.9, 1, 1, 1],
        [-1.732] + [0.577] * 3,
        estimator="grpo",
        std_correction=0,
        within=3e-4,
    ),
]


def in_place(line, device):
    """Contiguous groups, where the line has such of one size."""
    sizes = line.ids.unique_consecutive(return_counts=True)[1]
    if len(set(sizes.tolist())) > 1 or len(sizes) > len(line.ids.unique()):
        return None
    return call(line, device, group_size=int(sizes[0]))


def shuffled(line, device):
    """Ids, in an order in which no group is together."""
    order = torch.randperm(len(line.ids))
    found = torch.empty(len(order))
    found[order] = call(line, device, order, group_ids=line.ids[order].to(device))
    return found


def call(line, device, order=slice(None), **grouping):
    if line.success is not None:
        grouping["success"] = line.success[order].to(device)
    rewards = line.rewards[order].to(device)
    return mk.group_advantages(rewards, **grouping, **line.settings).cpu()


def inside_a_loss(line, device):
    """The advantages that a loss of one token a sequence used, with gradient -A / B."""
    n = len(line.rewards)
    logprobs = torch.full((n, 1), -1.0, device=device).requires_grad_()
    success = {} if line.success is None else {"success": line.success.to(device)}
    out = mk.mapo_loss(
        logprobs,
        rewards=line.rewards.to(device),
        group_ids=line.ids.to(device),
        advantage_spec=mk.AdvantageSpec(**line.settings),
        **success,
    )
    out.loss.backward()
    found = out.advantages.cpu()
    torch.testing.assert_close(-n * logprobs.grad.cpu()[:, 0], found, rtol=1e-6, atol=1e-30)
    finite = line.rewards.isfinite()
    assert out.metrics["nonfinite_rewards"] == (~finite).sum()
    groups = [line.rewards[(line.ids == i) & finite] for i in line.ids.unique()]
    without_signal = sum(len(r) < 2 or bool((r == r[0]).all()) for r in groups)
    assert out.metrics["zero_advantage_groups"] == without_signal
    return found


CASES = [(line, how) for line in TABLE for how in (in_place, shuffled, inside_a_loss)]
CASES += [(line, shuffled) for line in FORMULAS]


@pytest.mark.parametrize(("line", "how"), CASES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_line(line, how, device):
    found = how(line, device)
    if found is not None:
        bound = line.within * max(1.0, float(line.expected.abs().max()))
        torch.testing.assert_close(found.double(), line.expected, rtol=0, atol=bound)
        # Exactly 0 where SPEC says so.
        assert (found[line.expected == 0].abs() <= 1e-7 * (line.within > 0)).all()


@pytest.mark.parametrize(
    ("size", "mapo", "grpo"), [(16, "12.4", "3.8"), (64, "59.6", "7.9"), (256, "251", "15.9")]
)
def test_huge_advantages_of_one_success(size, mapo, grpo, device):
    rewards = torch.tensor(one_success(size), device=device)
    for estimator, figure in (("mapo", mapo), ("grpo", grpo)):
        found = mk.group_advantages(rewards, group_size=size, estimator=estimator)
        digits = len(figure.partition(".")[2])
        assert abs(float(found.max()) - float(figure)) < 0.501 * 10**-digits


@pytest.mark.parametrize("size", [12])
def test_scale_of_mapo_over_grpo(size, device):
    """rho(p), above 1 for p < 0.5 and below 1 for p > 0.5."""
    settings = {"group_size": size, "std_correction": 0, "eps": 1e-9}
    for successes in range(1, size):
        p = successes / size
        rewards = (torch.arange(size, device=device) < successes).float()
        mapo = mk.group_advantages(rewards, **settings)
        grpo = mk.group_advantages(rewards, estimator="grpo", **settings)
        rho = 4 * p * (1 - p) + (1 - 4 * p * (1 - p)) * math.sqrt((1 - p) / p)
        torch.testing.assert_close(mapo, rho * grpo, rtol=2e-6, atol=0)
        assert (rho > 1) == (p < 0.5) or p == 0.5


def test_percent_deviation_of_non_negative_rewards_is_the_papers(device):
    rewards = torch.rand(60).round(decimals=1).to(device)
    for estimator in ("mapo", "apd"):
        bounded, paper = (
            mk.group_advantages(rewards, group_size=6, estimator=estimator, apd=apd)
            for apd in ("bounded", "paper")
        )
        torch.testing.assert_close(bounded, paper, rtol=1e-6, atol=0)


def test_percent_deviation_of_signed_rewards_keeps_order_and_bound(device):
    rewards = torch.randn(20, 9).to(device)
    found = mk.group_advantages(rewards.view(-1), group_size=9, estimator="apd").view(20, 9)
    assert torch.equal(found.argsort(1), rewards.argsort(1))
    assert found.abs().max() <= 8
