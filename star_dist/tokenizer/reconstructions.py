"""Pictures over what a tokenizer makes of them, and how close that is."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from star_dist.data.pictures import to_pil
from star_dist.scales import ScaleSchedule
from star_dist.tokenizer.vqvae import MultiScaleVQVAE

PICTURES_PER_ROW = 16


@torch.no_grad()
def draw_reconstructions(
    model: MultiScaleVQVAE, originals: Tensor, schedule: ScaleSchedule
) -> tuple[Image.Image, float]:
    """A sheet of pictures (B, 3, side, side) in [-1, 1], each over its reconstruction, and their PSNR in dB."""
    rows = originals.split(PICTURES_PER_ROW)  # all at once would take the more memory, the more pictures are wanted
    reconstructions = torch.cat([model.decode(model.encode(row, schedule), schedule) for row in rows])
    count, side = len(originals), originals.shape[-1]
    columns = min(count, PICTURES_PER_ROW)
    sheet = Image.new("RGB", (columns * side, 2 * side * math.ceil(count / columns)), "white")
    for i, pair in enumerate(zip(to_pil(originals), to_pil(reconstructions))):
        for j, image in enumerate(pair):
            sheet.paste(image, (i % columns * side, (2 * (i // columns) + j) * side))
    return sheet, psnr(F.mse_loss(reconstructions, originals).item())


def psnr(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1]."""
    return 10 * math.log10(4 / max(mean_squared_error, 1e-12))
