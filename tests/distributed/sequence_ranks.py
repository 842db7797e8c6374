"""What the ranks of `test_sequence_parallel.py` do; every function runs on all of them."""

import itertools

import torch
import torch.distributed as dist
from hidden import make_hidden
from support import POLICIES, assert_close, keep, make_logits, tensors_of
from vocab_ranks import begin, one_process, same_on_every_rank

import mapo_kernels as mk
from mapo_kernels.spec import AGGREGATIONS

LEVELS = ("token", "sequence")
LOOSE = 3e-6
NONE = ("contributing", "token-sum")  # which divides by nothing
TOKENS = ("logp", "old", "ref", "rollout", "weights", "mask", "ids", "logits", "hidden")


def cut_of(kind, length, n_ranks):
    """Positions of a padded sequence on each rank: uneven, zig-zag, or all of them on one rank."""
    if kind == "zig-zag":
        halves = torch.arange(length).chunk(2 * n_ranks)
        halves = [*halves, *[torch.arange(0)] * (2 * n_ranks - len(halves))]
        return [torch.cat([halves[r], halves[2 * n_ranks - 1 - r]]) for r in range(n_ranks)]
    sizes = {"uneven": [1] * (n_ranks - 1), "one rank": [0] * (n_ranks - 1)}[kind]
    return list(torch.arange(length).split([*sizes, length - sum(sizes)]))


def part_of(batch, positions):
    """The batch with some of the positions of every sequence."""
    return {k: x[:, positions] if k in TOKENS and x is not None else x for k, x in batch.items()}


def packed_part(batch, lengths, positions):
    """The same, packed: of each sequence those of the positions that it has."""
    order = [[p for p in positions.tolist() if p < n] for n in lengths]
    found = {}
    for k, x in batch.items():
        found[k] = x
        if k in TOKENS and x is not None:
            found[k] = torch.cat([x[i][order[i]] for i in range(len(lengths))])
    ends = torch.tensor([0, *[len(x) for x in order]]).cumsum(0)
    return found, ends.to(torch.int32)


def call(level, batch, spec, device, **given):
    """Loss, gradients by name, metrics."""
    given = {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in given.items()}
    names = {"logprobs": ["logp"], "logits": ["logits"], "hidden": ["hidden", "weight", "bias"]}
    leaves = [batch[k].to(device, copy=True).requires_grad_() for k in names[level]]
    if spec is not None:
        given |= {"mask": batch["mask"].to(device), "spec": spec}
    if level == "logprobs":
        out = mk.mapo_loss(leaves[0], **given)
    elif level == "logits":
        out = mk.mapo_loss_from_logits(leaves[0], batch["ids"].to(device), **given)
    else:
        hidden, weight, bias = leaves
        ids = batch["ids"].to(device)
        out = mk.mapo_loss_from_hidden(hidden, weight, ids, bias=bias, chunk_rows=3, **given)
    grads = torch.autograd.grad(out.loss * -1.5, leaves)
    return out.loss.detach(), dict(zip(names[level], grads, strict=True)), out.metrics


def compare(level, batch, spec, device, group, cut, tolerance=LOOSE, **given):
    """A rank's part of padded sequences, and the whole of them on one process."""
    # On the same backend: `token-sum` may be a small difference of large sums.
    whole = call(level, batch, spec, device, **tensors_of(batch, spec), **given)
    positions = cut_of(cut, batch["mask"].shape[1], dist.get_world_size())[dist.get_rank()]
    part = part_of(batch, positions)
    here = call(level, part, spec, device, sequence_group=group, **tensors_of(part, spec), **given)
    held(whole, here, positions, tolerance)


def held(whole, here, positions, tolerance):
    assert_close(here[0], whole[0], tolerance)
    assert same_on_every_rank(here[0])
    for name, grad in here[1].items():
        exact = whole[1][name]
        if name in ("weight", "bias"):
            dist.all_reduce(grad)
        else:
            exact = exact[:, positions]
        assert_close(grad, exact, tolerance)
    assert set(here[2]) == set(whole[2])
    for name, value in whole[2].items():
        assert_close(here[2][name], value, tolerance)


def every_level(backend):
    device, group = begin(backend)
    cuts = itertools.cycle(("uneven", "zig-zag", "one rank"))
    policies = itertools.cycle(POLICIES)
    masks = itertools.cycle(("random", "row", "none", "all"))
    for importance, aggregation in itertools.product(LEVELS, AGGREGATIONS):
        is_first = aggregation in AGGREGATIONS[:2]
        if backend == "interpreter" and (importance == "token") == is_first:
            continue
        for level in ("logprobs", "logits", "hidden"):
            bonus = 0.0 if level == "logprobs" else 0.02
            spec = mk.LossSpec(
                **next(policies), importance_level=importance, aggregation=aggregation,
                entropy_coef=bonus, beta=0.1,
            )  # fmt: skip
            length, mask = 6, next(masks)
            batch = make_hidden(4, length, mask=mask)
            if level != "hidden":
                batch = make_logits(4, length, 50, torch.float32, mask)
            if level == "logprobs":
                batch["logp"] = batch["old"] + 0.1 * torch.randn(4, length)
            given = {"rewards": torch.tensor([1.0, 0.0, 0.4, 1.0]), "group_size": 2}
            compare(level, batch, spec, device, group, next(cuts), **given)


def with_plans(backend):
    """Micro-batches of a plan, whose tokens lie on all ranks, add up to the loss of the batch."""
    device, group = begin(backend)
    specs = itertools.product(LEVELS, AGGREGATIONS, ("all", "contributing"))
    for i, (importance, aggregation, denominator) in enumerate(specs):
        if (backend == "interpreter" and i % 5) or (denominator, aggregation) == NONE:
            continue
        spec = mk.LossSpec(
            importance_level=importance, aggregation=aggregation, denominator=denominator
        )
        batch = make_hidden(4, 6)
        rewards = torch.tensor([1.0, 0.0, 1.0, 1.0])
        given = {"rewards": rewards, "group_size": 2}
        whole = one_process(
            backend, call, "hidden", batch, spec, device, **given, **tensors_of(batch, spec)
        )
        positions = cut_of("uneven", 6, dist.get_world_size())[dist.get_rank()]
        part = part_of(batch, positions)
        plan = mk.make_plan(
            mask=part["mask"].to(device), spec=spec, sequence_group=group,
            **{k: x.to(device) if k == "rewards" else x for k, x in given.items()},
        )  # fmt: skip
        total, grads = torch.zeros((), device=device), torch.zeros_like(part["hidden"])
        weight = torch.zeros_like(part["weight"])
        for rows in (slice(0, 1), slice(1, 4)):
            some = {k: x if k in ("weight", "bias") else x[rows] for k, x in part.items()}
            here = call(
                "hidden", some, None, device, plan=plan.micro_batch(rows), **tensors_of(some, spec)
            )
            total += here[0]
            grads[rows] = here[1]["hidden"].cpu()
            weight += here[1]["weight"].cpu()
        dist.all_reduce(weight)
        assert_close(total, whole[0], LOOSE)
        assert_close(grads, whole[1]["hidden"][:, positions], LOOSE)
        assert_close(weight, whole[1]["weight"], LOOSE)


def with_data_parallel(backend):
    """Two parts of a batch, the sequences of each of them on half of the ranks."""
    device, _ = begin(backend)
    n_ranks, rank = dist.get_world_size(), dist.get_rank()
    half = n_ranks // 2
    pairs = [dist.new_group(list(range(i, i + half))) for i in (0, half)]
    across = [dist.new_group([i, i + half]) for i in range(half)]
    part, place = rank // half, rank % half
    batch = make_hidden(4, 6)
    for importance, aggregation in itertools.product(LEVELS, AGGREGATIONS):
        spec = mk.LossSpec(importance_level=importance, aggregation=aggregation)
        batch["logp"] = batch["old"] + 0.1 * torch.randn(4, 6)
        rewards, ids = torch.tensor([1.0, 0.0, 0.4, 1.0]), torch.tensor([0, 1, 1, 0])
        given = {"rewards": rewards, "group_ids": ids, **tensors_of(batch, spec)}
        whole = one_process(backend, call, "logprobs", batch, spec, device, **given)
        positions = cut_of("zig-zag", 6, half)[place]
        rows = slice(2 * part, 2 * part + 2)
        mine = part_of({k: batch[k][rows] for k in ("logp", "old", "weights", "mask")}, positions)
        here = call(
            "logprobs", mine, spec, device, rewards=rewards[rows], group_ids=ids[rows],
            sequence_group=pairs[part], process_group=across[place], normalizer="global",
            old_logprobs=mine["old"], token_weights=mine["weights"],
        )  # fmt: skip
        loss = here[0].clone()
        dist.all_reduce(loss, group=across[place])
        assert_close(loss / 2, whole[0], LOOSE)
        assert_close(here[1]["logp"] / 2, whole[1]["logp"][rows][:, positions], LOOSE)
        metrics = here[2].reduce(across[place])
        for name, value in whole[2].items():
            assert_close(metrics[name], value, LOOSE)


def odd_batches(backend):
    """Per-token advantages of which a rank sees none, packed sequences, kept columns, errors."""
    device, group = begin(backend)
    rank, n_ranks = dist.get_rank(), dist.get_world_size()
    batch = make_hidden(4, 6, mask="none")
    advantages = torch.zeros(4, 6)
    advantages[:, 0], advantages[1] = torch.randn(4), torch.randn(6)
    for importance in LEVELS:
        spec = mk.LossSpec(importance_level=importance, aggregation="seq-mean-token-mean")
        given = tensors_of(batch, spec)
        whole = one_process(
            backend, call, "hidden", batch, spec, device, advantages=advantages, **given
        )
        positions = cut_of("uneven", 6, n_ranks)[rank]
        part = part_of(batch, positions)
        own = {"advantages": advantages[:, positions], **tensors_of(part, spec)}
        here = call("hidden", part, spec, device, sequence_group=group, **own)
        held(whole, here, positions, LOOSE)
        # Packed sequences of different lengths, some without a token on some rank.
        lengths = [6, 1, 3, 5]
        for level in ("logprobs", "hidden"):
            packed = {**batch, "logp": batch["old"] - 0.1}
            some = {k: x for k, x in packed.items() if k in (*TOKENS, "weight", "bias")}
            signal = {"advantages": torch.tensor([0.3, -1.0, 0.7, 0.2])}
            every, bounds = packed_part(some, lengths, torch.arange(6))
            whole = one_process(
                backend, call, level, every, spec, device, cu_seqlens=bounds,
                **tensors_of(every, spec), **signal,
            )  # fmt: skip
            positions = cut_of("zig-zag", 6, n_ranks)[rank]
            part, bounds = packed_part(some, lengths, positions)
            here = call(
                level, part, spec, device, cu_seqlens=bounds, sequence_group=group,
                **tensors_of(part, spec), **signal,
            )  # fmt: skip
            assert_close(here[0], whole[0], LOOSE)
            for name, value in whole[2].items():
                assert_close(here[2][name], value, LOOSE)
            name = "logp" if level == "logprobs" else "hidden"
            ends = [0, *torch.tensor(lengths).cumsum(0).tolist()]
            index = [
                ends[i] + p for i, n in enumerate(lengths) for p in positions.tolist() if p < n
            ]
            assert_close(here[1][name], whole[1][name][index], LOOSE)
    _kept_columns(backend, batch, device, group)
    spec = mk.LossSpec(eps_low=0.1 + 0.1 * (rank == n_ranks - 1))
    try:
        call("hidden", batch, spec, device, sequence_group=group, advantages=torch.ones(4))
    except ValueError as error:
        assert "sequence_group: expected the same LossSpec" in str(error)
    else:
        raise AssertionError("ranks that were called differently were not told")


def _kept_columns(backend, batch, device, group):
    lists = keep(batch["ids"], 50, (1, 2, 5, 0))
    spec = mk.LossSpec(importance_level="sequence", entropy_coef=0.02)
    mask = mk.SamplingMask.from_lists(lists, device)
    given = {"advantages": torch.randn(4)}
    own = tensors_of(batch, spec)
    whole = one_process(
        backend, call, "hidden", batch, spec, device, sampling_mask=mask, **own, **given
    )
    positions = cut_of("zig-zag", 6, dist.get_world_size())[dist.get_rank()]
    part = part_of(batch, positions)
    index = torch.tensor(
        [i * 6 + p for i in range(4) for p in positions.tolist()], dtype=torch.long
    )
    some = mask.select(index.to(device))
    own = tensors_of(part, spec)
    here = call(
        "hidden", part, spec, device, sequence_group=group, sampling_mask=some, **own, **given
    )
    held(whole, here, positions, LOOSE)


def rollout_masks(backend):
    """A sequence's geometric mean, and what is said of rollouts, are those of all its tokens."""
    device, group = begin(backend)
    for level in ("token", "sequence"):
        spec = mk.LossSpec(rollout_mask=(0.8, 1.3), rollout_mask_level=level)
        batch = make_hidden(4, 6)
        batch["logp"] = batch["old"] + 0.1 * torch.randn(4, 6)
        given = {"advantages": torch.tensor([0.3, -1.0, 0.7, 0.2])}
        for cut, where in (("zig-zag", "logprobs"), ("uneven", "hidden")):
            compare_rollouts(where, batch, spec, device, group, cut, **given)


def compare_rollouts(level, batch, spec, device, group, cut, **given):
    names = {"old_logprobs": "old", "rollout_logprobs": "rollout"}
    positions = cut_of(cut, batch["mask"].shape[1], dist.get_world_size())[dist.get_rank()]
    part = part_of(batch, positions)
    of_all = {k: batch[name] for k, name in names.items()}
    own = {k: part[name] for k, name in names.items()}
    whole = call(level, batch, spec, device, **of_all, **given)
    here = call(level, part, spec, device, sequence_group=group, **own, **given)
    held(whole, here, positions, LOOSE)
