"""The kernels of the advantage level: group moments, and from them each row's advantage.

A group is found in one of three layouts: `contiguous` (rows k G to (k + 1) G), `match` (all rows
are scanned for an equal id; right for a batch of a few thousand) and `order` (ids were sorted; a
permutation and the groups' starts say where each group's rows lie). None of them waits on the host.
"""

from typing import Any, NamedTuple

from mapo_kernels._triton import constant, jit, tl
from mapo_kernels.formula import GroupMetrics, group_advantage, reward_unit, row_advantage

N_GROUP_METRICS = constant(len(GroupMetrics._fields))


class Rewards(NamedTuple):
    """Rewards [B] and which of them belong together; None where a layout has no use for it."""

    reward: Any
    success: Any = None
    ids: Any = None
    order: Any = None
    weight: Any = None
    batch_std: Any = None


class Span(NamedTuple):
    """Where the groups of a tile lie: first row, rows, own id ([TILE] each), most rows of one."""

    first: Any
    size: Any
    own_id: Any
    longest: Any


class Moments(NamedTuple):
    """Of a tile of groups, [TILE] each; the mean is `lowest + offset`, the leader a first row.

    All that stems from rewards comes times `unit`: see `formula.reward_unit`.
    """

    unit: Any
    count: Any
    members: Any
    lowest: Any
    highest: Any
    offset: Any
    squares: Any
    successes: Any
    leader: Any


@jit
def member_rewards(rewards, span, start, BLOCK_G: tl.constexpr):
    """One block of a tile of groups: rows, which lanes are members, rewards, which are finite."""
    offs = start + tl.arange(0, BLOCK_G)[None, :]  # [1, BLOCK_G]
    member = offs < span.size[:, None]  # [TILE, BLOCK_G]
    rows = span.first[:, None] + offs
    if rewards.order is not None:
        rows = tl.load(rewards.order + rows, mask=member, other=0)
    if rewards.ids is not None:
        ids = tl.load(rewards.ids + rows, mask=member, other=0)
        member = member & (ids == span.own_id[:, None])
    reward = tl.load(rewards.reward + rows, mask=member, other=0.0).to(tl.float32)
    finite = member & (tl.abs(reward) < float("inf"))
    return rows, member, reward, finite


@jit
def group_moments(rewards, span, success_threshold, TILE: tl.constexpr, BLOCK_G: tl.constexpr):
    """Moments of a tile of groups.

    Deviations are taken from the lowest reward first, so a common offset of the rewards costs no
    digits.
    """
    count = tl.zeros([TILE], tl.float32)
    members = tl.zeros([TILE], tl.float32)
    successes = tl.zeros([TILE], tl.float32)
    lowest = tl.full([TILE], float("inf"), tl.float32)
    highest = tl.full([TILE], float("-inf"), tl.float32)
    leader = tl.full([TILE], 2147483647, tl.int32)
    for start in range(0, span.longest, BLOCK_G):
        rows, member, reward, finite = member_rewards(rewards, span, start, BLOCK_G)
        if rewards.success is not None:
            success = finite & (tl.load(rewards.success + rows, mask=member, other=0) != 0)
        else:
            threshold = success_threshold
            if rewards.reward.dtype.element_ty.is_floating():
                # Rounded like the rewards: a bfloat16 reward of 0.9 passes a threshold of 0.9.
                threshold = threshold.to(rewards.reward.dtype.element_ty).to(tl.float32)
            success = finite & (reward >= threshold)
        count = count + tl.sum(finite.to(tl.float32), 1)
        members = members + tl.sum(member.to(tl.float32), 1)
        successes = successes + tl.sum(success.to(tl.float32), 1)
        lowest = tl.minimum(lowest, tl.min(tl.where(finite, reward, float("inf")), 1))
        highest = tl.maximum(highest, tl.max(tl.where(finite, reward, float("-inf")), 1))
        leader = tl.minimum(leader, tl.min(tl.where(member, rows, 2147483647).to(tl.int32), 1))
    lowest = tl.where(count > 0, lowest, 0.0)
    highest = tl.where(count > 0, highest, 0.0)
    # Beyond 2^50 in units of 2^80: the squares of 2^24 deviations then fit float32.
    unit = reward_unit(lowest, highest, 1125899906842624.0, 8.271806125530277e-25)
    lowest = lowest * unit
    highest = highest * unit

    # In float64 the order of a group's members does not show in the float32 that comes of it.
    total = tl.zeros([TILE], tl.float64)
    for start in range(0, span.longest, BLOCK_G):
        rows, member, reward, finite = member_rewards(rewards, span, start, BLOCK_G)
        above = reward * unit[:, None] - lowest[:, None]
        total = total + tl.sum(tl.where(finite, above, 0.0).to(tl.float64), 1)
    # A reward that is the mean has a deviation of 0: a GPU's `/` multiplies by a rounded inverse.
    offset = tl.div_rn(total.to(tl.float32), tl.maximum(count, 1.0))

    squares = tl.zeros([TILE], tl.float64)
    for start in range(0, span.longest, BLOCK_G):
        rows, member, reward, finite = member_rewards(rewards, span, start, BLOCK_G)
        above = reward * unit[:, None] - lowest[:, None]
        deviation = tl.where(finite, above - offset[:, None], 0.0)
        squares = squares + tl.sum((deviation * deviation).to(tl.float64), 1)
    return Moments(
        unit, count, members, lowest, highest, offset, squares.to(tl.float32), successes, leader
    )


@jit
def batch_deviation(rewards, unit):
    """The deviation of the whole batch's rewards times `unit`; 0 where nothing divides by it."""
    std = 0.0 * unit
    if rewards.batch_std is not None:
        # No product that a compiler may fuse with what is added to it: see `group_factors`.
        std = tl.fma(tl.load(rewards.batch_std), tl.load(rewards.batch_std + 1) * unit, 0.0)
    return std


@jit
def member_advantage(rewards, rows, reward, finite, unit, lowest, offset, factor, numbers):
    """Advantages of members of a group from its moments, at most what float32 can hold."""
    if rewards.weight is not None:
        factor = factor * tl.load(rewards.weight + rows, mask=finite, other=0.0).to(tl.float32)
    limit = 3.4028234663852886e38
    if numbers.max_abs is not None:
        limit = numbers.max_abs
    return row_advantage((reward * unit - lowest) - offset, finite, factor, limit)


@jit
def advantage_of_sequence(
    rewards, Out, sequence, split, n_sequences, group_size, numbers,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """A sequence's advantage from its group's rewards, and what its group adds to the metrics."""
    index = sequence + tl.arange(0, 1)  # [1]
    is_first = split + tl.arange(0, 1) == 0
    if rewards.ids is not None:
        first = index * 0
        span = Span(first, first + n_sequences, tl.load(rewards.ids + index), n_sequences)
    else:
        first = index // group_size * group_size
        span = Span(first, index * 0 + group_size, index, group_size)
    m = group_moments(rewards, span, numbers.success_threshold, 1, BLOCK_G)
    batch_std = batch_deviation(rewards, m.unit)
    factor, _, _, success_ratio, certainty = group_advantage(
        m.count, m.lowest, m.highest, m.lowest + m.offset, m.squares, m.successes, m.unit,
        batch_std, numbers, GROUP,
    )  # fmt: skip
    reward = tl.load(rewards.reward + index).to(tl.float32)
    finite = tl.abs(reward) < float("inf")
    advantage = member_advantage(
        rewards, index, reward, finite, m.unit, m.lowest, m.offset, factor, numbers
    )
    tl.store(Out + index, advantage, mask=is_first)
    # One program speaks for the group: the first of the group's first row.
    speaks = ((m.leader == index) & is_first).to(tl.float32)
    counted = speaks * (m.count > 0).to(tl.float32)
    return tl.sum(advantage, 0), GroupMetrics(
        tl.sum(counted * success_ratio, 0),
        tl.sum(counted * certainty, 0),
        tl.sum(speaks * (factor == 0).to(tl.float32), 0),
        tl.sum(speaks * (m.members - m.count), 0),
        tl.sum(counted, 0),
    )


@jit
def no_groups():
    """The metrics of no group, in the order of `GroupMetrics`."""
    # The interpreter of Triton 3.6 makes no tuple of a tuple times a number.
    sums = ()
    for _ in tl.static_range(N_GROUP_METRICS):
        sums = sums + (tl.full([], 0.0, tl.float32),)
    return sums


@jit
def add_groups(a, b):
    """The metrics of the groups of both."""
    sums = ()
    for i in tl.static_range(N_GROUP_METRICS):
        sums = sums + (a[i] + b[i],)
    return sums


@jit(do_not_specialize=["n_groups"])
def advantages_kernel(
    rewards,  # Rewards
    Starts,  # [B + 1], or None if groups are contiguous or told by id
    Advantages,  # [B]
    Stats,  # [7, n_groups], or None
    n_groups,
    group_size,
    numbers,  # AdvantageNumbers
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """One tile of groups (of rows where ids are matched): advantages, and statistics if wanted."""
    tile = tl.program_id(0) * TILE
    groups = tile + tl.arange(0, TILE)  # [TILE]
    present = groups < n_groups
    if Starts is not None:
        first = tl.load(Starts + groups, mask=present, other=0)
        size = tl.load(Starts + groups + 1, mask=present, other=0) - first
        span = Span(first, size, groups, tl.max(size, 0))
    elif rewards.ids is not None:
        own_id = tl.load(rewards.ids + groups, mask=present, other=0)
        span = Span(groups * 0, tl.where(present, n_groups, 0), own_id, n_groups)
    else:
        size = tl.where(present, group_size, 0)
        span = Span(groups * group_size, size, groups, group_size)
    m = group_moments(rewards, span, numbers.success_threshold, TILE, BLOCK_G)
    batch_std = batch_deviation(rewards, m.unit)
    factor, mean, std, success_ratio, certainty = group_advantage(
        m.count, m.lowest, m.highest, m.lowest + m.offset, m.squares, m.successes, m.unit,
        batch_std, numbers, GROUP,
    )  # fmt: skip
    if rewards.ids is not None:
        reward = tl.load(rewards.reward + groups, mask=present, other=0.0).to(tl.float32)
        finite = tl.abs(reward) < float("inf")
        advantage = member_advantage(
            rewards, groups, reward, present & finite, m.unit, m.lowest, m.offset, factor, numbers
        )
        tl.store(Advantages + groups, advantage, mask=present)
    else:
        for start in range(0, span.longest, BLOCK_G):
            rows, member, reward, finite = member_rewards(rewards, span, start, BLOCK_G)
            advantage = member_advantage(
                rewards, rows, reward, finite, m.unit[:, None], m.lowest[:, None],
                m.offset[:, None], factor[:, None], numbers,
            )  # fmt: skip
            tl.store(Advantages + rows, advantage, mask=member)
    if Stats is not None:
        nonfinite = m.members - m.count
        stats = (mean, std, success_ratio, certainty, m.count, nonfinite, factor)
        for i in tl.static_range(7):
            tl.store(Stats + i * n_groups + groups, stats[i], mask=present)


@jit(do_not_specialize=["n_groups"])
def group_summary_kernel(Stats, Out, n_groups, BLOCK: tl.constexpr):
    """`groups.group_summary` [6] of the statistics [7, n_groups], by one program."""
    sums = no_groups()
    for start in range(0, n_groups, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < n_groups
        success_ratio = tl.load(Stats + 2 * n_groups + offs, mask=mask, other=0.0)
        certainty = tl.load(Stats + 3 * n_groups + offs, mask=mask, other=0.0)
        count = tl.load(Stats + 4 * n_groups + offs, mask=mask, other=0.0)
        nonfinite = tl.load(Stats + 5 * n_groups + offs, mask=mask, other=0.0)
        factor = tl.load(Stats + 6 * n_groups + offs, mask=mask, other=0.0)
        counted = count > 0
        without_signal = (factor == 0) & (count + nonfinite > 0)
        some = (
            tl.sum(tl.where(counted, success_ratio, 0.0), 0),
            tl.sum(tl.where(counted, certainty, 0.0), 0),
            tl.sum(without_signal.to(tl.float32), 0),
            tl.sum(nonfinite, 0),
            tl.sum(counted.to(tl.float32), 0),
        )
        sums = add_groups(sums, some)
    # The mean over no group is NaN.
    active = tl.where(sums[4] > 0, sums[4], float("nan"))
    tl.store(Out, tl.div_rn(sums[0], active))
    tl.store(Out + 1, tl.div_rn(sums[1], active))
    for i in tl.static_range(2, N_GROUP_METRICS):
        tl.store(Out + i, sums[i])
    never = (sums[4] > 0) & (sums[0] == 0) & (sums[2] < sums[4])
    tl.store(Out + N_GROUP_METRICS, never.to(tl.float32))
