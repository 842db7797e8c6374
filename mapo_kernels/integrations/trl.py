"""TRL's GRPO trainer with this package's advantages and loss: `MAPOConfig`, `MAPOTrainer`.

Three overrides: rewards are kept as TRL gathered them, advantages replaced by those of
`group_advantages`, and the loss computed by this package, inside the model's forward where the
lm_head is fused. The rest stays TRL's, but that `ReplayTrainer` notes what tokens were drawn from.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import asdict, replace
from typing import Any

import torch

from mapo_kernels.integrations.trl_config import MAPOConfig  # first: it says how to install TRL

# isort: split
from accelerate.utils import is_peft_model
from trl import GRPOTrainer

from mapo_kernels.advantages import group_advantages
from mapo_kernels.groups import warn_of_threshold
from mapo_kernels.integrations import trl_options as options
from mapo_kernels.integrations.fused_forward import FusedOutput, LossCall, patch_forward
from mapo_kernels.integrations.trl_logging import LoggingTrainer
from mapo_kernels.integrations.trl_micro_batch import entropy_bonus
from mapo_kernels.integrations.trl_replay import padded
from mapo_kernels.losses import mapo_loss

__all__ = ["MAPOConfig", "MAPOTrainer"]


class MAPOTrainer(LoggingTrainer):
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
        group_size = self.num_generations if mode == "train" else self.num_generations_eval
        rewards, success = options.rewards_and_success(
            self._gathered_rewards,
            self.reward_weights,
            self._success_column,
            self.args.success_threshold,
        )
        settings = asdict(self._advantage_spec)
        if self._advantage_spec.normalizes_first:
            rewards = options.rewards_of_functions(self._gathered_rewards, group_size)
            settings["reward_weights"] = self.reward_weights.tolist()
        advantages, stats = group_advantages(
            rewards,
            group_size=group_size,
            success=success,
            group_weight=self._weights_of_prompts(inputs),
            return_stats=True,
            **settings,
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

    def _weights_of_prompts(self, inputs: list[dict[str, Any]]) -> torch.Tensor | None:
        """What the advantages of all ranks are multiplied by, [B], from a column of the dataset."""
        column = self.args.group_weight_column
        if column is None:
            return None
        if column not in inputs[0]:
            raise ValueError(
                f"group_weight_column: expected a column of the dataset, one of "
                f"{sorted(inputs[0])}, got {column!r}"
            )
        own = torch.tensor([float(x[column]) for x in inputs], device=self.accelerator.device)
        return self.accelerator.gather(own)

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
        mode = "train" if training else "eval"
        self._log_loss(mode, metrics, kept, n_sequences)
        if self._loss_spec.objective == "clip":
            self._log_extremes(mode, out.scored_log_probs, inputs, mask, kept < n_sequences)
        if self.entropy_coef:
            self._log_bonus(mode, out, steps)
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
        by_sequence = None
        steps = self.current_gradient_accumulation_steps if self.model.training else 1
        if self.entropy_coef and self.args.fused != "logprobs":
            arguments["spec"], arguments["normalizer"], by_sequence = entropy_bonus(
                arguments["spec"], self.entropy_coef, mask, normalizer, steps
            )
        if "sampling_mask" in inputs:
            kept = padded(inputs["sampling_mask"], mask.shape[1])
            arguments["sampling_mask"] = kept.to(mask.device)

        def weigh(
            log_probs: torch.Tensor | None = None, entropy: torch.Tensor | None = None
        ) -> torch.Tensor | None:
            found = self._token_weights(inputs, mask, log_probs, entropy)
            if by_sequence is None:
                return found
            return by_sequence.expand(mask.shape) * (1.0 if found is None else found)

        if self.args.fused == "logprobs":
            log_probs, entropy, aux_loss = self._run_model(model, inputs)
            weights = weigh(log_probs.detach(), entropy.detach())
            out = mapo_loss(log_probs, token_weights=weights, **arguments)
            # TRL computes all entropies here, so their mean is over all tokens.
            live = mask != 0
            mean = entropy.detach().where(live, 0.0).sum() / live.sum().clamp(min=1)
            metrics = {**out.metrics, "entropy": mean}
            loss = out.loss
            if self.entropy_coef:
                bonus = entropy.where(live, 0.0).sum() / live.sum().clamp(min=1)
                loss = loss - self.entropy_coef * bonus / steps
            kept = log_probs.detach()
            return FusedOutput(loss=loss, metrics=metrics, aux_loss=aux_loss, scored_log_probs=kept)
        scored = self.off_policy_mask_threshold is not None or self.top_entropy_quantile < 1.0
        if not scored:
            arguments["token_weights"] = weigh()
        # Where a ratio may be clipped, to say of which sequences most tokens were.
        if self._loss_spec.objective == "clip" and arguments["old_logprobs"] is not None:
            arguments["return_logprobs"] = True
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


@functools.wraps(GRPOTrainer.__init__)
def _init(self: Any, *positional: Any, **named: Any) -> None:
    _trls_init(self, *positional, **named)
    if isinstance(self.args, MAPOConfig) and not isinstance(self, MAPOTrainer):
        warnings.warn(
            f"args: {type(self).__name__} got a MAPOConfig, of which it knows only TRL's options: "
            "it trains by GRPO. Use MAPOTrainer of mapo_kernels.integrations.trl.",
            stacklevel=2,
        )


# The config does not know who takes it, and TRL asks it nothing that only its trainer would.
_trls_init = GRPOTrainer.__init__
GRPOTrainer.__init__ = _init


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
