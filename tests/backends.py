"""Which backends can run here; imported before Triton, which decides then whether to interpret."""

import importlib.util
import os

import torch

# Without a GPU every kernel runs in the interpreter.
HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

INTERPRETS = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available() and not INTERPRETS
