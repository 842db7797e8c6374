"""`mapo-kernels bench warm` and `bench tune`: points are compiled, checked, kept, and compared."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backends import INTERPRETS

pytest.importorskip("triton")
pytest.importorskip("rich")
pytest.importorskip("jsonschema")
pytest.importorskip("pytest_benchmark")

from benchmarks import machine_code, names, tune
from benchmarks.timers import Samples
from mapo_kernels import config
from mapo_kernels.__main__ import main

ROOT = Path(__file__).parents[2]
interpreted = pytest.mark.skipif(not INTERPRETS, reason="nothing interprets Triton here")
# On a driver that does nothing, the points of a family on another batch; prints who compiled.
ON_ANOTHER_BATCH = """
import sys, tempfile, triton
from dataclasses import replace
from pathlib import Path
import torch
from benchmarks import host, tune
from benchmarks.harness import work_of
from benchmarks.levels import draw
from mapo_kernels import config

def listen(src, cache_hit, **_):
    print(src.name, cache_hit)

triton.knobs.compilation.listener = listen
with tempfile.TemporaryDirectory() as folder:
    host.install_driver(Path(folder))
    family = tune.FAMILIES[sys.argv[1]]
    case = replace(family.cases[0], n_sequences=32, length=16)
    inputs = draw(case, torch.device("cpu"))
    for point in family.points():
        with config.override(point):
            work_of(family.call, [inputs], case.direction)()
"""


def bench(*words):
    return main(["bench", *words])


def without_interpreter(**more):
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | more


@pytest.fixture(autouse=True)
def backend():
    import mapo_kernels

    yield mapo_kernels.set_backend("triton" if INTERPRETS else None)
    mapo_kernels.set_backend(None)


def test_the_names_on_the_command_line_are_those_that_there_are():
    assert tuple(tune.FAMILIES) == names.FAMILIES
    assert tuple(machine_code.TARGETS) == names.TARGETS


def test_points_begin_with_the_defaults_and_come_once():
    for name, family in tune.FAMILIES.items():
        first, *others = points = family.points()
        with config.override(first):
            assert config.changed() == {}, name
        assert len({json.dumps(point) for point in points}) == len(points)
        changes = [sum(point[key] != first[key] for key in point) for point in others]
        assert changes == sorted(changes) and 0 not in changes
        for point in others:
            with config.override(point):
                assert config.changed() == {k: x for k, x in point.items() if x != first[k]}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_what_is_warm_is_found_by_the_driver_of_a_gpu(tmp_path):
    environ = without_interpreter(TRITON_CACHE_DIR=str(tmp_path))
    command = [sys.executable, "-m", "mapo_kernels", "bench", "warm"]
    options = {"capture_output": True, "text": True, "cwd": ROOT, "env": environ}
    done = subprocess.run([*command, "--family=scoring"], **options)
    assert done.returncode == 0, done.stdout + done.stderr
    build, *rows, summary = done.stdout.splitlines()
    n_points = len(tune.FAMILIES["scoring"].points())
    assert len(rows) == n_points and "build" in build
    assert summary == f"{n_points} points for sm_90: 0 spill, 0 failed"
    assert 0 < json.loads(rows[0])["registers"]["score_kernel"] <= 128
    done = subprocess.run([sys.executable, "-c", ON_ANOTHER_BATCH, "scoring"], **options)
    assert done.returncode == 0, done.stderr
    kernels = done.stdout.split("\n")[:-1]
    assert kernels == ["score_kernel True"] * n_points


@interpreted
def test_a_dry_run_goes_through_its_points_and_goes_on_where_it_ended(tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    command = ["tune", "--dry-run", "--family=scoring", f"--out={path}"]
    assert bench(*command) == 0
    lines = path.read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines]
    assert [row["status"] for row in rows] == ["ok"] * len(tune.FAMILIES["scoring"].points())
    assert all(row["error"] < 1e-4 and row["ms"] is None for row in rows)
    chosen = json.loads((tmp_path / "x.tuning.json").read_text())
    assert chosen == {"LOGITS": {"score_hint": config.LOGITS.score_hint}}
    # Killed in the middle of a line: only that point is measured again.
    path.write_text("".join(lines[:-1]) + lines[-1][:20])
    capsys.readouterr()
    tuning = tune.Tuning(path, dry_run=True)
    assert not tuning.measure(["scoring"], -1.0)  # no time for it
    assert len(tuning.rows) == len(rows) - 1
    assert tuning.measure(["scoring"], 1.0)
    assert capsys.readouterr().out.count(" ok ") == 1
    assert [json.loads(line)["point"] for line in path.open()] == [row["point"] for row in rows]
    # Of another commit nothing is taken over.
    tuning.about["commit"] = "another"
    path.write_text("".join(json.dumps(row | {"about": tuning.about}) + "\n" for row in rows))
    assert not tune.Tuning(path, dry_run=True).rows


@interpreted
@pytest.mark.parametrize("content", ['{"name": "mine"}\n', "a text\n", "[]\n", None])
def test_a_file_that_is_not_ones_own_is_found_before_anything_is_measured(
    tmp_path, monkeypatch, capsys, content
):
    for name in ("compile_points", "Roofs"):
        monkeypatch.setattr(tune, name, lambda *_, **__: pytest.fail("work was done"))
    file = tmp_path / "x.jsonl"
    file.write_text(content or "mine")
    path = file if content else file / "y.jsonl"
    assert bench("tune", "--dry-run", f"--out={path}") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(path) in err
    assert file.read_text() == (content or "mine")


@interpreted
def test_points_that_are_wrong_or_fail_are_not_timed(tmp_path, monkeypatch):
    family = tune.FAMILIES["scoring"]
    values = {"LOGITS.score_hint": ("evict_first", "evict_last", "nonsense")}

    def scores(logits, rest):
        hint = config.LOGITS.score_hint
        if hint == "nonsense":
            raise ValueError("no such hint")
        return family.call(logits, rest) + (hint == "evict_last")

    changed = {"scoring": family._replace(call=scores, values=values)}
    monkeypatch.setattr(tune, "FAMILIES", changed)
    monkeypatch.setattr(tune, "on_gpu", lambda work, effort, graph_below: timed.append(work()))
    tuning, timed = tune.Tuning(tmp_path / "x.jsonl", dry_run=True), []
    assert tuning.measure([], 1.0)
    found = {x["point"]["LOGITS.score_hint"]: x for x in tuning.rows.values()}
    assert {hint: x["status"] for hint, x in found.items()} == {
        "evict_first": "ok",
        "evict_last": "wrong",
        "nonsense": "failed",
    }
    assert "no such hint" in found["nonsense"]["reason"]
    assert not timed


@interpreted
def test_logits_are_timed_on_a_copy_of_what_is_compared(tmp_path, monkeypatch):
    values = {"LOGITS.backwards": (True, False)}
    changed = {"rows": tune.FAMILIES["rows"]._replace(values=values)}
    monkeypatch.setattr(tune, "FAMILIES", changed)

    def timer(work, effort, graph_below):
        for _ in range(2):
            (grad,) = work()
        # In place: the gradient is where the logits of one of the copies were.
        (case,) = tune.FAMILIES["rows"].cases
        copies = tuning.run_of(tune.tiny(case)).copies
        assert grad.data_ptr() in {x.leaves[0].data_ptr() for x in copies}
        return Samples([3.0, 1.0, 2.0], "graph")

    monkeypatch.setattr(tune, "on_gpu", timer)
    tuning = tune.Tuning(tmp_path / "x.jsonl", dry_run=True)
    prepare = tuning.run_of
    tuning.dry_run, tuning.run_of = False, lambda case: prepare(tune.tiny(case))
    assert tuning.measure([], 1.0)
    assert [(row["status"], row["ms"]) for row in tuning.rows.values()] == [("ok", 2.0)] * 2


def test_winners():
    first, second, *_, last = tune.FAMILIES["log-probs"].points()
    shapes = [case.shape for case in tune.FAMILIES["log-probs"].cases]

    def row(point, case, ms, status="ok"):
        given = {"family": "log-probs", "case": shapes[case], "point": point}
        return given | {"ms": ms, "status": status}

    rows = [row(first, 0, 2.0), row(first, 1, 8.0), row(second, 0, 1.0), row(second, 1, 9.0)]
    # Faster, but not known on both cases.
    rows += [row(last, 0, 0.5), row(last, 1, 0.1, "wrong")]
    text, chosen = tune.winners(rows)
    assert "| log-probs | 2 | 4 | 3 |" in text
    assert chosen["LOGPROBS"] == {k.partition(".")[2]: x for k, x in second.items()}
    # A difference within the noise decides nothing.
    text, chosen = tune.winners([row(first, 0, 1.0), row(second, 0, 0.995)])
    assert "the defaults" in text
    assert chosen["LOGPROBS"] == {k.partition(".")[2]: x for k, x in first.items()}


@pytest.mark.parametrize(
    "option, message",
    [
        ("--family=row", "argument --family: invalid choice: 'row'"),
        ("--target=sm_1", "argument --target: invalid choice: 'sm_1'"),
        ("--jobs=all", "argument --jobs: invalid int value: 'all'"),
    ],
)
def test_wrong_usage_is_named(option, message, capsys):
    with pytest.raises(SystemExit) as ended:
        bench("tune", option)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_tuning_needs_a_gpu_or_a_dry_run(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench("tune") == 2
    assert "mapo-kernels bench: tune: expected a GPU, or --dry-run" in capsys.readouterr().err
