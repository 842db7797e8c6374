"""Sampling masks: what a row keeps, what it costs, and what is never read.

That losses and scores equal the oracle's is held by the random search (`tests/property`).
"""

import pytest
import torch
from backends import with_two_threads_too
from hidden import make_hidden
from hidden import run as run_hidden
from support import NAN, assert_close, keep, logits_run, make_logits, tune
from torch.utils._python_dispatch import TorchDispatchMode

import mapo_kernels as mk
import reference
from benchmarks.memory import allocations
from mapo_kernels import kept_rows, operators

LEVELS = ("token", "sequence")


def mask_of(batch, device, vocab, **given):
    return mk.SamplingMask.from_lists(keep(batch["ids"], vocab, **given), device)


def test_the_forms_of_a_mask():
    lists = [[3, 1], None, [0], [], [4, 2, 0]]
    mask = mk.SamplingMask.from_lists(lists)
    assert mask.token_ids.tolist() == [3, 1, 0, 4, 2, 0] and mask.token_ids.dtype == torch.int32
    assert mask.offsets.tolist() == [0, 2, 2, 3, 3, 6] and mask.n_tokens == 5
    assert mask.counts.tolist() == [2, 0, 1, 0, 3]
    again = mk.SamplingMask.from_counts(mask.token_ids, torch.tensor([2, 0, 1, 0, 3]))
    assert again.offsets.tolist() == mask.offsets.tolist()
    for chosen in (torch.tensor([4, 0]), torch.tensor([True, False, False, False, True])):
        some = mask.select(chosen)
        assert sorted(some.counts.tolist()) == [2, 3] and some.token_ids.shape == (5,)
    assert mask.select(torch.tensor([4, 1, 0])).token_ids.tolist() == [4, 2, 0, 3, 1]
    assert mask.select(slice(2, 4)).offsets.tolist() == [0, 1, 1]
    both = mk.SamplingMask.cat([mask.select(slice(0, 2)), mask.select(slice(2, 5))])
    assert both.token_ids.tolist() == mask.token_ids.tolist()
    assert both.offsets.tolist() == mask.offsets.tolist()
    empty = mk.SamplingMask.from_lists([])
    assert empty.n_tokens == 0 and empty.token_ids.shape == (0,)


def test_what_filters_keep():
    logits = torch.tensor([[0.0, 1.0, 1.0, -1.0, 3.0], [2.0, 2.0, 2.0, 2.0, 2.0]])

    def lists(**given):
        mask = mk.SamplingMask.from_logits(logits, **given)
        return [sorted(x.tolist()) for x in mask.token_ids.split(mask.counts.tolist())]

    assert lists() == [[], []]
    # What ties with the second stays; a row that keeps all columns has none listed.
    assert lists(top_k=2) == [[1, 2, 4], []]
    assert lists(top_k=1)[0] == [4] and lists(top_p=0.5)[0] == [4]
    assert lists(min_p=0.1)[0] == [1, 2, 4] and lists(min_p=0.1, temperature=0.5)[0] == [4]
    assert len(lists(top_p=0.5)[1]) == 3
    for name, value in (("top_p", 0.0), ("top_k", -1), ("min_p", 1.5), ("temperature", 0)):
        with pytest.raises(ValueError, match=name):
            mk.SamplingMask.from_logits(logits, **{name: value})


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bonus", [0.0, 0.1])
def test_nothing_else_is_read_and_a_single_column_is_certain(bonus, level, device):
    batch = make_logits(4, 3, 40, torch.float32, mask="none")
    lists = keep(batch["ids"], 40)
    columns = torch.zeros(12, 40, dtype=torch.bool)
    for row, kept in zip(columns, lists, strict=True):
        row[kept] = len(kept) > 1
    batch["logits"] = batch["logits"].where(columns.view(4, 3, 40), NAN)
    mask = mk.SamplingMask.from_lists(lists, device)
    spec = mk.LossSpec(importance_level=level, entropy_coef=bonus, score_all=True)
    given = {"sampling_mask": mask, "old_logprobs": batch["old"]}
    loss, grad, metrics = logits_run(batch, spec, device, **given)
    assert loss.isfinite() and metrics["scored_tokens"] == 12
    assert (grad.cpu()[~columns.view(4, 3, 40)] == 0).all()
    assert (grad.cpu()[columns.view(4, 3, 40)] != 0).any()
    inplace = logits_run(batch, spec, device, inplace=True, **given)
    assert torch.equal(inplace[1], grad) and torch.equal(inplace[0], loss)
    ids = batch["ids"].to(device)
    logp, entropy = mk.token_logprobs(
        batch["logits"].to(device), ids, sampling_mask=mask, return_entropy=True
    )
    alone = torch.tensor([len(kept) == 1 for kept in lists]).view(4, 3)
    assert (logp.cpu()[alone] == 0).all() and (entropy.cpu()[alone] == 0).all()
    assert (logp.cpu()[~alone] < 0).all()


@pytest.mark.parametrize("level", LEVELS)
def test_on_policy_ratios_are_exactly_1(level, device):
    batch = make_hidden(4, 3)
    mask = mask_of(batch, device, 50, sizes=(1, 2, 5, 50))
    tensors = {k: batch[k].to(device) for k in ("hidden", "weight", "bias", "ids")}
    head = (tensors["hidden"], tensors["weight"], tensors["ids"])
    given = {"bias": tensors["bias"], "sampling_mask": mask}
    old = mk.token_logprobs_from_hidden(*head, mask=batch["mask"].to(device), **given)
    spec = mk.LossSpec(importance_level=level)
    metrics = run_hidden(batch, spec, device, old_logprobs=old, sampling_mask=mask)[2]
    assert metrics["ratio_mean"] == metrics["ratio_max"] == 1 and metrics["approx_kl"] == 0


@pytest.mark.parametrize("where", ["logits", "hidden"])
def test_a_token_that_is_not_kept_makes_the_loss_nan(where, device, monkeypatch):
    batch = make_hidden(2, 3, mask="none") if where == "hidden" else make_logits(2, 3, 50)
    batch = batch if where == "hidden" else make_logits(2, 3, 50, torch.float32, mask="none")
    batch["advantages"] = torch.ones(2)
    call = run_hidden if where == "hidden" else logits_run
    for size in (1, 3, 49):
        lists = keep(batch["ids"], 50, sizes=(4,))
        token = int(batch["ids"].view(-1)[4])
        lists[4] = [x for x in range(50) if x != token][:size]
        mask = mk.SamplingMask.from_lists(lists, device)
        loss = call(batch, mk.LossSpec(), device, sampling_mask=mask)[0]
        assert loss.isnan()
        # Where it counts for nothing, it does nothing.
        without = {**batch, "advantages": torch.tensor([1.0, 0.0])}
        assert call(without, mk.LossSpec(), device, sampling_mask=mask)[0].isfinite()
        with monkeypatch.context() as patch:
            patch.setenv("MAPO_KERNELS_VALIDATE", "1")
            with pytest.raises(ValueError, match=f"none of {token} for token 4"):
                call(batch, mk.LossSpec(), device, sampling_mask=mask)


WRONG = {
    "ascend": ([0, 1], [0, 2, 1, 2, 2]),
    "ascend from 0 to 2": ([0, 1], [1, 1, 1, 1, 2]),
    "the length of token_ids": ([0, 1], [0, 0, 0, 0, 9]),
    r"expected ids in \[0, 50\)": ([0, 50], [0, 1, 1, 1, 2]),
    r"ids in \[0, 50\), got -7": ([0, -7], [0, 1, 1, 1, 2]),
    "got 3 twice for token 1": ([3, 3, 3], [0, 1, 3, 3, 3]),
}


@pytest.mark.parametrize("message", WRONG)
@pytest.mark.parametrize("where", ["logits", "hidden"])
def test_what_masks_may_not_be_is_named_and_never_out_of_bounds(
    where, message, device, monkeypatch
):
    ids, offsets = (torch.tensor(x, device=device) for x in WRONG[message])
    mask = mk.SamplingMask(ids, offsets)
    batch = make_hidden(2, 2, mask="none")
    if where == "logits":
        batch["logits"] = torch.randn(2, 2, 50)
    call = run_hidden if where == "hidden" else logits_run
    call(batch, mk.LossSpec(), device, sampling_mask=mask)
    monkeypatch.setenv("MAPO_KERNELS_VALIDATE", "1")
    with pytest.raises(ValueError, match=message):
        call(batch, mk.LossSpec(), device, sampling_mask=mask)


def test_errors_of_a_mask():
    logits, ids = torch.randn(2, 3, 7), torch.zeros(2, 3, dtype=torch.int64)
    mask = mk.SamplingMask.from_lists([[0, 1]] * 6)
    cases = {
        "sampling_mask: expected a SamplingMask": (ids, TypeError),
        "sampling_mask.token_ids: expected int32 or int64": (
            mask._replace(token_ids=mask.token_ids.float()), TypeError,
        ),
        "sampling_mask.offsets: expected a tensor": (mask._replace(offsets=[0]), TypeError),
        "sampling_mask.offsets: expected one dimension": (
            mask._replace(offsets=mask.offsets[None]), ValueError,
        ),
        r"sampling_mask.offsets: expected shape \[7\]": (
            mk.SamplingMask.from_lists([[0]] * 5), ValueError,
        ),
        "sampling_mask.token_ids: expected cpu": (
            mask._replace(token_ids=mask.token_ids.to("meta")), ValueError,
        ),
    }  # fmt: skip
    for message, (wrong, error) in cases.items():
        with pytest.raises(error, match=message):
            mk.token_logprobs(logits, ids, sampling_mask=wrong)
        with pytest.raises(error, match=message):
            mk.make_plan(advantages=torch.ones(2), mask=torch.ones(2, 3), sampling_mask=wrong)
    plan = mk.make_plan(advantages=torch.ones(2), mask=torch.ones(2, 3), sampling_mask=mask)
    with pytest.raises(ValueError, match="expected None with a plan that has one"):
        mk.mapo_loss_from_logits(logits, ids, plan=plan, sampling_mask=mask)


class Largest(TorchDispatchMode):
    """The largest tensor that an operation made, and which products there were."""

    def __init__(self):
        super().__init__()
        self.size, self.names = 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.names.add(function.overloadpacket.__name__)
        # The interpreter's copies of memory are bytes.
        if isinstance(out, torch.Tensor) and out.is_floating_point():
            self.size = max(self.size, out.numel())
        return out


@pytest.mark.parametrize("level", LEVELS)
def test_products_are_those_of_the_kept_columns(level, device, monkeypatch):
    """Three of them, each of what rows of more than one column keep; none of the whole head."""
    n, vocab, width = 24, 640, 16
    batch = make_hidden(6, 4, mask="none")
    batch["weight"], batch["bias"] = torch.randn(vocab, width), torch.randn(vocab)
    batch["advantages"][2] = 0
    mask = mask_of(batch, device, vocab, sizes=(1, 2, 1, 7))
    pairs = sum(c for i, c in enumerate(mask.counts.tolist()) if c > 1 and i // 4 != 2)
    count = {"products": 0, "sums": 0}
    products, sums = operators.gather_products, operators.gather_sums

    def counted_products(hidden, weight, source, row, columns, bounds, out):
        count["products"] += columns.shape[0]
        return products(hidden, weight, source, row, columns, bounds, out=out)

    def counted_sums(matrix, index, *rest, out):
        count["sums"] += index.shape[0]
        return sums(matrix, index, *rest, out=out)

    monkeypatch.setattr(operators, "gather_products", counted_products)
    monkeypatch.setattr(operators, "gather_sums", counted_sums)
    spec = mk.LossSpec(importance_level=level)
    for wanted, n_sums in (((True, True, True), 2), ((True, False, False), 1)):
        count.update(products=0, sums=0)
        with Largest() as made:
            run_hidden(batch, spec, device, sampling_mask=mask, wanted=wanted)
        assert count == {"products": pairs, "sums": n_sums * pairs}
        assert not made.names & {"mm", "addmm", "bmm", "matmul"}
        assert made.size <= vocab * width < n * vocab


def test_memory_is_that_of_the_kept_columns():
    n, vocab, width = 512, 4096, 32
    batch = make_hidden(8, 64, mask="none")
    batch["hidden"] = torch.randn(8, 64, width)
    batch["weight"], batch["bias"] = torch.randn(vocab, width), None
    batch["ids"] = torch.randint(0, vocab, (8, 64))
    mask = mask_of(batch, "cpu", vocab, sizes=(1, 2, 8, 30))
    nnz = mask.token_ids.shape[0]
    mk.set_backend("eager")
    with allocations() as memory:
        run_hidden(batch, mk.LossSpec(), torch.device("cpu"), sampling_mask=mask)
    mk.set_backend(None)
    beside_weight = memory.peak - 3 * 4 * vocab * width
    assert beside_weight <= 4 * (8 * nnz + 3 * nnz * width + 6 * n * width)


@with_two_threads_too
@pytest.mark.parametrize("piece", [2, 64])
def test_a_column_in_every_row_and_runs_are_bitwise_equal(piece, device, monkeypatch):
    tune(monkeypatch, "KEPT", piece=piece, cpu_share=1, gpu_share=1)
    batch = make_hidden(6, 5, mask="none")
    lists = keep(batch["ids"], 50, sizes=(2, 3, 5), others=(7, 8))
    mask = mk.SamplingMask.from_lists(lists, device)
    spec = mk.LossSpec(entropy_coef=0.05)
    runs = [run_hidden(batch, spec, device, sampling_mask=mask, normalizer=9.0) for _ in range(2)]
    for first, second in zip(runs[0][1], runs[1][1], strict=True):
        assert torch.equal(first, second)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    exact = run_hidden(
        wide, spec, torch.device("cpu"), sampling_mask=mask.to("cpu"), normalizer=9.0
    )
    for grad, wanted in zip(runs[0][1], exact[1], strict=True):
        assert_close(grad, wanted, 1e-6)
    # A sequence alone, and one with others.
    part = {k: v[2:3] if v.shape[:1] == (6,) else v for k, v in batch.items()}
    alone = mask.select(slice(10, 15))
    grads = run_hidden(part, spec, device, sampling_mask=alone, normalizer=9.0)[1]
    assert torch.equal(grads[0], runs[0][1][0][2:3])


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_narrow_heads_and_rows_of_every_kind(softcap, device, monkeypatch):
    """Rows without a mask, with a wide one, with a narrow one and certain ones, in bfloat16."""
    tune(monkeypatch, "KEPT", cpu_share=8, gpu_share=8)
    batch = make_hidden(4, 5, torch.bfloat16)
    lists = keep(batch["ids"], 50, sizes=(0, 1, 3, 40))
    mask = mk.SamplingMask.from_lists(lists, device)
    spec = mk.LossSpec(objective="none", entropy_coef=0.1)
    given = {"chunk_rows": 3, "softcap": softcap, "logit_scale": 0.7}
    loss, grads, _ = run_hidden(batch, spec, device, sampling_mask=mask, **given)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    exact = run_hidden(wide, spec, torch.device("cpu"), sampling_mask=mask.to("cpu"), **given)
    assert_close(loss, exact[0], 1e-6)
    for grad, wanted in zip(grads, exact[1], strict=True):
        assert grad.dtype == torch.bfloat16
        assert (grad.cpu().double() - wanted).abs().max() <= 2**-7 * wanted.abs().max()


def test_which_rows_go_through_the_whole_head(monkeypatch):
    batch = make_hidden(2, 4, mask="none")
    mask = mask_of(batch, "cpu", 50, sizes=(0, 1, 6, 7))
    kept, ids = mask.resolve(batch["ids"], 50)
    head = mk.batch.HeadInputs(batch["weight"])
    tune(monkeypatch, "KEPT", cpu_share=8)
    few = kept_rows.takes_few(mk.batch.RowInputs(ids, kept=kept), head)
    assert few.tolist() == [False, True, True, False] * 2


@pytest.mark.parametrize("level", LEVELS)
def test_compiled(level, device):
    batch = make_logits(3, 4, 40, torch.float32)
    mask = mask_of(batch, device, 40, sizes=(0, 1, 2, 5))
    spec = mk.LossSpec(importance_level=level, entropy_coef=0.1)
    names = ("ids", "old", "advantages", "mask")
    ids, old, advantages, live = (batch[k].to(device) for k in names)

    def step(x, kept, offsets):
        sampling_mask = mk.SamplingMask(kept, offsets)
        given = {"old_logprobs": old, "advantages": advantages, "mask": live, "spec": spec}
        return mk.mapo_loss_from_logits(x * 1, ids, sampling_mask=sampling_mask, **given).loss

    leaf = batch["logits"].to(device).requires_grad_()
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found = [f(leaf, *mask) for f in (step, compiled)]
    grads = [torch.autograd.grad(x, leaf)[0] for x in found]
    assert_close(found[1], found[0], 1e-6)
    assert_close(grads[1], grads[0], 1e-6)


def test_dense_logits_of_minus_infinity_give_the_same(device):
    batch = make_logits(3, 4, 33, torch.float32, mask="none")
    lists = keep(batch["ids"], 33, sizes=(2, 9, 33))
    columns = torch.zeros(12, 33, dtype=torch.bool)
    for row, kept in zip(columns, lists, strict=True):
        row[kept] = True
    spec = mk.LossSpec(entropy_coef=0.1)
    mask = mk.SamplingMask.from_lists(lists, device)
    sparse = logits_run(batch, spec, device, sampling_mask=mask)
    dense = {**batch, "logits": batch["logits"].masked_fill(~columns.view(3, 4, 33), -torch.inf)}
    whole = logits_run(dense, spec, device)
    assert_close(sparse[0], whole[0], 2e-6)
    assert_close(sparse[1], whole[1], 2e-6)
    for name, value in whole[2].items():
        assert_close(sparse[2][name], value, 2e-6)
    exact, _ = reference.token_logprobs(batch["logits"], batch["ids"], kept=lists)
    logp = mk.token_logprobs(
        batch["logits"].to(device), batch["ids"].to(device), sampling_mask=mask
    )
    assert_close(logp, exact, 2e-6)


@pytest.mark.parametrize("dtype", (torch.int64, torch.float32, torch.uint8), ids=str)
def test_a_token_mask_may_have_any_dtype(dtype):
    logits, ids = torch.randn(2, 3, 11), torch.randint(0, 11, (2, 3))
    mask = torch.tensor([[1, 0, 1], [0, 2, 1]])
    kept = mk.SamplingMask.from_lists([[int(y), (int(y) + 1) % 11] for y in ids.flatten()])
    arguments = {"sampling_mask": kept, "return_entropy": True}
    expected = mk.token_logprobs(logits, ids, mask=mask != 0, **arguments)
    found = mk.token_logprobs(logits, ids, mask=mask.to(dtype), **arguments)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
