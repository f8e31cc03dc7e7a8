"""Cross-entropy of a linear classifier without the logits of a whole batch: chunk by chunk, computed again backwards.

Logits of d30's micro-batch of 16 at 256 pixels are 356 MB in float32, and cross-entropy keeps them three times over.
N tokens, D width, V codebook size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from star_dist.model.float32_products import float32_precision
from star_dist.model.size import LOSS_CHUNK_TOKENS


class LinearCrossEntropy(torch.autograd.Function):
    """Per-token losses (N,) and whether the likeliest class is the target (N,), in the precision of `x_ND`."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x_ND, weight_VD, bias_V, targets_N)
        losses_N, correct_N = x_ND.new_empty(len(x_ND)), torch.empty_like(targets_N, dtype=torch.bool)
        ctx.stored_dtype = weight_VD.dtype
        weight_VD, bias_V = weight_VD.to(x_ND.dtype), bias_V.to(x_ND.dtype)
        with fast_float32_products(ctx.stored_dtype, x_ND.device):
            for chunk in _chunks(len(x_ND)):
                logits_NV = torch.addmm(bias_V, x_ND[chunk], weight_VD.t())
                losses_N[chunk] = F.cross_entropy(logits_NV, targets_N[chunk], reduction="none")
                correct_N[chunk] = logits_NV.argmax(-1) == targets_N[chunk]
        ctx.mark_non_differentiable(correct_N)
        return losses_N, correct_N

    @staticmethod
    def backward(ctx: Any, gradient_N: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x_ND, stored_weight_VD, stored_bias_V, targets_N = ctx.saved_tensors
        weight_VD, bias_V = stored_weight_VD.to(x_ND.dtype), stored_bias_V.to(x_ND.dtype)
        dx_ND, dweight_VD, dbias_V = torch.empty_like(x_ND), torch.zeros_like(weight_VD), torch.zeros_like(bias_V)
        with fast_float32_products(ctx.stored_dtype, x_ND.device):
            for chunk in _chunks(len(x_ND)):
                # The gradient of the logits: softmax minus one at the target, times the token's own gradient.
                dlogits_NV = torch.addmm(bias_V, x_ND[chunk], weight_VD.t()).softmax(-1)
                rows = torch.arange(len(dlogits_NV), device=dlogits_NV.device)
                dlogits_NV[rows, targets_N[chunk]] -= 1
                dlogits_NV *= gradient_N[chunk, None]
                torch.mm(dlogits_NV, weight_VD, out=dx_ND[chunk])
                dweight_VD.addmm_(dlogits_NV.t(), x_ND[chunk])
                dbias_V += dlogits_NV.sum(0)
        return dx_ND, dweight_VD.to(stored_weight_VD.dtype), dbias_V.to(stored_bias_V.dtype), None


@contextmanager
def fast_float32_products(stored: torch.dtype, device: torch.device) -> Iterator[None]:
    """Where the weights are stored in bf16, float32 products on a GPU run as TF32.

    It keeps 10 bits of the mantissa, so such weights lose nothing, and sums are float32. On an H200 a product of d30's
    head then takes 0.45 ms in place of 3.47.
    """
    if stored != torch.bfloat16 or device.type != "cuda":
        yield
        return
    with float32_precision("tf32", torch.backends.cuda.matmul):
        yield


def _chunks(tokens: int) -> list[slice]:
    return [slice(start, start + LOSS_CHUNK_TOKENS) for start in range(0, tokens, LOSS_CHUNK_TOKENS)]
