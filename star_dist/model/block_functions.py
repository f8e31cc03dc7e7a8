"""How a block runs: as it is written, with what lies between its products compiled, or compiled whole.

ZeRO-3 gathers parameters in hooks of modules, where a block compiled whole would fall into pieces. The functions here
hold no parameters and compile at every stage, and activation checkpointing tells products and attention apart as
before. GELU is not among them: it stands alone between two products and is one kernel as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from star_dist.model.kernels.scale_by_scale import SumPrefixes, sum_prefixes, sum_prefixes_for_compiler
from star_dist.model.qk_norm import (
    backward_pass,
    differentiable_rotate_and_normalize,
    forward_pass,
    rotate_and_normalize,
)

LAYER_NORM_EPS = 1e-6

Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm without learned scale and shift."""
    return F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)


def add_and_norm(x_TD: Tensor, branch_TD: Tensor) -> tuple[Tensor, Tensor]:
    """A residual sum, and its LayerNorm for the next branch."""
    x_TD = x_TD + branch_TD
    return x_TD, layer_norm(x_TD)


def call_block(block: Callable[..., Tensor], x_TD: Tensor, text_SC: Tensor, **options: Any) -> Tensor:
    """What runs a block: the place where a whole one is compiled."""
    return block(x_TD, text_SC, **options)


class BlockFunctions:
    """add_and_norm, rotate_and_normalize, sum_prefixes, call_block: as the functions of these names.

    compiler: what the first three go through.
    """

    def __init__(self, compiler: Compiler, sum_prefixes: SumPrefixes = sum_prefixes) -> None:
        self.add_and_norm = compiler(add_and_norm)
        self.sum_prefixes = compiler(sum_prefixes)
        passes = compiler(forward_pass), compiler(backward_pass)
        self.rotate_and_normalize = partial(rotate_and_normalize, passes=passes)
        self.call_block = call_block


PLAIN = BlockFunctions(lambda function: function)


@cache
def compiled_functions(dynamic: bool | None = None) -> BlockFunctions:
    """The functions through torch.compile: once per process, because what is compiled belongs to their code.

    dynamic: true compiles for all shapes at once, null for the first shape and, when another comes, for all others.
    """
    _allow_recompiling()
    return BlockFunctions(partial(torch.compile, dynamic=dynamic), sum_prefixes_for_compiler)


@cache
def compiled_blocks() -> BlockFunctions:
    """Whole blocks through torch.compile, below ZeRO-3: all layers share what is compiled.

    The compiler decides what a block keeps for its backward pass: on a GPU a tenth more than plain blocks keep.
    """
    _allow_recompiling()
    functions = BlockFunctions(lambda function: function)
    functions.sum_prefixes = torch.compile(sum_prefixes_for_compiler)
    functions.rotate_and_normalize = differentiable_rotate_and_normalize
    functions.call_block = torch.compile(call_block)
    return functions


def _allow_recompiling() -> None:
    """PyTorch gives up a function, silently, after 8 kinds of inputs: resolutions, with and without gradients, …"""
    import torch._dynamo  # PyTorch's compiler, which takes seconds to import

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
