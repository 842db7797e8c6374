"""The two frozen specifications: which loss, which advantage.

They are validated once, when they are built, and this is the only module that knows which
combinations of settings make sense. Everything downstream takes a spec as given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from mapo_kernels.advantage_spec import SCALES_OF as SCALES_OF
from mapo_kernels.advantage_spec import AdvantageKind as AdvantageKind
from mapo_kernels.advantage_spec import AdvantageSpec as AdvantageSpec
from mapo_kernels.choices import APD_DENOMINATORS as APD_DENOMINATORS
from mapo_kernels.choices import CERTAINTIES as CERTAINTIES
from mapo_kernels.choices import DIFFICULTIES as DIFFICULTIES
from mapo_kernels.choices import ESTIMATORS as ESTIMATORS
from mapo_kernels.choices import MULTI_OBJECTIVE as MULTI_OBJECTIVE
from mapo_kernels.choices import SCALES as SCALES
from mapo_kernels.formula import LossNumbers
from mapo_kernels.keywords import settings_checked
from mapo_kernels.settings import Packable, require_pair
from mapo_kernels.settings import describe as describe
from mapo_kernels.settings import require_bool as require_bool
from mapo_kernels.settings import require_choice as require_choice
from mapo_kernels.settings import require_number as require_number

# Objectives of whole sequences are those with importance_level="sequence".
TokenObjective = Literal["clip", "cispo", "sapo", "none"]
SequenceObjective = Literal["gmpo", "vespo"]
Objective = Literal[TokenObjective, SequenceObjective]
ImportanceLevel = Literal["token", "sequence"]
KlEstimator = Literal["k1", "k2", "k3"]
TrustRegion = Literal["tv", "kl"]
AggregationName = Literal[
    "token-mean",
    "token-sum",
    "prompt-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
]
Denominator = Literal["all", "contributing"]

OBJECTIVES: tuple[TokenObjective, ...] = get_args(TokenObjective)
SEQUENCE_OBJECTIVES: tuple[SequenceObjective, ...] = get_args(SequenceObjective)
IMPORTANCE_LEVELS: tuple[ImportanceLevel, ...] = get_args(ImportanceLevel)
KL_ESTIMATORS: tuple[KlEstimator, ...] = get_args(KlEstimator)
TRUST_REGIONS: tuple[TrustRegion, ...] = get_args(TrustRegion)
DENOMINATORS: tuple[Denominator, ...] = get_args(Denominator)
VESPO = ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")


class Aggregation(NamedTuple):
    """How token losses become one number.

    Attributes:
        divisor: what the sum over a sequence is divided by: see `formula.sequence_divisor`.
        denominator: what the sum over the batch is divided by: its valid `tokens`, its
            `sequences`, or `one`; or its `prompts`, and then each token's loss also by the valid
            tokens of its prompt.
    """

    divisor: str
    denominator: str


# The table of aggregations, by their names in verl. An entry made of what is here already needs
# nothing else; another divisor also needs its line in `formula.sequence_divisor`.
AGGREGATION_TABLE: dict[AggregationName, Aggregation] = {
    "token-mean": Aggregation("one", "tokens"),
    "token-sum": Aggregation("one", "one"),
    "prompt-mean": Aggregation("one", "prompts"),
    "seq-mean-token-mean": Aggregation("tokens", "sequences"),
    "seq-mean-token-sum": Aggregation("one", "sequences"),
    "seq-mean-token-sum-norm": Aggregation("length", "sequences"),
}
AGGREGATIONS = tuple(AGGREGATION_TABLE)


@dataclass(frozen=True)
class LossKind:
    """What a kernel is compiled for; numbers and tensors that are absent are None."""

    objective: str
    kl_estimator: str
    kl_correction: bool
    sequence_level: bool
    score_all: bool
    divisor: str  # of `Aggregation`
    trust_region: str  # or "none"


@settings_checked
@dataclass(frozen=True, kw_only=True)
class LossSpec(Packable):
    """Which token loss, and how it is aggregated.

    Args:
        objective: `clip` (PPO, GRPO, DAPO), `cispo`, `sapo`, or `none` (the plain policy gradient);
            or of whole sequences, `gmpo` (the geometric mean of clipped ratios; verl's `geo_mean`),
            or `vespo` (a soft weight of the product of the ratios, detached; as in TRL).
        importance_level: `token`, or `sequence` (GSPO: one ratio per sequence).
        eps_low: the ratio is clipped below 1 - eps_low; in (0, 1). In `gmpo`, as in verl, its
            logarithm is clipped below -eps_low.
        eps_high: the ratio is clipped above 1 + eps_high (`gmpo`: its logarithm above eps_high);
            positive.
        dual_clip: cap of the ratio in the unclipped term (TRL's `delta`, verl's `clip_ratio_c`);
            greater than 1 + eps_high, or None.
        eps_high_cispo: upper bound of the detached ratio of `cispo`, as TRL's `epsilon_high` there.
        eps_low_cispo: its lower bound, in [0, eps_high_cispo], or None (TRL); verl's bounds are
            1 - clip_ratio_low and 1 + clip_ratio_high.
        sapo_tau_pos: temperature of `sapo` where the advantage is positive.
        sapo_tau_neg: temperature of `sapo` elsewhere.
        vespo_k_pos: exponent k of `vespo` where the advantage is not negative.
        vespo_lambda_pos: its rate lambda there; at least 1e-4.
        vespo_k_neg: exponent where the advantage is negative.
        vespo_lambda_neg: rate there.
        trust_region: DPPO (arXiv 2602.04879), for any objective: a token whose probability p has
            left that of the old policy, q, too far in the direction that its advantage pushes loses
            its policy term (and counts in the clip fractions). `tv` measures |p - q|, `kl` the KL
            divergence in nats of "this token or another"; None has no bound.
        trust_low: the limit of that distance where p < q and the advantage is negative; positive.
        trust_high: the limit where p > q and the advantage is positive; positive.
        beta: weight of the KL term to the reference policy; 0 leaves it out.
        kl_estimator: `k1`, `k2` or `k3` (John Schulman's names).
        kl_importance_correction: multiply the KL term by the ratio, which is differentiated (TRL's
            `use_bias_correction_kl`).
        entropy_coef: weight of the entropy bonus, where logits are seen.
        rollout_cap: cap C of the truncated importance weight min(exp(old - rollout), C); None has
            no bound.
        rollout_mask: bounds (low, high) of the ratio exp(old - rollout): a token outside has weight
            0 and so no policy term (IcePop, masked importance sampling). 0 <= low < high.
        rollout_mask_level: `token`, or `sequence`: the geometric mean of the ratios of a sequence's
            valid tokens decides about all of them.
        rollout_is: multiply the policy term by the ratio (importance sampling); False has the mask
            alone (rejection).
        aggregation: verl's names; TRL's loss types in brackets: `token-mean` [bnpo, dapo],
            `token-sum`, `seq-mean-token-mean` [grpo], `seq-mean-token-sum` [luspo],
            `seq-mean-token-sum-norm` [dr_grpo]; and `prompt-mean` (SkyRL), the mean over groups of
            the mean over all tokens of each, which needs groups beside advantages too.
        denominator: what the denominator counts: `all` valid tokens (sequences, prompts), or only
            the `contributing` ones: tokens whose advantage is not 0, and sequences and prompts that
            have one; at least 1 (TRL #6367). A `normalizer` takes its place.
        max_tokens: the fixed length that `seq-mean-token-sum-norm` divides by; None means the
            padded length T, as in verl, and is an error for packed input.
        score_all: compute (and report metrics of) tokens that change neither loss nor gradient too.

    Raises:
        ValueError: a value outside its range, or a combination that makes no sense.
        TypeError: a value of the wrong type.
    """

    objective: Objective = "clip"
    importance_level: ImportanceLevel = "token"
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
    trust_region: TrustRegion | None = None
    trust_low: float = 0.2
    trust_high: float = 0.2
    beta: float = 0.0
    kl_estimator: KlEstimator = "k3"
    kl_importance_correction: bool = False
    entropy_coef: float = 0.0
    rollout_cap: float | None = None
    rollout_mask: tuple[float, float] | None = None
    rollout_mask_level: ImportanceLevel = "token"
    rollout_is: bool = True
    aggregation: AggregationName = "token-mean"
    denominator: Denominator = "all"
    max_tokens: int | None = None
    score_all: bool = False

    _INTEGERS = ("max_tokens",)

    def __post_init__(self) -> None:
        """Validate every field and the combination."""
        require_choice("objective", self.objective, OBJECTIVES + SEQUENCE_OBJECTIVES)
        require_choice("importance_level", self.importance_level, IMPORTANCE_LEVELS)
        require_choice("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        require_choice("aggregation", self.aggregation, AGGREGATIONS)
        require_choice("denominator", self.denominator, DENOMINATORS)
        require_number("eps_low", self.eps_low, 0.0, 1.0, open_low=True, open_high=True)
        if self.trust_region is not None:
            require_choice("trust_region", self.trust_region, TRUST_REGIONS)
        positive = ("eps_high", "eps_high_cispo", "sapo_tau_pos", "sapo_tau_neg")
        for name in (*positive, "trust_low", "trust_high"):
            require_number(name, getattr(self, name), 0.0, open_low=True)
        for name in ("beta", "entropy_coef", *VESPO):
            require_number(name, getattr(self, name), 0.0)
        for name in ("kl_importance_correction", "score_all", "rollout_is"):
            require_bool(name, getattr(self, name))
        if self.eps_low_cispo is not None:
            require_number("eps_low_cispo", self.eps_low_cispo, 0.0, self.eps_high_cispo)
        if self.rollout_cap is not None:
            require_number("rollout_cap", self.rollout_cap, 0.0, open_low=True)
        if self.rollout_mask is not None:
            require_pair("rollout_mask", self.rollout_mask)
        require_choice("rollout_mask_level", self.rollout_mask_level, IMPORTANCE_LEVELS)
        self._check_combinations()
        self._make_canonical()

    def _check_combinations(self) -> None:
        if self.objective in SEQUENCE_OBJECTIVES and self.importance_level != "sequence":
            raise ValueError(
                f"importance_level: expected 'sequence' with objective {self.objective!r}, whose "
                f"ratio is that of a sequence, got {self.importance_level!r}"
            )
        is_weighed = self.rollout_cap is not None or (self.rollout_mask and self.rollout_is)
        if self.objective == "vespo" and is_weighed:
            raise ValueError(
                f"rollout_cap, rollout_mask: expected None with objective 'vespo', where the "
                f"mismatch belongs in old_logprobs (or a mask with rollout_is=False), got "
                f"{self.rollout_cap!r}, {self.rollout_mask!r}"
            )
        if self.dual_clip is not None:
            require_number("dual_clip", self.dual_clip)
            if self.objective != "clip":
                raise ValueError(
                    f"dual_clip: expected None with objective {self.objective!r} (only 'clip' has "
                    f"it), got {self.dual_clip!r}"
                )
            if self.dual_clip <= 1 + self.eps_high:
                raise ValueError(
                    f"dual_clip: expected a number greater than 1 + eps_high = "
                    f"{1 + self.eps_high:g}, got {self.dual_clip!r}"
                )
        if self.how.denominator == "one" and self.denominator != "all":
            raise ValueError(
                f"denominator: expected 'all' with aggregation {self.aggregation!r}, which divides "
                f"by nothing, got {self.denominator!r}"
            )
        if not self.rollout_is and self.rollout_cap is not None:
            raise ValueError(
                f"rollout_cap: expected None with rollout_is=False (the ratio is no weight), got "
                f"{self.rollout_cap!r}"
            )
        if not self.rollout_is and self.rollout_mask is None:
            raise ValueError("rollout_mask: expected a pair with rollout_is=False, got None")
        if self.max_tokens is not None:
            if isinstance(self.max_tokens, bool) or not isinstance(self.max_tokens, int):
                raise TypeError(f"max_tokens: expected an int, got {describe(self.max_tokens)}")
            if self.max_tokens < 1:
                raise ValueError(f"max_tokens: expected at least 1, got {self.max_tokens}")

    @property
    def kind(self) -> LossKind:
        """The compile-time choices."""
        return self._kind

    @property
    def numbers(self) -> LossNumbers:
        """The run-time numbers; None where the loss has no such term."""
        return self._numbers

    def _split(self) -> tuple[LossKind, LossNumbers]:
        kind = LossKind(
            self.objective,
            self.kl_estimator,
            self.kl_importance_correction,
            self.importance_level == "sequence",
            self.needs_every_token,
            self.how.divisor,
            self.trust_region or "none",
        )
        k_pos, lambda_pos, k_neg, lambda_neg = self._gamma()
        return kind, LossNumbers(
            float(self.eps_low),
            float(self.eps_high),
            None if self.dual_clip is None else float(self.dual_clip),
            float(self.eps_high_cispo),
            None if self.eps_low_cispo is None else float(self.eps_low_cispo),
            float(self.sapo_tau_pos),
            float(self.sapo_tau_neg),
            k_pos,
            lambda_pos,
            k_neg,
            lambda_neg,
            float(self.beta),
            None if self.entropy_coef == 0 else float(self.entropy_coef),
            None if self.rollout_cap is None else float(self.rollout_cap),
            None if self.trust_region is None else float(self.trust_low),
            None if self.trust_region is None else float(self.trust_high),
        )

    def _gamma(self) -> list[float | None]:
        """The numbers of `VESPO`; a rate is at least 1e-4, as in TRL."""
        if self.objective != "vespo":
            return [None] * len(VESPO)
        return [max(float(getattr(self, x)), 1e-4 if "lambda" in x else 0.0) for x in VESPO]

    @property
    def how(self) -> Aggregation:
        """How token losses become one number."""
        return AGGREGATION_TABLE[self.aggregation]

    @property
    def needs_count(self) -> bool:
        """Whether a batch has to be counted before its loss: see `counting`."""
        return self.denominator == "contributing" or self.how.denominator == "prompts"

    def fixed_length(self, length: int) -> float:
        """The divisor `length`, for sequences padded to `length` tokens."""
        return float(self.max_tokens or max(length, 1))

    @property
    def needs_every_token(self) -> bool:
        """Whether a token with advantage 0 still matters, to the loss or to the metrics."""
        return self.score_all or self.beta != 0 or self.entropy_coef != 0
