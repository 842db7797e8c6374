"""FSDP2 (`fully_shard`), with the loss inside the forward that gathers the weights.

`torchrun --nproc-per-node 2 examples/fsdp2.py` (on CPUs too); rollouts are sampled beforehand.
"""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from mapo_kernels import LossSpec, make_plan, mapo_loss_from_hidden, token_logprobs_from_hidden


class Policy(torch.nn.Module):
    # The head's weight is whole only inside this forward; outside of it a rank has some rows.
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch, plan=None):
        ids, attended = batch["input_ids"], batch["attention_mask"]
        hidden = self.model.model(ids, attention_mask=attended).last_hidden_state[:, :-1]
        head, targets = self.model.lm_head.weight, ids[:, 1:]
        if plan is None:  # old log-probs [B, S - 1]
            return token_logprobs_from_hidden(hidden, head, targets, mask=batch["mask"])
        old = batch["old_logprobs"]
        return mapo_loss_from_hidden(hidden, head, targets, old_logprobs=old, plan=plan)


def shard(policy):
    # By default FSDP2 would round old_logprobs to bfloat16, by as much as ratios are clipped at.
    precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for layer in policy.model.model.layers:
        fully_shard(layer, mp_policy=precision)
    return fully_shard(policy, mp_policy=precision)


def training_step(policy, optimizer, batch):
    plan = make_plan(
        rewards=batch["rewards"],  # [B] of this rank
        group_size=8,
        mask=batch["mask"],  # [B, S - 1]: True for the tokens of answers
        spec=LossSpec(eps_low=0.2, eps_high=0.28, aggregation="token-mean"),
        process_group=dist.group.WORLD,
        normalizer="global",  # the mean over ranks of their losses is that of the whole batch
    )
    out = policy(batch, plan)
    optimizer.zero_grad()
    out.loss.backward()
    optimizer.step()
    return out.metrics.reduce(dist.group.WORLD)


def main():
    dist.init_process_group()
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.get_node_local_rank())
        torch.set_default_device("cuda")
    sizes = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, eos_token_id=None))
    torch.manual_seed(dist.get_rank())
    prompts = torch.randint(0, 16, (4, 3)).repeat_interleave(8, 0)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 4}
    ids = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    is_answer = (torch.arange(1, ids.shape[1]) >= 3).expand(len(ids), -1)
    batch |= {"mask": is_answer, "rewards": (ids[:, 3] < 4).float()}
    policy = shard(Policy(model))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.001)
    with torch.no_grad():
        batch["old_logprobs"] = policy(batch)
    steps = [training_step(policy, optimizer, batch) for _ in range(4)]
    print(f"rank {dist.get_rank()}: ratios up to {steps[-1]['ratio_max']:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
