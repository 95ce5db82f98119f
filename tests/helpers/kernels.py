"""Where the tests of Triton kernels run: on the GPU, or in the interpreter."""

import pytest
import torch

pytest.importorskip("triton")

from gen_accel.kernels.triton.interpreter import active, repair  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if active():
    repair()
