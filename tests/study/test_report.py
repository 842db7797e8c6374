"""`mapo-kernels study report`: what it says of known numbers, of few and of none."""

import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jsonschema")
pytest.importorskip("markdown_it")

from study.records import noisy, record, write

from mapo_kernels.__main__ import main
from mapo_kernels.study import ablation_findings as findings
from mapo_kernels.study.ablation_results import Ablation, Setting, settings_of_study
from mapo_kernels.study.comparisons import difference, estimate, interquartile_mean, rate_by_chance
from mapo_kernels.study.report import TITLE
from mapo_kernels.study.report_parts import Results, markdown
from mapo_kernels.study.report_parts import figures as figures_of
from mapo_kernels.study.settings import ESTIMATORS, RATE_SEEDS, RATES
from mapo_kernels.study.tables import Table

ROOT = Path(__file__).parents[2]
RESULTS, DOCS = ROOT / "benchmarks/results/study", ROOT / "docs"


# Statistics


def test_the_interquartile_mean_leaves_out_a_quarter_at_each_end():
    assert interquartile_mean(np.array([9.0, 1, 2, 3, -7])) == 2
    assert interquartile_mean(np.array([0.0, 0, 1, 2, 3, 4, 9, 9])) == 2.5
    assert interquartile_mean(np.array([1.0, 2])) == 1.5


def test_an_interval_is_that_of_the_bootstrap_and_repeats():
    # Of 0 and 1, resampled means are 0, 1/2 and 1 with chances 1/4, 1/2 and 1/4.
    found = estimate({0: 0.0, 1: 1.0})
    assert found == (0.5, 0.0, 1.0, 2) == estimate({1: 1.0, 0: 0.0})
    assert not found.excludes_zero
    assert estimate({5: 0.25}) == (0.25, None, None, 1)
    assert not estimate({5: 0.25}).excludes_zero


def test_an_interval_covers_the_truth_about_as_often_as_it_claims():
    draws = np.random.default_rng(1).normal(0.3, 1, (200, 30))
    found = [estimate(dict(enumerate(x))) for x in draws]
    covered = sum(x.low <= 0.3 <= x.high for x in found) / len(found)
    assert 0.88 <= covered <= 1


def test_intervals_of_few_seeds_exclude_0_more_often_than_they_claim():
    # Of two seeds: if both differ in the same direction.
    assert rate_by_chance(2) == pytest.approx(0.5, abs=0.04)
    assert 0.12 > rate_by_chance(5) > rate_by_chance(8) > rate_by_chance(30) > 0.04


def test_differences_are_of_the_same_seeds():
    found = difference({0: 0.5, 1: 0.9, 2: 0.4}, {1: 0.8, 2: 0.3, 7: 9.0})
    assert found.value == pytest.approx(0.1) and found.seeds == 2
    assert difference({0: 1.0}, {1: 1.0}) is None


# Sentences


def said(records):
    """The short answers and the lines of the page about these records."""
    found = findings.answers(Ablation(records)).values()
    return " ".join(line for x in found for line in (x.short, *x.lines))


def against(records):
    return " ".join(findings.against_mapo(Ablation(records)))


def test_a_difference_is_stated_where_the_interval_excludes_0_and_counted():
    records = noisy(["mapo", "grpo", "rloo", "apd"], 5, effects={"mapo": 0.1, "rloo": -0.1})
    text = said(records)
    assert re.search(r"Higher than GRPO\*\*: MAPO \+0\.\d+ \[\+[^]]*\]", text)
    assert re.search(r"Lower than GRPO\*\*: RLOO -0\.\d+ \[-[^]]*\]", text)
    assert re.search(r"No difference found\*\*: APD only [+-]0\.\d+ \[-0[^]]*\+0", text)
    assert "mixed, binary rewards, final success (5 seeds): " in text
    counts = "Of 6 comparisons: 2 higher, 2 lower, no difference found in 2 (about 0.6 would"
    assert counts in text
    short, table = findings.mapo_and_grpo(Ablation(records))
    assert short.startswith("Of 2 comparisons: 2 higher (about 0.2")
    assert [line[-1] for line in table.lines] == ["higher", "higher"]


def test_chosen_rates_at_an_end_of_their_grid_are_said():
    def tried(best):
        return [
            record(name, seed, 0.5 + (rate == best[name]), stage="rate", rate=rate)
            for name in best
            for seed in RATE_SEEDS
            for rate in RATES["mixed"]
        ]

    low, middle, _ = RATES["mixed"]
    text = findings.rates(Ablation(tried({"mapo": middle, "grpo": middle, "apd": low})))
    assert f"Chosen: mixed {middle:g} (APD only {low:g}). " in text and "may lie beyond" in text
    text = findings.rates(Ablation(tried({"mapo": middle, "grpo": middle})))
    assert f"Chosen: mixed {middle:g}. " in text and "may lie beyond" not in text


def test_no_difference_is_said_and_one_seed_allows_none():
    same = [record(name, seed, 0.5 + 0.01 * seed) for name in ("mapo", "grpo") for seed in range(3)]
    assert "Of 2 comparisons: no difference found in 2 (about 0.5" in said(same)
    single = [record("mapo", 0, 0.9), record("grpo", 0, 0.1)]
    assert "Of 2 comparisons: one seed allows no statement in 2" in said(single)
    assert "One seed allows no statement**: MAPO +0.800 (one seed)" in said(single)
    assert against(single) == ""


def test_what_speaks_against_mapo():
    names = ["mapo", "mapo-step", "grpo", "apd"]
    text = against(noisy(names, 5, effects={"mapo": -0.1, "mapo-step": 0.05}))
    assert re.search(r"MAPO is lower than GRPO: MAPO -0\.1\d+ \[[^]]*\] \(mixed, binary", text)
    assert "Another lambda does better than the paper's: MAPO step +0.1" in text
    assert re.search(r"Another estimator is higher than MAPO: APD only \+0\.\d", text)
    text = against(noisy(["mapo", "grpo", "apd"], 5))
    where = "(mixed, binary rewards, mean success over the run)"
    assert re.search(rf"No worse than MAPO, [^(]*{re.escape(where)}: GRPO; APD only [+-]0", text)
    gain = noisy(names, 5, effects={"mapo": 0.1, "apd": -0.2, "mapo-step": -0.2})
    assert against(gain) == ""
    text = against(gain + noisy(names, 5, stage="norm"))
    assert "Gains over GRPO that step size may explain: MAPO" in text
    assert "(mixed, binary rewards, equal gradient norms, final success)" in text
    assert "lower than" not in text and "Another" not in text and "No worse" not in text
    kept = noisy(names, 5, stage="norm", effects={"mapo": 0.1})
    assert against(gain + kept) == ""


def test_the_threshold_is_compared_with_success_known_apart():
    partial = noisy(["mapo", "grpo"], 4, reward="partial")
    known = noisy(["mapo"], 4, reward="partial-success", effects={"mapo": 0.2})
    text = said(partial + known)
    assert "Higher than itself with the default threshold**: MAPO +0.2" in text
    # GRPO reads no successes: its runs without them are what MAPO's with them are compared with.
    where = "mixed, partial rewards with success=, final success (4 seeds)"
    assert re.search(rf"{re.escape(where)}: \*\*Higher than GRPO\*\*: MAPO \+0\.\d", text)


def test_what_dynamic_sampling_costs_is_said():
    records = noisy(["grpo", "dapo"], 2)
    assert findings.price_of_sampling(Ablation(records)) == []
    for x in records:
        if x["estimator"] == "dapo":
            x["steps"]["groups"] = [32.0, 40.0]
    (line,) = findings.price_of_sampling(Ablation(records))
    assert "GRPO + DAPO samples again" in line and "the others: mixed 2.25." in line


def test_how_small_a_difference_could_be_seen():
    records = [record("grpo", seed, 0.5) for seed in (0, 1)]
    records += [record("apd", seed, 0.5 + 0.2 * seed) for seed in (0, 1)]
    compared = findings.comparisons(Ablation(records))
    # The intervals are [0, 0.2] of the final success, and half of that of the mean.
    assert "less than 0.075 to either side" in findings.resolution(compared)
    assert findings.resolution([]) == "No estimator has two seeds yet."


def test_tables_hold_numbers_to_the_right_and_bars_inside():
    table = Table("t", ["name", "|A|", "text"], [["a | b", "-1.5 [-2, +3]", "1 of 3"]])
    head, rule, line = table.markdown().splitlines()
    assert (head, rule) == (r"| name | \|A\| | text |", "| --- | ---: | --- |")
    assert line == r"| a \| b | -1.5 [-2, +3] | 1 of 3 |"
    assert [x.justify for x in table.rich().columns] == ["left", "right", "left"]


# What is missing


def test_missing_runs_are_counted_by_setting():
    records = noisy(["mapo", "grpo"], 3)
    lines = Ablation(records).missing()
    total = 8 * len(ESTIMATORS)
    mixed = next(x for x in lines if x.startswith("mixed, binary rewards: "))
    assert f"{total - 6} of {total} runs" in mixed and "mapo 5" in mixed and "rloo 8" in mixed
    assert any(x.startswith("hard, binary rewards: 50 of 50 runs (all)") for x in lines)
    assert len(lines) == len(settings_of_study())


def test_nothing_is_missing_of_a_whole_study():
    records = []
    for setting, (names, seeds) in settings_of_study().items():
        records += noisy(names, seeds, **setting._asdict())
    assert Ablation(records).missing() == []


def test_the_whole_study_is_what_the_ablation_runs():
    from mapo_kernels.study.ablation import phases
    from mapo_kernels.study.settings import REGIMES

    rates = [
        record(name, 100, 0.5, stage="rate", regime=regime)
        for name in ESTIMATORS
        for regime in REGIMES
    ]
    runs = {}
    for cells in phases(rates, list(ESTIMATORS), list(REGIMES), 8):
        for cell in cells:
            if cell.stage != "rate":
                setting = Setting(cell.stage, cell.regime, cell.reward)
                runs.setdefault(setting, set()).add((cell.estimator, cell.seed))
    expected = {
        setting: {(name, seed) for name in names for seed in range(seeds)}
        for setting, (names, seeds) in settings_of_study().items()
    }
    assert runs == expected


# The page


def report(folder, *arguments):
    return main(["study", "report", str(folder), *map(str, arguments)])


def images_of(text):
    return set(re.findall(r"!\[[^]]*\]\((study_\w+\.png)\)", text))


@pytest.mark.slow
def test_an_unfinished_ablation_makes_a_page_that_says_so(tmp_path, capsys):
    records = noisy(["mapo", "grpo", "apd"], 3, effects={"mapo": 0.1})
    records += noisy(["grpo"], 1, regime="hard") + [record("mapo", 100, 0.5, stage="rate")]
    out, docs = tmp_path / "out", tmp_path / "docs"
    out.mkdir(), docs.mkdir()
    write(out, records)
    with (out / "ablation.jsonl").open("a") as file:
        file.write('{"format": "mapo-')  # a run that was cut off
    assert report(out, "--markdown", docs / "study.md") == 0
    text = (docs / "study.md").read_text()
    assert "## What is missing" in text
    assert "`study extreme`: no results" in text and "`study synthetic`: no results" in text
    assert "easy, binary rewards: 50 of 50 runs (all)" in text
    assert "| study ablation (main) | 012345678+ | x86_64 CPU, one thread a run | 15 |" in text
    assert re.search(r"Higher than GRPO\*\*: MAPO \+0\.\d+ \[\+", text)
    assert images_of(text) == {x.name for x in docs.glob("*.png")} and images_of(text)
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(images_of(text))
    assert 'src="study_' not in page and "<table>" in page
    # Made again from the same files it is the same.
    assert report(out, "--markdown", docs / "again.md") == 0
    assert (docs / "again.md").read_text() == text
    assert (out / "report.html").read_text() == page


@pytest.mark.slow
def test_a_page_of_all_parts(tmp_path):
    small = ["--out", str(tmp_path)]
    assert main(["study", "synthetic", *small, "--group-sizes", "4"]) == 0
    options = ["--group-sizes", "4", "--steps", "2", "--groups", "2"]
    assert main(["study", "extreme", *small, *options]) == 0
    known = noisy(["mapo"], 2, reward="partial-success") + noisy(["mapo"], 2, reward="partial")
    write(tmp_path, noisy(ESTIMATORS, 2) + noisy(ESTIMATORS, 2, stage="norm") + known)
    assert report(tmp_path, "--markdown", tmp_path / "page.md") == 0
    text = (tmp_path / "page.md").read_text()
    for title in ("speaks against MAPO", "nearly always fail", "advantages are known"):
        assert title in text
    assert "study_ablation_threshold.png" in text and "study_extreme_first_step.png" in text
    assert "2 seeds" in text and "no results" not in text


@pytest.mark.parametrize(
    "files, says",
    [
        ({}, "expected result files of a study, found none"),
        ({"ablation.jsonl": "{}\n"}, "line 1 is no record"),
        ({"extreme.json": "{}"}, "expected a result of study extreme"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path, capsys, files, says):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert report(tmp_path) == 2
    assert says in capsys.readouterr().err


def test_a_folder_that_there_is_not_is_named(tmp_path, capsys):
    assert report(tmp_path / "none") == 2
    assert "none" in capsys.readouterr().err


# The page of the repository


@pytest.mark.skipif(not RESULTS.is_dir(), reason="no results in this checkout")
def test_the_page_in_docs_is_what_its_results_say():
    drawn = {x.stem.removeprefix("study_") for x in DOCS.glob("study_*.png")}
    assert drawn == set(figures_of(Results.read(RESULTS)))
    text = markdown(Results.read(RESULTS), TITLE, drawn)
    assert (DOCS / "study.md").read_text() == text, "run: mapo-kernels study report"
