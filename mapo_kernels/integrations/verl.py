"""verl 0.9.1: estimator `mapo`, policy losses `mapo_fused*`, fused-kernel backend `mapo`.

verl imports this module by the entry point `verl.plugins` on `import verl`, in every process of a
run. So importing it does next to nothing: registration waits for verl to import its registries, and
the rest of `mapo_kernels` is imported by the first call. Whatever goes wrong is logged as a
warning; `import verl` works all the same.

All functions follow the contracts of `verl/trainer/ppo/core_algos.py` (0.9.1) and compute nothing
themselves: the advantages are those of `group_advantages`, the loss is that of `mapo_loss`.
"""

from __future__ import annotations

import functools
import importlib.abc
import logging
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from mapo_kernels.spec import LossSpec, TrustRegion

CORE_ALGOS = "verl.trainer.ppo.core_algos"
MONKEY_PATCH = "verl.models.transformers.monkey_patch"
ESTIMATOR, POLICY_LOSS = "mapo", "mapo_fused"
# Names of verl's losses that have a trust region, and what that measures.
TRUST_REGIONS: dict[str, TrustRegion] = {"dppo_tv": "tv", "dppo_kl": "kl"}
log = logging.getLogger(__name__)


def mapo_advantages(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: Iterable[Any] | None = None,
    config: Any = None,
    **unused: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The estimator `mapo` of verl: `group_advantages` of each response's summed rewards.

    Args:
        token_level_rewards: [B, T]; a response's reward is their sum, wherever they lie.
        response_mask: [B, T], nonzero where a token was generated.
        index: [B] hashable prompt ids (verl's uids), rows in any order.
        config: verl's algorithm config; its optional `mapo` holds fields of `AdvantageSpec`.
        unused: what verl passes to other estimators.

    Returns:
        Advantages and returns, which are equal: [B, T] float32, 0 where masked.

    Raises:
        ValueError: no `index`, one of another length, or an option that makes no sense.
        TypeError: an option that `AdvantageSpec` does not have.
    """
    import torch

    from mapo_kernels.advantages import group_advantages
    from mapo_kernels.spec import AdvantageSpec

    try:
        options = dict(_setting(config, "mapo") or {})
        AdvantageSpec(**options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"algorithm.mapo: {error}") from error
    if index is None:
        raise ValueError("index: expected one prompt id (uid) per response, got None")
    known: dict[Any, int] = {}
    ids = [known.setdefault(uid, len(known)) for uid in index]
    if len(ids) != token_level_rewards.shape[0]:
        raise ValueError(
            f"index: expected {token_level_rewards.shape[0]} prompt ids, one per response, got "
            f"{len(ids)}"
        )
    group_ids = torch.tensor(ids, device=token_level_rewards.device)
    advantages = group_advantages(token_level_rewards.sum(-1), group_ids=group_ids, **options)
    per_token = advantages[:, None] * (response_mask != 0)
    return per_token, per_token


def mapo_fused_loss(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: torch.Tensor | None = None,
    trust_region: TrustRegion | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The policy loss `mapo_fused` of verl: what `vanilla` computes, by `mapo_loss`.

    With a trust region it is `mapo_fused_dppo_tv` or `mapo_fused_dppo_kl`, which compute what
    verl's `dppo_tv` and `dppo_kl` do.

    Args:
        old_log_prob: [B, T], of the policy that sampled.
        log_prob: [B, T], differentiated.
        advantages: [B, T], of any estimator.
        response_mask: [B, T], nonzero where a token counts.
        loss_agg_mode: any of verl's modes.
        config: verl's actor config; `clip_ratio`, `clip_ratio_low`, `clip_ratio_high`,
            `clip_ratio_c` and `global_batch_info` are read.
        rollout_is_weights: [B, T] factors of the token losses, or None.
        trust_region: `tv`, `kl`, or None for the clipped loss.

    Returns:
        The loss [] and the metrics of verl's loss as floats: `actor/pg_clipfrac`, `actor/ppo_kl`,
        `actor/pg_clipfrac_lower`, means over the response's tokens.

    Raises:
        ValueError: a mode or a clip range that makes no sense, or a count over the global batch
            that is missing though there are several ranks.
    """
    from mapo_kernels.losses import mapo_loss

    if config is None:
        raise ValueError("config: expected verl's actor config, got None")
    info = dict(_setting(config, "global_batch_info") or {})
    spec = loss_spec(loss_agg_mode, config, info, trust_region)
    out = mapo_loss(
        log_prob,
        advantages=advantages,
        mask=response_mask,
        old_logprobs=old_log_prob,
        token_weights=rollout_is_weights,
        normalizer=batch_denominator(loss_agg_mode, response_mask, info),
        spec=spec,
    )
    tokens = old_log_prob, log_prob, advantages, response_mask
    if trust_region is not None:
        return out.loss, _trust_region_metrics(*tokens, spec)
    return out.loss, _metrics(out.metrics, *tokens, _setting(config, "clip_ratio_c", 3.0))


def loss_spec(
    loss_agg_mode: str, config: Any, info: dict[str, Any], trust_region: TrustRegion | None = None
) -> LossSpec:
    """The `LossSpec` of verl's actor config and of its `global_batch_info`.

    Args:
        loss_agg_mode: verl's name; `token-sum` is `token-mean` with another denominator.
        config: see `mapo_fused_loss`.
        info: its `global_batch_info`, for `loss_scale_factor`.
        trust_region: `tv`, `kl` or None. Where there is one, clip ratios are its limits, and
            `clip_ratio_c` is the bound of the detached ratio.

    Raises:
        ValueError: a value outside its range.
        TypeError: a value of the wrong type.
    """
    from mapo_kernels.spec import LossSpec

    clip = _setting(config, "clip_ratio")
    low, high = (_setting(config, f"clip_ratio_{side}") for side in ("low", "high"))
    low, high = clip if low is None else low, clip if high is None else high
    cap = _setting(config, "clip_ratio_c", 3.0 if trust_region is None else 20.0)
    if trust_region is None:
        names = ("eps_low", "eps_high", "dual_clip")
    else:
        names = ("trust_low", "trust_high", "eps_high_cispo")
    given: dict[str, Any] = dict(zip(names, (low, high, cap), strict=True))
    given["aggregation"] = "token-mean" if loss_agg_mode == "token-sum" else loss_agg_mode
    try:
        return LossSpec(
            objective="clip" if trust_region is None else "cispo",
            trust_region=trust_region,
            **given,
            max_tokens=info.get("loss_scale_factor"),
        )
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"actor config: {error} (clip_ratio_low, clip_ratio_high, clip_ratio_c, loss_agg_mode, "
            f"loss_scale_factor are {', '.join(names)}, aggregation, max_tokens)"
        ) from error


def batch_denominator(
    loss_agg_mode: str, response_mask: torch.Tensor, info: dict[str, Any]
) -> torch.Tensor | float | None:
    """The `normalizer` that stands for verl's counts over the global batch.

    verl multiplies a rank's loss by `dp_size`, because gradients are averaged over ranks.

    Args:
        loss_agg_mode: verl's name.
        response_mask: [B, T].
        info: `dp_size`, `batch_num_tokens` and `global_batch_size`, each optional.

    Returns:
        A number or a 0-d tensor; None where the tokens of this batch are to be counted.

    Raises:
        ValueError: a count is missing and `dp_size` is more than 1.
    """
    dp_size = info.get("dp_size") or 1
    if loss_agg_mode == "token-sum":
        return 1 / dp_size
    name = "batch_num_tokens" if loss_agg_mode == "token-mean" else "global_batch_size"
    count = info.get(name)
    if count is None and dp_size > 1:
        raise ValueError(f"{name}: expected the global batch's with dp_size {dp_size}, got None")
    if count is None and name == "global_batch_size":
        # A response without tokens is no sequence to verl.
        count = (response_mask != 0).any(-1).sum()
    # A batch without tokens: its loss is 0 whatever it is divided by.
    if count is None or (isinstance(count, (int, float)) and count == 0):
        return None
    return count / dp_size


def _metrics(
    values: dict[str, torch.Tensor],
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    cap: float,
) -> dict[str, float]:
    """The metrics of `vanilla`; the one wait for the device.

    Clip fractions are counted among tokens with an advantage, and reported among all.
    """
    import torch

    from mapo_kernels.metrics import sum_behind

    active = values["active_tokens"].clamp(min=1)
    clipped = values["clip_fraction_low"] + values["clip_fraction_high"]
    with torch.no_grad():
        live = response_mask != 0
        log_ratio = (log_prob - old_log_prob).where(live, 0.0).clamp(-20, 20)
        capped = (log_ratio.exp() > cap) & (advantages < 0) & live
        found = torch.stack(
            [
                sum_behind(clipped, values["scored_tokens"]) / active,
                -log_ratio.sum() / active,
                capped.sum() / active,
            ]
        ).tolist()
    return dict(
        zip(("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"), found, strict=True)
    )


def _trust_region_metrics(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    spec: LossSpec,
) -> dict[str, float]:
    """The metrics of `dppo_tv` and `dppo_kl`; the one wait for the device.

    To verl a token without advantage is one that is pushed down.
    """
    import torch

    from mapo_kernels.eager.formula import outside_trust_region

    with torch.no_grad():
        live = response_mask != 0
        logp, old = log_prob.where(live, 0.0), old_log_prob.where(live, 0.0)
        push = torch.ones_like(logp).where((advantages > 0) & live, -1.0)
        low, high = outside_trust_region(logp, old, push, spec.numbers, spec.kind)
        log_ratio = (logp - old).clamp(-20, 20)
        capped = (log_ratio.exp() > spec.eps_high_cispo) & ~(low | high)
        sums = torch.stack([(low | high).sum(), -log_ratio.sum(), capped.sum()])
        found = (sums / live.sum().clamp(min=1)).tolist()
    return dict(
        zip(("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"), found, strict=True)
    )


def _setting(config: Any, name: str, default: Any = None) -> Any:
    """An entry of verl's config, which is an OmegaConf or one of its dataclasses."""
    if config is None:
        return default
    get = getattr(config, "get", None)
    return getattr(config, name, default) if get is None else get(name, default)


def register(core_algos: ModuleType) -> None:
    """Enter estimator and losses into verl's registries; log a warning where that fails.

    Args:
        core_algos: the module `verl.trainer.ppo.core_algos`.
    """
    try:
        core_algos.register_adv_est(ESTIMATOR)(mapo_advantages)
        core_algos.register_policy_loss(POLICY_LOSS)(mapo_fused_loss)
        for name, region in TRUST_REGIONS.items():
            loss = functools.partial(mapo_fused_loss, trust_region=region)
            core_algos.register_policy_loss(f"{POLICY_LOSS}_{name}")(loss)
    except Exception as error:
        _warn(error)


def _warn(error: Exception) -> None:
    log.warning(
        "mapo_kernels is not registered with verl (tested with 0.9.1): %s: %s",
        type(error).__name__,
        error,
    )


def register_head(monkey_patch: ModuleType) -> None:
    """Let `fused_kernel_options.impl_backend` be `mapo`; log a warning where that fails.

    Args:
        monkey_patch: the module `verl.models.transformers.monkey_patch`.
    """
    try:
        from mapo_kernels.integrations import verl_head

        verl_head.register(monkey_patch)
    except Exception as error:
        _warn(error)


_HOOKS: dict[str, Callable[[ModuleType], None]] = {
    CORE_ALGOS: register,
    MONKEY_PATCH: register_head,
}


class _Registering:
    """A loader that does what another one does, and registers whenever it has run the module.

    It stands before that loader and leaves it alone: a zip file has one loader for all its modules.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self._loader, name)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _HOOKS[module.__name__](module)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Registers as soon as verl has imported what to register with: most processes never do.

    There is no other way: verl has no call for plugins after that, and importing the registries
    here would import torch, and verl, which is importing this module. The hook stays, because
    the registries may be imported again, after an import that failed or by `importlib.reload`.
    """

    def __init__(self) -> None:
        self._asking = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # Another hook may ask every finder too, this one among them.
        if fullname not in _HOOKS or getattr(self._asking, "others", False):
            return None
        self._asking.others = True
        try:
            spec = self._ask_others(fullname, path, target)
        finally:
            self._asking.others = False
        loader = getattr(spec, "loader", None)
        if hasattr(loader, "exec_module") and not isinstance(loader, _Registering):
            assert spec is not None
            spec.loader = _Registering(loader)  # type: ignore[assignment]
        return spec

    def _ask_others(self, *asked: Any) -> ModuleSpec | None:
        for finder in list(sys.meta_path):
            find_spec = getattr(finder, "find_spec", None)
            spec = None if finder is self or find_spec is None else find_spec(*asked)
            if spec is not None:
                return spec
        return None


def _install() -> None:
    """Register now with what is there, and with the rest whenever it is imported from now on."""
    # This module may be executed twice; once in a process is enough.
    name = _AfterImport.__module__, _AfterImport.__qualname__
    if any((type(x).__module__, type(x).__qualname__) == name for x in sys.meta_path):
        return
    for known, hook in _HOOKS.items():
        if known in sys.modules:
            hook(sys.modules[known])
    sys.meta_path.insert(0, _AfterImport())


_install()
