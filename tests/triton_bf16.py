"""Makes Triton's interpreter right for bfloat16, which it stores as uint16 and computes on as such; for tests only.

Patched: dot, elementwise arithmetic and comparison, and casts. ``test_triton.py`` first holds each operation that the
kernels use on bfloat16 against torch, so that the kernels' tests mean something.
"""

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter

Handle = interpreter.TensorHandle


def _is_bf16(handle):
    return handle.dtype.scalar == tl.bfloat16


def _up(handle):
    """The values as float32, exactly."""
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def _down(values):
    """float32 to bfloat16 bits, to nearest even; every NaN becomes one NaN."""
    values = np.array(values, dtype=np.float32, order="C")
    bits = np.frombuffer(values.tobytes(), np.uint32).reshape(values.shape)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).astype(np.uint16)


def patch():
    """Replace the methods of the interpreter's builder for this process."""
    builder = interpreter.InterpreterBuilder
    dot, binary, cast = builder.create_dot, builder.binary_op, builder.cast_impl

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if not (_is_bf16(a) or _is_bf16(b)):
            return dot(self, a, b, d, input_precision, max_num_imprecise_acc)
        left, right = (_up(x) if _is_bf16(x) else x.data.astype(np.float32) for x in (a, b))
        return Handle(np.matmul(left, right) + d.data, d.dtype.scalar)

    def binary_op(self, left, right, operation):
        if not (_is_bf16(left) and _is_bf16(right)):
            return binary(self, left, right, operation)
        result = operation(_up(left), _up(right))
        return Handle(result, tl.int1) if result.dtype == np.bool_ else Handle(_down(result), tl.bfloat16)

    def cast_impl(self, source, to):
        before, after = source.dtype.scalar, to.scalar
        if before == tl.bfloat16 and after != tl.bfloat16:
            return Handle(_up(source).astype(interpreter._get_np_dtype(to)), after)
        if after == tl.bfloat16 and before != tl.bfloat16:
            return Handle(_down(source.data), after)
        return cast(self, source, to)

    builder.create_dot, builder.binary_op, builder.cast_impl = create_dot, binary_op, cast_impl
