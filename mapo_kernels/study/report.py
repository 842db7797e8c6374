"""`study report OUT`: a page of what the result files in a folder say, as HTML and as Markdown.

Every table, plot and sentence is made from the files; what they do not have is said to be missing.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mapo_kernels.files import CommandError, require

TITLE = "MAPO's open questions, tried out"
DOTS = 80  # per inch, of the plots


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to a parser."""
    parser.add_argument("out", type=Path, metavar="OUT", help="folder with result files")
    page = "also write the page as Markdown, with its plots beside it as study_*.png"
    parser.add_argument("--markdown", type=Path, metavar="FILE", help=page)


def main(args: argparse.Namespace) -> int:
    """Write OUT/report.html, and the Markdown file; returns the exit code.

    Raises:
        CommandError: the folder has no result file, or one that is none.
    """
    require("demo", "matplotlib", "rich", "jsonschema", "markdown_it")
    from mapo_kernels.files import write_whole
    from mapo_kernels.study import page
    from mapo_kernels.study.report_parts import Results, figures, markdown

    results = Results.read(args.out)
    if not results:
        raise CommandError(f"{args.out}: expected result files of a study, found none")
    drawn = figures(results)
    images = {f"study_{name}.png": _png(figure) for name, figure in drawn.items()}
    text = markdown(results, TITLE, drawn)
    write_whole(args.out / "report.html", page.as_html(text, TITLE, images).encode())
    written = [args.out / "report.html"]
    if args.markdown is not None:
        write_whole(args.markdown, text.encode())
        for name, content in images.items():
            write_whole(args.markdown.parent / name, content)
        written.append(args.markdown)
    print(f"{', '.join(map(str, written))}: {len(images)} plots")
    return 0


def _png(figure: Any) -> bytes:
    import io

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS)
    return buffer.getvalue()
