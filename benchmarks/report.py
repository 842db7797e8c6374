"""Turn a result file of the benchmarks into the README's table.

python -m benchmarks.report benchmarks/results/NAME.json README.md
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
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


def insert(text, new):
    """`text` with what stands between the markers replaced."""
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{new}\n{END}{tail}"


def main(results, readme):
    path = Path(readme)
    path.write_text(insert(path.read_text(), table(json.loads(Path(results).read_text()))))


if __name__ == "__main__":
    main(*sys.argv[1:])
