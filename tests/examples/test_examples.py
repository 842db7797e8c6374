"""Each file of examples/ runs and does what it says; those of trainers in their environments."""

import re
import subprocess
import sys

import pytest
import torch
from example_files import FOLDER, Nothing, batch_of, gradients, load, rollouts, tiny_model

import mapo_kernels as mk

pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(autouse=True)
def _default_device():
    yield
    torch.set_default_device(None)


def printed(capsys, pattern):
    """The numbers of all printed lines that match."""
    return [float(x) for x in re.findall(pattern, capsys.readouterr().out)]


def log_probs(model, prompt, answer):
    """Of one sequence without padding, by torch alone."""
    ids = torch.cat((prompt, answer))[None]
    with torch.no_grad():
        logps = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logps.gather(1, answer[:, None])[:, 0]


def test_examples_are_short():
    """But for the demo of `make demo-trl`, which is no example to copy."""
    for path in {*FOLDER.glob("*.py")} - {FOLDER / "trl_demo.py"}:
        assert len(path.read_text().splitlines()) < 80, path


@pytest.mark.parametrize("side", ("left", "right"))
def test_own_loop_learns(side, capsys):
    load("own_loop").main(side)
    rewards = printed(capsys, r"reward ([\d.]+)")
    assert rewards[0] < 0.5 and min(rewards[-3:]) > 0.9


@pytest.mark.parametrize("side", ("left", "right"))
@pytest.mark.parametrize("family", ("Llama", "Qwen3", "GPT2"))
def test_padded_sequences_score_as_each_alone(family, side):
    example, model = load("own_loop"), tiny_model(family)
    prompts, answers = rollouts()
    batch = example.batch_of(prompts, answers, side)
    exact = torch.cat([log_probs(model, *pair) for pair in zip(prompts, answers, strict=True)])

    def error():
        return float((example.score(model, batch)[batch["mask"]] - exact).abs().max())

    assert error() < 2e-5
    if side == "left":  # on the right, causal attention sees no padding
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
        assert error() > 0.1


def test_learned_positions_count_real_tokens():
    example, model = load("own_loop"), tiny_model("GPT2")
    batch = example.batch_of(*rollouts(), "left")
    exact = example.score(model, batch)

    def without(ids, attention_mask, position_ids):
        return model(ids, attention_mask=attention_mask)

    assert (example.score(without, batch) - exact).abs().max() > 0.1


def test_either_side_has_the_same_gradients():
    example, pairs, found = load("own_loop"), rollouts(), []
    old = torch.rand(16, 5) - 3
    for side in ("left", "right"):
        batch, model = batch_of(*pairs, side), tiny_model(scale=2.0)
        counts = batch["mask"].sum(1)
        batch["old_logprobs"][batch["mask"]] = torch.cat(
            [row[:n] for row, n in zip(old, counts.tolist(), strict=True)]
        )
        example.training_step(model, Nothing(), batch)
        found.append(gradients(model))
    assert all(grad.abs().sum() > 0 for grad in found[0].values())
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], rtol=1e-4, atol=1e-6)


def test_accumulation(capsys):
    load("accumulation").main()
    text = capsys.readouterr().out
    skipped, error = re.match(r"(\d+) of 32 sequences skipped; .* (\S+)\n", text).groups()
    assert int(skipped) >= 8 and float(error) < 1e-5


def test_lora_learns(capsys):
    pytest.importorskip("peft", reason="peft is not installed")
    load("lora").main()
    rewards = printed(capsys, r"reward ([\d.]+)")
    assert rewards[0] < 0.6 and min(rewards[-3:]) > 0.75


def test_lora_gradients_are_those_of_the_whole_model():
    """By the model's own logits, and for adapters alone."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    example, batch = load("lora"), batch_of(*rollouts())
    adapters = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(tiny_model(scale=2.0), adapters)
    with model.disable_adapter():
        batch["ref_logprobs"] = example.score(model, batch)
    example.training_step(model, Nothing(), batch)
    found = gradients(model)
    assert found and all("lora_" in name for name in found)
    model.zero_grad()
    inputs = {name: batch.pop(name) for name in ("input_ids", "attention_mask")}
    logits, targets = model(**inputs).logits[:, :-1], inputs["input_ids"][:, 1:]
    out = mk.mapo_loss_from_logits(logits, targets, group_size=8, spec=example.spec, **batch)
    out.loss.backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6)
    assert out.metrics["ref_kl"] > 0


def test_packed(capsys):
    load("packed").main()
    assert max(printed(capsys, r"alone: (\S+)")) < 1e-5


def test_packed_gradients_are_those_of_padded_sequences():
    example, pairs, model = load("packed"), rollouts(), tiny_model(scale=2.0)
    padded, packed = batch_of(*pairs, "right"), example.pack(*pairs)
    packed["rewards"] = padded["rewards"]
    packed["old_logprobs"] = torch.zeros(len(packed["mask"]))
    packed["old_logprobs"][packed["mask"]] = padded["old_logprobs"][padded["mask"]]
    example.loss_of(model, packed).loss.backward()
    found = gradients(model)
    model.zero_grad()
    inputs = {name: padded.pop(name) for name in ("input_ids", "attention_mask")}
    logits, targets = model(**inputs).logits[:, :-1], inputs["input_ids"][:, 1:]
    mk.mapo_loss_from_logits(
        logits, targets, group_size=4, spec=example.spec, **padded
    ).loss.backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6)


def test_sampling_masks(capsys):
    load("sampling_masks").main()
    text = capsys.readouterr().out
    assert "ratio with the mask 1.000" in text
    assert 0.75 < float(re.findall(r"without it ([\d.]+)", text)[0]) < 0.95


# tests/distributed/test_examples_on_ranks.py has their modules on two ranks.
@pytest.mark.slow
@pytest.mark.parametrize("name", ("ddp", "fsdp2"))
def test_torchrun(name):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, FOLDER / f"{name}.py"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    if name == "ddp":
        success = [float(x) for x in re.findall(r"success ([\d.]+)", done.stdout)]
        assert len(success) == 20 and success[0] < 0.5 and min(success[-3:]) > 0.85
    else:
        found = re.findall(r"rank (\d): ratios up to 1\.\d+", done.stdout)
        assert sorted(found) == ["0", "1"]
