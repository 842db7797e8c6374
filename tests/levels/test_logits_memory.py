"""What the logits level reads and writes: rows, views, gradients in place, memory."""

import itertools

import pytest
import torch
from backends import with_two_threads_too
from support import (
    MASKS,
    NAN,
    assert_close,
    assert_same_metrics,
    logits_run,
    make_logits,
    tune,
)

import mapo_kernels as mk
from benchmarks.memory import allocations

LEVELS = ("token", "sequence")


@pytest.mark.parametrize("vocab", [37, 1024])
@with_two_threads_too
def test_runs_are_bitwise_equal_and_rows_do_not_see_each_other(vocab, device):
    batch = make_logits(4, 3, vocab, torch.float32, mask="none")
    batch["advantages"] = torch.tensor([0.5, -1.0, 2.0, 1.0])
    spec = mk.LossSpec(entropy_coef=0.1)
    runs = [logits_run(batch, spec, device, normalizer=7.0) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
    assert all(torch.equal(runs[0][2][k], runs[1][2][k]) for k in runs[0][2])
    some = torch.tensor([2, 0])
    part = {k: v[some] for k, v in batch.items()}
    _, grad, _ = logits_run(part, spec, device, normalizer=7.0)
    assert torch.equal(grad, runs[0][1][some.to(device)])
    # One row alone, at another place in memory.
    logits, ids = (batch[k].to(device) for k in ("logits", "ids"))
    logp = mk.token_logprobs(logits, ids)
    assert torch.equal(mk.token_logprobs(logits[1:2, 1:2], ids[1:2, 1:2]), logp[1:2, 1:2])


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("level", LEVELS)
def test_rows_without_work_are_not_read(level, inplace, device):
    """Masked, or without signal: NaN there reaches nothing, and their gradient is exactly 0."""
    batch = make_logits(4, 3, 600, torch.float32)
    batch["advantages"] = torch.tensor([1.0, 0.0, -0.5, 0.3])
    batch["logits"][1] = NAN
    spec = mk.LossSpec(importance_level=level, objective="none")
    loss, grad, metrics = logits_run(
        batch, spec, device, old_logprobs=batch["old"], inplace=inplace
    )
    assert loss.isfinite() and grad.isfinite().all()
    dead = ~batch["mask"]
    dead[1] = True
    assert (grad.cpu()[dead] == 0).all() and not (grad.cpu()[~dead] == 0).any()
    assert metrics["active_tokens"] == batch["mask"].sum()
    assert metrics["scored_tokens"] == (~dead).sum()
    clean = dict(batch, logits=batch["logits"].nan_to_num(0.0))
    expected = logits_run(clean, spec, device, old_logprobs=batch["old"])
    assert torch.equal(expected[0], loss) and torch.equal(expected[1], grad)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place(dtype, level, device):
    batch = make_logits(3, 3, 600, dtype)
    spec = mk.LossSpec(entropy_coef=0.1, importance_level=level)
    loss, grad, _ = logits_run(batch, spec, device)
    leaf = batch["logits"].to(device, copy=True).requires_grad_()
    logits = leaf * 1
    out = mk.mapo_loss_from_logits(
        logits,
        batch["ids"].to(device),
        advantages=batch["advantages"].to(device),
        mask=batch["mask"].to(device),
        spec=spec,
        inplace=True,
    )
    assert torch.equal(out.loss, loss) and torch.equal(logits, grad)
    out.loss.backward()
    assert torch.equal(leaf.grad, grad)


def test_in_place_tells_those_who_saved_the_logits(device):
    leaf = torch.randn(2, 3, 40, device=device).requires_grad_()
    logits = leaf.tanh()  # saves its result for backward
    out = mk.mapo_loss_from_logits(
        logits,
        torch.zeros(2, 3, dtype=torch.int64, device=device),
        advantages=torch.ones(2, device=device),
        inplace=True,
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


@pytest.mark.parametrize("upstream", [1.0, -0.5, 0.0, 3.0])
def test_upstream_gradients(upstream, device):
    batch = make_logits(3, 3, 600, torch.float32)
    _, grad, _ = logits_run(batch, mk.LossSpec(), device)
    for inplace in (False, True):
        _, scaled, _ = logits_run(batch, mk.LossSpec(), device, upstream=upstream, inplace=inplace)
        assert_close(scaled, grad * upstream, 1e-7)


def test_a_second_backward_is_an_error(device):
    logits = torch.randn(2, 3, 40, device=device).requires_grad_()
    ids = torch.zeros(2, 3, dtype=torch.int64, device=device)
    out = mk.mapo_loss_from_logits(logits, ids, advantages=torch.ones(2, device=device))
    torch.autograd.grad(out.loss, logits, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.loss, logits)


def test_without_grad_no_gradient_is_computed(device, monkeypatch):
    batch = make_logits(2, 3, 40, torch.float32)
    logits, ids, mask, advantages = (
        batch[k].to(device) for k in ("logits", "ids", "mask", "advantages")
    )
    asked = []
    original = mk.operators.logits_loss
    monkeypatch.setattr(mk.operators, "logits_loss", lambda *a: asked.append(a[5]) or original(*a))
    kept = logits.clone()
    given = {"advantages": advantages, "mask": mask, "inplace": True}
    with torch.no_grad():
        quiet = mk.mapo_loss_from_logits(logits.requires_grad_(), ids, **given)
    frozen = mk.mapo_loss_from_logits(logits.detach(), ids, **given)
    assert torch.equal(logits[mask], kept[mask])
    out = mk.mapo_loss_from_logits(logits, ids, **given)
    assert asked == [False, False, True]
    assert not quiet.loss.requires_grad and torch.equal(quiet.loss, out.loss.detach())
    assert torch.equal(frozen.loss, quiet.loss)
    assert not any(value.requires_grad for value in out.metrics.values())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("vocab", [37, 512])
def test_strided_logits(vocab, level, device):
    """A dropped last position, a row stride above V, a start in the middle, odd alignment."""
    batch = make_logits(3, 3, vocab, torch.bfloat16)
    spec = mk.LossSpec(importance_level=level)
    loss, grad, _ = logits_run(batch, spec, device)

    def check(view, atol=0.0):
        view.copy_(batch["logits"])
        view.requires_grad_()
        for inplace in (False, True):
            out = mk.mapo_loss_from_logits(
                view,
                batch["ids"].to(device),
                advantages=batch["advantages"].to(device),
                mask=batch["mask"].to(device),
                spec=spec,
                inplace=inplace,
            )
            (actual,) = torch.autograd.grad(out.loss, view)
            assert_close(out.loss, loss, 1e-6)
            # Bits may differ where a row is aligned otherwise: by one rounding to bfloat16.
            torch.testing.assert_close(actual, grad, rtol=2**-7, atol=1e-9)

    new = dict(dtype=torch.bfloat16, device=device)
    check(torch.zeros(3, 4, vocab, **new)[:, :-1])
    check(torch.zeros(3, 4, vocab, **new)[:, 1:])
    check(torch.zeros(3, 3, vocab + 16, **new)[..., :vocab])
    check(torch.zeros(3, 3, vocab + 3, **new)[..., 3:])
    check(torch.zeros(3, 3, 3, vocab, **new)[:, 1])


def test_columns_that_are_not_adjacent_are_copied(device):
    batch = make_logits(3, 3, 40, torch.float32)
    loss, grad, _ = logits_run(batch, mk.LossSpec(), device)
    transposed = batch["logits"].transpose(1, 2).contiguous().transpose(1, 2)
    assert transposed.stride(-1) != 1
    view = transposed.to(device).requires_grad_()
    given = {k: batch[k].to(device) for k in ("advantages", "mask")}
    out = mk.mapo_loss_from_logits(view, batch["ids"].to(device), **given)
    assert torch.equal(out.loss, loss)
    assert torch.equal(torch.autograd.grad(out.loss, view)[0], grad)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mask", MASKS)
def test_every_output_is_written(mask, level, device):
    """With uninitialised memory full of NaN, as torch leaves it in its deterministic mode."""
    spec = mk.LossSpec(importance_level=level, aggregation="seq-mean-token-mean")
    batch = make_logits(3, 2, 600, torch.float32, mask=mask)
    batch["advantages"] = torch.tensor([1.0, 0.0, -1.0])
    expected = logits_run(batch, spec, device)
    logits, ids, live = (batch[k].to(device) for k in ("logits", "ids", "mask"))
    scores = mk.token_logprobs(logits, ids, mask=live, return_entropy=True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        actual = logits_run(batch, spec, device)
        again = mk.token_logprobs(logits, ids, mask=live, return_entropy=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
    assert_same_metrics(actual[2], expected[2])
    assert all(torch.equal(a, e) for a, e in zip(again, scores, strict=True))


def test_offsets_beyond_32_bits(device):
    """Two rows 2^31 elements apart: of the memory between them only what is touched exists."""
    far = (1 << 31) + 16
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 10 << 30:
        pytest.skip("needs 10 GiB of GPU memory")
    room = torch.empty(far + 64, dtype=torch.bfloat16, device=device)
    logits = room.as_strided((2, 1, 40), (far, 40, 1))
    batch = make_logits(2, 1, 40, torch.bfloat16, mask="none")
    logits.copy_(batch["logits"])
    batch["advantages"] = torch.tensor([1.0, -1.0])
    for level in LEVELS:
        spec = mk.LossSpec(importance_level=level)
        loss, grad, _ = logits_run(batch, spec, device)
        view = logits.detach().requires_grad_()
        given = {"advantages": batch["advantages"].to(device), "spec": spec}
        out = mk.mapo_loss_from_logits(view, batch["ids"].to(device), **given)
        assert_close(out.loss, loss, 1e-6)
        (actual,) = torch.autograd.grad(out.loss, view)
        torch.testing.assert_close(actual, grad, rtol=2**-7, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["gpu"], indirect=True)
@pytest.mark.parametrize("level", LEVELS)
def test_more_than_2_31_elements(device, level):
    n, vocab = 14_400, 152_064
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of GPU memory")
    logits = torch.randn(1, n, vocab, dtype=torch.bfloat16, device=device)
    ids = torch.randint(0, vocab, (1, n), device=device)
    last = logits[:, -2:].clone()
    given = {"advantages": torch.ones(1, device=device), "normalizer": 2.0}
    spec = mk.LossSpec(objective="cispo", importance_level=level)
    expected = last.clone().requires_grad_()
    mk.mapo_loss_from_logits(expected, ids[:, -2:], spec=spec, **given).loss.backward()
    logits.requires_grad_()
    out = mk.mapo_loss_from_logits(logits, ids, spec=spec, inplace=True, **given)
    (grad,) = torch.autograd.grad(out.loss, logits)
    torch.testing.assert_close(grad[:, -2:], expected.grad)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["gpu"], indirect=True)
@pytest.mark.parametrize("level", LEVELS)
def test_in_place_needs_no_second_matrix(device, level):
    batch = make_logits(4, 64, 32_000, torch.bfloat16)
    leaf = batch["logits"].to(device).requires_grad_()
    given = {k: batch[k].to(device) for k in ("advantages", "mask")}
    spec, ids = mk.LossSpec(importance_level=level), batch["ids"].to(device)

    def step(inplace):
        logits = leaf * 1
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = mk.mapo_loss_from_logits(logits, ids, spec=spec, inplace=inplace, **given)
        torch.autograd.grad(out.loss, logits)
        return torch.cuda.max_memory_allocated() - before

    step(True)
    assert step(True) < 1 << 20
    assert step(False) < leaf.numel() * 2 + (1 << 20)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["gpu"], indirect=True)
def test_a_captured_graph_replays(device):
    batch = make_logits(4, 8, 5000, torch.bfloat16)
    logits = batch["logits"].to(device).requires_grad_()
    given = {k: batch[k].to(device) for k in ("advantages", "mask")}
    ids = batch["ids"].to(device)

    def run():
        out = mk.mapo_loss_from_logits(logits, ids, **given)
        return out.loss, torch.autograd.grad(out.loss, logits)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, grad = run()
    for _ in range(3):
        with torch.no_grad():
            logits.copy_(torch.randn_like(logits))
        graph.replay()
        expected_loss, expected_grad = run()
        assert torch.equal(loss, expected_loss) and torch.equal(grad, expected_grad)


def test_the_eager_backend_holds_one_chunk_in_float32(monkeypatch):
    """At most [chunk, V] float32 beside the logits and, unless in place, their gradient."""
    mk.set_backend("eager")
    try:
        chunk, vocab = 20, 5000
        tune(monkeypatch, "EAGER", chunk_logits=chunk * vocab)
        for inplace, dtype, bonus in itertools.product(
            (False, True), (torch.float32, torch.bfloat16), (0.0, 0.1)
        ):
            batch = make_logits(4, 50, vocab, dtype)
            leaf = batch["logits"].requires_grad_()
            logits = leaf * 1
            with allocations() as memory:
                out = mk.mapo_loss_from_logits(
                    logits,
                    batch["ids"],
                    advantages=batch["advantages"],
                    mask=batch["mask"],
                    spec=mk.LossSpec(entropy_coef=bonus),
                    inplace=inplace,
                )
                torch.autograd.grad(out.loss, logits)
            gradient = 0 if inplace else logits.numel() * logits.element_size()
            # A chunk of bfloat16 logits is copied before it is widened, and after it is narrowed.
            narrow = 0 if dtype == torch.float32 else chunk * vocab * 2
            assert memory.peak <= gradient + chunk * vocab * 4 + narrow + 100_000
    finally:
        mk.set_backend(None)
