"""`mapo-kernels study extreme`: simulated against analytic, and the first success in small."""

import json
import math
import warnings

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from mapo_kernels import operators
from mapo_kernels.__main__ import main
from mapo_kernels.files import check
from mapo_kernels.study import extreme, extreme_findings, rare_outcomes
from mapo_kernels.study.analytic import VARIANTS

PLOTS = ("groups", "steps", "lambda", "first_advantage", "first_gradient", "first_step")
SMALL = ("--group-sizes", "16", "32", "--steps", "20", "--groups", "2")


def run(out, *arguments):
    return main(["study", "extreme", "--out", str(out), *SMALL, *arguments])


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("extreme")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(out) == 0
    for name in PLOTS:
        assert (out / f"extreme_{name}.png").stat().st_size > 5000
    return json.loads((out / "extreme.json").read_text())


def test_the_file_follows_its_schema_and_repeats(found, tmp_path, capsys):
    check(found, extreme.SCHEMA)
    assert run(tmp_path) == 0
    again = json.loads((tmp_path / "extreme.json").read_text())
    assert {x: again[x] for x in extreme.PARTS} == {x: found[x] for x in extreme.PARTS}
    shown = capsys.readouterr().out
    assert "A = 12.4 from MAPO and 3.7 from GRPO" in shown.replace("\n", " ")
    assert "15.00 from MAPO, more than the first success; 3.75 from GRPO" in shown


def test_simulated_shares_are_near_the_analytic_ones(found):
    for row in found["signal"]:
        for of in ("groups", "steps"):
            share = row[of]
            off = math.sqrt(share["expected"] * (1 - share["expected"]) / share["count"])
            # Five standard deviations, or less than two events.
            room = max(5 * off, 2 / share["count"])
            assert abs(share["simulated"] - share["expected"]) <= room
            low, high = share["interval"]
            assert low <= share["simulated"] + 1e-12 and share["simulated"] - 1e-12 <= high
        assert row["same_for_all"]


def test_the_interval_is_wilsons():
    # A textbook case: 1 of 10, 95%: 0.0179 to 0.4042.
    share = rare_outcomes._share(torch.tensor([True] + [False] * 9), 0.1)
    assert share["interval"] == pytest.approx([0.0179, 0.4042], abs=2e-4)


def test_the_gradient_of_a_first_success_is_what_calculus_says(found):
    """Minus the mean over answers of A times (one-hot minus probabilities)."""
    for row in found["first"]:
        size = row["group_size"]
        success, failure = row["success"][1], row["failure"][1]
        start = torch.full((32,), (1 - 1 / size) / 31, dtype=torch.float64)
        start[0] = 1 / size
        ids = torch.tensor([0] + [1 + i % 31 for i in range(size - 1)])
        advantages = torch.tensor([success] + [failure] * (size - 1), dtype=torch.float64)
        one_hot = torch.nn.functional.one_hot(ids, 32).double()
        expected = -(advantages[:, None] * (one_hot - start)).mean(0)
        assert row["gradient_norm"] == pytest.approx(expected.norm().item(), rel=1e-4)
        after = (start.log() - expected).softmax(0)[0].item()
        assert row["sgd"]["p_after"] == pytest.approx(after, rel=1e-4)


def test_clipping_counts_tokens_beyond_the_range(found):
    for row in found["first"]:
        lifted = row["sgd"]["p_after"] / row["p_before"] > 1.28
        assert (row["sgd"]["clip_fraction"] > 0) == lifted


def test_where_mapo_is_one_function(found):
    same = {row["case"]: row["same"] for row in found["reductions"]}
    assert not same.pop("one is right") and not same.pop("all but one are right")
    assert all(same.values())


def test_options_and_success(found):
    rows = {
        (row["option"], row["variant"], row["group_size"]): row["success"]
        for row in found["options"]
    }
    plain = rows["none", "mapo", 16]
    assert rows["max_abs = 5", "mapo", 16] == 5
    assert rows["difficulty = focal", "mapo", 16] == pytest.approx(plain * (15 / 16) ** 0.5)
    assert rows["difficulty = power", "mapo", 16] == pytest.approx(plain * 4)
    default, lower, known = found["shaped"]
    assert default["lambda"] == 1
    assert lower["lambda"] == known["lambda"] == 0.25


def test_a_wrong_advantage_fails(tmp_path, monkeypatch):
    right = operators.group_advantages

    def wrong(groups, spec, want_stats):
        advantages, table = right(groups, spec, want_stats)
        return advantages * (1.001 if spec.estimator == "rloo" else 1), table

    monkeypatch.setattr(operators, "group_advantages", wrong)
    assert run(tmp_path, "--steps", "1") == 1


def test_sentences_say_what_the_numbers_say(found):
    broken = json.loads(json.dumps(found))
    broken["signal"][0]["same_for_all"] = False
    assert any("DIFFERENT groups" in x for x in extreme_findings.sentences(broken))
    assert not any("DIFFERENT" in x for x in extreme_findings.sentences(found))
    first = next(x for x in found["first"] if (x["group_size"], x["variant"]) == (16, "grpo"))
    text = " ".join(extreme_findings.sentences(found))
    assert f"{first['sgd']['p_after'] / first['p_before']:.2f} with GRPO" in text
    assert len(extreme_findings.tables(found)[1].lines) == 2 * len(VARIANTS)


@pytest.mark.parametrize(
    "name, value", [("--group-sizes", "3"), ("--steps", "0"), ("--groups", "0")]
)
def test_too_small_numbers_are_refused(tmp_path, capsys, name, value):
    assert run(tmp_path, name, value) == 2
    assert f"{name}: expected at least" in capsys.readouterr().err
