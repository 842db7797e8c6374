"""LoRA through peft, with a KL term to the model without its adapters.

`python examples/lora.py` (needs `peft`): only the adapters of a tiny Llama learn to begin answers
with one of four tokens. The frozen head costs no product for a gradient of its own.
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from mapo_kernels import LossSpec, MapoLinearLoss, token_logprobs_from_hidden

spec = LossSpec(eps_low=0.2, eps_high=0.28, beta=0.04, aggregation="token-mean")


def hidden_of(model, batch):  # [B, S - 1, H]
    # The base model's layers hold the adapters, and its .model is the decoder: peft's own
    # `model.model` is the whole causal LM.
    decoder = model.get_base_model().model
    ids, attended = batch["input_ids"], batch["attention_mask"]
    return decoder(ids, attention_mask=attended).last_hidden_state[:, :-1]


@torch.no_grad()
def score(model, batch):  # [B, S - 1]: log-probs of the answers
    head = model.get_base_model().lm_head.weight
    ids = batch["input_ids"][:, 1:]
    return token_logprobs_from_hidden(hidden_of(model, batch), head, ids, mask=batch["mask"])


def training_step(model, optimizer, batch):
    # Keep adapters off lm_head: its weight would not be lm_head.weight, and this raises an error.
    loss_of = MapoLinearLoss(model.get_base_model().lm_head, spec)
    out = loss_of(
        hidden_of(model, batch),
        batch["input_ids"][:, 1:],
        rewards=batch["rewards"],  # [B]: the answers to a prompt follow one another
        group_size=8,
        mask=batch["mask"],  # [B, S - 1]: True for the tokens of answers
        old_logprobs=batch["old_logprobs"],
        ref_logprobs=batch["ref_logprobs"],
    )
    optimizer.zero_grad()
    out.loss.backward()
    optimizer.step()
    return out.metrics


def main():
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    options = {"num_attention_heads": 2, "initializer_range": 0.2, "eos_token_id": None}
    base = LlamaForCausalLM(LlamaConfig(**sizes, **options))
    adapters = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, adapters)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(20):
        prompts = torch.randint(0, 16, (8, 3)).repeat_interleave(8, 0)
        inputs = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts)}
        ids = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=4)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        batch["mask"] = (torch.arange(1, ids.shape[1]) >= 3).expand(len(ids), -1)
        batch["rewards"] = (ids[:, 3] < 4).float()
        batch["old_logprobs"] = score(model, batch)
        with model.disable_adapter():
            batch["ref_logprobs"] = score(model, batch)
        metrics = [training_step(model, optimizer, batch) for _ in range(2)][-1]
        reward, kl = batch["rewards"].mean(), metrics["ref_kl"]
        print(f"step {step}: reward {reward:.2f}, KL to the model without adapters {kl:.3f}")


if __name__ == "__main__":
    main()
