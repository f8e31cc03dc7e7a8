"""PyTorch's FlexAttention, compiled, with a block mask of the scales: one kernel, no copies, no sums over scales.

With flash-attn-4 installed its kernels do the work, else PyTorch's own in Triton. On a CPU there is no backward pass.
B samples of one run, H heads, d channels of a head.

https://docs.pytorch.org/docs/stable/nn.attention.flex_attention.html
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from star_dist.model.compiling import compiled
from star_dist.model.kernels.base import SOFTMAX_SCALE, KernelUnavailable, TextAttention, join
from star_dist.model.kernels.flash import TextByVarlen, flash_attn_4, torch_varlen
from star_dist.model.kernels.sdpa import SdpaKernel
from star_dist.model.layout import PackedLayout
from star_dist.scales import ScaleSchedule

BLOCK = 128

# Static shapes: with symbolic ones the C++ code that PyTorch 2.15 generates for CPUs does not compile.
_compiled = compiled(flex_attention, dynamic=False)


def flex_kernel(device: torch.device, dtype: torch.dtype, training: bool) -> FlexKernel:
    """The flex kernel.

    Raises:
        KernelUnavailable: PyTorch cannot train with it on this device.
    """
    if training and device.type == "cpu":
        raise KernelUnavailable(
            "attention kernel flex cannot train on a CPU, where PyTorch's FlexAttention has no backward pass; set "
            "model.attention to auto or sdpa"
        )
    if device.type == "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return FlexKernel("TRITON" if device.type == "cuda" else None, SdpaKernel())
    generation = torch.cuda.get_device_capability(device)[0]
    backend = "FLASH" if has_flash_backend(generation) else "TRITON"
    try:
        return FlexKernel(backend, TextByVarlen(torch_varlen(generation)))
    except KernelUnavailable:
        return FlexKernel(backend, SdpaKernel())


def has_flash_backend(generation: int) -> bool:
    """Whether FlexAttention runs through FlashAttention-4 on GPUs of compute capability `generation`.x.

    Hopper's alone: it was measured there, and on later ones FlashAttention-4 wants other blocks than `BLOCK`. Its
    backward pass adds up in any order.
    """
    if generation != 9 or torch.are_deterministic_algorithms_enabled():
        return False
    try:
        flash_attn_4(generation)
    except (ImportError, KernelUnavailable):
        return False
    return True


class FlexKernel:
    """Self-attention by FlexAttention; attention to the text as `text` does it.

    backend: of FlexAttention's kernel options; None is its choice.
    """

    def __init__(self, backend: str | None, text: TextAttention) -> None:
        self.backend = backend
        self.text = text
        self.prepare_text, self.cross = text.prepare_text, text.cross
        by = "FlashAttention-4, " if backend == "FLASH" else ""
        self.description = f"flex ({by}PyTorch {torch.__version__})"

    def prepare_image(self, layout: PackedLayout, device: torch.device) -> list[tuple[slice, int, BlockMask]]:
        """Of every run of samples: its tokens, their number, and the mask of its scales."""
        return [(run.tokens, run.count, scale_block_mask(run.schedule, device)) for run in layout.runs]

    def block_causal(
        self, query_THd: Tensor, key_THd: Tensor, value_THd: Tensor, image: list[tuple[slice, int, BlockMask]]
    ) -> Tensor:
        outputs = []
        for tokens, count, mask in image:
            inputs = (x[tokens].unflatten(0, (count, -1)) for x in (query_THd, key_THd, value_THd))
            outputs.append(attend(*inputs, mask, self.backend).flatten(0, 1))
        return join(outputs)


def attend(query_BLHd: Tensor, key_BLHd: Tensor, value_BLHd: Tensor, mask: BlockMask, backend: str | None) -> Tensor:
    """FlexAttention's output (B, L, H, d); backend: as `FlexKernel`'s."""
    query, key, value = (x.transpose(1, 2) for x in (query_BLHd, key_BLHd, value_BLHd))
    options = None if backend is None else {"BACKEND": backend}
    return _compiled(query, key, value, block_mask=mask, scale=SOFTMAX_SCALE, kernel_options=options).transpose(1, 2)


@lru_cache(maxsize=16)
def scale_block_mask(schedule: ScaleSchedule, device: torch.device) -> BlockMask:
    """Which blocks of keys each block of queries sees, reckoned from the scales: no L x L mask is ever made."""
    length = schedule.num_tokens
    blocks = num_blocks(length)
    sees_up_to = torch.repeat_interleave(torch.tensor(schedule.ends), torch.tensor(schedule.lengths))
    full, partial = [], []
    for block in range(blocks):
        of_queries = sees_up_to[block * BLOCK : (block + 1) * BLOCK]
        all_see, any_sees = int(of_queries.min()), int(of_queries.max())
        num_full = all_see // BLOCK  # these blocks every query of this block sees as a whole
        full.append(list(range(num_full)))
        partial.append(list(range(num_full, num_blocks(any_sees))))
    return BlockMask.from_kv_blocks(
        *block_table(partial, blocks, device),
        *block_table(full, blocks, device),
        BLOCK_SIZE=BLOCK,
        mask_mod=ScaleMask(schedule).visible,
        seq_lengths=(length, length),
    )


class ScaleMask(nn.Module):
    """Which keys a query sees, reckoned from the ends of the scales, which is faster than to read it from memory.

    A module because the compiler takes numbers that a module holds for constants, which FlashAttention-4 needs. Those
    in a closure it would make symbols as soon as a second schedule came.
    """

    def __init__(self, schedule: ScaleSchedule) -> None:
        super().__init__()
        self.lengths, self.ends = schedule.lengths, schedule.ends

    def visible(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        sees_up_to = self.ends[0]
        for end, next_length in zip(self.ends, self.lengths[1:]):
            sees_up_to = sees_up_to + (query >= end).to(torch.int32) * next_length
        return key < sees_up_to


def num_blocks(tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // BLOCK)


def block_table(rows: list[list[int]], blocks: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, (1, 1, blocks), and which, (1, 1, blocks, blocks); int32."""
    counts = torch.tensor([len(row) for row in rows], dtype=torch.int32)
    indices = torch.tensor([row + [0] * (blocks - len(row)) for row in rows], dtype=torch.int32)
    return counts[None, None].to(device), indices[None, None].to(device)
