"""Log-prob level: the launchers of its two kernels."""

from __future__ import annotations

from ctypes import c_float

import torch

from mapo_kernels import config, tracing
from mapo_kernels._triton import (
    interprets,
    next_power_of_2,
    on_device_of,
    registers,
    triton,
    warp_size,
)
from mapo_kernels.batch import Batch, GroupInputs, TokenResults
from mapo_kernels.formula import SLOTS
from mapo_kernels.kernels.advantages import Rewards
from mapo_kernels.kernels.logprobs import scale_kernel, token_loss_kernel
from mapo_kernels.kernels.token import Common, Tokens
from mapo_kernels.launch.direct import Direct
from mapo_kernels.spec import AdvantageSpec, LossSpec

_token_loss, _scale = Direct(token_loss_kernel), Direct(scale_kernel)


class _Counters:
    """An arrival counter per device and stream; the kernel leaves it at 0, so it is set up once."""

    def __init__(self) -> None:
        self._counters: dict[tuple[torch.device, int], torch.Tensor] = {}

    def get(self, device: torch.device) -> torch.Tensor:
        on_gpu = device.type == "cuda"
        # What a CUDA graph captures, or is warmed up with by torch.compile, it owns: such a counter
        # serves it alone, and nobody keeps it. Nor one of the interpreter's, where a kernel that
        # raised an error in the middle of its grid has left a count behind.
        is_owned = tracing.operator.runs or (on_gpu and torch.cuda.is_current_stream_capturing())
        if is_owned or interprets():
            return torch.zeros(1, dtype=torch.int32, device=device)
        # As Triton asks for it: torch would make an object.
        stream = triton.runtime.driver.active.get_current_stream(device.index) if on_gpu else 0
        key = (device, stream)
        if key not in self._counters:
            self._counters[key] = torch.zeros(1, dtype=torch.int32, device=device)
        return self._counters[key]


counters = _Counters()


def _programs(n_sequences: int, n_blocks: int, most: int, spec: LossSpec) -> tuple[int, int]:
    """Programs, and how many of them share a sequence: 1 where that needs its mean first.

    `n_blocks` is what a sequence takes on average, `most` what a GPU can hold.
    """
    splits = 1
    if spec.importance_level != "sequence":
        splits = max(1, min(n_blocks, most // n_sequences))
    # As many turns for each program, or one less for some.
    turns = -(-n_sequences * splits // most)
    return -(-n_sequences // turns) * splits, splits


def denominator_of(
    inputs: Batch, spec: LossSpec, n_sequences: int
) -> tuple[torch.Tensor | None, float | None]:
    """The batch's denominator, as a tensor or a number; neither where tokens are counted."""
    found = inputs.denominator(spec, n_sequences)
    if found is None or isinstance(found, torch.Tensor):
        return found, None
    # As the kernel sees it: the interpreter would keep it in float64.
    return None, c_float(found).value


def contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    """`x` as kernels index it."""
    return None if x is None else x.contiguous()


def rewards_of(groups: GroupInputs | None) -> tuple[Rewards, int, int]:
    """Rewards for a loss kernel, the size of contiguous groups, and rewards per step."""
    if groups is None:
        return Rewards(None), 1, 1
    rewards = Rewards(
        groups.rewards.contiguous(),
        contiguous(groups.success),
        contiguous(groups.group_ids),
        None,
        contiguous(groups.weight),
        groups.batch_std,
    )
    if groups.group_ids is not None:
        return rewards, 1, config.ADVANTAGES.match_block
    return rewards, groups.group_size, next_power_of_2(groups.group_size)


def tokens_of(inputs: Batch) -> tuple[Tokens, torch.Tensor | None]:
    """Token tensors of a kernel, and the sequences' advantages where those are given."""
    tokens = Tokens(*[contiguous(x) for x in inputs.token_tensors()])
    given = contiguous(inputs.advantages)
    if given is not None and inputs.per_token:
        return tokens._replace(advantage=given), None
    return tokens, given


def common_of(
    inputs: Batch,
    denominator: tuple[torch.Tensor | None, float | None],
    out: TokenResults,
    n_programs: int,
    in_last: bool = True,
) -> Common:
    """What the programs of a loss share, with room for what each of them leaves.

    The last one adds it if `in_last`, else a launch of its own.
    """
    return Common(
        contiguous(inputs.cu_seqlens),
        *denominator,
        out.loss,
        out.results,
        out.loss.new_empty(SLOTS * n_programs),
        counters.get(out.loss.device) if in_last else None,
    )


def launch_token_loss(
    logprobs: torch.Tensor,
    inputs: Batch,
    spec: LossSpec,
    advantage_spec: AdvantageSpec,
    need_grad: bool,
    out: TokenResults,
) -> None:
    """What `eager_token_loss` computes, in one launch."""
    n_sequences, length = inputs.n_sequences(logprobs), logprobs.shape[-1]
    tuning = config.LOGPROBS
    is_short = logprobs.numel() <= tuning.short_length * n_sequences
    threads = tuning.short_threads if is_short else tuning.threads
    is_aligned = inputs.cu_seqlens is None and length % 16 == 0
    room, per_thread = tuning.registers, tuning.tokens_per_thread
    if not is_aligned:
        room, per_thread = tuning.unaligned_registers, tuning.unaligned_tokens_per_thread
    n_blocks = -(-logprobs.numel() // (n_sequences * threads * per_thread))
    most = tuning.multiprocessors * ((1 << 16) // (threads * room))
    n_programs, n_splits = _programs(n_sequences, n_blocks, most, spec)
    tokens, advantages = tokens_of(inputs)
    rewards, group_size, block_g = rewards_of(inputs.groups)
    with on_device_of(logprobs):
        _token_loss[(n_programs,)](
            logprobs.contiguous(),
            tokens,
            advantages,
            rewards,
            out.advantages,
            out.grad if need_grad else None,
            common_of(inputs, denominator_of(inputs, spec, n_sequences), out, n_programs),
            n_sequences,
            length,
            n_splits,
            group_size,
            spec.fixed_length(length),
            spec.numbers,
            advantage_spec.numbers,
            LOSS=spec.kind,
            GROUP=advantage_spec.kind if inputs.groups is not None else None,
            THREADS=threads,
            PER_THREAD=per_thread,
            BLOCK_G=block_g,
            BLOCK_P=tuning.partials_per_thread * threads // SLOTS,
            # The default is about to change, and the kernel's instruction budget counts on it.
            enable_fp_fusion=True,
            num_warps=threads // warp_size(),
            **registers(room),
        )


def launch_scale(
    grad: torch.Tensor,
    upstream: torch.Tensor,
    results: torch.Tensor,
    dtype: torch.dtype,
    out: torch.Tensor,
) -> None:
    """`grad` times the upstream gradient [] and the batch's scale, in `dtype`, in one launch."""
    n = grad.numel()
    if n:
        with on_device_of(grad):
            block = config.LOGPROBS.scale_block
            _scale[(-(-n // block),)](grad, upstream, results, out, n, BLOCK=block)
