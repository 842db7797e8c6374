"""The README's tables, from result files: no number in them is typed by hand."""

from __future__ import annotations

from typing import Any

from .case import OURS
from .console import left_out, size

Row = dict[str, Any]


def _case(row: Row) -> tuple[Any, ...]:
    same = ("level", "shape", "direction", "live", "group_size", "padding", "no_signal")
    return tuple(row[key] for key in same)


def _peer(row: Row, ours: Row | None) -> str:
    """A peer's cell: its time over ours, its peak memory."""
    if row["status"] == "unavailable":
        return "-"
    if row["status"] != "ok":
        return row["status"]
    memory = size(row.get("peak_bytes"))
    times = f"{row['median_ms'] / ours['median_ms']:.2f}" if ours else f"{row['median_ms']:.3g} ms"
    return f"{times} ({memory} MB)" if memory else times


def level_table(level: str, rows: list[Row]) -> list[str]:
    """Markdown of one level: a row a case, ours in ms, peers as multiples of it."""
    measured = {row["provider"] for row in rows if row["status"] != "unavailable"}
    peers = [x for x in dict.fromkeys(row["provider"] for row in rows) if x in measured - {OURS}]
    heads = [level, "live", f"{OURS}, ms", "of the roof", "peak MB", *peers]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    cases: dict[tuple[Any, ...], dict[str, Row]] = {}
    # A provider may do backward's work in forward: only whole steps compare.
    for row in (row for row in rows if row["direction"] in ("both", "score")):
        cases.setdefault(_case(row), {})[row["provider"]] = row
    for found in cases.values():
        ours = found.get(OURS)
        if ours is None or ours["status"] != "ok":
            continue
        cells = [
            ours["shape"],
            f"{ours['live']:.0%}",
            f"{ours['median_ms']:.3g}",
            f"{ours['percent_of_roof']:.1f}% of {ours['roof']}",
            size(ours["peak_bytes"]),
            *[_peer(found[name], ours) if name in found else "-" for name in peers],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def markdown(results: dict[str, Any]) -> str:
    """A result file as Markdown: where and what bounds it, a table a level, what was left out."""
    where, roofs = results["environment"], results["roofs"]
    versions = where["versions"]
    products = roofs["products_teraflops_per_second"]
    about = (
        f"{where['device']}, {where['threads']} threads, torch {versions['torch']}, triton "
        f"{versions['triton']}, commit {(where['commit'] or 'unknown')[:9]}"
        f"{' with changes' if where['dirty'] else ''}; copy "
        f"{roofs['copy_gigabytes_per_second']:.3g} GB/s, launch "
        f"{roofs['launch_microseconds']:.2g} us"
        + "".join(f", products {name} {rate:.3g} TFLOP/s" for name, rate in products.items())
        + ". Medians; peers as multiples of our time, their peak memory in brackets."
    )
    lines = [about]
    levels: dict[str, list[Row]] = {}
    for row in results["rows"]:
        levels.setdefault(row["level"], []).append(row)
    for level, rows in levels.items():
        lines += ["", *level_table(level, rows)]
    absent = left_out(results["rows"])
    if absent:
        lines += ["", "Not measured: " + "; ".join(absent) + "."]
    return "\n".join(lines)


def insert(text: str, name: str, new: str) -> str:
    """`text` with what stands between the markers of `name` replaced; ValueError without them."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"expected one {begin} and one {end} in the README")
    head, rest = text.split(begin)
    _, tail = rest.split(end)
    return f"{head}{begin}\n{new}\n{end}{tail}"
