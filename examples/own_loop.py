"""A loop of your own, with prompts of any length: `python examples/own_loop.py left` (or `right`).

Rollouts are lists of token ids, as inference engines return them, and are padded on that side.
A tiny Llama learns to begin its answers with one of four tokens.
"""

import sys

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

from mapo_kernels import LossSpec, mapo_loss_from_logits, token_logprobs

spec = LossSpec(eps_low=0.2, eps_high=0.28, aggregation="token-mean")


def logits_of(model, batch):  # [B, S - 1, V]: position t predicts token t + 1
    # Without attention_mask tokens attend to padding: every log-prob is off. Models with learned
    # positions (GPT-2) also need these, which count real tokens, where padding is on the left.
    ids, attended = batch["input_ids"], batch["attention_mask"]
    positions = (attended.cumsum(1) - 1).clamp(min=0)
    return model(ids, attention_mask=attended, position_ids=positions).logits[:, :-1]


@torch.no_grad()
def score(model, batch):  # [B, S - 1]: old (or reference) log-probs
    return token_logprobs(logits_of(model, batch), batch["input_ids"][:, 1:], mask=batch["mask"])


def training_step(model, optimizer, batch):
    out = mapo_loss_from_logits(
        logits_of(model, batch),  # float32, bfloat16 or float16
        batch["input_ids"][:, 1:],
        rewards=batch["rewards"],  # [B]: the answers to a prompt follow one another
        group_size=8,
        mask=batch["mask"],  # [B, S - 1]: True for the tokens of answers
        old_logprobs=batch["old_logprobs"],
        spec=spec,
    )
    optimizer.zero_grad()
    out.loss.backward()
    optimizer.step()
    return out.metrics


def batch_of(prompts, answers, side):  # lists with the token ids [n] of each sequence
    ids = [torch.cat(pair) for pair in zip(prompts, answers, strict=True)]
    mask = [torch.arange(1, len(x)) >= len(p) for x, p in zip(ids, prompts, strict=True)]
    rows = {"input_ids": ids, "attention_mask": [torch.ones_like(x) for x in ids], "mask": mask}
    return {k: pad_sequence(x, batch_first=True, padding_side=side) for k, x in rows.items()}


def sample(model, prompts):  # answers up to their end token, 0
    inputs = batch_of(prompts, [x[:0] for x in prompts], "left")
    del inputs["mask"]
    ids = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=4, pad_token_id=0)
    answers = ids[:, inputs["input_ids"].shape[1] :]
    return [row[: int((row != 0).cumprod(0).sum()) + 1] for row in answers]


def main(side):
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, eos_token_id=0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(20):
        prompts = [x for i in range(8) for x in 8 * [torch.randint(1, 16, (2 + i % 3,))]]
        answers = sample(model, prompts)
        batch = batch_of(prompts, answers, side)
        batch["rewards"] = torch.tensor([float(0 < answer[0] < 5) for answer in answers])
        batch["old_logprobs"] = score(model, batch)
        for _ in range(2):
            training_step(model, optimizer, batch)
        print(f"step {step}: reward {batch['rewards'].mean():.2f}")


if __name__ == "__main__":
    main(sys.argv[1])
