"""What compiled blocks compute in place of PyTorch's own function."""

from __future__ import annotations

import pytest
import torch

from star_dist.model.block_functions import gelu, gelu_for_compiler


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float64, 2e-14), (torch.float32, 3e-6), (torch.bfloat16, 2**-8)], ids=str
)
def test_gelu_for_the_compiler_is_gelu_in_both_passes(dtype: torch.dtype, error: float) -> None:
    values = torch.cat([torch.linspace(-12, 12, 4801), torch.tensor([-1e4, -0.0, 1e4])]).to(dtype)
    results = []
    for function in (gelu, gelu_for_compiler):
        x = values.clone().requires_grad_()
        y = function(x)
        y.sum().backward()
        assert y.dtype == dtype
        results.append((y.detach(), x.grad))
    for ours, theirs in zip(results[1], results[0]):
        torch.testing.assert_close(ours, theirs, rtol=error, atol=error)
