"""What is measured: a case of a level, its inputs, its providers and what it must move."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch

from .shapes import NO_HEAD, Batch, Head

OURS = "mapo_kernels"
PLAIN = "plain PyTorch"
COMPILED = "torch.compile of plain PyTorch"
# Relative error of gradients in norm, above which a provider computes something else. Rounding the
# result to bfloat16 makes 0.2%, a softmax of logits rounded to bfloat16 about 1%.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Case:
    """One level at one shape; `directions` of score, forward, backward, both; `sweep` is its plot.

    `compile` is whether providers that compile take part.
    """

    level: str
    batch: Batch
    head: Head = NO_HEAD
    dtype: torch.dtype = torch.float32
    directions: tuple[str, ...] = ("both",)
    sweep: str = "tokens"
    compile: bool = True

    @property
    def shape(self) -> str:
        """The case's name for people."""
        batch = self.batch
        size = (
            f"{batch.n_sequences}" if batch.length == 1 else f"{batch.n_sequences} x {batch.length}"
        )
        head = f", {self.head.name}" if self.head.name else ""
        return f"{size}{head}, {str(self.dtype).removeprefix('torch.')}"

    def tiny(self) -> Case:
        """The same case with a few tokens and words, for Triton's interpreter."""
        small = (
            self
            if self.head is NO_HEAD
            else replace(self, head=replace(self.head, width=16, vocab=50))
        )
        return replace(small, batch=self.batch.tiny())


@dataclass
class Inputs:
    """`leaves` are differentiated; `rest` is what else a provider reads."""

    case: Case
    leaves: tuple[torch.Tensor, ...]
    rest: SimpleNamespace
    live: float

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that a call reads."""
        return sum(x.nbytes for x in self.leaves)


@dataclass(frozen=True)
class Counts:
    """The least that a case costs: bytes moved, multiply-adds times two, kernels launched."""

    nbytes: int
    flops: int = 0
    launches: int = 1


@dataclass(frozen=True)
class Provider:
    """Who computes it: `call(*leaves, rest)` returns the loss, or the values without a gradient."""

    call: Callable[..., torch.Tensor]
    package: str | None = None
    needs_gpu: bool = False
    compiles: bool = False
    # The leaves' contents are destroyed: every call needs fresh ones.
    consumes: bool = False
    # Why a case is beyond the provider, or None.
    beyond: Callable[[Case], str | None] = lambda case: None

    def unavailable(self, case: Case, device: torch.device) -> str | None:
        """Why it cannot be measured here, or None."""
        if self.package and importlib.util.find_spec(self.package) is None:
            return "not installed"
        if self.needs_gpu and device.type != "cuda":
            return "needs a GPU"
        if self.compiles and not case.compile:
            return "left out of this suite: compiling takes longer than the rest"
        return self.beyond(case)


@dataclass(frozen=True)
class Level:
    """A level of the package: how its inputs are drawn, computed exactly, provided and counted."""

    name: str
    make: Callable[[Case, torch.Generator, torch.device], Inputs]
    # In float64: the gradients of the leaves, or [values] without a gradient.
    truth: Callable[[Inputs], list[torch.Tensor]]
    providers: Mapping[str, Provider]
    count: Callable[[Case, float, str], Counts]


def evaluate(provider: Provider, inputs: Inputs, direction: str) -> list[torch.Tensor]:
    """The gradients of the leaves, or [values] where the direction has none."""
    if direction == "score":
        with torch.no_grad():
            return [provider.call(*inputs.leaves, inputs.rest)]
    leaves = fresh_leaves(provider, inputs)
    return list(torch.autograd.grad(provider.call(*leaves, inputs.rest), leaves))


def fresh_leaves(provider: Provider, inputs: Inputs) -> list[torch.Tensor]:
    """Leaves that require a gradient and have none yet; copies where the provider destroys them."""
    return [
        (x.clone() if provider.consumes else x.detach()).requires_grad_() for x in inputs.leaves
    ]


def relative_error(actual: list[Any], expected: list[torch.Tensor]) -> float:
    """Largest of ||actual - expected|| / ||expected|| over the tensors; NaN where one has NaN."""
    worst = 0.0
    for a, e in zip(actual, expected, strict=True):
        if a.shape != e.shape:
            return float("nan")
        difference = norm = torch.zeros((), dtype=torch.float64, device=e.device)
        # A part at a time: float64 copies of all logits would be four times their size.
        rows = max(1, (1 << 27) // max(1, e[0].numel()))
        for part, exact in zip(a.split(rows), e.split(rows), strict=True):
            exact = exact.double()
            difference = difference + (part.double() - exact).square().sum()
            norm = norm + exact.square().sum()
        error = float((difference / norm).sqrt()) if float(norm) else float(difference.sqrt())
        if math.isnan(error):
            return error
        worst = max(worst, error)
    return worst
