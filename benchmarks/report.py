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
    """Markdown: a row per measurement, milliseconds and the time of each peer over ours.

    And the peak memory beside the inputs, where it was taken.
    """
    groups = defaultdict(dict)
    memory = {}
    for row in results["benchmarks"]:
        group, provider = row["group"], row["params"]["provider"]
        groups[group][provider] = row["stats"]["median"] * 1e3
        if "extra_bytes" in row["extra_info"]:
            memory[group, provider] = f"{row['extra_info']['extra_bytes'] / 1e6:.0f}"
    machine = results["machine_info"]
    lines = [
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, backend "
        f"{machine['backend'].split()[0]}, commit {results['commit_info']['id'][:9]}; medians.",
        "",
        "| | provider | ms | times ours |" + (" MB extra |" if memory else ""),
        "|---|---|---|---|" + ("---|" if memory else ""),
    ]
    for group, rows in groups.items():
        for i, (provider, time) in enumerate(rows.items()):
            ratio = "" if provider == OURS else f"{time / rows[OURS]:.2f}"
            more = f" {memory.get((group, provider), '')} |" if memory else ""
            lines.append(f"| {'' if i else group} | {provider} | {time:.4g} | {ratio} |{more}")
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
