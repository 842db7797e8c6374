"""The kernels of rows that keep few columns: products with some rows of the head, and their sums.

Every number is added in an order that depends on its own row (or column) alone.
"""

from mapo_kernels._triton import jit, tl


@jit
def gather_products_kernel(
    Hidden,  # [.., width]
    Weight,  # [V, width]
    Source,  # [n], which hidden state is the row's
    Column,  # [nnz], which row of the weight each entry wants
    Bounds,  # [n + 1], where each row's entries begin
    Out,  # [nnz] float32
    width,
    stride_hidden,
    stride_weight,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Products of one hidden state with the rows of the weight that its entries name."""
    row = tl.program_id(0)
    begin = tl.load(Bounds + row)
    end = tl.load(Bounds + row + 1)
    State = Hidden + tl.load(Source + row).to(tl.int64) * stride_hidden
    for first in range(begin, end, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        there = k < end
        column = tl.load(Column + k, mask=there, other=0).to(tl.int64)
        Rows = Weight + column[:, None] * stride_weight
        sums = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
        for start in range(0, width, BLOCK_H):
            offs = start + tl.arange(0, BLOCK_H)[None, :]
            inside = offs < width
            state = tl.load(State + offs, mask=inside, other=0.0).to(tl.float32)
            weight = tl.load(Rows + offs, mask=inside & there[:, None], other=0.0)
            sums = sums + weight.to(tl.float32) * state
        tl.store(Out + k, tl.sum(sums, 1), mask=there)


@jit
def gather_sums_kernel(
    Matrix,  # [.., width]
    Index,  # [nnz], which of its rows each entry adds; or None: its own
    Factor,  # [nnz] float32, what it is multiplied by; or None
    Bounds,  # [n + 1], where the entries of each sum begin
    Place,  # [n], where in Out a sum goes; or None: in order
    Out,  # [.., width]
    width,
    stride,
    stride_out,
    ADD: tl.constexpr,  # to what is there
    UNROLL: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Sum of some rows of a matrix, each times a factor, one after the other."""
    n_blocks = tl.cdiv(width, BLOCK_H)
    which = tl.program_id(0) // n_blocks
    begin = tl.load(Bounds + which)
    end = tl.load(Bounds + which + 1)
    offs = tl.program_id(0) % n_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = offs < width
    total = tl.zeros([BLOCK_H], tl.float32)
    for first in range(begin, end, UNROLL):
        for u in tl.static_range(UNROLL):
            k = first + u
            there = k < end
            index = k
            if Index is not None:
                index = tl.load(Index + k, mask=there, other=0)
            factor = 1.0
            if Factor is not None:
                factor = tl.load(Factor + k, mask=there, other=0.0)
            row = Matrix + index.to(tl.int64) * stride
            x = tl.load(row + offs, mask=inside & there, other=0.0).to(tl.float32)
            total = total + x * factor
    place = which
    if Place is not None:
        place = tl.load(Place + which)
    # A counter may be a plain number, which has no `.to`.
    Row = Out + (tl.zeros([], tl.int64) + place) * stride_out + offs
    if ADD:
        total = total + tl.load(Row, mask=inside, other=0.0).to(tl.float32)
    tl.store(Row, total.to(Out.dtype.element_ty), mask=inside)
