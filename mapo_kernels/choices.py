"""The names that settings take: a type of each, for type checkers and editors, and their tuple."""

from __future__ import annotations

from typing import Literal, get_args

# Of advantages.
Estimator = Literal["mapo", "grpo", "apd", "mean", "rloo"]
Certainty = Literal["quadratic", "linear", "entropy", "step"]
ApdDenominator = Literal["bounded", "paper"]
Difficulty = Literal["focal", "power"]
Scale = Literal["group", "batch", "none"]
MultiObjective = Literal["sum_then_normalize", "normalize_then_sum"]
# Of losses. Objectives of whole sequences are those with importance_level="sequence".
TokenObjective = Literal["clip", "cispo", "sapo", "none"]
SequenceObjective = Literal["gmpo", "vespo"]
Objective = Literal[TokenObjective, SequenceObjective]
ImportanceLevel = Literal["token", "sequence"]
KlEstimator = Literal["k1", "k2", "k3"]
TrustRegion = Literal["tv", "kl"]
# What each does is in `spec.AGGREGATION_TABLE`.
AggregationName = Literal[
    "token-mean",
    "token-sum",
    "prompt-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
]
Denominator = Literal["all", "contributing"]
# The normalizer that counts the batch of all ranks.
Normalizer = Literal["global"]
# Of the package: what computes, and what may be asked for.
Computing = Literal["triton", "eager", "inductor"]
Backend = Literal["auto", Computing]

ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)
CERTAINTIES: tuple[Certainty, ...] = get_args(Certainty)
APD_DENOMINATORS: tuple[ApdDenominator, ...] = get_args(ApdDenominator)
DIFFICULTIES: tuple[Difficulty, ...] = get_args(Difficulty)
SCALES: tuple[Scale, ...] = get_args(Scale)
MULTI_OBJECTIVE: tuple[MultiObjective, ...] = get_args(MultiObjective)
OBJECTIVES: tuple[TokenObjective, ...] = get_args(TokenObjective)
SEQUENCE_OBJECTIVES: tuple[SequenceObjective, ...] = get_args(SequenceObjective)
IMPORTANCE_LEVELS: tuple[ImportanceLevel, ...] = get_args(ImportanceLevel)
KL_ESTIMATORS: tuple[KlEstimator, ...] = get_args(KlEstimator)
TRUST_REGIONS: tuple[TrustRegion, ...] = get_args(TrustRegion)
DENOMINATORS: tuple[Denominator, ...] = get_args(Denominator)
(GLOBAL,) = get_args(Normalizer)
BACKENDS: tuple[Backend, ...] = get_args(Backend)
