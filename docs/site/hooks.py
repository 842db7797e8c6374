"""What mkdocs does beyond its configuration: files beside docs/, and formulas.

Pages are Markdown that also reads well in the repository. So links out of docs/ are written as they
are there (`../ARCHITECTURE.md`), and become links within the site here.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
# Pages that lie elsewhere in the repository, by their name on the site.
PAGES = {
    "architecture.md": "ARCHITECTURE.md",
    "gpu.md": "benchmarks/GPU.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "changelog.md": "CHANGELOG.md",
}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)#\s]+)(?=[)#])")
FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.S
)


def _source(uri: str) -> str:
    """Where a file of the site lies in the repository."""
    beside = uri.removeprefix("files/") if uri.startswith("files/") else None
    return beside or PAGES.get(uri) or f"docs/{uri}"


def _uri(path: str) -> str:
    """Where a file of the repository lies on the site."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return {there: uri for uri, there in PAGES.items()}.get(path, f"files/{path}")


def _linked(text: str, uri: str) -> list[str]:
    """The files of the repository that a page links to."""
    folder = posixpath.dirname(_source(uri))
    paths = [posixpath.normpath(posixpath.join(folder, link)) for link in LINK.findall(text)]
    return [path for path in paths if (ROOT / path).is_file()]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages that lie elsewhere, and every file that a page links to."""
    for uri, path in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    for page in files.documentation_pages():
        for path in _linked(page.content_string, page.src_uri):
            uri = _uri(path)
            if uri.startswith("files/") and files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Links of the repository become links of the site; those to folders lead to the repository."""
    uri = page.file.src_uri
    folder = posixpath.dirname(_source(uri))

    def moved(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link[0]))
        if (ROOT / path).is_dir():
            return f"{config.extra['social'][0]['link']}/tree/main/{path}"
        if not (ROOT / path).is_file():
            return link[0]
        return posixpath.relpath(_uri(path), posixpath.dirname(uri) or ".")

    return LINK.sub(moved, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Formulas become MathML, which browsers draw by themselves."""

    def drawn(found: re.Match[str]) -> str:
        tex = found["tex"].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
        return convert(tex, display="block" if found["tag"] == "div" else "inline")

    return FORMULA.sub(drawn, html)
