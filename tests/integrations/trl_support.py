"""Tiny trainers for the TRL tests: random models, tokenizers and data, all made in code."""

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from mapo_kernels.integrations.trl import MAPOConfig, MAPOTrainer

LETTERS = "abcdefghijklmnop"


def new_tokenizer():
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *LETTERS])}
    raw = Tokenizer(WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )


def new_model(family="Qwen2", seed=0, **changes):
    sizes = {
        "vocab_size": 19,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**{**sizes, **changes})
    return transformers.AutoModelForCausalLM.from_config(config)


def share_of_a(completions, **_):
    """A shaped reward in [0, 1]."""
    return [text.count("a") / max(len(text), 1) for text in completions]


def starts_with_a(completions, **_):
    """A verifiable reward, 0 or 1."""
    return [float(text.startswith("a")) for text in completions]


def prompts(n=32):
    return Dataset.from_dict({"prompt": [LETTERS[i % 9 : i % 9 + 1 + i % 4] for i in range(n)]})


def vars_of_a_tiny_run(tmp_path):
    return {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "learning_rate": 0.0,
        "max_steps": 2,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "bf16": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }


def new_config(tmp_path, **changes):
    return MAPOConfig(**{**vars_of_a_tiny_run(tmp_path), **changes})


def new_trainer(tmp_path, *, model=None, rewards=starts_with_a, trainer=MAPOTrainer, **changes):
    extra = {key: changes.pop(key) for key in ("peft_config", "eval_dataset") if key in changes}
    return trainer(
        model=new_model() if model is None else model,
        reward_funcs=rewards,
        args=new_config(tmp_path, **changes),
        train_dataset=prompts(),
        processing_class=new_tokenizer(),
        **extra,
    )


def new_batch(trainer, n_sequences=8, *, old=False, ref=False, drift=0.3, seed=1):
    """A scored batch as `_generate_and_score_completions` returns it, some advantages 0."""
    generator = torch.Generator().manual_seed(seed)
    n_prompt, n_completion = 5, 6

    def ids(*shape):
        return torch.randint(3, 19, shape, generator=generator)

    lengths = torch.randint(1, n_completion + 1, (n_sequences, 1), generator=generator)
    mask = (torch.arange(n_completion) < lengths).long()
    prompt_mask = (torch.arange(n_prompt) >= torch.arange(n_sequences)[:, None] % 3).long()
    advantages = torch.randn(n_sequences, generator=generator)
    advantages[::4] = 0.0
    batch = {
        "prompt_ids": ids(n_sequences, n_prompt) * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": ids(n_sequences, n_completion) * mask,
        "completion_mask": mask,
        "advantages": advantages,
        "num_items_in_batch": mask.sum() * 2,
    }
    with torch.no_grad():
        logps, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
            torch.cat([batch["prompt_mask"], mask], 1),
            n_completion,
        )
    for name, wanted in (("old_per_token_logps", old), ("ref_per_token_logps", ref)):
        if wanted:
            noise = torch.randn(logps.shape, generator=generator).to(logps)
            batch[name] = logps + drift * noise
    return batch


def loss_and_gradients(trainer, compute, batch):
    trainer.model.zero_grad()
    trainer.model.train()
    loss = compute(trainer.model, batch)
    loss.backward()
    grads = {
        name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None
    }
    return float(loss.detach()), grads


def norm(grads):
    """Euclidean norm over all parameters together."""
    return sum(float(grad.double().square().sum()) for grad in grads.values()) ** 0.5


def relative_gap(grads, expected):
    """|difference| / |expected| over all parameters together."""
    assert grads.keys() == expected.keys()
    return norm({name: grads[name] - expected[name] for name in grads}) / max(norm(expected), 1e-30)
