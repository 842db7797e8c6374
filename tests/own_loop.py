"""The snippets of docs/own_loop.md: a model and batches for them, and what ranks do with them."""

import re
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

PAGE = (Path(__file__).parents[1] / "docs/own_loop.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)
GROUP_SIZE = 8


def scope_of(block):
    """What a snippet defines."""
    scope = {}
    exec(BLOCKS[block], scope)
    return scope


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


def for_all_positions(batch):
    """The batch with its token tensors [B, S - 1]: over all positions but the last."""
    before = batch["input_ids"].shape[1] - 1 - batch["mask"].shape[1]
    wide = {
        name: torch.nn.functional.pad(batch[name], (before, 0)) for name in ("mask", "old_logprobs")
    }
    return batch | wide


def without_padding(batch, row):
    """One sequence of a batch with nothing before its prompt."""
    start = int(batch["attention_mask"][row].argmax())
    alone = {name: x[row : row + 1] for name, x in batch.items()}
    return alone | {name: alone[name][:, start:] for name in ("input_ids", "attention_mask")}


def _check(block, wrap, step, prepare):
    """Ranks with a half of the batch each and DDP end with the gradients of one process."""
    torch.manual_seed(0)
    scope = scope_of(block)
    batch, model = prepare(batch_for(n_sequences=4 * GROUP_SIZE)), TinyModel()
    scope[step](wrap(scope, model), batch)
    expected = [p.grad.clone() for p in model.parameters()]
    assert all(grad.abs().sum() > 0 for grad in expected)

    model.zero_grad()
    n_rows = len(batch["rewards"]) // dist.get_world_size()
    rows = slice(dist.get_rank() * n_rows, (dist.get_rank() + 1) * n_rows)
    own = {name: x[rows] for name, x in batch.items()}
    tokens = torch.tensor([float(own["mask"].sum())])
    other = tokens.clone()
    dist.all_reduce(other)
    assert other != dist.get_world_size() * tokens  # denominators of ranks differ
    ranks = {"process_group": dist.group.WORLD, "normalizer": "global"}
    ddp = torch.nn.parallel.DistributedDataParallel(wrap(scope, model))
    scope[step](ddp, own, **ranks)
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-5, atol=1e-7)
        every = [torch.empty_like(grad) for _ in range(dist.get_world_size())]
        dist.all_gather(every, parameter.grad)
        assert all(torch.equal(x, parameter.grad) for x in every)


def check_logits():
    _check(0, lambda scope, model: model, "training_step", lambda batch: batch)


def check_hidden_states():
    _check(1, lambda scope, model: scope["Policy"](model), "step_from_hidden", for_all_positions)
