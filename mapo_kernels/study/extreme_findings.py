"""What `study extreme` says: tables and sentences, each made from numbers in its result file."""

from __future__ import annotations

from typing import Any

from mapo_kernels.demo.styles import STYLES
from mapo_kernels.study.findings import names
from mapo_kernels.study.tables import Table, beside, number

Found = dict[str, Any]

TOLERANCE = 1e-5  # relative, or absolute below 1
BASE = "grpo"


def is_right(found: Found) -> bool:
    """Whether the advantages of the first success are those of the closed form."""
    pairs = [row[name] for row in found["first"] for name in ("success", "failure")]
    return all(abs(a - b) <= TOLERANCE * max(1, abs(b)) for a, b in pairs)


def tables(found: Found) -> list[Table]:
    """Signal over p, the first success, where MAPO is one function, and what options change."""
    return [_signal(found), _first(found), _reductions(found), _options(found), _shaped(found)]


def _percent(share: Found) -> str:
    low, high = (100 * x for x in share["interval"])
    simulated, expected = 100 * share["simulated"], 100 * share["expected"]
    return f"{expected:.1f} / {simulated:.1f} [{low:.1f}, {high:.1f}]"


def _signal(found: Found) -> Table:
    heads = ["G", "p", "groups with a gradient, %", "steps with a gradient, %", "mean lambda"]
    lines = [
        [
            str(row["group_size"]),
            f"{row['p']:g}",
            _percent(row["groups"]),
            _percent(row["steps"]),
            beside(*row["lambda"]["mapo"]),
        ]
        for row in found["signal"]
    ]
    title = "Expected / simulated [95% interval]; MAPO's lambda over groups with signal (expected)"
    return Table(title, heads, lines)


def _first(found: Found) -> Table:
    heads = ["G", "estimator", "A of the success", "gradient", "p after / before"]
    heads += ["clipped, %", "p after / before, Adam"]
    lines = [
        [
            str(row["group_size"]),
            STYLES[row["variant"]].label,
            beside(row["success"][0], row["success"][1], 2),
            number(row["gradient_norm"], 4),
            number(row["sgd"]["p_after"] / row["p_before"], 2),
            number(100 * row["sgd"]["clip_fraction"], 1),
            number(row["adam"]["p_after"] / row["p_before"], 2),
        ]
        for row in found["first"]
    ]
    return Table("The first success of G answers; one step of SGD, or of Adam", heads, lines)


def _reductions(found: Found) -> Table:
    heads = ["group", "estimator", "compared with", "lambda", "largest difference", "the same"]
    lines = [
        [
            row["case"],
            STYLES[row["variant"]].label,
            STYLES[row["single"]].label,
            number(row["lambda"]),
            number(row["difference"]),
            "yes" + ("" if row["any_signal"] else ", both 0") if row["same"] else "no",
        ]
        for row in found["reductions"]
    ]
    return Table("Where MAPO is a single function", heads, lines)


def _options(found: Found) -> Table:
    heads = ["G", "option", "success, MAPO", "success, GRPO", "0.1 credit, MAPO"]
    heads += ["0.1 credit, GRPO"]
    by_case: dict[tuple[int, str], dict[str, Found]] = {}
    for row in found["options"]:
        by_case.setdefault((row["group_size"], row["option"]), {})[row["variant"]] = row
    lines = [
        [
            str(size),
            option,
            *(number(of[x]["success"], 2) for x in ("mapo", BASE)),
            *(number(of[x]["credit"], 2) for x in ("mapo", BASE)),
        ]
        for (size, option), of in by_case.items()
    ]
    return Table("A of the one answer that is not 0, by option", heads, lines)


def _shaped(found: Found) -> Table:
    heads = ["how a success is told", "p", "lambda", "A of the best", "A of the worst"]
    lines = [
        [row["way"], *(number(row[x]) for x in ("p", "lambda", "best", "worst"))]
        for row in found["shaped"]
    ]
    row = found["shaped"][0]
    title = f"{row['right']} of {row['group_size']} answers right, rewards of 0.7 to 0.95; MAPO"
    return Table(title, heads, lines)


def sentences(found: Found) -> list[str]:
    """What the numbers allow to say."""
    return [
        _on_signal(found),
        *_on_first(found),
        _on_reductions(found),
        *_on_options(found),
        _on_shaped(found),
    ]


def against_mapo(found: Found) -> list[str]:
    """What does not favour MAPO."""
    size = max(row["group_size"] for row in found["options"])
    first, base = (
        next(x for x in found["first"] if (x["group_size"], x["variant"]) == (size, name))
        for name in ("mapo", BASE)
    )
    times = first["success"][0] / base["success"][0]
    lines = []
    if times > 1:
        lines.append(
            f"One success of {size} gets {number(times, 1)} times GRPO's advantage, with no bound "
            f"but max_abs."
        )
    small = min(row["group_size"] for row in found["options"])
    plain = next(
        x
        for x in found["options"]
        if (x["group_size"], x["variant"], x["option"]) == (small, "mapo", "none")
    )
    if plain["credit"] > plain["success"]:
        lines.append(
            f"In a failed group of {small} one 0.1 of format credit gets a larger advantage than "
            f"a first success does: {number(plain['credit'], 2)} and {number(plain['success'], 2)}."
        )
    threshold = found["shaped"][0]
    if threshold["lambda"] == 1:
        lines.append(
            f"It needs to know successes: with {threshold['right']} of {threshold['group_size']} "
            f"answers right and shaped rewards below the threshold it is the percent deviation "
            f"alone."
        )
    return lines


def _on_signal(found: Found) -> str:
    rows = found["signal"]
    inside = [
        low <= row[of]["expected"] <= high
        for row in rows
        for of in ("groups", "steps")
        for low, high in [row[of]["interval"]]
    ]
    rarest = min(rows, key=lambda x: (x["group_size"], x["p"]))
    same = all(row["same_for_all"] for row in rows)
    which = "the same groups" if same else "DIFFERENT groups"
    return (
        f"With a success probability of {rarest['p']:g} and G = {rarest['group_size']}, "
        f"{100 * rarest['groups']['expected']:.1f}% of groups and "
        f"{100 * rarest['steps']['expected']:.1f}% of steps of {found['settings']['groups']} "
        f"groups have a gradient, and as many with 1 - p: no estimator changes that, all have "
        f"{which} with signal. The analytic share lies in {sum(inside)} of {len(inside)} "
        f"simulated 95% intervals."
    )


def _on_first(found: Found) -> list[str]:
    first = {(row["group_size"], row["variant"]): row for row in found["first"]}
    small, large = (f(row["group_size"] for row in found["first"]) for f in (min, max))

    lifts = {x: first[small, x]["sgd"]["p_after"] / first[small, x]["p_before"] for _, x in first}
    clipped = [x for x in lifts if first[small, x]["sgd"]["clip_fraction"] > 0]
    adam = [first[small, x]["adam"]["p_after"] / first[small, x]["p_before"] for x in lifts]
    spread, of_adam = (max(x) / min(x) for x in (list(lifts.values()), adam))
    lines = [
        f"The first success of {small} answers gets A = "
        f"{number(first[small, 'mapo']['success'][0], 1)} from MAPO and "
        f"{number(first[small, BASE]['success'][0], 1)} from GRPO; of {large}, "
        f"{number(first[large, 'mapo']['success'][0], 1)} and "
        f"{number(first[large, BASE]['success'][0], 1)}.",
        f"One step of SGD at one learning rate multiplies its probability by "
        f"{number(lifts['mapo'], 2)} with MAPO, {number(lifts['apd'], 2)} with APD only, "
        f"{number(lifts[BASE], 2)} with GRPO and {number(lifts['mean'], 2)} with r - mean "
        f"(G = {small}). A second update on the same answers clips tokens of: {names(clipped)}.",
        f"The largest of these is {number(spread, 2)} times the smallest; after the first step of "
        f"Adam, which divides by the size of the gradient, {number(of_adam, 2)} times.",
    ]
    if small != large:
        grown = {
            x: first[large, x]["gradient_norm"] / first[small, x]["gradient_norm"] for x in lifts
        }
        falls, stays = (
            ", ".join(f"{STYLES[x].label} {number(y, 2)}" for x, y in grown.items() if (y < 1) == z)
            for z in (True, False)
        )
        lines.append(
            f"From G = {small} to G = {large} the norm of its gradient falls, to this share: "
            f"{falls or 'none'}. It does not fall: {stays or 'none'}."
        )
    return lines


def _on_reductions(found: Found) -> str:
    live = [row for row in found["reductions"] if row["any_signal"]]
    same = [f"{row['case']} ({STYLES[row['single']].label})" for row in live if row["same"]]
    other = [row["case"] for row in live if not row["same"]]
    return (
        f"A single function is what remains of MAPO where: {'; '.join(same)}. "
        f"It stays a mixture where: {'; '.join(other) or 'nowhere'}."
    )


def _on_options(found: Found) -> list[str]:
    size = min(row["group_size"] for row in found["options"])
    rows = {
        (row["option"], row["variant"]): row
        for row in found["options"]
        if row["group_size"] == size
    }
    plain = rows["none", "mapo"]
    changes = "; ".join(
        f"{option} makes it {number(row['success'], 2)}"
        for (option, variant), row in rows.items()
        if variant == "mapo" and option != "none"
    )
    credit = plain["credit"] >= plain["success"]
    than = "more than" if credit else "less than"
    return [
        f"MAPO's A of the first success of {size} is {number(plain['success'], 2)}: {changes}.",
        f"One 0.1 of format credit in a failed group of {size} gets A = "
        f"{number(plain['credit'], 2)} from MAPO, {than} the first success; "
        f"{number(rows['none', BASE]['credit'], 2)} from GRPO.",
    ]


def _on_shaped(found: Found) -> str:
    ways = "; ".join(
        f"{row['way']}: p = {row['p']:g}, lambda = {row['lambda']:g}" for row in found["shaped"]
    )
    row = found["shaped"][0]
    return (
        f"Where {row['right']} of {row['group_size']} answers are right but none has a reward of "
        f"1, MAPO depends on how it learns of successes: {ways}."
    )
