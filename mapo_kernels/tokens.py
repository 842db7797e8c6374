"""Log-prob level: the launchers of its two kernels."""

from __future__ import annotations

import torch

from mapo_kernels._triton import on_device_of, registers, triton, warp_size
from mapo_kernels.advantages import advantage_arguments, advantage_flags
from mapo_kernels.inputs import (
    SLOTS,
    TokenInputs,
    TokenResults,
    empty_results,
    loss_arguments,
)
from mapo_kernels.spec import AdvantageSpec, LossSpec
from mapo_kernels.tokens_kernel import scale_kernel, token_loss_kernel

_MAX_PROGRAMS = 2048
# 16 bytes of float32. Twice as many sums per thread do not fit its registers.
_TOKENS_PER_THREAD = 4
_LENGTH_WEIGHTS = {
    "token-mean": "one",
    "seq-mean-token-mean": "mean",
    "seq-mean-token-sum": "one",
    "seq-mean-token-sum-norm": "fixed",
}


class _Counters:
    """An arrival counter per device and stream; the kernel leaves it at 0, so it is set up once."""

    def __init__(self) -> None:
        self._counters: dict[tuple[torch.device, int], torch.Tensor] = {}

    def get(self, device: torch.device) -> torch.Tensor:
        stream = 0
        if device.type == "cuda":
            # A graph owns what is allocated while it is captured: such a counter serves it alone.
            if torch.cuda.is_current_stream_capturing():
                return torch.zeros(1, dtype=torch.int32, device=device)
            stream = torch.cuda.current_stream(device).cuda_stream
        key = (device, stream)
        if key not in self._counters:
            self._counters[key] = torch.zeros(1, dtype=torch.int32, device=device)
        return self._counters[key]


counters = _Counters()


def rows_of(x: torch.Tensor | None) -> torch.Tensor | None:
    """`x` with adjacent tokens adjacent in memory: copied only where the token stride is not 1."""
    if x is None or x.stride(-1) == 1 or x.shape[-1] <= 1:
        return x
    return x.contiguous()


def loss_flags(inputs: TokenInputs, spec: LossSpec) -> dict[str, object]:
    """The compile-time choices of the loss kernels."""
    return {
        "HAS_OLD": inputs.old_logprobs is not None,
        "HAS_REF": inputs.ref_logprobs is not None,
        "HAS_ROLLOUT": inputs.rollout_logprobs is not None,
        "HAS_WEIGHT": inputs.token_weights is not None,
        "HAS_LOSS_WEIGHT": inputs.loss_weights is not None,
        "HAS_MASK": inputs.mask is not None,
        "PACKED": inputs.cu_seqlens is not None,
        "LENGTH_WEIGHT": _LENGTH_WEIGHTS[spec.aggregation],
        "SCORE_ALL": spec.needs_every_token,
        "OBJECTIVE": spec.objective,
        "HAS_DUAL_CLIP": spec.dual_clip is not None,
        "KL_ESTIMATOR": spec.kl_estimator,
        "KL_CORRECTION": spec.kl_importance_correction,
        "SLOTS": SLOTS,
    }


def _row_stride(x: torch.Tensor | None) -> int:
    return 0 if x is None or x.dim() == 1 else x.stride(0)


def _splits(n_sequences: int, n_tokens: int, block: int, sequence_level: bool) -> int:
    """Programs per sequence: enough to fill a GPU; 1 where a sequence needs its mean first."""
    if sequence_level:
        return 1
    blocks = -(-n_tokens // (n_sequences * block))
    return max(1, min(blocks, _MAX_PROGRAMS // n_sequences))


def normalizer_of(
    inputs: TokenInputs, spec: LossSpec, n_sequences: int
) -> tuple[str, torch.Tensor | None, float]:
    """Where the batch's denominator comes from (`tensor`, `number` or `count`), and its value."""
    if isinstance(inputs.normalizer, torch.Tensor):
        return "tensor", inputs.normalizer, 0.0
    if inputs.normalizer is not None:
        return "number", None, float(inputs.normalizer)
    if spec.aggregation == "token-mean":
        return "count", None, 0.0
    return "number", None, float(n_sequences)


def group_arguments(
    inputs: TokenInputs, advantage_spec: AdvantageSpec
) -> tuple[tuple[torch.Tensor | None, ...], int, dict[str, object]]:
    """Rewards, success and ids for the kernel, the group size, and the compile-time choices."""
    groups = inputs.groups
    if groups is None:
        # The kernel's reward path is compiled out; only its constants must have some value.
        choices = {"LAYOUT": "contiguous", "BLOCK_G": 1, **advantage_flags(None, AdvantageSpec())}
        return (None, None, None), 1, choices
    ids = groups.group_ids
    tensors = (groups.rewards, groups.success, ids)
    choices = {
        "LAYOUT": "contiguous" if ids is None else "match",
        "BLOCK_G": triton.next_power_of_2(groups.group_size) if ids is None else 1024,
        **advantage_flags(groups, advantage_spec),
    }
    return (
        tuple(None if x is None else x.contiguous() for x in tensors),
        max(groups.group_size, 1),
        choices,
    )


def launch_token_loss(
    logprobs: torch.Tensor,
    inputs: TokenInputs,
    spec: LossSpec,
    advantage_spec: AdvantageSpec,
    need_grad: bool,
) -> TokenResults:
    """What `eager_token_loss` computes, in one launch."""
    device = logprobs.device
    packed = inputs.cu_seqlens is not None
    n_sequences = inputs.n_sequences(logprobs)
    length = logprobs.shape[-1]
    sequence_level = spec.importance_level == "sequence"
    block_t = 1024 if logprobs.numel() > 256 * n_sequences else 256
    n_splits = _splits(n_sequences, logprobs.numel(), block_t, sequence_level)
    n_programs = n_sequences * n_splits

    tokens = [rows_of(x) for x in (logprobs, *inputs.token_tensors())]
    advantage = rows_of(inputs.advantages)
    per_token = advantage is not None and inputs.per_token(advantage, logprobs)
    kind = "group" if advantage is None else "token" if per_token else "sequence"
    strides = [_row_stride(x) for x in tokens]
    strides.append(_row_stride(advantage) if per_token else 1)
    source, normalizer, denominator = normalizer_of(inputs, spec, n_sequences)
    group_tensors, group_size, group_choices = group_arguments(inputs, advantage_spec)

    partials = torch.empty(SLOTS * n_programs, dtype=torch.float32, device=device)
    out = empty_results(logprobs, inputs, need_grad)
    with on_device_of(logprobs):
        token_loss_kernel[(n_programs,)](
            *tokens,
            advantage,
            *group_tensors,
            None if inputs.cu_seqlens is None else inputs.cu_seqlens.contiguous(),
            normalizer,
            out.loss,
            out.results,
            partials,
            out.advantages,
            out.grad,
            counters.get(device),
            n_sequences,
            length,
            n_splits,
            group_size,
            denominator,
            float(spec.max_tokens or length),
            *strides,
            0 if packed else length,
            *advantage_arguments(advantage_spec),
            *loss_arguments(spec),
            HAS_ENTROPY=inputs.entropy is not None,
            HAS_GRAD=need_grad,
            ADVANTAGE=kind,
            NORMALIZER=source,
            SEQUENCE_LEVEL=sequence_level,
            BLOCK_T=block_t,
            BLOCK_P=128,
            # The default is about to change, and the kernel's instruction budget counts on it.
            enable_fp_fusion=True,
            num_warps=block_t // (_TOKENS_PER_THREAD * warp_size()),
            # Left to itself the compiler spills some variants, which ones depends on its version.
            **registers(128),
            **loss_flags(inputs, spec),
            **group_choices,
        )
    return out


def launch_scale(
    grad: torch.Tensor, upstream: torch.Tensor, results: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """`grad` times the upstream gradient [] and the batch's scale, in `dtype`, in one launch."""
    out = torch.empty_like(grad, dtype=dtype)
    n = grad.numel()
    if n:
        with on_device_of(grad):
            scale_kernel[(triton.cdiv(n, 1024),)](grad, upstream, results, out, n, BLOCK=1024)
    return out
