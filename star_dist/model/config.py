"""Sizes and switches of the STAR transformer. Imports no torch, so that launchers can read it at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RopeConvention = Literal["paper", "public"]
PositionEncoding = Literal["rope", "learned"]


@dataclass(frozen=True, kw_only=True)
class StarConfig:
    """Architecture of the transformer; with only `depth` given, the paper's family (width 64 x depth, heads = depth).

    rope_convention: `paper` is equation 2 (i / h_k * extent, i = 1..h_k); `public` is what the public weights were
    trained with (i / (h_k - 1) * extent, i = 0..h_k - 1). positions and cross_attention are the paper's ablations
    (section 4.3).

    Raises:
        ValueError: sizes that do not divide, or a head whose channels are no multiple of 8.
    """

    __pydantic_config__ = {"extra": "forbid", "strict": True, "allow_inf_nan": False}

    depth: int
    scales: tuple[int, ...]
    width: int | None = None
    heads: int | None = None
    ffn_ratio: int = 4
    vocab_size: int = 4096
    code_dim: int = 32
    text_width: int = 1024
    positions: PositionEncoding = "rope"
    rope_convention: RopeConvention = "paper"
    rope_theta: float = 10000.0
    rope_extent: float = 64.0
    cross_attention: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", tuple(self.scales))
        if self.width is None:
            object.__setattr__(self, "width", 64 * self.depth)
        if self.heads is None:
            object.__setattr__(self, "heads", self.depth)
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide into heads {self.heads}; change one of them")
        if self.head_dim % 8:  # FlashAttention's condition; RoPE, which rotates pairs on two axes, needs 4
            raise ValueError(
                f"width {self.width} / heads {self.heads} gives {self.head_dim} channels a head, attention needs a "
                f"multiple of 8; change one of them"
            )

    @property
    def head_dim(self) -> int:
        return self.width // self.heads
