"""Strategies for specs, groups of rewards and layouts: every choice is hypothesis' own.

Bulk numbers come from a drawn seed, see `batches`.
"""

import math

import torch
from cases import Groups, Layout
from hypothesis import strategies as st

import mapo_kernels as mk
from mapo_kernels.spec import (
    AGGREGATIONS,
    CERTAINTIES,
    DIFFICULTIES,
    ESTIMATORS,
    KL_ESTIMATORS,
    MULTI_OBJECTIVE,
    OBJECTIVES,
    SCALES,
    SCALES_OF,
    SEQUENCE_OBJECTIVES,
)

NAN, INF = math.nan, math.inf
NARROW = (torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8)
seeds = st.integers(0, 2**32 - 1)


def one_of(*values):
    return st.sampled_from(values)


def is_interpreted(device):
    """Whether kernels run in the interpreter, where a program costs milliseconds."""
    return device.type == "cpu" and mk.resolve_backend("cpu") == "triton"


def input_dtypes(device):
    """Dtypes of what a loss differentiates by; float64 is the eager backend's alone."""
    wide = () if mk.resolve_backend(device.type) == "triton" else (torch.float64,)
    return st.sampled_from((*wide, torch.float32, *NARROW))


@st.composite
def advantage_specs(draw, n_rewards, apart, most):
    """Of `n_rewards` rewards a sequence (0: of one without that dimension), groups of `most`."""
    estimator = draw(one_of(*ESTIMATORS))
    k = None if apart else draw(one_of(None, None, None, 1, 2, 3))
    scales = [x for x in SCALES_OF.get(estimator, SCALES) if k is None or x != "batch"]
    weights = None
    if n_rewards:
        weight = one_of(1, 1.0, 0.5, 2.0, 0.0, -0.5)
        weights = [draw(weight) for _ in range(n_rewards)]
        weights = weights if any(weights) else [1.0] * n_rewards
    return mk.AdvantageSpec(
        estimator=estimator,
        scale="group" if apart else draw(one_of("group", *scales)),
        reward_weights=weights,
        multi_objective_aggregation=MULTI_OBJECTIVE[apart],
        pass_at_k=None if k is None else min(k, most),
        certainty=draw(st.sampled_from(CERTAINTIES) | one_of(0, 0.0, 0.3, 1.0)),
        success_threshold=draw(one_of(1.0, 1, 0.9, 0.5, 0.0, -1.0, 1e9 + 1)),
        std_correction=draw(one_of(1, 0)),
        eps=draw(one_of(1e-6, 1e-4, 1e-30, 1.0)),
        apd=draw(one_of("bounded", "paper")),
        max_abs=draw(one_of(None, 0.5, 3)),
        difficulty=draw(one_of(None, None, *DIFFICULTIES)),
        difficulty_exponent=draw(one_of(0.5, 1, 2.5, 0, -0.5)),
    )


@st.composite
def loss_specs(draw, with_entropy, needs_max_tokens):
    objective = draw(st.sampled_from(OBJECTIVES + SEQUENCE_OBJECTIVES))
    levels = ("sequence",) if objective in SEQUENCE_OBJECTIVES else ("token", "sequence")
    eps_high = draw(one_of(0.2, 0.28, 0.05, 1, 3.0))
    dual_clip = draw(one_of(None, 0.1, 1.0, 5.0)) if objective == "clip" else None
    aggregation = draw(st.sampled_from(AGGREGATIONS))
    denominators = ("all",) if aggregation == "token-sum" else ("all", "all", "contributing")
    fixed = aggregation == "seq-mean-token-sum-norm" and needs_max_tokens
    mask = draw(one_of(None, None, (0.5, 2), (0.9, 1.2), (0, 5.0)))
    caps = one_of(None, None, 0.5, 2, 1e9)
    rollout_is = mask is None or (objective != "vespo" and draw(one_of(True, True, False)))
    return mk.LossSpec(
        objective=objective,
        importance_level=draw(one_of(*levels)),
        eps_low=draw(one_of(0.2, 0.05, 0.6, 0.99)),
        eps_high=eps_high,
        dual_clip=None if dual_clip is None else 1 + eps_high + dual_clip,
        eps_high_cispo=draw(one_of(5.0, 1.28, 0.5)),
        eps_low_cispo=draw(one_of(None, None, 0.5, 0.2, 0)),
        sapo_tau_pos=draw(one_of(1.0, 0.3, 4)),
        sapo_tau_neg=draw(one_of(1.05, 0.3, 4)),
        trust_region=draw(one_of(None, "tv", "kl")),
        trust_low=draw(one_of(0.2, 0.05, 0.4, 1)),
        trust_high=draw(one_of(0.2, 0.03, 0.28)),
        beta=draw(one_of(0.0, 0, 0.04, 1.0)),
        kl_estimator=draw(st.sampled_from(KL_ESTIMATORS)),
        kl_importance_correction=draw(st.booleans()),
        entropy_coef=draw(one_of(0.0, 0, 0.01, 1.0)) if with_entropy else 0.0,
        rollout_cap=draw(caps) if rollout_is and objective != "vespo" else None,
        rollout_mask=mask,
        rollout_mask_level=draw(one_of("token", "sequence")),
        rollout_is=rollout_is,
        vespo_k_pos=draw(one_of(2.0, 0.0, 0.5)),
        vespo_lambda_pos=draw(one_of(3.0, 0, 1)),
        vespo_k_neg=draw(one_of(3.0, 1)),
        vespo_lambda_neg=draw(one_of(2.0, 0.1)),
        aggregation=aggregation,
        denominator=draw(one_of(*denominators)),
        max_tokens=draw(st.integers(1, 20)) if fixed else draw(one_of(None, 1, 7)),
        score_all=draw(one_of(False, False, True)),
    )


def _reward_kinds(dtype, tame):
    """Strategies for one reward each; a group's rewards are all of one kind."""
    if dtype == torch.bool or not dtype.is_floating_point:
        return [one_of(0, 1), st.integers(0, 1 if dtype == torch.bool else 100)]
    info = torch.finfo(dtype)
    kinds = [
        one_of(0.0, 1.0),
        one_of(0.0, 0.1, 0.5, 0.9, 1.0, -0.2, 0.30000000000000004, 0.9999999999999999),
        st.floats(-2, 2, width=16),
        one_of(0.0, 1.0, 0.5, NAN, INF, -INF),
        one_of(-1.0, -2.0, -3.5, 0.0),
        st.just(0.1),
    ]
    if not tame:
        top = float(info.max)
        kinds += [
            one_of(1e9 + 1, 1e9, 1e9 + 2) if top > 1e30 else one_of(2049.0, 2050.0),
            one_of(0.0, 1e20, 1e30, -1e20, 1.9e19) if top > 1e30 else one_of(6e4, 0.0),
            one_of(top, 0.0, top / 2),
            one_of(-top, top, 1.0),
            one_of(0.0, 1e-10, 2e-10, 1e-15) if top > 1e30 else one_of(0.0, 1e-7),
        ]
    return kinds


def _fits_float32(value):
    return not math.isfinite(value) or abs(value) <= torch.finfo(torch.float32).max


@st.composite
def groupings(draw, n):
    """Ids [n] int64 of the rows' groups, and the keywords that say them."""
    if draw(st.booleans()):
        size = draw(st.sampled_from([k for k in range(1, n + 1) if n % k == 0]))
        return torch.arange(n) // size, {"group_size": size}
    dtype = draw(st.sampled_from(ID_DTYPES))
    info = torch.iinfo(dtype)
    names = st.lists(st.integers(info.min, info.max), min_size=1, max_size=4)
    pool = draw(names | one_of([0], [0, 1], [-1, 1, 0], [info.max, info.min]))
    ids = torch.tensor([draw(st.sampled_from(pool)) for _ in range(n)])
    return ids, {"group_ids": ids.to(dtype)}


@st.composite
def groups(draw, n, tame=False, wide=True):
    """Rewards [n] or [n, K] with their groups; `tame` ones make losses that float32 can hold.

    With `wide`, statistics may be float64, and rewards larger than float32 has.
    """
    floating = one_of(torch.float32, torch.float64, *NARROW)
    dtype = draw(floating | one_of(torch.int64, torch.int32, torch.uint8, torch.bool))
    ids, told = draw(groupings(n))
    n_rewards = draw(one_of(0, 0, 0, 1, 2, 3))
    apart = draw(one_of(False, False, False, True) if n_rewards else one_of(*[False] * 7, True))
    kinds = _reward_kinds(dtype, tame or apart)
    columns = []
    for _ in range(max(n_rewards, 1)):
        by_group = {int(i): draw(st.sampled_from(kinds)) for i in ids.unique()}
        values = [draw(by_group[int(i)]) for i in ids]
        columns.append([v if wide or _fits_float32(v) else 1.0 for v in values])
    values = columns if n_rewards else columns[0]
    spec = draw(advantage_specs(n_rewards, apart, told.get("group_size", n)))
    success = draw(one_of(None, None, torch.tensor([draw(st.booleans()) for _ in range(n)])))
    told |= {} if success is None else {"success": success}
    if draw(one_of(False, False, True)):
        per_row = draw(st.booleans())
        weights = st.sampled_from([0.0, 1.0, 0.5, 1.7, -2.0])
        count = n if per_row else len(ids.unique())
        told["group_weight"] = torch.tensor([draw(weights) for _ in range(count)])
    rewards = torch.tensor(values, dtype=dtype)
    return Groups(rewards.T if n_rewards else rewards, ids, told, spec)


@st.composite
def layouts(draw, device, packed=None):
    """Padded or packed, with empty sequences, masked rows, and tokens of no sequence."""
    max_sequences, max_length = (4, 4) if is_interpreted(device) else (6, 9)
    n = draw(st.integers(1, max_sequences))
    length = draw(st.sampled_from([*range(max_length, 0, -1), *range(max_length, -1, -1)]))
    is_packed = draw(st.booleans()) if packed is None else packed
    inside = torch.ones(n, length, dtype=torch.bool)
    ends = (0, 0)
    if is_packed:
        lengths = torch.tensor([draw(st.integers(0, length)) for _ in range(n)])
        inside = torch.arange(length) < lengths[:, None]
        ends = draw(one_of((0, 0), (0, 0), (2, 0), (0, 3), (1, 1)))
    kind = draw(one_of("random", "random", "random", "none", "none", "rows", "all"))
    generator = torch.Generator().manual_seed(draw(seeds))
    live = inside.clone()
    if kind == "random":
        live &= torch.rand(n, length, generator=generator) < 0.6
    elif kind == "rows":
        live &= (torch.rand(n, 1, generator=generator) < 0.5).expand(n, length)
    elif kind == "all":
        live &= False
    mask_dtypes = (torch.bool, torch.int64, torch.uint8, torch.float32)
    has_mask = kind != "none" or draw(st.booleans())
    mask_dtype = draw(st.sampled_from(mask_dtypes)) if has_mask else None
    bounds_dtype = draw(one_of(torch.int64, torch.int32))
    return Layout(live, inside, is_packed, *ends, mask_dtype, bounds_dtype)
