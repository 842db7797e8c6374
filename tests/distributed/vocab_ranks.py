"""What the ranks of `test_vocab_parallel.py` do; every function runs on all of them."""

import itertools
import re
from pathlib import Path

import torch
import torch.distributed as dist
from hidden import make_hidden, run
from support import AGGREGATIONS, POLICIES, assert_close, keep, logits_run, make_logits, tensors_of
from torch.utils._python_dispatch import TorchDispatchMode

import mapo_kernels as mk
from mapo_kernels import config

# Shares of 50 columns that are as uneven as can be.
SIZES = {1: (50,), 2: (31, 19), 4: (13, 20, 1, 16)}
LEVELS = ("token", "sequence")
LOOSE = 3e-6


def begin(backend):
    """Choose the backend as the fixture `device` does: the device of its tensors, a new group.

    One split of a vocabulary, one group: a rank whose own share is the same in another split could
    not know that others have to be asked.
    """
    mk.set_backend("eager" if backend == "eager" else "triton")
    return torch.device("cuda" if backend == "gpu" else "cpu"), dist.new_group()


def one_process(backend, function, *args, **given):
    """What a process with whole rows computes; the interpreter, tested elsewhere, is slow at it."""
    if backend == "interpreter":
        mk.set_backend("eager")
    result = function(*args, **given)
    mk.set_backend("eager" if backend == "eager" else "triton")
    return result


def mine(x, dim, sizes=None):
    """This rank's share of `x`."""
    if x is None:
        return None
    sizes = sizes or SIZES[dist.get_world_size()]
    return x.split(sizes, dim)[dist.get_rank()].contiguous()


def same_on_every_rank(x):
    found = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(found, x.contiguous())
    return all(torch.equal(a, found[0]) for a in found)


def policies_of(backend):
    """Every policy; the interpreter, which is slow, gets one: the merged rows know nothing of it.

    With 4 ranks that is another one than with 2.
    """
    return POLICIES[dist.get_world_size() % 4 :][:1] if backend == "interpreter" else POLICIES


def levels_of(backend):
    """Importance level and aggregation, every pair; the interpreter gets the rest with 4 ranks."""
    pairs = list(itertools.product(LEVELS, AGGREGATIONS))
    if backend == "interpreter":
        pairs = [pairs[i] for i in ((0, 5, 2, 7) if dist.get_world_size() == 2 else (4, 1, 6, 3))]
    return pairs


def compare(whole, part, tolerance, dims):
    """Loss, gradients and metrics of a rank with those of a process that has whole rows."""
    assert_close(part[0], whole[0], tolerance)
    for grad, exact, dim in zip(part[1], whole[1], dims, strict=True):
        assert (grad is None) == (exact is None)
        if grad is not None:
            assert grad.dtype == exact.dtype
            rounding = torch.finfo(grad.dtype).eps if grad.element_size() == 2 else 0.0
            expected = exact if dim is None else mine(exact, dim)
            assert_close(grad, expected, tolerance + rounding)
    assert set(part[2]) == set(whole[2])
    for name, value in whole[2].items():
        assert_close(part[2][name], value, tolerance)
    assert same_on_every_rank(part[0])


def compare_logits(backend, batch, spec, device, group, tolerance, **given):
    part = {**batch, "logits": mine(batch["logits"], -1)}
    whole = one_process(backend, logits_run, batch, spec, device, upstream=-2.5, **given)
    here = logits_run(part, spec, device, upstream=-2.5, vocab_group=group, **given)
    assert (here[1].cpu()[~batch["mask"]] == 0).all()
    compare((whole[0], [whole[1]], whole[2]), (here[0], [here[1]], here[2]), tolerance, [-1])


def compare_hidden(
    backend, batch, spec, device, group, tolerance, wanted=(True, True, True), **given
):
    part = {**batch, "weight": mine(batch["weight"], 0), "bias": mine(batch["bias"], 0)}
    whole = one_process(backend, run, batch, spec, device, wanted=wanted, **given)
    here = run(part, spec, device, wanted=wanted, vocab_group=group, **given)
    compare(whole, here, tolerance, [None, 0, 0])
    if wanted[0]:
        assert same_on_every_rank(here[1][0])


def logits_level(backend):
    device, group = begin(backend)
    masks = itertools.cycle(("random", "row", "none", "all"))
    for policy, level in zip(policies_of(backend), itertools.cycle(LEVELS)):
        for aggregation in AGGREGATIONS:
            bonus = 0.01 if policy["objective"] in ("clip", "sapo") else 0.0
            spec = mk.LossSpec(
                **policy, importance_level=level, aggregation=aggregation, entropy_coef=bonus,
                beta=0.1 if policy["objective"] == "none" else 0.0,
            )  # fmt: skip
            batch = make_logits(vocab=50, dtype=torch.float32, mask=next(masks))
            compare_logits(backend, batch, spec, device, group, LOOSE, **tensors_of(batch, spec))
    for level in LEVELS:
        spec = mk.LossSpec(importance_level=level, entropy_coef=0.02)
        temperature = torch.tensor([0.5, 1.0, 1.7, 2.0])
        for dtype in (torch.float32, torch.bfloat16):
            batch = make_logits(vocab=50, dtype=dtype)
            given = {"old_logprobs": batch["old"], "temperature": temperature}
            inplace = dtype == torch.bfloat16
            compare_logits(backend, batch, spec, device, group, LOOSE, inplace=inplace, **given)
    if backend == "eager":
        for level, aggregation in itertools.product(LEVELS, AGGREGATIONS):
            spec = mk.LossSpec(
                importance_level=level, aggregation=aggregation, entropy_coef=0.02, beta=0.1
            )
            batch = make_logits(vocab=50)
            compare_logits(backend, batch, spec, device, group, 1e-12, **tensors_of(batch, spec))


def sampling_masks(backend):
    """Kept columns lie on any rank, on one, or on none of some."""
    device, group = begin(backend)
    for level, share in itertools.product(LEVELS, (4, 1)):
        if backend == "interpreter" and (level == "token") == (share == 1):
            continue
        spec = mk.LossSpec(importance_level=level, entropy_coef=0.02)
        with config.override({"KEPT.cpu_share": share, "KEPT.gpu_share": share}):
            batch = make_logits(vocab=50, dtype=torch.float32)
            lists = keep(batch["ids"], 50, (1, 2, 5, 0, 30))
            given = {"sampling_mask": mk.SamplingMask.from_lists(lists, device)}
            given |= tensors_of(batch, spec)
            compare_logits(backend, batch, spec, device, group, LOOSE, **given)
            batch = make_hidden()
            given |= tensors_of(batch, spec) | {"softcap": 4.0, "chunk_rows": 3}
            lists = keep(batch["ids"], 50, (1, 2, 5, 0, 30))
            given["sampling_mask"] = mk.SamplingMask.from_lists(lists, device)
            compare_hidden(backend, batch, spec, device, group, LOOSE, **given)
    kept = dist.get_rank() % 2 + 3
    wrong = mk.SamplingMask.from_lists([[0, kept]] * 12, device)
    part = {**batch, "weight": mine(batch["weight"], 0), "bias": mine(batch["bias"], 0)}
    try:
        run(part, spec, device, vocab_group=group, sampling_mask=wrong)
    except ValueError as error:
        assert "sampling_mask" in str(error)
    else:
        raise AssertionError("ranks that keep other columns were not told")


def hidden_level(backend):
    device, group = begin(backend)
    masks = itertools.cycle(("random", "row", "none", "all"))
    heads = itertools.cycle(({}, {"logit_scale": 0.6}, {"softcap": 4.0, "logit_scale": 0.6}))
    for level, aggregation in levels_of(backend):
        spec = mk.LossSpec(importance_level=level, aggregation=aggregation, entropy_coef=0.02)
        batch = make_hidden(mask=next(masks))
        given = {**tensors_of(batch, spec), **next(heads), "chunk_rows": 3}
        compare_hidden(backend, batch, spec, device, group, LOOSE, **given)
        if backend == "eager":
            batch = make_hidden(dtype=torch.float64)
            compare_hidden(
                backend, batch, spec, device, group, 1e-12, **tensors_of(batch, spec), chunk_rows=4
            )
    some = LEVELS[dist.get_world_size() // 4 :][:1] if backend == "interpreter" else LEVELS
    for level, wanted in itertools.product(
        some, ((True, False, False), (False, True, False), (False, False, False))
    ):
        spec = mk.LossSpec(importance_level=level, objective="cispo")
        batch = make_hidden(bias=wanted[1])
        wanted = wanted if wanted[1] else (*wanted[:2], False)
        compare_hidden(
            backend, batch, spec, device, group, LOOSE, wanted=wanted, old_logprobs=batch["old"]
        )
        batch = make_hidden(dtype=torch.bfloat16)
        temperature = torch.tensor([0.5, 1.0, 1.7, 2.0])
        # Different matrix products round differently to bfloat16: two roundings, not one.
        compare_hidden(backend, batch, spec, device, group, 0.01, temperature=temperature)
    batch = make_hidden(dtype=torch.bfloat16, mask="none")
    part = {**batch, "weight": mine(batch["weight"], 0), "bias": mine(batch["bias"], 0)}
    wide = {k: x.double() if x.is_floating_point() else x for k, x in batch.items()}
    (d_hidden, _, _) = run(part, mk.LossSpec(), device, vocab_group=group)[1]
    mk.set_backend("eager")
    (exact, _, _) = run(wide, mk.LossSpec(), torch.device("cpu"))[1]
    begin(backend)
    if backend != "gpu":
        # Summed over ranks in float32, then rounded once.
        error = (d_hidden.double() - exact).abs()
        assert (error <= exact.abs() * 2.0**-8 + 1e-5 * exact.abs().max()).all()
    spec = mk.LossSpec()
    batch = make_hidden()
    plan = mk.make_plan(advantages=batch["advantages"], mask=batch["mask"], spec=spec)
    if backend != "gpu":
        compare_hidden(
            backend, batch, spec, device, group, LOOSE, plan=plan, old_logprobs=batch["old"]
        )
    batch["advantages"] = torch.zeros(4)
    compare_hidden(backend, batch, spec, device, group, LOOSE)


def scores(backend):
    """Scored log-probs are those of whole rows, and bitwise those inside the loss."""
    device, group = begin(backend)
    batch = make_logits(vocab=50, dtype=torch.float32)
    x, ids, mask = (batch[k].to(device) for k in ("logits", "ids", "mask"))
    whole = mk.token_logprobs(x, ids, mask=mask, temperature=0.7, return_entropy=True)
    given = {"mask": mask, "temperature": 0.7, "vocab_group": group}
    part = mk.token_logprobs(mine(x, -1), ids, return_entropy=True, **given)
    for a, b in zip(whole, part, strict=True):
        assert_close(b, a, LOOSE)
        assert (b[~mask] == 0).all()
    alone = mk.token_logprobs(mine(x, -1), ids, **given)
    assert torch.equal(alone, part[0])
    advantages = batch["advantages"].to(device)
    out = mk.mapo_loss_from_logits(
        mine(x, -1), ids, advantages=advantages, old_logprobs=alone, **given
    )
    assert out.metrics["ratio_max"] == 1 and out.metrics["approx_kl"] == 0
    given |= {"advantages": torch.ones_like(advantages), "return_sum_pi_squared": True}
    out = mk.mapo_loss_from_logits(mine(x, -1), ids, **given)
    assert torch.equal(out.logprobs, alone)
    exact = (x.double() / 0.7).softmax(-1).square().sum(-1).where(mask, 0.0)
    assert_close(out.sum_pi_squared, exact, LOOSE)
    batch = make_hidden()
    hidden, weight, bias = (batch[k].to(device) for k in ("hidden", "weight", "bias"))
    ids, mask = batch["ids"].to(device), batch["mask"].to(device)
    given = {"mask": mask, "return_entropy": True, "chunk_rows": 5}
    whole = mk.token_logprobs_from_hidden(hidden, weight, ids, bias=bias, **given)
    part = mk.token_logprobs_from_hidden(
        hidden, mine(weight, 0), ids, bias=mine(bias, 0), vocab_group=group, **given
    )
    for a, b in zip(whole, part, strict=True):
        assert_close(b, a, LOOSE)


def score_gradients(backend):
    """Gradients of scores are those of a process that has whole rows, each rank's own columns."""
    device, group = begin(backend)
    upstream = [torch.randn(4, 3, device=device) for _ in range(2)]

    def compare_scores(call, inputs, dims, given):
        def run(inputs, **more):
            leaves = [x.to(device, copy=True).requires_grad_() for x in inputs]
            found = call(*leaves, **given, **more)
            return [*found, *torch.autograd.grad(found, leaves, upstream)]

        whole = run(inputs)
        shares = [x if dim is None else mine(x, dim) for x, dim in zip(inputs, dims, strict=True)]
        part = run(shares, vocab_group=group)
        for a, b, dim in zip(whole, part, (None, None, *dims), strict=True):
            assert_close(b, a if dim is None else mine(a, dim), LOOSE)
            assert dim is not None or same_on_every_rank(b)

    batch = make_logits(vocab=50, dtype=torch.float32)
    given = {"token_ids": batch["ids"].to(device), "mask": batch["mask"].to(device)}
    given |= {"return_entropy": True, "temperature": 0.7}
    compare_scores(mk.token_logprobs, [batch["logits"]], [-1], given)
    batch = make_hidden()
    given |= {k: batch[j].to(device) for k, j in (("token_ids", "ids"), ("mask", "mask"))}
    given |= {"chunk_rows": 5, "softcap": 4.0}
    inputs = [batch[k] for k in ("hidden", "weight", "bias")]

    def from_hidden(hidden, weight, bias, **given):
        return mk.token_logprobs_from_hidden(hidden, weight, bias=bias, **given)

    compare_scores(from_hidden, inputs, [None, 0, 0], given)
    lists = keep(batch["ids"], 50, (1, 2, 5, 0, 30))
    given["sampling_mask"] = mk.SamplingMask.from_lists(lists, device)
    with config.override({"KEPT.cpu_share": 4, "KEPT.gpu_share": 4}):
        compare_scores(from_hidden, inputs, [None, 0, 0], given)


def certain_tokens(backend):
    """Tokens of p within 1e-12 of 1, whose rival lies anywhere: log p and 1 - p are exact."""
    device, group = begin(backend)
    vocab, gap = 50, 28.0
    ids = torch.tensor([[0, 49, 12, 13, 30, 31, 33, 32]])
    rivals = torch.tensor([[49, 0, 13, 12, 31, 30, 10, 40]])
    x = torch.full((1, 8, vocab), -60.0)
    x.scatter_(2, rivals[..., None], 2.0).scatter_(2, ids[..., None], 2.0 + gap)
    exact = -torch.log1p(torch.exp(torch.tensor(-gap, dtype=torch.float64)))
    assert -1e-12 < exact < 0
    part = mine(x, -1).to(device).requires_grad_()
    logp = mk.token_logprobs(part, ids.to(device), vocab_group=group)
    torch.testing.assert_close(logp.cpu().double(), exact.expand(1, 8), rtol=1e-5, atol=0.0)
    out = mk.mapo_loss_from_logits(
        part,
        ids.to(device),
        advantages=torch.ones(1, device=device),
        vocab_group=group,
        spec=mk.LossSpec(aggregation="seq-mean-token-sum"),
    )
    out.loss.backward()
    expected = torch.zeros(1, 8, vocab, dtype=torch.float64)
    expected.scatter_(2, rivals[..., None], -exact.item())
    expected.scatter_(2, ids[..., None], exact.item())
    found = torch.where(mine(expected, -1) != 0, part.grad.cpu().double(), 0.0)
    torch.testing.assert_close(found, mine(expected, -1), rtol=1e-5, atol=0.0)


def odd_rows(backend):
    """Columns that are all -inf on a rank, ids that exist nowhere, and NaN where nobody looks."""
    device, group = begin(backend)
    batch = make_logits(vocab=50, dtype=torch.float32, mask="none")
    first = SIZES[dist.get_world_size()][0]
    if dist.get_world_size() > 1:
        batch["logits"][..., :first] = -float("inf")
        batch["ids"] = batch["ids"].clamp(min=first)
        compare_logits(backend, batch, mk.LossSpec(entropy_coef=0.1), device, group, LOOSE)
    for wrong in (-1, -100, 50, 1 << 40):
        batch = make_logits(vocab=50, dtype=torch.float32, mask="none")
        batch["ids"][2, 1] = wrong
        part = {**batch, "logits": mine(batch["logits"], -1)}
        given = {"old_logprobs": batch["old"].nan_to_num(-1.0), "vocab_group": group}
        loss, _, _ = logits_run(part, mk.LossSpec(), device, **given)
        assert loss.isnan()


class Collectives(TorchDispatchMode):
    """Names of collectives and elements each takes from a rank."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional"):
            tensors = [x for arg in args for x in (arg if isinstance(arg, list) else [arg])]
            sizes = [x.numel() * x.element_size() for x in tensors if isinstance(x, torch.Tensor)]
            self.found.append((function.__name__.split(".")[0].strip("_"), min(sizes)))
        return function(*args, **(kwargs or {}))


def collectives(backend):
    """What one step sends, per vocabulary, level and kind of input."""
    device, group = begin(backend)
    ranks, found = dist.get_world_size(), {}
    n_sequences, length, width = 4, 3, 16
    ids = torch.randint(0, 40, (n_sequences, length), device=device)
    advantages = torch.tensor([1.0, -1.0, 0.0, 2.0], device=device)
    for vocab, level in itertools.product((64, 6400), LEVELS):
        sizes = [vocab // ranks] * ranks
        spec = mk.LossSpec(importance_level=level)
        given = {"advantages": advantages, "vocab_group": group, "spec": spec}
        given["mask"] = torch.ones(ids.shape, device=device)
        hidden = torch.randn(n_sequences, length, width, device=device).bfloat16().requires_grad_()
        weight = mine(torch.randn(vocab, width, device=device).bfloat16(), 0, sizes)
        weight.requires_grad_()
        logits = mine(torch.randn(n_sequences, length, vocab, device=device), -1, sizes)
        logits.requires_grad_()
        calls = {
            "hidden": lambda: mk.mapo_loss_from_hidden(hidden, weight, ids, chunk_rows=5, **given),  # noqa: B023
            "logits": lambda: mk.mapo_loss_from_logits(logits, ids, **given),  # noqa: B023
        }
        for name, call in calls.items():
            for step in ("first", "later"):
                with Collectives() as mode:
                    call().loss.backward()
                found[vocab, level, name, step] = mode.found
    return found


def disagreements(backend):
    """Each rank is told what the ranks have different, and can go on."""
    device, group = begin(backend)
    rank = dist.get_rank()
    last = rank == dist.get_world_size() - 1

    def call(hidden=16, rows=3, spec=None, shift=0, chunk_rows=5, group=group):
        torch.manual_seed(0)
        ids = torch.randint(0, 20, (2, rows), device=device) + shift
        x = torch.randn(2, rows, hidden, device=device)
        weight = torch.randn(5 + rank, hidden, device=device)
        return mk.mapo_loss_from_hidden(
            x, weight, ids, advantages=torch.ones(2, device=device), vocab_group=group,
            mask=torch.ones(2, rows, device=device), chunk_rows=chunk_rows,
            spec=spec or mk.LossSpec(),
        )  # fmt: skip

    def error(**different):
        try:
            call(**(different if last else {}), group=dist.new_group())
        except ValueError as caught:
            return str(caught)
        return "no error"

    found = {
        "width H": error(hidden=17),
        "number of rows": error(rows=4),
        "LossSpec": error(spec=mk.LossSpec(eps_low=0.3)),
        "token ids": error(shift=1),
        "chunk_rows": error(chunk_rows=6),
    }
    call()
    try:
        call(group="world")
    except TypeError as caught:
        found["ProcessGroup"] = str(caught)
    return found


def documented(backend):
    """The examples of docs/tensor_parallel.md."""
    from torch.distributed.device_mesh import init_device_mesh

    _, group = begin(backend)
    text = Path(__file__).parents[2].joinpath("docs/tensor_parallel.md").read_text()
    scope = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(block, scope)
    spec = mk.LossSpec()
    batch = make_hidden(bias=False)
    given = {"advantages": batch["advantages"], "mask": batch["mask"]}
    loss, (d_hidden, d_weight, _), _ = run(batch, spec, torch.device("cpu"))
    hidden, weight = batch["hidden"].requires_grad_(), mine(batch["weight"], 0).requires_grad_()
    scope["step_from_hidden"](hidden, weight, batch["ids"], group, **given)
    assert_close(weight.grad, mine(d_weight, 0), LOOSE)
    assert_close(hidden.grad, d_hidden, LOOSE)
    logits = mine(torch.nn.functional.linear(hidden.detach(), batch["weight"]), -1)
    out = scope["step_from_logits"](logits.requires_grad_(), batch["ids"], group, **given)
    assert_close(out.loss, loss, LOOSE)
    head = torch.nn.Linear(16, 50, bias=False)
    head.weight.data.copy_(batch["weight"])
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    out = scope["split_head"](head, mesh, spec)(hidden, batch["ids"], **given)
    assert_close(out.loss, loss, LOOSE)
    policy = scope["shard"](scope["Policy"](torch.nn.Linear(16, 16), torch.nn.Linear(16, 50), spec))
    x = torch.randn(batch["hidden"].shape)
    policy(x, batch["ids"], **given).loss.backward()
    assert all(x.grad is not None for x in policy.parameters())


def compiled(backend):
    """A graph breaks at a loss whose rows are split, and that is all."""
    device, group = begin(backend)
    batch = make_logits(vocab=50, dtype=torch.float32)
    hidden = make_hidden()
    weight = mine(hidden["weight"], 0)
    spec = mk.LossSpec()

    def steps(x, h, w):
        given = {"advantages": batch["advantages"], "mask": batch["mask"], "vocab_group": group}
        out = mk.mapo_loss_from_logits(x * 2.0, batch["ids"], spec=spec, **given)
        other = mk.mapo_loss_from_hidden(h, w, hidden["ids"], **{**given, "mask": hidden["mask"]})
        logp = mk.token_logprobs(
            x, batch["ids"], mask=batch["mask"], vocab_group=group, return_entropy=True
        )
        return out.loss + other.loss, *logp

    found = []
    for function in (steps, torch.compile(steps, backend="aot_eager")):
        x = mine(batch["logits"], -1).requires_grad_()
        w = weight.clone().requires_grad_()
        loss, *logp = function(x, hidden["hidden"], w)
        loss.backward()
        found.append([loss, *logp, x.grad, w.grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
