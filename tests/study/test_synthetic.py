"""`mapo-kernels study synthetic`: closed forms, and a wrong number is an exit code of 1."""

import json
import math

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from mapo_kernels import operators
from mapo_kernels.__main__ import main
from mapo_kernels.files import check
from mapo_kernels.study import analytic, findings, known_groups, synthetic
from mapo_kernels.study.analytic import VARIANTS
from reference.advantages import group_advantages as oracle

PLOTS = ("certainty", "success", "failure", "gradient", "reversion", "mirror")


def run(out, *arguments):
    return main(["study", "synthetic", "--out", str(out), "--group-sizes", "4", *arguments])


def test_every_number_is_right_and_the_files_are_there(tmp_path, capsys):
    assert run(tmp_path) == 0
    found = json.loads((tmp_path / "synthetic.json").read_text())
    check(found, synthetic.SCHEMA)
    assert all(row["ok"] for row in found["rows"])
    assert {row["variant"] for row in found["rows"]} == set(VARIANTS)
    assert {row["quantity"] for row in found["rows"]} >= {"lambda", "success", "failure", "rho"}
    for name in PLOTS:
        assert (tmp_path / f"synthetic_{name}.png").stat().st_size > 5000
    shown = capsys.readouterr().out
    assert "all agree" in shown
    # The worked figures of the paper, and what they are by MAPO: 0.75 * -1.732 - 0.25 * 0.077.
    assert "GRPO 1.73 against 1.00; APD only 0.08 against 0.82; MAPO 1.32 against 1.00" in shown
    assert "The reversion remains with MAPO" in shown
    assert "same advantages from: GRPO, r - mean, RLOO" in shown


def test_a_wrong_lambda_is_told_and_fails(tmp_path, monkeypatch, capsys):
    right = operators.group_advantages

    def wrong(groups, spec, want_stats):
        advantages, table = right(groups, spec, want_stats)
        if spec.certainty_mode == "linear":
            table = table.clone()
            table[3] *= 1.001
        return advantages, table

    monkeypatch.setattr(operators, "group_advantages", wrong)
    assert run(tmp_path) == 1
    shown = capsys.readouterr().out
    assert "numbers differ from what they must be" in shown
    assert "WRONG: paper, high certainty, one partial, MAPO linear" in shown


@pytest.mark.parametrize("value", [math.nan, 1.01])
def test_a_wrong_advantage_and_a_nan_fail(monkeypatch, value):
    right = operators.group_advantages

    def wrong(groups, spec, want_stats):
        advantages, table = right(groups, spec, want_stats)
        return advantages * value, table

    monkeypatch.setattr(operators, "group_advantages", wrong)
    assert not all(row["ok"] for row in known_groups.rows([3]) if row["quantity"] == "success")


def test_a_wrong_gradient_fails(monkeypatch):
    right = known_groups.mapo_loss

    def wrong(logprobs, *, advantage_spec, **rest):
        output = right(logprobs, advantage_spec=advantage_spec, **rest)
        if advantage_spec.certainty == 0.5:
            output = output._replace(loss=output.loss * 1.001)
        return output

    monkeypatch.setattr(known_groups, "mapo_loss", wrong)
    off = {row["variant"] for row in known_groups.rows([3]) if not row["ok"]}
    assert off == {"mapo-0.5"}


def test_a_group_of_one_is_refused(tmp_path, capsys):
    assert main(["study", "synthetic", "--out", str(tmp_path), "--group-sizes", "1"]) == 2
    assert "--group-sizes: expected at least 2, got 1" in capsys.readouterr().err


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("correction", [0, 1])
def test_closed_forms_equal_the_reference(variant, correction):
    settings = {**VARIANTS[variant].settings, "std_correction": correction}
    for successes in range(6):
        rewards = torch.tensor([1.0] * successes + [0.0] * (5 - successes), dtype=torch.float64)
        expected, _ = oracle(rewards, torch.zeros(5, dtype=torch.long), **settings)
        success, failure = analytic.binary(VARIANTS[variant], successes, 5, correction)
        ours = torch.tensor([success] * successes + [failure] * (5 - successes))
        torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=1e-9)
        general = analytic.general(VARIANTS[variant], rewards.tolist(), correction)
        torch.testing.assert_close(torch.tensor(general).double(), expected, rtol=1e-6, atol=1e-9)


def test_rho_of_the_paper():
    # Equation 7: 4p(1-p) + (1 - 4p(1-p)) sqrt((1-p)/p).
    for p in (0.1, 0.5, 0.8):
        expected = 4 * p * (1 - p) + (1 - 4 * p * (1 - p)) * math.sqrt((1 - p) / p)
        ours = analytic.gradient_scale(VARIANTS["mapo"], p, 10, 0)
        assert ours == pytest.approx(expected, rel=1e-4)


def test_shares_and_mean_weights_in_small():
    # Two answers: one of each with chance 2 p (1 - p), and lambda(1/2) = 0.
    assert analytic.signal_share(0.25, 2) == pytest.approx(0.375)
    assert analytic.mean_weight(VARIANTS["mapo"], 0.25, 2) == 0
    # Three: 1 or 2 successes, lambda(1/3) = lambda(2/3) = 1/9.
    assert analytic.mean_weight(VARIANTS["mapo"], 0.1, 3) == pytest.approx(1 / 9)


def test_the_table_has_every_number_beside_its_closed_form(tmp_path):
    run(tmp_path)
    found = json.loads((tmp_path / "synthetic.json").read_text())
    known, paper = findings.synthetic_tables(found)
    assert len(known.lines) == 5 * len(VARIANTS)  # 0, 1, 2, 3 and 4 of 4
    line = next(x for x in known.lines if x[:2] == ["1 of 4", "MAPO"])
    assert line[2] == "0.250 (0.250)"
    assert len(paper.lines) == 3 * len(VARIANTS)
    assert "| 0.9, 1, 1, 1 | MAPO | 0.250 (0.250) | -1.318 (-1.318) |" in paper.markdown()
