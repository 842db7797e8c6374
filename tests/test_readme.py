"""The README's code runs, and its numbers are those of the committed result files."""

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import report, results

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


class TinyModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(11, 11)

    def forward(self, input_ids):
        from types import SimpleNamespace

        return SimpleNamespace(logits=self.table(input_ids))


def batch_for(length=5, n_sequences=16):
    ids = torch.randint(0, 11, (n_sequences, 3 + length))
    logp = -torch.rand(n_sequences, length)
    return {
        "input_ids": ids,
        "completion_ids": ids[:, -length:],
        "mask": torch.rand(n_sequences, length) < 0.8,
        "rewards": (torch.rand(n_sequences) < 0.5).float(),
        "old_logprobs": logp,
        "ref_logprobs": logp - 0.1,
    }


def test_the_trainer_example_trains():
    scope = {}
    exec(BLOCKS[0], scope)
    model = TinyModel()
    scored = scope["score"](model, batch_for())
    assert scored.shape == (16, 5) and not scored.requires_grad
    metrics = scope["training_step"](model, batch_for())
    assert model.table.weight.grad.abs().sum() > 0
    assert metrics["ref_kl"] > 0


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_the_hugging_face_example_trains(family):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    scope = {}
    exec(BLOCKS[1], scope)
    ids = torch.randint(0, 61, (16, 9))
    mask = torch.arange(8).expand(16, 8) >= torch.randint(2, 5, (16, 1))
    rewards = (torch.rand(16) < 0.5).float()
    old = scope["score_from_hidden"](model, ids, mask)
    metrics = scope["step_from_hidden"](model, ids, mask, rewards, old)
    assert metrics["ratio_max"] == 1 and metrics["active_tokens"] == mask.sum()
    grads = [p.grad.clone() for p in model.parameters()]
    assert sum(float(grad.abs().sum()) for grad in grads) > 0
    # The same from full logits.
    import mapo_kernels as mk

    model.zero_grad()
    mk.mapo_loss_from_logits(
        model(input_ids=ids).logits[:, :-1],
        ids[:, 1:],
        rewards=rewards,
        group_size=8,
        mask=mask,
        old_logprobs=old,
        spec=scope["spec"],
    ).loss.backward()
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-7)


def test_a_plain_loop_with_the_hugging_face_example_learns():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"vocab_size": 13, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = transformers.LlamaConfig(**sizes, bos_token_id=0, eos_token_id=None)
    model = transformers.LlamaForCausalLM(config)
    scope = {}
    exec(BLOCKS[1], scope)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    history = []
    for _ in range(30):
        prompts = torch.randint(1, 13, (8, 3)).repeat_interleave(8, 0)
        with torch.no_grad():
            ids = model.generate(prompts, do_sample=True, max_new_tokens=4, pad_token_id=0)
        rewards = (ids[:, 3] <= 2).float()
        mask = (torch.arange(ids.shape[1] - 1) >= 2).expand(len(ids), -1)
        old = scope["score_from_hidden"](model, ids, mask)
        for _ in range(2):
            optimizer.zero_grad()
            scope["step_from_hidden"](model, ids, mask, rewards, old)
            optimizer.step()
        history.append(float(rewards.mean()))
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


@pytest.mark.parametrize("name", re.findall(r"<!-- (\w+): begin -->", README))
def test_the_benchmark_tables_are_those_of_the_result_files(name):
    found = results.read(ROOT / f"benchmarks/results/{name}.json")
    assert report.insert(README, name, report.markdown(found)) == README


def test_the_demo_table_is_that_of_the_result_file():
    log = json.loads((ROOT / "benchmarks/results/demo_number_sorting_3_seeds.json").read_text())
    for estimator in ("mapo", "grpo"):
        runs = [run for run in log["runs"] if run["phase"] == estimator]
        before, after = (
            [
                run["evals"][at]["success_sampled"]
                for run in sorted(runs, key=lambda run: run["seed"])
            ]
            for at in (0, -1)
        )
        row = next(
            line for line in README.splitlines() if line.startswith(f"| {estimator.upper()}")
        )
        expected = [f"{x:.2f}" for x in before + after] + [f"{sum(after) / len(after):.3f}"]
        assert re.findall(r"\d\.\d+", row) == expected


def test_what_dropping_saves_is_what_the_result_file_says():
    result = json.loads((ROOT / "benchmarks/results/trl_zero_signal.json").read_text())
    whole, dropping = result["runs"]
    for name, run in (("every sequence", whole), ("`drop_zero_signal`", dropping)):
        cells = [
            f"{run['groups_without_signal']:.0%}",
            f"{run['model_seconds']:.1f}",
            f"{run['preparing_seconds']:.1f}",
            f"{run['success_before_and_after'][-1]:.3f}",
        ]
        assert f"| {name} | {' | '.join(cells)} |" in README
    saved = 1 - dropping["model_seconds"] / whole["model_seconds"]
    assert f"{saved:.0%} of forward and backward saved" in README


def test_files_that_the_readme_names_exist():
    for name in re.findall(
        r"\]\((docs/[^)]+)\)|`((?:benchmarks|tests|mapo_kernels)/[\w/.]+)`", README
    ):
        assert (ROOT / (name[0] or name[1])).exists(), name
