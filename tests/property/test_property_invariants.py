"""What must not change a loss: garbage that is not read, the layout, other sequences, threads."""

from dataclasses import dataclass, replace

import pytest
import torch
from batches import hidden_batches, logits_batches, logprob_batches, poisoned
from calls import TOLERANCES, assert_within, exact_of, leaves_of, run, sampling_mask
from cases import Batch, Layout
from hypothesis import strategies as st
from strategies import one_of, seeds
from test_property_plans import part_of

import mapo_kernels as mk

LEVELS = {"logprobs": logprob_batches, "logits": logits_batches, "hidden": hidden_batches}


def batches(device, levels=tuple(LEVELS), **frame):
    return st.one_of(*[LEVELS[level](device, **frame) for level in levels])


def assert_bitwise(first, second):
    """Every result of two calls is the same, bit for bit."""
    first, second = first.every(), second.every()
    assert first.keys() == second.keys()
    for name, x in first.items():
        same = (x == second[name]) | (x.isnan() & second[name].isnan())
        assert same.all(), f"{name}: {x[~same][:5].tolist()} is {second[name][~same][:5].tolist()}"


@pytest.fixture
def threads():
    """Sets the number of torch's threads, until the test is over."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def threads_of(search):
    """Numbers of threads to try; the interpreter has one, whatever torch does."""
    return (1,) if search.is_slow else (1, 2)


@st.composite
def twice_poisoned(draw, device):
    """A batch, and the same batch with other garbage where nothing is read."""
    batch = draw(batches(device))
    return batch, poisoned(batch, torch.Generator().manual_seed(draw(seeds)))


def test_what_is_masked_may_be_anything(device, search):
    def check(drawn):
        first, second = drawn
        assert_bitwise(run(first, device), run(second, device, outside=-1e30))

    search(check, twice_poisoned(device), examples=60)


def test_runs_are_bitwise_equal_on_any_number_of_threads(device, search, threads):
    def check(batch):
        for number in threads_of(search):
            threads(number)
            first = run(batch, device)
            assert_bitwise(first, run(batch, device))

    search(check, batches(device), examples=40)


def test_packed_equals_padded(device, search):
    def check(batch):
        packed = run(batch, device)
        everywhere = torch.ones_like(batch.layout.inside)
        padded = replace(batch, layout=Layout(batch.layout.live, everywhere))
        found = run(padded, device)
        exact = exact_of(batch, found.advantages)
        tolerance = 2 * TOLERANCES[found.loss.dtype]
        assert_within("loss", packed.loss, found.loss.double(), exact.loss_scale, tolerance)
        for name, grad in packed.gradients.items():
            scale, wanted = exact.gradient_scales[name], found.gradients[name].double()
            assert_within(f"{name}.grad", grad, wanted, scale, tolerance, 2 * batch.upstream)
        assert batch.groups is None or torch.equal(packed.advantages, found.advantages)

    search(check, batches(device, packed=True), examples=40)


@dataclass
class Company:
    """A batch, and some of its sequences."""

    batch: Batch
    chosen: torch.Tensor


@st.composite
def companies(draw, device):
    """Batches without rewards, whose sequences have nothing to do with one another."""
    batch = draw(batches(device, ("logprobs", "logits"), with_rewards=False))
    spec = batch.spec
    if spec.aggregation == "prompt-mean":
        # Sequences of a prompt share its weight.
        spec = replace(spec, aggregation="seq-mean-token-sum")
    batch = replace(batch, spec=spec, told={}, normalizer=draw(one_of(7.0, 3.7)))
    n = batch.layout.n_sequences
    first = draw(st.integers(0, n - 1))
    chosen = torch.arange(first, draw(st.integers(first + 1, n)))
    if not batch.layout.packed:
        chosen = torch.tensor(draw(st.lists(st.integers(0, n - 1), min_size=1, unique=True)))
    return Company(batch, chosen)


def check_company(batch, chosen, device):
    """Sequences alone have the gradients that they have in their batch, bit for bit."""
    if batch.spec.how.denominator == "prompts":
        return  # The other sequences of a prompt are a part of each one's weight.
    whole, part = run(batch, device), part_of(batch, chosen)
    layout = part.layout
    if batch.advantages is not None and batch.advantages.dim() == 2 and layout.packed:
        # As many packed tokens as sequences: their advantages are read as the sequences' own.
        if layout.total == layout.n_sequences:
            return
    if part.advantages is not None:
        part = replace(part, advantages=batch.advantages[chosen])
    alone = run(part, device)
    for name, grad in alone.gradients.items():
        wanted = whole.gradients[name][chosen]
        # A float16 gradient that overflowed before an upstream gradient of 0 is NaN in both.
        same = (grad == wanted) | (grad.isnan() & wanted.isnan())
        assert same.all(), f"{name}.grad at {(~same).nonzero()[:5].tolist()}"


def test_a_sequence_alone_equals_the_sequence_in_a_batch(device, search, threads):
    def check(company):
        for number in threads_of(search):
            threads(number)
            check_company(company.batch, company.chosen, device)

    search(check, companies(device), examples=60)


@pytest.mark.parametrize("number", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_long_row_alone_equals_the_row_in_a_batch(device, threads, number):
    """Long enough that torch gives a sum to several threads."""
    threads(number)
    logits = torch.randn(3, 2, 40_000, device=device)
    ids = torch.randint(0, 40_000, (3, 2), device=device)
    logp, entropy = mk.token_logprobs(logits, ids, return_entropy=True)
    for i, t in ((0, 0), (2, 1)):
        one = (slice(i, i + 1), slice(t, t + 1))
        alone = mk.token_logprobs(logits[one], ids[one], return_entropy=True)
        assert torch.equal(alone[0], logp[one]) and torch.equal(alone[1], entropy[one])
    given = {"spec": mk.LossSpec(importance_level="sequence"), "normalizer": 3.0}
    length = 40_000
    logprobs, old = -torch.rand(2, 3, length, device=device)
    grads = []
    for rows in (slice(0, 3), slice(1, 2)):
        leaf = logprobs[rows].clone().requires_grad_()
        advantages = torch.tensor([1.0, 0.5, -1.0], device=device)[rows]
        mk.mapo_loss(leaf, advantages=advantages, old_logprobs=old[rows], **given).loss.backward()
        grads.append(leaf.grad)
    assert torch.equal(grads[0][1:2], grads[1])


def scored(batch, device):
    """Log-probs [B, T] of a batch's live tokens, by `token_logprobs`."""
    layout, temperature = batch.layout, batch.rows.temperature
    if isinstance(temperature, torch.Tensor):
        if layout.packed:
            temperature = layout.arrange(temperature[:, None].expand(layout.live.shape), 1.0)
        temperature = temperature.to(device)
    logp = mk.token_logprobs(
        leaves_of(batch, device)["logits"].passed.detach(),
        layout.arrange(batch.rows.ids, -1).to(device),
        temperature=temperature,
        mask=layout.arrange(layout.live, False).to(device),
        **sampling_mask(batch, device),
    )
    return layout.restore(logp.cpu())


def test_scored_log_probs_are_those_inside_the_loss(device, search, threads):
    def check(batch):
        if batch.spec.rollout_mask is not None:
            return  # Rows that it drops hold garbage; other old log-probs would drop other rows.
        for number in threads_of(search):
            threads(number)
            tensors = batch.tensors | {"old_logprobs": scored(batch, device)}
            # The last bit is a matter of the layout in memory, which a copy may change.
            rows = replace(batch.rows, options={})
            metrics = run(replace(batch, tensors=tensors, rows=rows), device).metrics
            if metrics["scored_tokens"] > 0:
                assert metrics["ratio_mean"] == metrics["ratio_max"] == 1
                assert metrics["approx_kl"] == 0

    search(check, batches(device, ("logits",)), examples=40)
