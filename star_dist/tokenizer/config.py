"""Sizes of the multi-scale VQ-VAE. Imports no torch, so that launchers can read it at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class VQVAEConfig:
    """Architecture of the tokenizer; the defaults are the public `vae_ch160v4096z32`.

    channels: width of the first convolution. channel_multipliers: width of each resolution level over `channels`;
    every level after the first halves the picture, so five levels shrink it 16 times. scales: the schedule the
    tokenizer was trained with (any schedule that ends at the latent's side can be used with it).
    """

    __pydantic_config__ = {"extra": "forbid", "strict": True}

    vocab_size: int = 4096
    code_dim: int = 32
    channels: int = 160
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks_per_level: int = 2
    norm_groups: int = 32
    num_phi: int = 4
    scales: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "code_dim", "channels", "blocks_per_level", "norm_groups", "num_phi"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be 1 or more")
        if min(self.channel_multipliers, default=0) < 1:
            raise ValueError(f"channel_multipliers {list(self.channel_multipliers)} must be 1 or more, one per level")
        for multiplier in self.channel_multipliers:
            if (self.channels * multiplier) % self.norm_groups:
                raise ValueError(
                    f"a level of {self.channels} x {multiplier} channels does not divide into norm_groups "
                    f"{self.norm_groups}; change channels, channel_multipliers or norm_groups"
                )

    @property
    def downsampling(self) -> int:
        """Picture side over latent side."""
        return 2 ** (len(self.channel_multipliers) - 1)
