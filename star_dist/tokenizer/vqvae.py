"""Encoder, decoder and quantizer of the multi-scale VQ-VAE, under the public checkpoint's parameter names.

Shapes: B batch, C code dimension, H latent side, L tokens over all scales; pictures are (B, 3, side, side) in [-1, 1].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from star_dist.scales import ScaleSchedule
from star_dist.tokenizer.config import VQVAEConfig
from star_dist.tokenizer.quantizer import MultiScaleQuantizer, full_float32


class ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, norm_groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(norm_groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        else:
            self.nin_shortcut = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return self.nin_shortcut(x) + hidden


class SpatialAttention(nn.Module):
    """Single-head self-attention over all cells of a feature map."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels, eps=1e-6)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return x + self.proj_out(mixed.transpose(1, 2).unflatten(2, x.shape[-2:]))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Middle(nn.Module):
    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, norm_groups)
        self.attn_1 = SpatialAttention(channels, norm_groups)
        self.block_2 = ResidualBlock(channels, channels, norm_groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention where the level has it, and a resize at the end."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        norm_groups: int,
        *,
        attention: bool,
        resize: tuple[str, nn.Module] | None,
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResidualBlock(in_channels if i == 0 else out_channels, out_channels, norm_groups) for i in range(num_blocks)
        )
        self.attn = nn.ModuleList(SpatialAttention(out_channels, norm_groups) for _ in range(num_blocks * attention))
        self.resize_name = resize[0] if resize else None
        if resize:
            self.add_module(*resize)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return self.get_submodule(self.resize_name)(x) if self.resize_name else x


class Encoder(nn.Module):
    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.down = nn.ModuleList(
            Level(
                config.channels if i == 0 else widths[i - 1],
                widths[i],
                config.blocks_per_level,
                config.norm_groups,
                attention=i == last,
                resize=None if i == last else ("downsample", Downsample(widths[i])),
            )
            for i in range(len(widths))
        )
        self.mid = Middle(widths[-1], config.norm_groups)
        self.norm_out = nn.GroupNorm(config.norm_groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.code_dim, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv_in(image)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.code_dim, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config.norm_groups)
        # `up.0` is the finest level: the public names count levels as the encoder does.
        self.up = nn.ModuleList(
            Level(
                widths[min(i + 1, last)],
                widths[i],
                config.blocks_per_level + 1,
                config.norm_groups,
                attention=i == last,
                resize=None if i == 0 else ("upsample", Upsample(widths[i])),
            )
            for i in range(len(widths))
        )
        self.norm_out = nn.GroupNorm(config.norm_groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        x = self.mid(self.conv_in(latent))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class MultiScaleVQVAE(nn.Module):
    """Pictures to token maps of growing size and back (VAR's tokenizer, used unchanged by STAR)."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = MultiScaleQuantizer(config)
        self.quant_conv = nn.Conv2d(config.code_dim, config.code_dim, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.code_dim, 3, padding=1)

    def encode_latent(self, image: Tensor) -> Tensor:
        """Continuous latent before quantization; (B, 3, side, side) in [-1, 1] -> (B, C, H, H)."""
        return self.quant_conv(self.encoder(image))

    def decode_latent(self, latent: Tensor) -> Tensor:
        """Picture of a (quantized) latent; (B, C, H, H) -> (B, 3, side, side), not clamped."""
        return self.decoder(self.post_quant_conv(latent))

    @torch.no_grad()
    def encode(self, image: Tensor, schedule: ScaleSchedule) -> Tensor:
        """Tokens of all scales; (B, 3, side, side) in [-1, 1] -> (B, L) int64."""
        with full_float32(image.device):
            return self.quantize.encode(self.encode_latent(image), schedule)

    @torch.no_grad()
    def decode(self, tokens_BL: Tensor, schedule: ScaleSchedule) -> Tensor:
        """Pictures of tokens; (B, L) -> (B, 3, side, side) clamped to [-1, 1]."""
        with full_float32(tokens_BL.device):
            return self.decode_latent(self.quantize.decode(tokens_BL, schedule)).clamp(-1, 1)

    @torch.no_grad()
    def decode_quantized(self, latent_BCHH: Tensor) -> Tensor:
        """Pictures of a quantized latent, also of a running sum; (B, C, H, H) -> (B, 3, side, side) in [-1, 1]."""
        with full_float32(latent_BCHH.device):
            return self.decode_latent(latent_BCHH).clamp(-1, 1)
