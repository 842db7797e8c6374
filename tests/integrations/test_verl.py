"""verl 0.9.1 itself: registration, parity with `vanilla` and `grpo`, the documented yaml."""

import os
import re
import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path

import numpy as np
import pytest
import torch

verl = pytest.importorskip("verl", reason="verl is not installed")
hydra = pytest.importorskip("hydra", reason="hydra is not installed")

from tensordict import NonTensorData, TensorDict  # noqa: E402
from verl.trainer.ppo import core_algos  # noqa: E402
from verl.utils.config import omega_conf_to_dataclass  # noqa: E402
from verl.workers.config import FSDPActorConfig  # noqa: E402

DOCS = Path(__file__).parents[2] / "docs/integrations.md"
MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
)
METRICS = {"actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"}


def run_fresh(code, **environment):
    """Run `code` in a new interpreter that has nothing of this checkout on its path."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd="/",
        env=env | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.fixture
def is_installed():
    try:
        metadata.version("mapo-kernels")
    except metadata.PackageNotFoundError:
        pytest.skip("mapo-kernels is on the path but not installed: no entry point")


def test_importing_verl_registers_without_user_code(is_installed):
    out, _ = run_fresh(
        "import sys, verl\n"
        "print(sorted({'mapo_kernels.groups', 'verl.trainer.ppo.core_algos'} & set(sys.modules)))\n"
        "from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn\n"
        "print(get_adv_estimator_fn('mapo').__name__, get_policy_loss_fn('mapo_fused').__name__)\n"
        "print('mapo_kernels.groups' in sys.modules)\n"
    )
    assert out.split("\n")[-4:-1] == ["[]", "mapo_advantages mapo_fused_loss", "False"]


def test_the_plugin_adds_little_to_verls_import(is_installed):
    out, _ = run_fresh(
        "import os, resource, sys, time\n"
        "rss = lambda: int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE')"
        " if sys.platform == 'linux' else 0\n"
        "os.environ['VERL_USE_EXTERNAL_PLUGINS'] = 'none'\n"
        "import verl\n"
        "before, memory, start = set(sys.modules), rss(), time.perf_counter()\n"
        "import mapo_kernels.integrations.verl\n"
        "spent = time.perf_counter() - start\n"
        "print(len(set(sys.modules) - before), spent, rss() - memory)\n"
    )
    modules, seconds, size = map(float, out.split("\n")[-2].split())
    # The package, its version, the sub-package and the plugin; measured: 2 ms and 0.2 MB.
    assert modules <= 4 and seconds < 0.2 and size < 2**22, out


@pytest.mark.parametrize("policy", ["none", "another_plugin"])
def test_verl_can_be_told_to_leave_it_out(is_installed, policy):
    out, _ = run_fresh(
        "import sys, verl.trainer.ppo.core_algos as core\n"
        "print('mapo' in core.ADV_ESTIMATOR_REGISTRY, 'mapo_kernels' in sys.modules)\n",
        VERL_USE_EXTERNAL_PLUGINS=policy,
    )
    assert out.split("\n")[-2] == "False False"


def test_a_broken_package_does_not_break_verl(is_installed):
    out, _ = run_fresh(
        "import sys; sys.modules['mapo_kernels.spec'] = None\n"
        "import verl.trainer.ppo.core_algos as core, torch, numpy\n"
        "ones = torch.ones(2, 3)\n"
        "try:\n"
        "    core.get_adv_estimator_fn('mapo')(token_level_rewards=ones, response_mask=ones,\n"
        "        config=None, index=numpy.array(['a', 'a'], dtype=object))\n"
        "except ImportError as error: print(error)\n"
    )
    assert "mapo_kernels.spec" in out


def test_a_taken_name_only_warns(is_installed):
    out, err = run_fresh(
        "import sys, types\n"
        "import verl, verl.trainer.ppo\n"
        "import importlib.util as util\n"
        "import verl.trainer.ppo.core_algos as core\n"
        "from mapo_kernels.integrations.verl import register\n"
        "core.ADV_ESTIMATOR_REGISTRY['mapo'] = print\n"
        "register(core)\n"
        "register(types.ModuleType('core_algos'))\n"
        "print(core.ADV_ESTIMATOR_REGISTRY['mapo'] is print)\n"
    )
    assert out.split("\n")[-2] == "True"
    assert err.count("mapo_kernels is not registered") == 2


def actor(mode="token-mean", info=None, **settings):
    config = FSDPActorConfig(
        rollout_n=4, ppo_micro_batch_size_per_gpu=1, loss_agg_mode=mode, **settings
    )
    config.global_batch_info.update(info or {})
    return config


def tokens(n_sequences=9, length=7, dtype=torch.float32):
    """Log-probs, advantages per token and a mask; ratios reach past every clip range."""
    old = -torch.rand(n_sequences, length, dtype=dtype) * 3
    logp = old + torch.randn(n_sequences, length, dtype=dtype) * 0.8
    advantages = torch.randn(n_sequences, 1, dtype=dtype).expand(-1, length).clone()
    mask = torch.rand(n_sequences, length) < 0.8
    mask[0] = False
    advantages[1] = 0
    return old, logp, advantages, mask


def both_losses(config, old, logp, advantages, mask, weights=None, names=("vanilla", "mapo_fused")):
    """Loss, gradient and metrics of verl's loss and of this package's."""
    found = []
    for name in names:
        mine = logp.clone().requires_grad_()
        loss, metrics = core_algos.get_policy_loss_fn(name)(
            old_log_prob=old,
            log_prob=mine,
            advantages=advantages,
            response_mask=mask,
            loss_agg_mode=config.loss_agg_mode,
            config=config,
            rollout_is_weights=weights,
        )
        # verl subtracts the entropy bonus from the loss in place.
        loss -= 0.5
        loss.backward()
        assert loss.shape == () and all(type(value) is float for value in metrics.values())
        found.append((loss.detach() + 0.5, mine.grad, metrics))
    return found


def assert_parity(found):
    (loss, grad, metrics), (fused, fused_grad, fused_metrics) = found
    torch.testing.assert_close(fused, loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fused_grad, grad, rtol=1e-5, atol=1e-7)
    assert set(fused_metrics) == METRICS == set(metrics)
    for name, value in metrics.items():
        assert fused_metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dp_size", [1, 2, 8])
@pytest.mark.parametrize("mode", MODES)
def test_parity_with_vanilla(mode, dp_size, weighted):
    old, logp, advantages, mask = tokens()
    info = {"dp_size": dp_size, "batch_num_tokens": 123, "global_batch_size": 24}
    info["loss_scale_factor"] = 512 if weighted else None
    weights = torch.rand_like(old) * 2 if weighted else None
    found = both_losses(actor(mode, info), old, logp, advantages, mask, weights)
    assert_parity(found)
    assert found[0][2]["actor/pg_clipfrac_lower"] > 0 and found[0][2]["actor/pg_clipfrac"] > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("info", [{}, {"dp_size": 1, "batch_num_tokens": None}])
def test_parity_without_global_counts(mode, info):
    # verl leaves sequences without a token out of the count.
    assert_parity(both_losses(actor(mode, info), *tokens()))


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "token-sum"])
def test_several_ranks_need_global_counts(mode):
    config = actor(mode, {"dp_size": 2})
    for name in ("vanilla", "mapo_fused"):
        old, logp, advantages, mask = tokens()
        with pytest.raises(ValueError, match="batch_num_tokens|global_batch_size"):
            core_algos.get_policy_loss_fn(name)(old, logp, advantages, mask, mode, config, None)


@pytest.mark.parametrize(
    "settings",
    [
        {"clip_ratio_low": 0.1, "clip_ratio_high": 0.28, "clip_ratio_c": 10.0},
        {"clip_ratio": 0.3, "clip_ratio_low": None, "clip_ratio_high": None},
        {"clip_ratio_c": 1.5},
    ],
)
def test_parity_of_clip_settings(settings):
    for dtype in (torch.float32, torch.float64):
        assert_parity(both_losses(actor(**settings), *tokens(dtype=dtype)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("region", ["tv", "kl"])
def test_parity_with_dppo(region, mode):
    limits = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.15, "clip_ratio_c": 2.5}
    old, logp, advantages, mask = tokens(n_sequences=30, dtype=torch.float64)
    weights = torch.rand_like(old)
    names = (f"dppo_{region}", f"mapo_fused_dppo_{region}")
    found = both_losses(
        actor(mode, **limits), old, logp.clamp(max=-1e-3), advantages, mask, weights, names
    )
    assert_parity(found)
    assert 0.05 < found[0][2]["actor/pg_clipfrac"] < 0.95
    assert found[0][2]["actor/pg_clipfrac_lower"] > 0


def test_on_policy_and_extreme_ratios():
    old, logp, advantages, mask = tokens()
    assert_parity(both_losses(actor(), old, old, advantages, mask))
    far = old + torch.linspace(-19, 19, old.numel()).reshape(old.shape)
    for settings in ({}, {"clip_ratio_c": 100.0}):
        assert_parity(both_losses(actor(**settings), old, far, advantages, mask))


@pytest.mark.parametrize("mode", MODES)
def test_ranks_and_micro_batches_add_up(mode):
    old, logp, advantages, mask = tokens(n_sequences=16)
    whole = {"dp_size": 1, "batch_num_tokens": int(mask.sum()), "global_batch_size": 16}
    expected = both_losses(actor(mode, whole), old, logp, advantages, mask)[0]
    loss, grad = 0.0, torch.zeros_like(old)
    for rank in range(2):
        config = actor(mode, {**whole, "dp_size": 2})
        for rows in torch.arange(rank, 16, 2).split(3):
            parts = both_losses(config, old[rows], logp[rows], advantages[rows], mask[rows])[1]
            loss, grad[rows] = loss + parts[0] / 2, parts[1] / 2
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, expected[1], rtol=1e-5, atol=1e-7)


def test_a_batch_without_live_tokens_is_zero():
    old, logp, advantages, mask = tokens()
    for mode in MODES:
        info = {"dp_size": 1, "batch_num_tokens": 0, "global_batch_size": None}
        mine = logp.clone().requires_grad_()
        loss, metrics = core_algos.get_policy_loss_fn("mapo_fused")(
            old, mine, advantages, torch.zeros_like(mask), mode, actor(mode, info), None
        )
        loss.backward()
        assert loss == 0 and not mine.grad.any() and set(metrics.values()) == {0.0}


def test_a_clip_range_that_makes_no_sense_is_named_as_in_verl():
    with pytest.raises(ValueError, match="clip_ratio_c"):
        both_losses(actor(clip_ratio_high=0.5, clip_ratio_c=1.2), *tokens())
    old, logp, advantages, mask = tokens()
    with pytest.raises(ValueError, match="loss_agg_mode"):
        core_algos.get_policy_loss_fn("mapo_fused")(
            old, logp, advantages, mask, "mean", actor(), None
        )


def test_verls_whole_actor_loss(monkeypatch):
    """`ppo_loss` with entropy bonus and KL: it changes the policy loss in place."""
    from verl.workers.utils import losses

    # The model's output is padded here already.
    monkeypatch.setattr(losses, "no_padding_2_padding", lambda x, _: x)
    n, length = 6, 5
    old = -torch.rand(n, length)
    found = {}
    for name in ("vanilla", "mapo_fused"):
        config = actor(
            policy_loss=omega_conf_to_dataclass(
                {"_target_": "verl.workers.config.PolicyLossConfig", "loss_mode": name}
            ),
            use_kl_loss=True,
            kl_loss_coef=0.04,
            entropy_coeff=0.01,
        )
        torch.manual_seed(1)
        logp = (old + torch.randn(n, length) * 0.5).requires_grad_()
        entropy = torch.rand(n, length)
        data = TensorDict(
            {
                "response_mask": torch.rand(n, length) < 0.8,
                "old_log_probs": old,
                "advantages": torch.randn(n, 1).expand(-1, length).clone(),
                "ref_log_prob": old - 0.1,
                "dp_size": NonTensorData(2),
                "batch_num_tokens": NonTensorData(40),
                "global_batch_size": NonTensorData(12),
            },
            batch_size=[n],
        )
        loss, metrics = losses.ppo_loss(config, {"log_probs": logp, "entropy": entropy}, data)
        loss.backward()
        found[name] = loss.detach(), logp.grad
        assert set(metrics) > METRICS
    torch.testing.assert_close(found["mapo_fused"], found["vanilla"], rtol=1e-5, atol=1e-7)


def batch(n_groups=5, size=4, length=6):
    """Outcome rewards in the last live token, rows of all groups mixed, uids as verl makes them."""
    order = torch.randperm(n_groups * size)
    index = np.array([f"uid-{i // size}" for i in order.tolist()], dtype=object)
    rewards = torch.rand(n_groups * size)
    lengths = torch.randint(1, length + 1, rewards.shape)
    mask = torch.arange(length) < lengths[:, None]
    scores = torch.zeros(mask.shape).scatter_(1, lengths[:, None] - 1, rewards[:, None])
    return scores, mask.long(), index, rewards


def algorithm(*overrides):
    """verl's own algorithm config, as its trainer composes and passes it."""
    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        return hydra.compose("ppo_trainer", overrides=list(overrides)).algorithm


def test_parity_with_grpo():
    scores, mask, index, _ = batch()
    config = algorithm("algorithm.adv_estimator=mapo", "+algorithm.mapo.estimator=grpo")
    fn = core_algos.get_adv_estimator_fn(config.adv_estimator)
    ours = fn(token_level_rewards=scores, response_mask=mask, config=config, index=index)
    theirs = core_algos.compute_grpo_outcome_advantage(
        token_level_rewards=scores.clone(), response_mask=mask, index=index
    )
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    # Dr.GRPO, verl's other setting.
    config = algorithm("+algorithm.mapo.estimator=mean")
    ours = fn(token_level_rewards=scores, response_mask=mask, config=config, index=index)
    theirs = core_algos.compute_grpo_outcome_advantage(
        scores.clone(), mask, index, norm_adv_by_std_in_grpo=False
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_where_grpo_differs():
    """A group of one, and a group of equal rewards: 0 here, something else in verl's `grpo`."""
    scores = torch.tensor([[0.1, 0.0], [0.1, 0.0], [0.1, 0.0], [0.7, 0.0]])
    mask = torch.ones(4, 2, dtype=torch.long)
    index = np.array(["a", "a", "a", "b"], dtype=object)
    ours, _ = core_algos.get_adv_estimator_fn("mapo")(
        token_level_rewards=scores, response_mask=mask, config=algorithm(), index=index
    )
    assert not ours.any()


def documented(language):
    return re.findall(rf"```{language}\n(.*?)```", DOCS.read_text().split("\n## verl")[1], re.S)


@pytest.fixture
def documented_config(tmp_path):
    """The file of the docs, composed as verl's `--config-path` and `--config-name` do."""
    (tmp_path / "mapo.yaml").write_text(documented("yaml")[0])
    with hydra.initialize_config_dir(str(tmp_path), version_base=None):
        return hydra.compose("mapo")


def test_the_documented_yaml_resolves(documented_config):
    config = documented_config
    assert config.algorithm.adv_estimator == "mapo"
    actor_config = config.actor_rollout_ref.actor
    actor_config.ppo_micro_batch_size_per_gpu, actor_config.rollout_n = 1, 4
    resolved = omega_conf_to_dataclass(actor_config)
    assert isinstance(resolved, FSDPActorConfig)
    assert resolved.policy_loss.loss_mode == "mapo_fused"
    assert_parity(both_losses(resolved, *tokens()))
    scores, mask, index, rewards = batch()
    fn = core_algos.get_adv_estimator_fn(config.algorithm.adv_estimator)
    advantages, returns = fn(
        token_level_rewards=scores, response_mask=mask, config=config.algorithm, index=index
    )
    from mapo_kernels import group_advantages

    ids = torch.tensor([int(uid[4:]) for uid in index])
    expected = group_advantages(rewards, group_ids=ids, **config.algorithm.mapo)
    torch.testing.assert_close(advantages, expected[:, None] * mask)
    torch.testing.assert_close(returns, advantages)


def test_the_documented_command_line_composes():
    text = documented("bash")[0].replace("\\\n", " ")
    overrides = [word for word in text.split() if "=" in word]
    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        config = hydra.compose("ppo_trainer", overrides=overrides)
    assert config.algorithm.adv_estimator == "mapo" and config.algorithm.mapo.certainty
    assert config.actor_rollout_ref.actor.policy_loss.loss_mode == "mapo_fused"


def test_options_live_where_nothing_strict_reads_them():
    """verl hands the estimator its raw config; the dataclasses would refuse an unknown key."""
    config = algorithm("+algorithm.mapo.certainty=linear")
    assert config.mapo.certainty == "linear"
    with pytest.raises(Exception, match="mapo"):
        omega_conf_to_dataclass(config)
    with pytest.raises(Exception, match="mapo"):
        algorithm("algorithm.mapo.certainty=linear")
    source = resources.files("verl.trainer.ppo") / "v1/trainer_base.py"
    assert "config=self.config.algorithm," in source.read_text()


def test_verls_own_step_from_rewards_to_advantages():
    """`compute_advantage`, the function of the trainer that calls the estimator."""
    from verl import DataProto
    from verl.trainer.ppo.ray_trainer import compute_advantage

    scores, mask, index, _ = batch()
    data = DataProto.from_dict(
        tensors={"token_level_rewards": scores, "response_mask": mask}, non_tensors={"uid": index}
    )
    config = algorithm("algorithm.adv_estimator=mapo")
    done = compute_advantage(data, adv_estimator=config.adv_estimator, config=config)
    assert done.batch["advantages"].abs().sum() > 0
    torch.testing.assert_close(done.batch["advantages"], done.batch["returns"])


def test_training_by_verls_own_steps_raises_the_reward(documented_config):
    """Rewards to advantages to loss by verl's functions, around a tiny random model."""
    transformers = pytest.importorskip("transformers")
    from verl import DataProto
    from verl.trainer.ppo.ray_trainer import compute_advantage

    sizes = {"vocab_size": 12, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    config = documented_config.algorithm
    n_prompts, size, length = 6, 8, 4

    def logprobs(ids):
        logits = model(input_ids=ids).logits[:, -length - 1 : -1]
        return logits.log_softmax(-1).gather(2, ids[:, -length:, None])[..., 0]

    history = []
    for _ in range(25):
        prompts = torch.randint(0, 12, (n_prompts, 1)).repeat_interleave(size, 0)
        ids = prompts
        with torch.no_grad():
            for _ in range(length):
                drawn = torch.multinomial(model(input_ids=ids).logits[:, -1].softmax(-1), 1)
                ids = torch.cat([ids, drawn], 1)
            old = logprobs(ids)
        rewards = (ids[:, 1:] == 5).any(1).float()
        history.append(float(rewards.mean()))
        mask = torch.ones(ids.shape[0], length, dtype=torch.long)
        scores = torch.zeros(mask.shape)
        scores[:, -1] = rewards
        uids = np.array([f"uid-{i // size}" for i in range(ids.shape[0])], dtype=object)
        data = DataProto.from_dict(
            tensors={"token_level_rewards": scores, "response_mask": mask},
            non_tensors={"uid": uids},
        )
        data = compute_advantage(data, adv_estimator=config.adv_estimator, config=config)
        count = {"dp_size": 1, "batch_num_tokens": mask.numel(), "global_batch_size": len(mask)}
        for rows in torch.randperm(len(mask)).split(16):
            loss, _ = core_algos.get_policy_loss_fn("mapo_fused")(
                old_log_prob=old[rows],
                log_prob=logprobs(ids[rows]),
                advantages=data.batch["advantages"][rows],
                response_mask=mask[rows],
                loss_agg_mode="token-mean",
                config=actor(info=count),
            )
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(history[-5:]) / 5 > sum(history[:5]) / 5 + 0.2, history
