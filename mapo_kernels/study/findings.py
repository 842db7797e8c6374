"""What `study synthetic` says: tables and sentences, each made from numbers in its result file."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mapo_kernels.demo.styles import STYLES
from mapo_kernels.study.analytic import FAILED, HIGH, LOW, PAPER_GROUPS, VARIANTS
from mapo_kernels.study.tables import Table, beside, number

Found = dict[str, Any]

SAME = 1e-4  # advantages that differ by less are the same


def paper_advantages(found: Found, group: str, variant: str) -> list[float]:
    """The advantages of one of the paper's groups, with the paper's deviation (c = 0)."""
    return [
        row["measured"]
        for row in found["rows"]
        if (row["kind"], row["group"], row["variant"]) == ("paper", group, variant)
        and row["std_correction"] == 0
        and row["quantity"] != "lambda"
    ]


def names(variants: Iterable[str]) -> str:
    """Estimators as they are called in plots, or "none"."""
    return ", ".join(STYLES[x].label for x in variants) or "none"


def synthetic_tables(found: Found) -> list[Table]:
    """Known success ratios at the largest group size, and the groups of the paper."""
    size = max(found["settings"]["group_sizes"])
    rows = [x for x in found["rows"] if x["std_correction"] == 1 and x.get("group_size") == size]
    lines = []
    for successes in sorted({0, 1, size // 2, size - 1, size}):
        for variant in VARIANTS:
            of_it = {
                x["quantity"]: beside(x["measured"], x["expected"])
                for x in rows
                if x["variant"] == variant and x["successes"] == successes
            }
            cells = [of_it.get(x, "-") for x in ("lambda", "success", "failure", "rho")]
            lines.append([f"{successes} of {size}", STYLES[variant].label, *cells])
    heads = ["successes", "estimator", "lambda", "A of a success", "A of a failure", "rho"]
    known = Table(f"Groups of {size}: computed (closed form), c = 1", heads, lines)
    paper = [
        [_text_of(group), STYLES[variant].label, *_cells_of_the_paper(found, group, variant)]
        for group in (HIGH, LOW, FAILED)
        for variant in VARIANTS
    ]
    heads = ["rewards", "estimator", "lambda", "A of the lowest", "A of the highest"]
    return [known, Table("The paper's groups: computed (closed form), c = 0", heads, paper)]


def _text_of(group: str) -> str:
    return ", ".join(f"{r:g}" for r in PAPER_GROUPS[group])


def _cells_of_the_paper(found: Found, group: str, variant: str) -> list[str]:
    rows = [
        x
        for x in found["rows"]
        if (x["kind"], x["group"], x["variant"]) == ("paper", group, variant)
        and x["std_correction"] == 0
    ]
    # lambda, then the advantages in ascending order of their rewards.
    return [beside(x["measured"], x["expected"]) for x in (rows[0], rows[1], rows[-1])]


def synthetic(found: Found) -> list[str]:
    """Whether every number is right, and what the paper's examples become."""
    return [*_agreement(found["rows"]), _reversion(found), _mirror(found), *_gradient(found)]


def against_mapo(found: Found) -> list[str]:
    """What does not favour MAPO."""
    high, low = (_lowest(found, group, "mapo") for group in (HIGH, LOW))
    if high <= low + SAME:
        return []
    return [
        f"On the paper's own example of advantage reversion it keeps the reversion: |A| of "
        f"{number(high, 2)} in [{_text_of(HIGH)}], {number(low, 2)} in [{_text_of(LOW)}] "
        f"(GRPO: {number(_lowest(found, HIGH, 'grpo'), 2)} and "
        f"{number(_lowest(found, LOW, 'grpo'), 2)})."
    ]


def _agreement(rows: list[Found]) -> list[str]:
    wrong = [x for x in rows if not x["ok"]]
    exact = [x for x in rows if x["kind"] != "printed"]
    worst = max(abs(x["measured"] - x["expected"]) / max(1, abs(x["expected"])) for x in exact)
    if not wrong:
        return [
            f"{len(rows)} numbers were compared with what they must be: all agree. The largest "
            f"difference from a closed form is {worst:.1e} (absolute, or relative above 1)."
        ]
    said = [
        f"WRONG: {x['kind']}, {x['group']}, {STYLES[x['variant']].label}, c = "
        f"{x['std_correction']}: {x['quantity']} is {x['measured']:.6g}, and must be "
        f"{x['expected']:.6g}."
        for x in wrong[:10]
    ]
    return [f"{len(wrong)} of {len(rows)} numbers differ from what they must be.", *said]


def _reversion(found: Found) -> str:
    harder = {x: _lowest(found, HIGH, x) > _lowest(found, LOW, x) + SAME for x in VARIANTS}
    examples = "; ".join(
        f"{STYLES[x].label} {number(_lowest(found, HIGH, x), 2)} against "
        f"{number(_lowest(found, LOW, x), 2)}"
        for x in ("grpo", "apd", "mapo")
    )
    remains = "remains with" if harder["mapo"] else "is gone with"
    return (
        f"Advantage reversion, the paper's example: |A| of the lowest reward in [{_text_of(HIGH)}] "
        f"against that in [{_text_of(LOW)}] is {examples}. The reversion {remains} MAPO. "
        f"The nearly certain group is punished harder by: {names(x for x in harder if harder[x])}; "
        f"not by: {names(x for x in harder if not harder[x])}."
    )


def _lowest(found: Found, group: str, variant: str) -> float:
    return abs(paper_advantages(found, group, variant)[0])


def _mirror(found: Found) -> str:
    def gap(variant: str) -> float:
        pairs = zip(
            paper_advantages(found, HIGH, variant),
            paper_advantages(found, FAILED, variant),
            strict=True,
        )
        return max(abs(a - b) for a, b in pairs)

    same = [x for x in VARIANTS if gap(x) < SAME]
    mapo = [paper_advantages(found, group, "mapo")[0] for group in (HIGH, FAILED)]
    return (
        f"Advantage mirror, the paper's example: [{_text_of(HIGH)}] and [{_text_of(FAILED)}] get "
        f"the same advantages from: {names(same)}. With MAPO the lowest of each gets "
        f"{number(mapo[0], 2)} and {number(mapo[1], 2)}."
    )


def _gradient(found: Found) -> list[str]:
    size = max(found["settings"]["group_sizes"])
    rho = {
        x["successes"]: x["measured"]
        for x in found["rows"]
        if x["kind"] == "gradient" and x["variant"] == "mapo"
        if x["std_correction"] == 1 and x["group_size"] == size
    }
    if size < 4:
        return []
    return [
        f"Size of the gradient: with 1 success of {size} MAPO's is {number(rho[1], 2)} times "
        f"GRPO's, with {size // 2} it is {number(rho[size // 2], 2)} times, and with {size - 1} "
        f"{number(rho[size - 1], 2)} times. A comparison of the two at one learning rate is also a "
        f"comparison of step sizes."
    ]
