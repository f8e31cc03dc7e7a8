"""Block-causal self-attention and ragged cross-attention over packed batches: one facade, several kernels.

T image tokens of the batch, S text tokens of the batch, H heads, d channels of a head. Queries and keys come
normalised, so the softmax scale is 1 (tests/golden/README.md). A token of scale k sees scales 1..k of its own sample;
cross-attention sees the text of its own sample.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from star_dist.model.activation_checkpointing import Checkpointing
from star_dist.model.block_functions import PLAIN, BlockFunctions
from star_dist.model.kernels.base import Kernel, KernelUnavailable
from star_dist.model.kernels.flash import flash_kernel
from star_dist.model.kernels.reference import ReferenceKernel
from star_dist.model.kernels.sdpa import SdpaKernel
from star_dist.model.layout import PackedLayout

KeyValue = tuple[Tensor, Tensor]
Constants = tuple[Tensor, Tensor]
"""What an attention layer derives from its parameters alone: the bias of its projection and the queries' factor."""

KERNELS = ("auto", "flash", "flex", "sdpa", "reference")
"""What `model.attention` may name."""


class LayerContext(Protocol):
    """What one block's attention layers attend to, and what they derive from their parameters alone: in sampling that
    is computed once, in training every time."""

    def image_constants(self, compute: Callable[[], Constants]) -> Constants: ...

    def text_constants(self, compute: Callable[[], Constants]) -> Constants: ...

    def attend_image(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor: ...

    def attend_text(self, query: Tensor, key_value: Callable[[], KeyValue]) -> Tensor: ...


class AttentionContext(Protocol):
    """What the blocks' attention layers attend to: a packed batch in training, a growing cache in sampling."""

    def of_layer(self, layer: int) -> LayerContext: ...


class PackedAttention:
    """All tokens of a packed batch at once, for training and teacher-forced evaluation."""

    def __init__(self, layout: PackedLayout, kernel: Kernel, device: torch.device) -> None:
        self.layout = layout
        self.kernel = kernel
        self.image = kernel.prepare_image(layout, device)
        self.text = kernel.prepare_text(layout, device) if layout.text_lengths else None

    def of_layer(self, layer: int) -> PackedAttention:
        """The same for all, so that a compiled block serves every layer."""
        return self

    def image_constants(self, compute: Callable[[], Constants]) -> Constants:
        return compute()

    def text_constants(self, compute: Callable[[], Constants]) -> Constants:
        return compute()

    def attend_image(self, query_THd: Tensor, key_THd: Tensor, value_THd: Tensor) -> Tensor:
        """Block-causal attention; (T, H, d) -> (T, H, d)."""
        return self.kernel.block_causal(query_THd, key_THd, value_THd, self.image)

    def attend_text(self, query_THd: Tensor, key_value: Callable[[], KeyValue]) -> Tensor:
        """Attention to the sample's own text, keys and values (S, H, d); (T, H, d) -> (T, H, d)."""
        return self.kernel.cross(query_THd, *key_value(), self.layout, self.text)


@lru_cache(maxsize=32)
def choose_kernel(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    training: bool,
    functions: BlockFunctions = PLAIN,
    checkpointing: Checkpointing = "none",
) -> Kernel:
    """The kernel of a name of `KERNELS`, ready to run on a device in a precision; for training also backwards.

    functions: plain or compiled, of which a kernel takes what it needs. checkpointing: of activations; `selective`
    keeps attention's results only of a kernel that it sees. `auto` takes the fastest that can run.

    Raises:
        KernelUnavailable: it cannot run there, or not so; `auto`'s choice always runs without selective checkpointing.
    """
    check_kernel_name(name)
    selective = checkpointing == "selective"
    if name == "auto":
        name = _fastest_kernel(device, dtype, functions, selective)
    if selective:
        _check_kernel_is_seen(name, functions.whole_blocks)
    if name == "flash":
        return flash_kernel(device, dtype, functions.sum_prefixes, of_operations=selective)
    if name == "flex":
        from star_dist.model.kernels.flex import flex_kernel  # imports PyTorch's compiler, which takes seconds

        kernel = flex_kernel(device, dtype, training)
        if selective and isinstance(kernel.text, SdpaKernel):
            raise _unseen(f"attention to text in {dtype}")
        return kernel
    if name == "sdpa":
        return SdpaKernel(functions.sum_prefixes)
    return ReferenceKernel()


def _fastest_kernel(device: torch.device, dtype: torch.dtype, functions: BlockFunctions, selective: bool) -> str:
    compiler_sees_flex = functions.whole_blocks and device.type == "cuda"
    if compiler_sees_flex if selective else _flex_is_fastest(device, dtype):
        return "flex"
    try:
        flash_kernel(device, dtype, of_operations=selective)
    except KernelUnavailable:
        return "sdpa"
    return "flash"


def _check_kernel_is_seen(name: str, whole_blocks: bool) -> None:
    if whole_blocks and name in ("flash", "sdpa"):
        raise _unseen(name)
    if not whole_blocks and name == "flex":
        raise KernelUnavailable(
            "train.activation_checkpointing is selective and model.attention flex, which is compiled as one function, "
            "so that attention would be computed twice; set model.attention to auto, train.compile to blocks or "
            "train.activation_checkpointing to none or full"
        )


def _unseen(attention: str) -> KernelUnavailable:
    return KernelUnavailable(
        f"train.compile is blocks and train.activation_checkpointing selective, for which the compiler has to see "
        f"attention, but {attention} runs as it is; set model.attention to flex (on a GPU in bf16), train.compile to "
        f"functions or train.activation_checkpointing to none or full"
    )


def _flex_is_fastest(device: torch.device, dtype: torch.dtype) -> bool:
    """Where FlashAttention-4 runs it: on an H200 at all three resolutions, in both passes (docs/performance.md)."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    if not _has_flash_attn():
        return False
    from star_dist.model.kernels.flex import has_flash_backend  # imports PyTorch's compiler, which takes seconds

    return has_flash_backend(torch.cuda.get_device_capability(device)[0])


def _has_flash_attn() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def check_kernel_name(name: str) -> str:
    """The name itself.

    Raises:
        ValueError: no kernel has it.
    """
    if name not in KERNELS:
        raise ValueError(f"attention kernel {name!r} is not one of {', '.join(KERNELS)}")
    return name
