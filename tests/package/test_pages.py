"""The README and docs/: links lead somewhere, numbers are those of the result files."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import report, results

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "ARCHITECTURE.md",
    ROOT / "benchmarks/GPU.md",
    *sorted((ROOT / "docs").glob("**/*.md")),
]
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in PAGES}
# Pages that have no code of their own.
CUT = ("README.md", "docs/own_loop.md", "docs/trl.md")
FENCES = re.compile(r"^```.*?^```", re.S | re.M)


def anchors(text):
    """What GitHub lets a link to a heading of the page say after the `#`."""
    headings = re.findall(r"^#+ (.+)$", FENCES.sub("", text), re.M)
    words = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {word.replace(" ", "-") for word in words}


def targets(name):
    """Files, and anchors in them, that a page's relative links name."""
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCES.sub("", TEXTS[name])):
        if not re.match(r"[a-z]+:", link):
            path, _, anchor = link.partition("#")
            yield (ROOT / name).parent / path if path else ROOT / name, anchor


def figures(log, estimator):
    """Held-out success of each seed before and after training, and the mean after."""
    runs = [run for run in log["runs"] if run["phase"] == estimator]
    runs.sort(key=lambda run: run["seed"])
    before, after = ([run["evals"][at]["success_sampled"] for run in runs] for at in (0, -1))
    return [f"{x:.2f}" for x in before + after] + [f"{sum(after) / len(after):.3f}"]


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_to_files_and_headings_that_exist(name):
    for path, anchor in targets(name):
        assert path.exists(), f"{name} links to {path}"
        if anchor:
            assert anchor in anchors(path.read_text()), f"{name} links to {path}#{anchor}"


@pytest.mark.parametrize("name", TEXTS)
def test_files_that_a_page_names_exist(name):
    for path in re.findall(
        r"`((?:benchmarks|examples|tests|mapo_kernels)/[\w/]+\.\w+)`", TEXTS[name]
    ):
        assert (ROOT / path).exists(), f"{name} names {path}"


@pytest.mark.parametrize("name", TEXTS)
def test_code_of_an_example_is_what_the_file_has(name):
    """A block whose title is a file of examples/ is a piece of that file, which tests run."""
    blocks = re.findall(r"^```python([^\n]*)\n(.*?)^```", TEXTS[name], re.S | re.M)
    for words, code in blocks:
        title = re.fullmatch(r' title="(examples/\w+\.py)"', words)
        assert title or name not in CUT, f"{name} has code of its own:\n{code}"
        if title:
            assert f"\n\n{code}\n" in (ROOT / title[1]).read_text(), f"{title[1]} has not:\n{code}"


@pytest.mark.parametrize(
    ("name", "table"),
    [(x, table) for x in TEXTS for table in re.findall(r"<!-- (\w+): begin -->", TEXTS[x])],
)
def test_the_benchmark_tables_are_those_of_the_result_files(name, table):
    found = results.read(ROOT / f"benchmarks/results/{table}.json")
    assert report.insert(TEXTS[name], table, report.markdown(found)) == TEXTS[name]


def test_the_cpu_table_is_on_the_page_about_performance():
    assert "<!-- cpu: begin -->" in TEXTS["docs/performance.md"]


@pytest.mark.parametrize("estimator", ("mapo", "grpo"))
def test_the_demo_table_is_that_of_the_result_file(estimator):
    log = json.loads((ROOT / "benchmarks/results/demo_number_sorting_3_seeds.json").read_text())
    lines = TEXTS["docs/demo.md"].splitlines()
    row = next(line for line in lines if line.startswith(f"| {estimator.upper()}"))
    assert re.findall(r"\d\.\d+", row) == figures(log, estimator)


def test_what_dropping_saves_is_what_the_result_file_says():
    page = TEXTS["docs/trl.md"]
    result = json.loads((ROOT / "benchmarks/results/trl_zero_signal.json").read_text())
    whole, dropping = result["runs"]
    for name, run in (("every sequence", whole), ("`drop_zero_signal`", dropping)):
        cells = [
            f"{run['groups_without_signal']:.0%}",
            f"{run['model_seconds']:.1f}",
            f"{run['preparing_seconds']:.1f}",
            f"{run['success_before_and_after'][-1]:.3f}",
        ]
        assert f"| {name} | {' | '.join(cells)} |" in page
    saved = 1 - dropping["model_seconds"] / whole["model_seconds"]
    assert f"{saved:.0%} of forward and backward saved" in page


def test_times_with_kept_columns_are_those_of_the_result_file():
    rows = results.read(ROOT / "benchmarks/results/cpu_kept.json")["rows"]
    page, shape = TEXTS["docs/sampling_masks.md"], "16 x 128, laptop, float32"
    for name, kept in (
        ("as rollouts keep them: 47% one, mean 8, 1% above 82", ""),
        ("the same, and one column in every row", ", one column in every row"),
        ("512 in every row", ", 512 kept"),
    ):
        own, *others = [row["median_ms"] for row in rows if row["shape"] == shape + kept]
        times = [f"{x / own:.{0 if x > 10 * own else 1}f} times" for x in others]
        assert f"| {name} | {own:.3g} ms | {' | '.join(times)} |" in page


@pytest.mark.parametrize(
    ("name", "start"),
    [("docs/performance.md", "## Predicted for"), ("docs/sampling_masks.md", "**Predicted** for")],
)
def test_what_pages_predict_is_what_the_list_of_predictions_says(name, start):
    predictions = TEXTS["benchmarks/GPU.md"].partition("## Predictions")[2]
    text = TEXTS[name].partition(start)[2].partition("\n## ")[0]
    numbers = re.findall(r"\d[\d.]* (?:to \d[\d.]* )?(?:ps|ms)\b", text)
    assert numbers and all(number in predictions for number in numbers)
