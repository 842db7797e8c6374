"""TRL's GRPO trainer with this package's advantages and loss: `MAPOConfig`, `MAPOTrainer`.

Three overrides: rewards are kept as TRL gathered them, advantages replaced by those of
`group_advantages`, and the loss computed by this package, inside the model's forward where the
lm_head is fused. The rest stays TRL's, but that `ReplayTrainer` notes what tokens were drawn from.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import trl
from accelerate.utils import is_peft_model
from packaging.version import Version
from trl import GRPOConfig

from mapo_kernels.advantages import group_advantages
from mapo_kernels.groups import warn_of_threshold
from mapo_kernels.integrations import trl_options as options
from mapo_kernels.integrations.fused_forward import FusedOutput, LossCall, patch_forward
from mapo_kernels.integrations.trl_replay import ReplayTrainer, padded
from mapo_kernels.losses import mapo_loss
from mapo_kernels.metrics import sum_behind

__all__ = ["MAPOConfig", "MAPOTrainer"]

OLDEST = "1.16.0"
if Version(trl.__version__) < Version(OLDEST):
    raise ImportError(f"trl: expected {OLDEST} or newer, got {trl.__version__}")


@dataclass
class MAPOConfig(GRPOConfig):
    """`GRPOConfig` with MAPO's options (arXiv 2509.18849); the defaults train by MAPO.

    Args:
        estimator: of advantages: `mapo`, `grpo`, `apd`, `mean` or `rloo`; see `AdvantageSpec`.
        certainty: lambda(p) of `mapo`: `quadratic`, `linear`, `entropy`, `step`, or a number in
            [0, 1].
        success_threshold: the total reward from which on a completion is a success.
        success_reward: name of the reward function whose value (unweighted) is compared with the
            threshold in place of the total.
        max_abs: symmetric clamp of the advantages.
        advantage_eps: added to the denominators of the advantages; TRL's own is 1e-4.
        dual_clip: another name of TRL's `delta`.
        fused: what the loss is computed from: `hidden` states and lm_head (no logits in memory),
            the model's `logits`, or TRL's own `logprobs`.
        drop_zero_signal: leave sequences without signal out of the model's forward and backward in
            training; loss and gradients are unchanged.
        score_all: compute metrics over all tokens, as TRL does, not only over those that change
            the loss.
        replay_sampling_mask: where sampling is truncated (top_p, top_k, min_p), compute all
            log-probs over the columns that each token was sampled from.

    Raises:
        ValueError: an option, or a combination, that cannot work; it names the option.
        TypeError: an option of the wrong type.
    """

    estimator: str = field(default="mapo", metadata={"help": "Estimator of advantages."})
    certainty: str = field(default="quadratic", metadata={"help": "lambda(p) of mapo."})
    success_threshold: float = field(default=1.0, metadata={"help": "Reward of a success."})
    success_reward: str | None = field(
        default=None, metadata={"help": "Reward function that defines success."}
    )
    max_abs: float | None = field(default=None, metadata={"help": "Clamp of the advantages."})
    advantage_eps: float = field(default=1e-6, metadata={"help": "Added to denominators."})
    dual_clip: float | None = field(default=None, metadata={"help": "TRL's delta."})
    fused: str = field(default="hidden", metadata={"help": "hidden, logits or logprobs."})
    drop_zero_signal: bool = field(
        default=False, metadata={"help": "Leave sequences without signal out of the forward."}
    )
    score_all: bool = field(default=False, metadata={"help": "Metrics over all tokens."})
    replay_sampling_mask: bool = field(
        default=True, metadata={"help": "Log-probs over the columns that sampling kept."}
    )

    def __post_init__(self) -> None:
        """Settle TRL's options, then refuse what cannot work."""
        super().__post_init__()
        if self.dual_clip is not None:
            delta: float | None = getattr(self, "delta", None)
            if delta not in (None, self.dual_clip):
                raise ValueError(
                    f"dual_clip: expected None or TRL's delta {delta!r}, which is the same thing, "
                    f"got {self.dual_clip!r}"
                )
            self.delta = self.dual_clip
        options.check_config(self)


class MAPOTrainer(ReplayTrainer):
    """`GRPOTrainer` that trains by MAPO, with the loss fused into the model's forward.

    Takes what `GRPOTrainer` takes; `args` is a `MAPOConfig`.

    Raises:
        ValueError: an option that cannot work with this model or these reward functions.
        TypeError: `args` is a config of another kind.
    """

    _tag_names = ["trl", "mapo"]
    _name = "MAPO"
    _paper = {
        "title": "MAPO: Mixed Advantage Policy Optimization",
        "id": "2509.18849",
        "citation": "@article{mapo2025, title={{MAPO: Mixed Advantage Policy Optimization}}, "
        "year={2025}, eprint={arXiv:2509.18849}}",
    }

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: MAPOConfig | None = None,
        *positional: Any,
        **named: Any,
    ) -> None:
        """Build TRL's trainer, refuse what cannot work, and patch the model's forward."""
        if args is None:
            path = model if isinstance(model, str) else model.config._name_or_path
            args = MAPOConfig(f"{path.split('/')[-1]}-MAPO")
        if not isinstance(args, MAPOConfig):
            raise TypeError(f"args: expected a MAPOConfig, got {type(args).__name__}")
        super().__init__(model, reward_funcs, args, *positional, **named)
        self._loss_spec = options.loss_spec_of(args)
        self._evaluation_spec = replace(self._loss_spec, score_all=True)
        self._advantage_spec = options.advantage_spec_of(args)
        self._success_column = options.success_column(args.success_reward, self.reward_func_names)
        self._gathered_rewards = torch.empty(0)
        base = self.model.get_base_model() if is_peft_model(self.model) else self.model
        self._check_model(base)
        if args.fused == "logprobs":
            return
        for patched in (base, self.ref_model):
            if patched is None:
                continue
            patch_forward(
                self.accelerator.unwrap_model(patched),
                level=args.fused,
                temperature=self.temperature,
                float32_head=args.cast_lm_head_to_fp32,
            )

    def _check_model(self, model: Any) -> None:
        """Refuse what the config alone could not tell."""
        if self.args.drop_zero_signal and self._is_vlm:
            raise ValueError(
                "drop_zero_signal: expected False with a vision-language model (images are not "
                "indexed by sequence), got True"
            )
        if self.args.drop_zero_signal and self.aux_loss_enabled:
            raise ValueError(
                "drop_zero_signal: expected False with router_aux_loss_coef != 0 (the auxiliary "
                "loss counts the tokens of every sequence), got True"
            )
        if self.args.fused == "logprobs":
            return
        if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
            raise ValueError(
                f"fused: expected 'logprobs' with a model that is split over devices, got "
                f"{self.args.fused!r}"
            )
        plugin = self.args.deepspeed_plugin
        if self.args.fused == "hidden" and plugin is not None and plugin.zero_stage == 3:
            raise ValueError(
                "fused: expected 'logits' or 'logprobs' with DeepSpeed ZeRO-3, which partitions "
                "the lm_head, got 'hidden'"
            )

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """TRL's rewards [B of all ranks, functions], kept for the advantages."""
        self._gathered_rewards = super()._calculate_rewards(*args, **kwargs)
        return self._gathered_rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch with this package's advantages [B]; groups are whole over all ranks."""
        batch = super()._generate_and_score_completions(inputs)
        mode = "train" if self.model.training else "eval"
        rewards, success = options.rewards_and_success(
            self._gathered_rewards,
            self.reward_weights,
            self._success_column,
            self.args.success_threshold,
        )
        advantages, stats = group_advantages(
            rewards,
            group_size=self.num_generations if mode == "train" else self.num_generations_eval,
            success=success,
            return_stats=True,
            **asdict(self._advantage_spec),
        )
        first = self.accelerator.process_index * len(inputs)
        batch["advantages"] = advantages[first : first + len(inputs)]
        logged = self._logs["advantages"]
        replaced = min(len(logged), advantages.shape[0])
        for _ in range(replaced):
            logged.pop()
        logged.extend(advantages[advantages.shape[0] - replaced :].tolist())
        metrics = self._metrics[mode]
        metrics["mapo/success_ratio"].append(stats.success_ratio.mean().item())
        # With a success_reward the threshold is that of one function, which may be met by nobody.
        if success is None and metrics["mapo/success_ratio"][-1] == 0 and advantages.any():
            warn_of_threshold(self._advantage_spec)
        metrics["mapo/lambda"].append(stats.certainty.mean().item())
        metrics["mapo/zero_signal"].append((advantages == 0).float().mean().item())
        return batch

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """The loss of a micro-batch, by this package's formula over TRL's denominators."""
        training = self.model.training
        mask = _loss_mask(inputs)
        steps = self.current_gradient_accumulation_steps if training else 1
        normalizer = options.denominator(
            self.loss_type,
            mask,
            inputs["num_items_in_batch"],
            accumulation=steps,
            steps_per_generation=self.args.steps_per_generation,
            num_processes=self.accelerator.num_processes,
            training=training,
        )
        n_sequences, kept = mask.shape[0], mask.shape[0]
        if self.args.drop_zero_signal and training:
            rows = options.rows_with_signal(inputs["advantages"], mask)
            kept = rows.shape[0]
            if kept < n_sequences:
                inputs = options.take_rows(inputs, rows)
                mask = _loss_mask(inputs)
        out = self._fused_loss(model, inputs, mask, normalizer)
        loss: Any = out.loss
        metrics = dict(out.metrics or {})
        if self.aux_loss_enabled:
            aux_loss: Any = out.aux_loss
            loss = loss + self.router_aux_loss_coef * aux_loss / steps
            metrics["aux_loss"] = aux_loss.detach()
        self._log_loss("train" if training else "eval", metrics, kept, n_sequences)
        return loss

    def _fused_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        mask: torch.Tensor,
        normalizer: torch.Tensor | float,
    ) -> FusedOutput:
        """Loss, metrics and auxiliary loss, at the level that the config asks for."""
        arguments: dict[str, Any] = {
            "advantages": inputs["advantages"],
            "mask": mask,
            "old_logprobs": options.old_logprobs(inputs, self.loss_type),
            "ref_logprobs": inputs.get("ref_per_token_logps") if self.beta != 0 else None,
            "normalizer": normalizer,
            # In evaluation metrics are the point: they speak of every token.
            "spec": self._loss_spec if self.model.training else self._evaluation_spec,
        }
        if "sampling_mask" in inputs:
            kept = padded(inputs["sampling_mask"], mask.shape[1])
            arguments["sampling_mask"] = kept.to(mask.device)

        def weigh(log_probs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor | None:
            return self._token_weights(inputs, mask, log_probs, entropy)

        if self.args.fused == "logprobs":
            log_probs, entropy, aux_loss = self._run_model(model, inputs)
            weights = weigh(log_probs.detach(), entropy.detach())
            out = mapo_loss(log_probs, token_weights=weights, **arguments)
            # TRL computes all entropies here, so their mean is over all tokens.
            live = mask != 0
            mean = entropy.detach().where(live, 0.0).sum() / live.sum().clamp(min=1)
            metrics = {**out.metrics, "entropy": mean}
            return FusedOutput(loss=out.loss, metrics=metrics, aux_loss=aux_loss)
        scored = self.off_policy_mask_threshold is not None or self.top_entropy_quantile < 1.0
        if not scored:
            arguments["token_weights"] = self._token_weights(inputs, mask)
        call = LossCall(inputs["completion_ids"], arguments, weigh if scored else None)
        through = _Through(model, call)
        self._run_model(through, inputs)
        return through.output

    def _run_model(self, model: Any, inputs: dict[str, Any]) -> Any:
        """TRL's own call of the model: log-probs, entropies, auxiliary loss."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        named = {key: inputs[key] for key in _MODEL_INPUTS if key in inputs}
        return self._get_per_token_logps_and_entropies(
            model,
            ids,
            attention,
            inputs["completion_ids"].shape[1],
            compute_entropy=self.args.fused == "logprobs",
            compute_aux_loss=self.aux_loss_enabled,
            **named,
        )

    def _token_weights(
        self,
        inputs: dict[str, Any],
        mask: torch.Tensor,
        log_probs: torch.Tensor | None = None,
        entropy: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Product [B, T] of TRL's factors of the policy term: vLLM ratio, off-policy, entropy."""
        factors = []
        if self.use_vllm and self.vllm_importance_sampling_correction and self.loss_type != "vespo":
            factors.append(inputs["importance_sampling_ratio"])
        if self.off_policy_mask_threshold is not None:
            advantages = inputs["advantages"]
            old = inputs.get("old_per_token_logps")
            sampled = inputs.get("sampling_per_token_logps", log_probs if old is None else old)
            factors.append(
                self.get_off_policy_mask(
                    advantages=advantages if advantages.dim() == 2 else advantages[:, None],
                    per_token_logps=log_probs,
                    sampling_per_token_logps=sampled,
                    mask=mask,
                    off_policy_threshold=self.off_policy_mask_threshold,
                )
            )
        if self.top_entropy_quantile < 1.0:
            rest = 1 - self.top_entropy_quantile
            factors.append(self.get_high_entropy_mask(entropy, mask, rest))
        if not factors:
            return None
        weights = torch.ones(mask.shape, device=mask.device)
        for factor in factors:
            weights = weights * factor
        return weights

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


# What TRL hands to a model beside ids and attention mask.
_MODEL_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


def _loss_mask(inputs: dict[str, Any]) -> torch.Tensor:
    """[B, T]: completion tokens that the policy wrote, not a tool."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


class _Through:
    """Stands where TRL calls the model, and asks for the loss with that call."""

    def __init__(self, model: Any, call: LossCall) -> None:
        self._model, self._call = model, call
        self.output = FusedOutput()

    def __call__(self, **inputs: Any) -> FusedOutput:
        self.output = self._model(**inputs, loss_call=self._call)
        return self.output
