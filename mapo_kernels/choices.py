"""Names that settings take: a type of each, for type checkers and editors, and their tuple.

Those of losses are in `spec.py`. These need no torch: command lines list them.
"""

from __future__ import annotations

from typing import Literal, get_args

# Of advantages.
Estimator = Literal["mapo", "grpo", "apd", "mean", "rloo"]
Certainty = Literal["quadratic", "linear", "entropy", "step"]
ApdDenominator = Literal["bounded", "paper"]
Difficulty = Literal["focal", "power"]
Scale = Literal["group", "batch", "none"]
MultiObjective = Literal["sum_then_normalize", "normalize_then_sum"]
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
(GLOBAL,) = get_args(Normalizer)
BACKENDS: tuple[Backend, ...] = get_args(Backend)
