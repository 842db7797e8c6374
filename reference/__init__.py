"""Float64 oracle of MAPO (arXiv 2509.18849): plain loops, plain autograd, no kernels.

It shares no code with the package it judges. Read it as the definition: `advantages` turns rewards
into advantages, `losses` turns log-probs and advantages into a loss, `logits` turns logits into
log-probs.
"""

from reference.advantages import GroupStats, certainty_weight, group_advantages
from reference.logits import token_logprobs
from reference.losses import mapo_loss
from reference.settings import LossSettings

__all__ = [
    "GroupStats",
    "LossSettings",
    "certainty_weight",
    "group_advantages",
    "mapo_loss",
    "token_logprobs",
]
