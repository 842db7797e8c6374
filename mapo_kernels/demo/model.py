"""A character-level decoder of about 0.1M parameters, and cached sampling from it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mapo_kernels import SamplingMask
from mapo_kernels.demo.tasks import Problem, Task

PAD, END = 0, 1  # ids of the special tokens
SPECIAL = "\0\n"  # their characters


class Characters:
    """A task's characters to token ids and back; prompts are padded left, answers right.

    Every prompt then ends, and every answer starts, at the same position. Padding is an ordinary
    token to the model: on the left it is learned to be ignored, on the right causality hides it.
    """

    def __init__(self, task: Task) -> None:
        """Number the characters after the two special tokens."""
        self._task, self._characters = task, SPECIAL + task.alphabet
        self.size = len(self._characters)
        self.length = task.answer_length + 1  # of answers, with the end token

    def prompts(self, problems: Iterable[Problem]) -> Tensor:
        """[B, P] token ids."""
        length = self._task.prompt_length
        return self._encode(x.prompt.rjust(length, SPECIAL[PAD]) for x in problems)

    def answers(self, problems: Iterable[Problem]) -> Tensor:
        """[B, T] token ids of the solutions, with the end token."""
        ended = (x.solution + SPECIAL[END] for x in problems)
        return self._encode(text.ljust(self.length, SPECIAL[PAD]) for text in ended)

    def _encode(self, texts: Iterable[str]) -> Tensor:
        return torch.tensor([[self._characters.index(x) for x in text] for text in texts])

    def decode(self, tokens: Tensor) -> list[str | None]:
        """The text before the end token; None where no end token came or padding came before it."""
        texts = ("".join(self._characters[token] for token in row) for row in tokens.tolist())
        parts = (text.partition(SPECIAL[END]) for text in texts)
        return [answer if end and SPECIAL[PAD] not in answer else None for answer, end, _ in parts]


class _Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """[B, S, width] -> the same shape; and keys and values so far, [2, B, heads, T, head]."""
        rows, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(rows, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, S, width / heads]
        if past is not None:
            k, v = torch.cat((past, torch.stack((k, v))), dim=3)
        # With a cache there is one query, the newest token, and it sees every key.
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=length > 1)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(rows, length, width))
        return x + self.mlp(x), torch.stack((k, v))


class Decoder(nn.Module):
    """A decoder-only transformer with learned positions."""

    def __init__(
        self, vocabulary: int, length: int, width: int = 64, layers: int = 2, heads: int = 4
    ) -> None:
        """For V = `vocabulary` tokens and sequences of up to `length`."""
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(
        self, tokens: Tensor, cache: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """[B, S] token ids -> logits [B, S, V] and the keys and values of every layer.

        With `cache`, `tokens` is [B, 1]: the token after those whose keys and values it has.
        """
        start = cache[0].shape[3] if cache else 0
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        x = self.token(tokens) + self.position(positions)
        new_cache = []
        for index, block in enumerate(self.blocks):
            x, keys_values = block(x, cache[index] if cache else None)
            new_cache.append(keys_values)
        return self.head(self.norm(x)), new_cache


@torch.no_grad()
def sample(
    model: Decoder,
    prompts: Tensor,
    max_tokens: int,
    *,
    top_p: float = 1.0,
    copies: int = 1,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Continue each prompt [Q, P] `copies` times: at temperature 1, or greedily with no generator.

    Returns:
        tokens: [B, T] for the B = Q * copies answers, those to a prompt together.
        mask: [B, T]. Tokens after the end token are padding and masked.
        logp: [B, T, V], of the distributions that were sampled from: -inf beyond the likeliest
            columns, whose probabilities add up to `top_p` or more.
    """
    logits, cache = model(prompts)
    logits = logits[:, -1].repeat_interleave(copies, dim=0)
    cache = [layer.repeat_interleave(copies, dim=1) for layer in cache]
    sampled: list[Tensor] = []
    distributions = []
    for _ in range(max_tokens):
        if sampled:
            logits, cache = model(sampled[-1], cache)
            logits = logits[:, -1]
        kept = SamplingMask.from_logits(logits, top_p=top_p)
        logp = _keep_only(logits, kept).log_softmax(dim=-1)
        distributions.append(logp)
        if generator is None:
            sampled.append(logp.argmax(dim=-1, keepdim=True))
        else:
            sampled.append(torch.multinomial(logp.exp(), 1, generator=generator))
    tokens = torch.cat(sampled, dim=1)
    is_end = (tokens == END).long()
    mask = is_end.cumsum(dim=1) == is_end  # up to the first end token
    return tokens.masked_fill(~mask, PAD), mask, torch.stack(distributions, dim=1)


def _keep_only(logits: Tensor, kept: SamplingMask) -> Tensor:
    """Logits [B, V], -inf at columns that are not kept."""
    row, column = torch.repeat_interleave(kept.counts), kept.token_ids.long()
    out = logits.masked_fill((kept.counts > 0)[:, None], -torch.inf)
    out[row, column] = logits[row, column]
    return out


def answer_logits(model: Decoder, prompts: Tensor, answers: Tensor) -> Tensor:
    """Logits [B, T, V] that predict the tokens of `answers` [B, T] after `prompts` [B, P]."""
    logits, _ = model(torch.cat((prompts, answers[:, :-1]), dim=1))
    return logits[:, prompts.shape[1] - 1 :]
