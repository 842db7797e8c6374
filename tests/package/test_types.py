"""Types as a user's type checker sees them, and the names of choices, which are written once."""

import ast
import inspect
import os
import subprocess
import sys
import typing
from importlib import resources
from pathlib import Path

import pytest

import mapo_kernels as mk
from mapo_kernels import arguments, choices, spec

ROOT = Path(__file__).parents[2]
USER = Path(__file__).with_name("typed_user.py")
# A typo in a choice, one in an argument, a pair taken for a tensor, a wrong type, a missing one.
MISTAKES = """\
import torch
import mapo_kernels as mk
x, ids, plan = torch.zeros(8, 4, 9), torch.zeros(8, 4, dtype=torch.int64), None
a = mk.group_advantages(x[:, 0, 0], group_size=8)
mk.group_advantages(x[:, 0, 0], group_size=8, estimator="mapoo")
mk.mapo_loss(x[..., 0], advantages=a, old_logprob=x[..., 0])
mk.token_logprobs(x, ids, return_entropy=True).exp()
mk.LossSpec(aggregation="token_mean")
mk.mapo_loss_from_logits(x, advantages=a)
mk.mapo_loss_from_logits(x, ids, advantages=a).logprobs
mk.set_backend("cuda")
"""


def checked(*arguments):
    """Lines of errors that mypy finds, and all that it says."""
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent"]
    command += ["--config-file=", f"--cache-dir={ROOT / '.mypy_cache/strict'}", *arguments]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"MYPYPATH": str(ROOT), "PYTHONPATH": ""},
    )
    said = done.stdout + done.stderr
    return [int(x.split(":")[1]) for x in said.splitlines() if ": error: " in x], said


def test_a_users_script_with_every_public_name_is_typed():
    tree = ast.parse(USER.read_text())
    (names,) = [x.names for x in tree.body if getattr(x, "module", None) == "mapo_kernels"]
    assert sorted(x.name for x in names) == sorted(mk.__all__)
    used = [x.id for x in ast.walk(tree) if isinstance(x, ast.Name)]
    assert set(mk.__all__) <= set(used)
    lines, said = checked(str(USER))
    assert not lines and "Success" in said, said


def test_typical_mistakes_are_errors_on_their_lines(tmp_path):
    script = tmp_path / "mistakes.py"
    script.write_text(MISTAKES)
    lines, said = checked(str(script))
    assert sorted(set(lines)) == [5, 6, 7, 8, 9, 10, 11], said


def test_the_package_says_that_it_is_typed():
    assert (resources.files("mapo_kernels") / "py.typed").is_file()
    assert '\nmapo_kernels = ["py.typed"]' in (ROOT / "pyproject.toml").read_text()


TABLES = {
    mk.group_advantages: arguments.AdvantageArguments,
    mk.token_logprobs: arguments.ScoreArguments,
    mk.token_logprobs_from_hidden: arguments.HiddenScoreArguments,
    mk.mapo_loss_from_logits: arguments.LogitsLossArguments,
    mk.mapo_loss_from_hidden: arguments.HiddenLossArguments,
}
FLAGS = {"return_stats", "return_entropy", "return_logprobs", "return_sum_pi_squared"}


@pytest.mark.parametrize("function", TABLES, ids=lambda x: x.__name__)
def test_what_type_checkers_are_told_is_the_signature(function):
    parameters = inspect.signature(function).parameters.values()
    keywords = {x.name: x.annotation for x in parameters if x.kind is x.KEYWORD_ONLY}
    table = TABLES[function].__annotations__
    assert keywords.keys() - FLAGS == table.keys()
    for name, hint in table.items():
        assert keywords[name] == getattr(hint, "__forward_arg__", hint), name


def test_choices_have_a_type_and_a_tuple_of_the_same_names():
    assert set(spec.AGGREGATION_TABLE) == set(typing.get_args(spec.AggregationName))
    assert set(spec.OBJECTIVES + spec.SEQUENCE_OBJECTIVES) == set(typing.get_args(spec.Objective))
    assert choices.BACKENDS == ("auto", *typing.get_args(choices.Computing))
    assert choices.GLOBAL == "global"
    for name in ("ESTIMATORS", "CERTAINTIES", "SCALES"):
        assert getattr(spec, name) is getattr(choices, name)
