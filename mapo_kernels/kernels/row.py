"""Device functions about a row of V logits: its statistics and its gradient.

A row is read twice, and the second time it should still lie in a cache: first its statistics, with
which d loss / d logp of its token is known in closed form, then its gradient, from the end of the
row, which was read last, to its beginning. Between the two every thread works alone: each keeps a
running maximum and running sums of its own columns, so the loops have no barrier.

Exponents are kept in units of log 2, as c x - m with c = log2(e) / temperature in one fused
multiply-add: exact where x and the maximum are large and close.
"""

from typing import Any, NamedTuple

from mapo_kernels._triton import jit, tl
from mapo_kernels.formula import certain_elsewhere, exp, row_summary


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
def tile_columns(THREADS: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr):
    """Columns [THREADS, VECTOR] of a tile: each thread has its own, and a maximum of them.

    They are adjacent where a row is aligned to 16 bytes, which a thread reads at once. Elsewhere
    neighbouring threads read neighbouring columns.
    """
    if WIDE:
        columns = tl.arange(0, THREADS)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    else:
        columns = tl.arange(0, THREADS)[:, None] + tl.arange(0, VECTOR)[None, :] * THREADS
    return columns


@jit
def load_tile(Row, offs, vocab, target, MASKED: tl.constexpr):
    """One tile of a row in float32; if MASKED, -inf at the target and beyond the row."""
    if MASKED:
        x = tl.load(
            Row + offs, mask=offs < vocab, other=float("-inf"), eviction_policy="evict_last"
        )
        x = tl.where(offs == target, float("-inf"), x.to(tl.float32))
    else:
        x = tl.load(Row + offs, eviction_policy="evict_last").to(tl.float32)
    return x


@jit
def fold_block(
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
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Add two tiles to every thread's running maximum, sum of 2^d and sum of 2^d d."""
    offs = start + tile_columns(THREADS, VECTOR, WIDE)
    x0 = load_tile(Row, offs, vocab, target, MASKED)
    x1 = load_tile(Row, offs + THREADS * VECTOR, vocab, target, MASKED)
    new_top = tl.maximum(top, tl.maximum(tl.max(x0, 1), tl.max(x1, 1)) * c)
    fade = tl.exp2(top - new_top)
    d0 = tl.fma(x0, c, -new_top[:, None])
    d1 = tl.fma(x1, c, -new_top[:, None])
    e0 = tl.exp2(d0)
    e1 = tl.exp2(d1)
    if HAS_ENTROPY:
        # 2^-inf times -inf is meant to be 0.
        products = tl.fma(e0, tl.maximum(d0, -1e30), e1 * tl.maximum(d1, -1e30))
        weighted = tl.fma(total, top - new_top, weighted) * fade + tl.sum(products, 1)
    total = tl.fma(total, fade, tl.sum(e0 + e1, 1))
    return new_top, total, weighted


@jit
def row_sums(
    Row,
    target,
    vocab,
    c,
    absent,
    HAS_ENTROPY: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Read a row once. `target` is its token id, or -1 where it has none: its logit is `absent`.

    Returns (reference m in units of log 2, then what `row_summary` takes: others, weighted, gap),
    and the target's logit.
    """
    BLOCK: tl.constexpr = 2 * THREADS * VECTOR
    # Not -inf, which would make NaN of the first difference; and not so low that the exponents of a
    # thread's own columns lose their digits, and overflow. A row that lies lower `loses_digits`.
    top = tl.full([THREADS], -134217728.0, tl.float32)
    total = tl.zeros([THREADS], tl.float32)
    weighted = tl.zeros([THREADS], tl.float32)
    n_full = vocab // BLOCK
    # The target stays out of the sums, so its block is left to the masked loop.
    inside = (target >= 0) & (target < n_full * BLOCK)
    own = tl.where(inside, target // BLOCK, n_full)
    for i in range(0, n_full - tl.where(inside, 1, 0)):
        start = (i + tl.where(i >= own, 1, 0)) * BLOCK
        top, total, weighted = fold_block(
            Row, start, top, total, weighted, c, vocab, target, False, HAS_ENTROPY,
            THREADS, VECTOR, WIDE,
        )  # fmt: skip
    for k in range(tl.where(inside, 0, 1), tl.where(n_full * BLOCK < vocab, 2, 1)):
        start = tl.where(k == 0, own, n_full) * BLOCK
        top, total, weighted = fold_block(
            Row, start, top, total, weighted, c, vocab, target, True, HAS_ENTROPY,
            THREADS, VECTOR, WIDE,
        )  # fmt: skip
    index = target + tl.arange(0, 1)
    x = tl.load(Row + index, mask=index >= 0, other=absent).to(tl.float32)
    x = tl.sum(x, 0)
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
def largest_logit(
    Row, target, vocab, THREADS: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr
):
    """The largest column of a row but for `target`; -1 leaves none out."""
    top = tl.full([THREADS], float("-inf"), tl.float32)
    for start in range(0, vocab, THREADS * VECTOR):
        x = load_tile(Row, start + tile_columns(THREADS, VECTOR, WIDE), vocab, target, True)
        top = tl.maximum(top, tl.max(x, 1))
    return tl.max(top, 0)


@jit
def exact_sums(
    Row, target, own, vocab, c, THREADS: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr
):
    """What `row_summary` takes, by exact differences from the largest logit: two more readings.

    For the few rows that need it; `own` is the target's logit.
    Returns (others, tail, weighted, gap).
    """
    largest = largest_logit(Row, target, vocab, THREADS, VECTOR, WIDE)
    base = tl.maximum(largest, own)
    gap = (own - base) * c
    others = tl.zeros([THREADS], tl.float32)
    tail = tl.zeros([THREADS], tl.float32)
    weighted = tl.zeros([THREADS], tl.float32)
    for start in range(0, vocab, THREADS * VECTOR):
        x = load_tile(Row, start + tile_columns(THREADS, VECTOR, WIDE), vocab, target, True)
        d = (x - base) * c
        power = tl.exp2(d)
        others = others + tl.sum(power, 1)
        tail = tail + tl.sum(tl.where(x < largest, power, 0.0), 1)
        weighted = weighted + tl.sum(power * tl.maximum(d, -1e30), 1)
    weighted = tl.sum(weighted, 0) * 0.6931471805599453
    return tl.sum(others, 0), tl.sum(tail, 0), weighted, gap * 0.6931471805599453


@jit
def row_statistics(
    Row,
    target,
    vocab,
    c,
    HAS_ENTROPY: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
):
    """(reference, total, logp, rest, entropy) of a whole row: NaN where it has no target."""
    reference, others, weighted, gap, own = row_sums(
        Row, target, vocab, c, float("nan"), HAS_ENTROPY, THREADS, VECTOR, WIDE
    )
    logp, rest, total, entropy = row_summary(others, others - 1.0, weighted, gap)
    is_coarse = loses_digits(reference) & (target >= 0)
    if is_coarse | (HAS_ENTROPY & certain_elsewhere(others, gap)):
        others, tail, weighted, gap = exact_sums(Row, target, own, vocab, c, THREADS, VECTOR, WIDE)
        exact_logp, exact_rest, exact_total, entropy = row_summary(others, tail, weighted, gap)
        if is_coarse:
            logp = exact_logp
            rest = exact_rest
            total = exact_total
    return reference, total, logp, rest, entropy


@jit
def narrow(x, dtype: tl.constexpr, CONVERTS: tl.constexpr):
    """`x` rounded to nearest, ties to even, in the dtype of the gradient.

    Where the hardware has no conversion to bfloat16, as on CDNA3, the compiler's own takes five
    instructions, of which two keep a NaN from overflowing. One that stems from bfloat16 cannot.
    Without this the gradient's loop is over its budget of instructions there (`test_codegen.py`).
    """
    if dtype == tl.bfloat16 and not CONVERTS:
        bits = x.to(tl.int32, bitcast=True)
        bits = bits + 32767 + ((bits >> 16) & 1)
        y = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(dtype)
    return y


@jit
def write_zeros(Out, vocab, THREADS: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr):
    """The gradient of a row that needs none."""
    zeros = tl.zeros([THREADS, VECTOR], Out.dtype.element_ty)
    for start in range(0, vocab, THREADS * VECTOR):
        offs = start + tile_columns(THREADS, VECTOR, WIDE)
        tl.store(Out + offs, zeros, mask=offs < vocab)


@jit
def gradient_tile(
    Row,
    Out,
    offs,
    vocab,
    c,
    reference,
    factor,
    tilt,
    MASKED: tl.constexpr,
    EXACT: tl.constexpr,
    CONVERTS: tl.constexpr,
):
    """2^d (factor + tilt d) of one tile of a row, to where the gradient goes; tilt may be None.

    `reference` is a logit if EXACT, else c times it.
    """
    if MASKED:
        x = tl.load(
            Row + offs, mask=offs < vocab, other=float("-inf"), eviction_policy="evict_first"
        )
    else:
        x = tl.load(Row + offs, eviction_policy="evict_first")
    if EXACT:
        d = (x.to(tl.float32) - reference) * c
    else:
        d = tl.fma(x.to(tl.float32), c, -reference)
    if tilt is not None:
        grad = tl.exp2(d) * tl.fma(tl.maximum(d, -1e30), tilt, factor)
    else:
        grad = tl.exp2(d) * factor
    grad = narrow(grad, Out.dtype.element_ty, CONVERTS)
    if MASKED:
        tl.store(Out + offs, grad, mask=offs < vocab, eviction_policy="evict_first")
    else:
        tl.store(Out + offs, grad, eviction_policy="evict_first")


@jit
def write_gradient(
    Row,
    Out,
    target,
    vocab,
    c,
    reference,
    total,
    logp,
    rest,
    entropy,
    slope,
    bonus,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    CONVERTS: tl.constexpr,
):
    """Read a row again and write d loss / d logits, from `slope` = d loss / d logp.

    With p the row's probabilities, H its entropy, `bonus` the weight of the entropy bonus, or None:
    slope (1[j = y] - p_j) + bonus p_j (log p_j + H), over the temperature. Out may be Row.
    """
    per_logit = c * 0.6931471805599453
    slope = slope * per_logit
    factor = -slope / total
    tilt = None
    at_target = slope * rest
    if bonus is not None:
        bonus = bonus * per_logit
        factor = factor + bonus * (entropy - tl.log(total)) / total
        tilt = bonus * 0.6931471805599453 / total
        at_target = at_target + bonus * exp(logp) * (tl.maximum(logp, -1e30) + entropy)
    tile = tile_columns(THREADS, VECTOR, WIDE)
    n_full = vocab // (2 * THREADS * VECTOR)
    if loses_digits(reference):
        base = largest_logit(Row, -1, vocab, THREADS, VECTOR, WIDE)
        for start in range(0, vocab, THREADS * VECTOR):
            gradient_tile(
                Row, Out, start + tile, vocab, c, base, factor, tilt, True, True,
                CONVERTS,
            )  # fmt: skip
        n_full = 0
    else:
        for start in range(n_full * (2 * THREADS * VECTOR), vocab, THREADS * VECTOR):
            gradient_tile(
                Row, Out, start + tile, vocab, c, reference, factor, tilt, True, False,
                CONVERTS,
            )  # fmt: skip
    for i in range(0, n_full):
        start = (n_full - 1 - i) * (2 * THREADS * VECTOR)
        for u in tl.static_range(2):
            offs = start + u * (THREADS * VECTOR) + tile
            gradient_tile(Row, Out, offs, vocab, c, reference, factor, tilt, False, False, CONVERTS)
    # Another thread wrote the target's column, so this one waits for it.
    tl.debug_barrier()
    index = target + tl.arange(0, 1)
    value = tl.zeros([1], tl.float32) + at_target
    tl.store(Out + index, value.to(Out.dtype.element_ty), mask=index >= 0)
