"""Plans: a loss with one is the loss without, and its micro-batches add up to the batch."""

from dataclasses import dataclass, replace

import torch
from batches import hidden_batches, logits_batches, logprob_batches
from calls import (
    TOLERANCES,
    assert_within,
    check_found,
    exact_of,
    run,
    sampling_mask,
    source_arguments,
)
from cases import Batch, Layout
from hypothesis import strategies as st
from oracle import is_read
from strategies import NARROW, one_of

import mapo_kernels as mk
from mapo_kernels.config import override


@dataclass
class Cut:
    """A batch and the micro-batches that it is cut into: a slice or indices of sequences each."""

    batch: Batch
    parts: list


@st.composite
def cuts(draw, device):
    """Any cut of a batch of any level."""
    level = draw(one_of(logprob_batches, logits_batches, hidden_batches))
    batch = draw(level(device))
    if batch.layout.mask_dtype is None and not batch.layout.packed:
        batch.layout.mask_dtype = torch.bool  # a plan has to learn the shape of the tokens
    n = batch.layout.n_sequences
    ends = sorted(draw(st.lists(st.integers(0, n), max_size=3)))
    parts = [slice(a, b) for a, b in zip([0, *ends], [*ends, n], strict=True)]
    if not batch.layout.packed and draw(st.booleans()):
        order = torch.tensor(draw(st.permutations(range(n))))
        parts = [order[part] for part in parts]
    return Cut(batch, parts)


def plan_of(batch, device):
    with override(batch.constants):
        return mk.make_plan(**source_arguments(batch, device), **sampling_mask(batch, device))


def part_of(batch: Batch, part) -> Batch:
    """The micro-batch of some sequences, with its rows in a canonical form of their own."""
    layout = batch.layout
    own = Layout(layout.live[part], layout.inside[part], layout.packed, 0, 0, layout.mask_dtype)
    rows = batch.rows
    if rows is not None:
        named = {k: getattr(rows, k) for k in ("ids", "logits", "hidden", "kept")}
        if isinstance(rows.temperature, torch.Tensor):
            named["temperature"] = rows.temperature
        rows = replace(rows, **{k: None if x is None else x[part] for k, x in named.items()})
    return replace(
        batch,
        layout=own,
        rows=rows,
        tensors={k: x[part] for k, x in batch.tensors.items()},
        logprobs=None if batch.logprobs is None else batch.logprobs[part],
    )


def check_sum(name, grads, wanted, scale, batch):
    """Gradients of a weight, which every micro-batch rounds by itself, add up to that of all."""
    tolerance = TOLERANCES[torch.float64 if batch.dtype == torch.float64 else torch.float32]
    judged = torch.ones_like(wanted, dtype=torch.bool)
    if batch.dtype in NARROW:
        rounding = torch.finfo(batch.dtype).eps / tolerance
        scale = scale + 2 * rounding * sum(x.double().abs() for x in grads)
        scale = scale + (1 + abs(batch.upstream)) * torch.finfo(batch.dtype).tiny / tolerance
        # Numbers of float16 end at 65504.
        judged = ~torch.stack(grads).isinf().any(0)
    total = sum(x.double() for x in grads)
    assert_within(name, total[judged], wanted[judged], scale.expand_as(wanted)[judged], tolerance)


def test_a_loss_with_a_plan_is_the_loss_without(device, search):
    def check(cut):
        batch, plan = cut.batch, plan_of(cut.batch, device)
        with_plan = run(batch, device, plan=plan)
        check_found(batch, with_plan)
        # What the plan knows of the tokens that can change something, weights and masks apart.
        advantages = batch.advantages if batch.groups is None else with_plan.advantages
        spec = replace(batch.spec, rollout_mask=None, rollout_is=True)
        read = is_read(replace(batch, tensors={}, spec=spec), advantages)
        assert plan.live_counts == tuple(read.sum(1).tolist())
        expected = batch.layout.arrange(read).reshape(-1).nonzero().squeeze(1)
        assert torch.equal(plan.live_rows.cpu(), expected)

    search(check, cuts(device), examples=60)


def test_micro_batches_add_up_for_any_cut(device, search):
    def check(cut):
        batch, plan = cut.batch, plan_of(cut.batch, device)
        parts = [part_of(batch, part) for part in cut.parts]
        found = [
            run(own, device, plan=plan.micro_batch(part))
            for own, part in zip(parts, cut.parts, strict=True)
        ]
        exact = exact_of(batch, plan.advantages.cpu())
        tolerance = TOLERANCES[found[0].loss.dtype]
        total = sum(x.loss for x in found)
        assert_within("sum of losses", total, exact.loss, exact.loss_scale, tolerance)
        for name, wanted in exact.gradients.items():
            if name not in found[0].gradients:
                continue
            scale, grads = exact.gradient_scales[name], [x.gradients[name] for x in found]
            if name in ("lm_head_weight", "bias"):
                check_sum(name, grads, wanted, scale, batch)
                continue
            grad = torch.empty_like(wanted, dtype=batch.dtype)
            for part, own in zip(cut.parts, grads, strict=True):
                grad[part] = own
            assert_within(f"{name}.grad", grad, wanted, scale, tolerance, batch.upstream)
        for name in ("active_tokens", "scored_tokens"):
            assert sum(x.metrics[name] for x in found) == exact.metrics[name]

    search(check, cuts(device), examples=60)
