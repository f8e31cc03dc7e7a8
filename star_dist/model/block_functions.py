"""A block's functions without parameters, which lie between its products: plain, or fused by PyTorch's compiler.

ZeRO-3 gathers parameters in hooks of modules, so a block compiled whole would fall into pieces there. These functions
hold none and compile at every stage, and activation checkpointing tells products and attention apart as before. GELU is
not among them: it stands alone between two products and is one kernel as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from star_dist.model.kernels.scale_by_scale import SumPrefixes, sum_prefixes, sum_prefixes_for_compiler
from star_dist.model.qk_norm import backward_pass, forward_pass, rotate_and_normalize

LAYER_NORM_EPS = 1e-6

Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm without learned scale and shift."""
    return F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)


def add_and_norm(x_TD: Tensor, branch_TD: Tensor) -> tuple[Tensor, Tensor]:
    """A residual sum, and its LayerNorm for the next branch."""
    x_TD = x_TD + branch_TD
    return x_TD, layer_norm(x_TD)


class BlockFunctions:
    """add_and_norm, rotate_and_normalize, sum_prefixes: as the functions of these names, through `compiler`."""

    def __init__(self, compiler: Compiler, sum_prefixes: SumPrefixes = sum_prefixes) -> None:
        self.add_and_norm = compiler(add_and_norm)
        self.sum_prefixes = compiler(sum_prefixes)
        passes = compiler(forward_pass), compiler(backward_pass)
        self.rotate_and_normalize = partial(rotate_and_normalize, passes=passes)


PLAIN = BlockFunctions(lambda function: function)


@cache
def compiled_functions(dynamic: bool | None = None) -> BlockFunctions:
    """The functions through torch.compile: once per process, because what is compiled belongs to their code.

    dynamic: true compiles for all shapes at once, null for the first shape and, when another comes, for all others.
    """
    return BlockFunctions(partial(torch.compile, dynamic=dynamic), sum_prefixes_for_compiler)
