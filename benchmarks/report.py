"""Turn result files of the benchmarks into the README's tables.

python -m benchmarks.report README.md benchmarks/results/NAME.json ...

A file's table goes between the README's markers of its name.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

OURS = "mapo_kernels"


def table(results):
    """Markdown: a row per measurement, milliseconds and the time of each peer over ours."""
    groups = defaultdict(dict)
    for row in results["benchmarks"]:
        groups[row["group"]][row["params"]["provider"]] = row["stats"]["median"] * 1e3
    machine = results["machine_info"]
    lines = [
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, backend "
        f"{machine['backend'].split()[0]}, commit {results['commit_info']['id'][:9]}; medians.",
        "",
        "| | provider | ms | times ours |",
        "|---|---|---|---|",
    ]
    for group, rows in groups.items():
        for provider, time in rows.items():
            ratio = "" if provider == OURS else f"{time / rows[OURS]:.2f}"
            lines.append(f"| {group} | {provider} | {time:.3g} | {ratio} |")
            group = ""
    return "\n".join(lines)


def insert(text, name, new):
    """`text` with what stands between the markers of `name` replaced."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    head, rest = text.split(begin)
    _, tail = rest.split(end)
    return f"{head}{begin}\n{new}\n{end}{tail}"


def main(readme, *results):
    path = Path(readme)
    for result in map(Path, results):
        new = table(json.loads(result.read_text()))
        path.write_text(insert(path.read_text(), result.stem, new))


if __name__ == "__main__":
    main(*sys.argv[1:])
