"""The kernels that need no more than a row of logits: scoring, gradient, rescaling."""

from mapo_kernels._triton import jit, tl
from mapo_kernels.kernels.gradient import write_gradient, write_zeros
from mapo_kernels.kernels.row import (
    exponent_of,
    is_valid,
    row_of,
    row_statistics,
    target_of,
    tile_columns,
)


@jit(do_not_specialize=["n", "length", "per_temperature"])
def score_kernel(
    rows,  # Rows
    Table,  # [COLUMNS, n]
    n,
    length,
    per_temperature,
    vocab,
    c,
    COLUMNS: tl.constexpr,  # 1: log-probs; 2: entropies too; 5: all that the gradient needs
    TILE: tl.constexpr,
):
    """Statistics of a row; all 0, and nothing read, where it is masked."""
    row = tl.program_id(0)
    logp = 0.0
    entropy = 0.0
    reference = 0.0
    total = 1.0
    rest = 0.0
    if is_valid(rows.mask, row) > 0:
        reference, total, logp, rest, entropy = row_statistics(
            rows, row_of(rows.logits, row, row // length), target_of(rows, row, vocab), vocab,
            exponent_of(rows, row // per_temperature, c), COLUMNS > 1, TILE,
        )  # fmt: skip
    tl.store(Table + row, logp)
    if COLUMNS > 1:
        tl.store(Table + n + row, entropy)
    if COLUMNS > 2:
        tl.store(Table + 2 * n + row, reference)
        tl.store(Table + 3 * n + row, total)
        tl.store(Table + 4 * n + row, rest)


@jit(do_not_specialize=["n", "length", "per_temperature"])
def gradient_kernel(
    rows,  # Rows
    out,  # Matrix, which may be that of the logits
    Table,  # [5, n]
    Slope,  # [n]
    Bonus,  # [n], or None
    Results,  # [SLOTS]
    n,
    length,
    per_temperature,
    vocab,
    c,
    TILE: tl.constexpr,
):
    """Gradient of a row whose statistics and d loss / d logp (but for the batch's scale) exist."""
    row = tl.program_id(0)
    sequence = row // length
    valid = is_valid(rows.mask, row)
    scale = tl.load(Results)
    slope = 0.0
    if valid > 0:
        slope = tl.load(Slope + row)
    if Bonus is None:
        valid = valid * tl.where(slope != 0, 1, 0)
    Out = row_of(out, row, sequence)
    if valid > 0:
        bonus = None
        if Bonus is not None:
            bonus = tl.load(Bonus + row) * scale
        write_gradient(
            rows, row_of(rows.logits, row, sequence), Out, target_of(rows, row, vocab), vocab,
            exponent_of(rows, row // per_temperature, c), tl.load(Table + 2 * n + row),
            tl.load(Table + 3 * n + row), tl.load(Table + row), tl.load(Table + 4 * n + row),
            tl.load(Table + n + row), slope * scale, bonus,
            TILE,
        )  # fmt: skip
    else:
        write_zeros(Out, vocab, TILE)


@jit(do_not_specialize=["n", "length"])
def rescale_kernel(
    grad,  # Matrix
    Upstream,  # []
    n,
    length,
    vocab,
    TILE: tl.constexpr,
):
    """Backward: multiply the gradient by the upstream gradient, unless that is 1."""
    factor = tl.load(Upstream).to(tl.float32)
    if factor != 1.0:
        for row in range(tl.program_id(0), n, tl.num_programs(0)):
            Row = row_of(grad, row, row // length)
            for start in range(0, vocab, TILE.columns):
                offs = start + tile_columns(TILE)
                x = tl.load(Row + offs, mask=offs < vocab).to(tl.float32)
                # What is exactly 0 stays so, whatever the factor.
                x = tl.where(x == 0, 0.0, x * factor)
                tl.store(Row + offs, x.to(Row.dtype.element_ty), mask=offs < vocab)
