"""Instructions that a row's program executes beside its loops, by NVIDIA's machine code."""

import re

import networkx

from benchmarks.machine_code import SASS, disassembly


def scalar_instructions(kernel, tiles, vector=8):
    """Instructions outside the main loops of the two passes over a row.

    The fewest on any way through the branches: before the first pass, between the two, after the
    second. A warp executes each of them once a row, whatever the row holds; what only some rows
    need (a mask to count, exact sums) is left out.
    """
    names, jumps, lines = SASS.parse(disassembly(kernel))
    loops = {}
    for end, start in jumps.items():
        body = names[start : end + 1]
        wide = sum(bool(re.match(SASS.counted["wide_loads"], name)) for name in body)
        if start < end and wide == tiles and body.count("MUFU.EX2") >= tiles * vector:
            stores = sum(name.startswith("STG") for name in body)
            loops[stores] = min(loops.get(stores, (len(body), start, end)), (len(body), start, end))
    (_, first, first_end), (_, second, second_end) = loops[0], loops[tiles]
    ways = networkx.DiGraph(edges(names, jumps, lines))
    parts = {
        "before": (0, first),
        "between": (first_end + 1, second),
        "after": (second_end + 1, len(names)),
    }
    return {part: networkx.shortest_path_length(ways, *ends) for part, ends in parts.items()}


def edges(names, jumps, lines):
    """Which instruction may follow which; the kernel's end is one past the last."""
    for i, (name, line) in enumerate(zip(names, lines, strict=True)):
        may_pass = re.search(r"\s@!?U?P|BRA(\.DIV)? !?U", line) or re.search(r"BRA !?U?P", line)
        if may_pass or not (i in jumps or name in ("EXIT", "RET")):
            yield i, i + 1
        if i in jumps:
            yield i, jumps[i]
        if name == "EXIT":
            yield i, len(names)
