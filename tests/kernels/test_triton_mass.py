import math

import pytest
import torch

from gen_accel.kernels import mass as definition
from gen_accel.kernels.triton.mass import block_mass, takes
from helpers.kernels import DEVICE

pytestmark = pytest.mark.usefixtures("by_torch")


def tensors(tokens, keys, dim, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, max(tokens, keys), dim)
    q, k = (2 * torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(2))
    return q[:, :, :tokens].transpose(1, 2), k[:, :, :keys].transpose(1, 2)


# Text behind the blocks, a ragged tail, blocks and samples that are no powers of two.
@pytest.mark.parametrize(
    "tokens, keys, block, rows, dim",
    [
        (64, 64, 16, 16, 16),
        (150, 170, 16, 3, 24),
        (300, 317, 96, 5, 64),
        (270, 300, 128, 128, 32),
        (40, 41, 8, 1, 16),
    ],
)
def test_mass_is_that_of_the_definition(tokens, keys, block, rows, dim, poison):
    q, k = tensors(tokens, keys, dim)
    blocks = tokens // block
    found = block_mass(q, k, None, block, blocks, rows, dim**-0.5)
    right = definition.block_mass(q, k, block=block, blocks=blocks, rows_per_block=rows)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_multiplied_exactly(dtype):
    q, k = tensors(96, 100, 32, dtype)
    right = definition.block_mass(q.float(), k.float(), block=32, blocks=3, scale=1.0)
    found = block_mass(q, k, None, 32, 3, 32, 1.0)
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)


def test_a_log_sum_exp_that_is_known_saves_a_pass():
    q, k = tensors(150, 170, 24)
    lse = torch.einsum("bnhd,bmhd->bhnm", q, k).mul(0.3).logsumexp(-1)
    right = definition.block_mass(q, k, block=16, blocks=9, rows_per_block=3, scale=0.3)
    found = block_mass(q, k, lse, 16, 9, 3, 0.3)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)
    # It is believed: one that is larger by log 2 halves the mass.
    half = block_mass(q, k, lse + math.log(2), 16, 9, 3, 0.3)
    torch.testing.assert_close(half, right / 2, rtol=1e-5, atol=1e-6)


def test_large_logits_do_not_overflow():
    q, k = tensors(64, 64, 16)
    right = definition.block_mass(q, k, block=16, blocks=4, scale=100.0)
    assert torch.isfinite(right).all()
    torch.testing.assert_close(
        block_mass(q, k, None, 16, 4, 16, 100.0), right, rtol=5e-3, atol=1e-5
    )


def test_what_the_kernel_leaves_to_torch():
    def q(dim, dtype):
        return torch.empty(1, 1, 1, dim, dtype=dtype)

    assert takes(q(128, torch.bfloat16), 128) and takes(q(64, torch.float32), 64)
    assert not takes(q(256, torch.bfloat16), 128) and not takes(q(128, torch.bfloat16), 256)


def test_the_operation_is_registered_well():
    args = (*tensors(32, 32, 16), None, 16, 2, 16, 0.25)
    torch.library.opcheck(block_mass, args, test_utils=("test_schema", "test_faketensor"))
