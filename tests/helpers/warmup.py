"""Calls that are compiled as on a GPU that is not here, and not run: `launches`."""

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from gen_accel.kernels.triton import launch
from gen_accel.kernels.triton.forward import attention_forward


class _Driver:
    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self.target


class _Warmup(list):
    """Stands for the kernel: its launches are compiled and collected."""

    def __getitem__(self, grid):
        return lambda **call: self.append(attention_forward.run(grid=grid, warmup=True, **call))


def launches(capability):
    """From now on `launch.attend` compiles for this device; returns the list of its launches."""
    assert not triton.knobs.runtime.interpret
    driver.set_active(_Driver(capability))
    kernels = _Warmup()
    launch.attention_forward = kernels
    launch._capability = lambda device: capability
    return kernels


def variants():
    """How many different kernels Triton has made for the calls so far."""
    return len(attention_forward.device_caches[0][0])
