"""`mapo-kernels bench`: what its files and folders may be, and what is refused in one line."""

import copy
import errno
import importlib
import json
import os
from pathlib import Path

import pytest

from benchmarks import cli, harness, plots, report, results
from benchmarks.harness import DRY, Roofs
from mapo_kernels import files
from mapo_kernels.__main__ import main

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

ROOT = Path(__file__).parents[2]
FOUND = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())
README = "a\n<!-- x: begin -->\n<!-- x: end -->\n"


@pytest.fixture
def runs(monkeypatch):
    """Stands in for a suite of minutes; how often it was run."""
    calls = []

    def measure(arguments, path):
        calls.append(arguments)
        results.write(FOUND | {"seconds": len(calls)}, path)
        return 0

    monkeypatch.setattr(cli, "measure", measure)
    return calls


def bench(*words):
    return main(["bench", *map(str, words)])


def refused(capsys, *arguments):
    assert bench(*arguments) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and err.startswith("mapo-kernels bench: "), out + err
    return err


@pytest.mark.parametrize("where", ["a file", "below a file", "/dev/full", "long"])
def test_out_that_can_be_no_folder_is_refused_before_anything_runs(runs, tmp_path, capsys, where):
    file = tmp_path / "file"
    file.write_text("mine")
    out = {"a file": file, "below a file": file / "out", "/dev/full": Path("/dev/full")}
    path = out.get(where, tmp_path / ("x" * 300))
    assert str(path) in refused(capsys, "--out", path, "--name=x")
    assert not runs and file.read_text() == "mine" and not (tmp_path / "file.partial").exists()


@pytest.mark.parametrize("action", ["host", "startup"])
def test_so_it_is_where_there_are_no_cases(action, tmp_path, monkeypatch, capsys):
    measured = importlib.import_module(f"benchmarks.{action}")
    monkeypatch.setattr(measured, "measure", lambda *_: pytest.fail("something was measured"))
    file = tmp_path / "file"
    file.write_text("mine")
    assert str(file) in refused(capsys, action, "--out", file, "--name=x")
    assert file.read_text() == "mine"


def test_results_go_to_the_current_folder(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert bench("run", "--name=x", "--no-plots") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.csv", "x.json"]


@pytest.mark.parametrize("name", ["a/b", "../x", "/tmp/x", "x" * 300])
def test_a_name_that_can_be_no_file_is_refused_before_anything_runs(runs, tmp_path, capsys, name):
    refused(capsys, "--out", tmp_path / "out", f"--name={name}")
    assert not runs and not list(tmp_path.rglob("*.*"))


def test_a_file_of_something_else_is_not_overwritten(runs, tmp_path, capsys):
    mine = tmp_path / "package.json"
    mine.write_text('{"name": "mine"}')
    error = refused(capsys, "--out", tmp_path, "--name=package")
    assert f"{mine}: expected a result file" in error
    assert not runs and mine.read_text() == '{"name": "mine"}'


def test_a_result_of_the_same_name_is_replaced(runs, tmp_path, capsys):
    for _ in range(2):
        assert bench("--out", tmp_path, "--name=x", "--no-plots") == 0
    assert len(runs) == 2 and results.read(tmp_path / "x.json") == FOUND | {"seconds": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.csv", "x.json"]


def test_only_plots_need_matplotlib(runs, tmp_path, monkeypatch, capsys):
    known = files.find_spec
    monkeypatch.setattr(files, "find_spec", lambda x: None if x == "matplotlib" else known(x))
    where = ["--out", tmp_path, "--name=x"]
    assert "matplotlib not installed" in refused(capsys, *where) and not runs
    assert bench(*where, "--no-plots") == 0 and len(runs) == 1
    assert bench("report", tmp_path / "x.json", "--no-plots") == 0


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("name", ["x.csv", "x_relative_time.png"])
def test_a_full_disk_is_one_line_after_the_tables(runs, tmp_path, monkeypatch, capsys, name):
    flush = os.fsync

    def fail(descriptor):
        if name in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    assert bench("--out", tmp_path, "--name=x") == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and f"{tmp_path / name}: No space left" in err
    assert "hidden-states" in out  # minutes of work are not lost
    assert not list(tmp_path.glob("*.partial"))
    assert results.read(tmp_path / "x.json")["rows"] == FOUND["rows"]


@pytest.mark.parametrize(("status", "code"), [(1, 1), (2, 130)])
def test_what_a_failed_or_interrupted_run_measured_is_shown(
    tmp_path, monkeypatch, capsys, status, code
):
    def measure(arguments, path):
        results.write(FOUND | {"rows": FOUND["rows"][:3], "finished": False}, path)
        return status

    monkeypatch.setattr(cli, "measure", measure)
    assert bench("--out", tmp_path, "--name=x", "--no-plots") == code
    assert "rows are missing" in capsys.readouterr().out
    assert len((tmp_path / "x.csv").read_text().splitlines()) == 4


def test_an_earlier_result_is_not_shown_for_a_run_that_measured_nothing(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "x.json").write_text(json.dumps(FOUND))
    monkeypatch.setattr(cli, "measure", lambda *_: 4)
    assert bench("--out", tmp_path, "--name=x") == 4
    assert not capsys.readouterr().out


BROKEN = {
    "truncated": json.dumps(FOUND)[:1000],
    "empty": "",
    "nested": "[" * 100_000,
    "a list": "[]",
    "only the format": '{"format": 1}',
    "latin": "\xff",
}


@pytest.mark.parametrize("kind", [*BROKEN, "absent", "folder", "device"])
def test_report_refuses_what_is_no_result_file(tmp_path, capsys, kind):
    good, path, readme = tmp_path / "x.json", tmp_path / "y.json", tmp_path / "README.md"
    good.write_text(json.dumps(FOUND))
    readme.write_text(README)
    if kind in BROKEN:
        path.write_text(BROKEN[kind], encoding="latin-1")
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path = Path("/dev/full")
    error = refused(capsys, "report", good, path, f"--readme={readme}")
    assert str(path) in error
    # Not even the file before it was drawn.
    assert readme.read_text() == README and not list(tmp_path.glob("*.png"))


def parts(value, path=()):
    """Every way to a part of a result: keys and positions, few rows."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield (*path, key)
            yield from parts(part, (*path, key))
    elif isinstance(value, list) and path[-1] == "rows":
        yield from parts(value[0], (*path, 0))


@pytest.mark.parametrize("damage", ["absent", None, "text", []])
def test_what_passes_as_a_result_can_be_shown(tmp_path, damage):
    """Whatever part of a file is broken: it is refused, or the report can show it."""
    small = FOUND | {"rows": FOUND["rows"][:3]}
    accepted = 0
    for path in parts(small):
        broken = copy.deepcopy(small)
        within = broken
        for key in path[:-1]:
            within = within[key]
        if damage == "absent":
            del within[path[-1]]
        else:
            within[path[-1]] = damage
        file = tmp_path / "x.json"
        file.write_text(json.dumps(broken))
        try:
            found = results.read(file)
            with results.of_whole_file(file):
                plots.draw(found)
        except files.CommandError as error:
            assert str(file) in str(error)
            continue
        accepted += 1
    assert accepted


@pytest.mark.parametrize(
    "text", [None, "no markers", README * 2, "\xff", "folder"], ids=lambda x: repr(x)[:12]
)
def test_report_refuses_a_readme_that_it_cannot_write_to(tmp_path, capsys, text):
    result, readme = tmp_path / "x.json", tmp_path / "README.md"
    result.write_text(json.dumps(FOUND))
    if text == "folder":
        readme.mkdir()
    elif text is not None:
        readme.write_text(text, encoding="latin-1")
    assert f"{readme}: " in refused(capsys, "report", result, f"--readme={readme}", "--no-plots")
    assert text in (None, "folder") or readme.read_text(encoding="latin-1") == text


def test_a_linked_readme_stays_a_link(tmp_path, capsys):
    (tmp_path / "x.json").write_text(json.dumps(FOUND))
    (tmp_path / "docs").mkdir()
    target, link = tmp_path / "docs/README.md", tmp_path / "README.md"
    target.write_text(README)
    target.chmod(0o664)
    link.symlink_to(target)
    given = ["report", tmp_path / "x.json", f"--readme={link}", "--no-plots"]
    assert bench(*given) == 0
    assert link.is_symlink() and report.markdown(FOUND) in target.read_text()
    assert target.stat().st_mode & 0o777 == 0o664


def test_markup_is_printed_as_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = copy.deepcopy(FOUND)
    row = next(row for row in found["rows"] if row["status"] == "unavailable")
    row["reason"] = "lacks [bold]x[/] and [/y]"
    found["rows"][0]["shape"] = "[red]1024"
    monkeypatch.setattr(cli, "measure", lambda arguments, path: results.write(found, path) or 0)
    assert bench("--out", "[bold]x[/]", "--name", "[red]") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "[bold]x[/]/[red].json and .csv" in out and "[red]1024" in out
    assert "[bold]x[/]/[red]_relative_time.png" in out
    assert row["reason"] in out


def test_a_run_has_the_arguments_of_its_command(runs, tmp_path, capsys):
    suite = ["--suite=full", "--level=log-probs", "--level=logits", "--commit=abc", "--notes=x y"]
    assert bench(*suite, "--out", tmp_path, "--name=x", "--no-plots") == 0
    (given,) = runs
    assert (given.suite, given.level) == ("full", ["log-probs", "logits"])
    assert (given.commit, given.notes, given.dry_run) == ("abc", "x y", False)


def test_a_run_ends_where_its_rows_cannot_be_written(tmp_path, monkeypatch, capsys):
    """pytest runs the suite, and a full disk ends it after what was written."""
    pytest.importorskip("pytest_benchmark")
    write = results.write

    def fail(found, path):
        if found["rows"]:
            raise files.CommandError(f"{path}: No space left on device")
        write(found, path)

    monkeypatch.setattr(results, "write", fail)
    monkeypatch.setattr(harness, "Roofs", lambda device, effort, tiny: Roofs(device, DRY, True))
    given = ["--level=advantages-mapo", "--out", tmp_path, "--name=x", "--no-plots"]
    assert bench(*given) == 1
    assert "rows are missing" in capsys.readouterr().out
