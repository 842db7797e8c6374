import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from backends import with_two_threads_too
from support import NAN, assert_close

import mapo_kernels as mk
import reference
from mapo_kernels.groups import forget_warnings
from mapo_kernels.spec import CERTAINTIES, ESTIMATORS

INF = float("inf")
GOLDEN = json.loads((Path(__file__).parents[1] / "golden/mapo_official.json").read_text())
GOLDEN_NAMES = {
    "grpo": {"estimator": "grpo"},
    "apd": {"estimator": "apd"},
    "mean_centered": {"estimator": "mean"},
    "mapo": {},
    "mapo_linear": {"certainty": "linear"},
}


def interprets(device):
    """Whether kernels run in the interpreter, where 3000 programs take a minute."""
    return mk.resolve_backend(device.type) == "triton" and device.type == "cpu"


def advantages(rewards, device, **settings):
    settings = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in settings.items()}
    return mk.group_advantages(rewards.to(device), **settings)


def check_against_oracle(rewards, ids, device, tolerance=3e-6, **settings):
    """Same rewards by group id, and (if possible) by group size: advantages and statistics."""
    exact, exact_stats = reference.group_advantages(rewards, ids, **settings)
    actual, stats = advantages(rewards, device, group_ids=ids, return_stats=True, **settings)
    assert_close(actual, exact, tolerance)
    assert torch.equal(
        advantages(rewards, device, group_ids=ids, **settings).cpu() == 0, exact == 0
    )
    for name in ("mean", "std", "success_ratio", "certainty", "size", "nonfinite"):
        expected = [getattr(exact_stats[i], name) for i in sorted(exact_stats)]
        assert_close(getattr(stats, name), torch.tensor(expected).double(), tolerance)
    return actual


def ragged(n=20, n_groups=5):
    ids = torch.randint(0, n_groups, (n,)) * 7 - 20
    rewards = torch.rand(n).round(decimals=1)
    rewards[torch.rand(n) < 0.4] = 1.0
    rewards[torch.rand(n) < 0.1] = NAN
    return rewards, ids


@pytest.mark.pairwise
@pytest.mark.parametrize("std_correction", [0, 1])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("certainty", [*CERTAINTIES, 0.3])
def test_every_estimator_equals_the_oracle(estimator, certainty, std_correction, device):
    rewards, ids = ragged()
    settings = {"estimator": estimator, "certainty": certainty, "std_correction": std_correction}
    check_against_oracle(rewards, ids, device, **settings)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_float64_is_exact_on_the_eager_backend(estimator):
    rewards, ids = ragged()
    rewards = rewards.double()
    exact, _ = reference.group_advantages(rewards, ids, estimator=estimator)
    actual = mk.group_advantages(rewards, group_ids=ids, estimator=estimator)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, exact, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("case", list(GOLDEN))
@pytest.mark.parametrize("name", list(GOLDEN_NAMES))
def test_agreement_with_the_authors_code(case, name, device):
    golden = GOLDEN[case]
    rewards = torch.tensor(golden["rewards"])
    actual, stats = advantages(
        rewards, device, group_size=golden["group_size"], return_stats=True, **GOLDEN_NAMES[name]
    )
    groups = rewards.view(-1, golden["group_size"])
    # Equal rewards: their code divides rounding noise by rounding noise, SPEC says exactly 0.
    equal = (groups.amax(1) == groups.amin(1)).repeat_interleave(golden["group_size"])
    actual = actual.cpu()
    assert (actual[equal] == 0).all()
    expected = torch.tensor(golden[name])
    torch.testing.assert_close(actual[~equal], expected[~equal], rtol=1e-5, atol=1e-5)
    # They are listed per group, or per row.
    p = torch.tensor(golden["p"]).view(len(groups), -1)[:, 0]
    torch.testing.assert_close(stats.success_ratio.cpu(), p, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group_size", [1, 2, 3, 5, 16, 17, 256, 1000, 1024, 4096])
def test_group_sizes(group_size, device):
    rewards = (torch.rand(group_size * 3) < 0.3).float() + 0.1 * torch.rand(group_size * 3).round()
    ids = torch.arange(3).repeat_interleave(group_size)
    exact, exact_stats = reference.group_advantages(rewards, ids)
    actual, stats = advantages(rewards, device, group_size=group_size, return_stats=True)
    assert_close(actual, exact, 3e-6)
    assert_close(stats.std, torch.tensor([s.std for s in exact_stats.values()]), 3e-6)
    if group_size <= 17 or not interprets(device):
        check_against_oracle(rewards, ids, device)
    if group_size == 1:
        assert (actual == 0).all()


@with_two_threads_too
def test_order_of_rows_does_not_matter(device):
    rewards, ids = ragged()
    order = torch.randperm(len(rewards))
    straight = advantages(rewards, device, group_ids=ids).cpu()
    shuffled = advantages(rewards[order], device, group_ids=ids[order]).cpu()
    assert_close(shuffled, straight[order], 1e-6)


def test_ids_may_be_any_integers(device):
    rewards = torch.tensor([1.0, 0, 0, 1, 1, 0])
    expected = advantages(rewards, device, group_size=2)
    for dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
        info = torch.iinfo(dtype)
        ids = torch.tensor([info.max, info.max, info.min, info.min, 0, 0], dtype=dtype)
        assert torch.equal(advantages(rewards, device, group_ids=ids), expected)


def test_many_groups_by_id_take_the_sorted_path(device):
    n = 5000
    rewards = (torch.rand(n) < 0.4).float()
    ids = torch.randint(0, 900, (n,))
    ids[:700] = -1
    exact, _ = reference.group_advantages(rewards, ids)
    assert_close(advantages(rewards, device, group_ids=ids), exact, 5e-6)


@pytest.mark.parametrize(
    "values", [[0.1] * 8, [0.0] * 8, [1.0] * 8, [-0.3] * 8, [1e30] * 8, [0.1] * 7 + [NAN]]
)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_rewards_give_exactly_zero(values, estimator, device):
    rewards = torch.tensor(values)
    for grouping in ({"group_size": 8}, {"group_ids": torch.zeros(8, dtype=torch.int64)}):
        assert (advantages(rewards, device, estimator=estimator, **grouping) == 0).all()


def test_almost_equal_rewards_keep_their_signal(device):
    rewards = torch.tensor([1.0, 1.0, 1.0, 1.0 + 2**-20])
    actual = advantages(rewards, device, group_size=4, estimator="grpo", eps=1e-12)
    assert_close(actual, torch.tensor([-0.5, -0.5, -0.5, 1.5]), 1e-5)


def test_an_offset_of_the_rewards_costs_no_digits(device):
    base = torch.tensor([0.0, 1, 1, 0, 1, 0, 0, 0])
    expected = advantages(base, device, group_size=8, estimator="grpo")
    actual = advantages(base + 1e6, device, group_size=8, estimator="grpo")
    assert_close(actual, expected, 1e-6)


def test_nonfinite_rewards_are_absent(device):
    rewards = torch.tensor([1.0, NAN, 0, 0, INF, 1, -INF, 0, NAN, NAN, NAN, NAN])
    actual, stats = advantages(rewards, device, group_size=4, return_stats=True)
    expected = advantages(torch.tensor([1.0, 0, 0]), device, group_size=3)
    assert_close(actual[[0, 2, 3]], expected, 1e-6)
    # An infinite reward reaches the threshold, and is no success.
    assert_close(actual[[5, 7]], advantages(torch.tensor([1.0, 0]), device, group_size=2), 1e-6)
    assert_close(stats.success_ratio, torch.tensor([1 / 3, 1 / 2, 0]), 1e-6)
    assert (actual[[1, 4, 6, 8, 9, 10, 11]] == 0).all()
    assert stats.nonfinite.tolist() == [1, 2, 4]
    assert stats.size.tolist() == [3, 2, 0]
    assert all(torch.isfinite(x).all() for x in stats)


@pytest.mark.parametrize("absent", [[], [NAN]], ids=["finite", "nonfinite"])
def test_explicit_success_decides_p(absent, device):
    """A success without a finite reward does not count."""
    rewards = torch.tensor([0.3, -0.2, 0.9, 0.5, *absent])
    success = torch.tensor([True, False, False, False, *[True] * len(absent)])
    n = len(rewards)
    _, stats = advantages(rewards, device, group_size=n, success=success, return_stats=True)
    assert stats.success_ratio.item() == 0.25
    check_against_oracle(rewards, torch.zeros(n, dtype=torch.int64), device, success=success)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_threshold_is_compared_in_the_dtype_of_the_rewards(dtype, device):
    rewards = torch.tensor([0.9, 0.1, 0.9, 0.1], dtype=dtype)
    _, stats = advantages(rewards, device, group_size=4, success_threshold=0.9, return_stats=True)
    assert stats.success_ratio.item() == 0.5


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.bfloat16])
def test_reward_dtypes(dtype, device):
    rewards = torch.tensor([1, 0, 0, 1, 1, 1, 0, 1])
    expected = advantages(rewards.float(), device, group_size=4)
    actual = advantages(rewards.to(dtype), device, group_size=4)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)
    assert torch.equal(
        advantages(rewards.to(dtype), device, group_size=4, success_threshold=0.5), expected
    )


def test_strided_rewards(device):
    rewards = torch.rand(24)
    assert torch.equal(
        advantages(rewards[::2], device, group_size=4),
        advantages(rewards[::2].clone(), device, group_size=4),
    )


def test_signed_rewards_keep_order_and_bound(device):
    for _ in range(4 if interprets(device) else 20):
        rewards = torch.randn(12)
        actual = advantages(rewards, device, group_size=12, estimator="apd").cpu()
        assert torch.equal(actual.argsort(), rewards.argsort())
        assert actual.abs().max() <= 11 + 1e-4
        check_against_oracle(rewards, torch.zeros(12, dtype=torch.int64), device)


def test_the_papers_denominator_verbatim(device):
    rewards = torch.tensor([-1.0, -2.0, -3.0, -6.0])
    actual = advantages(rewards, device, group_size=4, estimator="apd", apd="paper")
    assert_close(actual, (rewards + 3) / (-3 + 1e-6), 1e-6)
    binary = torch.tensor([1.0, 0, 0, 1, 0, 0])
    for estimator in ("mapo", "apd"):
        paper, bounded = (
            advantages(binary, device, group_size=6, estimator=estimator, apd=apd)
            for apd in ("paper", "bounded")
        )
        assert torch.equal(paper, bounded)


@pytest.mark.parametrize(("group_size", "mapo", "grpo"), [(16, 12.4, 3.8), (64, 59.6, 7.9)])
def test_one_success_in_a_large_group(group_size, mapo, grpo, device):
    rewards = torch.zeros(group_size)
    rewards[3] = 1
    assert abs(advantages(rewards, device, group_size=group_size).max().item() - mapo) < 0.06
    actual = advantages(rewards, device, group_size=group_size, estimator="grpo")
    assert abs(actual.max().item() - grpo) < 0.06
    clamped = advantages(rewards, device, group_size=group_size, max_abs=2.5).cpu()
    assert clamped.max() == 2.5


def test_scale_of_mapo_over_grpo(device):
    for successes in range(1, 16):
        rewards = (torch.arange(16) < successes).float()
        p = successes / 16
        mapo, grpo = (
            advantages(rewards, device, group_size=16, std_correction=0, estimator=e, eps=1e-9)
            for e in ("mapo", "grpo")
        )
        rho = 4 * p * (1 - p) + (1 - 4 * p * (1 - p)) * math.sqrt((1 - p) / p)
        assert_close(mapo, grpo * rho, 1e-6)
        assert (rho > 1) == (p < 0.5) or p == 0.5


def test_worked_figure(device):
    actual = advantages(
        torch.tensor([0.9, 1, 1, 1]), device, group_size=4, std_correction=0, estimator="grpo"
    )
    assert abs(actual[0].item() + 1.732) < 1e-3


@with_two_threads_too
def test_two_runs_are_bitwise_equal(device):
    rewards, ids = ragged(60 if interprets(device) else 300, 7)
    for grouping in ({"group_ids": ids}, {"group_size": 30}):
        first, second = (advantages(rewards, device, **grouping) for _ in range(2))
        assert torch.equal(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["gpu"], indirect=True)
def test_four_million_rewards(device):
    rewards = (torch.rand(1 << 22, device=device) < 0.3).float()
    contiguous = mk.group_advantages(rewards, group_size=16)
    ids = torch.arange(1 << 18, device=device).repeat_interleave(16)
    order = torch.randperm(1 << 22, device=device)
    by_id = mk.group_advantages(rewards[order], group_ids=ids[order])
    assert_close(by_id, contiguous[order], 1e-6)
    mk.set_backend("eager")
    assert_close(contiguous, mk.group_advantages(rewards, group_size=16), 1e-6)


def test_weights_of_groups_and_of_rows(device):
    """One per group, in order or by ascending id; or one per row; before the clamp."""
    rewards, ids = ragged()
    weight = torch.tensor([0.0, 2.0, -1.0, 0.5, 3.0])[: len(ids.unique())]
    of_rows = weight[torch.unique(ids, return_inverse=True)[1]]
    exact, _ = reference.group_advantages(rewards, ids, group_weight=of_rows, max_abs=1.0)
    for given in (weight, of_rows):
        told = {"group_ids": ids, "group_weight": given, "max_abs": 1.0}
        assert_close(advantages(rewards, device, **told), exact, 3e-6)
        for kind in (torch.float64, torch.bfloat16):
            again = advantages(rewards, device, **told | {"group_weight": given.to(kind)})
            assert torch.equal(again, advantages(rewards, device, **told))
    plain = advantages(rewards, device, group_size=4)
    weight = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.25])
    weighted = advantages(rewards, device, group_size=4, group_weight=weight)
    assert_close(weighted, plain.cpu().double() * weight.repeat_interleave(4), 3e-6)
    assert torch.equal(weighted.view(5, 4)[1].cpu(), torch.zeros(4))


def test_a_wrong_number_of_weights_is_told(device):
    rewards, ids = torch.tensor([1.0, 0, 0, 1]), torch.tensor([3, 3, 5, 5])
    with pytest.raises(ValueError, match=r"group_weight: expected one number per reward \(\[4\]\)"):
        advantages(rewards, device, group_size=2, group_weight=torch.ones(3))
    for shape in ((), (0,), (len(ids), 1)):
        with pytest.raises(ValueError, match="group_weight: .*one per group, by ascending id, got"):
            advantages(rewards, device, group_ids=ids, group_weight=torch.ones(shape))
    # How many ids there are is not known on the host.
    found = advantages(rewards, device, group_ids=ids, group_weight=torch.ones(3))
    assert found.isnan().all()


def test_groups_of_one_warn_once(device):
    forget_warnings()
    rewards = torch.tensor([1.0, 0.0])
    with pytest.warns(UserWarning, match="group_size: expected at least 2, got 1"):
        assert not advantages(rewards, device, group_size=1).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        advantages(rewards, device, group_size=1)


@pytest.mark.parametrize("difficulty", ["focal", "power"])
def test_difficulty_is_a_factor_of_the_group(difficulty, device):
    """F-GRPO's (1 - p)^gamma and A-GRAE's p^-1/2; a power of 0 that is infinite is left out."""
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0, 0.1, 0, 0, 0, 2, 1, 1, 1])
    p = torch.tensor([0.25, 0.75, 0.0, 1.0]).double()
    settings = {"group_size": 4, "estimator": "grpo"}
    plain = advantages(rewards, device, **settings).cpu().double().view(4, 4)
    for exponent in (0.5, 2.0, 0.0, -0.5):
        factor = {"focal": 1 - p, "power": p}[difficulty].pow(
            exponent if difficulty == "focal" else -exponent
        )
        factor = factor.where(factor.isfinite(), 1.0)
        given = {"difficulty": difficulty, "difficulty_exponent": exponent}
        found, stats = advantages(rewards, device, return_stats=True, **settings, **given)
        assert_close(found.view(4, 4), plain * factor[:, None], 3e-6)
        assert torch.equal(found.cpu().view(4, 4)[:, 0] == 0, factor == 0)
        ids = torch.arange(16) // 4
        by_id = advantages(rewards, device, group_ids=ids, estimator="grpo", **given)
        assert_close(by_id, found.cpu().double(), 1e-6)


@pytest.mark.parametrize("scale", ["batch", "none"])
@pytest.mark.parametrize("estimator", ["grpo", "mapo"])
def test_the_scale_of_the_z_score(scale, estimator, device):
    rewards, ids = ragged()
    settings = {"scale": scale, "estimator": estimator}
    for correction in (0, 1):
        check_against_oracle(rewards, ids, device, std_correction=correction, **settings)
    if scale == "batch":
        z = reference.group_advantages(rewards, ids, estimator="mean")[0]
        z = z / (rewards[rewards.isfinite()].double().std() + 1e-6)
    else:
        z = reference.group_advantages(rewards, ids, estimator="mean")[0]
    assert_close(
        advantages(rewards, device, group_ids=ids, **settings | {"estimator": "grpo"}), z, 3e-6
    )
    ones = torch.ones(4)
    assert not advantages(ones, device, group_size=2, **settings).any()


def test_a_scale_without_a_z_score_is_an_error():
    for estimator, scale in (("mean", "batch"), ("rloo", "batch"), ("apd", "none")):
        with pytest.raises(ValueError, match=f"scale: expected .*{estimator}"):
            mk.AdvantageSpec(estimator=estimator, scale=scale)
    assert mk.AdvantageSpec(estimator="rloo", scale="none").scale == "none"
