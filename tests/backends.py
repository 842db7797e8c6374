"""Which backends can run here; imported before Triton, which decides then whether to interpret."""

import importlib.util
import os

import pytest
import torch

# Without a GPU every kernel runs in the interpreter.
HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

INTERPRETS = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available() and not INTERPRETS

# With two threads torch splits some sums differently. Tests of the order of sums run with one, as
# every other test does (see conftest.py), and with two.
_EAGER = ["eager", "eager-2-threads"]
_OTHERS = ["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)]
with_two_threads_too = pytest.mark.parametrize("device", _EAGER + _OTHERS, indirect=True)
eager_with_one_and_two_threads = pytest.mark.parametrize("device", _EAGER, indirect=True)
