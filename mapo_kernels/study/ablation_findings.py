"""What `study ablation` says: tables and sentences, each made from statistics over its records.

A difference is stated where its interval excludes 0, and nowhere else.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from statistics import median
from typing import NamedTuple

from mapo_kernels.demo.styles import STYLES
from mapo_kernels.study.ablation_results import (
    BASE,
    EQUAL,
    MEASURE_NAMES,
    MEASURES,
    Ablation,
    Setting,
)
from mapo_kernels.study.comparisons import Estimate, rate_by_chance
from mapo_kernels.study.settings import RATE_SEEDS, RATES, READ_SUCCESS, REGIMES
from mapo_kernels.study.statistics import chosen_rates
from mapo_kernels.study.tables import Table

FORMS = ("mapo-linear", "mapo-entropy", "mapo-step", "mapo-0.5")  # beside the paper's
OTHERS = ("apd", "mean", "rloo", "dapo")  # that mix nothing; GRPO is compared with all


class Comparison(NamedTuple):
    """One estimator against another, or against itself in another setting."""

    question: str
    where: str
    measure: str
    ours: str
    theirs: str
    found: Estimate

    @property
    def verdict(self) -> str:
        """What the interval allows to say."""
        if self.found.low is None:
            return "one seed allows no statement"
        if not self.found.excludes_zero:
            return "no difference found"
        return "higher" if self.found.value > 0 else "lower"

    @property
    def text(self) -> str:
        """Who, by how much."""
        return f"{self.ours} {self.found.text(sign='+')}"


def comparisons(ablation: Ablation) -> list[Comparison]:
    """Everything that is compared, whatever comes out."""
    return [
        *_against_grpo(ablation),
        *_against_mapo(ablation),
        *_threshold(ablation),
    ]


def _settings(ablation: Ablation, stage: str) -> Iterator[Setting]:
    """Those with binary rewards that have runs."""
    for regime in REGIMES:
        setting = Setting(stage, regime, "binary")
        if ablation.estimators(setting):
            yield setting


def _pairs(
    ablation: Ablation, question: str, setting: Setting, names: Iterable[str], base: str
) -> Iterator[Comparison]:
    for name in names:
        for measure in MEASURES:
            found = ablation.against(setting, name, base, measure)
            if found is not None and name != base:
                labels = STYLES[name].label, STYLES[base].label
                yield Comparison(question, setting.text, measure, *labels, found)


def _against_grpo(ablation: Ablation) -> Iterator[Comparison]:
    for stage, question in (("main", "estimator"), ("norm", "step size")):
        for setting in _settings(ablation, stage):
            yield from _pairs(ablation, question, setting, ablation.estimators(setting), BASE)
    setting = Setting("main", "mixed", "partial")
    yield from _pairs(ablation, "rewards", setting, ablation.estimators(setting), BASE)
    # GRPO does not read successes: with success= it would be the same.
    known = setting._replace(reward="partial-success")
    for name in ablation.estimators(known):
        for measure in MEASURES:
            found = ablation.between((known, name), (setting, BASE), measure)
            if found is not None:
                labels = STYLES[name].label, STYLES[BASE].label
                yield Comparison("rewards", known.text, measure, *labels, found)


def _against_mapo(ablation: Ablation) -> Iterator[Comparison]:
    for setting in _settings(ablation, "main"):
        yield from _pairs(ablation, "lambda", setting, FORMS, "mapo")
        yield from _pairs(ablation, "mapo", setting, OTHERS, "mapo")


def _threshold(ablation: Ablation) -> Iterator[Comparison]:
    """The default threshold against success known apart, where rewards are continuous."""
    known = Setting("main", "mixed", "partial-success")
    guessed = Setting("main", "mixed", "partial")
    for name in READ_SUCCESS:
        for measure in MEASURES:
            found = ablation.between((known, name), (guessed, name), measure)
            if found is not None:
                labels = STYLES[name].label, "itself with the default threshold"
                yield Comparison("threshold", "mixed, partial rewards", measure, *labels, found)


QUESTIONS = {
    "estimator": "Is an estimator better than GRPO, each at its own learning rate?",
    "step size": "Is it, at equal gradient norms and one learning rate?",
    "lambda": "Does the form of lambda(p) matter? (against the paper's quadratic)",
    "mapo": "Is an estimator that mixes nothing better than MAPO?",
    "rewards": "Is an estimator better than GRPO with continuous rewards?",
    "threshold": "Does MAPO gain from being told successes, where rewards are continuous?",
}


class Answer(NamedTuple):
    """To one question: in short, and what was found in each setting."""

    question: str
    short: str
    lines: list[str]


def answers(ablation: Ablation) -> dict[str, Answer]:
    """To every question that there are runs for."""
    every = comparisons(ablation)
    found = {}
    for name, question in QUESTIONS.items():
        of_it = [x for x in every if x.question == name]
        if of_it:
            found[name] = Answer(question, counted(of_it), _by_setting(of_it))
    return found


def counted(of_it: Sequence[Comparison]) -> str:
    """How many comparisons there were, and how they came out."""
    kinds = Counter(x.verdict for x in of_it)
    with_interval = [x for x in of_it if x.found.low is not None]
    parts = [f"{kinds[x]} {x}" for x in ("higher", "lower") if kinds[x]]
    if kinds["no difference found"]:
        parts.append(f"no difference found in {kinds['no difference found']}")
    if len(with_interval) < len(of_it):
        few = len(of_it) - len(with_interval)
        parts.append(f"one seed allows no statement in {few}")
    chance = f"about {by_chance(with_interval):.1f} would exclude 0 by chance alone"
    return f"Of {len(of_it)} comparisons: {', '.join(parts)} ({chance})."


def rates(ablation: Ablation) -> str:
    """Which learning rates were tried and chosen, and what that leaves open."""
    tried, chosen, at_an_end = [], [], False
    for regime, grid in RATES.items():
        tried.append(f"{regime} {', '.join(f'{rate:g}' for rate in grid)}")
        of_it = chosen_rates(ablation.records, regime)
        at_an_end = at_an_end or any(rate in (min(grid), max(grid)) for rate in of_it.values())
        if of_it:
            usual = statistics.mode(of_it.values())
            others = [f"{STYLES[x].label} {rate:g}" for x, rate in of_it.items() if rate != usual]
            chosen.append(f"{regime} {usual:g}" + (f" ({', '.join(others)})" if others else ""))
    beyond = " Where an end of a grid was chosen, better ones may lie beyond." if at_an_end else ""
    return (
        f"Learning rates tried: {'; '.join(tried)}. Chosen: {'; '.join(chosen) or 'none yet'}. "
        f"{len(RATE_SEEDS)} seeds choose with noise, and an estimator with another rate than GRPO "
        f"may differ from it for that alone.{beyond}"
    )


def by_chance(compared: Iterable[Comparison]) -> float:
    """How many of these intervals would exclude 0 if there were no differences at all."""
    return sum(rate_by_chance(x.found.seeds) for x in compared)


def chances(compared: Iterable[Comparison]) -> str:
    """That rate for each number of seeds."""
    seeds = sorted({x.found.seeds for x in compared})
    return ", ".join(f"{rate_by_chance(n):.0%} of those of {n} seeds" for n in seeds)


def _by_setting(of_it: Sequence[Comparison]) -> list[str]:
    """A line for each setting and measure."""
    groups: dict[tuple[str, str, str], list[Comparison]] = {}
    for x in of_it:
        groups.setdefault((x.where, MEASURE_NAMES[x.measure], x.theirs), []).append(x)
    lines = []
    for (where, measure, theirs), compared in groups.items():
        parts = []
        for verdict in dict.fromkeys(x.verdict for x in compared):
            which = "; ".join(x.text for x in compared if x.verdict == verdict)
            than = f" than {theirs}" if verdict in ("higher", "lower") else ""
            parts.append(f"**{verdict.capitalize()}{than}**: {which}")
        seeds = max(x.found.seeds for x in compared)
        lines.append(f"{where}, {measure} ({seeds} seeds): {'. '.join(sorted(parts))}.")
    return lines


def resolution(compared: Sequence[Comparison]) -> str:
    """How small a difference could have been seen."""
    halves = [
        (x.found.high - x.found.low) / 2
        for x in compared
        if x.found.low is not None and x.found.high is not None
    ]
    if not halves:
        return "No estimator has two seeds yet."
    return (
        f"Half of the intervals reach less than {median(halves):.3f} to either side: differences "
        f"much smaller than that would go unseen."
    )


def price_of_sampling(ablation: Ablation) -> list[str]:
    """What dynamic sampling costs, which a comparison at equal steps does not see."""
    lines = []
    for setting in _settings(ablation, "main"):
        means = {}
        for name in ("dapo", BASE):
            runs = ablation.cells[setting].get(name, {}).values()
            groups = [x for record in runs for x in record["steps"]["groups"] if x is not None]
            if groups:
                means[name] = sum(groups) / len(groups)
        if len(means) == 2 and means["dapo"] > means[BASE]:
            lines.append(f"{setting.regime} {means['dapo'] / means[BASE]:.2f}")
    if not lines:
        return []
    return [
        f"These comparisons are at equal steps. {STYLES['dapo'].label} samples again where groups "
        f"have no signal, and sampled this many times the answers of the others: "
        f"{', '.join(lines)}."
    ]


def mapo_and_grpo(ablation: Ablation) -> tuple[str, Table]:
    """MAPO against GRPO in every setting."""
    every = _of_mapo(comparisons(ablation))
    lines = [
        [x.where, MEASURE_NAMES[x.measure], str(x.found.seeds), x.found.text(sign="+"), x.verdict]
        for x in every
    ]
    heads = ["setting", "measure", "seeds", "MAPO - GRPO", "interval"]
    short = counted(every) if every else "MAPO and GRPO have no seed in common yet."
    return short, Table("MAPO against GRPO, on the same seeds", heads, lines)


def _of_mapo(every: Iterable[Comparison]) -> list[Comparison]:
    pair = (STYLES["mapo"].label, STYLES[BASE].label)
    return [x for x in every if (x.ours, x.theirs) == pair]


def against_mapo(ablation: Ablation) -> list[str]:
    """What does not favour MAPO: lower results, lost gains, simpler estimators that do as well."""
    every = comparisons(ablation)
    lower = [x for x in _of_mapo(every) if x.verdict == "lower"]
    forms = [x for x in every if x.question == "lambda" and x.verdict == "higher"]
    higher = [x for x in every if x.question == "mapo" and x.verdict == "higher"]
    return [
        *_listed("MAPO is lower than GRPO", lower),
        *_listed("Another estimator is higher than MAPO", higher),
        *(price_of_sampling(ablation) if STYLES["dapo"].label in {x.ours for x in higher} else []),
        *_listed("Another lambda does better than the paper's", forms),
        *_listed("Gains over GRPO that step size may explain", _lost_at_equal_norm(every)),
        *_as_good(every),
    ]


def _listed(what: str, compared: Sequence[Comparison]) -> list[str]:
    if not compared:
        return []
    which = "; ".join(f"{x.text} ({x.where}, {MEASURE_NAMES[x.measure]})" for x in compared)
    return [f"{what}: {which}."]


def _lost_at_equal_norm(every: Iterable[Comparison]) -> list[Comparison]:
    """At equal gradient norms, where MAPO is higher than GRPO at own learning rates only."""
    of_mapo = _of_mapo(every)
    gains = {
        (x.where, x.measure) for x in of_mapo if x.question == "estimator" and x.verdict == "higher"
    }
    return [
        x
        for x in of_mapo
        if x.question == "step size" and x.verdict not in ("higher", "one seed allows no statement")
        if (x.where.removesuffix(EQUAL), x.measure) in gains
    ]


def _as_good(every: Iterable[Comparison]) -> list[str]:
    """Estimators without a mixture that are not found to be worse than MAPO."""
    found: dict[str, list[str]] = {}
    for x in every:
        if x.measure != "area" or x.verdict != "no difference found":
            continue
        if x.question == "mapo":
            found.setdefault(x.where, []).append(x.text)
        elif x.question == "estimator" and x in _of_mapo([x]):
            found.setdefault(x.where, []).append(x.theirs)
    return [
        f"No worse than MAPO, as far as was found ({where}, {MEASURE_NAMES['area']}): "
        f"{'; '.join(which)}."
        for where, which in found.items()
    ]


def tables(ablation: Ablation) -> list[Table]:
    """One for each setting with runs: learning rates, success, and differences from GRPO."""
    found = []
    for setting in ablation.cells:
        rates = chosen_rates(ablation.records, setting.regime)
        lines = [_line(ablation, setting, name, rates) for name in ablation.estimators(setting)]
        heads = ["estimator", "seeds", "learning rate", "start", "final", "mean over the run"]
        heads += ["final - GRPO", "mean - GRPO"]
        title = f"Success on held-out problems: {setting.text} (interquartile means, 95%)"
        found.append(Table(title, heads, lines))
    return found


def _line(ablation: Ablation, setting: Setting, name: str, rates: dict[str, float]) -> list[str]:
    runs = ablation.cells[setting][name]
    used = sorted({record["learning_rate"] for record in runs.values()})
    chosen = "" if setting.stage == "norm" or used == [rates.get(name)] else " (not the chosen one)"
    starts = [record["evals"][0]["success_sampled"] for record in runs.values()]
    cells = [STYLES[name].label, str(len(runs)), ", ".join(f"{x:g}" for x in used) + chosen]
    cells.append(f"{sum(starts) / len(starts):.3f}")
    cells += [ablation.estimate(setting, name, measure).text() for measure in MEASURES]
    for measure in MEASURES:
        against = ablation.against(setting, name, BASE, measure)
        text = "-" if against is None or name == BASE else against.text(sign="+")
        cells.append(f"**{text}**" if against is not None and against.excludes_zero else text)
    return cells
