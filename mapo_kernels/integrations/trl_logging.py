"""What a trainer of TRL logs of this package's losses, under TRL's names where TRL has one."""

from __future__ import annotations

from typing import Any

import torch

from mapo_kernels.integrations import trl_options as options
from mapo_kernels.integrations.fused_forward import FusedOutput
from mapo_kernels.integrations.trl_micro_batch import clip_extremes
from mapo_kernels.integrations.trl_replay import ReplayTrainer
from mapo_kernels.metrics import sum_behind
from mapo_kernels.spec import LossSpec


class LoggingTrainer(ReplayTrainer):
    """Logs metrics of losses; `_loss_spec` says of which."""

    _loss_spec: LossSpec

    def _log_loss(
        self, mode: str, metrics: dict[str, torch.Tensor], kept: int, n_sequences: int
    ) -> None:
        """Means over the tokens of all ranks, under TRL's names where TRL has one."""
        names = {"entropy": "entropy", "ref_kl": "kl", "approx_kl": "mapo/approx_kl"}
        clipped = {
            "clip_fraction_low": "clip_ratio/low_mean",
            "clip_fraction_high": "clip_ratio/high_mean",
        }
        if self._loss_spec.objective == "clip":
            names |= clipped
        elif self._loss_spec.objective == "cispo":
            names["clip_fraction_high"] = "cispo_clip_ratio"
        names = {ours: trls for ours, trls in names.items() if ours in metrics}
        scored, active = metrics["scored_tokens"], metrics["active_tokens"]
        counts = torch.tensor([kept, n_sequences], device=scored.device)
        # TRL's own head has computed the entropy of every token.
        every = {"entropy"} if self.args.fused == "logprobs" else set()
        sums = [sum_behind(metrics[name], active if name in every else scored) for name in names]
        table = torch.cat([torch.stack([*sums, scored, active]), counts.to(scored)])
        totals = self.accelerator.reduce(table, reduction="sum").tolist()
        *values, n_scored, n_active, n_kept, n_all = totals
        logged = self._metrics[mode]
        for (ours, trls), value in zip(names.items(), values, strict=True):
            count = n_active if ours in every else n_scored
            # The mean over no token is no zero: then nothing is logged.
            if count > 0:
                logged[trls].append(value / count)
        if self._loss_spec.objective == "clip" and n_scored > 0:
            region = sum(logged[name][-1] for name in clipped.values())
            logged["clip_ratio/region_mean"].append(region)
        logged["mapo/scored_tokens"].append(n_scored / max(n_active, 1.0))
        logged["mapo/forward_sequences"].append(n_kept / n_all)
        if "aux_loss" in metrics:
            aux_loss = self.accelerator.gather_for_metrics(metrics["aux_loss"])
            logged["aux_loss"].append(aux_loss.mean().item())

    def _log_extremes(
        self,
        mode: str,
        log_probs: torch.Tensor | None,
        inputs: dict[str, Any],
        mask: torch.Tensor,
        some_are_dropped: bool,
    ) -> None:
        """TRL's smallest and largest share of a sequence's tokens that were clipped."""
        old = options.old_logprobs(inputs, self.loss_type)
        found = clip_extremes(log_probs, old, inputs["advantages"], mask, self._loss_spec)
        low, high = self.accelerator.gather(torch.stack(found)[None]).unbind(1)
        if some_are_dropped:
            low = low.new_zeros(1)
        low, high = low[~low.isnan()], high[~high.isnan()]
        if low.numel():
            self._metrics[mode]["clip_ratio/low_min"].append(low.min().item())
            self._metrics[mode]["clip_ratio/high_max"].append(high.max().item())

    def _log_bonus(self, mode: str, out: FusedOutput, steps: int) -> None:
        """TRL's metrics of its entropy bonus: the loss without it, and its coefficient."""
        assert out.loss is not None and out.metrics is not None
        policy = out.loss.detach() + self.entropy_coef * out.metrics["entropy"] / steps
        if self.loss_type not in ("dapo", "cispo", "vespo"):
            policy = policy * steps
        gathered = self.accelerator.gather(policy.reshape(1))
        self._metrics[mode]["policy_loss"].append(gathered.nanmean().item())
        if mode == "train" and self.accelerator.sync_gradients:
            self._metrics[mode]["entropy_coef"].append(self.entropy_coef)
