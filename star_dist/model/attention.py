"""Block-causal self-attention and ragged cross-attention over packed batches: one facade, several kernels.

T image tokens of the batch, S text tokens of the batch, L tokens of a sample, H heads, d channels of a head. Queries
and keys come normalised, so the softmax scale is 1 (golden/README.md). A token of scale k sees scales 1..k of its own
sample; cross-attention sees the text of its own sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from star_dist.model.layout import PackedLayout
from star_dist.scales import ScaleSchedule

KeyValue = tuple[Tensor, Tensor]
TextPadding = tuple[Tensor, Tensor]


class AttentionContext(Protocol):
    """What a block's attention layers attend to: a packed batch in training, a growing cache in sampling."""

    def attend_image(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor: ...

    def attend_text(self, layer: int, query: Tensor, key_value: Callable[[], KeyValue]) -> Tensor: ...


class PackedAttention:
    """All tokens of a packed batch at once, for training and teacher-forced evaluation."""

    def __init__(self, layout: PackedLayout, kernel: str, device: torch.device) -> None:
        self.layout = layout
        self.block_causal, self.cross = KERNELS[kernel]
        self.text_padding = text_padding(layout, device) if layout.text_lengths else ()

    def attend_image(self, layer: int, query_THd: Tensor, key_THd: Tensor, value_THd: Tensor) -> Tensor:
        """Block-causal attention; (T, H, d) -> (T, H, d)."""
        return self.block_causal(query_THd, key_THd, value_THd, self.layout)

    def attend_text(self, layer: int, query_THd: Tensor, key_value: Callable[[], KeyValue]) -> Tensor:
        """Attention to the sample's own text, keys and values (S, H, d); (T, H, d) -> (T, H, d)."""
        return self.cross(query_THd, *key_value(), self.layout, self.text_padding)


def choose_kernel(name: str) -> str:
    """The kernel that `auto` stands for on this machine; any other name stands for itself.

    Raises:
        ValueError: a kernel that does not exist.
    """
    if name == "auto":
        return "sdpa"
    if name not in KERNELS:
        raise ValueError(f"attention kernel {name!r} is not one of auto, {', '.join(KERNELS)}")
    return name


def block_causal_mask(schedule: ScaleSchedule, device: torch.device) -> Tensor:
    """Which keys each query sees; (L, L) bool."""
    scale_ids = torch.repeat_interleave(torch.tensor(schedule.lengths, device=device))
    return scale_ids[:, None] >= scale_ids[None, :]


def _reference_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
    """Softmax attention of one sample, written out in float32 or better; (Lq, H, d), (Lk, H, d) -> (Lq, H, d)."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = torch.einsum("qhd,khd->hqk", query.to(dtype), key.to(dtype))
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value.to(dtype)).to(value.dtype)


def _reference_block_causal(query_THd: Tensor, key_THd: Tensor, value_THd: Tensor, layout: PackedLayout) -> Tensor:
    lengths = [schedule.num_tokens for schedule in layout.schedules]
    samples = zip(query_THd.split(lengths), key_THd.split(lengths), value_THd.split(lengths), layout.schedules)
    return torch.cat(
        [_reference_attention(q, k, v, block_causal_mask(schedule, q.device)) for q, k, v, schedule in samples]
    )


def _reference_cross(
    query_THd: Tensor, key_SHd: Tensor, value_SHd: Tensor, layout: PackedLayout, padding: Sequence[TextPadding]
) -> Tensor:
    lengths = [schedule.num_tokens for schedule in layout.schedules]
    text_lengths = list(layout.text_lengths)
    samples = zip(query_THd.split(lengths), key_SHd.split(text_lengths), value_SHd.split(text_lengths))
    return torch.cat([_reference_attention(q, k, v, None) for q, k, v in samples])


def scaled_dot_product(query_BLHd: Tensor, key_BLHd: Tensor, value_BLHd: Tensor, mask: Tensor | None = None) -> Tensor:
    """PyTorch's fused attention with softmax scale 1 in (B, L, H, d) order."""
    query, key, value = (x.transpose(1, 2) for x in (query_BLHd, key_BLHd, value_BLHd))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0).transpose(1, 2)


def _sdpa_block_causal(query_THd: Tensor, key_THd: Tensor, value_THd: Tensor, layout: PackedLayout) -> Tensor:
    """One unmasked call per scale over its prefix of keys: computes the visible pairs only and needs no mask."""
    outputs = []
    for run in layout.runs:
        query, key, value = (x[run.tokens].unflatten(0, (run.count, -1)) for x in (query_THd, key_THd, value_THd))
        scales = [
            scaled_dot_product(query[:, start:end], key[:, :end], value[:, :end])
            for start, end in zip(run.schedule.starts, run.schedule.ends)
        ]
        outputs.append(torch.cat(scales, dim=1).flatten(0, 1))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _sdpa_cross(
    query_THd: Tensor, key_SHd: Tensor, value_SHd: Tensor, layout: PackedLayout, padding: Sequence[TextPadding]
) -> Tensor:
    outputs = []
    for run, (index_BS, present_BS) in zip(layout.runs, padding):
        query = query_THd[run.tokens].unflatten(0, (run.count, -1))
        mask = present_BS[:, None, None, :]
        outputs.append(scaled_dot_product(query, key_SHd[index_BS], value_SHd[index_BS], mask).flatten(0, 1))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def text_padding(layout: PackedLayout, device: torch.device) -> list[TextPadding]:
    """For every run of samples, where its text tokens stand, for kernels that take rectangles. Made once a batch."""
    padding = []
    for run in layout.runs:
        index_BS, present_BS = padded_text_index(layout.text_starts[run.samples], layout.text_lengths[run.samples])
        padding.append((index_BS.to(device), present_BS.to(device)))
    return padding


def padded_text_index(starts: tuple[int, ...], lengths: tuple[int, ...]) -> TextPadding:
    """Where the text tokens of each sample stand in the packed text, padded to the longest; (B, S) int64 and bool."""
    offsets = torch.arange(max(lengths))
    present_BS = offsets < torch.tensor(lengths)[:, None]
    index_BS = torch.tensor(starts)[:, None] + offsets
    return index_BS.where(present_BS, 0), present_BS


KERNELS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "sdpa": (_sdpa_block_causal, _sdpa_cross),
    "reference": (_reference_block_causal, _reference_cross),
}
"""Name -> (block-causal self-attention, cross-attention)."""
