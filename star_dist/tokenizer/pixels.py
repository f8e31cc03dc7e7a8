"""Latents to pixels for people to look at: on a GPU in half precision and a few pictures at a time.

Tokens are never made of these pixels: encoding and quantization stay in float32 (`quantizer.py`).
B pictures, C code dimension, H latent side.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from star_dist.tokenizer.vqvae import MultiScaleVQVAE

# Pixels decoded at once: 4 pictures of 1024 or 64 of 256. The public decoder's widest layer takes 320 bytes of a pixel
# in bf16, so 1.3 GB, a few of which are held at a time.
PIXELS_AT_ONCE = 4 * 1024**2


class PixelDecoder:
    """Decodes with a tokenizer's weights as they are now.

    dtype: None takes bf16 on a GPU, which holds a copy of the decoder with channels last, and on a CPU the tokenizer
    itself, in float32. The copy is made with the first latent.
    """

    def __init__(self, tokenizer: MultiScaleVQVAE, dtype: torch.dtype | None = None) -> None:
        self.tokenizer = tokenizer
        on_cpu = tokenizer.quantize.embedding.weight.device.type == "cpu"
        self.dtype = dtype or (torch.float32 if on_cpu else torch.bfloat16)
        self._half: MultiScaleVQVAE | None = None

    @torch.no_grad()
    def __call__(self, latent_BCHH: Tensor) -> Tensor:
        """(B, C, H, H) -> (B, 3, side, side) float32 in [-1, 1]."""
        if self.dtype == torch.float32:
            return self.tokenizer.decode_quantized(latent_BCHH)
        if self._half is None:
            self._half = self._copy()
        side = latent_BCHH.shape[-1] * self.tokenizer.config.downsampling
        chunks = latent_BCHH.to(self.dtype, memory_format=torch.channels_last).split(max(1, PIXELS_AT_ONCE // side**2))
        with torch.autocast(latent_BCHH.device.type, enabled=False):
            return torch.cat([self._half.decode_latent(chunk).float().clamp(-1, 1) for chunk in chunks])

    def _copy(self) -> MultiScaleVQVAE:
        with torch.device("meta"):
            half = MultiScaleVQVAE(self.tokenizer.config)
        half.decoder = copy.deepcopy(self.tokenizer.decoder).to(self.dtype, memory_format=torch.channels_last)
        half.post_quant_conv = copy.deepcopy(self.tokenizer.post_quant_conv).to(
            self.dtype, memory_format=torch.channels_last
        )
        _spread_norms(half)
        return half.eval().requires_grad_(False)


class SpreadGroupNorm(nn.Module):
    """GroupNorm whose sums all of a GPU works on, in the layout that convolutions like.

    PyTorch's own has one thread block for each picture and group, and for channels last it copies back and forth: 70 %
    of the time of the public decoder on an H200. Sums, scale and shift are float32. Inference only: the result is
    written straight into the input's precision, which has no gradient.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x_BCHH: Tensor) -> Tensor:
        norm, over = self.norm, (2, 3)
        by_group = lambda x_BC: x_BC.unflatten(1, (norm.num_groups, -1)).mean(-1)
        mean_BG = by_group(x_BCHH.mean(over, dtype=torch.float32))
        length_BC = torch.linalg.vector_norm(x_BCHH, dim=over, dtype=torch.float32)
        square_BG = by_group(length_BC.square() / x_BCHH.shape[2:].numel())
        inverse_BG = (square_BG - mean_BG.square()).clamp(min=0).add(norm.eps).rsqrt()
        mean_BC, inverse_BC = (
            x.repeat_interleave(norm.num_channels // norm.num_groups, 1) for x in (mean_BG, inverse_BG)
        )
        scale_BC = norm.weight * inverse_BC
        shift_BC = norm.bias - mean_BC * scale_BC
        scale, shift = (x[:, :, None, None] for x in (scale_BC, shift_BC))
        return torch.addcmul(shift, x_BCHH, scale, out=torch.empty_like(x_BCHH))


def _spread_norms(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.GroupNorm):
            setattr(module, name, SpreadGroupNorm(child))
        else:
            _spread_norms(child)
