"""What an index, a citation and a release say about the package agrees."""

import re
import sys
from pathlib import Path

import pytest

import mapo_kernels as mk

yaml = pytest.importorskip("yaml")
classifiers = pytest.importorskip("trove_classifiers").classifiers
if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
BIBTEX = (ROOT / "CITATION.bib").read_text()
CHANGES = (ROOT / "CHANGELOG.md").read_text()
REPOSITORY = "https://github.com/mapo-kernels/mapo_kernels"


def test_one_version():
    assert str(CITATION["version"]) == mk.__version__
    assert re.findall(r"version\s*= \{(.+)\}", BIBTEX) == [mk.__version__]
    assert re.findall(r"^## \[(.+)\] - \d{4}-\d\d-\d\d$", CHANGES, re.M)[0] == mk.__version__
    assert f"[{mk.__version__}]: {REPOSITORY}/releases/tag/v{mk.__version__}" in CHANGES
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"]["attr"].endswith("__version__")


def test_one_paper_and_one_project():
    (paper,) = CITATION["references"]
    names = [f"{x['family-names']}, {x['given-names']}" for x in paper["authors"]]
    authors, ours = re.findall(r"author\s*= \{(.+?)\},$", BIBTEX, re.M | re.S)
    assert " ".join(authors.split()).split(" and ") == names
    assert paper["url"] in BIBTEX and "2509.18849" in paper["url"]
    assert [x["name"] for x in CITATION["authors"]] == ["mapo_kernels developers"]
    assert PROJECT["project"]["authors"] == CITATION["authors"]
    assert ours == r"{mapo\_kernels developers}"
    assert PROJECT["project"]["license"] == CITATION["license"]
    assert PROJECT["project"]["urls"]["Homepage"] == CITATION["repository-code"] == REPOSITORY
    assert all(x.startswith(REPOSITORY) for x in PROJECT["project"]["urls"].values())


def test_classifiers_are_known():
    given = PROJECT["project"]["classifiers"]
    assert set(given) <= set(classifiers) and given == sorted(given)
    pythons = [int(x.split(".")[-1]) for x in given if re.search(r":: 3\.\d+$", x)]
    assert PROJECT["project"]["requires-python"] == f">=3.{pythons[0]},<3.{pythons[-1] + 1}"


def test_every_package_is_listed():
    found = {"mapo_kernels.bench"}
    for path in ROOT.glob("mapo_kernels/**/__init__.py"):
        found.add(".".join(path.parent.relative_to(ROOT).parts))
    assert sorted(found) == PROJECT["tool"]["setuptools"]["packages"]


@pytest.mark.parametrize("name", ["ci", "gpu", "release"])
def test_workflows_call_what_there_is(name):
    workflow = yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text())
    commands = "\n".join(
        step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]
    )
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (.+)$", commands, re.M):
        for word in target.split():
            assert re.search(rf"^(\$\(VENV\)/)?{word.removeprefix('.venv/')}:", makefile, re.M), (
                word
            )
    for needed in {
        "ci": [".ci/run"],
        "gpu": ["-m pytest -m gpu", "mapo-kernels bench --suite gpu"],
        "release": ["make dist test-dist hub"],
    }[name]:
        assert needed in commands
