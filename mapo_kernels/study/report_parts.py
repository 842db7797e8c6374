"""The parts of the study's page: one for each kind of result, and how they were made."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from mapo_kernels.files import naming, read_json
from mapo_kernels.study import (
    ablation_figures,
    ablation_findings,
    extreme,
    extreme_figures,
    extreme_findings,
    findings,
    synthetic,
)
from mapo_kernels.study import figures as synthetic_figures
from mapo_kernels.study.ablation import read_records
from mapo_kernels.study.ablation_results import Ablation
from mapo_kernels.study.comparisons import CONFIDENCE, RESAMPLES
from mapo_kernels.study.figures import Figures
from mapo_kernels.study.model_runs import RECORDS_NAME as MODELS_NAME
from mapo_kernels.study.model_runs import read_records as read_models
from mapo_kernels.study.page import bullets, figure, heading, table
from mapo_kernels.study.settings import (
    ESTIMATORS,
    NORM_RATE,
    RATE_SEEDS,
    RATES,
    RECORDS_NAME,
    REGIMES,
    REWARDS,
    STAGES,
)
from mapo_kernels.study.tables import Table

Found = dict[str, Any]

ALT = {  # what a plot shows, for those who do not see it
    "synthetic_certainty": "lambda(p) of each certainty function",
    "synthetic_success": "advantage of a success over p, for each estimator",
    "synthetic_failure": "advantage of a failure over p, for each estimator",
    "synthetic_gradient": "gradient norm over GRPO's, over p",
    "synthetic_reversion": "advantages of the lowest rewards of the paper's reversion example",
    "synthetic_mirror": "advantages of the lowest rewards of the paper's mirror example",
    "extreme_groups": "share of groups with a gradient over the success probability",
    "extreme_steps": "share of steps with a gradient over the success probability",
    "extreme_lambda": "mean lambda of groups with signal over the success probability",
    "extreme_first_advantage": "advantage of the first success over the group size",
    "extreme_first_gradient": "gradient norm of a first success over the group size",
    "extreme_first_step": "probability of a first success after one step",
    "ablation_success": "held-out success over RL steps, for each estimator and regime",
    "ablation_against_grpo_final": "difference of final success from GRPO's, with intervals",
    "ablation_against_grpo_area": "difference of mean success from GRPO's, with intervals",
    "ablation_lambda_forms": "difference of each form of lambda from the quadratic",
    "ablation_threshold": "difference that knowing successes apart makes",
    "ablation_gradient_norm": "gradient norms over RL steps",
    "ablation_advantage_abs": "mean absolute advantages over RL steps",
    "ablation_lambda_mean": "mean lambda over RL steps",
    "ablation_groups_without_signal": "share of groups without signal over RL steps",
}
# Beside the answer to which question each stands.
PLOTS_OF = {
    "estimator": ["ablation_against_grpo_final", "ablation_against_grpo_area"],
    "lambda": ["ablation_lambda_forms"],
    "threshold": ["ablation_threshold"],
}
OVER_TIME = [f"ablation_{name}" for name in ablation_figures.OVER_TIME]


class Results(NamedTuple):
    """What a folder has; None for what it has not."""

    ablation: Ablation | None
    extreme: Found | None
    synthetic: Found | None
    models: list[Found]

    @classmethod
    def read(cls, out: Path) -> Results | None:
        """The results in a folder; None if it has none.

        Raises:
            CommandError: the folder or a file cannot be read, or a file is no result.
        """
        with naming(out):
            names = {path.name for path in out.iterdir()}

        def one(module: Any, what: str) -> Found | None:
            if module.NAME not in names:
                return None
            return read_json(out / module.NAME, module.SCHEMA, f"a result of {what}")

        records = read_records(out / RECORDS_NAME) if RECORDS_NAME in names else []
        found = cls(
            Ablation(records) if records else None,
            one(extreme, "study extreme"),
            one(synthetic, "study synthetic"),
            read_models(out / MODELS_NAME) if MODELS_NAME in names else [],
        )
        return found if any(found) else None


def figures(results: Results) -> Figures:
    """Every plot that there are results for, by the name that the page has for it."""
    drawn: Figures = {}
    if results.ablation:
        drawn |= ablation_figures.draw(results.ablation)
    if results.extreme:
        drawn |= extreme_figures.draw(results.extreme)
    if results.synthetic:
        drawn |= synthetic_figures.of_synthetic(results.synthetic)
    return drawn


def markdown(results: Results, title: str, drawn: Collection[str]) -> str:
    """The whole page, which shows the plots of the names in `drawn`."""
    parts = [
        heading(1, title),
        "This page is made by `mapo-kernels study report` from result files: tables, plots and "
        "sentences. [arXiv 2509.18849](https://arxiv.org/abs/2509.18849) proposes MAPO and leaves "
        "questions open; here are small experiments on them, and what they allow to say.",
        *_in_short(results),
        *_missing(results),
        *_ablation(results.ablation, drawn),
        *_models(results.models),
        *_extreme(results.extreme, drawn),
        *_synthetic(results.synthetic, drawn),
        *_made(results),
    ]
    return "\n\n".join(parts) + "\n"


def _missing(results: Results) -> list[str]:
    lines = [] if results.ablation is None else results.ablation.missing()
    for name in ("ablation", "extreme", "synthetic"):
        if getattr(results, name) is None:
            lines.append(f"`study {name}`: no results")
    if not lines:
        return []
    return [heading(2, "What is missing"), bullets(lines)]


def _plots(names: Iterable[str], drawn: Collection[str]) -> list[str]:
    return [figure(f"study_{name}", ALT[name]) for name in names if name in drawn]


def _kind(kind: str) -> list[str]:
    """The plots of a command."""
    return [name for name in ALT if name.startswith(kind)]


def _in_short(results: Results) -> list[str]:
    """One line an open question, and everything that does not favour MAPO."""
    lines, against = [], []
    if results.ablation:
        lines.append(f"MAPO against GRPO: {ablation_findings.mapo_and_grpo(results.ablation)[0]}")
        lines += [
            f"{x.question} {x.short}" for x in ablation_findings.answers(results.ablation).values()
        ]
        against += ablation_findings.against_mapo(results.ablation)
    if results.extreme:
        lines.append(extreme_findings.sentences(results.extreme)[0])
        against += extreme_findings.against_mapo(results.extreme)
    if results.synthetic:
        lines.append(findings.synthetic(results.synthetic)[0])
        against += findings.against_mapo(results.synthetic)
    return [
        *([heading(2, "In short"), bullets(lines)] if lines else []),
        heading(2, "What speaks against MAPO"),
        bullets(against or ["Nothing in these results."]),
    ]


def _ablation(ablation: Ablation | None, drawn: Collection[str]) -> list[str]:
    if ablation is None:
        return []
    compared = [x for x in ablation_findings.comparisons(ablation) if x.found.low is not None]
    stated = [x for x in compared if x.found.excludes_zero]
    short, pair = ablation_findings.mapo_and_grpo(ablation)
    parts = [
        heading(2, "Estimators trained from the same starts"),
        *_method(ablation),
        f"{len(compared)} comparisons were made in all; the interval of {len(stated)} excludes 0, "
        f"and that of about {ablation_findings.by_chance(compared):.0f} would by chance alone: "
        f"percentile intervals of few seeds are too narrow, and where only normal noise differs "
        f"{ablation_findings.chances(compared)} exclude 0. Their number is not corrected for. "
        f"{ablation_findings.resolution(compared)}",
        *_plots(["ablation_success"], drawn),
        heading(3, "MAPO and GRPO"),
        short,
        *([table(pair)] if pair.lines else []),
    ]
    for name, answer in ablation_findings.answers(ablation).items():
        parts += [heading(3, answer.question), answer.short, *_plots(PLOTS_OF.get(name, ()), drawn)]
        parts.append(bullets(answer.lines))
        if name == "estimator":
            parts += ablation_findings.price_of_sampling(ablation)
    parts += [heading(3, "Over the run"), *_plots(OVER_TIME, drawn)]
    parts.append(heading(3, "All numbers"))
    return parts + [table(x, folded=True) for x in ablation_findings.tables(ablation)]


def _method(ablation: Ablation) -> list[str]:
    shared = ablation.records[0]["settings"]
    names = ("task", "steps", "prompts", "group_size", "minibatches", "eps_low", "eps_high")
    said = ", ".join(f"{name} {shared[name]}" for name in names if name in shared)
    regimes = ", ".join(f"{name} {start:g}" for name, start in REGIMES.items())
    starts = {
        regime: [
            x["evals"][0]["success_sampled"] for x in ablation.records if x["regime"] == regime
        ]
        for regime in REGIMES
    }
    measured = ", ".join(
        f"{regime} {min(x):.3f} to {max(x):.3f}" for regime, x in starts.items() if x
    )
    return [
        f"A decoder of the demo learns one verifiable task ({said}) by each estimator, from the "
        f"same supervised warm-up for a seed. Regimes are successes at which the warm-up ends: "
        f"{regimes}; held-out success at the start of RL was {measured}. Each estimator has the "
        f"learning rate, of {len(RATES['mixed'])}, with the largest mean success over the run on "
        f"seeds of its own (stage `rate`, {len(RATE_SEEDS)} seeds, binary rewards). "
        f"{ablation_findings.rates(ablation)}",
        f"Adam divides by the gradient's running size, so that a constant factor of all advantages "
        f"changes nothing: what an estimator decides is how much each group weighs beside the "
        f"others, and how gradients change in size from step to step and against the norm at which "
        f"they are clipped. Stage `norm` takes away the latter two: one learning rate "
        f"({NORM_RATE:g}) for all, and every gradient rescaled to that norm.",
        "With partial rewards, a reward of 1 is out of reach for solutions of 3 characters, takes "
        "the solution for 4, and four fifths or more of it for 5 and 6. Z-scores and percent "
        "deviations do not see that scale, lambda does.",
        f"Numbers are interquartile means over seeds. Brackets are {CONFIDENCE:.0%} percentile "
        f"bootstrap intervals over seeds ({RESAMPLES} resamples); differences are of the same "
        f"seeds. A difference is stated only where its interval excludes 0.",
        table(Table("Estimators", ["name", "what"], list(ESTIMATORS.items())), folded=True),
        table(Table("Rewards", ["name", "what"], list(REWARDS.items())), folded=True),
    ]


def _models(models: list[Found]) -> list[str]:
    if not models:
        return []
    lines = [
        [
            x["model"],
            findings.names([x["estimator"]]),
            str(x["seed"]),
            f"{x['before']:.3f}",
            f"{x['after']:.3f}",
            f"{x['seconds']:.0f}",
        ]
        for x in models
    ]
    heads = ["model", "estimator", "seed", "before", "after", "seconds"]
    title = "Share of held-out problems answered right, before and after"
    return [heading(2, "Language models, by TRL's trainer"), table(Table(title, heads, lines))]


def _extreme(found: Found | None, drawn: Collection[str]) -> list[str]:
    if found is None:
        return []
    return [
        heading(2, "Rollouts that nearly always fail, or nearly always succeed"),
        "A softmax policy over a few answers, so that its success probability is exact.",
        bullets(extreme_findings.sentences(found)),
        *_plots(_kind("extreme"), drawn),
        *(table(x, folded=True) for x in extreme_findings.tables(found)),
    ]


def _synthetic(found: Found | None, drawn: Collection[str]) -> list[str]:
    if found is None:
        return []
    return [
        heading(2, "Groups whose advantages are known"),
        bullets(findings.synthetic(found)),
        *_plots(_kind("synthetic"), drawn),
        *(table(x, folded=True) for x in findings.synthetic_tables(found)),
    ]


def _made(results: Results) -> list[str]:
    lines = [
        _line(f"study {name}", found["environment"], found["seconds"], found["settings"])
        for name in ("synthetic", "extreme")
        if (found := getattr(results, name)) is not None
    ]
    heads = ["command", "commit", "machine", "seconds", "torch", "settings"]
    parts = [heading(2, "How it was made")]
    if results.ablation is not None:
        lines += _stages(results.ablation.records)
    for x in results.models:
        lines.append(_line(f"study ablation --model {x['model']}", x["environment"], x["seconds"]))
    parts.append(table(Table("Commands and where they ran", heads, lines)))
    parts.append(
        "To repeat it: `mapo-kernels study synthetic`, `study extreme`, `study ablation` and "
        "`study report study_out`, each with `--out study_out` where it writes results."
    )
    return parts


def _line(
    command: str, environment: Found, seconds: float, settings: Found | None = None
) -> list[str]:
    threads = environment["threads"]
    machine = f"{environment['device']}, {threads} thread" + ("s" if threads != 1 else "")
    # An installed package knows no commit.
    commit = str(environment["commit"] or "unknown")[:9] + ("+" if environment["dirty"] else "")
    said = ", ".join(f"{name} {value}" for name, value in (settings or {}).items())
    torch = environment["versions"]["torch"]
    return [command, commit, machine, f"{seconds:.0f}", torch, said]


def _stages(records: list[Found]) -> list[list[str]]:
    """A line a stage; seconds are those of its runs, one after the other."""
    lines = []
    for stage, what in STAGES.items():
        of_it = [x for x in records if x["stage"] == stage]
        if of_it:
            commits, machines, torches = (
                ", ".join(sorted({pick(x) for x in of_it}))
                for pick in (
                    lambda x: x["commit"][:9] + ("+" if x["commit"].endswith("+") else ""),
                    lambda x: x["machine"],
                    lambda x: x["versions"]["torch"],
                )
            )
            seconds = f"{sum(x['seconds'] for x in of_it):.0f}"
            said = f"{len(of_it)} runs: {what}"
            lines.append([f"study ablation ({stage})", commits, machines, seconds, torches, said])
    return lines
