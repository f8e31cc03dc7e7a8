"""Attention written out, one sample after another, in float32 or better: what the other kernels are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from star_dist.model.kernels.base import SOFTMAX_SCALE
from star_dist.model.layout import PackedLayout
from star_dist.scales import ScaleSchedule


class ReferenceKernel:
    description = "reference"

    def prepare_image(self, layout: PackedLayout, device: torch.device) -> list[Tensor]:
        """What the queries of every sample see."""
        masks = {schedule: block_causal_mask(schedule, device) for schedule in set(layout.schedules)}
        return [masks[schedule] for schedule in layout.schedules]

    def block_causal(self, query_THd: Tensor, key_THd: Tensor, value_THd: Tensor, image: list[Tensor]) -> Tensor:
        lengths = [len(visible) for visible in image]
        samples = zip(query_THd.split(lengths), key_THd.split(lengths), value_THd.split(lengths), image)
        return torch.cat([softmax_attention(q, k, v, visible) for q, k, v, visible in samples])

    def prepare_text(self, layout: PackedLayout, device: torch.device) -> None:
        return None

    def cross(self, query_THd: Tensor, key_SHd: Tensor, value_SHd: Tensor, layout: PackedLayout, text: None) -> Tensor:
        lengths = [schedule.num_tokens for schedule in layout.schedules]
        text_lengths = list(layout.text_lengths)
        samples = zip(query_THd.split(lengths), key_SHd.split(text_lengths), value_SHd.split(text_lengths))
        return torch.cat([softmax_attention(q, k, v) for q, k, v in samples])


def block_causal_mask(schedule: ScaleSchedule, device: torch.device) -> Tensor:
    """Which keys each query sees; (L, L) bool."""
    scale_ids = torch.repeat_interleave(torch.tensor(schedule.lengths, device=device))
    return scale_ids[:, None] >= scale_ids[None, :]


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None = None) -> Tensor:
    """Attention of one sample; (Lq, H, d), (Lk, H, d) -> (Lq, H, d) in the values' dtype."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = SOFTMAX_SCALE * torch.einsum("qhd,khd->hqk", query.to(dtype), key.to(dtype))
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value.to(dtype)).to(value.dtype)
