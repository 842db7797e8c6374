"""Hooks of trainers that are not installed: the documented calls on objects of their shapes.

And verl's plugin, loaded by a package that stands for verl.
"""

import importlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import mapo_kernels as mk

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings the same under another name
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs/integrations.md").read_text()


def documented(trainer, language):
    """The code blocks of one trainer's section."""
    section = re.search(rf"\n## {trainer}\n(.*?)(?=\n## |\Z)", DOCS, re.S).group(1)
    return re.findall(rf"```{language}\n(.*?)```", section, re.S)


def imported(path):
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


@pytest.fixture
def install(monkeypatch):
    """Puts modules of these names and contents, and the packages above them, in sys.modules."""

    def put(name, **contents):
        parts = name.split(".")
        for i in range(1, len(parts)):
            package = ModuleType(".".join(parts[:i]))
            package.__path__ = []
            monkeypatch.setitem(sys.modules, package.__name__, package)
        module = ModuleType(name)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)

    return put


def clipped(logp, old, advantage, low=0.2, high=0.2, cap=None):
    """The clipped term of one token, in plain torch."""
    ratio = (logp - old).exp()
    free = ratio if cap is None else ratio.clamp(max=cap)
    return -torch.minimum(free * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


# slime


@dataclass
class Sample:
    """The fields of slime's `Sample` that a reward hook reads."""

    group_index: int | None
    index: int
    reward: Any
    metadata: dict = field(default_factory=dict)

    def get_reward_value(self, args):
        return self.reward if not args.reward_key else self.reward[args.reward_key]


def slime_flag(name):
    words = documented("slime", "bash")[0].replace("\\\n", " ").split()
    return words[words.index(name) + 1]


@pytest.mark.parametrize("reward_key", [None, "accuracy"])
def test_slime_rewards(reward_key):
    values = (torch.rand(12) * 3).round().tolist()
    groups = [7, 3, 9] * 4
    samples = [
        Sample(group, i, value if reward_key is None else {"accuracy": value})
        for i, (group, value) in enumerate(zip(groups, values, strict=True))
    ]
    args = SimpleNamespace(reward_key=reward_key, advantage_estimator="grpo")
    raw, rewards = imported(slime_flag("--custom-reward-post-process-path"))(args, samples)
    expected = mk.group_advantages(torch.tensor(values), group_ids=torch.tensor(groups))
    assert raw == values and rewards == expected.tolist()
    assert all(type(x) is float for x in raw + rewards) and any(rewards)


def test_slime_rewards_with_options():
    scope = {}
    exec(documented("slime", "python")[0], scope)
    args = SimpleNamespace(reward_key=None)
    samples = [Sample(0, i, float(i < 15)) for i in range(16)]
    _, rewards = scope["post_process"](args, samples)
    expected = mk.group_advantages(
        torch.tensor([s.reward for s in samples]),
        group_size=16,
        certainty="linear",
        success_threshold=0.9,
        max_abs=10.0,
    )
    assert rewards == expected.tolist()
    samples[3].group_index = None
    with pytest.raises(ValueError, match="group_index"):
        scope["post_process"](args, samples)


def slime_batch(lengths=(3, 5, 1, 4), vocab=11):
    """A micro-batch of slime's and its logits; samples 1 and 2 are parts of one rollout."""
    prompts = 2
    tokens = [torch.randint(0, vocab, (prompts + n,)) for n in lengths]
    masks = [(torch.rand(n) < 0.7).int() for n in lengths]
    counts = [int(mask.sum()) for mask in masks]
    counts[1] = counts[2] = counts[1] + counts[2]
    batch = {
        "unconcat_tokens": tokens,
        "total_lengths": [len(t) for t in tokens],
        "response_lengths": list(lengths),
        "loss_masks": masks,
        "advantages": [torch.full((n,), float(torch.randn(()))) for n in lengths],
        "rollout_mask_sums": torch.tensor(counts),
    }
    logits = torch.randn(1, sum(batch["total_lengths"]), vocab, requires_grad=True)
    return batch, logits


def slime_logprobs(logits, *, args, unconcat_tokens, total_lengths, response_lengths, **top_p):
    """What slime's `get_log_probs_and_entropy` returns, without parallelism."""
    found, start = [], 0
    logp = logits[0].log_softmax(-1)
    for ids, total, length in zip(unconcat_tokens, total_lengths, response_lengths, strict=True):
        rows = logp[start + total - length - 1 : start + total - 1]
        found.append(rows.gather(1, ids[total - length :, None])[:, 0])
        start += total
    return torch.empty(0), {"log_probs": found}


def slime_args(**settings):
    base = {"eps_clip": 0.2, "eps_clip_high": 0.28, "eps_clip_c": 3.0, "entropy_coef": 0.0}
    base["advantage_estimator"] = "grpo"
    flags = ("use_kl_loss", "use_tis", "use_opsm", "use_rollout_logprobs")
    return SimpleNamespace(**base | dict.fromkeys(flags, False) | settings)


@pytest.fixture
def slime_loss(install):
    install(
        "slime.backends.megatron_utils.loss",
        get_log_probs_and_entropy=slime_logprobs,
        get_rollout_top_p_logprob_kwargs=lambda args, batch: {},
    )
    return imported(slime_flag("--custom-loss-function-path"))


def log_probs_of_slime(logits, tokens, tp_group, with_entropy=False, chunk_size=-1,
                       log_prob_keep_mask=None, with_entropy_grad=True):  # fmt: skip
    """slime's `calculate_log_probs_and_entropy` without parallelism: [T, 1] and [T]."""
    logs = logits.log_softmax(-1)
    kept = logits
    if log_prob_keep_mask is not None:
        kept = logits.masked_fill(~log_prob_keep_mask, -torch.inf)
    logp = kept.log_softmax(-1).gather(1, tokens[:, None])
    entropy = -(logs.exp() * logs).sum(-1) if with_entropy else None
    return logp, entropy if entropy is None or with_entropy_grad else entropy.detach()


def test_slime_log_probs(install):
    name = "slime.backends.megatron_utils.loss"
    install(name, calculate_log_probs_and_entropy=log_probs_of_slime)
    flag = re.search(r"--custom-megatron-init-path (\S+)", DOCS).group(1)
    module = sys.modules[name]
    sys.modules["slime.backends.megatron_utils"].loss = module
    imported(flag)(slime_args())
    assert module.calculate_log_probs_and_entropy is not log_probs_of_slime
    logits, tokens = torch.randn(6, 11, requires_grad=True), torch.randint(0, 11, (6,))
    keep = torch.rand(6, 11) < 0.5
    keep[torch.arange(6), tokens] = True
    for given in (
        {},
        {"with_entropy": True},
        {"with_entropy": True, "with_entropy_grad": False, "chunk_size": 4},
        {"with_entropy": True, "log_prob_keep_mask": keep},
    ):
        found = []
        for function in (log_probs_of_slime, module.calculate_log_probs_and_entropy):
            logp, entropy = function(logits, tokens, None, **given)
            loss = logp.square().sum() + (0.0 if entropy is None else entropy.sum() * 0.3)
            found.append((logp, entropy, *torch.autograd.grad(loss, logits)))
        for theirs, ours in zip(*found, strict=True):
            if theirs is None:
                assert ours is None
            else:
                torch.testing.assert_close(ours, theirs)
    logp, _ = module.calculate_log_probs_and_entropy(logits[:0], tokens[:0], None)
    assert logp.shape == (0, 1)


def test_skyrl_log_probs(install):
    name = "skyrl.backends.skyrl_train.workers.model_wrapper"
    install(name, logprobs_from_logits=None)
    wrapper = sys.modules[name]
    sys.modules["skyrl.backends.skyrl_train.workers"].model_wrapper = wrapper
    exec(documented("SkyRL", "python")[0], {})
    logits, labels = torch.randn(2, 5, 11, requires_grad=True), torch.randint(0, 11, (2, 5))
    exact = logits.log_softmax(-1).gather(2, labels[..., None]).squeeze(-1)
    found = wrapper.logprobs_from_logits(logits, labels, inplace_backward=True)
    torch.testing.assert_close(found, exact)
    (grad,) = torch.autograd.grad(found.square().sum(), logits)
    torch.testing.assert_close(grad, torch.autograd.grad(exact.square().sum(), logits)[0])


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("source", ["log_probs", "rollout_log_probs", None])
def test_slime_loss(slime_loss, per_token, source):
    batch, logits = slime_batch()
    args = slime_args(calculate_per_token_loss=per_token)
    args.use_rollout_logprobs = source == "rollout_log_probs"
    logp = slime_logprobs(
        logits,
        args=args,
        **{k: batch[k] for k in ("unconcat_tokens", "total_lengths", "response_lengths")},
    )[1]["log_probs"]
    old = [x.detach() + (torch.randn(x.shape) if source else 0.0) for x in logp]
    if source:
        batch[source] = old

    def sum_of_sample_mean(x):
        parts = x.split(batch["response_lengths"])
        return sum(
            (part * mask).sum() / (1 if per_token else max(int(count), 1))
            for part, mask, count in zip(
                parts, batch["loss_masks"], batch["rollout_mask_sums"], strict=True
            )
        )

    terms = clipped(torch.cat(logp), torch.cat(old), torch.cat(batch["advantages"]), 0.2, 0.28, 3.0)
    expected = sum_of_sample_mean(terms)
    (expected_grad,) = torch.autograd.grad(expected, logits)
    loss, metrics = slime_loss(args, batch, logits, sum_of_sample_mean)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logits.grad, expected_grad)
    # slime logs the values as one tensor.
    assert torch.tensor([0, *metrics.values()])[1] == loss


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("path", [None, "slime.backends.megatron_utils.loss.icepop_function"])
def test_slime_truncates_or_masks_rollouts(slime_loss, path, per_token):
    batch, logits = slime_batch()
    bounds = {"tis_clip_low": 0.5, "tis_clip": 2.0, "custom_tis_function_path": path}
    args = slime_args(calculate_per_token_loss=per_token, **bounds)
    old = [-torch.rand(n) * 3 for n in batch["response_lengths"]]
    rollout = [x + torch.randn(x.shape) for x in old]
    batch |= {"log_probs": old, "rollout_log_probs": rollout}
    ratio = (torch.cat(old) - torch.cat(rollout)).exp()
    weights = ratio.clamp(0.5, 2.0)
    if path is not None:
        weights = torch.where(weights == ratio, ratio, 0.0)
    # What a weight does to the loss without correction is what it does to the advantage.
    expected, _ = slime_loss(args, batch, logits, None)
    args.use_tis = True
    loss, _ = slime_loss(args, batch, logits, None)
    assert loss != expected
    args.use_tis = False
    weighted = torch.cat(batch["advantages"]) * weights
    batch["advantages"] = list(weighted.split(batch["response_lengths"]))
    expected, _ = slime_loss(args, batch, logits, None)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    "setting",
    [
        {"use_kl_loss": True},
        {"entropy_coef": 0.01},
        {"custom_tis_function_path": "mine.tis", "use_tis": True},
        {"use_tis": True, "use_rollout_logprobs": True},
        {"custom_pg_loss_reducer_function_path": "mine.reduce"},
        {"advantage_estimator": "gspo"},
    ],
)
def test_slime_loss_says_what_it_leaves_out(slime_loss, setting):
    batch, logits = slime_batch()
    with pytest.raises(ValueError, match=next(iter(setting))):
        slime_loss(slime_args(calculate_per_token_loss=False, **setting), batch, logits, None)


# prime-rl


@dataclass
class LossInputs:
    """The fields of prime-rl's `LossInputs`."""

    trainer_logprobs: torch.Tensor
    inference_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor | None
    advantages: torch.Tensor
    loss_mask: torch.Tensor
    loss_weights: torch.Tensor | None = None


@dataclass
class LossOutputs:
    """Those of its `LossOutputs`."""

    loss: torch.Tensor
    metrics: dict


@pytest.mark.parametrize("weighted", [False, True])
def test_prime_rl_loss(install, weighted):
    install("prime_rl.trainer.rl.loss", LossOutputs=LossOutputs)
    settings = tomllib.loads(documented("prime-rl", "toml")[0])["trainer"]["loss"]
    assert settings["type"] == "custom"
    function, kwargs = imported(settings["import_path"]), settings["kwargs"]
    for length in (1, 9):
        logp = (-torch.rand(length)).requires_grad_()
        inputs = LossInputs(
            trainer_logprobs=logp,
            inference_logprobs=logp.detach() + torch.randn(length),
            ref_logprobs=None,
            advantages=torch.randn(()).expand(length),
            loss_mask=torch.rand(length) < 0.7,
            loss_weights=torch.rand(length) if weighted else None,
        )
        terms = clipped(logp, inputs.inference_logprobs, inputs.advantages, 0.2, 0.28, 10.0)
        expected = (terms * (inputs.loss_weights if weighted else 1.0))[inputs.loss_mask].sum()
        (expected_grad,) = torch.autograd.grad(expected, logp)
        out = function(inputs, **kwargs)
        assert isinstance(out, LossOutputs)
        out.loss.backward()
        torch.testing.assert_close(out.loss, expected)
        torch.testing.assert_close(logp.grad, expected_grad)
        # The trainer stacks each metric over sequences.
        assert all(torch.stack([x, x]).shape == (2,) for x in out.metrics.values())
    inputs.ref_logprobs = inputs.inference_logprobs
    assert function(inputs, beta=0.1, **kwargs).loss != out.loss
    with pytest.raises(TypeError, match="aggregation"):
        function(inputs, aggregation="seq-mean-token-mean")


def test_prime_rls_default_loss(install):
    install("prime_rl.trainer.rl.loss", LossOutputs=LossOutputs)
    function = imported("mapo_kernels.integrations.prime_rl.policy_loss")
    old = -torch.rand(50, dtype=torch.float64) * 2
    logp = (old + torch.randn(50)).clamp(max=-1e-3).requires_grad_()
    A, mask = torch.randn(50, dtype=torch.float64), torch.rand(50) < 0.8
    ratio, difference = (logp - old).exp(), (logp.exp() - old.exp()).detach()
    left = torch.where(A > 0, difference > 0.1, difference < -0.15)
    expected = (-A * ratio * ~left + 1e-2 * (logp - old) ** 2)[mask].sum()
    (expected_grad,) = torch.autograd.grad(expected, logp)
    out = function(
        LossInputs(logp, old, old, A, mask),
        objective="none",
        trust_region="tv",
        trust_low=0.15,
        trust_high=0.1,
        beta=2e-2,
        kl_estimator="k2",
    )
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(logp.grad, expected_grad)
    assert left[mask].any()


# EasyR1


def test_easyr1_estimator(install):
    registry = {}

    def register_adv_estimator(name):
        def decorator(fn):
            registry[name] = torch.no_grad()(fn)
            return registry[name]

        return decorator

    install(
        "verl.trainer.core_algos",
        AdvantageEstimator=SimpleNamespace(GRPO="grpo"),
        register_adv_estimator=register_adv_estimator,
    )
    scope = {"__name__": "train_mapo"}
    exec(documented("EasyR1", "python")[0], scope)
    scope["register_mapo"]()
    rewards = (torch.rand(8) < 0.5).float()
    mask = torch.arange(5) < torch.randint(1, 6, (8, 1))
    scores = torch.zeros(8, 5)
    scores[:, 0] = rewards
    # A key that its trainer passes to every estimator.
    advantages, returns = registry["grpo"](
        token_level_rewards=scores,
        response_mask=mask.long(),
        index=np.array(["b", "a"] * 4, dtype=object),
        gamma=1.0,
        lam=1.0,
    )
    expected = mk.group_advantages(rewards, group_ids=torch.tensor([0, 1] * 4))
    torch.testing.assert_close(advantages, expected[:, None] * mask)
    assert returns is advantages


def test_easyr1_launcher(install):
    calls = []
    install("ray", init=lambda **options: calls.append(options))
    install("verl.trainer.main", main=lambda: calls.append("main"))
    scope = {"__name__": "__main__"}
    exec(documented("EasyR1", "python")[0], scope)
    hook = {"worker_process_setup_hook": scope["register_mapo"]}
    assert calls == [{"runtime_env": hook}, "main"]


NO_PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def test_the_page_is_linked_and_names_files_that_exist():
    assert "(docs/integrations.md)" in (ROOT / "README.md").read_text()
    for name in re.findall(r"`((?:tests|mapo_kernels)/[\w/]+\.py)`", DOCS):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize(("body", "fails"), [("pytest.skip('not here')", True), ("pass", False)])
def test_where_a_trainer_is_installed_skipping_everything_fails(tmp_path, body, fails):
    conftest = (ROOT / "tests/integrations/conftest.py").read_text()
    (tmp_path / "conftest.py").write_text(conftest)
    (tmp_path / "test_it.py").write_text(f"import pytest\ndef test_it():\n    {body}\n")
    command = [sys.executable, "-m", "pytest", "-q", "--must-run", "test_it.py"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | NO_PLUGINS)
    assert (done.returncode != 0) == fails
