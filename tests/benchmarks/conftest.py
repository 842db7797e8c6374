import pytest

from benchmarks import cli
from mapo_kernels import __main__


@pytest.fixture(autouse=True)
def one_cli(monkeypatch):
    """The command runs the folder's modules, which tests change, not the same ones as installed."""
    monkeypatch.setattr(__main__, "_module", {"bench": cli}.__getitem__)
