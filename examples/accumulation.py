"""Gradient accumulation: one plan for the batch, then micro-batches.

`python examples/accumulation.py`: the gradient of four micro-batches equals that of one batch.
Where all answers to a prompt earn the same reward there is nothing to learn. The plan knows that
before the model runs, so these sequences cost neither forward nor backward.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mapo_kernels import LossSpec, make_plan, mapo_loss_from_logits

spec = LossSpec(eps_low=0.2, eps_high=0.28, aggregation="token-mean")


def loss_of(model, batch, plan):
    ids, attended = batch["input_ids"], batch["attention_mask"]
    logits = model(ids, attention_mask=attended).logits[:, :-1]  # [B, S - 1, V]
    old = batch["old_logprobs"]
    return mapo_loss_from_logits(logits, ids[:, 1:], old_logprobs=old, plan=plan).loss


def accumulate(model, batch, micro_batch):
    plan = make_plan(  # advantages of whole groups, and the denominator of the whole batch
        rewards=batch["rewards"],  # [B]: the answers to a prompt follow one another
        group_size=8,
        mask=batch["mask"],  # [B, S - 1]: 1 for the tokens of answers
        spec=spec,
    )
    live = torch.tensor(plan.live_counts).nonzero()[:, 0]  # sequences that change something
    for rows in live.split(micro_batch) if len(live) else ():
        part = {name: x[rows] for name, x in batch.items()}
        # The losses of the parts add up to that of the batch: no division by their number.
        loss_of(model, part, plan.micro_batch(rows)).backward()
    return plan


def gradient_of(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def main():
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    n, prompt, length = 32, 3, 10  # sequences, and tokens of each
    lengths = torch.randint(prompt + 1, length + 1, (n, 1))
    targets = torch.arange(1, length)
    batch = {
        "input_ids": torch.randint(0, 16, (n, length)),
        "attention_mask": (torch.arange(length) < lengths).long(),
        "mask": (targets >= prompt) & (targets < lengths),
        "rewards": (torch.rand(n) < 0.5).float(),
        "old_logprobs": -torch.rand(n, length - 1) - 2,
    }
    batch["rewards"][:8] = 1.0  # a prompt that is always solved
    accumulate(model, batch, micro_batch=n)
    whole = gradient_of(model)
    model.zero_grad()
    plan = accumulate(model, batch, micro_batch=6)
    error = (gradient_of(model) - whole).norm() / whole.norm()
    skipped = plan.live_counts.count(0)
    print(f"{skipped} of {n} sequences skipped; relative difference of gradients {error:.1e}")


if __name__ == "__main__":
    main()
