"""One rank of a run whose samples depend on their place in the global batch, not on the rank."""

import json
import sys

import torch
from trl_support import LETTERS, new_config, new_model, new_tokenizer, prompts

from mapo_kernels.integrations.trl import MAPOTrainer

GROUP = 4
# Rewards without signal for prompts that begin with these: the first two groups of each batch.
SILENT = "abdegh"


def roll_out(texts, trainer):
    """Real samples of the current model, row by row, seeded by the row's place over all ranks."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    first = trainer.accelerator.process_index * len(texts)
    found = {"prompt_ids": [], "completion_ids": [], "logprobs": []}
    for row, text in enumerate(texts, first):
        ids = trainer._tokenizer(text)["input_ids"]
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 * trainer.state.global_step + row)
            whole = model.generate(
                torch.tensor([ids]), do_sample=True, max_new_tokens=6, pad_token_id=0
            )
        completion = whole[0, len(ids) :].tolist()
        found["prompt_ids"].append(ids)
        found["completion_ids"].append(completion)
        found["logprobs"].append([0.0] * len(completion))
    return found


def reward(prompts, completions, **_):
    return [
        0.0 if prompt[0] in SILENT else sum(text.count(x) for x in LETTERS[:8]) / 6
        for prompt, text in zip(prompts, completions, strict=True)
    ]


def main(out, options):
    seen = []
    options = json.loads(options)
    trainer = MAPOTrainer(
        model=new_model(),
        reward_funcs=reward,
        args=new_config(
            out,
            optim="sgd",
            learning_rate=0.3,
            max_steps=3,
            shuffle_dataset=False,
            success_threshold=0.5,
            ddp_find_unused_parameters=False,
            **options,
        ),
        train_dataset=prompts(9),
        processing_class=new_tokenizer(),
        rollout_func=roll_out,
    )
    trainer.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: (
            seen.append(kwargs["input_ids"].shape[0]) if torch.is_grad_enabled() else None
        ),
        with_kwargs=True,
    )
    trainer.train()
    rank = trainer.accelerator.process_index
    result = {
        "weights": trainer.accelerator.unwrap_model(trainer.model).state_dict(),
        "forward_rows": seen,
        "log": trainer.state.log_history,
        "world": trainer.accelerator.num_processes,
    }
    torch.save(result, f"{out}/rank{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
