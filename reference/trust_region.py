"""Which tokens have left the trust region."""

import math
from typing import TYPE_CHECKING

from reference.settings import LossSettings

if TYPE_CHECKING:
    from reference.losses import Token


def has_left(token: "Token", s: LossSettings, sign: int) -> bool:
    """Whether a token is out of the trust region on the side of `sign`, where its advantage pushes.

    DPPO (arXiv 2602.04879), section on binary divergences: the sampled token against all others.
    """
    if s.trust_region is None or not token.A * sign > 0:
        return False
    p, q = math.exp(token.logp.item()), math.exp(token.old.item())
    if not (p - q) * sign > 0:
        return False
    distance = abs(p - q)
    if s.trust_region == "kl":
        rest_p = max(-math.expm1(token.logp.item()), 0.0) + 1e-8
        rest_q = max(-math.expm1(token.old.item()), 0.0)
        distance = rest_q * math.log((rest_q + 1e-8) / rest_p)
        if q > 0:
            distance += q * (token.old - token.logp).item()
    return distance > (s.trust_high if sign > 0 else s.trust_low)
