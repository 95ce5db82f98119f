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
    refuses; ``tl.dot`` multiplies the bits of bf16 numbers as integers; fp32 is cut to bf16 instead
    of rounded; and what rounds up to the next power of two becomes a wrong 8-bit float.
    """
    import numpy as np  # here, for compiled kernels do not need it
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched

    def widen(x: Any) -> Any:
        """A bf16 operand, which numpy holds as uint16, in fp32; an 8-bit float likewise."""
        if x.dtype.scalar == tl.float8e4nv:
            data = torch.from_numpy(x.data).view(torch.float8_e4m3fn).float().numpy()
            return interpreter.TensorHandle(data, tl.float32)
        if x.dtype.scalar != tl.bfloat16:
            return x
        data = (x.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    builder = interpreter.InterpreterBuilder
    dot = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
        return dot(self, widen(a), widen(b), *args)

    builder.create_dot = create_dot
    narrow = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn}

    def rounding(convert: Any) -> Any:
        """Of fp32 numbers, to nearest."""

        def converted(self: Any, x: Any, to: Any, *args: Any) -> Any:
            if x.dtype.scalar != tl.float32 or to.scalar not in narrow:
                return convert(self, x, to, *args)
            codes = torch.from_numpy(np.ascontiguousarray(x.data)).to(narrow[to.scalar])
            bits = torch.uint8 if codes.element_size() == 1 else torch.uint16
            return interpreter.TensorHandle(codes.view(bits).numpy(), to.scalar)

        return converted

    builder.create_fp_to_fp = rounding(builder.create_fp_to_fp)
    builder.cast_impl = rounding(builder.cast_impl)
