"""What the machine can do at best, measured in the same run: copies, products, a launch."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch.utils.benchmark import Timer

from .cases import Case, Effort
from .timers import Work, on_gpu

# Rows of a product: what a chunk of the loss from hidden states has.
PRODUCT_ROWS = {"cuda": 3456, "cpu": 512}


class Roofs:
    """What a result file says of a machine, in `found`: rates of a copy, of products, a launch."""

    def __init__(self, device: torch.device, effort: Effort, tiny: bool = False) -> None:
        """Measure the copy and the launch; products are measured when a shape first asks."""
        self.device, self.effort, self.tiny = device, effort, tiny
        size = 1 << (16 if tiny else 30 if device.type == "cuda" else 27)
        source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
        target, one = torch.empty_like(source), torch.zeros(1, device=device)
        self.products: dict[str, float] = {}
        self.found: dict[str, Any] = {
            "copy_gigabytes_per_second": 2e-9 * size / self._seconds(lambda: target.copy_(source)),
            "launch_microseconds": self._seconds(lambda: one.add_(1)) * 1e6,
            "products_teraflops_per_second": self.products,
        }

    def _seconds(self, work: Work) -> float:
        """The median of a call, timed as rows are; on a CPU many a sample, as some take 1 us."""
        if self.device.type == "cuda":
            return statistics.median(on_gpu(work, self.effort).ms) / 1e3
        timer = Timer("f()", globals={"f": work}, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=self.effort.seconds).median

    def _teraflops(self, case: Case) -> float:
        """TFLOP/s of the three bare products of a head, a chunk of rows at a time."""
        width, vocab = case.head.width, case.head.vocab
        name = f"{width} x {vocab} {case.dtype_name}"
        if name not in self.products:
            rows = 8 if self.tiny else PRODUCT_ROWS[self.device.type]
            hidden, weight, logits = (
                torch.randn(size, device=self.device).to(case.dtype)
                for size in ((rows, width), (vocab, width), (rows, vocab))
            )

            def products() -> None:
                torch.mm(hidden, weight.t(), out=logits)
                torch.mm(logits, weight)
                torch.mm(logits.t(), hidden)

            self.products[name] = 6e-12 * rows * width * vocab / self._seconds(products)
        return self.products[name]

    def compare(self, case: Case, nbytes: int, flops: int, median_ms: float) -> dict[str, Any]:
        """Counts of a row, the roof that binds it and the share of it that was reached."""
        floors = {
            "copy": nbytes / self.found["copy_gigabytes_per_second"] * 1e-6,
            "launch": self.found["launch_microseconds"] * 1e-3,
        }
        if flops:
            floors["products"] = flops / self._teraflops(case) * 1e-9
        roof = max(floors, key=lambda name: floors[name])
        reached = {"roof": roof, "percent_of_roof": 100 * floors[roof] / median_ms}
        return {"bytes": nbytes, "flops": flops} | reached
