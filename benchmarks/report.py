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
    if "benchmarks" not in results:
        return zero_signal_table(results)
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


def zero_signal_table(result):
    """Markdown: what `benchmarks/trl_zero_signal.py` measured, and what was saved."""
    versions = result["versions"]
    whole, dropping = result["runs"]
    lines = [
        f"{result['machine']}, torch {versions['torch']}, trl {versions['trl']}, commit "
        f"{result['commit']}; {result['parameters'] / 1e6:.1f}M parameters, the demo's task, "
        f"{result['steps']} steps, seed 0.",
        "",
        "| | groups without signal | forward and backward, s | all else, s | success after |",
        "|---|---|---|---|---|",
    ]
    for name, run in (("every sequence", whole), ("`drop_zero_signal`", dropping)):
        lines.append(
            f"| {name} | {run['groups_without_signal']:.0%} | {run['model_seconds']:.1f} | "
            f"{run['preparing_seconds']:.1f} | {run['success_before_and_after'][-1]:.3f} |"
        )
    saved = 1 - dropping["model_seconds"] / whole["model_seconds"]
    lines += ["", f"Saved: {saved:.0%} of forward and backward."]
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
