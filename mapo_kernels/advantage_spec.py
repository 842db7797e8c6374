"""How rewards become advantages: the frozen specification, and what kernels take of it."""

from __future__ import annotations

from dataclasses import dataclass

from mapo_kernels.choices import (
    APD_DENOMINATORS,
    CERTAINTIES,
    DIFFICULTIES,
    ESTIMATORS,
    MULTI_OBJECTIVE,
    SCALES,
    ApdDenominator,
    Certainty,
    Difficulty,
    Estimator,
    MultiObjective,
    Scale,
)
from mapo_kernels.formula import AdvantageNumbers
from mapo_kernels.keywords import settings_checked
from mapo_kernels.settings import (
    Packable,
    describe,
    require_choice,
    require_number,
    require_weights,
)

# Of estimators without a z-score, whose own scale every one of these is.
SCALES_OF: dict[str, tuple[Scale, ...]] = {
    "mean": ("group", "none"),
    "rloo": ("group", "none"),
    "apd": ("group",),
}


def require_scale(name: str, scale: object, estimator: str) -> None:
    """Raise unless `scale` is one that the estimator has."""
    require_choice(name, scale, SCALES)
    allowed = SCALES_OF.get(estimator, SCALES)
    if scale not in allowed:
        raise ValueError(
            f"{name}: expected one of {sorted(allowed)} with estimator {estimator!r}, which has no "
            f"z-score to scale, got {scale!r}"
        )


@dataclass(frozen=True)
class AdvantageKind:
    """What a kernel is compiled for; numbers and tensors that are absent are None."""

    estimator: str
    certainty: str
    apd: str
    difficulty: str | None
    scale: str


@settings_checked
@dataclass(frozen=True, kw_only=True)
class AdvantageSpec(Packable):
    """How rewards become advantages (MAPO, arXiv 2509.18849, and its relatives).

    Args:
        estimator: `mapo` mixes the z-score and the percent deviation by `certainty`; `grpo` is the
            z-score alone, `apd` the percent deviation alone (also known as MaxRL), `mean` is
            `r - mu` (Dr.GRPO), `rloo` is the leave-one-out baseline.
        certainty: lambda(p), the weight of the percent deviation in `mapo`: `quadratic` is the
            paper's 1 - 4p(1-p); `linear` |2p - 1|, `entropy` 1 - H2(p) in bits and `step` (0 for
            0.25 <= p <= 0.75, else 1) are ablations; a number in [0, 1] fixes it.
        success_threshold: a reward at or above it is a success, compared in the reward's own dtype
            (the threshold rounded to it) before anything is rounded. Ignored where an explicit
            `success` tensor is given.
        std_correction: the standard deviation divides by G - std_correction. 1 is what the authors'
            code, TRL and verl do; 0 reproduces the paper's worked figures.
        eps: added to both denominators; positive.
        apd: denominator of the percent deviation: `bounded` is max(|mu|, max|r - mu| / (G - 1)),
            which equals mu for non-negative rewards and keeps order and bound for signed ones;
            `paper` is mu verbatim.
        max_abs: symmetric clamp of the advantage; None leaves it alone.
        difficulty: factor of a group's advantages by its success ratio p: `focal` is
            (1 - p)^exponent (F-GRPO, arXiv 2602.06717), `power` p^-exponent (the focus on hard
            groups of A-GRAE, arXiv 2602.05548, is p^-1/2, and that on easy ones `focal` with -1/2).
            Where it would be infinite it is 1. None has no factor.
        difficulty_exponent: that exponent, any number; from 0 up it favours hard groups.
        scale: what the z-score of `grpo` and `mapo` divides by: the deviation of the `group`; that
            of the whole `batch`'s rewards (LitePPO, arXiv 2508.08221, and TRL's `scale_rewards`),
            of all ranks with a process group; or `none`, 1 (Dr.GRPO, arXiv 2503.20783). `mean` and
            `rloo` have none in any case, and take no `batch`; `apd` has no z-score.
        reward_weights: [K] numbers, factors of the K rewards of a sequence where rewards are
            [B, K]; None where they are [B]. A reward of weight 0 plays no part, whatever it holds;
            one that is NaN or infinite takes its sequence out of the group.
        multi_objective_aggregation: of these K rewards, in TRL's words. `sum_then_normalize` takes
            their weighted sum for the reward. `normalize_then_sum` (GDPO, arXiv 2601.05242) takes
            the weighted sum S of the advantages by each reward alone, and divides it by its
            deviation over the whole batch: S / (std(S) + eps), of all ranks with a process group.
            Success ratios and the groups' statistics are those of the weighted sum in any case.
        pass_at_k: k from 1 up, to train for pass@k (arXiv 2508.10751): a sequence's reward is then
            the share of the k-subsets of its group, among those it is in, that have a success; mu
            and sigma are mean and deviation over all k-subsets. None trains for the rewards
            themselves. Rewards then say only who succeeded. `rloo` has the factor G/(G-k), with
            which k times the advantages are an unbiased gradient of pass@k (PKPO, arXiv 2505.15201,
            which takes another baseline).

    Raises:
        ValueError: a value outside its range.
        TypeError: a value of the wrong type.
    """

    estimator: Estimator = "mapo"
    certainty: Certainty | float = "quadratic"
    success_threshold: float = 1.0
    std_correction: int = 1
    eps: float = 1e-6
    apd: ApdDenominator = "bounded"
    max_abs: float | None = None
    difficulty: Difficulty | None = None
    difficulty_exponent: float = 0.5
    scale: Scale = "group"
    reward_weights: tuple[float, ...] | list[float] | None = None
    multi_objective_aggregation: MultiObjective = "sum_then_normalize"
    pass_at_k: int | None = None

    _INTEGERS = ("std_correction", "pass_at_k")

    def __post_init__(self) -> None:
        """Validate every field and the combination."""
        require_choice("estimator", self.estimator, ESTIMATORS)
        if isinstance(self.certainty, str):
            require_choice("certainty", self.certainty, CERTAINTIES)
        else:
            require_number("certainty", self.certainty, 0.0, 1.0)
        require_number("success_threshold", self.success_threshold)
        if isinstance(self.std_correction, bool) or self.std_correction not in (0, 1):
            raise ValueError(f"std_correction: expected 0 or 1, got {self.std_correction!r}")
        require_number("eps", self.eps, 0.0, open_low=True)
        require_choice("apd", self.apd, APD_DENOMINATORS)
        if self.max_abs is not None:
            require_number("max_abs", self.max_abs, 0.0, open_low=True)
        if self.difficulty is not None:
            require_choice("difficulty", self.difficulty, DIFFICULTIES)
        require_number("difficulty_exponent", self.difficulty_exponent)
        require_scale("scale", self.scale, self.estimator)
        if self.reward_weights is not None:
            require_weights("reward_weights", self.reward_weights)
        name = "multi_objective_aggregation"
        require_choice(name, self.multi_objective_aggregation, MULTI_OBJECTIVE)
        if self.normalizes_first and self.scale != "group":
            raise ValueError(
                f"scale: expected 'group' with {name}='normalize_then_sum', which has a scale for "
                f"each reward and one for their sum, got {self.scale!r}"
            )
        if self.pass_at_k is not None:
            self._check_pass_at_k()
        self._make_canonical()

    def _check_pass_at_k(self) -> None:
        k = self.pass_at_k
        if isinstance(k, bool) or not isinstance(k, int):
            raise TypeError(f"pass_at_k: expected an int or None, got {describe(k)}")
        if k < 1:
            raise ValueError(f"pass_at_k: expected an int from 1 up, got {k}")
        if self.scale == "batch" or self.normalizes_first:
            raise ValueError(
                f"pass_at_k: expected None with scale='batch' or "
                f"multi_objective_aggregation='normalize_then_sum', which are about the rewards "
                f"themselves, got {k}"
            )

    @property
    def normalizes_first(self) -> bool:
        """Whether each of several rewards has advantages of its own, which are then summed."""
        return self.multi_objective_aggregation == "normalize_then_sum"

    def of_one_reward(self) -> AdvantageSpec:
        """How one of several rewards becomes advantages that are then summed, and bounded after."""
        settings = {name: getattr(self, name) for name in self.__dataclass_fields__}
        settings |= {"max_abs": None, "reward_weights": None}
        return AdvantageSpec(**{**settings, "multi_objective_aggregation": MULTI_OBJECTIVE[0]})

    @property
    def kind(self) -> AdvantageKind:
        """The compile-time choices."""
        return self._kind

    @property
    def numbers(self) -> AdvantageNumbers:
        """The run-time numbers."""
        return self._numbers

    def _split(self) -> tuple[AdvantageKind, AdvantageNumbers]:
        kind = AdvantageKind(
            self.estimator, self.certainty_mode, self.apd, self.difficulty, self.scale
        )
        return kind, AdvantageNumbers(
            float(self.success_threshold),
            float(self.std_correction),
            float(self.eps),
            self.certainty_value,
            self.max_abs if self.max_abs is None else float(self.max_abs),
            None if self.difficulty is None else float(self.difficulty_exponent),
            None if self.pass_at_k is None else float(self.pass_at_k),
        )

    @property
    def certainty_mode(self) -> str:
        """The certainty function's name; `fixed` if it is a number or the estimator sets it."""
        fixed = self.estimator != "mapo" or not isinstance(self.certainty, str)
        return "fixed" if fixed else str(self.certainty)

    @property
    def certainty_value(self) -> float:
        """The fixed weight of the percent deviation where `certainty_mode` is `fixed`, else 0."""
        if self.estimator == "apd":
            return 1.0
        if self.estimator == "mapo" and not isinstance(self.certainty, str):
            return float(self.certainty)
        return 0.0
