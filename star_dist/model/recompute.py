"""Activation checkpointing: which of a block's intermediate values are kept for the backward pass.

none: all. selective: results of matrix products and of attention; norms, GELU, rotations and sums are computed again,
which costs no product. full: the block's input alone; the whole block is computed again, a third more work.
https://docs.pytorch.org/docs/stable/checkpoint.html
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recompute = Literal["none", "selective", "full"]


def run_block(block: Callable[..., Tensor], recompute: Recompute, *inputs: Any, **options: Any) -> Tensor:
    """`block(*inputs, **options)`, keeping for the backward pass what `recompute` says."""
    if recompute == "none" or not torch.is_grad_enabled():
        return block(*inputs, **options)
    contexts = partial(create_selective_checkpoint_contexts, _keep_products) if recompute == "selective" else None
    extra = {} if contexts is None else {"context_fn": contexts}
    # The forward pass draws no random numbers.
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, **extra, **options)


def _keep_products(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    library, _, name = operator.name().partition("::")  # builds of FlashAttention name a library so, with plain `fwd`
    is_attention = "attention" in library + name or "attn" in library + name
    is_product = is_attention or name.partition(".")[0] in ("mm", "addmm", "bmm", "linear")
    return CheckpointPolicy.MUST_SAVE if is_product else CheckpointPolicy.PREFER_RECOMPUTE
