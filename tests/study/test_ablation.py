"""The ablation at toy size: what its runs are made of, and that they continue and repeat."""

import json
from dataclasses import asdict, replace

import pytest
import torch

pytest.importorskip("reasoning_gym")
pytest.importorskip("jsonschema")
pytest.importorskip("filelock")

from mapo_kernels import files
from mapo_kernels.__main__ import main
from mapo_kernels.demo.tasks import Problem
from mapo_kernels.study import ablation, runs, settings, statistics
from mapo_kernels.study.ablation import phases, read_records, run_study
from mapo_kernels.study.settings import ESTIMATORS, NORM_RATE, RATES, REGIMES, Cell, StudySettings

TINY = StudySettings(
    steps=3,
    prompts=4,
    group_size=4,
    warmup_steps=20,
    eval_prompts=8,
    eval_copies=1,
    eval_every=2,
    width=8,
    layers=1,
    heads=1,
)
CELL = Cell("main", "mapo", "mixed", "partial", 0, 1e-3)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def without_clock(record):
    return {name: x for name, x in record.items() if name != "seconds"}


def new_run(cell, base=TINY):
    """A run of a cell that starts from a model that has learned nothing."""
    start = runs.Run(replace(base, steps=0), runs.WARM_UP, cell.seed, torch.device("cpu"))
    return runs.StudyRun(cell.settings(base), cell, start)


# One run


def test_a_record_follows_the_schema_and_two_runs_of_a_cell_are_equal(tmp_path):
    first = runs.run_cell(CELL, TINY, tmp_path)
    files.check(first, settings.RECORD_SCHEMA)
    assert Cell.of(first) == CELL
    assert [x["step"] for x in first["evals"]] == [0, 2, 3]
    assert first["steps"]["step"] == [1, 2, 3]
    assert first["settings"]["reward"] == "partial"
    (tmp_path / "again").mkdir()  # with a warm-up of its own
    again = runs.run_cell(CELL, TINY, tmp_path / "again")
    assert json.dumps(without_clock(again)) == json.dumps(without_clock(first))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_estimator_is_what_its_name_says(estimator):
    run = new_run(replace(CELL, estimator=estimator))
    spec = run.advantage_spec
    family, _, form = estimator.partition("-")
    assert spec.estimator == {"dapo": "grpo"}.get(family, family)
    assert str(spec.certainty) == (form or "quadratic")
    clips = (run.settings.eps_low, run.settings.eps_high)
    assert clips == ((0.2, 0.28) if estimator == "dapo" else (0.2, 0.2))
    assert (run.settings.draws > 1) == (estimator == "dapo")


def test_all_estimators_start_from_one_warm_up(tmp_path):
    cells = [replace(CELL, estimator=name, regime="easy") for name in ("grpo", "mapo-0.5")]
    first, second = (runs.run_cell(cell, TINY, tmp_path) for cell in cells)
    assert first["evals"][0] == second["evals"][0] and first["warmup"] == second["warmup"]
    assert [x.name for x in (tmp_path / "starts").glob("*.pt")] == ["easy_seed0.pt"]


@pytest.mark.parametrize(
    "solution, answer, points",
    [
        ("123", "123", 0.75),
        ("1234", "1234", 1.0),
        ("12345", "12349", 1.0),
        ("12345", "12399", 0.75),
        ("123456", "123456", 1.5),
        ("1234", "12345", 0.8),
        ("1234", None, 0.0),
    ],
)
def test_partial_rewards_reach_the_threshold_by_length_as_well_as_by_correctness(
    solution, answer, points
):
    run = new_run(replace(CELL, reward="partial"))
    assert run.reward(Problem("", solution), answer) == pytest.approx(points)
    run = new_run(replace(CELL, reward="binary"))
    assert run.reward(Problem("", solution), answer) == (answer == solution)


def scored(run, patterns):
    """What a roll-out returns, group after group, with these rewards instead."""
    rewards = torch.tensor(patterns, dtype=torch.float32)
    drawn = run.answer(run.stream.take(len(patterns)), 4, run.generator)
    return drawn._replace(rewards=rewards, correct=rewards > 0)


def test_success_decides_lambda_only_where_it_is_known(monkeypatch):
    # By the threshold no answer succeeds, in truth half of them do, where lambda is 0.
    for reward, expected in {"partial": 1.0, "partial-success": 0.0}.items():
        run = new_run(replace(CELL, reward=reward))
        batch = scored(run, [[0.5, 0.5, 0, 0]] * 4)
        monkeypatch.setattr(run, "_roll_out", lambda batch=batch: batch)
        run._groups = run._silent = 0
        run.step()
        assert run.record["steps"][0]["lambda_mean"] == pytest.approx(expected)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_who_reads_successes(estimator, monkeypatch):
    learned = []
    for reward in ("partial", "partial-success"):
        run = new_run(replace(CELL, estimator=estimator, reward=reward))
        # By the threshold no answer succeeds, in truth three of four do.
        batch = scored(run, [[0.75, 0.5, 0.25, 0]] * 4)
        monkeypatch.setattr(run, "_roll_out", lambda batch=batch: batch)
        run._groups = run._silent = 0
        run.step()
        learned.append(torch.cat([x.detach().flatten() for x in run.model.parameters()]))
    assert torch.equal(*learned) == (estimator not in settings.READ_SUCCESS)


def test_dynamic_sampling_keeps_groups_with_signal_and_fills_up_with_others(monkeypatch):
    run = new_run(replace(CELL, estimator="dapo"))
    silent, signal = [0.0] * 4, [1.0, 0, 0, 0]
    draws = [[silent, signal, silent, silent], [silent] * 4, [signal, silent, silent, signal]]
    batches = iter([scored(run, patterns) for patterns in draws])
    monkeypatch.setattr(runs.Run, "_roll_out", lambda self: next(batches))
    batch = run._roll_out()
    # Three groups with signal in three draws, and the first without.
    assert batch.rewards.tolist() == [silent, signal, signal, signal]
    assert (run._groups, run._silent) == (12, 9)
    assert next(batches, None) is None


def test_dynamic_sampling_ends_when_the_batch_is_full(monkeypatch):
    run = new_run(replace(CELL, estimator="dapo"))
    batches = iter([scored(run, [[1.0, 0, 0, 0]] * 4)])
    monkeypatch.setattr(runs.Run, "_roll_out", lambda self: next(batches))
    assert run._roll_out().rewards.shape == (4, 4)
    assert (run._groups, run._silent) == (4, 0)


def test_without_dynamic_sampling_a_batch_is_the_demos():
    cell = replace(CELL, estimator="grpo", reward="binary")
    run, plain = new_run(cell), new_run(cell)
    ours, demos = run._roll_out(), runs.Run._roll_out(plain)
    assert torch.equal(ours.tokens, demos.tokens)
    assert torch.equal(ours.rewards, demos.rewards)


@pytest.mark.parametrize("stage", ["main", "norm"])
def test_gradients_are_rescaled_to_one_norm_in_the_stage_norm_alone(stage, monkeypatch):
    run = new_run(replace(CELL, stage=stage))
    norms = []
    take_step = run.optimizer.step

    def step():
        gradients = [x.grad for x in run.model.parameters()]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
        take_step()

    monkeypatch.setattr(run.optimizer, "step", step)
    for scale in (1e-3, 1.0):
        loss = scale * sum(x.square().sum() for x in run.model.parameters())
        done = run._update(loss)
        limited = done["gradient_norm"] > 1 or stage == "norm"
        assert norms[-1] == pytest.approx(1.0 if limited else done["gradient_norm"], rel=1e-4)
        assert done["update_norm"] > 0


def test_the_device_is_the_one_that_was_asked_for(tmp_path, monkeypatch):
    asked = []
    made = runs.Run.__init__

    def init(self, given, phase, seed, device, start=None):
        asked.append("that of the start" if start and device == start.device else str(device))
        made(self, given, phase, seed, torch.device("cpu"), start)

    monkeypatch.setattr(runs.Run, "__init__", init)
    monkeypatch.setattr(runs, "_environment", lambda device: {"machine": device})
    cell = replace(CELL, estimator="dapo")
    assert runs.run_cell(cell, TINY, tmp_path, "cuda:1")["machine"] == "cuda:1"
    assert asked == ["cuda:1", "that of the start"]


def test_a_device_that_there_is_not_is_refused(tmp_path, capsys):
    arguments = ["study", "ablation", "--out", str(tmp_path), "--device"]
    assert main([*arguments, "meta"]) == 2
    assert "--device: expected a usable device, got 'meta'" in capsys.readouterr().err
    assert main([*arguments, "cpu", "--model", "x"]) == 2
    assert "--model, --config: expected both or neither" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# The study


def study(out, base=TINY, *, estimators=("mapo", "grpo"), regimes=("mixed",), seeds=1, **others):
    given = {"estimators": estimators, "regimes": regimes, "seeds": seeds, "jobs": 1} | others
    return run_study(base, out=out, **given)


@pytest.fixture
def quick(monkeypatch):
    """Records without training; the success of a run is ten times its learning rate."""

    def run_cell(cell, base, out, device):
        assert device == "cpu"
        success = 10 * cell.learning_rate
        evals = [{"step": 0, "success_sampled": success, "success_greedy": 0.0}]
        return {
            "format": settings.FORMAT,
            **asdict(cell),
            "settings": asdict(cell.settings(base)),
            "warmup": {"updates": 0, "success": 0.0},
            "evals": evals,
            "steps": {name: [] for name in settings.STEP_LISTS},
            "seconds": 0.0,
            "commit": "unknown",
            "versions": {},
            "machine": "none",
        }

    monkeypatch.setattr(runs, "run_cell", run_cell)


def test_the_cells_of_the_whole_study(quick, tmp_path):
    study(tmp_path, estimators=list(ESTIMATORS), regimes=list(REGIMES), seeds=8)
    cells = [Cell.of(x) for x in read_records(tmp_path / settings.RECORDS_NAME)]
    assert len(set(cells)) == len(cells)
    counts = {}
    for cell in cells:
        key = (cell.stage, cell.regime, cell.reward)
        counts.setdefault(key, {}).setdefault(cell.estimator, set()).add(cell.seed)
    seeds = {key: {len(x) for x in found.values()} for key, found in counts.items()}
    assert seeds.pop(("main", "mixed", "binary")) == {8}
    assert all(found == {2 if key[0] == "rate" else 5} for key, found in seeds.items())
    assert set(counts["main", "mixed", "partial-success"]) == set(settings.READ_SUCCESS)
    assert {x for x in seeds if x[0] == "norm"} == {
        ("norm", x, "binary") for x in ("mixed", "hard")
    }
    for cell in cells:  # the largest learning rate was the best
        rates = {"main": (RATES[cell.regime][-1],), "norm": (NORM_RATE,)}
        assert cell.learning_rate in rates.get(cell.stage, RATES[cell.regime])


def test_seeds_can_be_added_to_a_finished_study(quick, tmp_path):
    path = tmp_path / settings.RECORDS_NAME
    study(tmp_path, seeds=3, other_seeds=1)
    before = path.read_bytes()
    study(tmp_path, seeds=3, other_seeds=2)
    assert path.read_bytes().startswith(before)
    added = [Cell.of(x) for x in read_records(path)[before.count(b"\n") :]]
    assert {x.seed for x in added} == {1} and {x.stage for x in added} == {"main", "norm"}
    assert not any((x.stage, x.reward) == ("main", "binary") for x in added)


def test_a_study_that_was_cut_off_continues(quick, tmp_path, capsys):
    study(tmp_path)
    path = tmp_path / settings.RECORDS_NAME
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-2]) + lines[-2][:40])
    study(tmp_path)
    assert path.read_bytes() == whole
    capsys.readouterr()
    study(tmp_path)
    assert path.read_bytes() == whole and capsys.readouterr().out.count("\n") == 1


def test_an_interrupt_keeps_what_is_finished(quick, tmp_path, monkeypatch):
    run_cell, left = runs.run_cell, iter(range(4))

    def run(*given):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return run_cell(*given)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "run_cell", run)
        with pytest.raises(KeyboardInterrupt):
            study(tmp_path)
    assert len(read_records(tmp_path / settings.RECORDS_NAME)) == 4
    assert study(tmp_path) == 0


def test_other_settings_and_other_files_are_refused(quick, tmp_path):
    study(tmp_path)
    path = tmp_path / settings.RECORDS_NAME
    before = path.read_bytes()
    with pytest.raises(files.CommandError, match="a run whose steps was 3, now it is 4"):
        study(tmp_path, replace(TINY, steps=4))
    path.write_bytes(before + b"{}\n")
    with pytest.raises(files.CommandError, match="line .* is no record: .*required"):
        study(tmp_path)


@pytest.mark.slow
def test_processes_give_the_records_of_one_process(tmp_path):
    cells = [Cell("main", name, "mixed", "binary", 0, 1e-3) for name in ("mapo", "grpo")]
    found = []
    for jobs in (1, 2):
        out = tmp_path / str(jobs)
        out.mkdir()
        with ablation._runner(TINY, out, jobs, "cpu") as run:
            records = sorted(run(cells), key=lambda x: x["estimator"])
        found.append([without_clock(x) for x in records])
    assert json.dumps(found[0]) == json.dumps(found[1])


@pytest.mark.parametrize("words", ["--seeds 0", "--jobs 0", "--steps -1", "--other-seeds 0"])
def test_impossible_options_are_one_line(words, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["study", "ablation", *words.split(), "--out", str(out)]) == 2
    assert f"{words.split()[0]}: expected at least" in capsys.readouterr().err
    assert not out.exists()


# Statistics


def record(rate, seed, *success, stage="rate", estimator="mapo"):
    evals = [{"step": 10 * i, "success_sampled": x} for i, x in enumerate(success)]
    named = {"stage": stage, "regime": "mixed", "estimator": estimator}
    return {**named, "learning_rate": rate, "seed": seed, "evals": evals}


def test_area_is_the_mean_height_of_the_curve():
    uneven = record(1e-3, 0, 0.0, 1.0, 1.0)
    uneven["evals"][2]["step"] = 40
    assert statistics.area(uneven) == pytest.approx((5 + 30) / 40)
    assert statistics.area(record(1e-3, 0, 0.25)) == 0.25


def test_rates_are_chosen_by_the_mean_area_of_their_own_stage():
    records = [
        record(1e-3, 100, 0.0, 0.4),
        record(1e-3, 101, 0.0, 0.2),
        record(3e-3, 100, 0.0, 0.5),
        record(3e-3, 101, 0.0, 0.0),
        record(3e-3, 0, 1.0, 1.0, stage="main"),
        record(3e-3, 100, 0.0, 0.5, estimator="grpo"),
        record(1e-3, 100, 0.0, 0.5, estimator="grpo"),
    ]
    assert statistics.chosen_rates(records, "mixed") == {"mapo": 1e-3, "grpo": 1e-3}
    assert list(phases([], [], ["mixed"], 1))[0] == []
