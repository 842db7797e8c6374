"""What the loss is made of."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LossSettings:
    """What the loss is made of; the keyword arguments of `mapo_loss` that are not tensors.

    Attributes:
        objective: "clip", "cispo", "sapo", "none", "gmpo" or "vespo", see `policy_term`.
        importance_level: "token", or "sequence" as in GSPO, see `log_ratios`.
        eps_low: `clip` keeps rho above 1 - eps_low.
        eps_high: `clip` keeps rho below 1 + eps_high (DAPO: higher than eps_low).
        dual_clip: upper bound of rho in the unclipped term (TRL `delta`, verl `clip_ratio_c`).
        eps_high_cispo: upper bound of rho in `cispo`; not 1 + eps.
        eps_low_cispo: its lower bound; None: 0.
        sapo_tau_pos: temperature of `sapo` where A > 0.
        sapo_tau_neg: temperature of `sapo` elsewhere.
        vespo_k_pos: exponent of `vespo` where A >= 0.
        vespo_lambda_pos: rate of `vespo` where A >= 0, at least 1e-4.
        vespo_k_neg: exponent of `vespo` elsewhere.
        vespo_lambda_neg: rate of `vespo` elsewhere, at least 1e-4.
        trust_region: "tv", "kl" or None, see `has_left`.
        trust_low: its limit towards lower probabilities.
        trust_high: its limit towards higher probabilities.
        beta: coefficient of the KL term.
        kl_estimator: "k1", "k2" or "k3", see `kl_term`.
        kl_importance_correction: multiply the KL term by rho (TRL `use_bias_correction_kl`).
        entropy_coef: coefficient of the entropy bonus.
        rollout_cap: bound of the rollout weight exp(old_logp - rollout_logp); None: no bound.
        rollout_mask: bounds of that ratio, beyond which a token has weight 0; see `is_rejected`.
        rollout_mask_level: "token", or "sequence" for the geometric mean of a sequence's ratios.
        rollout_is: whether the ratio is a weight; else it serves the mask alone.
        aggregation: weights of the tokens, verl's names, see `aggregation_weight`.
        denominator: "all", or "contributing" to count only tokens with A != 0, and sequences and
            prompts that have one.
        max_tokens: constant of "seq-mean-token-sum-norm"; None: T.
        score_all: score tokens whose term is 0, too; only the metrics see the difference.
    """

    objective: str = "clip"
    importance_level: str = "token"
    eps_low: float = 0.2
    eps_high: float = 0.2
    dual_clip: float | None = None
    eps_high_cispo: float = 5.0
    eps_low_cispo: float | None = None
    sapo_tau_pos: float = 1.0
    sapo_tau_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    trust_region: str | None = None
    trust_low: float = 0.2
    trust_high: float = 0.2
    beta: float = 0.0
    kl_estimator: str = "k3"
    kl_importance_correction: bool = False
    entropy_coef: float = 0.0
    rollout_cap: float | None = None
    rollout_mask: tuple[float, float] | None = None
    rollout_mask_level: str = "token"
    rollout_is: bool = True
    aggregation: str = "token-mean"
    denominator: str = "all"
    max_tokens: int | None = None
    score_all: bool = False
