"""Device functions about a row of V logits: where it is, how to go over it, its statistics.

A row is read twice, and the second time it should still lie in a cache: first its statistics, with
which d loss / d logp of its token is known in closed form, then its gradient, from the end of the
row, which was read last, to its beginning. Between the two every thread works alone: each keeps a
running maximum and running sums of its own columns, so the loops have no barrier.

Exponents are kept in units of log 2, as c x - m with c = log2(e) / temperature in one fused
multiply-add: exact where x and the maximum are large and close.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from mapo_kernels._triton import jit, tl
from mapo_kernels.formula import certain_elsewhere, row_summary


@dataclass(frozen=True)
class Tile:
    """How a program goes over a row; part of what a kernel is compiled for.

    Attributes:
        threads: of the program; each has the same columns of every tile.
        vector: columns of a thread in a tile, 16 bytes of them.
        wide: whether rows are aligned to 16 bytes, so that a thread reads its columns at once.
        number: of tiles in a step, all read before anything of them is written.
        first_hint: eviction policy of the first reading.
        second_hint: the same of the second, which is the last.
        backwards: whether the second reading begins at the end of the row, which was read last.
        converts: whether the GPU has an instruction that rounds to bfloat16.
    """

    threads: int
    vector: int
    wide: bool
    number: int
    first_hint: str
    second_hint: str
    backwards: bool
    converts: bool

    @property
    def columns(self) -> int:
        """Columns of a tile."""
        return self.threads * self.vector

    @property
    def step(self) -> int:
        """Columns of a step."""
        return self.columns * self.number


class Matrix(NamedTuple):
    """Rows of V: pointer, stride of a row, and what is added to it between two sequences."""

    pointer: Any
    stride: Any
    stride_sequence: Any


class Rows(NamedTuple):
    """n rows of logits, and what says which log-prob of each is asked for."""

    logits: Any  # Matrix
    token_ids: Any  # [n]
    temperature: Any = None  # one for one or several rows, or None where `c` is one number
    mask: Any = None  # [n], or None
    bias: Any = None  # [V] that is added to a row, or None
    softcap: Any = None  # what a logit stays below, or None
    slope: Any = None  # 2 log2(e) scale / softcap


@jit
def row_of(matrix, row, sequence):
    """Where a row of a matrix begins."""
    # A counter may be a plain number, which has no `.to`.
    zero = tl.zeros([], tl.int64)
    return matrix.pointer + (
        (zero + row) * matrix.stride + (zero + sequence) * matrix.stride_sequence
    )


@jit
def is_valid(mask, row):
    """1 for a row that is not masked, else 0."""
    valid = 1
    if mask is not None:
        valid = (tl.load(mask + row) != 0).to(tl.int32)
    return valid


@jit
def target_of(rows, row, vocab):
    """The token id of a row, -1 if it does not exist."""
    token = tl.load(rows.token_ids + row)
    return tl.where((token >= 0) & (token < vocab), token, -1).to(tl.int32)


@jit
def exponent_of(rows, index, c):
    """log2(e) / temperature: the given number, or from a tensor of temperatures."""
    if rows.temperature is not None:
        c = 1.4426950408889634 / tl.load(rows.temperature + index).to(tl.float32)
    return c


@jit
def tile_columns(TILE: tl.constexpr):
    """Columns [threads, vector] of a tile: each thread has its own, and a maximum of them.

    They are adjacent where a row is aligned to 16 bytes, which a thread reads at once. Elsewhere
    neighbouring threads read neighbouring columns.
    """
    thread = tl.arange(0, TILE.threads)[:, None]
    place = tl.arange(0, TILE.vector)[None, :]
    if TILE.wide:
        columns = thread * TILE.vector + place
    else:
        columns = thread + place * TILE.threads
    return columns


@jit
def logit_of(x, offs, inside, rows):
    """Logits from what lies in a row, in float32, and what their derivative is softcap times.

    softcap tanh(scale x / softcap) is softcap (1 - 2 r) with r = 1 / (1 + e^(2 scale x / softcap)),
    and its derivative scale 4 r (1 - r).
    """
    x = x.to(tl.float32)
    r = x
    if rows.bias is not None:
        x = x + tl.load(rows.bias + offs, mask=inside, other=0.0).to(tl.float32)
    if rows.softcap is not None:
        r = 1.0 / (1.0 + tl.exp2(x * rows.slope))
        x = rows.softcap * tl.fma(r, -2.0, 1.0)
        r = r * (1.0 - r)
    return x, r


@jit
def load_tile(rows, Row, offs, vocab, target, MASKED: tl.constexpr, TILE: tl.constexpr):
    """One tile of a row in float32; if MASKED, -inf at the target and beyond the row."""
    if MASKED:
        inside = offs < vocab
        x = tl.load(Row + offs, mask=inside, other=float("-inf"), eviction_policy=TILE.first_hint)
        x, _ = logit_of(x, offs, inside, rows)
        x = tl.where(inside & (offs != target), x, float("-inf"))
    else:
        x = tl.load(Row + offs, eviction_policy=TILE.first_hint)
        x, _ = logit_of(x, offs, True, rows)
    return x


@jit
def fold_step(
    rows,
    Row,
    start,
    top,
    total,
    weighted,
    c,
    vocab,
    target,
    MASKED: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    TILE: tl.constexpr,
):
    """Add a step's tiles to every thread's running maximum, sum of 2^d and sum of 2^d d."""
    TILES: tl.constexpr = TILE.number
    offs = start + tile_columns(TILE)
    tiles = ()
    for u in tl.static_range(TILES):
        tiles = tiles + (
            load_tile(rows, Row, offs + u * TILE.columns, vocab, target, MASKED, TILE),
        )
    highest = tl.max(tiles[0], 1)
    for u in tl.static_range(1, TILES):
        highest = tl.maximum(highest, tl.max(tiles[u], 1))
    new_top = tl.maximum(top, highest * c)
    fade = tl.exp2(top - new_top)
    d = tl.fma(tiles[0], c, -new_top[:, None])
    powers = tl.exp2(d)
    # 2^-inf times -inf is meant to be 0.
    products = powers * tl.maximum(d, -1e30)
    for u in tl.static_range(1, TILES):
        d = tl.fma(tiles[u], c, -new_top[:, None])
        power = tl.exp2(d)
        powers = powers + power
        products = tl.fma(power, tl.maximum(d, -1e30), products)
    if HAS_ENTROPY:
        weighted = tl.fma(total, top - new_top, weighted) * fade + tl.sum(products, 1)
    total = tl.fma(total, fade, tl.sum(powers, 1))
    return new_top, total, weighted


@jit
def row_sums(
    rows,
    Row,
    target,
    vocab,
    c,
    absent,
    HAS_ENTROPY: tl.constexpr,
    TILE: tl.constexpr,
):
    """Read a row once. `target` is its token id, or -1 where it has none: its logit is `absent`.

    Returns (reference m in units of log 2, then what `row_summary` takes: others, weighted, gap),
    and the target's logit.
    """
    # Not -inf, which would make NaN of the first difference; and not so low that the exponents of a
    # thread's own columns lose their digits, and overflow. A row that lies lower `loses_digits`.
    top = tl.full([TILE.threads], -134217728.0, tl.float32)
    # tl.zeros of Triton 3.6 takes no shape from a field.
    total = tl.full([TILE.threads], 0.0, tl.float32)
    weighted = tl.full([TILE.threads], 0.0, tl.float32)
    n_full = vocab // TILE.step
    # The target stays out of the sums, so its block is left to the masked loop.
    inside = (target >= 0) & (target < n_full * TILE.step)
    own = tl.where(inside, target // TILE.step, n_full)
    for i in range(0, n_full - tl.where(inside, 1, 0)):
        start = (i + tl.where(i >= own, 1, 0)) * TILE.step
        top, total, weighted = fold_step(
            rows, Row, start, top, total, weighted, c, vocab, target, False, HAS_ENTROPY,
            TILE,
        )  # fmt: skip
    for k in range(tl.where(inside, 0, 1), tl.where(n_full * TILE.step < vocab, 2, 1)):
        start = tl.where(k == 0, own, n_full) * TILE.step
        top, total, weighted = fold_step(
            rows, Row, start, top, total, weighted, c, vocab, target, True, HAS_ENTROPY,
            TILE,
        )  # fmt: skip
    index = target + tl.arange(0, 1)
    has_target = index >= 0
    x, _ = logit_of(tl.load(Row + index, mask=has_target, other=0.0), index, has_target, rows)
    x = tl.sum(tl.where(has_target, x, absent), 0)
    reference = tl.maximum(tl.max(top, 0), x * c)
    fade = tl.exp2(top - reference)
    others = tl.sum(total * fade, 0)
    weighted = tl.sum(tl.fma(total, top - reference, weighted) * fade, 0)
    gap = tl.fma(x, c, -reference)
    return reference, others, weighted * 0.6931471805599453, gap * 0.6931471805599453, x


@jit
def loses_digits(reference):
    """Whether exponents c x - m are too coarse: m is beyond 2^26, where its last bit is 8."""
    # Written so that a NaN does, too.
    return (tl.abs(reference) <= 67108864.0) == 0


@jit
def largest_logit(rows, Row, target, vocab, TILE: tl.constexpr):
    """The largest column of a row but for `target`; -1 leaves none out."""
    top = tl.full([TILE.threads], float("-inf"), tl.float32)
    for start in range(0, vocab, TILE.columns):
        x = load_tile(rows, Row, start + tile_columns(TILE), vocab, target, True, TILE)
        top = tl.maximum(top, tl.max(x, 1))
    return tl.max(top, 0)


@jit
def exact_sums(rows, Row, target, own, vocab, c, TILE: tl.constexpr):
    """What `row_summary` takes, by exact differences from the largest logit: two more readings.

    For the few rows that need it; `own` is the target's logit.
    Returns (others, tail, weighted, gap).
    """
    largest = largest_logit(rows, Row, target, vocab, TILE)
    base = tl.maximum(largest, own)
    gap = (own - base) * c
    others = tl.full([TILE.threads], 0.0, tl.float32)
    tail = tl.full([TILE.threads], 0.0, tl.float32)
    weighted = tl.full([TILE.threads], 0.0, tl.float32)
    for start in range(0, vocab, TILE.columns):
        x = load_tile(rows, Row, start + tile_columns(TILE), vocab, target, True, TILE)
        d = (x - base) * c
        power = tl.exp2(d)
        others = others + tl.sum(power, 1)
        tail = tail + tl.sum(tl.where(x < largest, power, 0.0), 1)
        weighted = weighted + tl.sum(power * tl.maximum(d, -1e30), 1)
    weighted = tl.sum(weighted, 0) * 0.6931471805599453
    return tl.sum(others, 0), tl.sum(tail, 0), weighted, gap * 0.6931471805599453


@jit
def row_statistics(
    rows,
    Row,
    target,
    vocab,
    c,
    HAS_ENTROPY: tl.constexpr,
    TILE: tl.constexpr,
):
    """(reference, total, logp, rest, entropy) of a whole row: NaN where it has no target."""
    reference, others, weighted, gap, own = row_sums(
        rows, Row, target, vocab, c, float("nan"), HAS_ENTROPY, TILE
    )
    logp, rest, total, entropy = row_summary(others, None, weighted, gap)
    is_coarse = loses_digits(reference) & (target >= 0)
    if is_coarse | (HAS_ENTROPY & certain_elsewhere(others, gap)):
        others, tail, weighted, gap = exact_sums(rows, Row, target, own, vocab, c, TILE)
        exact_logp, exact_rest, exact_total, entropy = row_summary(others, tail, weighted, gap)
        if is_coarse:
            logp = exact_logp
            rest = exact_rest
            total = exact_total
    return reference, total, logp, rest, entropy
