"""Triton's interpreter, which runs kernels without a GPU.

It is chosen by ``TRITON_INTERPRET=1`` in the environment before triton is imported.
"""

from __future__ import annotations

import functools
from typing import Any

import triton


def active() -> bool:
    """Whether kernels run in the interpreter."""
    return bool(triton.knobs.runtime.interpret)


@functools.cache
def repair() -> None:
    """Mend what the interpreter of Triton 3.6 gets wrong; compiled kernels do not notice.

    A loop over a run-time number calls ``int()`` on an array of one element, which numpy 2.4
    refuses; and ``tl.dot`` multiplies the bits of bf16 numbers as integers.
    """
    import numpy as np  # here, for compiled kernels do not need it
    import triton.language as tl
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched

    def widen(x: Any) -> Any:
        """A bf16 operand, which numpy holds as uint16, in fp32."""
        if x.dtype.scalar != tl.bfloat16:
            return x
        data = (x.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    builder = interpreter.InterpreterBuilder
    dot = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
        return dot(self, widen(a), widen(b), *args)

    builder.create_dot = create_dot
