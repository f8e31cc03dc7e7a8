"""The fused rotation and normalisation against the plain one."""

import pytest
import torch
import torch.nn.functional as F

from star_dist.model.qk_norm import rotate_and_normalize
from star_dist.model.rope import Rotary, rotate


@pytest.fixture
def inputs() -> tuple[torch.Tensor, Rotary, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, angles = torch.randn(5, 3, 8, generator=generator), 3 * torch.randn(5, 4, generator=generator)
    angles = angles.double().repeat_interleave(2, dim=-1)
    signs = torch.tensor([-1.0, 1.0]).double().repeat(4)
    return x.double(), (angles.cos(), angles.sin() * signs), torch.tensor([[0.5], [2.0], [3.0]]).double()


def test_rotation_is_a_product_of_complex_numbers(inputs: tuple) -> None:
    x, (cosines, sines), _ = inputs
    turns = torch.complex(cosines[:, 1::2], sines[:, 1::2])[:, None]
    product = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns
    assert torch.allclose(rotate(x, (cosines, sines)), torch.view_as_real(product).flatten(-2), atol=1e-14)


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_values_and_gradients(inputs: tuple, rotated: bool, scaled: bool) -> None:
    x, rotary, factor = inputs
    rotary, factor = rotary if rotated else None, factor.requires_grad_() if scaled else None
    x.requires_grad_()
    plain = F.normalize(rotate(x, rotary) if rotated else x, dim=-1) * (factor if scaled else 1)
    assert torch.allclose(rotate_and_normalize(x, rotary, factor), plain, atol=1e-14)
    leaves = (x, factor) if scaled else (x,)
    assert torch.autograd.gradcheck(lambda x, factor=None: rotate_and_normalize(x, rotary, factor), leaves)


def test_short_vectors_have_unit_length_too() -> None:
    x = torch.full((1, 1, 4), 1e-6)
    assert torch.allclose(rotate_and_normalize(x, None), torch.full((1, 1, 4), 0.5))


def test_bf16_is_computed_in_float32(inputs: tuple) -> None:
    x, rotary, factor = inputs
    low = x.bfloat16().requires_grad_()
    rotary, factor = tuple(table.float() for table in rotary), factor.float().requires_grad_()
    found = rotate_and_normalize(low, rotary, factor)
    exact = (F.normalize(rotate(low.float(), rotary), dim=-1) * factor).bfloat16()
    assert found.dtype == torch.bfloat16 and torch.allclose(found.float(), exact.float(), rtol=8e-3)
    found.sum().backward()
    assert low.grad.dtype == torch.bfloat16 and factor.grad.dtype == torch.float32
