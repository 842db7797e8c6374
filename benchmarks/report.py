"""The tables of the pages and of the terminal, from result files: no number is typed by hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .providers import OURS

Row = dict[str, Any]
CASE = ("level", "shape", "live", "group_size", "padding", "no_signal")


def table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table as Markdown."""
    first, *others = (f"| {' | '.join(cells)} |" for cells in (heads, *lines))
    return "\n".join([first, "|---" * len(heads) + "|", *others])


def by_case(rows: list[Row]) -> list[dict[str, Row]]:
    """The rows of each case in which ours was measured, by provider."""
    cases: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(tuple(row[key] for key in CASE), {})[row["provider"]] = row
    return [found for found in cases.values() if found.get(OURS, {}).get("status") == "ok"]


def times(row: Row, ours: Row) -> float:
    """How many times longer than ours a row takes, both timed alike.

    Where one is a graph's replay and the other is not, both are as launched from Python.
    """
    if row["timer"] == ours["timer"]:
        return row["median_ms"] / ours["median_ms"]
    theirs, own = (x["launched_ms"] or x["median_ms"] for x in (row, ours))
    return theirs / own


def megabytes(nbytes: float) -> str:
    return f"{nbytes / 1e6:.0f}" if nbytes >= 1e9 else f"{nbytes / 1e6:.3g}"


def _peer(row: Row | None, ours: Row) -> str:
    """A peer's cell: its time over ours, its peak memory."""
    if row is None or row["status"] == "unavailable":
        return "-"
    if row["status"] != "ok":
        return row["status"]
    return f"{times(row, ours):.2f} ({megabytes(row['peak_bytes'])} MB)"


def level_table(level: str, rows: list[Row]) -> str:
    """One level: a row a case, ours in ms, peers as multiples of it."""
    measured = dict.fromkeys(row["provider"] for row in rows if row["status"] != "unavailable")
    peers = [name for name in measured if name != OURS]
    lines = []
    for found in by_case(rows):
        ours = found[OURS]
        own = [
            ours["shape"],
            f"{ours['live']:.0%}",
            f"{ours['median_ms']:.3g}",
            f"{ours['percent_of_roof']:.1f}% of {ours['roof']}",
            megabytes(ours["peak_bytes"]),
        ]
        lines.append(own + [_peer(found.get(name), ours) for name in peers])
    return table([level, "live", f"{OURS}, ms", "of the roof", "peak MB", *peers], lines)


def host_table(rows: list[Row]) -> str:
    """What each call costs its caller: a row a call, a column a provider, in microseconds."""
    names = list(dict.fromkeys(row["provider"] for row in rows))
    calls: dict[str, list[str]] = {row["level"]: ["-"] * len(names) for row in rows}
    for row in rows:
        cell = f"{row['median_us']:.3g} ({row['launches']})"
        calls[row["level"]][names.index(row["provider"])] = cell
    return table(["call, us (launches)", *names], [[x, *cells] for x, cells in calls.items()])


def startup_table(rows: list[Row]) -> str:
    """What a process waits for: a row a command, its median and the fastest and slowest sample."""
    lines = []
    for row in rows:
        times = (row["median_ms"], min(row["samples_ms"]), max(row["samples_ms"]))
        lines.append([row["level"], row["provider"], *[f"{x:.0f}" for x in times]])
    return table(["command", "of", "ms", "fastest", "slowest"], lines)


# What is measured without cases: its table of rows that are ok, and what their times are.
SPECIAL = {
    "host": (host_table, "Medians of what a call takes its caller."),
    "startup": (startup_table, "Medians of processes by the wall clock."),
}


def about(found: Row) -> str:
    """Where a result was measured, and what bounds it."""
    where = found["environment"]
    versions, commit = where["versions"], (where["commit"] or "unknown")[:9]
    text = f"{where['device']}, {where['threads']} threads, torch {versions['torch']}, "
    text += f"triton {versions['triton']}, commit {commit}"
    text += " with changes" if where["dirty"] else ""
    if found["suite"] in SPECIAL:
        text += f". {SPECIAL[found['suite']][1]}"
    else:
        roofs = found["roofs"]
        text += f"; copy {roofs['copy_gigabytes_per_second']:.3g} GB/s"
        text += f", launch {roofs['launch_microseconds']:.2g} us"
        for name, rate in roofs["products_teraflops_per_second"].items():
            text += f", products {name} {rate:.3g} TFLOP/s"
        text += ". Medians; peers as multiples of our time, their peak memory in brackets."
    if not found.get("finished", True):
        text += " The run was cut short: rows are missing."
    return text + (" Dry run: the times mean nothing." if found["dry_run"] else "")


def notes(found: Row) -> list[str]:
    """What was not measured, and why: a sentence each."""
    bad, absent = [], []
    for row in found["rows"]:
        if row["status"] == "unavailable":
            absent.append(f"{row['level']}: {row['provider']}: {row['reason']}")
        elif row["status"] != "ok":
            error = row.get("error")
            off = "" if error is None else f" (relative error {error:.1e})"
            case = ", ".join(row[key] for key in ("level", "shape", "direction") if key in row)
            bad.append(f"{case}: {row['provider']}: {row['status']}, {row['reason']}{off}")
    titles = {"Wrong or failed": bad, "Not measured": absent}
    return [f"{x}: {'; '.join(dict.fromkeys(lines))}." for x, lines in titles.items() if lines]


def markdown(found: Row) -> str:
    """A result file as Markdown: where and what bounds it, a table a level, what was left out."""
    rows = found["rows"]
    if found["suite"] in SPECIAL:
        tables = [SPECIAL[found["suite"]][0]([row for row in rows if row["status"] == "ok"])]
    else:
        levels = dict.fromkeys(row["level"] for row in rows)
        tables = [level_table(x, [row for row in rows if row["level"] == x]) for x in levels]
    return "\n\n".join([about(found), *tables, *notes(found)])


def insert(text: str, name: str, new: str) -> str:
    """`text` with what stands between the markers of `name` replaced; ValueError without them."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"expected one {begin} and one {end} in the file")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{new}\n{end}{rest.split(end)[1]}"
