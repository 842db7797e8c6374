"""What a row is scored as on the eager backend depends on that row: on no other, on no thread.

SPEC 8. The sizes are those from which torch shares one row among its threads (32768 elements), and
those at which vectors end.
"""

import pytest
import torch
from backends import eager_with_one_and_two_threads
from support import make_batch, make_logits, pack

import mapo_kernels as mk
from mapo_kernels.batch import RowInputs, VocabShare
from mapo_kernels.eager import shares as merged
from mapo_kernels.eager.sums import row_sum

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
VOCABS = (5, 33, 1000, 32_769, 50_257)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_has_one_sum(dtype):
    try:
        for length in (1, 7, 8, 31, 1000, 4097, 32_768, 50_257):
            x = torch.randn(5, length, dtype=dtype)
            torch.set_num_threads(1)
            alone = torch.cat([row_sum(x[i : i + 1]) for i in range(5)])
            assert torch.equal(alone, x.sum(1))
            for threads in (1, 2, 4):
                torch.set_num_threads(threads)
                for rows in (slice(0, 1), slice(2, 3), slice(0, 2), slice(1, 4), slice(None)):
                    part, twice = x[rows], x[rows].repeat(1, 2)
                    for view in (part, part.t().contiguous().t(), twice[:, :length]):
                        assert torch.equal(row_sum(view), alone[rows])
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABS)
@eager_with_one_and_two_threads
def test_scores_of_a_row_alone_are_those_in_a_batch(vocab, dtype, device):
    logits = (torch.randn(9, vocab) * 3).to(dtype)
    ids = torch.randint(0, vocab, (9,))
    for entropy in (False, True):
        alone = [
            mk.token_logprobs(logits[i : i + 1], ids[i : i + 1], return_entropy=entropy)
            for i in range(9)
        ]
        alone = [torch.cat(list(x)) for x in (zip(*alone, strict=True) if entropy else [alone])]
        for rows in (2, 3, 9):
            whole = mk.token_logprobs(logits[:rows], ids[:rows], return_entropy=entropy)
            for a, w in zip(alone, whole if entropy else [whole], strict=True):
                assert torch.equal(a[:rows], w)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
@eager_with_one_and_two_threads
def test_the_ratio_of_rows_scored_one_by_one_is_exactly_1(level, dtype, device):
    batch = make_logits(2, 3, 50_257, dtype, mask="none")
    logits, ids = batch["logits"], batch["ids"]
    old = torch.empty(2, 3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for i in range(2):
        for t in range(3):
            old[i, t] = mk.token_logprobs(logits[i : i + 1, t : t + 1], ids[i : i + 1, t : t + 1])
    for entropy_coef in (0.0, 0.1):
        out = mk.mapo_loss_from_logits(
            logits,
            ids,
            advantages=torch.tensor([1.0, -0.5], dtype=old.dtype),
            old_logprobs=old,
            spec=mk.LossSpec(importance_level=level, entropy_coef=entropy_coef),
        )
        assert out.metrics["ratio_mean"] == 1 and out.metrics["ratio_max"] == 1
        assert out.metrics["approx_kl"] == 0


@pytest.mark.parametrize("level", ["token", "sequence"])
@eager_with_one_and_two_threads
def test_the_gradient_of_a_row_alone_is_that_in_a_batch(level, device):
    batch = make_logits(6, 1, 40_000, torch.float32, mask="none")
    spec = mk.LossSpec(importance_level=level, entropy_coef=0.1)

    def gradient(rows):
        logits = batch["logits"][rows].clone().requires_grad_()
        mk.mapo_loss_from_logits(
            logits,
            batch["ids"][rows],
            advantages=batch["advantages"][rows] + 1,
            old_logprobs=batch["old"][rows],
            normalizer=3.0,
            spec=spec,
        ).loss.backward()
        return logits.grad

    whole = gradient(slice(None))
    for i in range(6):
        assert torch.equal(gradient(slice(i, i + 1)), whole[i : i + 1])


@pytest.mark.parametrize("length", [5, 9, 33, 1000, 33_001])
@pytest.mark.parametrize("layout", ["padded", "transposed", "packed"])
@eager_with_one_and_two_threads
def test_a_sequence_alone_is_scored_as_in_a_batch(layout, length, device):
    """A sequence's ratio is a mean over it, whatever its length and however the batch lies."""
    spec = mk.LossSpec(importance_level="sequence", aggregation="seq-mean-token-mean")
    batch = make_batch(3, length, torch.float32, spread=0.01)
    batch["advantages"] = torch.tensor([0.5, -1.0, 2.0])

    def gradient(rows):
        names = ("logp", "old", "mask", "advantages")
        some = {name: batch[name][rows] for name in names}
        bounds = None
        if layout == "transposed":
            some = {k: v.t().contiguous().t() if v.dim() == 2 else v for k, v in some.items()}
        if layout == "packed":
            some, bounds, _ = pack(some, [length] * len(some["logp"]))
        logp = some["logp"].detach().requires_grad_()
        mk.mapo_loss(
            logp,
            old_logprobs=some["old"],
            mask=some["mask"],
            advantages=some["advantages"],
            cu_seqlens=bounds,
            normalizer=3.0,
            spec=spec,
        ).loss.backward()
        return logp.grad.reshape(-1, length)

    whole = gradient(slice(None))
    for i in range(3):
        assert torch.equal(gradient(slice(i, i + 1)), whole[i : i + 1])


@pytest.mark.parametrize("size", [5, 9, 33, 33_001])
@eager_with_one_and_two_threads
def test_a_group_alone_is_scored_as_in_a_batch(size, device):
    rewards = torch.rand(3 * size)
    ids = torch.arange(3).repeat_interleave(size)
    by_size = mk.group_advantages(rewards, group_size=size)
    by_id = mk.group_advantages(rewards, group_ids=ids)
    for rows in (slice(i * size, (i + 1) * size) for i in range(3)):
        alone = mk.group_advantages(rewards[rows], group_size=size)
        assert torch.equal(alone, by_size[rows])
        assert torch.equal(mk.group_advantages(rewards[rows], group_ids=ids[rows]), by_id[rows])


@pytest.mark.parametrize("ranks", [2, 3, 5, 8, 16, 33])
@eager_with_one_and_two_threads
def test_a_row_split_over_ranks_is_merged_alone_as_in_a_batch(ranks, device):
    shares = torch.rand(ranks, 4, 19)
    share = VocabShare(None, 0, (10,) * ranks)
    ids = torch.zeros(19, dtype=torch.int64)

    def merge(rows):
        given = RowInputs(ids[rows], 1.0, share)
        return merged.merge_shares(shares[..., rows], given, None, 5, False)

    whole = merge(slice(None))
    for i in range(19):
        assert torch.equal(merge(slice(i, i + 1)), whole[:, i : i + 1])
