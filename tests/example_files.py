"""The examples, loaded as modules, and what tests and ranks do with them."""

import importlib.util
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import mapo_kernels as mk

FOLDER = Path(__file__).parents[1] / "examples"


def load(name):
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_model(family="Llama", scale=6.0):
    """A random causal LM whose distributions are far from uniform: what it attends to matters."""
    import transformers

    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    if family == "GPT2":
        sizes = {"vocab_size": 16, "n_embd": 16, "n_layer": 2, "n_positions": 64}
        heads = {"n_head": 2}
    config = getattr(transformers, f"{family}Config")(**sizes, **heads, eos_token_id=0)
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


def rollouts(n=16, group_size=8):
    """Prompts of 1 to 4 tokens, each `group_size` times, and answers of 1 to 5."""
    questions = [torch.randint(1, 16, (1 + i % 4,)) for i in range(n // group_size)]
    prompts = [question for question in questions for _ in range(group_size)]
    return prompts, [torch.randint(1, 16, (1 + i % 5,)) for i in range(n)]


def batch_of(prompts, answers, side="left"):
    """The batch of `examples/own_loop.py`, with rewards and old log-probs."""
    batch = load("own_loop").batch_of(prompts, answers, side)
    batch["rewards"] = (torch.arange(len(prompts)) % 3 == 0).float()
    return batch | {"old_logprobs": -torch.rand(batch["mask"].shape) - 2}


def gradients(model):
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


class Nothing:
    """An optimizer whose steps change nothing, so that gradients stay to be looked at."""

    def zero_grad(self):
        pass

    step = zero_grad


def _part_of_a_batch():
    """The batch of all ranks, and what lies on this one: a part of another number of tokens."""
    torch.manual_seed(1)
    batch = batch_of(*rollouts(32))
    size = len(batch["rewards"]) // dist.get_world_size()
    rows = slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)
    return batch, {name: x[rows] for name, x in batch.items()}


def _of_one_process(policy, batch):
    """Gradients of the whole batch, by name."""
    spec = mk.LossSpec(eps_low=0.2, eps_high=0.28, aggregation="token-mean")
    given = {"rewards": batch["rewards"], "group_size": 8, "mask": batch["mask"], "spec": spec}
    policy(batch, mk.make_plan(**given)).loss.backward()
    return gradients(policy)


def check_ddp():
    """Gradients are those of one process; returns how far apart they are without DDP's forward."""
    example = load("ddp")
    batch, own = _part_of_a_batch()
    expected = _of_one_process(example.Policy(tiny_model(scale=2.0)), batch)
    ddp = DistributedDataParallel(example.Policy(tiny_model(scale=2.0)))
    example.training_step(ddp, Nothing(), own)
    for name, grad in gradients(ddp.module).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6)
    ddp.zero_grad()
    example.training_step(ddp.module, Nothing(), own)
    mine = torch.cat([grad.flatten() for grad in gradients(ddp.module).values()])
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    return float((every[0] - every[1]).norm() / every[0].norm())


def check_fsdp2():
    """Gradients of shards are those of one process: in float32 closely, in bfloat16 roughly."""
    example = load("fsdp2")
    batch, own = _part_of_a_batch()
    expected = _of_one_process(example.Policy(tiny_model(scale=2.0)), batch)
    narrow = example.MixedPrecisionPolicy
    off = {}
    for precision in ("float32", "bfloat16"):
        if precision == "float32":
            example.MixedPrecisionPolicy = lambda *_, **options: narrow(**options)
        policy = example.shard(example.Policy(tiny_model(scale=2.0)))
        example.training_step(policy, Nothing(), own)
        found = {name: grad.full_tensor() for name, grad in gradients(policy).items()}
        assert found.keys() == expected.keys()
        gap = sum((found[name] - grad).square().sum() for name, grad in expected.items())
        off[precision] = float((gap / sum(x.square().sum() for x in expected.values())).sqrt())
        example.MixedPrecisionPolicy = narrow
    return off
