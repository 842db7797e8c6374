"""Log-probs and entropies of sampled tokens from logits."""

import math

import torch
from torch import Tensor


def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    kept: list[list[int]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each token and entropy of the distribution it was drawn from.

    Differentiable with respect to `logits`. Both results belong to the tempered distribution
    softmax(logits / temperature), as in TRL and verl. A logit of -inf is a token that cannot be
    sampled: it adds nothing to the entropy. A token id outside [0, V) has a log-prob of NaN.

    Args:
        logits: [..., V], any floating dtype.
        token_ids: [...] integers.
        temperature: a positive number, or one per sequence [B] for logits [B, T, V].
        mask: [...], nonzero for live tokens. At the others both results are 0, and so is the
            gradient, whatever the logits and ids there (NaN, inf, -100).
        kept: of each token, in the order of the flattened batch, the columns that it could have
            been sampled from; an empty list stands for all. The others count as logits of -inf,
            and a token that is not among its own has a log-prob of NaN.

    Returns:
        Log-probs [...] and entropies [...] in nats, float64.
    """
    V = logits.shape[-1]
    live = torch.ones_like(token_ids, dtype=torch.bool) if mask is None else mask != 0
    tau = torch.as_tensor(temperature, dtype=torch.float64, device=logits.device)
    if tau.dim() == 1:
        tau = tau[:, None, None]

    # Masked rows are replaced before the softmax: its derivative would turn their NaN into NaN.
    x = torch.where(live[..., None], logits.double(), 0.0) / tau
    columns = torch.ones_like(x, dtype=torch.bool)
    if kept is not None:
        for row, only in zip(columns.view(-1, V), kept, strict=True):
            if only:
                row[:] = False
                row[only] = True
        x = torch.where(columns, x, -math.inf)
    log_p = torch.log_softmax(x, dim=-1)  # [..., V]

    known = (token_ids >= 0) & (token_ids < V)
    y = torch.where(known, token_ids, 0).long()
    logp = log_p.gather(-1, y[..., None]).squeeze(-1)
    is_kept = columns.gather(-1, y[..., None]).squeeze(-1)
    logp = torch.where(known & is_kept, logp, math.nan)

    # p log p is 0 where p is 0, although log p is -inf there.
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0.0)).sum(-1)
    return torch.where(live, logp, 0.0), torch.where(live, entropy, 0.0)
