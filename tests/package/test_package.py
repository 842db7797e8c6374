"""The package as a whole: what it exports, documents and imports."""

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mapo_kernels as mk
from mapo_kernels import arguments, tracing

ROOT = Path(__file__).parents[2]
PUBLIC = [name for name in mk.__all__ if not name.startswith("__")]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_says_what_it_takes(name):
    thing = getattr(mk, name)
    text = inspect.getdoc(thing)
    assert text and len(text.splitlines()[0]) <= 100
    takes_tensors = name not in (
        "AdvantageSpec",
        "LossSpec",
        "describe_backend",
        "resolve_backend",
        "set_backend",
    )
    # Shapes are written [B], [B, T], [total], [Q] or [].
    assert "[" in text or not takes_tensors, f"{name}: no shapes in its docstring"
    if inspect.isfunction(thing) and inspect.signature(thing).parameters:
        assert "Args:" in text and "Raises:" in text
        for parameter in inspect.signature(thing).parameters:
            assert f"{parameter}:" in text, f"{name}: {parameter} is not documented"
    for member in ("forward", "backward", "micro_batch"):
        if hasattr(thing, member):
            assert inspect.getdoc(getattr(thing, member))


def test_fields_are_documented():
    for spec in (mk.LossSpec, mk.AdvantageSpec):
        for field in spec.__dataclass_fields__:
            assert f"{field}:" in inspect.getdoc(spec)
    for result in (mk.LossOutput, mk.GroupStats, mk.Plan):
        names = getattr(result, "_fields", None) or result.__dataclass_fields__
        assert all(f"{name}:" in inspect.getdoc(result) for name in names)


def test_help_comes_together_without_the_indentation_of_the_source():
    # Python 3.13 strips it when it compiles; a module whose help cannot be made is not imported.
    def indented(**arguments):
        """Something.

        Args:
            **arguments: those that all losses share, in `arguments.BatchArguments`.
        """

    def stripped(**arguments): ...

    stripped.__doc__ = inspect.cleandoc(indented.__doc__)
    texts = [
        inspect.getdoc(arguments.takes(arguments.BatchArguments)(x)) for x in (indented, stripped)
    ]
    assert texts[0] == texts[1]
    assert re.findall(r"^    (\w+): ", texts[0], re.M) == list(
        arguments.BatchArguments.__annotations__
    )


# A machine without a GPU, and Triton not interpreting.
HERE = {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}


def run_python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | HERE | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_triton_everything_runs_on_the_eager_backend():
    out = run_python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, mapo_kernels as mk\n"
        "logp = torch.zeros(4, 3, requires_grad=True)\n"
        "out = mk.mapo_loss(logp, rewards=torch.tensor([1., 0, 0, 1]), group_size=2)\n"
        "out.loss.backward()\n"
        "mk.make_plan(rewards=torch.rand(4), group_size=2, mask=torch.ones(4, 3)).live_rows\n"
        "loss = lambda x: mk.mapo_loss(x, advantages=torch.ones(4)).loss\n"
        "torch.compile(loss, fullgraph=True, backend='aot_eager')(logp).backward()\n"
        "print(mk.describe_backend())\n"
        "try:\n"
        "    mk.set_backend('triton'); mk.group_advantages(torch.rand(4), group_size=2)\n"
        "except RuntimeError as error: print(error)\n"
    )
    assert "eager (setting auto; Triton is not installed)" in out
    assert "backend 'triton': expected a Triton that can be used, got Triton is not inst" in out


@pytest.mark.parametrize(("package", "version"), [("torch", "2.9.1"), ("triton", "3.5.0")])
def test_what_is_too_old_for_the_kernels_leaves_the_eager_backend(package, version):
    out = run_python(
        f"import {package}; {package}.__version__ = '{version}'\n"
        "import torch, mapo_kernels as mk\n"
        "assert mk.group_advantages(torch.rand(4), group_size=2).shape == (4,)\n"
        "print(mk.describe_backend())\n"
        "try:\n"
        "    mk.resolve_backend('cuda')\n"
        "except RuntimeError as error: print(error)\n"
    )
    fault = f"{package} {version} (expected"
    assert f"eager (setting auto; {fault}" in out and f"got {fault}" in out


def test_importing_does_no_work():
    out = run_python(
        "import torch, sys\n"
        "before = torch.cuda.is_initialized(), torch.initial_seed(), torch.get_num_threads()\n"
        "import mapo_kernels\n"
        "assert before == (torch.cuda.is_initialized(), torch.initial_seed(), "
        "torch.get_num_threads())\n"
        "heavy = {'matplotlib', 'rich', 'reasoning_gym', 'pytest', 'trl', 'verl', 'transformers'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    assert out.strip() == "[]"


FIRST_USE = """
import sys, torch, mapo_kernels as mk
x = torch.zeros(4, 3, 5, requires_grad=True)
ids, rewards = torch.zeros(4, 3, dtype=torch.int64), torch.tensor([1., 0, 0, 1])
mk.group_advantages(rewards, group_size=2)
plan = mk.make_plan(rewards=rewards, group_size=2, mask=torch.ones(4, 3))
mk.mapo_loss(x[..., 0], plan=plan).loss.backward()
mk.mapo_loss_from_logits(x, ids, plan=plan).loss.backward()
mk.mapo_loss_from_hidden(x, torch.rand(7, 5), ids, plan=plan).loss.backward()
mk.token_logprobs_from_hidden(x, torch.rand(7, 5), ids)
print(mk.describe_backend())
print(sorted({"torch._dynamo", "torch._inductor", "sympy"} & set(sys.modules)))
"""


@pytest.mark.parametrize("interprets", ["0", "1"])
def test_first_use_imports_no_compiler_of_graphs(interprets):
    if interprets == "1":
        pytest.importorskip("triton")
    out = run_python(FIRST_USE, TRITON_INTERPRET=interprets).splitlines()
    assert out[0].startswith("eager") and out[1] == "[]"


def test_functions_are_marked_as_torch_marks_them():
    def ours():
        return None

    def theirs():
        return None

    tracing.constant_in_graphs(ours)
    torch.compiler.assume_constant_result(theirs)
    assert vars(ours) == vars(theirs) != {}


def test_a_graph_ends_before_a_function_that_is_not_traced():
    """However often: torch stops tracing a frame that it has traced too often."""
    seen = []

    @tracing.outside_graphs
    def untraced(x, text):
        seen.append(torch.compiler.is_compiling())
        return inner(x) * len(text)

    def inner(x):
        seen.append(torch.compiler.is_compiling())
        return x[x > 0].sum()

    torch.compiler.reset()
    step = torch.compile(lambda x, text: untraced(x * 2, text=text) + 1, backend="aot_eager")
    x = torch.ones(3)
    with torch._dynamo.config.patch(recompile_limit=2):
        for n in range(6):
            assert step(x, "x" * n) == 6 * n + 1
    assert seen == [False] * 12


def test_integrations_import_their_trainers_as_their_docstring_says():
    trainers = ("verl", "slime", "prime_rl", "trl", "transformers")
    out = run_python(
        "import importlib, sys\n"
        f"for name in {trainers}: sys.modules[name] = None\n"
        f"for name in {(*trainers[:4], 'trl_options', 'fused_forward')}:\n"
        "    try: importlib.import_module(f'mapo_kernels.integrations.{name}')\n"
        "    except ModuleNotFoundError as error: print(name, 'needs', error.name)\n"
    )
    assert out.split("\n") == ["trl needs trl", "fused_forward needs transformers", ""]
    text = inspect.getdoc(importlib.import_module("mapo_kernels.integrations"))
    assert "`verl`, `slime` and `prime_rl` import their trainers inside calls" in text
    assert "`trl` imports TRL when it is" in text


def test_a_missing_trl_is_answered_by_its_extra():
    out = run_python(
        "import sys\n"
        "sys.modules['trl'] = None\n"
        "try: import mapo_kernels.integrations.trl\n"
        "except ModuleNotFoundError as error: print(error)\n"
    )
    assert 'pip install "mapo-kernels[trl]"' in out and 'pip install ".[trl]"' in out


def test_what_is_exported_is_imported_when_asked_for():
    out = run_python(
        "import sys, mapo_kernels as mk\n"
        "print(sorted({'torch', 'numpy', 'triton', 'mapo_kernels.groups'} & set(sys.modules)))\n"
        "assert set(mk.__all__) <= set(dir(mk)) and not hasattr(mk, 'nothing')\n"
        "assert mk.operators.__name__ == 'mapo_kernels.operators'\n"
        "from mapo_kernels import *\n"
        "print([name for name in mk.__all__ if globals()[name] is not getattr(mk, name)])\n"
    )
    assert out.split("\n")[:2] == ["[]", "[]"]


def test_version():
    out = run_python("from mapo_kernels.__main__ import main; main(['--version'])")
    assert out == f"mapo-kernels {mk.__version__}\n"


def test_kernels_do_not_validate_and_the_api_does_not_compute():
    package = ROOT / "mapo_kernels"
    for path in [
        package / "formula.py",
        *package.glob("kernels/*.py"),
        *package.glob("eager/*.py"),
    ]:
        assert "raise " not in path.read_text(), path
    for path in package.glob("distributed/*.py"):
        assert "operators" not in path.read_text(), f"{path}: ranks only talk"
    assert "torch.exp" not in (ROOT / "mapo_kernels/losses.py").read_text()


def test_files_stay_readable():
    for path in [*ROOT.glob("mapo_kernels/**/*.py"), *ROOT.glob("reference/*.py")]:
        assert len(path.read_text().splitlines()) <= 400, path
    for path in ROOT.glob("tests/**/*.py"):
        assert len(path.read_text().splitlines()) <= 500, path


def test_functions_stay_readable():
    for path in [*ROOT.glob("mapo_kernels/**/*.py"), *ROOT.glob("benchmarks/*.py")]:
        assert len(path.read_text().splitlines()) <= 400, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 100, f"{path}: {node.name}"


def test_triton_version_is_the_one_that_is_to_be_tested():
    expected = os.environ.get("MAPO_KERNELS_TEST_TRITON")
    if expected is None:
        pytest.skip("any Triton will do: MAPO_KERNELS_TEST_TRITON is not set")
    assert importlib.import_module("triton").__version__ == expected
