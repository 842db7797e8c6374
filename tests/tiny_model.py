"""A tiny model with the shape of a causal LM of Hugging Face, and batches for it."""

from types import SimpleNamespace

import torch


class TinyDecoder(torch.nn.Module):
    """Each position sees the mean of the attended embeddings so far."""

    def __init__(self, table):
        super().__init__()
        self.table = table
        self.mix = torch.nn.Linear(11, 11)

    def forward(self, input_ids, attention_mask):
        seen = attention_mask[..., None].float()
        sums = (self.table(input_ids) * seen).cumsum(1)
        hidden = self.mix(sums / seen.cumsum(1).clamp(min=1)).tanh()
        return SimpleNamespace(last_hidden_state=hidden)


class TinyModel(torch.nn.Module):
    """The shape of a causal LM of Hugging Face."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(11, 11)
        self.model = TinyDecoder(self.table)
        self.lm_head = torch.nn.Linear(11, 11, bias=False)

    def forward(self, input_ids, attention_mask):
        hidden = self.model(input_ids, attention_mask).last_hidden_state
        return SimpleNamespace(logits=self.lm_head(hidden))


def batch_for(length=5, n_sequences=16, prompt=4):
    """Prompts of 1 to `prompt` tokens, padded on the left; completions padded on the right."""
    ids = torch.randint(0, 11, (n_sequences, prompt + length))
    starts = torch.randint(0, prompt, (n_sequences, 1))
    mask = torch.arange(length) < torch.randint(1, length + 1, (n_sequences, 1))
    logp = -torch.rand(n_sequences, length)
    return {
        "input_ids": ids,
        "attention_mask": torch.cat([torch.arange(prompt) >= starts, mask], 1).long(),
        "completion_ids": ids[:, -length:],
        "mask": mask,
        "rewards": (torch.rand(n_sequences) < 0.5).float(),
        "old_logprobs": logp,
        "ref_logprobs": logp - 0.1,
    }
