"""The snippets of docs/own_loop.md run and learn."""

import own_loop
import pytest
import torch
from own_loop import BLOCKS, TinyModel, batch_for, scope_of


def tiny_transformer(family, vocab=61):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"vocab_size": vocab, "hidden_size": 16, "intermediate_size": 32}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    sizes |= {"num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": None}
    config = getattr(transformers, f"{family}Config")(**sizes)
    return getattr(transformers, f"{family}ForCausalLM")(config)


def test_the_trainer_example_trains():
    scope = scope_of(0)
    model, batch = TinyModel(), batch_for()
    scored = scope["score"](model, batch)
    assert scored.shape == (16, 5) and not scored.requires_grad
    metrics = scope["training_step"](model, batch)
    assert model.table.weight.grad.abs().sum() > 0
    assert metrics["ref_kl"] > 0


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_the_hugging_face_example_trains(family):
    model = tiny_transformer(family)
    scope = scope_of(1)
    batch = own_loop.for_all_positions(batch_for())
    batch["old_logprobs"] = scope["score_from_hidden"](model, batch)
    metrics = scope["step_from_hidden"](scope["Policy"](model), batch)
    assert metrics["ratio_max"] == 1 and metrics["active_tokens"] == batch["mask"].sum()
    grads = [p.grad.clone() for p in model.parameters()]
    assert sum(float(grad.abs().sum()) for grad in grads) > 0
    # The same from full logits.
    import mapo_kernels as mk

    model.zero_grad()
    mk.mapo_loss_from_logits(
        model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1],
        batch["input_ids"][:, 1:],
        rewards=batch["rewards"],
        group_size=8,
        mask=batch["mask"],
        old_logprobs=batch["old_logprobs"],
        spec=scope["spec"],
    ).loss.backward()
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_padded_prompts_score_as_each_alone(family):
    model = tiny_transformer(family)
    with torch.no_grad():  # far from uniform, so that what is attended to matters
        for parameter in model.parameters():
            parameter.mul_(6)
    batch = batch_for(prompt=9)
    assert not batch["attention_mask"].all()
    length = batch["mask"].shape[1]
    for block, name in ((0, "score"), (1, "score_from_hidden")):
        scope = scope_of(block)
        whole = batch if block == 0 else own_loop.for_all_positions(batch)
        together = scope[name](model, whole)[:, -length:]
        for row in range(len(together)):
            alone = own_loop.without_padding(batch, row)
            alone = alone if block == 0 else own_loop.for_all_positions(alone)
            expected = scope[name](model, alone)[0, -length:]
            torch.testing.assert_close(together[row], expected, rtol=0, atol=2e-5)


def test_a_plain_loop_with_the_hugging_face_example_learns():
    model = tiny_transformer("Llama", vocab=13)
    scope = scope_of(1)
    policy = scope["Policy"](model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    history = []
    for _ in range(30):
        prompts = torch.randint(1, 13, (8, 3)).repeat_interleave(8, 0)
        with torch.no_grad():
            ids = model.generate(prompts, do_sample=True, max_new_tokens=4, pad_token_id=0)
        batch = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "rewards": (ids[:, 3] <= 2).float(),
            "mask": (torch.arange(ids.shape[1] - 1) >= 2).expand(len(ids), -1),
        }
        batch["old_logprobs"] = scope["score_from_hidden"](model, batch)
        for _ in range(2):
            optimizer.zero_grad()
            scope["step_from_hidden"](policy, batch)
            optimizer.step()
        history.append(float(batch["rewards"].mean()))
    assert max(history[:3]) < 0.4 and min(history[-3:]) > 0.8, history


def test_the_plan_example_accumulates():
    import mapo_kernels as mk

    batch = batch_for(n_sequences=32)
    logp = batch["old_logprobs"].clone().requires_grad_()
    scope = {
        "torch": torch,
        "mapo_loss": mk.mapo_loss,
        "make_plan": mk.make_plan,
        "rewards": batch["rewards"],
        "mask": batch["mask"],
        "old": batch["old_logprobs"],
        "spec": mk.LossSpec(),
        "logprobs_of": lambda rows: logp[rows],
    }
    exec(BLOCKS[2], scope)
    again = batch["old_logprobs"].clone().requires_grad_()
    whole = mk.mapo_loss(
        again, rewards=batch["rewards"], group_size=8, mask=batch["mask"], old_logprobs=scope["old"]
    )
    whole.loss.backward()
    torch.testing.assert_close(logp.grad, again.grad)
