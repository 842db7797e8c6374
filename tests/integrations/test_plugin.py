"""verl's plugin never breaks `import verl`, however its registries come to be imported.

A package in a temporary folder stands for verl; every test is a process of its own.
"""

import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE_ALGOS = "verl.trainer.ppo.core_algos"
# As in verl 0.9.1: a name can be registered anew only with the function that it has.
REGISTRIES = """
ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY = {}, {}
def register_adv_est(name):
    def decorator(fn):
        if ADV_ESTIMATOR_REGISTRY.setdefault(name, fn) is not fn:
            raise ValueError(f"{name} has already been registered")
        return fn
    return decorator
def register_policy_loss(name):
    def decorator(fn):
        POLICY_LOSS_REGISTRY[name] = fn
        return fn
    return decorator
"""
FILES = {
    "verl/__init__.py": "import mapo_kernels.integrations.verl\n",
    "verl/trainer/__init__.py": "",
    "verl/trainer/ppo/__init__.py": "",
    "verl/trainer/ppo/core_algos.py": REGISTRIES,
    "verl/trainer/ppo/other.py": "x = 1\n",
}
START = f"""
import importlib, importlib.util, sys
name = {CORE_ALGOS!r}
def registered():
    core_algos = sys.modules[name]
    names = [*core_algos.ADV_ESTIMATOR_REGISTRY, *core_algos.POLICY_LOSS_REGISTRY]
    losses = ["mapo_fused", "mapo_fused_dppo_tv", "mapo_fused_dppo_kl"]
    assert names == ["mapo", *losses], names
"""


@pytest.fixture
def run(tmp_path):
    """Runs code where verl can be imported, from a folder or from a zip file; returns stderr."""

    def run(code, zipped=False):
        where = tmp_path / ("verl.zip" if zipped else "verl_here")
        if zipped:
            with zipfile.ZipFile(where, "w") as archive:
                for name, text in FILES.items():
                    archive.writestr(name, text)
        for name, text in FILES.items() if not zipped else ():
            (where / name).parent.mkdir(parents=True, exist_ok=True)
            (where / name).write_text(text)
        done = subprocess.run(
            [sys.executable, "-c", START + textwrap.dedent(code) + "\nprint('reached the end')"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": f"{where}{os.pathsep}{ROOT}"},
        )
        assert done.returncode == 0 and done.stdout == "reached the end\n", done.stderr
        return done.stderr

    return run


def test_plugin_executed_twice_before_the_registries(run):
    error = run(
        """
        import verl, mapo_kernels.integrations.verl as plugin
        importlib.reload(plugin)
        importlib.reload(plugin)
        importlib.import_module(name)
        registered()
        """
    )
    assert not error


def test_plugin_executed_again_after_the_registries(run):
    error = run(
        """
        import verl, mapo_kernels.integrations.verl as plugin
        importlib.import_module(name)
        importlib.reload(plugin)
        registered()
        importlib.reload(sys.modules[name])
        registered()
        """
    )
    assert not error


@pytest.mark.parametrize("zipped", [False, True])
def test_registries_that_are_found_several_times_and_executed_later(run, zipped):
    error = run(
        """
        import verl
        specs = [importlib.util.find_spec(name) for _ in range(3)]
        importlib.import_module(name)
        registered()
        for spec in specs:
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
            registered()
            spec.loader.exec_module(module)
            registered()
        del sys.modules[name]
        importlib.import_module(name)
        registered()
        importlib.reload(sys.modules[name])
        registered()
        """,
        zipped,
    )
    assert not error


@pytest.mark.parametrize("zipped", [False, True])
def test_other_modules_and_their_sources_stay_what_they_are(run, zipped):
    error = run(
        """
        import inspect, pickle, copy, verl
        importlib.import_module(name)
        registered()
        import verl.trainer.ppo.other as other
        assert other.x == 1 and importlib.reload(other).x == 1
        core_algos = sys.modules[name]
        assert "has already been registered" in inspect.getsource(core_algos.register_adv_est)
        assert core_algos.__spec__.origin == core_algos.__file__
        assert core_algos.__loader__.get_data and not hasattr(core_algos.__loader__, "absent")
        copy.copy(core_algos.__loader__)
        import pkgutil
        assert b"register_adv_est" in pkgutil.get_data("verl.trainer.ppo", "core_algos.py")
        """,
        zipped,
    )
    assert not error


FINDERS = {
    "nothing that finds": "sys.meta_path.append(object())",
    "no find_spec": """
    class Old:
        def find_module(self, *_): return None
    sys.meta_path.insert(0, Old())
    sys.meta_path.append(Old())
    """,
    "find_spec is None": """
    class Odd:
        find_spec = None
    sys.meta_path.append(Odd())
    """,
    "a loader without exec_module": """
    class Loader:
        def load_module(self, fullname):
            raise AssertionError("not asked")
    class Finder:
        def find_spec(self, fullname, path=None, target=None):
            if fullname == name and not executed:
                return importlib.util.spec_from_loader(name, Loader())
    executed = []
    sys.meta_path.insert(0, Finder())
    spec = importlib.util.find_spec(name)
    assert type(spec.loader).__name__ == "Loader"
    executed.append(True)
    """,
    "a loader without attributes, and one spec for all": """
    from importlib.machinery import PathFinder
    class Loader:
        __slots__ = ("inner",)
        def create_module(self, spec): return None
        def exec_module(self, module): self.inner.exec_module(module)
    class Finder:
        spec = None
        def find_spec(self, fullname, path=None, target=None):
            if fullname != name: return None
            if self.spec is None:
                type(self).spec = PathFinder.find_spec(fullname, path)
                loader = Loader()
                loader.inner = self.spec.loader
                self.spec.loader = loader
            return self.spec
    sys.meta_path.insert(1, Finder())
    for _ in range(3):
        assert importlib.util.find_spec(name)
    """,
    "a hook like this one": """
    class Other:
        def find_spec(self, fullname, path=None, target=None):
            if fullname != name: return None
            for finder in sys.meta_path:
                if finder is not self and hasattr(finder, "find_spec"):
                    spec = finder.find_spec(fullname, path, target)
                    if spec is not None: return spec
    sys.meta_path.insert(0, Other())
    """,
}


@pytest.mark.parametrize("kind", FINDERS)
def test_finders_of_others(run, kind):
    code = "import verl\n" + textwrap.dedent(FINDERS[kind])
    error = run(code + "\nimportlib.import_module(name)\nregistered()\n")
    assert not error


def test_a_namespace_in_its_place_is_imported_all_the_same(tmp_path, run):
    for name in ("__init__.py", "trainer/__init__.py", "trainer/ppo/__init__.py"):
        (tmp_path / "first/verl" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "first/verl" / name).write_text(FILES[f"verl/{name}"])
    (tmp_path / "first/verl/trainer/ppo/core_algos").mkdir()
    run("sys.path.insert(0, 'first')\nimport verl\nassert importlib.import_module(name).__path__")


def test_threads_that_import_at_once(run):
    error = run(
        """
        import threading, verl
        failed = []
        def load():
            try:
                importlib.util.find_spec(name)
                importlib.import_module(name)
                importlib.reload(sys.modules[name])
            except BaseException as error:
                failed.append(error)
        threads = [threading.Thread(target=load) for _ in range(16)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert not failed, failed
        registered()
        """
    )
    assert not error
