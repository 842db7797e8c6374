"""Rows whose vocabulary is split over ranks equal those of one process."""

import re
from pathlib import Path

import pytest
import torch
import vocab_ranks as ranks
import vocab_sharded as sharded
from spawn import run_ranks
from support import exact_scores

from mapo_kernels import config, operators
from mapo_kernels._triton import HAS_TRITON, interprets
from mapo_kernels.batch import RowInputs, VocabShare

# Bytes in which a rank says how it was called.
HEADER = 232


# Four interpreted ranks run what two leave out of the settings, and are slow at it.
FOUR_INTERPRETED = pytest.param("interpreter-4", marks=pytest.mark.slow)


@pytest.fixture(params=["eager-2", "eager-4", "interpreter-2", FOUR_INTERPRETED])
def world(request):
    """Number of ranks, their backend, and what carries their messages."""
    backend, size = request.param.split("-")
    if backend == "interpreter" and not (HAS_TRITON and interprets()):
        pytest.skip("Triton compiles here (the gpu tests run instead) or is not installed")
    return int(size), backend


JOBS = [
    ranks.logits_level, ranks.hidden_level, ranks.scores, ranks.score_gradients,
    ranks.certain_tokens, ranks.odd_rows, ranks.sampling_masks,
]  # fmt: skip


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.__name__)
def test_ranks_equal_one_process(job, world):
    size, backend = world
    run_ranks(size, job, backend)


def merged_scores(monkeypatch, logits, ids, sizes, columns=2):
    """Log-probs and entropies of rows [n, V] from shares of these sizes, in one process."""
    shares = []

    def gather(x, group):
        shares.append(x)
        return torch.stack(shares) if len(shares) == len(sizes) else x.expand(len(sizes), *x.shape)

    monkeypatch.setattr(operators, "all_gather", gather)
    for rank, part in enumerate(logits.split(sizes, -1)):
        rows = RowInputs(ids, 1.0, VocabShare(None, rank, sizes))
        table = operators.score_rows(part.contiguous(), rows, None, columns)
    return table.cpu().double()


@pytest.mark.parametrize("sizes", [(64, 56), (8, 90, 22), (1, 110, 9)], ids=str)
@pytest.mark.parametrize("offset", [0.0, -100.3])
def test_entropy_of_a_row_that_is_certain_of_another_token(offset, sizes, device, monkeypatch):
    """Wherever the token and its rivals lie, and where two of them share the row, too."""
    low = -1e20 if offset == 0 else offset - 200.0
    tops = {7: 0.0, 110: -16.0, 119: -32.0, 0: -20.0}
    near = {7: 0.0, 110: -0.4, 20: -20.0, 119: -24.0}
    cases = [(tops, token) for token in (*tops, 50)] + [(near, token) for token in (*near, 50)]
    logits = torch.full((len(cases), 120), low)
    for row, (columns, _) in zip(logits, cases, strict=True):
        for column, below in columns.items():
            row[column] = offset + below
    ids = torch.tensor([token for _, token in cases])
    table = merged_scores(monkeypatch, logits.to(device), ids.to(device), sizes)
    exact = [exact_scores(row, int(token)) for row, token in zip(logits, ids, strict=True)]
    exact = torch.tensor(exact, dtype=torch.float64).t()
    # A rounding of an exponent shows in its power that many times.
    torch.testing.assert_close(table, exact, rtol=max(2e-6, abs(offset) * 1.2e-7), atol=0)
    alone = merged_scores(monkeypatch, logits.to(device), ids.to(device), sizes, columns=1)
    assert torch.equal(alone[0], table[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or interprets(), reason="needs a GPU")
@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.__name__)
def test_one_rank_on_a_gpu(job):
    run_ranks(1, job, "gpu", backend="nccl")


@pytest.mark.parametrize("size", [2, 4])
def test_collectives_do_not_grow_with_the_vocabulary(size):
    chunk, rest, row = 5, 4, 16
    live, every = 9, 12
    sums = [("allgather_base", chunk * row), ("allgather_base", rest * row)]
    d_hidden = ("allreduce", live * 16 * 4)
    for found in run_ranks(size, ranks.collectives, "eager"):
        for (_, _, kind, _), messages in found.items():
            assert messages.pop(0) == ("allgather_base", HEADER)
            if kind == "hidden":
                assert messages == [*sums, d_hidden]
            else:
                assert messages == [("allgather_base", every * row)]


def test_ranks_that_disagree_are_told():
    for found in run_ranks(2, ranks.disagreements, "eager"):
        for what, message in found.items():
            assert message.startswith("vocab_group: expected") and what in message, found
        assert "[16, 17]" in found["width H"] and "[6, 8]" in found["number of rows"]


@pytest.mark.parametrize("size", [2, 4])
def test_dtensors(size):
    for found in run_ranks(size, sharded.dtensors, "eager"):
        for expected, message in found.items():
            assert expected in message, found
            assert "expected" in message and "got" in message


def test_fully_sharded():
    for found in run_ranks(2, sharded.fsdp, "eager"):
        assert len(found) == 2 and all(what in message for what, message in found.items()), found


def test_fully_sharded_and_split():
    run_ranks(4, sharded.fsdp_of_split_rows, "eager")


def test_the_documentation():
    run_ranks(2, ranks.documented, "eager")


def test_the_documented_sizes():
    text = (Path(__file__).parents[2] / "docs/tensor_parallel.md").read_text()
    table = [re.findall(r"[\d,]+", line) for line in re.findall(r"^\| \d.*", text, re.M)]
    assert f"| once per call, first | {HEADER} |" in text
    n_live, width, vocab = 8192, 4096, 152064
    rows = [[int(x.replace(",", "")) for x in line] for line in table]
    assert [row[0] for row in rows] == [1, 2, 4, 8]
    for tp, chunks, chunk, gathered, sent, d_hidden, d_hidden_sent, logits in rows:
        per_row = vocab // tp * (4 + 2) + width * 2 * 2
        most = config.HIDDEN.gpu_chunk // per_row // 128 * 128
        assert chunks == -(-n_live // most) and chunk == 16 * n_live // chunks
        assert gathered == tp * chunk and sent == 16 * n_live * (tp - 1)
        assert d_hidden == 4 * n_live * width and d_hidden_sent == 2 * d_hidden * (tp - 1) // tp
        assert logits == 4 * n_live * vocab * (tp - 1) // tp


@pytest.mark.slow
def test_a_compiled_step():
    run_ranks(2, ranks.compiled, "eager")
