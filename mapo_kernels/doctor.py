"""`mapo-kernels doctor`: what runs here, why, and whether its numbers are right."""

from __future__ import annotations

import argparse
import platform
from importlib import metadata
from typing import Any

import torch

from mapo_kernels._version import __version__
from mapo_kernels.advantages import group_advantages
from mapo_kernels.backend import describe_backend
from mapo_kernels.calls import LossOutput
from mapo_kernels.losses import mapo_loss, mapo_loss_from_hidden, mapo_loss_from_logits
from mapo_kernels.spec import LossSpec

# Far above what float32 rounding makes of these small batches (below 1e-6), far below any mistake.
TOLERANCE = 1e-5


def versions() -> dict[str, str]:
    """What a result depends on, by name."""
    found = {
        "mapo-kernels": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    for name in ("torch", "triton", "numpy", "trl", "verl", "liger-kernel"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["device"] = "cpu"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        runtime = torch.version.hip or torch.version.cuda
        found["device"] = f"{properties.name}, {properties.total_memory >> 30} GiB, {runtime}"
    return found


def _losses(device: torch.device, dtype: torch.dtype) -> dict[str, list[torch.Tensor]]:
    """Each level's results on one small batch: what is compared between backends, on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    n_sequences, length, width, vocab = 8, 5, 16, 1000
    rewards = torch.tensor([1, 0, 0.25, 1, 1, 1, 0, 0.5], device=device, dtype=dtype)
    mask = torch.arange(length, device=device) < torch.arange(n_sequences, device=device)[:, None]
    ids = torch.randint(0, vocab, (n_sequences, length), generator=generator).to(device)
    logp, logits = -draw(n_sequences, length).abs(), draw(n_sequences, length, vocab) * 2
    hidden, weight = draw(n_sequences, length, width), draw(vocab, width) * 0.5
    found = {"advantages": [group_advantages(rewards, group_size=4)]}

    def level(name: str, function: Any, *leaves: torch.Tensor, **settings: Any) -> None:
        leaves = tuple(x.requires_grad_() for x in leaves)
        spec = LossSpec(aggregation="seq-mean-token-mean", **settings)
        out: LossOutput = function(
            *leaves, rewards=rewards, group_size=4, mask=mask, old_logprobs=old, spec=spec
        )
        found[name] = [out.loss, *torch.autograd.grad(out.loss, leaves)]

    old = logp.detach() + draw(n_sequences, length) * 0.1
    level("log-probs", mapo_loss, logp)
    old = draw(n_sequences, length) * 0.1 - 7
    for kind in ("token", "sequence"):
        settings = {"importance_level": kind, "entropy_coef": 0.01}
        level(
            f"logits, {kind} level",
            lambda x, **given: mapo_loss_from_logits(x, ids, **given),
            logits,
            **settings,
        )
        level(
            f"hidden states, {kind} level",
            lambda h, w, **given: mapo_loss_from_hidden(h, w, ids, **given),
            hidden,
            weight,
            **settings,
        )
    return {name: [x.detach().cpu().double() for x in values] for name, values in found.items()}


def parity() -> dict[str, float]:
    """Largest relative error of each level here, in float32, against float64 on the CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    actual = _losses(device, torch.float32)
    exact = _losses(torch.device("cpu"), torch.float64)

    def error(a: torch.Tensor, e: torch.Tensor) -> float:
        return float((a - e).abs().max() / e.abs().max())

    return {
        name: max(error(a, e) for a, e in zip(actual[name], values, strict=True))
        for name, values in exact.items()
    }


def main(arguments: argparse.Namespace) -> int:
    """Print the report; 1 if a level's numbers are off or cannot be computed, else 0."""
    for name, value in versions().items():
        print(f"{name:<14}{value}")
    print(f"{'backend':<14}{describe_backend()}")
    print("\nlargest relative error of loss and gradients against float64:")
    try:
        found = parity()
    except (ValueError, RuntimeError) as error:  # a setting that cannot work, or a kernel
        print(f"  not checked: {error}")
        return 1
    wrong = False
    for name, off in found.items():
        # A NaN is not within any tolerance.
        right = off <= TOLERANCE
        wrong = wrong or not right
        print(f"  {name:<32}{off:.1e}  {'ok' if right else 'WRONG'}")
    return int(wrong)
