"""The kernel of rows that are split over ranks: what one rank's columns contribute to a row."""

from mapo_kernels._triton import jit, tl
from mapo_kernels.formula import certain_elsewhere, log1p
from mapo_kernels.kernels.row import (
    exact_sums,
    exponent_of,
    is_valid,
    row_of,
    row_sums,
    target_of,
)


@jit(do_not_specialize=["n", "length", "per_temperature"])
def share_kernel(
    rows,  # Rows of this rank's columns; token ids count from the first of them
    Table,  # [COLUMNS, n]
    n,
    length,
    per_temperature,
    columns,
    c,
    COLUMNS: tl.constexpr,  # 3: reference, others, gap; 4: entropy of the others, too
    TILE: tl.constexpr,
):
    """Sums over some columns of a row; all 0, and nothing read, where it is masked."""
    row = tl.program_id(0)
    reference = 0.0
    others = 0.0
    distance = 0.0
    entropy = 0.0
    if is_valid(rows.mask, row) > 0:
        Row = row_of(rows.logits, row, row // length)
        target = target_of(rows, row, columns)
        c = exponent_of(rows, row // per_temperature, c)
        # A target on another rank is as far below every column here as can be.
        reference, others, weighted, distance, own = row_sums(
            rows, Row, target, columns, c, float("-inf"), COLUMNS > 3, TILE
        )
        # Others so rare have next to no part in the entropy of the row.
        if (COLUMNS > 3) & (others > 1e-37):
            entropy = tl.log(others) - weighted / others
            if certain_elsewhere(others, distance):
                # The entropy alone is made of exact sums: a log-prob is the same without one.
                sums, tail, weighted, _ = exact_sums(rows, Row, target, own, columns, c, TILE)
                entropy = log1p(tail) - weighted / sums
    tl.store(Table + row, reference)
    tl.store(Table + n + row, others)
    tl.store(Table + 2 * n + row, distance)
    if COLUMNS > 3:
        tl.store(Table + 3 * n + row, entropy)
