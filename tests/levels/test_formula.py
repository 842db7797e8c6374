import itertools

import mpmath
import pytest
import torch

from mapo_kernels import formula
from mapo_kernels._triton import is_device_function
from mapo_kernels.eager import formula as twin
from mapo_kernels.spec import CERTAINTIES, OBJECTIVES, AdvantageSpec, LossSpec


def relative_error(approximation, function, x):
    with mpmath.workdps(60):
        exact = [function(mpmath.mpf(float(v))) for v in x]
        return max(
            abs(mpmath.mpf(float(a)) - e) / abs(e) if e else abs(mpmath.mpf(float(a)))
            for a, e in zip(approximation, exact, strict=True)
        )


def points(dtype):
    x = torch.cat([torch.linspace(-70, 70, 701), torch.logspace(-12, 1, 200)])
    return torch.cat([x, -x[701:]]).to(dtype)


def test_exp_is_accurate_far_from_zero():
    assert (
        relative_error(twin.exp(points(torch.float64)), mpmath.exp, points(torch.float64)) < 1e-15
    )
    assert (
        relative_error(twin.exp(points(torch.float32)), mpmath.exp, points(torch.float32)) < 1.5e-7
    )
    extremes = torch.tensor([-200.0, 200.0, float("inf"), -float("inf"), float("nan")])
    torch.testing.assert_close(twin.exp(extremes), extremes.exp(), equal_nan=True)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 2e-14), (torch.float32, 8e-6)])
def test_k3_and_its_slope_do_not_cancel_near_zero(dtype, bound):
    d = points(dtype)
    value, slope = twin.kl_term(torch.zeros_like(d), d, LossSpec(kl_estimator="k3").kind)
    assert relative_error(value, lambda v: mpmath.expm1(v) - v, d) < bound
    assert relative_error(slope, lambda v: -mpmath.expm1(v), d) < 2e-7 + bound
    assert relative_error(
        twin.approx_kl(-d[d.abs() < 20]), lambda v: mpmath.expm1(v) - v, d[d.abs() < 20]
    ) < max(bound, 1e-14)


def spec_of(objective, dual, kl, corrected):
    return LossSpec(
        objective=objective,
        eps_high=0.28,
        dual_clip=3.0 if dual else None,
        eps_high_cispo=1.4,
        beta=0.3,
        entropy_coef=0.01,
        kl_estimator=kl or "k3",
        kl_importance_correction=corrected,
    )


CASES = [
    (objective, dual, kl, corrected)
    for objective, dual, kl, corrected in itertools.product(
        OBJECTIVES, (False, True), (None, "k1", "k2", "k3"), (False, True)
    )
    if not (dual and objective != "clip") and not (kl is None and corrected)
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_derivatives_are_those_of_the_value(case):
    """Both against autograd through the value: the formula is its own reference here."""
    log_ratio = torch.linspace(-2.0, 2.0, 41, dtype=torch.float64).repeat(2).requires_grad_()
    logp = torch.linspace(-3.0, -0.1, 82, dtype=torch.float64).requires_grad_()
    ref = logp.detach() + torch.linspace(-1, 1, 82, dtype=torch.float64).flip(0)
    advantage = torch.tensor([1.5, -0.7], dtype=torch.float64).repeat_interleave(41)
    weight = torch.full_like(advantage, 0.6)
    entropy = torch.linspace(0.0, 3.0, 82, dtype=torch.float64)
    spec = spec_of(*case)
    ref = None if case[2] is None else ref
    out = twin.token_loss(
        logp, logp, log_ratio, log_ratio, ref, advantage, weight, entropy, spec.numbers, spec.kind
    )
    loss, d_log_ratio, d_logp = out[:3]
    grads = torch.autograd.grad(loss.sum(), (log_ratio, logp), allow_unused=True)
    expected = [
        torch.zeros_like(g) if e is None else e for e, g in zip(grads, out[1:3], strict=True)
    ]
    if case[0] == "cispo":
        # The ratio is a constant of the objective; autograd through the value does not know.
        d_policy = -weight * log_ratio.exp().clamp(max=1.4).detach() * advantage
        assert_kl_only(
            d_log_ratio, expected[0], d_logp - d_policy, case, None if ref is None else ref - logp
        )
        return
    torch.testing.assert_close(d_log_ratio, expected[0])
    torch.testing.assert_close(d_logp, expected[1])


def assert_kl_only(d_log_ratio, autograd_d_log_ratio, d_kl, case, d):
    if case[2] is None or not case[3]:
        assert (d_log_ratio == 0).all()
    if case[2] is None:
        torch.testing.assert_close(d_kl, torch.zeros_like(d_kl))
    elif not case[3]:
        slope = {"k1": torch.ones_like(d), "k2": -d, "k3": 1 - d.exp()}[case[2]]
        torch.testing.assert_close(d_kl, 0.3 * slope)


@pytest.mark.parametrize("certainty", CERTAINTIES)
def test_certainty_functions(certainty):
    p = torch.tensor([0, 0.1, 0.25, 0.5, 0.75, 0.9, 1], dtype=torch.float64)
    with mpmath.workdps(30):
        entropy = [
            1 + sum(q * mpmath.log(q, 2) for q in (mpmath.mpf(x), 1 - mpmath.mpf(x)) if q > 0)
            for x in p.tolist()
        ]
    expected = {
        "quadratic": (1 - 2 * p) ** 2,
        "linear": (2 * p - 1).abs(),
        "entropy": torch.tensor([float(e) for e in entropy], dtype=torch.float64),
        "step": torch.tensor([1, 1, 0, 0, 0, 1, 1], dtype=torch.float64),
    }[certainty]
    actual = twin.certainty_weight(p, 0.0, AdvantageSpec(certainty=certainty).kind)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-15)
    assert actual.min() >= 0 and actual.max() <= 1


def test_a_denominator_is_positive_unless_no_token_is_active():
    denominator = torch.tensor([2.0, 0.0, -1.0, 0.0, -1.0, float("nan")])
    active = torch.tensor([1, 1, 1, 0, 0, 0])
    found = twin.loss_denominator(denominator, active)
    expected = torch.tensor([2.0, float("nan"), float("nan"), 1.0, 1.0, float("nan")])
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_the_formula_has_no_loads_no_stores_and_no_assignment_in_place():
    import ast
    import inspect

    tree = ast.parse(inspect.getsource(formula))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.AugAssign)]
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "tl"
    }
    assert used <= {*vars(twin._TORCH), "constexpr"}


def test_the_twin_runs_the_formula_itself():
    functions = [f for f in vars(formula).values() if is_device_function(f)]
    assert len(functions) >= 10
    for function in functions:
        twin_function = twin._namespace[function.__name__]
        assert twin_function.__code__ is function.fn.__code__
