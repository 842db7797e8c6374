"""The demo's output folder: what it may touch, what it refuses, and what a failure leaves."""

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("reasoning_gym")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("jsonschema")

from mapo_kernels import files
from mapo_kernels.__main__ import main
from mapo_kernels.demo import experiment, plots
from mapo_kernels.demo.experiment import run_experiment
from mapo_kernels.demo.settings import Settings

ROOT = Path(__file__).parents[2]
SMALL = ["--prompts", "4", "--group-size", "2", "--warmup-success", "0", "--steps", "0"]
QUICK = Settings(
    task="spell_backward",
    steps=1,
    prompts=2,
    group_size=2,
    minibatches=1,
    warmup_success=0.0,
    eval_prompts=2,
    eval_copies=1,
    width=8,
    layers=1,
    heads=1,
)


def run_quick(out, *, settings=QUICK, estimators=("mapo",), seeds=1, resume=False):
    cpu = torch.device("cpu")
    given = {"estimators": estimators, "seeds": seeds, "device": cpu, "out": out}
    assert run_experiment(settings, resume=resume, **given) == 0
    return json.loads((out / "log.json").read_text())


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Plots take seconds, and most of these tests are not about them."""
    monkeypatch.setattr(plots, "draw_all", lambda log, out: [])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished run, never changed."""
    out = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw_all", lambda log, out: [])
        run_quick(out)
    return out


@pytest.fixture
def earlier(finished, tmp_path):
    """A folder with a finished run, to change at will."""
    out = tmp_path / "earlier"
    shutil.copytree(finished, out)
    return out


def contents(path):
    """Every file below a folder with its bytes, every link with its target."""
    found = {}
    for x in path.rglob("*"):
        what = os.readlink(x) if x.is_symlink() else x.is_file() and x.read_bytes()
        found[str(x.relative_to(path))] = what
    return found


def refused(capsys, *arguments):
    """The one line that the command prints, with exit code 2."""
    assert main(["demo", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and err.startswith("mapo-kernels demo: "), out + err
    return err


def refused_resume(out, **given):
    with pytest.raises(files.CommandError) as raised:
        run_quick(out, resume=True, **given)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400 + len(str(out))
    return str(raised.value)


# Files of others


@pytest.mark.parametrize("linked", [False, True])
def test_a_folder_of_others_is_refused_and_stays_as_it_is(tmp_path, capsys, linked):
    out, elsewhere = tmp_path / "llama", tmp_path / "elsewhere"
    for path in (out, elsewhere):
        path.mkdir()
    if linked:
        (out / "checkpoints").symlink_to(elsewhere)
    else:
        (out / "checkpoints").mkdir()
    for name in ("my_llama.pt", "mapo_seed0.pt"):
        (out / "checkpoints" / name).write_bytes(b"years of work")
    before = contents(tmp_path)
    error = refused(capsys, *SMALL, "--out", out)
    assert f"{out}: expected an empty folder or one of the demo's own" in error
    assert contents(tmp_path) == before


@pytest.mark.parametrize("text", ["{}", '{"format": 1, "runs": []}', "", "[1, 2", '"x"', "\xff"])
@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_log_of_others_is_refused_and_stays_as_it_is(tmp_path, capsys, text, resume):
    (tmp_path / "log.json").write_text(text, encoding="latin-1")
    before = contents(tmp_path)
    error = refused(capsys, *SMALL, *resume, "--out", tmp_path)
    assert f"{tmp_path / 'log.json'}: expected the log of a demo" in error
    assert contents(tmp_path) == before


def test_files_of_others_beside_ones_own_are_left_alone(earlier, tmp_path):
    linked = tmp_path / "mine.pt"
    linked.write_bytes(b"mine")
    names = ("notes.txt", "best.pt", "mapo_seed0.pt.bak", "mapo_seedx.pt", "mapo_seed7.pt")
    others = [earlier / x for x in (*names, "checkpoints/my_llama.pt", "checkpoints/mapo_seed0.pt")]
    (earlier / "checkpoints").mkdir()
    for path in others:
        path.write_bytes(b"mine")
    for own in (earlier / "mapo_seed0.pt", earlier / "grpo_seed0.pt"):
        own.unlink(missing_ok=True)
        own.symlink_to(linked)
    run_quick(earlier, estimators=("mapo", "grpo"))
    assert [path.read_bytes() for path in [*others, linked]] == [b"mine"] * 8
    assert not own.is_symlink()


def test_what_the_summary_lists_is_what_the_run_wrote(earlier, capsys):
    (earlier / "best.pt").write_bytes(b"mine")
    run_quick(earlier)
    assert f"In {earlier}: log.json, mapo_seed0.pt, warm-up_seed0.pt\n" in capsys.readouterr().out


def test_a_log_that_is_no_file_is_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "log.json")
    assert "log.json: expected a file" in refused(capsys, *SMALL, "--out", tmp_path)
    (tmp_path / "log.json").unlink()
    (tmp_path / "log.json").symlink_to("/dev/full")
    assert "log.json: expected a file" in refused(capsys, *SMALL, "--out", tmp_path)


def test_resume_makes_no_folder(tmp_path, capsys):
    absent = tmp_path / "absent"
    error = refused(capsys, "--resume", "--out", absent)
    assert error.endswith(f"{absent}: No such file or directory\n")
    assert not contents(tmp_path)


# Resuming


def test_resume_keeps_the_record_of_other_estimators_and_seeds(tmp_path, capsys):
    before = run_quick(tmp_path, estimators=("mapo", "rloo"), seeds=2)["runs"]
    after = run_quick(tmp_path, estimators=("grpo",), resume=True)["runs"]
    assert after.pop("grpo_seed0") and after == before
    shown = capsys.readouterr().out
    assert shown.rindex("grpo") > shown.rindex("rloo_seed1.pt") - 200
    # A run that starts anew starts with an empty log.
    assert list(run_quick(tmp_path)["runs"]) == ["warm-up_seed0", "mapo_seed0"]
    assert not (tmp_path / "rloo_seed1.pt").exists()


def damaged(content, kind):
    """The bytes of a run, damaged."""
    if kind == "truncated":
        return content[: len(content) // 2]
    if kind == "flipped":  # one bit of the weights
        archive = zipfile.ZipFile(io.BytesIO(content))
        biggest = max(archive.infolist(), key=lambda member: member.file_size)
        at = content.index(archive.read(biggest)) + biggest.file_size // 2
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    if kind in ("empty", "text"):
        return b"" if kind == "empty" else b"a text\nof two lines\n"
    buffer = io.BytesIO()
    state = torch.load(io.BytesIO(content), weights_only=True)
    if kind == "a model":
        state = state["model"]
    elif kind == "a list":
        state = [1, 2]
    elif kind == "other settings":
        state["configuration"]["learning_rate"] = 0.5
    elif kind == "another run":
        state["name"] = "grpo_seed0"
    elif kind == "code":
        state["model"] = subprocess.Popen
    torch.save(state, buffer)
    return buffer.getvalue()


KINDS = ("truncated", "flipped", "empty", "text", "a model", "a list", "other settings")
KINDS += ("another run", "code")


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_run_is_refused_before_anything_is_trained(earlier, kind, capsys):
    saved = earlier / "mapo_seed0.pt"
    saved.write_bytes(damaged(saved.read_bytes(), kind))
    before = contents(earlier)
    # The runs before it (rloo is none yet) are not trained first.
    error = refused_resume(earlier, estimators=("rloo", "mapo"))
    assert error.startswith(f"{saved}: expected a run of this demo, got")
    assert contents(earlier) == before and not capsys.readouterr().out


def test_a_run_that_is_no_file_is_refused(earlier):
    saved = earlier / "warm-up_seed0.pt"
    saved.unlink()
    os.mkfifo(saved)
    assert f"{saved}: expected a file" in refused_resume(earlier)


LOG_DAMAGE = {
    "truncated": lambda text: text[: len(text) // 2],
    "nested": lambda text: "[" * 100_000,
    "no runs": lambda text: json.dumps(json.loads(text) | {"runs": None}),
    "no run of ours": lambda text: text.replace('"mapo_seed0"', '"../mapo_seed0"'),
    "another format": lambda text: text.replace(experiment.FORMAT, "another"),
}


@pytest.mark.parametrize("kind", LOG_DAMAGE)
def test_a_damaged_log_is_refused(earlier, kind):
    log = earlier / "log.json"
    log.write_text(LOG_DAMAGE[kind](log.read_text()))
    before = contents(earlier)
    assert refused_resume(earlier).startswith(f"{log}: expected the log of a demo")
    assert contents(earlier) == before


def test_another_run_in_the_same_folder_is_refused(earlier, capsys):
    with experiment.opened(earlier, resume=True):
        before = contents(earlier)
        error = refused(capsys, *SMALL, "--out", earlier)
        assert f"{earlier}: another run is using it" in error
        assert contents(earlier) == before
    run_quick(earlier)


def test_another_process_in_the_same_folder_is_refused(earlier, capsys):
    waits = "import sys; from pathlib import Path; from mapo_kernels.demo import experiment\n"
    waits += "with experiment.opened(Path(sys.argv[1]), resume=False):\n"
    waits += "    print('locked', flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", waits, earlier],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        assert other.stdout.readline() == "locked\n"
        assert "another run is using it" in refused(capsys, *SMALL, "--out", earlier)
    finally:
        other.kill()  # which frees the folder, too
        other.communicate()
    run_quick(earlier)


# Folders that cannot be written to


@pytest.mark.parametrize(
    "where", ["a file", "below a file", "/dev/full", "below /dev/full", "long"]
)
@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_out_that_can_be_no_folder(tmp_path, capsys, where, resume):
    file = tmp_path / "file"
    file.write_text("mine")
    out = {
        "a file": file,
        "below a file": file / "out",
        "/dev/full": Path("/dev/full"),
        "below /dev/full": Path("/dev/full/out"),
        "long": tmp_path / ("x" * 300),
    }[where]
    error = refused(capsys, *SMALL, *resume, "--out", out)
    assert str(out) in error
    assert contents(tmp_path) == {"file": b"mine"}


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk(patch, name):
    """No file whose name has `name` in it can be flushed to disk."""
    flush = os.fsync

    def fail(descriptor):
        if name in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise FULL
        flush(descriptor)

    patch.setattr(os, "fsync", fail)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("name", ["log.json", "warm-up_seed0.pt", "mapo_seed0.pt", "success.png"])
def test_a_full_disk_is_one_line_and_leaves_no_partial_file(earlier, monkeypatch, capsys, name):
    if name == "success.png":
        monkeypatch.undo()
    before = contents(earlier)
    full_disk(monkeypatch, name)
    given = ["--prompts", "4", "--group-size", "2", "--warmup-success", "0", "--steps", "1"]
    assert main(["demo", *given, "--estimator", "mapo", "--out", str(earlier)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and name in err and FULL.strerror in err
    after = contents(earlier)
    assert not [path for path in after if "partial" in path]
    # What was there before is whole.
    assert after.get(name) in (before.get(name), None)


def test_a_run_is_replaced_as_a_whole(tmp_path, monkeypatch):
    steps, replace_file = [], os.replace

    def watch(source, target):
        if Path(target).name == "mapo_seed0.pt" and Path(target).exists():
            steps.append(len(torch.load(target, weights_only=True)["record"]["steps"]))
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", watch)
    run_quick(tmp_path)
    assert steps == [0]


def test_whole_files_do_not_follow_links_and_keep_what_was_there(tmp_path, monkeypatch):
    path, mine = tmp_path / "x.pt", tmp_path / "mine"
    mine.write_bytes(b"mine")
    for link in (path, tmp_path / "x.pt.partial"):
        link.symlink_to(mine)
    files.write_whole(path, b"first")
    assert path.read_bytes() == b"first" and not path.is_symlink() and mine.read_bytes() == b"mine"
    for patched in ("fsync", "replace"):
        with monkeypatch.context() as patch:

            def fail(*_):
                raise KeyboardInterrupt

            patch.setattr(os, patched, fail)
            with pytest.raises(KeyboardInterrupt):
                files.write_whole(path, b"second")
        assert path.read_bytes() == b"first"
    assert sorted(contents(tmp_path)) == ["mine", "x.pt"]
    with pytest.raises(
        files.CommandError, match=f"^{tmp_path}/absent/x: No such file or directory$"
    ):
        files.write_whole(tmp_path / "absent/x", b"")


# Arguments


@pytest.mark.parametrize("value", ["nan", "inf", "-0.1", "1.5"])
def test_warmup_success_is_a_share(tmp_path, capsys, value):
    error = refused(capsys, f"--warmup-success={value}", "--out", tmp_path / "out")
    assert f"warmup_success: expected a number in [0, 1], got {float(value)}" in error
    assert not contents(tmp_path)


@pytest.mark.parametrize("name", ["meta", "cuda:99", "xla", "nothing", "hpu", "vulkan", "cpu cpu"])
def test_a_device_that_cannot_be_trained_on_is_one_line(tmp_path, capsys, name):
    error = refused(capsys, "--device", name, "--out", tmp_path / "out")
    assert f"--device: expected a usable device, got {name!r}" in error
    assert not contents(tmp_path)


def test_markup_in_a_folder_is_printed_as_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *SMALL, "--estimator", "mapo", "--out", "[bold]x[/]"]) == 0
    assert "In [bold]x[/]: log.json, mapo_seed0.pt, warm-up_seed0.pt" in capsys.readouterr().out
