"""How a block runs: as it is written, with what lies between its products compiled, or compiled whole.

ZeRO-3 gathers parameters in hooks of modules, where a block compiled whole would fall into pieces. The functions here
hold no parameters and compile at every stage, and activation checkpointing tells products and attention apart as
before. GELU stands alone between two products and is one kernel as it is; it is compiled with whole blocks alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from star_dist.model.activation_checkpointing import Checkpointing, run_block, run_block_keeping_products
from star_dist.model.compiling import compiled
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


def gelu(x: Tensor) -> Tensor:
    """GELU by its tanh formula, as the public weights were trained with."""
    return F.gelu(x, approximate="tanh")


def gelu_for_compiler(x: Tensor) -> Tensor:
    """The same formula with (1 + tanh u) / 2 as sigmoid(2u).

    On a GPU the compiler's tanh has two branches, and takes longer than the memory: 35 instructions a value forwards
    and 42 backwards, with the sigmoid 20 and 31.
    """
    precise = x.to(torch.promote_types(x.dtype, torch.float32))
    twice_u = math.sqrt(8 / math.pi) * (precise + 0.044715 * precise**3)
    return (precise * twice_u.sigmoid()).to(x.dtype)


def call_block(block: Callable[..., Tensor], *inputs: Any, **options: Any) -> Tensor:
    """One function for the blocks of all layers, of which the compiler then makes one."""
    return block(*inputs, **options)


class BlockFunctions:
    """add_and_norm, rotate_and_normalize, sum_prefixes, gelu, run_block: as the functions of these names.

    compiler: what the first three go through. whole_blocks: blocks are compiled with their attention.
    """

    whole_blocks = False
    gelu = staticmethod(gelu)

    def __init__(self, compiler: Compiler, sum_prefixes: SumPrefixes = sum_prefixes) -> None:
        self.add_and_norm = compiler(add_and_norm)
        self.sum_prefixes = compiler(sum_prefixes)
        passes = compiler(forward_pass), compiler(backward_pass)
        self.rotate_and_normalize = partial(rotate_and_normalize, passes=passes)

    def run_block(
        self, block: Callable[..., Tensor], checkpointing: Checkpointing, *inputs: Any, **options: Any
    ) -> Tensor:
        return run_block(block, checkpointing, *inputs, **options)


PLAIN = BlockFunctions(lambda function: function)


@cache
def compiled_functions(dynamic: bool | None = None) -> BlockFunctions:
    """The functions through torch.compile; once per process, as `compiled_blocks`.

    dynamic: as `compiled`'s.
    """
    return BlockFunctions(partial(compiled, dynamic=dynamic), sum_prefixes_for_compiler)


class CompiledBlocks(BlockFunctions):
    """Whole blocks through torch.compile, below ZeRO-3: all layers share what is compiled."""

    whole_blocks = True
    gelu = staticmethod(gelu_for_compiler)

    def __init__(self) -> None:
        super().__init__(lambda function: function, compiled(sum_prefixes_for_compiler))
        self.compiled_block = compiled(call_block)
        self.compiled_block_keeping_products = compiled(run_block_keeping_products)

    def run_block(
        self, block: Callable[..., Tensor], checkpointing: Checkpointing, *inputs: Any, **options: Any
    ) -> Tensor:
        if checkpointing == "selective" and torch.is_grad_enabled():
            return self.compiled_block_keeping_products(block, *inputs, **options)
        return run_block(partial(self.compiled_block, block), checkpointing, *inputs, **options)


@cache
def compiled_blocks() -> CompiledBlocks:
    """Once per process, because what is compiled belongs to the functions' code."""
    return CompiledBlocks()
