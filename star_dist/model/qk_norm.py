"""Rotation, unit length and the learned factor of queries and keys as one function that keeps only its input.

Written out as single operations, autograd would keep three float32 copies of every query and key between the passes.
T tokens, H heads, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from star_dist.model.rope import Rotary, rotate

MIN_NORM = 1e-12


Passes = tuple[Callable[..., Any], Callable[..., Any]]
"""`forward_pass` and `backward_pass`, or the same compiled."""


def forward_pass(x_THd: Tensor, rotary: Rotary | None, factor_H1: Tensor | None) -> tuple[Tensor, Tensor]:
    """The result, and the inverse length (T, H, 1) of every query or key."""
    precise_THd = x_THd.to(torch.promote_types(x_THd.dtype, torch.float32))
    inverse_TH1 = precise_THd.norm(dim=-1, keepdim=True).clamp_min_(MIN_NORM).reciprocal_()
    scale = inverse_TH1 if factor_H1 is None else inverse_TH1 * factor_H1
    rotated_THd = precise_THd if rotary is None else rotate(precise_THd, rotary)
    return (rotated_THd * scale).to(x_THd.dtype), inverse_TH1


def backward_pass(
    gradient_THd: Tensor, x_THd: Tensor, inverse_TH1: Tensor, rotary: Rotary | None, factor_H1: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the queries or keys and of the factor."""
    gradient_THd = gradient_THd.to(inverse_TH1.dtype)
    if rotary is not None:  # the transpose of a rotation is the one by the opposite angle
        cosines, sines = rotary
        gradient_THd = rotate(gradient_THd, (cosines, -sines))
    unit_THd = x_THd.to(inverse_TH1.dtype) * inverse_TH1
    along_TH1 = (gradient_THd * unit_THd).sum(-1, keepdim=True)
    factor_gradient = None if factor_H1 is None else along_TH1.sum(0)
    scale = inverse_TH1 if factor_H1 is None else inverse_TH1 * factor_H1
    return ((gradient_THd - unit_THd * along_TH1) * scale).to(x_THd.dtype), factor_gradient


def rotate_and_normalize(
    x_THd: Tensor,
    rotary: Rotary | None,
    factor_H1: Tensor | None = None,
    passes: Passes = (forward_pass, backward_pass),
) -> Tensor:
    """(T, H, d) rotated (where there are rotations), of unit length per head, times the head's factor; x's dtype."""
    return _RotateAndNormalize.apply(x_THd, rotary, factor_H1, passes)


class _RotateAndNormalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THd: Tensor, rotary: Rotary | None, factor_H1: Tensor | None, passes: Passes) -> Tensor:
        forward_pass, ctx.backward_pass = passes
        # Detached: a pass would be compiled twice, for inputs that want gradients and for those that do not.
        factor = None if factor_H1 is None else factor_H1.detach()
        result_THd, inverse_TH1 = forward_pass(x_THd.detach(), rotary, factor)
        ctx.rotary = rotary
        ctx.save_for_backward(x_THd, inverse_TH1, factor_H1)
        return result_THd

    @staticmethod
    def backward(ctx: Any, gradient_THd: Tensor) -> tuple[Tensor, None, Tensor | None, None]:
        x_THd, inverse_TH1, factor_H1 = ctx.saved_tensors
        gradient, factor_gradient = ctx.backward_pass(gradient_THd, x_THd, inverse_TH1, ctx.rotary, factor_H1)
        return gradient, None, factor_gradient, None
