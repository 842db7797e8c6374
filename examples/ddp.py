"""DDP, with the loss inside the forward that DDP wraps.

`torchrun --nproc-per-node 2 examples/ddp.py`: ranks with prompts of their own train one tiny Llama.
"""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from mapo_kernels import LossSpec, make_plan, mapo_loss_from_hidden, token_logprobs_from_hidden


class Policy(torch.nn.Module):
    # DDP averages gradients over ranks for what runs inside this forward, and for nothing else.
    # Reaching through it (hidden states of `ddp.module.model`, then the loss) raises no error:
    # gradients are silently not synchronised, and every rank trains a model of its own.
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


def training_step(policy, optimizer, batch):
    plan = make_plan(
        rewards=batch["rewards"],  # [B] of this rank; B may differ from rank to rank
        group_size=8,
        mask=batch["mask"],  # [B, S - 1]: True for the tokens of answers
        spec=LossSpec(eps_low=0.2, eps_high=0.28, aggregation="token-mean"),
        process_group=dist.group.WORLD,  # groups may lie across ranks
        normalizer="global",  # the mean over ranks of their losses is that of the whole batch
    )
    out = policy(batch, plan)
    optimizer.zero_grad()
    out.loss.backward()
    optimizer.step()
    return out.metrics.reduce(dist.group.WORLD)


def rollouts(model, n_prompts):
    prompts = torch.randint(0, 16, (n_prompts, 3)).repeat_interleave(8, 0)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 4}
    ids = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    is_answer = (torch.arange(1, ids.shape[1]) >= 3).expand(len(ids), -1)
    return batch | {"mask": is_answer, "rewards": (ids[:, 3] < 4).float()}


def main():
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.get_node_local_rank())
        torch.set_default_device("cuda")
    sizes = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, eos_token_id=None))
    policy = DistributedDataParallel(Policy(model))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.01)
    torch.manual_seed(dist.get_rank())
    for step in range(20):
        batch = rollouts(model, 4)
        with torch.no_grad():
            batch["old_logprobs"] = policy(batch)
        metrics = [training_step(policy, optimizer, batch) for _ in range(2)]
        if dist.get_rank() == 0:
            print(f"step {step}: success {metrics[0]['success_ratio_mean']:.2f}")


if __name__ == "__main__":
    dist.init_process_group()
    main()
    # After main: a DDP module that outlives its group may wait for gloo's thread for ever.
    dist.destroy_process_group()
