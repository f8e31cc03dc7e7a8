"""PyTorch's FlexAttention, compiled, with a block mask of the scales. On a CPU it has no backward pass.

https://docs.pytorch.org/docs/stable/nn.attention.flex_attention.html
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from star_dist.model.kernels.base import SOFTMAX_SCALE, KernelUnavailable, join
from star_dist.model.kernels.sdpa import SdpaKernel
from star_dist.model.layout import PackedLayout
from star_dist.scales import ScaleSchedule

BLOCK = 128

# Static shapes: with symbolic ones the C++ code that PyTorch 2.15 generates for CPUs does not compile.
_compiled = torch.compile(flex_attention, dynamic=False)


def flex_kernel(device: torch.device, training: bool) -> FlexKernel:
    """The flex kernel.

    Raises:
        KernelUnavailable: PyTorch cannot train with it on this device.
    """
    if training and device.type == "cpu":
        raise KernelUnavailable(
            "attention kernel flex cannot train on a CPU, where PyTorch's FlexAttention has no backward pass; set "
            "model.attention to auto or sdpa"
        )
    return FlexKernel()


class FlexKernel(SdpaKernel):
    """Self-attention by FlexAttention; text attention is SDPA's."""

    description = f"flex (PyTorch {torch.__version__})"

    def block_causal(self, query_THd: Tensor, key_THd: Tensor, value_THd: Tensor, layout: PackedLayout) -> Tensor:
        outputs = []
        for run in layout.runs:
            packed = (query_THd[run.tokens], key_THd[run.tokens], value_THd[run.tokens])
            query, key, value = (x.unflatten(0, (run.count, -1)).transpose(1, 2) for x in packed)
            mask = scale_block_mask(run.schedule, query.device)
            mixed = _compiled(query, key, value, block_mask=mask, scale=SOFTMAX_SCALE)
            outputs.append(mixed.transpose(1, 2).flatten(0, 1))
        return join(outputs)


@lru_cache(maxsize=16)
def scale_block_mask(schedule: ScaleSchedule, device: torch.device) -> BlockMask:
    """Which blocks of keys each block of queries sees, reckoned from the scales: no L x L mask is ever made."""
    length = schedule.num_tokens
    blocks = -(-length // BLOCK)
    scale_ids = torch.repeat_interleave(torch.tensor(schedule.lengths))
    sees_up_to = torch.tensor(schedule.ends)[scale_ids]  # (L,): first key that a query does not see
    full, partial = [], []
    for block in range(blocks):
        of_queries = sees_up_to[block * BLOCK : (block + 1) * BLOCK]
        all_see, any_sees = int(of_queries.min()), int(of_queries.max())
        num_full = all_see // BLOCK  # these blocks every query of this block sees as a whole
        full.append(list(range(num_full)))
        partial.append(list(range(num_full, -(-any_sees // BLOCK))))
    ids = scale_ids.to(device)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return ids[query] >= ids[key]

    return BlockMask.from_kv_blocks(
        *_block_table(partial, blocks, device),
        *_block_table(full, blocks, device),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(length, length),
    )


def _block_table(rows: list[list[int]], blocks: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, (1, 1, blocks), and which, (1, 1, blocks, blocks); int32."""
    counts = torch.tensor([len(row) for row in rows], dtype=torch.int32)
    indices = torch.tensor([row + [0] * (blocks - len(row)) for row in rows], dtype=torch.int32)
    return counts[None, None].to(device), indices[None, None].to(device)
