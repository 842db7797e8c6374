"""The kernels of the advantage level: group moments, and from them each row's advantage.

A group is found in one of three layouts: `contiguous` (rows k G to (k + 1) G), `match` (all rows
are scanned for an equal id; right for a batch of a few thousand) and `order` (ids were sorted; a
permutation and the groups' starts say where each group's rows lie). None of them waits on the host.
"""

from mapo_kernels._triton import jit, tl
from mapo_kernels.formula import group_advantage


@jit
def member_rewards(
    Rewards,
    GroupIds,
    Order,
    first,
    size,
    own_id,
    start,
    BLOCK_G: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """One block of a tile of groups: rows, which lanes are members, rewards, which are finite."""
    offs = start + tl.arange(0, BLOCK_G)[None, :]  # [1, BLOCK_G]
    member = offs < size[:, None]  # [TILE, BLOCK_G]
    rows = first[:, None] + offs
    if LAYOUT == "order":
        rows = tl.load(Order + rows, mask=member, other=0)
    if LAYOUT == "match":
        ids = tl.load(GroupIds + rows, mask=member, other=0)
        member = member & (ids == own_id[:, None])
    reward = tl.load(Rewards + rows, mask=member, other=0.0).to(tl.float32)
    finite = member & (tl.abs(reward) < float("inf"))
    return rows, member, reward, finite


@jit
def group_moments(
    Rewards,
    Success,
    GroupIds,
    Order,
    first,
    size,
    own_id,
    span,
    success_threshold,
    TILE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    LAYOUT: tl.constexpr,
    HAS_SUCCESS: tl.constexpr,
):
    """Moments of a tile of groups, [TILE] each; `span` is the largest `size` of the tile.

    Deviations are taken from the lowest reward first, so a common offset of the rewards costs no
    digits. Returns (count, members, lowest, highest, mean above lowest, squared deviations,
    successes, leader), the leader being the group's first row.
    """
    count = tl.zeros([TILE], tl.float32)
    members = tl.zeros([TILE], tl.float32)
    successes = tl.zeros([TILE], tl.float32)
    lowest = tl.full([TILE], float("inf"), tl.float32)
    highest = tl.full([TILE], float("-inf"), tl.float32)
    leader = tl.full([TILE], 2147483647, tl.int32)
    for start in range(0, span, BLOCK_G):
        rows, member, reward, finite = member_rewards(
            Rewards, GroupIds, Order, first, size, own_id, start, BLOCK_G, LAYOUT
        )
        if HAS_SUCCESS:
            success = finite & (tl.load(Success + rows, mask=member, other=0) != 0)
        else:
            threshold = success_threshold
            if Rewards.dtype.element_ty.is_floating():
                # Rounded like the rewards: a bfloat16 reward of 0.9 passes a threshold of 0.9.
                threshold = threshold.to(Rewards.dtype.element_ty).to(tl.float32)
            success = finite & (reward >= threshold)
        count = count + tl.sum(finite.to(tl.float32), 1)
        members = members + tl.sum(member.to(tl.float32), 1)
        successes = successes + tl.sum(success.to(tl.float32), 1)
        lowest = tl.minimum(lowest, tl.min(tl.where(finite, reward, float("inf")), 1))
        highest = tl.maximum(highest, tl.max(tl.where(finite, reward, float("-inf")), 1))
        leader = tl.minimum(leader, tl.min(tl.where(member, rows, 2147483647).to(tl.int32), 1))
    lowest = tl.where(count > 0, lowest, 0.0)
    highest = tl.where(count > 0, highest, 0.0)

    total = tl.zeros([TILE], tl.float32)
    for start in range(0, span, BLOCK_G):
        rows, member, reward, finite = member_rewards(
            Rewards, GroupIds, Order, first, size, own_id, start, BLOCK_G, LAYOUT
        )
        total = total + tl.sum(tl.where(finite, reward - lowest[:, None], 0.0), 1)
    offset = total / tl.maximum(count, 1.0)

    squares = tl.zeros([TILE], tl.float32)
    for start in range(0, span, BLOCK_G):
        rows, member, reward, finite = member_rewards(
            Rewards, GroupIds, Order, first, size, own_id, start, BLOCK_G, LAYOUT
        )
        deviation = tl.where(finite, (reward - lowest[:, None]) - offset[:, None], 0.0)
        squares = squares + tl.sum(deviation * deviation, 1)
    return count, members, lowest, highest, offset, squares, successes, leader


@jit
def row_advantage(reward, lowest, offset, factor, max_abs, HAS_MAX_ABS: tl.constexpr):
    """Advantage of one row of a group; 0 where the reward is NaN or infinite."""
    advantage = ((reward - lowest) - offset) * factor
    if HAS_MAX_ABS:
        advantage = tl.minimum(tl.maximum(advantage, -max_abs), max_abs)
    # A factor of 0 means exactly 0: a NaN or an overflow times 0 would not be.
    return tl.where((tl.abs(reward) < float("inf")) & (factor != 0), advantage, 0.0)


@jit
def advantage_of_sequence(
    Rewards,
    Success,
    GroupIds,
    AdvantageOut,
    sequence,
    split,
    n_sequences,
    group_size,
    success_threshold,
    std_correction,
    eps,
    fixed_certainty,
    max_abs,
    SLOTS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    LAYOUT: tl.constexpr,
    HAS_SUCCESS: tl.constexpr,
    HAS_MAX_ABS: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    CERTAINTY: tl.constexpr,
    APD: tl.constexpr,
):
    """A sequence's advantage from its group's rewards, and what its group adds to the metrics."""
    index = sequence + tl.arange(0, 1)  # [1]
    is_first = split + tl.arange(0, 1) == 0
    if LAYOUT == "match":
        first = index * 0
        size = first + n_sequences
        own_id = tl.load(GroupIds + index)
        span = n_sequences
    else:
        first = index // group_size * group_size
        size = index * 0 + group_size
        own_id = index
        span = group_size
    count, members, lowest, highest, offset, squares, successes, leader = group_moments(
        Rewards, Success, GroupIds, GroupIds, first, size, own_id, span, success_threshold,
        1, BLOCK_G, LAYOUT, HAS_SUCCESS,
    )  # fmt: skip
    factor, std, success_ratio, certainty = group_advantage(
        count, lowest, highest, lowest + offset, squares, successes, std_correction, eps,
        fixed_certainty, ESTIMATOR, CERTAINTY, APD,
    )  # fmt: skip
    reward = tl.load(Rewards + index).to(tl.float32)
    advantage = row_advantage(reward, lowest, offset, factor, max_abs, HAS_MAX_ABS)
    tl.store(AdvantageOut + index, advantage, mask=is_first)
    # One program speaks for the group: the first of the group's first row.
    speaks = ((leader == index) & is_first).to(tl.float32)
    counted = speaks * (count > 0).to(tl.float32)
    slots = tl.arange(0, SLOTS)
    sums = tl.where(slots == 10, counted * success_ratio, 0.0)
    sums = tl.where(slots == 11, counted * certainty, sums)
    sums = tl.where(slots == 12, speaks * (factor == 0).to(tl.float32), sums)
    sums = tl.where(slots == 13, speaks * (members - count), sums)
    return tl.sum(advantage, 0), tl.where(slots == 14, counted, sums)


@jit(do_not_specialize=["n_groups"])
def advantages_kernel(
    Rewards,  # [B]
    Success,  # [B] or unused
    GroupIds,  # [B] or unused
    Order,  # [B] or unused
    Starts,  # [B + 1] or unused
    Advantages,  # [B]
    Stats,  # [7, n_groups] or unused
    n_groups,
    group_size,
    success_threshold,
    std_correction,
    eps,
    fixed_certainty,
    max_abs,
    TILE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    LAYOUT: tl.constexpr,
    HAS_SUCCESS: tl.constexpr,
    HAS_STATS: tl.constexpr,
    HAS_MAX_ABS: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    CERTAINTY: tl.constexpr,
    APD: tl.constexpr,
):
    """One tile of groups (of rows in layout `match`): advantages, and statistics if wanted."""
    tile = tl.program_id(0) * TILE
    groups = tile + tl.arange(0, TILE)  # [TILE]
    present = groups < n_groups
    own_id = groups
    if LAYOUT == "order":
        first = tl.load(Starts + groups, mask=present, other=0)
        size = tl.load(Starts + groups + 1, mask=present, other=0) - first
        span = tl.max(size, 0)
    elif LAYOUT == "match":
        first = groups * 0
        size = tl.where(present, n_groups, 0)
        own_id = tl.load(GroupIds + groups, mask=present, other=0)
        span = n_groups
    else:
        first = groups * group_size
        size = tl.where(present, group_size, 0)
        span = group_size
    count, members, lowest, highest, offset, squares, successes, leader = group_moments(
        Rewards, Success, GroupIds, Order, first, size, own_id, span, success_threshold,
        TILE, BLOCK_G, LAYOUT, HAS_SUCCESS,
    )  # fmt: skip
    factor, std, success_ratio, certainty = group_advantage(
        count, lowest, highest, lowest + offset, squares, successes, std_correction, eps,
        fixed_certainty, ESTIMATOR, CERTAINTY, APD,
    )  # fmt: skip
    if LAYOUT == "match":
        reward = tl.load(Rewards + groups, mask=present, other=0.0).to(tl.float32)
        advantage = row_advantage(reward, lowest, offset, factor, max_abs, HAS_MAX_ABS)
        tl.store(Advantages + groups, advantage, mask=present)
    else:
        for start in range(0, span, BLOCK_G):
            rows, member, reward, finite = member_rewards(
                Rewards, GroupIds, Order, first, size, own_id, start, BLOCK_G, LAYOUT
            )
            advantage = row_advantage(
                reward, lowest[:, None], offset[:, None], factor[:, None], max_abs, HAS_MAX_ABS
            )
            tl.store(Advantages + rows, advantage, mask=member)
    if HAS_STATS:
        tl.store(Stats + groups, lowest + offset, mask=present)
        tl.store(Stats + n_groups + groups, std, mask=present)
        tl.store(Stats + 2 * n_groups + groups, success_ratio, mask=present)
        tl.store(Stats + 3 * n_groups + groups, certainty, mask=present)
        tl.store(Stats + 4 * n_groups + groups, count, mask=present)
        tl.store(Stats + 5 * n_groups + groups, members - count, mask=present)
        tl.store(Stats + 6 * n_groups + groups, factor, mask=present)
