"""Activation checkpointing: which of a block's intermediate values are kept for the backward pass.

none: all. selective: results of matrix products and of attention; norms, GELU, rotations and sums are computed again,
which costs no product. full: the block's input alone; the whole block is computed again, a third more work.
https://docs.pytorch.org/docs/stable/checkpoint.html
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Checkpointing = Literal["none", "selective", "full"]

_checkpoint = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)  # a block draws no random numbers


def run_block(block: Callable[..., Tensor], checkpointing: Checkpointing, *inputs: Any, **options: Any) -> Tensor:
    """`block(*inputs, **options)`, keeping for the backward pass what `checkpointing` says."""
    if checkpointing == "none" or not torch.is_grad_enabled():
        return block(*inputs, **options)
    extra = {"context_fn": _selective_contexts} if checkpointing == "selective" else {}
    return _checkpoint(block, *inputs, **extra, **options)


def run_block_keeping_products(block: Callable[..., Tensor], *inputs: Any, **options: Any) -> Tensor:
    """`selective` for a compiler that sees all of the block, attention too, and makes one graph of both passes.

    What runs operation by operation is not seen by it, and would be computed again.
    """
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return _checkpoint(block, *inputs, context_fn=contexts, **options)


def _policy(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _is_product(operator) else CheckpointPolicy.PREFER_RECOMPUTE


def _selective_contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """What the forward pass and the second computation run in.

    PyTorch's own `create_selective_checkpoint_contexts` wants every operation of both to be the same. ZeRO-3 gathers
    weights between them, other ones each time, and compiled functions hide theirs; only products must be the same.
    """
    results: deque[Any] = deque()
    return _KeepProducts(results), _ReturnProducts(results)


class _OfProducts(TorchDispatchMode):
    def __init__(self, results: deque[Any]) -> None:
        super().__init__()
        self.results = results

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled functions stay compiled inside: there is no product in them."""
        return True


class _KeepProducts(_OfProducts):
    def __torch_dispatch__(self, operator: Any, types: Any, arguments: tuple = (), options: dict | None = None) -> Any:
        result = operator(*arguments, **(options or {}))
        if _is_product(operator):  # detached: autograd makes the result itself hold on to what it came from
            self.results.append(tree_map_only(Tensor, Tensor.detach, result))
        return result


class _ReturnProducts(_OfProducts):
    def __torch_dispatch__(self, operator: Any, types: Any, arguments: tuple = (), options: dict | None = None) -> Any:
        return self.results.popleft() if _is_product(operator) else operator(*arguments, **(options or {}))


def _is_product(operator: Any) -> bool:
    library, _, name = operator.name().partition("::")  # builds of FlashAttention name a library so, with plain `fwd`
    is_attention = "attention" in library + name or "attn" in library + name
    return is_attention or name.partition(".")[0] in ("mm", "addmm", "bmm", "linear")
