"""Packed sequences: no padding, and `cu_seqlens` says where each one begins.

`python examples/packed.py`: log-probs of packed sequences equal those of each alone. transformers
keeps them apart by `position_ids` that start again at 0; flash-attention's varlen kernels take the
same `cu_seqlens` as the loss.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mapo_kernels import LossSpec, mapo_loss_from_hidden, token_logprobs_from_hidden

spec = LossSpec(eps_low=0.2, eps_high=0.28, aggregation="seq-mean-token-mean")


def pack(prompts, answers):  # lists with the token ids [n] of each sequence
    masks = []
    for prompt, answer in zip(prompts, answers, strict=True):
        # Position t predicts token t + 1; the last one of a sequence predicts none of its own.
        predicted = torch.arange(1, len(prompt) + len(answer) + 1)
        masks.append((predicted >= len(prompt)) & (predicted < len(predicted)))
    lengths = torch.tensor([len(mask) for mask in masks])
    ids = torch.cat([part for pair in zip(prompts, answers, strict=True) for part in pair])
    return {
        "input_ids": ids,  # [total]
        "target_ids": ids.roll(-1),  # [total]
        "position_ids": torch.cat([torch.arange(len(mask)) for mask in masks]),  # [total]
        "mask": torch.cat(masks),  # [total]: True where the target is a token of an answer
        "cu_seqlens": torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),  # [B + 1]
    }


def hidden_of(model, batch):  # [total, H]
    ids, positions = batch["input_ids"][None], batch["position_ids"][None]
    # With a cache, which is the default, transformers would take all of it for one sequence.
    return model.model(ids, position_ids=positions, use_cache=False).last_hidden_state[0]


@torch.no_grad()
def score(model, batch):  # [total]: log-probs of the tokens of answers, 0 elsewhere
    hidden, head = hidden_of(model, batch), model.lm_head.weight
    return token_logprobs_from_hidden(hidden, head, batch["target_ids"], mask=batch["mask"])


def loss_of(model, batch):
    return mapo_loss_from_hidden(
        hidden_of(model, batch),
        model.lm_head.weight,
        batch["target_ids"],
        rewards=batch["rewards"],  # [B]: the answers to a prompt follow one another
        group_size=4,
        mask=batch["mask"],
        cu_seqlens=batch["cu_seqlens"],
        old_logprobs=batch["old_logprobs"],
        spec=spec,
    )


def main():
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    prompts = [torch.randint(0, 16, (2 + i // 4,)) for i in range(12)]
    answers = [torch.randint(0, 16, (1 + i % 5,)) for i in range(12)]
    batch = pack(prompts, answers)
    batch["rewards"] = torch.tensor([float(answer[0] < 8) for answer in answers])
    batch["old_logprobs"] = together = score(model, batch)
    alone = [score(model, pack([p], [a])) for p, a in zip(prompts, answers, strict=True)]
    print(f"largest difference from each alone: {(torch.cat(alone) - together).abs().max():.1e}")
    out = loss_of(model, batch)
    out.loss.backward()
    print(f"ratio {out.metrics['ratio_mean']:.3f}, loss {out.loss:.3f}")


if __name__ == "__main__":
    main()
