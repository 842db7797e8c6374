"""A new aggregation, or metric, is a line in one table: every level and backend has it.

The lines are added to a copy of the package, which another process then uses.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from backends import INTERPRETS

PACKAGE = Path(__file__).parents[2] / "mapo_kernels"
LINE = '    "token-mean": Aggregation("one", "tokens"),\n'
AGGREGATION = ("spec.py", LINE, f'{LINE}    "new": Aggregation("tokens", "tokens"),\n')
METRIC = ("formula.py", "    ratio_mean: Any\n", "    ratio_mean: Any\n    log_ratio_mean: Any\n")
METRIC_VALUE = (
    "formula.py",
    "        ratio_mean=ratio,\n",
    "        ratio_mean=ratio,\n        log_ratio_mean=log_ratio,\n",
)
LEVELS = """
import sys
import interpreted
import torch
import mapo_kernels as mk

mk.set_backend(sys.argv[1])
torch.manual_seed(0)
B, T, H, V = 4, 3, 8, 33
weight, hidden = torch.randn(V, H), torch.randn(B, T, H)
ids, mask = torch.randint(0, V, (B, T)), torch.rand(B, T) < 0.7
mask[0] = True
logp = mk.token_logprobs_from_hidden(hidden, weight, ids)
given = {"old_logprobs": logp - 0.1 * torch.rand(B, T), "advantages": torch.randn(B), "mask": mask}


def losses(aggregation):
    spec = mk.LossSpec(aggregation=aggregation)
    plan = mk.make_plan(advantages=given["advantages"], mask=mask, spec=spec)
    logits = (hidden @ weight.t()).requires_grad_()
    leaf = hidden.clone().requires_grad_()
    yield mk.mapo_loss(logp, spec=spec, **given)
    yield mk.mapo_loss(logp, plan=plan, old_logprobs=given["old_logprobs"])
    yield mk.mapo_loss_from_logits(logits, ids, spec=spec, **given)
    yield mk.mapo_loss_from_hidden(leaf, weight, ids, spec=spec, **given)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-7)
"""


AGGREGATED = """
known = mk.mapo_loss(logp, spec=mk.LossSpec(aggregation="seq-mean-token-mean"), **given)
for out in losses("new"):
    close(out.loss, known.loss * B / mask.sum())
"""
MEASURED = """
for out in losses("token-mean"):
    close(out.metrics["log_ratio_mean"], (logp - given["old_logprobs"])[mask].mean())
    assert "ratio_mean" in out.metrics and "ratio_max" in out.metrics
"""


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_an_aggregation_is_a_line_and_a_metric_a_field_and_its_value(tmp_path, backend):
    if backend == "triton" and not INTERPRETS:
        pytest.skip("needs Triton's interpreter")
    copy = tmp_path / "mapo_kernels"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for name, old, new in (AGGREGATION, METRIC, METRIC_VALUE):
        text = (copy / name).read_text()
        assert text.count(old) == 1
        (copy / name).write_text(text.replace(old, new))
    path = [str(tmp_path), str(PACKAGE.parent / "tests")]
    done = subprocess.run(
        [sys.executable, "-c", LEVELS + AGGREGATED + MEASURED, backend],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
