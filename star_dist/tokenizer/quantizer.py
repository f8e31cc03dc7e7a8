"""Multi-scale residual quantization: one codebook for all scales, a small convolution after each (VAR).

Shapes: B batch, C code dimension, V codebook size, H latent side, n side of one scale, N = n * n, L tokens over all
scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from star_dist.model.float32_products import float32_precision
from star_dist.scales import ScaleSchedule
from star_dist.tokenizer.config import VQVAEConfig


class Phi(nn.Conv2d):
    """phi(x) = x / 2 + conv3x3(x) / 2: repairs what up-sampling a code map blurs."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, kernel_size=3, padding=1)

    def forward(self, codes_BCHH: Tensor) -> Tensor:
        return 0.5 * codes_BCHH + 0.5 * super().forward(codes_BCHH)


class SharedPhi(nn.Module):
    """A few `Phi` shared by all scales: each scale takes the one whose tick is nearest to its relative position."""

    def __init__(self, num_phi: int, channels: int) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(Phi(channels) for _ in range(num_phi))

    def at(self, scale: int, num_scales: int) -> Phi:
        """The phi of one scale. At ten scales two lie exactly halfway between ticks, where rounding decides: the ticks
        are made, and ties broken, as numpy's linspace and argmin do in the public code, or its weights would not fit.
        """
        num_phi = len(self.qresi_ls)
        margin = 1 / 3 / num_phi if num_phi == 4 else 1 / 2 / num_phi
        spacing = (1 - margin - margin) / max(num_phi - 1, 1)
        ticks = [*(i * spacing + margin for i in range(num_phi - 1)), 1 - margin]
        position = scale / max(num_scales - 1, 1)
        return self.qresi_ls[min(range(num_phi), key=lambda i: abs(ticks[i] - position))]


class MultiScaleQuantizer(nn.Module):
    """Quantizes a latent as a sum of up-sampled code maps of growing size, and back.

    Everything runs in float32, not in autocast and not in TF32: the nearest code in lower precision is another token.
    """

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.code_dim = config.code_dim
        self.vocab_size = config.vocab_size
        self.embedding = nn.Embedding(config.vocab_size, config.code_dim)
        self.quant_resi = SharedPhi(config.num_phi, config.code_dim)
        # Hits per code and scale, an exponential average kept by training; a buffer of the public checkpoints.
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(config.scales), config.vocab_size))

    def nearest_codes(self, residual_BCnn: Tensor) -> Tensor:
        """Index of the nearest code by L2 for every cell; (B, C, n, n) -> (B, N)."""
        cells_BNC = residual_BCnn.flatten(2).transpose(1, 2)
        codebook_VC = self.embedding.weight
        distance_BNV = (
            cells_BNC.square().sum(-1, keepdim=True) + codebook_VC.square().sum(-1) - 2 * cells_BNC @ codebook_VC.T
        )
        return distance_BNV.argmin(-1)

    def contribution(self, tokens_BN: Tensor, scale: int, schedule: ScaleSchedule) -> Tensor:
        """What the tokens of one scale add to the latent; (B, N) -> (B, C, H, H)."""
        return self.contribution_of_codes(self.embedding(tokens_BN), scale, schedule)

    def contribution_of_codes(self, codes_BNC: Tensor, scale: int, schedule: ScaleSchedule) -> Tensor:
        """The same for codes, which may be mixtures of the codebook's; (B, N, C) -> (B, C, H, H)."""
        side = schedule.sides[scale]
        codes_BCnn = codes_BNC.transpose(1, 2).unflatten(2, (side, side))
        if side != schedule.latent_side:
            codes_BCnn = F.interpolate(codes_BCnn, size=(schedule.latent_side,) * 2, mode="bicubic")
        return self.quant_resi.at(scale, len(schedule))(codes_BCnn)

    def residual_steps(self, latent_BCHH: Tensor, schedule: ScaleSchedule) -> Iterator[tuple[Tensor, Tensor]]:
        """Quantizes scale by scale; yields each scale's tokens (B, N) and its contribution (B, C, H, H).

        Gradients flow into codebook and phi through the contributions, never into the latent.
        """
        residual_BCHH = latent_BCHH.detach()
        for scale, side in enumerate(schedule.sides):
            target_BCnn = shrink(residual_BCHH, side)
            with torch.no_grad():
                tokens_BN = self.nearest_codes(target_BCnn)
            contribution_BCHH = self.contribution(tokens_BN, scale, schedule)
            residual_BCHH = residual_BCHH - contribution_BCHH.detach()
            yield tokens_BN, contribution_BCHH

    @torch.no_grad()
    def encode(self, latent_BCHH: Tensor, schedule: ScaleSchedule) -> Tensor:
        """Tokens of all scales, flattened and concatenated; (B, C, H, H) -> (B, L) int64.

        Raises:
            ValueError: the latent's side is not the schedule's last side.
        """
        if latent_BCHH.shape[-1] != schedule.latent_side or latent_BCHH.shape[-2] != schedule.latent_side:
            raise ValueError(
                f"a latent of {tuple(latent_BCHH.shape[-2:])} cells cannot be quantized with scales "
                f"{list(schedule.sides)}, whose last side must equal the latent's side"
            )
        with full_float32(latent_BCHH.device):
            return torch.cat([tokens for tokens, _ in self.residual_steps(latent_BCHH.float(), schedule)], dim=1)

    def decode(self, tokens_BL: Tensor, schedule: ScaleSchedule) -> Tensor:
        """The quantized latent, the sum of all scales' contributions; (B, L) -> (B, C, H, H)."""
        latent_BCHH = self.empty_latent(len(tokens_BL), schedule)
        for scale in range(len(schedule)):
            latent_BCHH = latent_BCHH + self.contribution(scale_tokens(tokens_BL, scale, schedule), scale, schedule)
        return latent_BCHH

    def empty_latent(self, batch: int, schedule: ScaleSchedule) -> Tensor:
        """The running sum before the first scale: zeros (B, C, H, H)."""
        weight = self.embedding.weight
        return weight.new_zeros(batch, self.code_dim, schedule.latent_side, schedule.latent_side)

    def next_input(
        self, latent_BCHH: Tensor, tokens_BN: Tensor, scale: int, schedule: ScaleSchedule
    ) -> tuple[Tensor, Tensor | None]:
        """Adds one scale's tokens to the running latent and makes the transformer's input for the following scale.

        Returns the new latent (B, C, H, H) and the input of scale + 1, (B, N of scale + 1, C), None after the last.
        """
        return self.next_input_of_codes(latent_BCHH, self.embedding(tokens_BN), scale, schedule)

    def next_input_of_codes(
        self, latent_BCHH: Tensor, codes_BNC: Tensor, scale: int, schedule: ScaleSchedule
    ) -> tuple[Tensor, Tensor | None]:
        """The same for codes (B, N, C), which may be mixtures of the codebook's."""
        latent_BCHH = latent_BCHH + self.contribution_of_codes(codes_BNC, scale, schedule)
        if scale + 1 == len(schedule):
            return latent_BCHH, None
        side = schedule.sides[scale + 1]
        input_BCnn = F.interpolate(latent_BCHH, size=(side, side), mode="area")
        return latent_BCHH, input_BCnn.flatten(2).transpose(1, 2)

    @torch.no_grad()
    def teacher_forcing_input(self, tokens_BL: Tensor, schedule: ScaleSchedule) -> Tensor:
        """Transformer inputs of scales 2..K when all tokens are known; (B, L) -> (B, L - 1, C).

        Scale 1 has no token input: the start token stands there.
        """
        with full_float32(tokens_BL.device):
            latent_BCHH = self.empty_latent(len(tokens_BL), schedule)
            inputs = []
            for scale in range(len(schedule) - 1):
                tokens_BN = scale_tokens(tokens_BL, scale, schedule)
                latent_BCHH, input_BNC = self.next_input(latent_BCHH, tokens_BN, scale, schedule)
                inputs.append(input_BNC)
            return torch.cat(inputs, dim=1)


def shrink(maps_BCHH: Tensor, side: int) -> Tensor:
    """Area averages of square maps at one scale; maps of that side already are taken as they are."""
    return maps_BCHH if maps_BCHH.shape[-1] == side else F.interpolate(maps_BCHH, size=(side, side), mode="area")


def scale_tokens(tokens_BL: Tensor, scale: int, schedule: ScaleSchedule) -> Tensor:
    """The tokens of one scale; (B, L) -> (B, N)."""
    return tokens_BL[:, schedule.starts[scale] : schedule.ends[scale]]


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Products and convolutions in float32 proper: no autocast, and neither TF32, which cuDNN would use by default and
    cuBLAS where the process allows it, nor the bf16 that oneDNN takes on a CPU if it may.
    """
    cuda = torch.backends.cudnn, torch.backends.cudnn.conv, torch.backends.cuda.matmul
    cpu = torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul
    with torch.autocast(device.type, enabled=False), float32_precision("ieee", *cuda, *cpu):
        yield
