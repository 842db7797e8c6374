"""MAPO in TRL: a dataset, a reward function, and `MAPOTrainer` in place of `GRPOTrainer`.

`python examples/trl_quickstart.py` (needs `trl`): a tiny Qwen2, whose tokenizer knows a token per
letter, learns to answer with the letter that comes next. Takes half a minute on a CPU.
"""

import tempfile

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from mapo_kernels.integrations.trl import MAPOConfig, MAPOTrainer


def correct(completions, answer, **_):  # `answer` is a column of the dataset
    return [float(text.startswith(x)) for text, x in zip(completions, answer, strict=True)]


def train(model, tokenizer, dataset, **options):  # options of TRL's GRPOConfig
    args = MAPOConfig(success_reward="correct", drop_zero_signal=True, **options)
    trainer = MAPOTrainer(model, [correct], args, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    return trainer


LETTERS = "abcdefgh"


def tiny_tokenizer():
    words = {word: i for i, word in enumerate(["<pad>", "<end>", *LETTERS])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    names = {"pad_token": "<pad>", "eos_token": "<end>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, padding_side="left", **names)


def tiny_model(tokenizer):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    rest = {"vocab_size": len(tokenizer), "bos_token_id": None, "initializer_range": 0.1}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, **ids, **rest))


def main(steps=60):
    rows = [{"prompt": x, "answer": y} for x, y in zip(LETTERS, LETTERS[1:] + "a", strict=True)]
    tokenizer = tiny_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        trainer = train(
            tiny_model(tokenizer),
            tokenizer,
            Dataset.from_list(rows * 64),
            output_dir=folder,
            num_generations=8,  # answers per prompt
            per_device_train_batch_size=64,
            max_completion_length=4,
            learning_rate=0.02,
            lr_scheduler_type="constant",
            max_steps=steps,
            logging_steps=5,
            save_strategy="no",
            report_to=[],
            bf16=False,
            gradient_checkpointing=False,
        )
    return [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]


if __name__ == "__main__":
    print("mean reward:", *(f"{reward:.2f}" for reward in main()))
