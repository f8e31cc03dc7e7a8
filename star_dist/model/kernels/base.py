"""What every attention kernel offers.

T image tokens of the packed batch, S text tokens, H heads, d channels of a head. Queries and keys come normalised, so
the softmax scale is 1 (tests/golden/README.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from star_dist.model.layout import PackedLayout

SOFTMAX_SCALE = 1.0


class KernelUnavailable(ValueError):
    """A kernel that this machine, device or precision cannot run; the message says why and what to change."""


class TextAttention(Protocol):
    def prepare_text(self, layout: PackedLayout, device: torch.device) -> Any:
        """What `cross` needs to know about the text lengths, on the device; made once a batch."""
        ...

    def cross(self, query_THd: Tensor, key_SHd: Tensor, value_SHd: Tensor, layout: PackedLayout, text: Any) -> Tensor:
        """Attention of every image token to the text of its own sample; (T, H, d)."""
        ...


class Kernel(TextAttention, Protocol):
    """description: for the log, with the library's version where one does the work."""

    description: str

    def prepare_image(self, layout: PackedLayout, device: torch.device) -> Any:
        """What `block_causal` needs to know about the scales; made once a batch, outside of what may be compiled."""
        ...

    def block_causal(self, query_THd: Tensor, key_THd: Tensor, value_THd: Tensor, image: Any) -> Tensor:
        """Self-attention in which a token of scale k sees scales 1..k of its own sample; (T, H, d)."""
        ...


class ByLayout:
    """A kernel that needs to know the layout alone, and that runs as it is also where whole blocks are compiled."""

    def prepare_image(self, layout: PackedLayout, device: torch.device) -> PackedLayout:
        return layout


def join(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Concatenation that copies nothing where there is nothing to join."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)
