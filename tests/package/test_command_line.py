"""`mapo-kernels`: every command's words, its help without torch, and where extras come from."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from mapo_kernels import files
from mapo_kernels.__main__ import COMMANDS, main

ROOT = Path(__file__).parents[2]
HELP = [[], ["--help"], ["--version"], *[[name, "--help"] for name in COMMANDS]]
HELP += [["bench", name, "--help"] for name in ("run", "report", "host", "startup", "tune")]
WHICH = """
import sys
from mapo_kernels.__main__ import main
try:
    main(sys.argv[1:])
finally:
    print("imported:", sorted({"torch", "numpy", "triton", "rich", "pytest"} & set(sys.modules)))
"""


@pytest.mark.parametrize("words", HELP, ids=" ".join)
def test_help_needs_no_torch(words):
    done = subprocess.run(
        [sys.executable, "-c", WHICH, *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.stdout.splitlines()[-1] == "imported: []", done.stdout + done.stderr
    assert done.returncode == (0 if words else 2)
    if "--help" in words:
        assert done.stdout.startswith(" ".join(["usage: mapo-kernels", *words[:-1]]))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "COMMAND"),
        (["foo"], "foo"),
        (["demo", "foo"], "foo"),
        (["demo", "--see", "3"], "--see"),
        (["doctor", "foo"], "foo"),
        (["doctor", "--seeds", "3"], "--seeds"),
        (["study", "foo"], "foo"),
        (["study", "ablation", "--see", "3"], "--see"),
        (["bench", "foo"], "foo"),
        (["bench", "run", "foo"], "foo"),
        (["bench", "--suit", "full"], "--suit"),
        (["bench", "--level", "advantages"], "advantages"),
        (["bench", "--minutes", "3"], "--minutes"),
        (["bench", "report"], "FILE"),
        (["bench", "report", "x.json", "--suite", "full"], "--suite"),
        (["bench", "codegen", "--out", "x"], "--out"),
        (["bench", "host", "--suite", "full"], "--suite"),
        (["bench", "startup", "--level", "logits"], "--level"),
        (["bench", "warm", "--minutes", "3"], "--minutes"),
        (["bench", "tune", "--suite", "full"], "--suite"),
    ],
    ids=" ".join,
)
def test_an_unknown_word_is_an_error_before_anything_runs(words, named, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and not out
    assert named in err.splitlines()[-1] and "error: " in err


DIRECT = {
    "index": (None, '"mapo-kernels[demo]"'),
    "wheel": (
        {"url": "file:///tmp/mapo_kernels-1-py3-none-any.whl", "archive_info": {}},
        '"mapo-kernels[demo] @ file:///tmp/mapo_kernels-1-py3-none-any.whl"',
    ),
    "git": (
        {"url": "https://example.org/x.git", "vcs_info": {"vcs": "git", "commit_id": "ab12"}},
        '"mapo-kernels[demo] @ git+https://example.org/x.git@ab12"',
    ),
}


@pytest.mark.parametrize("kind", [*DIRECT, "not installed", "checkout", "in the checkout"])
def test_a_missing_extra_says_what_to_install(kind, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(files, "find_spec", lambda name: None if name == "rich" else True)
    monkeypatch.chdir(ROOT if kind == "in the checkout" else tmp_path)
    expected = '"mapo-kernels[demo]"'
    if "checkout" in kind:
        expected = f'-e "{ROOT if kind == "checkout" else "."}[demo]"'
    else:
        monkeypatch.setattr(files, "__file__", str(tmp_path / "mapo_kernels/files.py"))

        def distribution(name):
            if kind == "not installed":
                raise metadata.PackageNotFoundError(name)
            text = None if DIRECT[kind][0] is None else json.dumps(DIRECT[kind][0])
            return SimpleNamespace(read_text=lambda _: text)

        monkeypatch.setattr(metadata, "distribution", distribution)
        expected = DIRECT.get(kind, (None, expected))[1]
    assert main(["demo"]) == 2
    out, err = capsys.readouterr()
    assert not out and err == f"mapo-kernels demo: rich not installed: pip install {expected}\n"


@pytest.mark.parametrize(
    "action", ["run", "report x.json", "codegen", "host", "startup", "warm", "tune"]
)
def test_benchmarks_without_their_extra_are_one_line(action, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(files, "find_spec", lambda name: None if name == "rich" else True)
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *action.split()]) == 2
    err = capsys.readouterr().err
    assert err == f'mapo-kernels bench: rich not installed: pip install -e "{ROOT}[bench]"\n'
    assert not list(tmp_path.iterdir())
