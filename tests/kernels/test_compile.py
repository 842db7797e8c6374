"""torch.compile(fullgraph=True) and CUDA graphs around the public functions."""

import itertools

import pytest
import torch
from support import assert_close, make_batch, make_logits

import mapo_kernels as mk
from mapo_kernels.batch import Batch, GroupInputs, RowInputs, empty_results
from mapo_kernels.dispatch import packed
from mapo_kernels.launch import advantages, logits
from mapo_kernels.launch import logprobs as tokens


def step(logp, old, mask, rewards, ids, ref):
    out = mk.mapo_loss(
        logp * 1.5,
        rewards=rewards,
        group_size=4,
        mask=mask,
        old_logprobs=old,
        ref_logprobs=ref,
        spec=SPEC,
    )
    advantages = mk.group_advantages(rewards, group_ids=ids)
    return out.loss * 2 + advantages.sum(), out.metrics["approx_kl"], out.advantages


SPEC = mk.LossSpec(beta=0.1, importance_level="sequence", kl_importance_correction=True)


def arguments(device, length=9):
    batch = make_batch(n_sequences=12, length=length, dtype=torch.float32)
    rewards = torch.tensor([1, 0, 0, 0.5, 1, 1, 0, 1, 0.1, 0, 0, 1], device=device)
    ids = torch.arange(12, device=device) % 3
    tensors = [batch[name].to(device) for name in ("logp", "old", "mask", "ref")]
    logp, old, mask, ref = tensors
    return logp.requires_grad_(), old, mask, rewards, ids, ref


# Without `dynamic` the second length makes the graph for every size, too.
@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_fullgraph(dynamic, device):
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (9, 12, 17):
        given = arguments(device, length)
        expected = step(*given)
        expected_grad = torch.autograd.grad(expected[0], given[0])[0]
        actual = compiled(*given)
        grad = torch.autograd.grad(actual[0], given[0])[0]
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e, 1e-6)
        assert_close(grad, expected_grad, 1e-6)


@pytest.mark.parametrize(
    "normalizer", [pytest.param(20.0, marks=pytest.mark.slow), torch.tensor(20.0)]
)
def test_fullgraph_with_a_plan_and_normalizers(normalizer, device):
    torch.compiler.reset()
    if isinstance(normalizer, torch.Tensor):
        normalizer = normalizer.to(device)
    logp, old, mask, rewards, _, _ = arguments(device)
    advantages = mk.group_advantages(rewards, group_size=4)
    plan = mk.make_plan(advantages=advantages, mask=mask, normalizer=normalizer)

    def with_plan(x):
        return mk.mapo_loss(x, old_logprobs=old, plan=plan).loss

    def without(x):
        given = {"advantages": advantages, "mask": mask, "normalizer": normalizer}
        return mk.mapo_loss(x, old_logprobs=old, **given).loss

    for function in (with_plan, without):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert_close(compiled(logp), function(logp), 1e-6)


def test_metrics_of_a_compiled_loss(device):
    torch.compiler.reset()
    logp, _, mask, rewards, _, _ = arguments(device)
    plan = mk.make_plan(rewards=rewards, group_size=4, mask=mask)

    def metrics(x):
        return mk.mapo_loss(x, plan=plan).metrics

    found = torch.compile(metrics, fullgraph=True, backend="aot_eager")(logp)
    expected = metrics(logp)
    assert found == expected and type(expected) is mk.Metrics
    version = tuple(int(x) for x in torch.__version__.split(".")[:2])
    assert isinstance(found, mk.Metrics) == (version >= (2, 11))


def assert_sound(launch, arguments, out):
    """What `torch.library.opcheck` asks of an operator: schema, tracing, gradients."""
    operator = getattr(torch.ops.mapo_kernels, launch.__name__.removeprefix("launch_"))
    torch.library.opcheck(operator.default, packed(arguments, out))


def test_operators_are_sound(device):
    if mk.resolve_backend(device.type) != "triton":
        pytest.skip("the eager backend has no operators")
    rewards = torch.rand(12, device=device)
    groups = GroupInputs(rewards, 4)
    for want_stats in (False, True):
        given = (groups, mk.AdvantageSpec(), want_stats)
        assert_sound(advantages.launch_advantages, given, advantages.empty_advantages(*given))
    logp, old, mask, _, _, ref = arguments(device)
    batch = Batch(old, ref, mask=mask, groups=groups)
    given = (logp.detach(), batch, SPEC, mk.AdvantageSpec(), True)
    assert_sound(tokens.launch_token_loss, given, empty_results(*given))
    results, grad = torch.rand(16, device=device), torch.rand(5, 3, device=device)
    given = (grad, results[0].clone(), results, torch.bfloat16)
    assert_sound(tokens.launch_scale, given, grad.bfloat16())


def test_an_operator_keeps_no_tensor(device, monkeypatch):
    """What a compiled graph is warmed up with lies in its own memory: nobody else may keep it."""
    if mk.resolve_backend(device.type) != "triton":
        pytest.skip("the eager backend has no operators")
    # As on a GPU: the interpreter makes a counter for each launch.
    monkeypatch.setattr(tokens, "interprets", lambda: False)
    monkeypatch.setattr(tokens.counters, "_counters", {})
    logp, old, mask, *_ = arguments(device)
    given = (logp.detach(), Batch(old, mask=mask, advantages=old[:, 0]), mk.LossSpec())
    given = (*given, mk.AdvantageSpec(), True)
    out = empty_results(*given)
    torch.ops.mapo_kernels.token_loss(*packed(given, out))
    assert tokens.counters._counters == {}
    again = empty_results(*given)
    tokens.launch_token_loss(*given, again)
    assert len(tokens.counters._counters) == 1
    assert torch.equal(out.grad, again.grad) and torch.equal(out.loss, again.loss)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["gpu"], indirect=True)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_reduced_overhead(device, level):
    """torch.compile's CUDA graphs, which look whether anybody keeps their memory."""
    torch.compiler.reset()
    logp, old, mask, rewards, _, _ = arguments(device)
    spec = mk.LossSpec(importance_level=level)

    def run(x):
        given = {"rewards": rewards, "group_size": 4, "mask": mask, "old_logprobs": old}
        return mk.mapo_loss(x, spec=spec, **given).loss

    compiled = torch.compile(run, mode="reduce-overhead")
    expected = run(logp)
    expected_grad = torch.autograd.grad(expected, logp)[0]
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        loss = compiled(logp)
        (grad,) = torch.autograd.grad(loss, logp)
        assert_close(loss, expected, 1e-6)
        assert_close(grad, expected_grad, 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["gpu"], indirect=True)
def test_inductor_on_a_gpu(device):
    torch.compiler.reset()
    given = arguments(device)
    actual = torch.compile(step, fullgraph=True)(*given)
    for a, e in zip(actual, step(*given), strict=True):
        assert_close(a, e, 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["gpu"], indirect=True)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_cuda_graph_capture(device, level):
    logp, old, mask, rewards, _, _ = arguments(device, 3000)
    spec = mk.LossSpec(importance_level=level)

    def run():
        out = mk.mapo_loss(
            logp, rewards=rewards, group_size=4, mask=mask, old_logprobs=old, spec=spec
        )
        return out.loss, torch.autograd.grad(out.loss, logp)[0]

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
            old.copy_(logp.detach() + 0.1 * torch.randn_like(old))
        graph.replay()
        expected_loss, expected_grad = run()
        assert torch.equal(loss, expected_loss)
        assert torch.equal(grad, expected_grad)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["gpu"], indirect=True)
def test_nothing_waits_for_the_device(device):
    logp, old, mask, rewards, ids, _ = arguments(device)
    large = torch.rand(10000, device=device)
    large_ids = torch.randint(0, 1000, (10000,), device=device)

    def run():
        out = mk.mapo_loss(logp, rewards=rewards, group_size=4, mask=mask, old_logprobs=old)
        out.loss.backward()
        mk.mapo_loss(logp, rewards=rewards, group_ids=ids, mask=mask)
        mk.group_advantages(large, group_ids=large_ids)
        for level in ("token", "sequence"):
            spec = mk.LossSpec(importance_level=level, entropy_coef=0.1)
            given = {"rewards": row_rewards, "group_size": 2, "mask": live, "spec": spec}
            mk.token_logprobs(logits, row_ids, mask=live)
            mk.mapo_loss_from_logits(logits, row_ids, **given).loss.backward()
            out = mk.mapo_loss_from_hidden(hidden, weight, row_ids, plan=plans[level])
            (out.loss * 2).backward()

    logits, row_ids, _, live, row_rewards = logits_arguments(device)
    hidden = torch.randn(4, 3, 16, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(40, 16, device=device, dtype=torch.bfloat16, requires_grad=True)
    # Making a plan waits once, so that nothing it is used for does.
    plans = {
        level: mk.make_plan(
            rewards=row_rewards, group_size=2, mask=live, spec=mk.LossSpec(importance_level=level)
        )
        for level in ("token", "sequence")
    }
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def logits_arguments(device, length=3):
    batch = make_logits(4, length, 40, torch.float32)
    names = ("logits", "ids", "old", "mask")
    logits, ids, old, mask = (batch[name].to(device) for name in names)
    rewards = torch.tensor([1, 0, 0, 0.5], device=device)
    return logits.requires_grad_(), ids, old, mask, rewards


# test_recompiles.py traces the eager backend.
QUICK = {"eager": [], "interpreter": [(True, "sequence", True)]}
SETTINGS = [
    pytest.param(*x, name, marks=[] if x in QUICK[name] else [pytest.mark.slow])
    for x in itertools.product((False, True), ("token", "sequence"), (False, True))
    for name in ("eager", "interpreter")
]
SETTINGS += [pytest.param(*x.values[:3], "gpu", marks=pytest.mark.gpu) for x in SETTINGS[::2]]


@pytest.mark.parametrize(("dynamic", "level", "inplace", "device"), SETTINGS, indirect=["device"])
def test_fullgraph_from_logits(dynamic, level, inplace, device):
    spec = mk.LossSpec(importance_level=level, entropy_coef=0.1, aggregation="seq-mean-token-mean")

    def step(logits, ids, old, mask, rewards):
        scored, entropy = mk.token_logprobs(
            logits, ids, mask=mask, temperature=0.9, return_entropy=True
        )
        out = mk.mapo_loss_from_logits(
            logits * 1.5,
            ids,
            rewards=rewards,
            group_size=2,
            mask=mask,
            old_logprobs=old,
            spec=spec,
            inplace=inplace,
            temperature=0.9,
        )
        own = scored.sum() - 0.3 * entropy.square().sum()
        return out.loss * 2 + own, out.metrics["entropy"], scored

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (3, 5):
        given = logits_arguments(device, length)
        expected = step(*given)
        expected_grad = torch.autograd.grad(expected[0], given[0])[0]
        actual = compiled(*given)
        grad = torch.autograd.grad(actual[0], given[0])[0]
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e, 1e-6)
        assert_close(grad, expected_grad, 1e-6)


def test_operators_on_logits_are_sound(device):
    if mk.resolve_backend(device.type) != "triton":
        pytest.skip("the eager backend has no operators")
    x, ids, old, mask, rewards = logits_arguments(device)
    x, rows = x.detach(), RowInputs(ids, 0.9)
    given = (x, rows, mask, 5)
    table = logits.empty_scores(*given)
    assert_sound(logits.launch_scores, given, table)
    logits.launch_scores(*given, table)
    slope, results = torch.rand(4, 3, device=device), torch.rand(16, device=device)
    given = (x, rows, mask, table, slope, None, results)
    assert_sound(logits.launch_gradient, given, torch.empty_like(x))
    batch = Batch(old, mask=mask, groups=GroupInputs(rewards, 2))
    given = (x, rows, batch, mk.LossSpec(entropy_coef=0.1), mk.AdvantageSpec(), True)
    assert_sound(logits.launch_logits_loss, given, logits.empty_loss(*given))
    grad = torch.rand(4, 3, 40, device=device)
    assert_sound(logits.launch_rescale, (results[0].clone(),), grad)
