"""verl's plugin and hooks, loaded by a package that stands for verl."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_trainer_hooks import clipped

import mapo_kernels as mk

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings the same under another name
    import tomli as tomllib

ROOT = Path(__file__).parents[2]


# verl's plugin

VERL_INIT = """
import logging
from importlib.metadata import entry_points
for point in entry_points(group="verl.plugins"):
    try:
        point.load()
    except Exception as error:
        print("plugin failed:", error)
"""
FATAL = ["-W", "error"]
CORE_ALGOS = """
ESTIMATORS, LOSSES = {}, {}
def register_adv_est(name):
    return lambda fn: ESTIMATORS.setdefault(name, fn)
def register_policy_loss(name):
    return lambda fn: LOSSES.setdefault(name, fn)
"""


@pytest.fixture
def run_verl(tmp_path):
    """Runs code where a package stands for verl and this one is installed with its entry points."""

    def write(path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def run(code, core_algos=CORE_ALGOS, flags=()):
        write(tmp_path / "verl/__init__.py", VERL_INIT)
        for name in ("verl/trainer", "verl/trainer/ppo"):
            write(tmp_path / name / "__init__.py", "")
        write(tmp_path / "verl/trainer/ppo/core_algos.py", core_algos)
        points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
        info = tmp_path / "mapo_kernels-0.dist-info"
        write(info / "METADATA", "Metadata-Version: 2.1\nName: mapo-kernels\nVersion: 0\n")
        lines = [f"{key} = {value}" for key, value in points["verl.plugins"].items()]
        write(info / "entry_points.txt", "\n".join(["[verl.plugins]", *lines, ""]))
        done = subprocess.run(
            [sys.executable, *flags, "-c", code],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip(), done.stderr

    return run


def test_the_plugin_registers_and_stays_light(run_verl):
    out, err = run_verl(
        "import sys, verl\n"
        "heavy = {'torch', 'triton', 'mapo_kernels.groups', 'verl.trainer.ppo.core_algos'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "from verl.trainer.ppo import core_algos\n"
        "print(*core_algos.ESTIMATORS, *core_algos.LOSSES, sorted(heavy & set(sys.modules)))\n"
    )
    names = "mapo mapo_fused mapo_fused_dppo_tv mapo_fused_dppo_kl"
    assert out.split("\n") == ["[]", f"{names} ['verl.trainer.ppo.core_algos']"]
    assert not err


@pytest.mark.parametrize(
    "core_algos",
    ["", "register_adv_est = 3", "def register_adv_est(name): raise ValueError('taken')"],
)
def test_another_registry_only_warns(run_verl, core_algos):
    out, err = run_verl(
        "import verl.trainer.ppo.core_algos; print('fine')", core_algos, ["-Werror"]
    )
    assert out == "fine"
    assert "mapo_kernels is not registered with verl" in err


def test_an_import_of_verls_that_fails_may_be_tried_again(run_verl):
    out, err = run_verl(
        "import sys, verl\n"
        "try: import verl.trainer.ppo.core_algos\n"
        "except ImportError as error: print(error)\n"
        "sys.ray = True\n"
        "import verl.trainer.ppo.core_algos as core_algos\n"
        "print(*core_algos.ESTIMATORS, core_algos.__spec__.origin == core_algos.__file__)\n"
        "print(len([f for f in sys.meta_path if type(f).__module__.startswith('mapo_kernels')]))\n",
        "import sys\nif not hasattr(sys, 'ray'): raise ImportError('no ray')\n" + CORE_ALGOS,
    )
    assert out.split("\n") == ["no ray", "mapo True", "1"] and not err


def test_a_broken_installation_fails_at_the_first_call(run_verl):
    out, _ = run_verl(
        "import sys; sys.modules['mapo_kernels.spec'] = sys.modules['torch'] = None\n"
        "from verl.trainer.ppo.core_algos import ESTIMATORS, LOSSES\n"
        "for call in (ESTIMATORS['mapo'], LOSSES['mapo_fused']):\n"
        "    try: call(*[None] * 4)\n"
        "    except ImportError as error: print(error.name)\n"
    )
    assert set(out.split("\n")) <= {"torch", "mapo_kernels.spec"} and out.count("\n") == 1


def estimate(config=None, index=("b", "a", "b", "a"), rewards=(1.0, 0.0, 0.0, 0.5)):
    from mapo_kernels.integrations.verl import mapo_advantages

    scores = torch.tensor(rewards)[:, None] * torch.tensor([0.0, 1.0])
    mask = torch.tensor([[1, 0]]).expand(4, 2)
    index = None if index is None else np.array(index, dtype=object)
    return mapo_advantages(
        token_level_rewards=scores, response_mask=mask, config=config, index=index
    )


def test_estimator_of_uids_in_any_order():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.5])
    expected = mk.group_advantages(rewards, group_ids=torch.tensor([0, 1, 0, 1]))
    for index in (("b", "a", "b", "a"), (7, "a", 7, "a"), (0, 1, 0, 1)):
        advantages, _ = estimate(index=index)
        # The reward lies at a masked token and counts; its advantage does not.
        torch.testing.assert_close(advantages, expected[:, None] * torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("certainty", ["linear", "entropy", "step", 0.3])
def test_estimator_options(certainty):
    expected = mk.group_advantages(
        torch.tensor([1.0, 0.0, 0.0, 0.5]),
        group_ids=torch.tensor([0, 1, 0, 1]),
        certainty=certainty,
        success_threshold=0.5,
    )
    options = {"certainty": certainty, "success_threshold": 0.5}
    for config in ({"mapo": options}, SimpleNamespace(mapo=options)):
        torch.testing.assert_close(estimate(config)[0][:, 0], expected)


def test_estimator_errors_name_the_argument():
    with pytest.raises(TypeError, match="algorithm.mapo: .*group_size"):
        estimate({"mapo": {"group_size": 2}})
    with pytest.raises(ValueError, match="algorithm.mapo: certainty: expected"):
        estimate({"mapo": {"certainty": "cubic"}})
    with pytest.raises(ValueError, match="algorithm.mapo: "):
        estimate({"mapo": "linear"})
    with pytest.raises(ValueError, match="index: expected one prompt id"):
        estimate(index=None)
    with pytest.raises(ValueError, match="index: expected 4 prompt ids"):
        estimate(index=("a", "b"))


def test_fused_loss_of_a_nan_behind_the_mask():
    from mapo_kernels.integrations.verl import mapo_fused_loss

    config = {"clip_ratio": 0.2, "clip_ratio_low": None, "clip_ratio_high": 0.3}
    config["global_batch_info"] = {"dp_size": 2, "batch_num_tokens": 5}
    old, advantages = -torch.rand(2, 3), torch.tensor([[-1.0], [2.0]]).expand(2, 3)
    logp = old + torch.tensor([[2.0, 0.1, 0.0], [0.5, -0.5, 0.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]])
    expected = (clipped(logp, old, advantages, 0.2, 0.3, 3.0) * mask).sum() / 5 * 2
    logp[:, 2] = float("nan")
    loss, metrics = mapo_fused_loss(old, logp, advantages, mask, "token-mean", config, None)
    torch.testing.assert_close(loss, expected)
    assert metrics["actor/pg_clipfrac"] == 0.25 and metrics["actor/pg_clipfrac_lower"] == 0.25
    assert metrics["actor/ppo_kl"] == pytest.approx(-2.1 / 4)
    with pytest.raises(ValueError, match="batch_num_tokens: expected .* dp_size 2, got None"):
        config["global_batch_info"] = {"dp_size": 2}
        mapo_fused_loss(old, logp, advantages, mask, "token-mean", config, None)
    with pytest.raises(ValueError, match="config"):
        mapo_fused_loss(old, logp, advantages, mask)
