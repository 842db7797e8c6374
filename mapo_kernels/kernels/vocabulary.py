"""The kernel of rows that are split over ranks: what one rank's columns contribute to a row."""

from mapo_kernels._triton import jit, tl
from mapo_kernels.formula import certain_elsewhere, log1p
from mapo_kernels.kernels.row import exact_sums, row_sums
from mapo_kernels.kernels.scoring import load_exponent, load_target


@jit(do_not_specialize=["n", "length", "per_temperature"])
def share_kernel(
    Logits,  # n rows of this rank's columns
    TokenIds,  # [n], counted from this rank's first column
    Temperature,  # [n / per_temperature]
    Mask,  # [n]
    Table,  # [COLUMNS, n]
    n,
    length,
    per_temperature,
    columns,
    stride_row,
    stride_sequence,
    c,
    HAS_MASK: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    COLUMNS: tl.constexpr,  # 3: reference, others, gap; 4: entropy of the others, too
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Sums over some columns of a row; all 0, and nothing read, where it is masked."""
    row = tl.program_id(0)
    valid = 1
    if HAS_MASK:
        valid = (tl.load(Mask + row) != 0).to(tl.int32)
    reference = 0.0
    others = 0.0
    distance = 0.0
    entropy = 0.0
    if valid > 0:
        Row = Logits + (
            row.to(tl.int64) * stride_row + (row // length).to(tl.int64) * stride_sequence
        )
        target = load_target(TokenIds + row, columns)
        c = load_exponent(Temperature, row // per_temperature, c, HAS_TEMPERATURE)
        # A target on another rank is as far below every column here as can be.
        reference, others, weighted, distance, own = row_sums(
            Row, target, columns, c, float("-inf"), COLUMNS > 3, THREADS, VECTOR, WIDE
        )
        # Others so rare have next to no part in the entropy of the row.
        if (COLUMNS > 3) & (others > 1e-37):
            entropy = tl.log(others) - weighted / others
            if certain_elsewhere(others, distance):
                # The entropy alone is made of exact sums: a log-prob is the same without one.
                sums, tail, weighted, _ = exact_sums(
                    Row, target, own, columns, c, THREADS, VECTOR, WIDE
                )
                entropy = log1p(tail) - weighted / sums
    tl.store(Table + row, reference)
    tl.store(Table + n + row, others)
    tl.store(Table + 2 * n + row, distance)
    if COLUMNS > 3:
        tl.store(Table + 3 * n + row, entropy)
