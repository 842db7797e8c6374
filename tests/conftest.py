import numpy as np
import pytest
import torch
from backends import HAS_GPU, INTERPRETS
from parts import (  # noqa: F401
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_report_header,
)

torch.set_num_threads(1)


@pytest.fixture(params=["eager", "interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    """Each backend that can run here, eager, interpreted or on a GPU; where its tensors go.

    `backends.with_two_threads_too` adds the eager backend with two threads.
    """
    import mapo_kernels

    if request.param == "gpu" and not HAS_GPU:
        pytest.skip("needs a GPU")
    if request.param == "interpreter" and not INTERPRETS:
        pytest.skip("Triton compiles here (the gpu variant runs instead) or is not installed")
    mapo_kernels.set_backend("eager" if request.param.startswith("eager") else "triton")
    torch.set_num_threads(2 if request.param == "eager-2-threads" else 1)
    yield torch.device("cuda" if request.param == "gpu" else "cpu")
    torch.set_num_threads(1)
    mapo_kernels.set_backend(None)


if INTERPRETS:
    import triton.language as tl
    from triton.runtime import interpreter

    def fused_multiply_add(builder, x, y, z):
        """One rounding, as on every GPU: the interpreter's own version rounds the product too."""
        wide = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(wide.astype(x.data.dtype), x.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = fused_multiply_add
    cast = interpreter.InterpreterBuilder.cast_impl

    def rounding_cast(builder, x, dtype):
        """To the nearest bfloat16, as on every GPU: the interpreter's own version cuts bits off."""
        if x.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
            return cast(builder, x, dtype)
        bits = torch.from_numpy(np.array(x.data)).to(torch.bfloat16).view(torch.int16)
        return interpreter.TensorHandle(bits.numpy().view(np.uint16), dtype.scalar)

    interpreter.InterpreterBuilder.cast_impl = rounding_cast
    patch_language = interpreter._patch_lang

    def patch_language_once(function):
        """A launch replaces what triton.language has by what the interpreter runs.

        Each call of a device function does so again, which takes longer than what it computes.
        """
        seen = [x for x in function.__globals__.values() if x is tl or x is tl.core]
        if seen and not any(tl.core.is_builtin(module.load) for module in seen):
            return interpreter._LangPatchScope()
        return patch_language(function)

    interpreter._patch_lang = patch_language_once


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def nothing_computes(monkeypatch):
    """Fails a test in which anything is launched, on either backend: errors come before."""
    from mapo_kernels import linear, ops, ops_logits

    def launched(*_, **__):
        raise AssertionError("something was launched")

    for module, names in (
        (ops, ("token_loss", "group_advantages")),
        (ops_logits, ("logits_loss", "score_rows")),
        (linear, ("linear_loss", "linear_scores")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, launched)
