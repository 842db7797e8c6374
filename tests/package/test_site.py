"""The documentation's site: what its navigation and API reference have, and what was built."""

import os
import re
from pathlib import Path

import pytest

import mapo_kernels as mk

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
NAVIGATION = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2].partition("\ntheme:")[0]
# Pages of the site that lie elsewhere in the repository: see docs/site/hooks.py.
ELSEWHERE = {"architecture.md", "gpu.md", "contributing.md", "security.md", "changelog.md"}
PUBLIC = {name for name in mk.__all__ if not name.startswith("__")}
# With arguments that only a running Python knows: docs/site/signatures.py.
AT_RUN_TIME = ("mapo_loss", "mapo_loss_from_logits", "mapo_loss_from_hidden", "make_plan")


def documented():
    """Names that a page of the reference documents."""
    text = "".join(path.read_text() for path in DOCS.glob("api/*.md"))
    return re.findall(r"^::: mapo_kernels\.(\w+)$", text, re.M)


def built():
    """Where the site was built, and the HTML of each of its pages."""
    if "MAPO_KERNELS_SITE" not in os.environ:
        pytest.skip("no site to look at: `make docs` builds one and sets MAPO_KERNELS_SITE")
    site = ROOT / os.environ["MAPO_KERNELS_SITE"]
    return site, {str(path.relative_to(site)): path.read_text() for path in site.rglob("*.html")}


def test_every_public_name_is_in_the_reference_once():
    assert sorted(documented()) == sorted(PUBLIC)


def test_every_page_is_in_the_navigation_once():
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    named = re.findall(r"[\w/]+\.md", NAVIGATION)
    assert pages | ELSEWHERE <= set(named) and len(named) == len(set(named))


def test_the_links_to_the_repository_are_those_of_the_package():
    link = re.search(r'link: "(.+)" }', (ROOT / "mkdocs.yml").read_text())[1]
    assert f'Homepage = "{link}"' in (ROOT / "pyproject.toml").read_text()


def test_every_variable_of_the_environment_is_explained():
    names = set()
    for path in [*ROOT.glob("mapo_kernels/**/*.py"), *ROOT.glob("benchmarks/*.py")]:
        names.update(re.findall(r"MAPO_KERNELS_[A-Z]+", path.read_text()))
    text = (DOCS / "api/backend.md").read_text()
    assert names and all(f"| `{name}` |" in text for name in names)


def test_what_runs_where_is_what_the_tests_and_ci_run():
    rows = [line.split(" | ") for line in (DOCS / "support.md").read_text().splitlines()]
    rows = [[cell.strip("| ") for cell in row] for row in rows if len(row) == 4][2:]
    said = {status: " ".join(row[1] for row in rows if row[2] == status) for *_, status, _ in rows}
    assert set(said) == {"run", "compiled", "untried"}
    constraints = {path.stem: path.read_text() for path in ROOT.glob("constraints*.txt")}
    torch, trl, verl = (
        re.search(rf"^{name}==([\d.]+)$", constraints[file], re.M)[1]
        for name, file in (
            ("torch", "constraints"),
            ("trl", "constraints-trl"),
            ("verl", "constraints-verl"),
        )
    )
    for name in (torch.removesuffix(".0"), f"TRL {trl}", f"verl {verl}"):
        assert name in said["run"]
    triton = re.search(r"^TRITONS \?= (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    assert all(version in said["run"] for version in triton)
    compiled = re.findall(r"sm_\d+|gfx\w+", said["compiled"])
    source = (ROOT / "benchmarks/machine_code.py").read_text()
    assert sorted(compiled) == sorted(re.findall(r'^    "(\w+)": GPUTarget\(', source, re.M))
    assert re.search("on a GPU", said["untried"])


def test_the_first_loss_is_what_the_page_says(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "index.md").read_text(), re.S)
    scope = {}
    exec(block, scope)
    assert scope["logprobs"].grad.abs().sum() > 0
    assert "tensor(0.5000)" in capsys.readouterr().out


def test_nothing_is_loaded_from_the_net():
    site, pages = built()
    tags = re.compile(
        r"<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>"
    )
    assert len(pages) > 10
    for name, html in pages.items():
        assert [tag for tag in tags.findall(html) if 'rel="canonical"' not in tag] == [], name
    for path in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import )[\"']?(?:https?:)?//", path.read_text()), path


@pytest.mark.parametrize("name", AT_RUN_TIME)
def test_signatures_are_those_of_run_time(name):
    html = built()[1][f"api/{'advantages' if name == 'make_plan' else 'losses'}.html"]
    here = html[html.index(f'id="mapo_kernels.{name}"') :].partition("</pre>")[0]
    text = re.sub(r"<[^>]+>", "", here)
    assert "group_weight: Tensor | None = None" in text and "spec: LossSpec = LossSpec()" in text
    assert "Unpack" not in html and "**arguments" not in text


def test_formulas_are_drawn_by_the_browser():
    for name, html in built()[1].items():
        assert "arithmatex" not in html, name
