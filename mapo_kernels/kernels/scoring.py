"""The kernels that need no more than a row of logits: scoring, gradient, rescaling."""

from mapo_kernels._triton import jit, tl
from mapo_kernels.kernels.row import row_statistics, tile_columns, write_gradient, write_zeros


@jit
def load_target(TokenIds, vocab):
    """The token id of a row, -1 if it does not exist."""
    token = tl.load(TokenIds)
    return tl.where((token >= 0) & (token < vocab), token, -1).to(tl.int32)


@jit
def load_exponent(Temperature, index, c, HAS_TEMPERATURE: tl.constexpr):
    """log2(e) / temperature: the given number, or from a tensor of temperatures."""
    if HAS_TEMPERATURE:
        c = 1.4426950408889634 / tl.load(Temperature + index).to(tl.float32)
    return c


@jit(do_not_specialize=["n", "length", "per_temperature"])
def score_kernel(
    Logits,  # n rows of V
    TokenIds,  # [n]
    Temperature,  # [n / per_temperature]
    Mask,  # [n]
    Table,  # [COLUMNS, n]
    n,
    length,
    per_temperature,
    vocab,
    stride_row,
    stride_sequence,
    c,
    HAS_MASK: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    COLUMNS: tl.constexpr,  # 1: log-probs; 2: entropies too; 5: all that the gradient needs
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Statistics of a row; all 0, and nothing read, where it is masked."""
    row = tl.program_id(0)
    valid = 1
    if HAS_MASK:
        valid = (tl.load(Mask + row) != 0).to(tl.int32)
    logp = 0.0
    entropy = 0.0
    reference = 0.0
    total = 1.0
    rest = 0.0
    if valid > 0:
        Row = Logits + (
            row.to(tl.int64) * stride_row + (row // length).to(tl.int64) * stride_sequence
        )
        target = load_target(TokenIds + row, vocab)
        c = load_exponent(Temperature, row // per_temperature, c, HAS_TEMPERATURE)
        reference, total, logp, rest, entropy = row_statistics(
            Row, target, vocab, c, COLUMNS > 1, THREADS, VECTOR, WIDE
        )
    tl.store(Table + row, logp)
    if COLUMNS > 1:
        tl.store(Table + n + row, entropy)
    if COLUMNS > 2:
        tl.store(Table + 2 * n + row, reference)
        tl.store(Table + 3 * n + row, total)
        tl.store(Table + 4 * n + row, rest)


@jit(do_not_specialize=["n", "length", "per_temperature"])
def gradient_kernel(
    Logits,  # n rows of V
    Grad,  # n rows of V
    TokenIds,  # [n]
    Temperature,  # [n / per_temperature]
    Mask,  # [n]
    Table,  # [5, n]
    Slope,  # [n]
    Bonus,  # [n]
    Results,  # [SLOTS]
    n,
    length,
    per_temperature,
    vocab,
    stride_row,
    stride_sequence,
    stride_grad,
    gap_grad,
    c,
    HAS_MASK: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_BONUS: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    CONVERTS: tl.constexpr,
):
    """Gradient of a row whose statistics and d loss / d logp (but for the batch's scale) exist."""
    row = tl.program_id(0)
    wide = row.to(tl.int64)
    sequence = (row // length).to(tl.int64)
    Out = Grad + (wide * stride_grad + sequence * gap_grad)
    valid = 1
    if HAS_MASK:
        valid = (tl.load(Mask + row) != 0).to(tl.int32)
    scale = tl.load(Results)
    slope = 0.0
    if valid > 0:
        slope = tl.load(Slope + row)
    if not HAS_BONUS:
        valid = valid * tl.where(slope != 0, 1, 0)
    if valid > 0:
        target = load_target(TokenIds + row, vocab)
        c = load_exponent(Temperature, row // per_temperature, c, HAS_TEMPERATURE)
        bonus = 0.0
        if HAS_BONUS:
            bonus = tl.load(Bonus + row) * scale
        write_gradient(
            Logits + (wide * stride_row + sequence * stride_sequence), Out, target, vocab, c,
            tl.load(Table + 2 * n + row), tl.load(Table + 3 * n + row), tl.load(Table + row),
            tl.load(Table + 4 * n + row), tl.load(Table + n + row), slope * scale,
            bonus, HAS_BONUS, THREADS, VECTOR, WIDE, CONVERTS,
        )  # fmt: skip
    else:
        write_zeros(Out, vocab, THREADS, VECTOR, WIDE)


@jit(do_not_specialize=["n", "length"])
def rescale_kernel(
    Grad,  # n rows of V
    Upstream,  # []
    n,
    length,
    vocab,
    stride_row,
    stride_sequence,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Backward: multiply the gradient by the upstream gradient, unless that is 1."""
    factor = tl.load(Upstream).to(tl.float32)
    if factor != 1.0:
        for row in range(tl.program_id(0), n, tl.num_programs(0)):
            # The counter may be a plain number, which has no `.to`.
            wide = tl.zeros([], tl.int64) + row
            Row = Grad + (wide * stride_row + (wide // length) * stride_sequence)
            for start in range(0, vocab, THREADS * VECTOR):
                offs = start + tile_columns(THREADS, VECTOR, WIDE)
                x = tl.load(Row + offs, mask=offs < vocab).to(tl.float32)
                # What is exactly 0 stays so, whatever the factor.
                x = tl.where(x == 0, 0.0, x * factor)
                tl.store(Row + offs, x.to(Grad.dtype.element_ty), mask=offs < vocab)
