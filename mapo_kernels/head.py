"""The head of the hidden level: how many rows go through it at once, and its matrix products."""

from __future__ import annotations

import torch

from mapo_kernels import backend, config
from mapo_kernels.batch import HeadInputs, RowInputs, VocabShare
from mapo_kernels.dtypes import result_dtype


def chunk_rows_of(head: HeadInputs, n_live: int, share: VocabShare | None = None) -> int:
    """Hidden states per chunk where the caller leaves it open.

    At most as many as make 2 GiB (64 MiB on a CPU) of float32 logits, their gradient, hidden states
    and their gradient. Chunks are of one size, a multiple of 128, but for the last. What memory is
    free does not enter, so that a batch is cut the same way on every GPU; ranks that split a row
    have the chunks of the largest share. A batch-invariant head has chunks of one size, whatever
    the batch: 1024 rows, or fewer if that is too many.
    """
    weight = head.weight
    budget = config.HIDDEN.gpu_chunk if weight.is_cuda else config.HIDDEN.cpu_chunk
    (vocab, width), size = weight.shape, weight.element_size()
    if share is not None:
        vocab = max(share.sizes)
    multiple = config.HIDDEN.multiple
    per_row = vocab * (4 + size) + width * 2 * size
    most = max(multiple, budget // per_row // multiple * multiple)
    if head.batch_invariant:
        return min(most, config.HIDDEN.invariant_chunk)
    n_chunks = max(1, -(-n_live // most))
    return -(-max(n_live, 1) // (n_chunks * multiple)) * multiple


def mixes_dtypes(weight: torch.Tensor) -> bool:
    """Whether a product of inputs like `weight` can come out in float32 at full speed.

    The one place that knows. Elsewhere a narrow weight is widened once per call, and the products
    run in float32.
    """
    narrow = weight.dtype in (torch.bfloat16, torch.float16)
    on_cuda = weight.is_cuda and torch.version.hip is None
    return narrow and on_cuda and hasattr(torch.ops.aten.mm, "dtype")


class Head:
    """The head's products. They come in float32, whatever the inputs; so do sums of gradients.

    On Triton bias and softcap are the row kernel's, if it may see to them (`in_kernel`); on the
    eager backend they are applied here.
    """

    def __init__(self, head: HeadInputs, in_kernel: bool) -> None:
        """Widens the weight, once, where products of narrow inputs do not come in float32."""
        self.bias, self.softcap, self.scale = head.bias, head.softcap, head.logit_scale
        self.mixed = mixes_dtypes(head.weight)
        self.weight = head.weight if self.mixed else head.weight.to(result_dtype(head.weight))
        self._in_kernel = in_kernel and not backend.is_eager(head.weight)

    def described(self, rows: RowInputs) -> RowInputs:
        """The rows with what the kernel has to make of products."""
        if not self._in_kernel:
            return rows
        return rows._replace(bias=self.bias, softcap=self.softcap, scale=self.scale)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [n, V] of hidden states [n, H]; without a softcap their scale is still to come."""
        if self.mixed:
            x = torch.mm(hidden, self.weight.t(), out_dtype=torch.float32)
        else:
            x = torch.mm(hidden.to(self.weight.dtype), self.weight.t())
        if self._in_kernel:
            return x
        if self.bias is not None:
            x.add_(self.bias)
        if self.softcap is not None:
            x.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)
        return x

    def place(self, logits: torch.Tensor) -> torch.Tensor:
        """Where the gradient of these logits goes: over them, unless they are needed again."""
        keeps = self.softcap is not None and not self._in_kernel
        return torch.empty_like(logits) if keeps else logits

    def before_softcap(self, grad: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Gradient by the product from that by the logits, which are overwritten."""
        if self.softcap is not None and not self._in_kernel:
            # d c tanh(s x / c) / dx = s (1 - tanh^2); a column that is not kept is -inf here.
            logits.div_(self.softcap).clamp_(min=-1.0).square_().neg_().add_(1.0).mul_(self.scale)
            grad = grad.mul_(logits)
        return grad.to(self.weight.dtype)

    def hidden_gradient(self, grad: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The gradient [n, H] by hidden states."""
        if self.mixed and dtype == torch.float32:
            return torch.mm(grad, self.weight, out_dtype=torch.float32)
        return torch.mm(grad, self.weight).to(dtype)

    def weight_gradient(
        self, grad: torch.Tensor, hidden: torch.Tensor, before: torch.Tensor | None, is_all: bool
    ) -> torch.Tensor:
        """What some rows add to the gradient [V, H] by the weight, and what was there `before`.

        Where they are all rows it comes in the weight's dtype: nothing will be added to it.
        """
        if not self.mixed:
            hidden = hidden.to(grad.dtype)
            if before is None:
                return torch.mm(grad.t(), hidden)
            return torch.addmm(before, grad.t(), hidden, out=before)
        if before is not None:
            return torch.addmm(before, grad.t(), hidden, out_dtype=torch.float32, out=before)
        if is_all:
            return torch.mm(grad.t(), hidden)
        return torch.mm(grad.t(), hidden, out_dtype=torch.float32)
