"""Strategies for whole loss calls: drawn choices, and bulk numbers from a drawn seed.

Everything that a call must not read holds garbage. Ratios keep away from where a clip or a clamp
sets in: there the last bit of a log-prob decides on which side a token is.
"""

import math
from dataclasses import replace

import torch
from cases import Batch, Rows, lists_of
from hypothesis import assume
from hypothesis import strategies as st
from oracle import is_read, leaves_of, logits_of, weights_of
from strategies import NARROW, groupings, groups, input_dtypes, layouts, loss_specs, one_of, seeds

import reference

_MARGIN = 2e-3
# Package constants, and values at which a small batch takes the path of a large one.
CONSTANTS = {
    "EAGER.chunk_tokens": (1, 5, 12),
    "EAGER.chunk_logits": (1, 40, 200),
    "ADVANTAGES.match_limit": (0, 2),
    "LOGITS.match_limit": (0, 2),
    "LOGITS.fused_rows": (0, 4),
    "HIDDEN.cpu_chunk": (1, 3000),
    "HIDDEN.multiple": (1, 2, 3),
    "LOGPROBS.multiprocessors": (1, 2),
    "KEPT.cpu_share": (1, 4, 70),
    "KEPT.piece": (1, 2),
}


@st.composite
def constants(draw):
    """Some of the package's constants."""
    chosen = {k: draw(st.none() | st.sampled_from(v)) for k, v in CONSTANTS.items()}
    return {k: v for k, v in chosen.items() if v is not None}


def garbage(x, keep, generator):
    """`x`, with something else where `keep` is not."""
    if x.is_floating_point():
        worst = torch.tensor([math.nan, math.inf, -math.inf, torch.finfo(x.dtype).max, 0.0])
    else:
        info = torch.iinfo(x.dtype)
        worst = torch.tensor([-100 if info.min < 0 else 200, info.max, info.min, 0])
    picked = worst[torch.randint(0, len(worst), x.shape, generator=generator)].to(x.dtype)
    keep = keep.view(keep.shape + (1,) * (x.dim() - keep.dim()))
    return torch.where(keep, x, picked)


def _borders(spec):
    """Where the ratio's logarithm meets a clip or a clamp."""
    ratios = []
    if spec.objective == "clip":
        ratios = [1 - spec.eps_low, 1 + spec.eps_high, spec.dual_clip]
    elif spec.objective == "cispo":
        ratios = [spec.eps_low_cispo, spec.eps_high_cispo]
    return torch.tensor([20.0, -20.0, *[math.log(x) for x in ratios if x]], dtype=torch.float64)


def _at_trust_limit(logp, old, spec):
    """Whether the distance of a token's probabilities is near one of the trust region's limits."""
    if spec.trust_region is None:
        return torch.zeros_like(logp, dtype=torch.bool)
    p, q = logp.exp(), old.exp()
    distance = (p - q).abs()
    if spec.trust_region == "kl":
        rest = (1 - q).clamp(min=0)
        distance = q * (old - logp) + rest * ((rest + 1e-8) / ((1 - p).clamp(min=0) + 1e-8)).log()
    limits = torch.tensor([spec.trust_low, spec.trust_high], dtype=torch.float64)
    return ((distance[..., None] - limits).abs() < _MARGIN * limits).any(-1)


def off_borders(old, logp, live, spec):
    """Old log-probs [B, T], moved until no ratio is at a border; in their own dtype."""
    borders = _borders(spec)
    sides = [-spec.eps_low, spec.eps_high] if spec.objective == "gmpo" else [20.0, -20.0]
    of_tokens = torch.tensor(sides, dtype=torch.float64)
    for _ in range(30):
        own = torch.where(live, logp - old.double(), 0.0)
        level = own
        if spec.importance_level == "sequence":
            mean = own.sum(1, keepdim=True) / live.sum(1, keepdim=True).clamp(min=1)
            level = mean.expand_as(own)
        # The metric of the KL clamps each token's own ratio, whatever the level, without a jump.
        near = ((level[..., None] - borders).abs() < _MARGIN).any(-1) & live
        near |= ((own[..., None] - of_tokens).abs() < _MARGIN).any(-1) & live
        near |= _at_trust_limit(logp, old.double(), spec) & live
        if not near.any():
            return old
        step = 0.01 + 0.02 * old.double().abs() * torch.finfo(old.dtype).eps / 1e-3
        old = torch.where(near, old.double() - step, old.double()).to(old.dtype)
    assume(False)
    return old


def off_mask(rollout, old, live, spec):
    """Rollout log-probs [B, T], moved until no ratio is where the mask against them sets in."""
    borders = torch.tensor([math.log(x) for x in spec.rollout_mask or () if x] + [20.0, -20.0])
    for _ in range(30):
        own = torch.where(live, old.double() - rollout.double(), 0.0)
        level = own
        if spec.rollout_mask_level == "sequence":
            mean = own.clamp(-20, 20).sum(1, keepdim=True) / live.sum(1, keepdim=True).clamp(min=1)
            level = mean.expand_as(own)
        near = ((level[..., None] - borders).abs() < _MARGIN).any(-1) & live
        if not near.any():
            return rollout
        step = 0.01 + 0.02 * rollout.double().abs() * torch.finfo(rollout.dtype).eps / 1e-3
        rollout = torch.where(near, rollout.double() - step, rollout.double()).to(rollout.dtype)
    assume(False)
    return rollout


class Numbers:
    """Bulk numbers from one generator, in float64."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape):
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64)

    def integers(self, high, *shape):
        return torch.randint(0, high, shape, generator=self.generator)


@st.composite
def _about_tokens(draw, batch, logp, numbers):
    """Old log-probs and so on [B, T], near `logp` [B, T] in float64; clean."""
    shape, spec = logp.shape, batch.spec
    side = draw(one_of(batch.dtype, torch.float32))
    given = {}

    def near(spread, jumps):
        x = logp + numbers.normal(*shape) * spread
        return x + jumps * numbers.normal(*shape).sign() * (numbers.uniform(*shape) < 0.1)

    if spec.rollout_mask is not None or draw(one_of(True, True, False)):
        spread, jumps = draw(one_of((0.3, 0.0), (0.0, 0.0), (2.0, 0.0), (0.3, 25.0)))
        old = near(spread, jumps).to(side)
        given["old_logprobs"] = off_borders(old, logp, batch.layout.live, spec)
    if spec.beta or draw(st.booleans()):
        given["ref_logprobs"] = near(draw(one_of(0.3, 0.0, 2.0)), draw(one_of(0.0, 8.0))).to(side)
    if spec.rollout_cap is not None or spec.rollout_mask is not None:
        rollout = near(draw(one_of(0.3, 0.0)), 2.0).to(side)
        if "old_logprobs" in given:
            rollout = off_mask(rollout, given["old_logprobs"], batch.layout.live, spec)
        given["rollout_logprobs"] = rollout
    if draw(st.booleans()):
        weights = numbers.uniform(*shape) * 2 * (numbers.uniform(*shape) < draw(one_of(0.6, 1)))
        weights = weights * draw(one_of(1, 1, -1))
        given["token_weights"] = weights.to(draw(one_of(side, torch.float32)))
    return given


@st.composite
def _advantages(draw, batch, numbers, with_rewards):
    """Where the advantages come from: rewards by group, one each, or one per token."""
    layout, n = batch.layout, batch.layout.n_sequences
    source = draw(one_of("rewards", "rewards", "sequence", "token"))
    if source == "rewards" and with_rewards:
        batch.groups = draw(groups(n, tame=True))
        return
    dtype = draw(one_of(batch.dtype, torch.float32))
    # As many packed tokens as sequences are read as the sequences' own.
    per_token = source == "token" and not (layout.packed and layout.total == n)
    shape = (n, layout.length) if per_token else (n,)
    A = numbers.normal(*shape) * draw(one_of(1.0, 1.0, 30.0))
    batch.advantages = (A * (numbers.uniform(*shape) < draw(one_of(0.6, 1)))).to(dtype)
    if batch.spec.aggregation == "prompt-mean":
        batch.ids, batch.told = draw(groupings(n))


@st.composite
def _frames(draw, device, with_entropy, with_rewards=True, packed=None):
    """A batch without its numbers, and where they come from."""
    layout = draw(layouts(device, packed=packed))
    batch = Batch(
        layout=layout,
        spec=draw(loss_specs(with_entropy, layout.packed)),
        dtype=draw(input_dtypes(device)),
        normalizer=draw(one_of(None, None, 3.7, 12)),
        upstream=draw(one_of(1.0, -2.5, 0.0, 1e-3)),
        constants=draw(constants()),
        strided=draw(one_of(False, False, True)),
    )
    if batch.normalizer is not None and draw(st.booleans()):
        dtypes = one_of(torch.float32, torch.float64, torch.int64)
        shape = draw(one_of((), (1,)))
        batch.normalizer = torch.tensor(batch.normalizer).to(draw(dtypes)).reshape(shape)
    numbers = Numbers(draw(seeds))
    draw(_advantages(batch, numbers, with_rewards))
    return batch, numbers


def poisoned(batch, generator):
    """The batch with garbage wherever nothing may be read, at tokens of no weight included."""
    live, rows = batch.layout.live, batch.rows
    read = live if batch.groups is not None else is_read(batch, batch.advantages)

    def bad(x, keep=read):
        return None if x is None else garbage(x, keep, generator)

    # What says which tokens are masked against rollouts is read of all of them.
    first = {"token_weights"}
    if "rollout_logprobs" in batch.tensors:
        first |= {"old_logprobs", "rollout_logprobs"}
    tensors = {k: bad(x, live if k in first else read) for k, x in batch.tensors.items()}
    advantages = batch.advantages
    if advantages is not None and advantages.dim() == 2:
        weights, keep = weights_of(batch), live
        if weights is not None and batch.spec.importance_level == "token":
            keep = live & (read | (weights != 0))
        advantages = bad(advantages, keep)
    if rows is not None:
        names = ("ids", "logits", "hidden")
        rows = replace(rows, **{name: bad(getattr(rows, name)) for name in names})
    return replace(
        batch, tensors=tensors, advantages=advantages, rows=rows, logprobs=bad(batch.logprobs)
    )


@st.composite
def logprob_batches(draw, device, **frame):
    """Calls of `mapo_loss`."""
    batch, numbers = draw(_frames(device, False, **frame))
    shape = batch.layout.live.shape
    spread = draw(one_of(1.0, 0.01, 12.0))
    logp = (numbers.uniform(*shape).clamp(min=1e-30).log() * spread).to(batch.dtype)
    batch.tensors = draw(_about_tokens(batch, logp.double(), numbers))
    batch.logprobs = logp
    return poisoned(batch, numbers.generator)


@st.composite
def _ids_and_temperature(draw, batch, numbers, vocab):
    """Token ids [B, T] and a temperature."""
    shape = batch.layout.live.shape
    dtypes = [d for d in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)]
    ids = numbers.integers(vocab, *shape).to(draw(st.sampled_from(dtypes)))
    temperature = draw(one_of(1.0, 1, 0.3, 1.7))
    if draw(one_of(True, False, False)):
        dtype = draw(one_of(torch.float32, batch.dtype, *NARROW))
        temperature = (numbers.uniform(shape[0]) * 1.5 + 0.4).to(dtype)
    return ids, temperature


def draw_kept(draw, ids, vocab, numbers):
    """Which columns [.., V] rows keep, the sampled token (if it exists) among them; mostly None."""
    if draw(one_of(True, True, False)):
        return None
    share = numbers.uniform(*ids.shape, 1) ** draw(one_of(1, 4))
    kept = numbers.uniform(*ids.shape, vocab) < share
    index = ids.long().where((ids >= 0) & (ids < vocab), 0)[..., None]
    return kept.scatter(-1, index, True) | (numbers.uniform(*ids.shape, 1) < 0.2)


def _finish_rows(draw, batch, numbers):
    """Draw what is near the rows' log-probs, then put garbage where nothing is read."""
    rows, live = batch.rows, batch.layout.live
    rows.kept = draw_kept(draw, rows.ids, rows.vocab, numbers)
    x = logits_of(rows, live, leaves_of(rows))
    kept = lists_of(rows.kept)
    logp, _ = reference.token_logprobs(x, rows.ids, rows.temperature, live, kept)
    batch.tensors = draw(_about_tokens(batch, logp, numbers))
    return poisoned(batch, numbers.generator)


@st.composite
def logits_batches(draw, device, **frame):
    """Calls of `mapo_loss_from_logits`."""
    batch, numbers = draw(_frames(device, True, **frame))
    vocab = draw(st.integers(1, 70))
    ids, temperature = draw(_ids_and_temperature(batch, numbers, vocab))
    x = numbers.normal(*ids.shape, vocab) * draw(one_of(2.0, 0.1, 6.0))
    x = x + draw(one_of(0.0, 0.0, 30.0, -30.0))
    if draw(one_of(False, False, True)):
        # Columns that cannot be sampled; the token itself was.
        forbidden = numbers.uniform(*x.shape) < 0.3
        x = x.masked_fill(forbidden.scatter(-1, ids.long()[..., None], False), -math.inf)
    options = {"inplace": draw(one_of(False, False, True))}
    batch.rows = Rows(ids, temperature, logits=x.to(batch.dtype), options=options)
    return _finish_rows(draw, batch, numbers)


@st.composite
def hidden_batches(draw, device, **frame):
    """Calls of `mapo_loss_from_hidden`."""
    batch, numbers = draw(_frames(device, True, **frame))
    vocab, width = draw(st.integers(1, 70)), draw(st.integers(1, 9))
    ids, temperature = draw(_ids_and_temperature(batch, numbers, vocab))
    named = ("hidden", "lm_head_weight", "bias")
    frozen = [k for k in named if draw(one_of(False, False, True))]
    batch.rows = Rows(
        ids,
        temperature,
        hidden=numbers.normal(*ids.shape, width).to(batch.dtype),
        weight=numbers.normal(vocab, width).to(batch.dtype),
        bias=numbers.normal(vocab).to(batch.dtype) if draw(st.booleans()) else None,
        softcap=draw(one_of(None, None, 4.0, 30)),
        logit_scale=draw(one_of(1.0, 1, 0.6)),
        options={"chunk_rows": draw(one_of(None, 1, 2, 7))},
        frozen=tuple(frozen),
    )
    return _finish_rows(draw, batch, numbers)
