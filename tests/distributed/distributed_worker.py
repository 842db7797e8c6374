"""What the ranks of `test_distributed.py` do; every function runs on all of them.

Each rank makes the whole batch from the same seed, and knows what one process makes of it.
"""

import re
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from support import AGGREGATIONS, assert_close, make_batch, make_logits

import mapo_kernels as mk

NAN = float("nan")
TOLERANCE = 2e-6
# Sequences of each rank: even or not, ranks without any, and one that holds everything.
SPLITS = {
    1: [[10]],
    2: [[5, 5], [7, 3], [0, 10]],
    4: [[3, 2, 2, 3], [4, 0, 5, 1]],
}
REWARDS = [1, 0, 0, 0.5, 1, 1, NAN, 0.1, 1, 0]
IDS = [7, -3, 7, 2, 2, 7, -3, 2, -3, 7]


def sum_of_ranks():
    x = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(x)
    return float(x)


def fail_on_last_rank():
    if dist.get_rank() == dist.get_world_size() - 1:
        raise ValueError("a message to look for")
    dist.barrier()


def own_rows(counts):
    """Which rows are this rank's if rank r has `counts[r]` of them."""
    start = sum(counts[: dist.get_rank()])
    return slice(start, start + counts[dist.get_rank()])


def alone(backend, function, *args, **kwargs):
    """What one process makes of the whole batch: on the eager backend, which is quick."""
    mk.set_backend("eager")
    found = function(*args, **kwargs)
    mk.set_backend(backend)
    return found


def mean_over_ranks(x):
    x = x.detach().clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()


def assert_metrics(actual, expected, tolerance=TOLERANCE):
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert_close(actual[name], value, tolerance)


def make_whole(device, mask="random"):
    """The batch of all ranks, and where its advantages come from."""
    batch = {k: v.to(device) for k, v in make_batch(10, 6, torch.float32, mask).items()}
    rewards, ids = torch.tensor(REWARDS, device=device), torch.tensor(IDS, device=device)
    return batch, {"rewards": rewards, "group_ids": ids}


def step(batch, spec, **given):
    """Loss, gradient and metrics of log-probs."""
    logp = batch["logp"].clone().requires_grad_()
    given |= {"old_logprobs": batch["old"], "ref_logprobs": batch["ref"], "mask": batch["mask"]}
    out = mk.mapo_loss(logp, spec=spec, **given)
    out.loss.backward()
    return out, logp.grad


def take(tensors, rows):
    return {k: v[rows] if isinstance(v, torch.Tensor) else v for k, v in tensors.items()}


def check_losses(backend, device):
    """Loss, gradient and metrics of rewards that lie across ranks, for every aggregation."""
    mk.set_backend(backend)
    group, n_ranks = dist.group.WORLD, dist.get_world_size()
    specs = [mk.LossSpec(aggregation=name, beta=0.1) for name in AGGREGATIONS]
    specs.append(replace(specs[0], importance_level="sequence"))
    specs.append(mk.LossSpec(aggregation=AGGREGATIONS[1], importance_level="sequence"))
    counted = ("token-mean", "prompt-mean", "seq-mean-token-mean", "prompt-mean")
    specs += [mk.LossSpec(aggregation=x, denominator="contributing", beta=0.1) for x in counted]
    specs += [mk.LossSpec(aggregation=x) for x in ("prompt-mean", "token-sum", "prompt-mean")]
    for i, spec in enumerate(specs):
        # In turn some tokens count, every one, and none of the second sequence.
        batch, source = make_whole(device, ("random", "none", "row")[i % 3])
        counts = SPLITS[n_ranks][i % len(SPLITS[n_ranks])]
        if i == 2:
            batch["mask"] = batch["mask"].clone()
            batch["mask"][: counts[0]] = False  # a rank whose tokens are all masked
        rows = own_rows(counts)
        if i % 2:
            source = {"rewards": source["rewards"], "group_size": 5}
        whole, whole_grad = alone(backend, step, batch, spec, **source)
        part, shared = take(batch, rows), take(source, rows)
        out, grad = step(part, spec, normalizer="global", process_group=group, **shared)
        assert_close(mean_over_ranks(out.loss), whole.loss, TOLERANCE)
        assert_close(grad / n_ranks, whole_grad[rows], TOLERANCE)
        assert_close(out.advantages, whole.advantages[rows], TOLERANCE)
        assert out.metrics["zero_advantage_groups"] == whole.metrics["zero_advantage_groups"]
        assert_metrics(out.metrics.reduce(group), whole.metrics)
        if i % 3 and not spec.needs_count:
            continue
        # Advantages that are known already: the denominator alone is counted across ranks.
        known = {"advantages": whole.advantages[rows], "normalizer": "global"}
        if spec.aggregation == "prompt-mean":
            known |= {k: v for k, v in shared.items() if k != "rewards"}
        again, again_grad = step(part, spec, process_group=group, **known)
        assert_close(again.loss, out.loss, TOLERANCE)
        assert_close(again_grad, grad, TOLERANCE)


def check_plans(backend, device):
    """Micro-batches of ranks, padded and packed, add up to the batch."""
    mk.set_backend(backend)
    group, n_ranks = dist.group.WORLD, dist.get_world_size()
    specs = [mk.LossSpec(), mk.LossSpec(aggregation="seq-mean-token-mean")]
    specs += [mk.LossSpec(aggregation="prompt-mean", denominator="contributing")]
    for spec in specs:
        for counts in SPLITS[n_ranks]:
            batch, source = make_whole(device)
            rows = own_rows(counts)
            logp = batch["logp"].clone().requires_grad_()
            given = {"mask": batch["mask"], "old_logprobs": batch["old"], "spec": spec}
            whole = alone(backend, mk.mapo_loss, logp, **given, **source)
            whole.loss.backward()
            shared = {"spec": spec, "process_group": group, "normalizer": "global"}
            plan = mk.make_plan(mask=batch["mask"][rows], **take(source, rows), **shared)
            part = {k: batch[k][rows] for k in ("logp", "old")}
            part["logp"] = part["logp"].clone().requires_grad_()
            total = torch.zeros((), device=device)
            for micro in (slice(0, 2), slice(2, None)):
                planned = {"plan": plan.micro_batch(micro), "old_logprobs": part["old"][micro]}
                out = mk.mapo_loss(part["logp"][micro], **planned)
                out.loss.backward()
                total = total + out.loss.detach()
            assert_close(mean_over_ranks(total), whole.loss, TOLERANCE)
            assert_close(part["logp"].grad / n_ranks, logp.grad[rows], TOLERANCE)
            assert plan.metrics["nonfinite_rewards"] == 1
            assert_close(plan.metrics["lambda_mean"], whole.metrics["lambda_mean"], TOLERANCE)
            if counts[dist.get_rank()] == 0:
                empty = {"cu_seqlens": torch.zeros(1, dtype=torch.int32, device=device)}
            else:
                ends = torch.arange(counts[dist.get_rank()] + 1, device=device) * 6
                empty = {"cu_seqlens": ends.int(), "mask": batch["mask"][rows].reshape(-1)}
            packed = mk.make_plan(**empty, **take(source, rows), **shared)
            assert_close(packed.normalizer, plan.normalizer, 0)
            out = mk.mapo_loss(part["logp"].reshape(-1), plan=packed)
            assert torch.isfinite(out.loss)


def check_advantages(backend, device):
    """Groups across ranks: ids in any order, groups that straddle, success, dtypes, many rows."""
    mk.set_backend(backend)
    group = dist.group.WORLD
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool):
        for counts in SPLITS[dist.get_world_size()]:
            rows = own_rows(counts)
            rewards = torch.tensor(REWARDS, device=device)
            rewards = (rewards.nan_to_num() if not dtype.is_floating_point else rewards).to(dtype)
            ids, success = torch.tensor(IDS, device=device), torch.arange(10, device=device) % 3 > 1
            for given in ({"group_ids": ids}, {"group_size": 5}, {"group_ids": ids.short()}):
                given = {**given, "success": success if dtype != torch.bool else None}
                given["group_weight"] = (
                    torch.arange(10.0, device=device) if dtype == torch.float32 else None
                )
                scale = {"scale": "batch" if "group_size" in given else "group"}
                whole, stats = mk.group_advantages(rewards, return_stats=True, **given, **scale)
                part, part_stats = mk.group_advantages(
                    rewards[rows],
                    return_stats=True,
                    process_group=group,
                    **take(given, rows),
                    **scale,
                )
                assert part.dtype == whole.dtype and torch.equal(part, whole[rows])
                for x, y in zip(part_stats, stats, strict=True):
                    assert torch.equal(x, y)
    _check_several_rewards(group, device)
    try:
        mk.group_advantages(torch.ones(1), group_size=3, process_group=group)
    except ValueError as error:
        assert "positive divisor" in str(error) or dist.get_world_size() == 3
    else:
        raise AssertionError("rewards that make no whole groups were accepted")


def _check_several_rewards(group, device):
    """Rewards [B, K], and pass@k, of groups across ranks; in losses and plans too."""
    first = torch.tensor(REWARDS, device=device)
    rewards = torch.stack([first, torch.linspace(0, 1, 10, device=device), first.flip(0)], 1)
    ids = torch.tensor(IDS, device=device)
    specs = [mk.AdvantageSpec(pass_at_k=2)]
    specs += [
        mk.AdvantageSpec(reward_weights=(1, 0.5, 0.0), multi_objective_aggregation=how)
        for how in ("sum_then_normalize", "normalize_then_sum")
    ]
    for (i, spec), given in product(enumerate(specs), ({"group_ids": ids}, {"group_size": 5})):
        source = {"rewards": rewards if i else first, **given, "advantage_spec": spec}
        settings = {k: getattr(spec, k) for k in spec.__dataclass_fields__}
        for counts in SPLITS[dist.get_world_size()]:
            rows = own_rows(counts)
            told = {"rewards": source["rewards"], **given}
            whole, stats = mk.group_advantages(return_stats=True, **told, **settings)
            shared = {"process_group": group}
            part, part_stats = mk.group_advantages(
                return_stats=True, **take(told, rows), **settings, **shared
            )
            assert torch.equal(part, whole[rows])
            assert all(torch.equal(x, y) for x, y in zip(part_stats, stats, strict=True))
            mask = torch.ones(10, 2, device=device)
            for aggregation in ("token-mean", "prompt-mean"):
                loss_spec = mk.LossSpec(aggregation=aggregation)
                called = {"mask": mask[rows], **take(source, rows), "spec": loss_spec, **shared}
                out = mk.mapo_loss(-mask[rows], normalizer="global", **called)
                plan = mk.make_plan(normalizer="global", **called)
                one = mk.mapo_loss(-mask, mask=mask, **source, spec=loss_spec)
                assert_close(mean_over_ranks(out.loss), one.loss, TOLERANCE)
                assert_close(out.advantages, whole[rows], TOLERANCE)
                assert_close(plan.advantages, whole[rows], TOLERANCE)
                assert out.metrics["nonfinite_rewards"] == stats.nonfinite.sum()


def check_other_levels(backend, device):
    """Logits and hidden states, with a rank that holds no sequence or no live token."""
    mk.set_backend(backend)
    group, n_ranks = dist.group.WORLD, dist.get_world_size()
    batch = {k: v.to(device) for k, v in make_logits(10, 3, 19, torch.float32).items()}
    live, ids = batch["mask"], batch["ids"]
    source = {"rewards": torch.tensor(REWARDS, device=device), "group_size": 5}
    hidden, weight = torch.randn(10, 3, 8, device=device), torch.randn(19, 8, device=device)
    for level, counts in zip(("token", "sequence"), SPLITS[n_ranks][-2:] * 2, strict=False):
        spec = mk.LossSpec(importance_level=level, entropy_coef=0.01)
        rows = own_rows(counts)

        def losses(rows, spec=spec, **given):
            given |= {"mask": live[rows], "old_logprobs": batch["old"][rows], "spec": spec}
            leaves = [x.clone().requires_grad_() for x in (batch["logits"][rows], hidden[rows])]
            head = weight.clone().requires_grad_()
            outs = [
                mk.mapo_loss_from_logits(leaves[0], ids[rows], **given),
                mk.mapo_loss_from_hidden(leaves[1], head, ids[rows], **given),
            ]
            sum(out.loss for out in outs).backward()
            return outs, [x.grad for x in leaves], head.grad

        wholes, whole_grads, whole_head = alone(backend, losses, slice(None), **source)
        shared = {"normalizer": "global", "process_group": group, **take(source, rows)}
        outs, grads, head = losses(rows, **shared)
        assert_close(mean_over_ranks(head), whole_head, TOLERANCE)
        for out, grad, whole, whole_grad in zip(outs, grads, wholes, whole_grads, strict=True):
            assert_close(mean_over_ranks(out.loss), whole.loss, TOLERANCE)
            assert_close(grad / n_ranks, whole_grad[rows], TOLERANCE)
            assert_metrics(out.metrics.reduce(group), whole.metrics, 2 * TOLERANCE)


def check_ddp(backend, device):
    """A DistributedDataParallel model with gradient accumulation, its last rank without a token."""
    mk.set_backend(backend)
    group, n_ranks, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    x, ids = torch.randn(12, 3, 8), torch.randint(0, 19, (12, 3))
    mask, rewards = torch.rand(12, 3) < 0.7, torch.rand(12).round()
    mask[12 - 12 // n_ranks :] = n_ranks == 1
    x, ids, mask, rewards = (t.to(device) for t in (x, ids, mask, rewards))
    model = torch.nn.Linear(8, 19).to(device)
    given = {"mask": mask, "rewards": rewards, "group_size": 4}
    whole = alone(backend, mk.mapo_loss_from_logits, model(x), ids, **given)
    expected = torch.autograd.grad(whole.loss, model.parameters())
    ranks = torch.nn.parallel.DistributedDataParallel(model)
    rows = slice(rank * 12 // n_ranks, (rank + 1) * 12 // n_ranks)
    x, ids = x[rows], ids[rows]
    plan = mk.make_plan(
        rewards=rewards[rows],
        group_size=4,
        mask=mask[rows],
        normalizer="global",
        process_group=group,
    )

    def backward(micro):
        logits = ranks(x[micro])
        mk.mapo_loss_from_logits(logits, ids[micro], plan=plan.micro_batch(micro)).loss.backward()

    with ranks.no_sync():
        backward(slice(0, 1))
    backward(slice(1, None))
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        assert_close(parameter.grad, grad, TOLERANCE)


def check_documentation(backend, device):
    """The example of docs/distributed.md, on ranks of which one may hold nothing."""
    mk.set_backend(backend)
    text = (Path(__file__).parents[2] / "docs/distributed.md").read_text()
    names = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], names)
    batch, source = make_whole(device)
    batch |= {"rewards": source["rewards"], "prompt_ids": source["group_ids"]}
    for counts in SPLITS[dist.get_world_size()]:
        rows = own_rows(counts)
        logp = batch["logp"].clone().requires_grad_()
        part = take(batch, rows)

        given = (part, logp[rows].__getitem__, torch.Tensor.backward, dist.group.WORLD)
        metrics = names["train_on"](*given)
        whole, grad = alone(backend, step, batch | {"ref": None}, mk.LossSpec(), **source)
        assert_close(mean_over_ranks(logp.grad), grad, TOLERANCE)
        assert_metrics(metrics, whole.metrics)


def check_metrics_of_own_groups(backend, device):
    """Groups that each lie on one rank, and a rank without a loss."""
    mk.set_backend(backend)
    group, n_ranks, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    batch, _ = make_whole(device)
    rewards = torch.tensor([1, 0, 1, 1, NAN, 0, 0, 1, NAN, NAN], device=device)
    spec = mk.LossSpec(beta=0.1)
    whole, _ = alone(backend, step, batch, spec, rewards=rewards, group_size=2)
    assert whole.metrics["active_groups"] == 4
    counts = {1: [10], 2: [4, 6], 4: [2, 0, 6, 2]}[n_ranks]
    rows = own_rows(counts)
    metrics = mk.Metrics()
    if counts[rank]:
        out, _ = step(take(batch, rows), spec, rewards=rewards[rows], group_size=2)
        metrics = out.metrics
        assert isinstance(metrics, mk.Metrics) and not metrics.across_ranks
    reduced = metrics.reduce(group)
    assert_metrics({k: reduced[k] for k in whole.metrics}, whole.metrics)
    try:
        mk.Metrics(grad_norm=torch.ones(())).reduce(group)
    except ValueError as error:
        assert "grad_norm" in str(error)


def disagreements(backend, device):
    """What each rank is told by calls that only its last rank makes otherwise."""
    mk.set_backend(backend)
    # A group that has not agreed on anything yet.
    group, odd = dist.new_group(), dist.get_rank() == dist.get_world_size() - 1
    ones = torch.ones(2, 3, device=device)
    pair = torch.tensor([0.0, 1.0], device=device)
    common = {"mask": ones, "process_group": group, "normalizer": "global"}
    rewarded = {"rewards": pair, "group_size": 2}
    given = {"advantages": pair}

    def advantages(x=pair, **arguments):
        arguments = arguments or {"group_size": 2}
        return mk.group_advantages(x, process_group=group, **arguments)

    def plan(**arguments):
        return mk.make_plan(**{**common, **arguments})

    calls = {
        "spec.eps_high": lambda: plan(spec=mk.LossSpec(eps_high=0.2 + 0.08 * odd), **rewarded),
        "spec.beta": lambda: plan(spec=mk.LossSpec(beta=0.1 * odd), **given),
        "estimator": lambda: advantages(group_size=2, estimator="grpo" if odd else "mapo"),
        "source": lambda: plan(**(given if odd else rewarded)),
        "group_size": lambda: (
            advantages(group_ids=pair.long()) if odd else advantages(group_size=2)
        ),
        "function": lambda: advantages() if odd else plan(**rewarded),
        "normalizer": lambda: plan(normalizer=None if odd else "global", **rewarded),
        "same dtype": lambda: advantages(pair.to(torch.bfloat16) if odd else pair),
        "same success": lambda: advantages(group_size=2, success=pair > 0 if odd else None),
    }
    told = {}
    for name, call in calls.items():
        try:
            call()
            told[name] = "nothing"
        except ValueError as error:
            told[name] = str(error)
    # Ranks that agreed before do not read again: the one that changes is told, the others get NaN.
    plan(**given)
    logp = torch.zeros(2, 3, device=device, requires_grad=True)
    try:
        spec = mk.LossSpec(aggregation=AGGREGATIONS[1 if odd else 0])
        out = mk.mapo_loss(logp, spec=spec, **common, **given)
        out.loss.backward()
        assert logp.grad.isnan().all()
        logits = torch.zeros(2, 3, 5, device=device, requires_grad=True)
        ids = torch.zeros_like(ones).long()
        nan = mk.mapo_loss_from_logits(
            logits, ids, mask=ones, normalizer=torch.full((), NAN, device=device), **given
        )
        nan.loss.backward()
        assert nan.loss.isnan() and logits.grad[1].isnan().all()  # the first has no signal
        told["later"] = str(float(out.loss))
    except ValueError as error:
        told["later"] = str(error)
    # And every rank is where the others are.
    assert torch.isfinite(plan(**rewarded).normalizer)
    return told


COLLECTIVES = [
    name
    for name in dir(dist)
    if name.startswith(("all_", "reduce", "broadcast", "gather", "scatter", "barrier", "send"))
]


@contextmanager
def counted_collectives():
    """A list that fills with the names and bytes sent of the collectives that are called."""
    calls, originals = [], {name: getattr(dist, name) for name in COLLECTIVES}

    def counted(name):
        def call(*args, **kwargs):
            tensors = [x for x in args if isinstance(x, torch.Tensor)]
            calls.append((name, tensors[-1].nbytes if tensors else 0))
            return originals[name](*args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counted(name))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def collectives_of_a_step(backend, device):
    """Bytes per collective: advantages of few and of many, a plan, a step of it, its metrics."""
    mk.set_backend(backend)
    group = dist.new_group()
    batch, source = make_whole(device)
    found = {}
    with counted_collectives() as calls:

        def note(name):
            found[name] = [size for _, size in calls]
            calls.clear()

        mk.group_advantages(**source, process_group=group)
        note("advantages")
        many = torch.rand(100, device=device)
        for name in ("many", "many again"):
            mk.group_advantages(many, group_size=100, process_group=group)
            note(name)
        shared = {"process_group": group, "normalizer": "global"}
        plan = mk.make_plan(mask=batch["mask"], **source, **shared)
        note("plan")
        for rows in (slice(0, 5), slice(5, None)):
            out = mk.mapo_loss(batch["logp"][rows].clone(), plan=plan.micro_batch(rows))
        note("micro-batches")
        out.metrics.reduce(group)
        note("metrics")
        known = {"mask": batch["mask"], "advantages": batch["advantages"]}
        for rank in range(2):
            mk.mapo_loss(batch["logp"] + rank, **known, **shared)
        note("two losses")
    return found
