"""What the ranks of `test_vocab_parallel.py` do with DTensors and fully sharded parameters."""

import itertools

import torch
import torch.distributed as dist
from hidden import make_hidden, run
from support import assert_close
from vocab_ranks import LEVELS, LOOSE, begin

import mapo_kernels as mk


def head_on(mesh, placements, weight, bias):
    from torch.distributed.tensor import distribute_tensor

    head = torch.nn.Linear(weight.shape[1], weight.shape[0])
    head.weight = torch.nn.Parameter(distribute_tensor(weight, mesh, placements))
    head.bias = torch.nn.Parameter(distribute_tensor(bias, mesh, placements))
    return head


def dtensors(backend):
    """A DTensor says by itself how it is split, and gets a gradient like itself."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

    device, _ = begin(backend)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    batch = {k: v.to(device) for k, v in make_hidden().items()}
    given = {"advantages": batch["advantages"], "mask": batch["mask"]}
    spec = mk.LossSpec(entropy_coef=0.02)
    whole = run(batch, spec, device)
    for placement in (Shard(0), Replicate()):
        head = head_on(mesh, [placement], batch["weight"], batch["bias"])
        hidden = batch["hidden"].clone().requires_grad_()
        out = mk.MapoLinearLoss(head, spec)(hidden, batch["ids"], **given)
        out.loss.backward()
        assert_close(out.loss, whole[0], LOOSE)
        for grad, exact in zip(
            (hidden.grad, head.weight.grad, head.bias.grad), whole[1], strict=True
        ):
            if grad is not hidden.grad:
                assert grad.placements == (placement,) and grad.shape == exact.shape
                grad = grad.full_tensor()
            assert_close(grad, exact, LOOSE)
        of_rows = {"token_ids": batch["ids"], "mask": batch["mask"]}
        scored = mk.token_logprobs_from_hidden(
            batch["hidden"], head.weight, bias=head.bias, **of_rows
        )
        plain = batch["weight"].clone().requires_grad_()
        exact = mk.token_logprobs_from_hidden(batch["hidden"], plain, bias=batch["bias"], **of_rows)
        assert_close(scored, exact, LOOSE)
        (grad,) = torch.autograd.grad(scored.sum(), head.weight)
        assert grad.placements == (placement,)
        assert_close(grad.full_tensor(), torch.autograd.grad(exact.sum(), plain)[0], LOOSE)

    def error(weight, hidden=None, **more):
        hidden = batch["hidden"] if hidden is None else hidden
        try:
            mk.mapo_loss_from_hidden(hidden, weight, batch["ids"], **given, **more)
        except (ValueError, TypeError) as caught:
            return str(caught)
        return "no error"

    weight = batch["weight"]
    split = distribute_tensor(weight, mesh, [Shard(0)])
    partial = split.redistribute(mesh, [Replicate()])
    partial = type(split).from_local(partial.to_local(), mesh, [Partial()])
    return {
        "got (Shard(dim=1),)": error(distribute_tensor(weight, mesh, [Shard(1)])),
        "got (Partial(sum),)": error(partial),
        "mesh's own group": error(split, vocab_group=dist.new_group()),
        "hidden.to_local()": error(split, distribute_tensor(batch["hidden"], mesh, [Replicate()])),
        "bias: expected": error(weight, bias=distribute_tensor(batch["bias"], mesh, [Shard(0)])),
        "of lm_head_weight": error(
            split, bias=distribute_tensor(batch["bias"], mesh, [Replicate()])
        ),
        "at least one row": error(distribute_tensor(weight[: mesh.size() - 1], mesh, [Shard(0)])),
    }


class Policy(torch.nn.Module):
    """A decoder's stand-in, and the loss that owns the head."""

    def __init__(self, spec, head=None):
        super().__init__()
        self.body = torch.nn.Linear(16, 16)
        self.loss = mk.MapoLinearLoss(torch.nn.Linear(16, 50) if head is None else head, spec)

    def forward(self, x, ids, **given):
        return self.loss(self.body(x), ids, **given)


def data_of(rank, micro):
    torch.manual_seed(10 * rank + micro)
    batch = make_hidden(mask="none")
    given = {"advantages": batch["advantages"], "old_logprobs": batch["old"]}
    given["mask"] = torch.rand(batch["ids"].shape) < 0.7
    return batch["hidden"], batch["ids"], given


def gradients_of_one_process(spec, ranks, micros):
    """Mean over ranks of the gradients of their summed losses, by name."""
    torch.manual_seed(5)
    model = Policy(spec)
    for rank, micro in itertools.product(range(ranks), range(micros)):
        x, ids, given = data_of(rank, micro)
        (model(x, ids, **given).loss / ranks).backward()
    return model, {name: x.grad for name, x in model.named_parameters()}


def fsdp(backend):
    """The weight is whole inside the module's forward; gradients reach its shards."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor

    begin(backend)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for level, sync_each in itertools.product(LEVELS, (True, False)):
        spec = mk.LossSpec(importance_level=level)
        for micros in (1, 3):
            _, exact = gradients_of_one_process(spec, ranks, micros)
            torch.manual_seed(5)
            model = Policy(spec)
            fully_shard(model.loss)
            fully_shard(model)
            for micro in range(micros):
                model.set_requires_gradient_sync(sync_each or micro == micros - 1)
                x, ids, given = data_of(rank, micro)
                model(x, ids, **given).loss.backward()
            for name, x in model.named_parameters():
                assert isinstance(x, DTensor) and x.grad.placements == x.placements
                assert_close(x.grad.full_tensor(), exact[name], LOOSE)
    narrow = Policy(mk.LossSpec())
    fully_shard(narrow, mp_policy=MixedPrecisionPolicy(torch.bfloat16, cast_forward_inputs=False))
    x, ids, given = data_of(rank, 0)
    narrow(x.bfloat16(), ids, **given).loss.backward()
    assert narrow.loss.lm_head.weight.grad.full_tensor().isfinite().all()
    rounding = Policy(mk.LossSpec())
    fully_shard(rounding.loss, mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    # Outside the forward each rank has some rows of the head, and tokens of its own.
    sharded = model.loss.lm_head.weight
    calls = {
        "old_logprobs: expected float32": lambda: rounding.loss(x, ids, **given),
        "token ids": lambda: mk.mapo_loss_from_hidden(x, sharded, ids, **given),
    }
    found = {}
    for expected, call in calls.items():
        try:
            call()
        except ValueError as caught:
            found[expected] = str(caught)
    return found


def fsdp_of_split_rows(backend):
    """Two meshes: the vocabulary is split over one, its shares are sharded over the other."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    begin(backend)
    spec = mk.LossSpec(entropy_coef=0.02)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    whole, exact = gradients_of_one_process(spec, 2, 2)
    head = whole.loss.lm_head
    split = head_on(mesh["tp"], [Shard(0)], head.weight.detach(), head.bias.detach())
    model = Policy(spec, split)
    model.body.load_state_dict(whole.body.state_dict())
    fully_shard(model.body, mesh=mesh["dp"])
    fully_shard(model.loss, mesh=mesh["dp"])
    for micro in range(2):
        x, ids, given = data_of(mesh["dp"].get_local_rank(), micro)
        model(x, ids, **given).loss.backward()
    for name, x in model.named_parameters():
        assert_close(x.grad.full_tensor(), exact[name], LOOSE)
