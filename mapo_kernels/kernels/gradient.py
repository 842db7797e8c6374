"""Device functions about the second reading of a row: its gradient."""

from mapo_kernels._triton import jit, tl
from mapo_kernels.formula import exp
from mapo_kernels.kernels.row import largest_logit, logit_of, loses_digits, tile_columns


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
def write_zeros(Out, vocab, TILE: tl.constexpr):
    """The gradient of a row that needs none."""
    zeros = tl.full([TILE.threads, TILE.vector], 0.0, Out.dtype.element_ty)
    for start in range(0, vocab, TILE.columns):
        offs = start + tile_columns(TILE)
        tl.store(Out + offs, zeros, mask=offs < vocab)


@jit
def gradient_of(
    x, offs, inside, rows, dtype: tl.constexpr, c, reference, factor, tilt,
    EXACT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """2^d (factor + tilt d) of some logits, by what lies in their row; tilt may be None.

    `reference` is a logit if EXACT, else c times it.
    """
    x, r = logit_of(x, offs, inside, rows)
    if EXACT:
        d = (x - reference) * c
    else:
        d = tl.fma(x, c, -reference)
    if tilt is not None:
        grad = tl.exp2(d) * tl.fma(tl.maximum(d, -1e30), tilt, factor)
    else:
        grad = tl.exp2(d) * factor
    if rows.softcap is not None:
        grad = grad * r
    return narrow(grad, dtype, TILE.converts)


@jit
def gradient_step(rows, Row, Out, start, c, reference, factor, tilt, TILE: tl.constexpr):
    """The gradient of a step's tiles, to where it goes: which may be where they came from."""
    TILES: tl.constexpr = TILE.number
    offs = start + tile_columns(TILE)
    tiles = ()
    for u in tl.static_range(TILES):
        x = tl.load(Row + offs + u * TILE.columns, eviction_policy=TILE.second_hint)
        tiles = tiles + (x,)
    for u in tl.static_range(TILES):
        own = offs + u * TILE.columns
        grad = gradient_of(
            tiles[u], own, True, rows, Out.dtype.element_ty, c, reference, factor, tilt, False, TILE
        )
        tl.store(Out + own, grad, eviction_policy=TILE.second_hint)


@jit
def gradient_rest(
    rows,
    Row,
    Out,
    start,
    vocab,
    c,
    reference,
    factor,
    tilt,
    EXACT: tl.constexpr,
    TILE: tl.constexpr,
):
    """The same of a row from `start` on, tile by tile."""
    for first in range(start, vocab, TILE.columns):
        offs = first + tile_columns(TILE)
        inside = offs < vocab
        x = tl.load(Row + offs, mask=inside, other=float("-inf"), eviction_policy=TILE.second_hint)
        grad = gradient_of(
            x, offs, inside, rows, Out.dtype.element_ty, c, reference, factor, tilt, EXACT, TILE
        )
        tl.store(Out + offs, grad, mask=inside, eviction_policy=TILE.second_hint)


@jit
def write_gradient(
    rows,
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
    TILE: tl.constexpr,
):
    """Read a row again and write d loss / d what lies there, from `slope` = d loss / d logp.

    With p the row's probabilities, H its entropy, `bonus` the weight of the entropy bonus, or None:
    slope (1[j = y] - p_j) + bonus p_j (log p_j + H), over the temperature. Out may be Row.
    """
    per_logit = c * 0.6931471805599453
    index = target + tl.arange(0, 1)
    if rows.softcap is not None:
        # The derivative of a logit is 4 scale r (1 - r).
        per_logit = per_logit * (rows.slope * rows.softcap * 1.3862943611198906)
        own = tl.load(Row + index, mask=index >= 0, other=0.0)
        _, r = logit_of(own, index, index >= 0, rows)
        # Another thread will write there.
        tl.debug_barrier()
    slope = slope * per_logit
    factor = -slope / total
    tilt = None
    at_target = slope * rest
    if bonus is not None:
        bonus = bonus * per_logit
        factor = factor + bonus * (entropy - tl.log(total)) / total
        tilt = bonus * 0.6931471805599453 / total
        at_target = at_target + bonus * exp(logp) * (tl.maximum(logp, -1e30) + entropy)
    n_full = vocab // TILE.step
    full = n_full * TILE.step
    if loses_digits(reference):
        base = largest_logit(rows, Row, -1, vocab, TILE)
        gradient_rest(rows, Row, Out, 0, vocab, c, base, factor, tilt, True, TILE)
        n_full = 0
    elif TILE.backwards:
        gradient_rest(rows, Row, Out, full, vocab, c, reference, factor, tilt, False, TILE)
    for i in range(0, n_full):
        k = i
        if TILE.backwards:
            k = n_full - 1 - i
        gradient_step(rows, Row, Out, k * TILE.step, c, reference, factor, tilt, TILE)
    if not TILE.backwards and not loses_digits(reference):
        gradient_rest(rows, Row, Out, full, vocab, c, reference, factor, tilt, False, TILE)
    # Another thread wrote the target's column, so this one waits for it.
    tl.debug_barrier()
    value = tl.zeros([1], tl.float32) + at_target
    if rows.softcap is not None:
        value = value * r
    tl.store(Out + index, value.to(Out.dtype.element_ty), mask=index >= 0)
