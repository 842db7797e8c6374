"""The demo end to end at toy size, and the parts whose mistakes training would hide."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import mean

import pytest
import torch

pytest.importorskip("reasoning_gym")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from reasoning_gym import create_dataset

import mapo_kernels
from mapo_kernels import files
from mapo_kernels.__main__ import main
from mapo_kernels.demo import experiment, plots, report, train
from mapo_kernels.demo.experiment import run_experiment
from mapo_kernels.demo.model import END, PAD, Characters, Decoder, answer_logits, sample
from mapo_kernels.demo.settings import Settings
from mapo_kernels.demo.tasks import TASKS, Problem, ProblemStream, held_out_problems
from mapo_kernels.demo.train import Rollouts, group_summary
from mapo_kernels.files import CommandError

ROOT = Path(__file__).parents[2]
# spell_backward gives partial credit, so that even an untrained model has signal to learn from.
TINY = Settings(
    task="spell_backward",
    steps=7,
    prompts=4,
    group_size=4,
    minibatches=2,
    warmup_success=1.0,
    warmup_steps=30,
    warmup_batch=8,
    eval_prompts=8,
    eval_every=3,
    width=16,
    layers=1,
    heads=2,
)
MEANS = ("on_policy_ratio", "kept_columns")  # over steps, of runs that sample with top-p
PLOTS = ("success", "groups_without_signal", "advantages")


def run_tiny(out, settings=TINY, *, estimators=("mapo", "grpo"), seeds=1, resume=False):
    return run_experiment(
        settings,
        estimators=estimators,
        seeds=seeds,
        device=torch.device("cpu"),
        out=out,
        resume=resume,
    )


def read_log(out):
    return json.loads((out / "log.json").read_text())


def without_clocks(log):
    return {
        name: {**run, "steps": [{**record, "seconds": 0} for record in run["steps"]]}
        for name, run in log["runs"].items()
    }


def interrupt_after(monkeypatch, calls):
    take_step = train.Run.step
    remaining = iter(range(calls))

    def step(self):
        take_step(self)
        if next(remaining, None) is None:
            raise KeyboardInterrupt

    monkeypatch.setattr(train.Run, "step", step)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads cost more than they bring at this size, the more so where other tests run too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def undrawn(monkeypatch):
    """Spares the seconds that plots take where a test is not about them."""
    monkeypatch.setattr(plots, "draw_all", lambda log, out: [])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    assert run_tiny(out) == 0
    return out


def assert_is_png(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and len(content) > 5000


def test_run_leaves_log_models_and_plots(finished):
    log = read_log(finished)
    assert log["status"] == "finished"
    assert log["configuration"]["task"] == "spell_backward"
    assert set(log["versions"]) >= {"python", "torch", "reasoning-gym", "mapo-kernels"}
    warm_up, mapo, grpo = log["runs"].values()
    assert [run["phase"] for run in log["runs"].values()] == ["warm-up", "mapo", "grpo"]
    for run in (mapo, grpo):
        assert [record["step"] for record in run["steps"]] == list(range(7))
        assert [point["step"] for point in run["evals"]] == [0, 3, 6, 7]
        for record in run["steps"]:
            assert record["success"] == pytest.approx(record["success_ratio_mean"])
    assert mapo["evals"][0] == grpo["evals"][0]
    for name in PLOTS:
        assert_is_png(finished / f"{name}.png")


def test_groups_without_signal_are_those_the_package_counts(finished):
    for name in ("mapo_seed0", "grpo_seed0"):
        for record in read_log(finished)["runs"][name]["steps"]:
            # The mean over minibatches.
            counted = record["zero_advantage_groups"] * TINY.minibatches
            assert record["groups_without_signal"] == pytest.approx(counted)


def test_saved_model_can_be_rebuilt(finished):
    saved = torch.load(finished / "mapo_seed0.pt", weights_only=True)
    run = train.Run(Settings(**saved["configuration"]), "mapo", 0, torch.device("cpu"))
    run.load(finished / "mapo_seed0.pt")
    weights = run.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in saved["model"].items())
    assert run.answer([Problem("stone<", "enots")], 2, None).tokens.shape == (1, 2, 7)


def test_same_seed_gives_the_same_run(finished, tmp_path, undrawn):
    run_tiny(tmp_path, estimators=("grpo",))
    again, before = (without_clocks(read_log(out))["grpo_seed0"] for out in (tmp_path, finished))
    assert again == before


# 2 interrupts the warm-up, 6 the first estimator (after 4 warm-up lines), 14 the second.
@pytest.mark.parametrize("calls", [2, 6, 14])
def test_interrupt_then_resume_equals_uninterrupted(
    finished, tmp_path, monkeypatch, undrawn, calls
):
    monkeypatch.setattr(experiment, "SAVE_EVERY", 2)
    with monkeypatch.context() as patch:
        interrupt_after(patch, calls)
        assert run_tiny(tmp_path) == 130
    partial = read_log(tmp_path)
    assert partial["status"] == "interrupted"
    assert sum(len(run["steps"]) for run in partial["runs"].values()) == calls + 1

    assert run_tiny(tmp_path, resume=True) == 0
    assert without_clocks(read_log(tmp_path)) == without_clocks(read_log(finished))
    for name in ("mapo_seed0.pt", "grpo_seed0.pt"):
        resumed = torch.load(tmp_path / name, weights_only=True)["model"]
        straight = torch.load(finished / name, weights_only=True)["model"]
        assert all(torch.equal(resumed[key], straight[key]) for key in straight)


def test_interrupted_run_draws_what_it_has(tmp_path, monkeypatch, capsys):
    interrupt_after(monkeypatch, 6)
    assert run_tiny(tmp_path) == 130
    assert "Interrupted" in capsys.readouterr().out
    for name in PLOTS:
        assert_is_png(tmp_path / f"{name}.png")


def test_resume_refuses_other_settings(finished, tmp_path):
    with pytest.raises(CommandError, match="steps was 7, is 8"):
        run_tiny(finished, replace(TINY, steps=8), resume=True)
    with pytest.raises(CommandError, match="log.json: No such file or directory"):
        run_tiny(tmp_path, resume=True)


def test_fresh_run_ignores_what_was_saved(tmp_path, undrawn):
    run_tiny(tmp_path, replace(TINY, steps=1), estimators=("grpo",))
    run_tiny(tmp_path, replace(TINY, steps=2), estimators=("grpo",))
    assert len(read_log(tmp_path)["runs"]["grpo_seed0"]["steps"]) == 2


@pytest.fixture(scope="module")
def replayed(tmp_path_factory):
    """A demo that trained without replay first, and was continued with it."""
    out, settings = tmp_path_factory.mktemp("replayed"), replace(TINY, top_p=0.9, steps=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw_all", lambda log, out: [])
        run_tiny(out, settings, estimators=("mapo",))
        run_tiny(out, settings, estimators=("mapo", "mapo-replay"), resume=True)
    return out


def test_replay_has_importance_ratios_of_one_and_no_replay_the_kept_probability(replayed):
    _, plain, replay = read_log(replayed)["runs"].values()
    assert (plain["phase"], replay["phase"]) == ("mapo", "mapo-replay")
    assert plain["evals"][0] == replay["evals"][0]
    # NaN where no group of the first minibatch has signal. A kept set has at least top_p.
    ratios = [[x["on_policy_ratio"] for x in run["steps"]] for run in (plain, replay)]
    without, with_replay = ([x for x in found if x == x] for found in ratios)
    assert without and all(0.9 <= x < 0.99 for x in without)
    assert with_replay and set(with_replay) == {1.0}
    assert all(1 < step["kept_columns"] < 29 for step in plain["steps"] + replay["steps"])


@pytest.mark.parametrize(
    "phase, minibatches", [("mapo-replay", 1), ("mapo-replay", 2), ("mapo", 1)]
)
def test_the_ratio_of_every_token_in_a_step(phase, minibatches, monkeypatch):
    settings = replace(TINY, top_p=0.7, minibatches=minibatches)
    run = train.Run(settings, phase, 0, torch.device("cpu"))
    answer, rewards = run.answer, torch.tensor([0.0, 1.0]).repeat(4, 2)
    # Signal in every group: a model that has learned nothing is never right.
    monkeypatch.setattr(run, "answer", lambda *x: answer(*x)._replace(rewards=rewards))
    run.step()
    (step,) = run.record["steps"]
    assert step["scored_tokens"] * minibatches > 50
    if minibatches == 2:  # the second meets a policy that the first has changed
        assert step["on_policy_ratio"] == 1 < step["ratio_max"]
    elif phase == "mapo-replay":
        assert step["ratio_mean"] == step["ratio_max"] == 1 and step["approx_kl"] == 0
    else:
        assert step["ratio_mean"] < step["ratio_max"] < 1


def test_replay_is_drawn_and_reported(replayed, capsys):
    log = read_log(replayed)
    drawn = plots.draw_all(log, replayed)
    assert_is_png(replayed / "sampling_masks.png")
    report.print_summary(log, replayed, drawn)
    shown = capsys.readouterr().out
    assert "mapo-replay: mean importance ratio before any update 1.0000, " in shown
    assert "mapo-replay against mapo: one seed cannot rank" in shown


@pytest.mark.parametrize(
    "words, error",
    [
        ("--replay", "--replay: expected --top-p below 1, got 1.0"),
        ("--top-p 0", "top_p: expected a number in (0, 1], got 0.0"),
        ("--top-p nan --replay", "top_p: expected a number in (0, 1], got nan"),
    ],
)
def test_a_replay_of_nothing_is_one_line(words, error, tmp_path, capsys):
    assert main(["demo", *words.split(), "--out", str(tmp_path / "x")]) == 2
    assert error in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_command_line(tmp_path):
    command = [sys.executable, "-m", "mapo_kernels", "demo", "--out", str(tmp_path), "--steps", "2"]
    small = ["--prompts", "4", "--group-size", "4", "--warmup-success", "0", "--estimator", "apd"]
    paths = os.pathsep.join([str(ROOT), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *small], capture_output=True, text=True, timeout=600, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "apd, seed 0  step 2/2" in done.stdout
    assert list(read_log(tmp_path)["runs"]) == ["warm-up_seed0", "apd_seed0"]


def test_impossible_settings_are_one_line(tmp_path, capsys):
    assert main(["demo", "--prompts", "6", "--out", str(tmp_path)]) == 2
    assert "prompts: expected a multiple of minibatches" in capsys.readouterr().err


def test_missing_extra_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(
        files, "find_spec", lambda name: None if name == "rich" else find_spec(name)
    )
    assert main(["demo"]) == 2
    assert "mapo-kernels demo: rich not installed: pip install " in capsys.readouterr().err


@pytest.mark.parametrize("text, value", [("linear", "linear"), ("0.25", 0.25)])
def test_certainty_is_a_name_or_a_number(text, value, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(experiment, "run_experiment", lambda given, **_: seen.append(given))
    main(["demo", "--certainty", text, "--out", str(tmp_path)])
    assert seen[0].certainty == value and seen[0].steps == Settings().steps


def test_replay_trains_every_estimator_twice(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(experiment, "run_experiment", lambda _, **given: seen.append(given))
    words = "--estimator grpo rloo grpo --top-p 0.5 --replay"
    main(["demo", *words.split(), "--out", str(tmp_path)])
    assert seen[0]["estimators"] == ["grpo", "rloo", "grpo-replay", "rloo-replay"]


@pytest.mark.parametrize("text", ["2", "linaer", "nan"])
def test_other_certainties_are_refused_in_one_line(text, tmp_path, capsys):
    assert main(["demo", "--certainty", text, "--out", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert "certainty: expected" in error and error.count("\n") == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "words, shown",
    [
        ("demo --help", "--resume"),
        ("doctor --help", "usage: mapo-kernels doctor"),
        ("--help", "doctor"),
        ("--version", mapo_kernels.__version__),
    ],
)
def test_help_does_not_wait_for_torch(words, shown):
    code = "import sys, atexit; from mapo_kernels.__main__ import main\n"
    code += f"atexit.register(lambda: print('torch' in sys.modules)); main({words.split()})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert shown in done.stdout and done.stdout.endswith("False\n"), done.stdout + done.stderr


@pytest.mark.parametrize(
    "words", [["nothing"], ["demo", "now"], ["demo", "--stepz", "3"], ["doctor", "demo"], []]
)
def test_unknown_words_are_errors(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert "usage: mapo-kernels" in capsys.readouterr().err


# A compact solution as the scorer expects it.
EXPANDED = dict.fromkeys(TASKS, str) | {"number_sorting": lambda x: str([f"{d}.0" for d in x])}


def wrong_answers(task, solution):
    others = [character for character in task.alphabet if character != solution[0]]
    yield from (character + solution[1:] for character in others)
    yield solution + solution[-1]
    yield solution[:-1]
    yield ""


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_compact_form_agrees_with_the_scorer(task):
    dataset = create_dataset(task.name, seed=0, size=100, **task.options)
    for entry in dataset:
        problem = Problem(task.prompt(entry), task.solution(entry))
        assert set(problem.prompt + problem.solution) <= set(task.alphabet)
        assert len(problem.prompt) <= task.prompt_length
        assert len(problem.solution) <= task.answer_length
        assert dataset.score_answer(EXPANDED[task.name](problem.solution), entry) == 1
        assert task.reward(problem, problem.solution) == 1
        assert task.reward(problem, None) == 0
        for answer in wrong_answers(task, problem.solution):
            score = dataset.score_answer(answer, entry) * task.partial_credit
            # The scorer's credit for the solution with something after it depends on rounding.
            if len(answer) <= len(problem.solution):
                assert task.reward(problem, answer) == pytest.approx(score)
            assert task.reward(problem, answer) < 1


def test_sorting_is_exact_although_the_scorer_forgives_an_error_of_one():
    task = TASKS["number_sorting"]
    dataset = create_dataset(task.name, seed=0, size=50, **task.options)
    forgiven = 0
    for entry in dataset:
        problem = Problem(task.prompt(entry), task.solution(entry))
        off_by_one = "".join(str(max(int(digit) - 1, 0)) for digit in problem.solution)
        if off_by_one != problem.solution:
            forgiven += dataset.score_answer(EXPANDED[task.name](off_by_one), entry) == 1
            assert task.reward(problem, off_by_one) == 0
    assert forgiven > 0


def test_success_is_exact_match_not_mean_reward():
    task = TASKS["spell_backward"]
    problem = Problem("stones<", "senots")
    nearly, too_long = task.reward(problem, "senot<"), task.reward(problem, "senotsx")
    assert (nearly, too_long) == (5 / 6, 6 / 7)
    rewards = torch.tensor([[1.0, nearly, too_long, 0.0]])
    correct = torch.tensor([[True, False, False, False]])
    summary = group_summary(Rollouts(None, None, None, None, rewards, correct))
    assert summary["success"] == 0.25 and summary["reward"] > 0.6


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_held_out_prompts_are_never_trained_on(task):
    held_out = [problem.prompt for problem in held_out_problems(task, 256)]
    assert len(held_out) == len(set(held_out)) > 100
    for seed in range(3):
        trained_on = {problem.prompt for problem in ProblemStream(task, seed).take(3000)}
        assert trained_on.isdisjoint(held_out)


def sampled(top_p):
    """A model, prompts, and three answers to each, of up to five tokens."""
    torch.manual_seed(0)
    model = Decoder(vocabulary=9, length=9, width=16)
    prompts = torch.randint(2, 9, (5, 4))
    generator = torch.Generator().manual_seed(0)
    return model, prompts, sample(model, prompts, 5, copies=3, top_p=top_p, generator=generator)


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_cached_sampling_agrees_with_the_full_forward_pass(top_p):
    model, prompts, (tokens, mask, logp) = sampled(top_p)
    full = answer_logits(model, prompts.repeat_interleave(3, dim=0), tokens).detach()
    # The log-probs by the definition: of the likeliest, until they have `top_p`.
    p, order = full.softmax(-1).sort(descending=True)
    p = p.where(p.cumsum(-1) - p < top_p, 0.0)
    expected = (p / p.sum(-1, keepdim=True)).log().gather(-1, order.argsort(-1))
    torch.testing.assert_close(logp[mask], expected[mask])
    assert (logp[mask].gather(-1, tokens[mask][:, None]) > -torch.inf).all()
    ended_before = (tokens == END).cumsum(dim=1) - (tokens == END).long() > 0
    assert torch.equal(mask, ~ended_before) and not mask.all()
    assert (tokens[ended_before] == PAD).all()


def test_minibatches_are_whole_groups_in_order():
    tensors = [torch.arange(24).view(6, 2, 2) for _ in Rollouts._fields]
    parts = Rollouts(*tensors).minibatches(3)
    assert [part.rewards[:, 0].tolist() for part in parts] == [
        [0, 2, 4, 6],
        [8, 10, 12, 14],
        [16, 18, 20, 22],
    ]
    assert all(torch.equal(x, part.rewards) for part in parts for x in part)


def test_unfinished_answers_decode_to_none():
    characters = Characters(replace(TASKS["spell_backward"], alphabet="ab"))
    rows = torch.tensor([[2, 3, END], [2, 3, 2], [2, PAD, END], [END, PAD, PAD]])
    assert characters.decode(rows) == ["ab", None, None, ""]


def test_the_table_of_replay_is_that_of_the_result_file():
    name = "benchmarks/results/demo_sampling_masks_3_seeds.json"
    log, text = json.loads((ROOT / name).read_text()), (ROOT / "docs/demo.md").read_text()
    assert name in text and "(demo_sampling_masks.png)" in text
    for phase, row in (("mapo", "| without replay |"), ("mapo-replay", "| with replay |")):
        runs = [run for run in log["runs"] if run["phase"] == phase]
        before, after = ([run["evals"][i]["success_sampled"] for run in runs] for i in (0, -1))
        ratio, kept = (mean(run["means"][x] for run in runs) for x in MEANS)
        numbers = [f"{ratio:.3f}", *(f"{x:.2f}" for x in before + after), f"{mean(after):.3f}"]
        (line,) = (line for line in text.splitlines() if line.startswith(row))
        assert re.findall(r"\d\.\d+", line) == [*numbers, f"{kept:.2f}"]
        assert ratio == 1 or phase == "mapo"


def test_conclusion_claims_only_what_the_seeds_show():
    (one,) = report.conclusion({"mapo": {0: 0.9}, "grpo": {0: 0.1}})
    assert "one seed cannot rank" in one
    noisy = {"mapo": {0: 0.9, 1: 0.6, 2: 0.8}, "grpo": {0: 0.7, 1: 0.8, 2: 0.7}}
    assert report.conclusion(noisy)[-1].endswith("no ranking.")
    equal_once = {"mapo": {0: 0.8, 1: 0.78, 2: 0.78}, "grpo": {0: 0.8, 1: 0.8, 2: 0.8}}
    assert report.conclusion(equal_once)[-1].endswith("no ranking.")
    clear = {"mapo": {0: 0.9, 1: 0.88, 2: 0.91}, "grpo": {0: 0.7, 1: 0.71, 2: 0.7}}
    *_, verdict = report.conclusion(clear)
    assert "larger than the spread" in verdict and "grpo: mean +0.193, standard dev" in verdict
    assert report.conclusion({}) == []
    replay = {"grpo": {0: 0.1}, "mapo": {0: 0.9}, "mapo-replay": {0: 0.9}}
    assert [x.partition(":")[0] for x in report.conclusion(replay)] == [
        "mapo against grpo",
        "mapo-replay against mapo",
    ]
