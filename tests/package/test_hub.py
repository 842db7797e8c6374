"""What `make hub` writes: the layout that `kernels` loads, and two versions in one process."""

import ast
import os
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

# Not `kernels` alone, whose name the folder of our own kernels' tests has, too.
pytest.importorskip("kernels._rust", exc_type=ImportError)

from kernels._rust import Backend, Build, Digest, DigestAlgorithm, Metadata

ROOT = Path(__file__).parents[2]
BACKENDS = {"cpu": Backend.CPU, "cuda": Backend.CUDA, "rocm": Backend.ROCm}


@pytest.fixture(scope="module")
def script():
    spec = spec_from_file_location("hub_build", ROOT / "hub/build.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def versions(script, tmp_path_factory):
    """The kernel of this checkout, and as version 1 that of one with another package version."""
    folder = tmp_path_factory.mktemp("hub")
    other = folder / "checkout"
    for name in ("mapo_kernels", "hub"):
        shutil.copytree(ROOT / name, other / name, ignore=shutil.ignore_patterns("__pycache__"))
    settings = (other / "hub/build.toml").read_text()
    (other / "hub/build.toml").write_text(settings.replace("version = 0\n", "version = 1\n"))
    (other / "mapo_kernels/_version.py").write_text('__version__ = "9.9.9"\n')
    script.write(ROOT, folder / "0")
    script.write(other, folder / "1")
    return folder / "0", folder / "1"


def test_two_versions_beside_the_installed_package(versions):
    environment = {"HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, ROOT / "tests/package/load_hub.py", *versions],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "same numbers"


def test_kernels_reads_what_was_built(versions):
    identifiers = set()
    for number, folder in enumerate(versions):
        assert Build.open(folder).general.backends == list(BACKENDS.values())
        assert sorted(x.name for x in (folder / "build").iterdir()) == [
            f"torch-{name}" for name in BACKENDS
        ]
        for name, backend in BACKENDS.items():
            variant = folder / f"build/torch-{name}"
            found = Metadata.read_from_file(variant / "metadata.json")
            assert (found.name.python_name, found.version) == ("mapo_kernels", number)
            assert (found.backend.backend_type, found.python_depends) == (backend, [])
            assert found.id.startswith(f"_mapo_kernels_{name}_")
            found.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
            identifiers.add(found.id)
    assert len(identifiers) == 6


def test_one_build_of_the_same_sources(script, versions, tmp_path):
    script.write(ROOT, tmp_path / "again")
    for path in versions[0].rglob("*"):
        again = tmp_path / "again" / path.relative_to(versions[0])
        assert path.is_dir() or "__pycache__" in path.parts or path.read_text() == again.read_text()


def imports(tree):
    """Top-level names that a module imports when it runs."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (x.name.split(".")[0] for x in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]
        yield from imports(node)


def test_a_kernel_imports_itself_and_torch(versions):
    """The Hub's rule: relative imports, the standard library, torch and Triton, which it brings."""
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    for path in versions[0].rglob("*.py"):
        assert set(imports(ast.parse(path.read_text()))) <= allowed, path


def test_what_is_left_out(versions):
    """As CARD.md says: what no exported name needs."""
    found = {
        x.relative_to(versions[0] / "torch-ext/mapo_kernels").as_posix()
        for x in (versions[0] / "torch-ext/mapo_kernels").rglob("*.py")
    }
    assert {"losses.py", "kernels/row.py", "eager/__init__.py", "launch/logits.py"} <= found
    left_out = ("demo", "bench", "integrations", "study", "doctor.py", "__main__.py", "_ops.py")
    assert not [x for x in found if x.startswith(left_out)]


@pytest.mark.parametrize(
    ("line", "depth", "expected"),
    [
        ("from mapo_kernels import backend, config", 1, "from . import backend, config"),
        ("from mapo_kernels.spec import LossSpec", 1, "from .spec import LossSpec"),
        ("from mapo_kernels.eager.sums import top", 2, "from ..eager.sums import top"),
        ("    from mapo_kernels import hidden as h", 2, "    from .. import hidden as h"),
        ("from torch import Tensor", 1, "from torch import Tensor"),
        ('"""from mapo_kernels.spec import x"""', 1, '"""from mapo_kernels.spec import x"""'),
    ],
)  # fmt: skip
def test_imports_become_relative(script, line, depth, expected):
    source = "def f():\n" + line + "\n" if line.startswith(" ") else line + "\n"
    assert script.relative(source, depth).splitlines()[-1] == expected


def test_imports_that_cannot_become_relative_are_refused(script):
    with pytest.raises(SystemExit, match="line 2: expected `from mapo_kernels import ...`"):
        script.relative("import torch\nimport mapo_kernels.spec as spec\n", 1)
