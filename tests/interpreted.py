"""What the tests change in Triton's interpreter, which rounds otherwise than GPUs do."""

import numpy as np
import torch
from backends import INTERPRETS

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
