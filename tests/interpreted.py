"""What the tests change in Triton's interpreter: it rounds otherwise than GPUs do, and is slow."""

import operator

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
    # The rest changes no number, only how long it takes: most of the time is spent on the types of
    # results, of which there are few, and on checks of overflow whose outcome nobody reads.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(
        sanitize_overflow=False
    )
    numpy_dtype_of = interpreter._get_np_dtype
    make_block_type, make_tensor = tl.block_type.__init__, tl.tensor.__init__
    numpy_dtypes: dict[str, np.dtype] = {}
    block_types: dict[tuple, dict] = {}

    def remembered_numpy_dtype(dtype):
        if dtype.name not in numpy_dtypes:
            numpy_dtypes[dtype.name] = numpy_dtype_of(dtype)
        return numpy_dtypes[dtype.name]

    def remembered_block_type(self, element_ty, shape):
        """Equal types share what they consist of."""
        key = element_ty.name, *map(operator.index, shape)
        if key not in block_types:
            make_block_type(self, element_ty, shape)
            block_types[key] = self.__dict__
        self.__dict__ = block_types[key]

    def tensor_of_remembered_type(self, handle, type):
        """Tensors of a type share their shape."""
        if "of_tensors" not in type.__dict__:
            make_tensor(self, handle, type)
            type.of_tensors = {k: v for k, v in self.__dict__.items() if k != "handle"}
        self.__dict__.update(type.of_tensors, handle=handle)

    def broadcast_unless_equal(self, lhs, rhs):
        if lhs.type.is_block() and rhs.type.is_block() and [*lhs.type.shape] == [*rhs.type.shape]:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    semantic = type(interpreter.interpreter_semantic)
    broadcast = semantic.broadcast_impl_value
    semantic.broadcast_impl_value = broadcast_unless_equal
    interpreter._get_np_dtype = remembered_numpy_dtype
    tl.block_type.__init__, tl.tensor.__init__ = remembered_block_type, tensor_of_remembered_type
    patch_language = interpreter._patch_lang
    languages: dict[int, list] = {}

    def patch_language_once(function):
        """A launch replaces what triton.language has by what the interpreter runs.

        Each call of a device function does so again, which takes longer than what it computes.
        """
        known = function.__globals__
        if id(known) not in languages:
            languages[id(known)] = [x for x in known.values() if x is tl or x is tl.core]
        seen = languages[id(known)]
        if seen and not any(tl.core.is_builtin(module.load) for module in seen):
            return interpreter._LangPatchScope()
        return patch_language(function)

    interpreter._patch_lang = patch_language_once
