"""Logits level: the launchers of its kernels."""

from __future__ import annotations

import math
import warnings
from functools import cache
from typing import Any

import torch

from mapo_kernels import config
from mapo_kernels._triton import (
    architecture,
    converts_bfloat16,
    on_device_of,
    registers,
    warp_size,
)
from mapo_kernels.batch import Batch, RowInputs, TokenResults, empty_results
from mapo_kernels.formula import SLOTS
from mapo_kernels.kernels.advantages import Rewards
from mapo_kernels.kernels.logits import finish_kernel, logits_loss_kernel, prepare_kernel
from mapo_kernels.kernels.row import Matrix, Rows, Tile
from mapo_kernels.kernels.scoring import gradient_kernel, rescale_kernel, score_kernel
from mapo_kernels.kernels.token import Common
from mapo_kernels.kernels.vocabulary import share_kernel
from mapo_kernels.launch.direct import Direct
from mapo_kernels.launch.logprobs import (
    common_of,
    contiguous,
    counters,
    denominator_of,
    rewards_of,
    tokens_of,
)
from mapo_kernels.spec import AdvantageSpec, LossSpec

_loss, _rescale = Direct(logits_loss_kernel), Direct(rescale_kernel)
_prepare_rows, _finish = Direct(prepare_kernel), Direct(finish_kernel)
_score, _share, _gradient = Direct(score_kernel), Direct(share_kernel), Direct(gradient_kernel)


@cache
def _tile(
    vocab: int, itemsize: int, wide: bool, converts: bool, tuning: config.Logits, scores: bool
) -> dict[str, Any]:
    """Launch options of a kernel that goes over rows."""
    tuning = tuning.tuned(architecture(), itemsize, vocab)
    vector = 16 // itemsize
    wanted = vocab // (tuning.steps * tuning.tiles * vector)
    power = 1 << max(wanted - 1, 0).bit_length()
    threads = min(tuning.max_threads, max(tuning.min_threads, power))
    tile = Tile(
        threads=threads,
        vector=vector,
        wide=wide,
        number=tuning.tiles,
        first_hint=tuning.score_hint if scores else tuning.first_hint,
        second_hint=tuning.second_hint,
        backwards=tuning.backwards,
        converts=converts,
    )
    # The compiler otherwise spills to fit more programs on a multiprocessor of some GPUs than the
    # cache can hold rows for until they are read again.
    room = registers(min(tuning.registers, (1 << 16) // (threads * tuning.programs)))
    return {"TILE": tile, "num_warps": threads // warp_size(), **room}


def tile_of(logits: torch.Tensor, scores: bool = False) -> dict[str, Any]:
    """How a kernel goes over these rows; with `scores` it reads each once, and nobody after it.

    The last bits of a row's statistics depend on the tile, so scoring and the loss both take it
    from here; and it depends on the shape of the matrix, never on how many rows it has.
    """
    # What Triton specialises on: only then does it know that a row is aligned.
    address = logits.data_ptr()
    for stride in logits.stride()[:-1]:
        address |= stride
    wide = address % 16 == 0
    shape = (logits.shape[-1], logits.element_size(), wide)
    return _tile(*shape, converts_bfloat16(), config.LOGITS, scores)


def row_layout(x: torch.Tensor) -> tuple[int, int, int]:
    """Rows per sequence, their stride, and what is added to it between two sequences.

    Zero between sequences of contiguous rows, so that their number does not recompile a kernel.
    """
    strides = x.stride()
    if len(strides) == 2:
        return x.shape[0] or 1, strides[0], 0
    length, stride = x.shape[1], strides[1]
    return length or 1, stride, strides[0] - length * stride


def n_rows_of(x: torch.Tensor) -> int:
    """How many rows `x` [..., V] has."""
    return x.numel() // x.shape[-1]


def columns_together(logits: torch.Tensor) -> torch.Tensor:
    """`logits` with the columns of a row adjacent in memory: copied only where they are not."""
    if logits.stride(-1) == 1 or logits.shape[-1] == 1:
        return logits
    size = logits.numel() * logits.element_size()
    if size >= config.LOGITS.large_copy:
        warnings.warn(
            f"logits: expected adjacent columns (stride 1), which take no copy, got stride "
            f"{logits.stride(-1)}: every launch copies {size} bytes",
            stacklevel=2,
        )
    return logits.contiguous()


def _matrix(x: torch.Tensor) -> Matrix:
    """`x` [..., V] as kernels index it."""
    return Matrix(x, *row_layout(x)[1:])


def _rows(
    logits: torch.Tensor, rows: RowInputs, mask: torch.Tensor | None = None
) -> tuple[Rows, float]:
    """Rows for a kernel, and the exponent's factor log2(e) / temperature where that is a number."""
    temperature, exponent = None, 0.0
    if isinstance(rows.temperature, torch.Tensor):
        temperature = rows.temperature.contiguous()
    else:
        exponent = 1.0 / (math.log(2.0) * float(rows.temperature))
    ids = rows.token_ids.contiguous()
    found = Rows(_matrix(logits), ids, temperature, contiguous(mask), contiguous(rows.bias))
    if rows.softcap is not None:
        slope = 2.0 / math.log(2.0) * rows.scale / rows.softcap
        found = found._replace(softcap=float(rows.softcap), slope=slope)
    return found, exponent


def _per_temperature(rows: RowInputs) -> int:
    """How many rows share a temperature."""
    if not isinstance(rows.temperature, torch.Tensor):
        return 1
    return max(1, rows.token_ids.numel() // max(1, rows.temperature.numel()))


def empty_scores(
    logits: torch.Tensor, rows: RowInputs, mask: torch.Tensor | None, columns: int
) -> torch.Tensor:
    """Uninitialised table [columns, rows] of `launch_scores`."""
    return logits.new_empty((columns, n_rows_of(logits)), dtype=torch.float32)


def launch_scores(
    logits: torch.Tensor,
    rows: RowInputs,
    mask: torch.Tensor | None,
    columns: int,
    out: torch.Tensor,
    kernel: Direct = _score,
) -> None:
    """Table [columns, rows] of log-prob, entropy, and what the gradient needs, in one launch."""
    logits = columns_together(logits)
    n = out.shape[1]
    if n:
        described, exponent = _rows(logits, rows, mask)
        with on_device_of(logits):
            kernel[(n,)](
                described,
                out,
                n,
                row_layout(logits)[0],
                _per_temperature(rows),
                logits.shape[-1],
                exponent,
                COLUMNS=columns,
                enable_fp_fusion=False,
                **tile_of(logits, scores=True),
            )


def launch_shares(
    logits: torch.Tensor,
    rows: RowInputs,
    mask: torch.Tensor | None,
    columns: int,
    out: torch.Tensor,
) -> None:
    """Table [columns, rows] of what these columns contribute: see `eager.shares.merge_shares`."""
    launch_scores(logits, rows, mask, columns, out, _share)


def launch_gradient(
    logits: torch.Tensor,
    rows: RowInputs,
    mask: torch.Tensor | None,
    table: torch.Tensor,
    slope: torch.Tensor,
    bonus: torch.Tensor | None,
    results: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Write d loss / d logits to `out`, which may be `logits`.

    `table` is that of `launch_scores`, `slope` d loss / d logp and `bonus` the weight of the
    entropy, both one per row and before the batch's scale in `results`.
    """
    logits = columns_together(logits)
    n = table.shape[1]
    if n == 0:
        return
    described, exponent = _rows(logits, rows, mask)
    with on_device_of(logits):
        _gradient[(n,)](
            described,
            _matrix(out),
            table,
            slope,
            bonus,
            results,
            n,
            row_layout(logits)[0],
            _per_temperature(rows),
            logits.shape[-1],
            exponent,
            enable_fp_fusion=False,
            **tile_of(logits),
        )


def launch_rescale(upstream: torch.Tensor, out: torch.Tensor) -> None:
    """Multiply `out` in place by `upstream` [], unless that is 1: known on the device alone."""
    grad = out
    n = n_rows_of(grad)
    if n == 0:
        return
    with on_device_of(grad):
        _rescale[(min(n, config.LOGITS.rescale_programs),)](
            _matrix(grad),
            upstream,
            n,
            row_layout(grad)[0],
            grad.shape[-1],
            **tile_of(grad),
        )


def launch_logits_loss(
    logits: torch.Tensor,
    rows: RowInputs,
    inputs: Batch,
    spec: LossSpec,
    advantage_spec: AdvantageSpec,
    need_grad: bool,
    out: TokenResults,
) -> None:
    """Loss, results, advantages and, if needed, the gradient, at token level.

    One launch; of many rows up to three.
    """
    logits = columns_together(logits)
    n_sequences, n = inputs.n_sequences(logits), rows.token_ids.numel()
    is_fused = n <= config.LOGITS.fused_rows
    described, exponent = _rows(logits, rows)
    normalizer, denominator = denominator_of(inputs, spec, n_sequences)
    if normalizer is denominator is None and inputs.mask is None and inputs.cu_seqlens is None:
        denominator = float(n)
    tokens, advantages = tokens_of(inputs)
    rewards, group_size, block_g = rewards_of(inputs.groups)
    tile = tile_of(logits)
    length = row_layout(logits)[0]
    # The launch before that of the rows leaves the sums of groups behind theirs.
    n_sums = n if is_fused or inputs.groups is None else n + n_sequences
    batch = common_of(inputs, (normalizer, denominator), out, n_sums, is_fused)
    with on_device_of(logits):
        if not is_fused:
            counts = spec.how.divisor == "tokens" or normalizer is denominator is None
            if counts or inputs.groups is not None or inputs.cu_seqlens is not None:
                batch = _prepare(batch, logits, inputs, advantage_spec, out)
            if inputs.groups is not None:
                advantages, rewards = out.advantages, Rewards(None)
        _loss[(n,)](
            described,
            _matrix(out.grad) if need_grad else None,
            tokens,
            advantages,
            rewards,
            out.advantages,
            batch,
            n_sequences,
            length,
            group_size,
            spec.fixed_length(length),
            logits.shape[-1],
            exponent,
            spec.numbers,
            advantage_spec.numbers,
            LOSS=spec.kind,
            GROUP=advantage_spec.kind if rewards.reward is not None else None,
            BLOCK_T=config.LOGITS.block_tokens,
            BLOCK_G=block_g,
            BLOCK_P=config.LOGITS.partials_per_thread * tile["TILE"].threads // SLOTS,
            enable_fp_fusion=False,
            **tile,
        )
        if not is_fused:
            threads = config.LOGITS.finish_threads
            _finish[(1,)](
                batch,
                n_sums,
                BLOCK_P=config.LOGITS.partials_per_thread * threads // SLOTS,
                num_warps=threads // warp_size(),
            )


def _prepare(
    batch: Common,
    logits: torch.Tensor,
    inputs: Batch,
    advantage_spec: AdvantageSpec,
    out: TokenResults,
) -> Common:
    """The batch with what a launch has found out for all rows; advantages are in `out`."""
    n_sequences, length = inputs.n_sequences(logits), row_layout(logits)[0]
    n_rows = n_rows_of(logits)
    rewards, group_size, block_g = rewards_of(inputs.groups)
    total, sequence = out.loss.new_empty(()), None
    if inputs.cu_seqlens is not None:
        sequence = torch.empty(n_rows, dtype=torch.int32, device=logits.device)
    batch = batch._replace(n_valid=out.loss.new_empty(n_sequences), sequence=sequence)
    _prepare_rows[(n_sequences,)](
        contiguous(inputs.mask),
        rewards,
        out.advantages,
        batch._replace(counter=counters.get(logits.device)),
        total,
        n_sequences,
        length,
        n_rows,
        group_size,
        advantage_spec.numbers,
        GROUP=advantage_spec.kind if inputs.groups is not None else None,
        BLOCK_T=config.LOGITS.block_tokens,
        BLOCK_G=block_g,
        enable_fp_fusion=False,
    )
    if batch.normalizer is batch.denominator is None:
        batch = batch._replace(normalizer=total)
    return batch


def empty_gradient(logits: torch.Tensor, *_: Any) -> torch.Tensor:
    """Uninitialised contiguous gradient of logits."""
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def empty_loss(
    logits: torch.Tensor,
    rows: RowInputs,
    inputs: Batch,
    spec: LossSpec,
    advantage_spec: AdvantageSpec,
    need_grad: bool,
) -> TokenResults:
    """Uninitialised results, with the gradient by the logits."""
    found = empty_results(rows.token_ids, inputs, spec, advantage_spec, False)
    if not need_grad:
        return found
    return TokenResults(found.loss, found.results, found.advantages, empty_gradient(logits))
