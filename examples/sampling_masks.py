"""Top-p sampling: the loss replays which columns each token was sampled from.

`python examples/sampling_masks.py`: before any update the ratio of new to old policy is exactly 1
with the mask. Without it the sampler's log-probs are those of what top-p left, the model's those of
the whole vocabulary: the ratio is off before the first step.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mapo_kernels import LossSpec, SamplingMask, mapo_loss_from_hidden, token_logprobs_from_hidden

TOP_P, N_TOKENS = 0.8, 4
spec = LossSpec(eps_low=0.2, eps_high=0.28, aggregation="token-mean")


def sample(model, prompts):
    out = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        top_k=0,
        top_p=TOP_P,
        max_new_tokens=N_TOKENS,
        output_scores=True,
        return_dict_in_generate=True,
    )
    scores = torch.stack(out.scores, dim=1)  # [B, T, V]: -inf in columns that top-p cut off
    answers = out.sequences[:, prompts.shape[1] :]
    sampled = scores.log_softmax(-1).gather(2, answers[..., None])[..., 0]  # [B, T]
    return {
        "input_ids": out.sequences,
        "answers": answers,  # [B, T]
        "sampling_mask": SamplingMask.from_logits(scores),  # of B * T tokens
        "sampler_logprobs": sampled,
    }


def hidden_of(model, batch):  # [B, T, H]: position t predicts answer token t
    hidden = model.model(batch["input_ids"]).last_hidden_state
    return hidden[:, -N_TOKENS - 1 : -1]


@torch.no_grad()
def score(model, batch):  # [B, T]: log-probs over the columns that were kept
    head, mask = model.lm_head.weight, batch["sampling_mask"]
    hidden, answers = hidden_of(model, batch), batch["answers"]
    return token_logprobs_from_hidden(hidden, head, answers, sampling_mask=mask)


def loss_of(model, batch, old_logprobs, sampling_mask):
    return mapo_loss_from_hidden(
        hidden_of(model, batch),
        model.lm_head.weight,
        batch["answers"],
        rewards=batch["rewards"],  # [B]: the answers to a prompt follow one another
        group_size=8,
        mask=torch.ones_like(batch["answers"]),
        old_logprobs=old_logprobs,
        sampling_mask=sampling_mask,
        spec=spec,
    )


def main():
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, eos_token_id=None))
    batch = sample(model, torch.randint(0, 16, (8, 3)).repeat_interleave(8, 0))
    batch["rewards"] = (batch["answers"][:, 0] < 8).float()
    replayed = loss_of(model, batch, score(model, batch), batch["sampling_mask"])
    biased = loss_of(model, batch, batch["sampler_logprobs"], None)
    replayed.loss.backward()
    print(f"ratio with the mask {replayed.metrics['ratio_mean']:.3f}")
    print(f"ratio without it {biased.metrics['ratio_mean']:.3f}")


if __name__ == "__main__":
    main()
