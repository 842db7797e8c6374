"""MAPO_KERNELS_BACKEND as people write it, and what the command line says about it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mapo_kernels as mk
from mapo_kernels.__main__ import main

ROOT = Path(__file__).parents[2]
# What no machine without a GPU, where nothing interprets Triton, can use, and what is said of it.
UNUSABLE = {
    "garbage": "MAPO_KERNELS_BACKEND: expected one of ['auto', 'triton', 'eager', 'inductor'], got "
    "'garbage'",
    "TRITON": "backend 'triton': expected",
    "triton": "backend 'triton': expected",
}


@pytest.fixture
def setting(monkeypatch):
    """Sets the variable, on a machine without a GPU whose kernels are not interpreted."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    return lambda value: monkeypatch.setenv("MAPO_KERNELS_BACKEND", value)


@pytest.mark.parametrize("value", ["", " ", "auto", "AUTO", "Eager", " eager\n"])
def test_empty_means_unset_and_case_does_not_matter(setting, value):
    setting(value)
    assert mk.resolve_backend("cpu") == "eager"
    assert mk.describe_backend().startswith(f"eager (setting {value.strip().lower() or 'auto'};")


def test_the_case_of_triton_does_not_matter(setting, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    setting("Triton")
    assert mk.resolve_backend("cpu") == "triton"


@pytest.mark.parametrize("value", UNUSABLE)
def test_an_unusable_setting_is_an_error_of_calls_and_a_line_of_the_description(setting, value):
    setting(value)
    with pytest.raises((ValueError, RuntimeError)) as raised:
        mk.resolve_backend("cpu")
    assert UNUSABLE[value] in str(raised.value)
    assert mk.describe_backend() == f"none ({raised.value})"


COMMANDS = """
import mapo_kernels.backend

def look_up(*_):
    raise AssertionError("asked for a backend")

from mapo_kernels.__main__ import main

mapo_kernels.backend.resolve_backend = look_up
for command in ("--help", "doctor --help", "demo --help", "bench --help", "--version"):
    arguments = command.split()
    try:
        main(arguments)
    except SystemExit as ended:
        assert ended.code == 0, arguments
"""


@pytest.mark.parametrize("value", ["garbage", pytest.param("TRITON", marks=pytest.mark.slow)])
def test_help_and_version_need_no_backend(value):
    here = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        capture_output=True,
        text=True,
        env=os.environ | here | {"MAPO_KERNELS_BACKEND": value},
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.count("usage: ") == 4
    assert f"mapo-kernels {mk.__version__}\n" in done.stdout


@pytest.mark.parametrize("value", UNUSABLE)
def test_doctor_explains(setting, value, capsys):
    setting(value)
    assert main(["doctor"]) == 1
    out, err = capsys.readouterr()
    (line,) = [x for x in out.splitlines() if x.startswith("backend")]
    assert f"none ({UNUSABLE[value]}" in line
    assert f"not checked: {UNUSABLE[value]}" in out and not err


@pytest.mark.parametrize("command", [["demo"], ["bench", "--level", "logits"]])
@pytest.mark.parametrize("value", UNUSABLE)
def test_other_commands_refuse_in_one_line(setting, value, command, tmp_path, capsys):
    pytest.importorskip("reasoning_gym")
    setting(value)
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert UNUSABLE[value] in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
