"""PyTorch's fused attention: one call per scale, on any device and in any precision."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from star_dist.model.kernels.base import SOFTMAX_SCALE, ByLayout, join
from star_dist.model.kernels.scale_by_scale import SumPrefixes, attend_scale_by_scale, sum_prefixes
from star_dist.model.layout import PackedLayout, copy_to_device

TextPadding = tuple[Tensor, Tensor]


class SdpaKernel(ByLayout):
    description = f"sdpa (PyTorch {torch.__version__})"

    def __init__(self, sum_prefixes: SumPrefixes = sum_prefixes) -> None:
        self.sum_prefixes = sum_prefixes

    @torch.compiler.disable
    def block_causal(self, query_THd: Tensor, key_THd: Tensor, value_THd: Tensor, layout: PackedLayout) -> Tensor:
        return attend_scale_by_scale(
            query_THd, key_THd, value_THd, layout, scaled_dot_product, sum_prefixes=self.sum_prefixes
        )

    def prepare_text(self, layout: PackedLayout, device: torch.device) -> list[TextPadding]:
        """For every run of samples, where its text tokens stand, padded to a rectangle."""
        padding = []
        for run in layout.runs:
            starts, lengths = layout.text_starts[run.samples], layout.text_lengths[run.samples]
            index_BS, present_BS = padded_text_index(starts, lengths)
            padding.append((copy_to_device(index_BS, device), copy_to_device(present_BS, device)))
        return padding

    @torch.compiler.disable
    def cross(
        self, query_THd: Tensor, key_SHd: Tensor, value_SHd: Tensor, layout: PackedLayout, text: list[TextPadding]
    ) -> Tensor:
        outputs = []
        for run, (index_BS, present_BS) in zip(layout.runs, text):
            query = query_THd[run.tokens].unflatten(0, (run.count, -1))
            mask = present_BS[:, None, None, :]
            outputs.append(scaled_dot_product(query, key_SHd[index_BS], value_SHd[index_BS], mask).flatten(0, 1))
        return join(outputs)


def scaled_dot_product(query_BLHd: Tensor, key_BLHd: Tensor, value_BLHd: Tensor, mask: Tensor | None = None) -> Tensor:
    """PyTorch's fused attention with our softmax scale, in (B, L, H, d) order."""
    query, key, value = (x.transpose(1, 2) for x in (query_BLHd, key_BLHd, value_BLHd))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=SOFTMAX_SCALE).transpose(1, 2)


def padded_text_index(starts: tuple[int, ...], lengths: tuple[int, ...]) -> TextPadding:
    """Where the text tokens of each sample stand in the packed text, padded to the longest; (B, S) int64 and bool."""
    offsets = torch.arange(max(lengths))
    present_BS = offsets < torch.tensor(lengths)[:, None]
    index_BS = torch.tensor(starts)[:, None] + offsets
    return index_BS.where(present_BS, 0), present_BS
