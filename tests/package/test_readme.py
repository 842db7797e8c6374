"""The README is short, complete, and readable on a package index; its links: test_pages.py."""

import json
import re

from test_pages import ROOT, TEXTS, figures

from mapo_kernels import choices, spec

NO_CHOICES = ("BACKENDS", "VESPO")
README = TEXTS["README.md"]
ADDRESS = "https://raw.githubusercontent.com/mapo-kernels/mapo_kernels/main/"


def test_the_readme_is_short():
    assert len(README.encode()) <= 9216


def test_pictures_have_an_address_that_an_index_can_show():
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert len(pictures) == 1 and pictures[0].startswith(ADDRESS)
    assert (ROOT / pictures[0].removeprefix(ADDRESS)).exists()


def test_the_two_commands_are_there():
    assert re.findall(r"^make \w+", README, re.M) == ["make demo", "make test"]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert {"demo", "test"} <= set(targets)


def test_every_choice_is_in_the_table():
    table = README.partition("\n## Choices\n")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([^`]+)`", table))
    names = vars(choices) | vars(spec)
    tuples = [x for name, x in names.items() if name.isupper() and name not in NO_CHOICES]
    words = {word for x in tuples if isinstance(x, tuple) for word in x}
    missing = words - named
    assert not missing and {"mapo", "tv", "contributing"} <= words
    fields = spec.AdvantageSpec.__dataclass_fields__ | spec.LossSpec.__dataclass_fields__
    for row in re.findall(r"^\| (`.*?) \|", table, re.M):
        assert set(re.findall(r"`(\w+)`", row)) <= set(fields), row


def test_the_numbers_of_the_demo_are_those_of_the_result_file():
    log = json.loads((ROOT / "benchmarks/results/demo_number_sorting_3_seeds.json").read_text())
    mapo, grpo = (figures(log, estimator)[-1] for estimator in ("mapo", "grpo"))
    assert f"is {mapo}\nwith MAPO and {grpo} with GRPO (means of 3 seeds" in README


def test_what_it_says_of_the_study_is_what_the_study_found():
    line = re.search(r"^- MAPO against GRPO: (.*)$", TEXTS["docs/study.md"], re.M)[1]
    found = re.match(r"Of (\d+) .*: (\d+) higher, (\d+) lower, no difference found in (\d+)", line)
    n, higher, lower, equal = found.groups()
    text = f"Of {n} comparisons of MAPO with GRPO there, {higher} is higher, {lower} are lower, and"
    assert f"{text} {equal} show no difference." in " ".join(README.split())
