"""FlashAttention: the library's own functions, given each scale and its prefix, so that the mask costs nothing.

Every library is used through its public functions alone. Which is taken follows the GPU's generation (`LIBRARIES`).
T image tokens of the batch, S text tokens, B samples, H heads, d channels of a head.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from star_dist.model.kernels.base import SOFTMAX_SCALE, ByLayout, KernelUnavailable
from star_dist.model.kernels.scale_by_scale import (
    DenseAttention,
    SumPrefixes,
    VarlenAttention,
    attend_scale_by_scale,
    sum_prefixes,
)
from star_dist.model.kernels.sdpa import scaled_dot_product
from star_dist.model.layout import PackedLayout

# Scales that end within so many tokens (1x1 to 6x6) share one call: alone they are too small to fill a GPU, and
# gathering their prefixes copies less than a third of a 256-pixel sample's keys (196 of 680).
GATHERED_TOKENS = 128

TextOffsets = tuple[Tensor, Tensor, int, int]


@dataclass(frozen=True)
class FlashLibrary:
    """A library's two functions, with the softmax scale bound.

    of_operations: they are operations of PyTorch, which checkpointing sees.
    """

    name: str
    dense: DenseAttention
    varlen: VarlenAttention
    of_operations: bool = True


class TextByVarlen:
    """Attention to the text by a library's variable-length function."""

    def __init__(self, library: FlashLibrary) -> None:
        self.library = library

    def prepare_text(self, layout: PackedLayout, device: torch.device) -> TextOffsets:
        """Offsets of every sample's image and text tokens and the most of each; from the CPU, without a sync."""
        longest = max(schedule.num_tokens for schedule in layout.schedules)
        return layout.token_offsets(device), layout.text_offsets(device), longest, max(layout.text_lengths)

    def cross(
        self, query_THd: Tensor, key_SHd: Tensor, value_SHd: Tensor, layout: PackedLayout, text: TextOffsets
    ) -> Tensor:
        return self.library.varlen(query_THd, key_SHd, value_SHd, *text)


class FlashKernel(ByLayout, TextByVarlen):
    def __init__(
        self,
        library: FlashLibrary,
        gathered_tokens: int = GATHERED_TOKENS,
        sum_prefixes: SumPrefixes = sum_prefixes,
    ) -> None:
        super().__init__(library)
        self.sum_prefixes = sum_prefixes
        self.gathered_tokens = gathered_tokens
        self.description = f"flash ({library.name})"

    @torch.compiler.disable
    def block_causal(self, query_THd: Tensor, key_THd: Tensor, value_THd: Tensor, layout: PackedLayout) -> Tensor:
        return attend_scale_by_scale(
            query_THd,
            key_THd,
            value_THd,
            layout,
            self.library.dense,
            self.library.varlen,
            self.gathered_tokens,
            self.sum_prefixes,
        )

    cross = torch.compiler.disable(TextByVarlen.cross)


def flash_kernel(
    device: torch.device,
    dtype: torch.dtype,
    sum_prefixes: SumPrefixes = sum_prefixes,
    of_operations: bool = False,
) -> FlashKernel:
    """The flash kernel of this machine; of_operations: as `flash_library`'s.

    Raises:
        KernelUnavailable: no GPU, a precision that flash attention does not take, or no library, with all reasons.
    """
    if device.type != "cuda":
        raise KernelUnavailable("attention kernel flash needs a GPU; set model.attention to auto or sdpa")
    if dtype not in (torch.bfloat16, torch.float16):
        raise KernelUnavailable(
            f"attention kernel flash takes bfloat16 or float16, not {dtype}; set train.precision to bf16, or "
            f"model.attention to auto or sdpa"
        )
    library = flash_library(torch.cuda.get_device_capability(device)[0], of_operations)
    return FlashKernel(library, sum_prefixes=sum_prefixes)


@lru_cache(maxsize=8)
def flash_library(generation: int, of_operations: bool = False) -> FlashLibrary:
    """The first library that is installed and runs on a GPU of compute capability `generation`.x.

    of_operations: of those alone that run as operations of PyTorch.
    """
    reasons = []
    for load in LIBRARIES:
        try:
            library = load(generation)
            if of_operations and not library.of_operations:
                raise KernelUnavailable(f"{library.name} is not seen by train.activation_checkpointing selective")
            return library
        except (ImportError, KernelUnavailable) as error:
            reasons.append(str(error))
    raise KernelUnavailable(f"attention kernel flash has no library on this machine: {'; '.join(reasons)}")


def flash_attn_4(generation: int) -> FlashLibrary:
    """FlashAttention-4 (PyPI: flash-attn-4), written for Hopper's and Blackwell's tensor cores, as Python functions."""
    if generation < 9:
        raise KernelUnavailable("flash-attn 4 is taken from compute capability 9 on")
    module = importlib.import_module("flash_attn.cute")
    library = _flash_attn_library("flash-attn 4", module.flash_attn_func, module.flash_attn_varlen_func)
    return replace(library, of_operations=False)


def flash_attn_3(generation: int) -> FlashLibrary:
    """FlashAttention-3 (folder hopper of the flash-attention repository)."""
    if generation != 9:
        raise KernelUnavailable("flash-attn 3 runs on compute capability 9 alone")
    module = importlib.import_module("flash_attn_interface")
    return _flash_attn_library("flash-attn 3", module.flash_attn_func, module.flash_attn_varlen_func)


def flash_attn_2(generation: int) -> FlashLibrary:
    """FlashAttention-2 (PyPI: flash-attn)."""
    if generation < 8:
        raise KernelUnavailable("flash-attn 2 runs from compute capability 8 on")
    # Not the module alone: flash-attn-4 puts a package of the same name there that has only a part called cute.
    from flash_attn import __version__, flash_attn_func, flash_attn_varlen_func

    return _flash_attn_library(f"flash-attn {__version__}", flash_attn_func, flash_attn_varlen_func)


def torch_varlen(generation: int) -> FlashLibrary:
    """PyTorch's own variable-length attention, which hands over to cuDNN or its copy of FlashAttention-2.

    https://docs.pytorch.org/docs/stable/nn.attention.varlen.html
    """
    if generation < 8:
        raise KernelUnavailable("PyTorch's varlen attention runs from compute capability 8 on")
    varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    if "scale" not in inspect.signature(varlen_attn).parameters:
        raise KernelUnavailable(f"varlen attention of PyTorch {torch.__version__} takes no softmax scale")

    def varlen(
        query: Tensor, key: Tensor, value: Tensor, q_offsets: Tensor, k_offsets: Tensor, max_q: int, max_k: int
    ) -> Tensor:
        return varlen_attn(query, key, value, q_offsets, k_offsets, max_q, max_k, scale=SOFTMAX_SCALE)

    return FlashLibrary(f"PyTorch {torch.__version__}", scaled_dot_product, varlen)


# In order of preference. On an H200 flash-attn 4 is faster than PyTorch's, which takes cuDNN there, and that is faster
# than flash-attn 2 (docs/performance.md); flash-attn 3 was not measured, its authors' figures put it first on Hopper.
LIBRARIES: tuple[Callable[[int], FlashLibrary], ...] = (flash_attn_3, flash_attn_4, torch_varlen, flash_attn_2)


def _flash_attn_library(name: str, dense_function: Callable, varlen_function: Callable) -> FlashLibrary:
    """The calls that the flash-attn packages of all generations have in common."""

    def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _output(dense_function(query, key, value, softmax_scale=SOFTMAX_SCALE, causal=False))

    def varlen(
        query: Tensor, key: Tensor, value: Tensor, q_offsets: Tensor, k_offsets: Tensor, max_q: int, max_k: int
    ) -> Tensor:
        mixed = varlen_function(
            query,
            key,
            value,
            cu_seqlens_q=q_offsets,
            cu_seqlens_k=k_offsets,
            max_seqlen_q=max_q,
            max_seqlen_k=max_k,
            softmax_scale=SOFTMAX_SCALE,
            causal=False,
        )
        return _output(mixed)

    return FlashLibrary(name, dense, varlen)


def _output(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Some releases return the softmax statistics too."""
    return result if isinstance(result, Tensor) else result[0]
