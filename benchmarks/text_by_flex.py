"""Attention to the text by FlexAttention: a candidate that `attention.py` compares, which no GPU has measured yet."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from star_dist.model.kernels.base import join
from star_dist.model.kernels.flex import BLOCK, attend, block_table, num_blocks
from star_dist.model.layout import PackedLayout, copy_to_device


class PaddedText(NamedTuple):
    """Of one run of samples, whose texts are padded to one length: its image tokens, their samples, its text tokens,
    where those go, that length, and the mask of the padding.
    """

    tokens: slice
    count: int
    text_tokens: slice
    places_S: Tensor
    length: int
    mask: BlockMask


class TextByFlex:
    """A `TextAttention` that pads to whole blocks; backend: as `FlexKernel`'s."""

    def __init__(self, backend: str | None) -> None:
        self.backend = backend

    def prepare_text(self, layout: PackedLayout, device: torch.device) -> list[PaddedText]:
        prepared = []
        for run in layout.runs:
            lengths = layout.text_lengths[run.samples]
            padded = num_blocks(max(lengths)) * BLOCK
            places_S = torch.cat([torch.arange(length) + i * padded for i, length in enumerate(lengths)])
            mask = copy.copy(_padding_block_mask(run.schedule.num_tokens, padded, device))
            mask.mask_mod = TextMask(copy_to_device(torch.tensor(lengths, dtype=torch.int32), device)).visible
            first = layout.text_starts[run.first_sample]
            # Whole where there is one run: numbers that change with every batch would be symbols to the compiler.
            text_tokens = slice(None) if len(layout.runs) == 1 else slice(first, first + sum(lengths))
            places_S = copy_to_device(places_S, device)
            prepared.append(PaddedText(run.tokens, run.count, text_tokens, places_S, padded, mask))
        return prepared

    def cross(
        self, query_THd: Tensor, key_SHd: Tensor, value_SHd: Tensor, layout: PackedLayout, text: list[PaddedText]
    ) -> Tensor:
        outputs = []
        for run in text:
            shape = run.count * run.length, *key_SHd.shape[1:]
            # Written to their places: to gather them would add up gradients backwards, sorted by place.
            key, value = (
                x.new_zeros(shape).index_copy(0, run.places_S, x[run.text_tokens]).unflatten(0, (run.count, -1))
                for x in (key_SHd, value_SHd)
            )
            query = query_THd[run.tokens].unflatten(0, (run.count, -1))
            outputs.append(attend(query, key, value, run.mask, self.backend).flatten(0, 1))
        return join(outputs)


@lru_cache(maxsize=16)
def _padding_block_mask(queries: int, keys: int, device: torch.device) -> BlockMask:
    """All blocks, each filled in part; whose mask says with what."""
    rows, blocks = num_blocks(queries), num_blocks(keys)
    return BlockMask.from_kv_blocks(
        *block_table(rows * [list(range(blocks))], blocks, device),
        *block_table(rows * [[]], blocks, device),
        BLOCK_SIZE=BLOCK,
        seq_lengths=(queries, keys),
    )


class TextMask(nn.Module):
    """Which keys are text of their sample and which padding; lengths_B: int32."""

    def __init__(self, lengths_B: Tensor) -> None:
        super().__init__()
        self.lengths_B = lengths_B

    def visible(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key < self.lengths_B[batch]
