"""Editing pictures without training for it: in-painting, out-painting and variations (STAR's future work).

At every scale, tokens that stand for what is known are forced and the others are drawn from the text and from what
surrounds them. What is forced is not what the tokenizer made of the picture alone: it is the nearest code to what is
still missing after everything drawn so far, so that a coarse scale that had to be redrawn is corrected by finer ones.
With nothing to redraw that is the tokenizer's own encoding, with everything to redraw it is plain sampling.

B pictures, C code dimension, H latent side, n side of one scale, N = n * n; pixels are (B, 3, side, side) in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from star_dist.data.pictures import normalize, to_pil, to_tensor
from star_dist.errors import UserError
from star_dist.inference.options import SamplingOptions
from star_dist.inference.pipeline import DEFAULT_OPTIONS, StarPipeline
from star_dist.scales import ScaleSchedule
from star_dist.tokenizer.quantizer import MultiScaleQuantizer, full_float32, shrink

KEPT_SHARE = 0.5  # a cell of a coarse scale is kept if at least this share of its area is known


class KnownLatent:
    """Forces tokens so that the drawn latent comes to a target wherever that is known (`sampler.KnownTokens`).

    target_BCHH: the known picture's latent. known_B1HH: 1 where it is known, else 0. num_scales: force tokens of the
    first scales alone; None forces them at all.
    """

    def __init__(
        self,
        quantizer: MultiScaleQuantizer,
        schedule: ScaleSchedule,
        target_BCHH: Tensor,
        known_B1HH: Tensor,
        num_scales: int | None = None,
    ) -> None:
        self.quantizer = quantizer
        self.schedule = schedule
        self.target_BCHH = target_BCHH.float()
        self.known_B1HH = known_B1HH.float()
        self.num_scales = len(schedule) if num_scales is None else num_scales

    def at(self, latent_BCHH: Tensor, scale: int) -> tuple[Tensor, Tensor] | None:
        """Tokens to keep and where, (B, N) each: the nearest codes to the mean residual over the known area."""
        if scale >= self.num_scales:
            return None
        side = self.schedule.sides[scale]
        residual_BCHH = (self.target_BCHH - latent_BCHH) * self.known_B1HH
        share_B1nn = shrink(self.known_B1HH, side)
        mean_BCnn = shrink(residual_BCHH, side) / share_B1nn.where(share_B1nn > 0, 1)
        return self.quantizer.nearest_codes(mean_BCnn), share_B1nn.flatten(1) >= KEPT_SHARE


def inpaint(
    pipeline: StarPipeline,
    prompts: str | Sequence[str],
    picture: Image.Image,
    mask: Image.Image,
    seed: int | Sequence[int] = 0,
    options: SamplingOptions = DEFAULT_OPTIONS,
) -> list[Image.Image]:
    """Draws what the mask marks (white: redraw, black: keep) anew, once per prompt.

    Known pixels of the result are the picture's own. picture, mask: of the model's resolution, or resized to it; then a
    pixel is known if all that it is made of are.

    Raises:
        UserError: picture and mask have different sizes or are not square.
    """
    if picture.size != mask.size:
        raise UserError(f"the picture has {_size(picture)} pixels, the mask {_size(mask)}; make them the same size")
    _check_square(picture)
    pixels = normalize(to_tensor(picture.convert("RGB"))).unsqueeze(0)
    known = (to_tensor(mask.convert("L").convert("RGB"))[None, :1] == 0).float()
    # Filled before it is resized, which mixes neighbours: what is hidden would come into the known pixels beside it.
    side = pipeline.resolution
    seen = _pixels(to_pil(fill_unknown(pixels, known))[0], side, pipeline.device)
    known_11SS = (shrink(known, side) == 1).float().to(pipeline.device)
    return _redraw(pipeline, prompts, seen, known_11SS, seed, options)


def outpaint(
    pipeline: StarPipeline,
    prompts: str | Sequence[str],
    picture: Image.Image,
    box: tuple[float, float, float, float],
    seed: int | Sequence[int] = 0,
    options: SamplingOptions = DEFAULT_OPTIONS,
) -> list[Image.Image]:
    """Draws the surroundings of a picture, once per prompt.

    box: left, top, right, bottom of the picture's place on the canvas, as fractions of the canvas.

    Raises:
        UserError: a box that is empty, reaches out of the canvas or is of another shape than the picture.
    """
    side = pipeline.resolution
    inside = all(0 <= edge <= 1 for edge in box)
    left, top, right, bottom = (round(edge * side) for edge in box) if inside else (0, 0, 0, 0)
    if not (left < right and top < bottom):
        raise UserError(f"the box must be left,top,right,bottom in 0..1 and hold one of {side} pixels, got {list(box)}")
    width, height = right - left, bottom - top
    rounding = picture.width + picture.height  # both ends of an edge are off by half a pixel at most
    if abs(picture.height * width - picture.width * height) > rounding:
        raise UserError(
            f"the picture has {_size(picture)} pixels, its box {width} x {height}; give both the same shape"
        )
    canvas = Image.new("RGB", (side, side))
    canvas.paste(picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS), (left, top))
    pixels = _pixels(canvas, side, pipeline.device)
    known_11SS = pixels.new_zeros(1, 1, side, side)
    known_11SS[..., top:bottom, left:right] = 1
    return _redraw(pipeline, prompts, pixels, known_11SS, seed, options)


def vary(
    pipeline: StarPipeline,
    prompts: str | Sequence[str],
    picture: Image.Image,
    keep_scales: int,
    seed: int | Sequence[int] = 0,
    options: SamplingOptions = DEFAULT_OPTIONS,
) -> list[Image.Image]:
    """Draws a picture anew from its first scales, once per prompt: layout and colours stay, details change.

    keep_scales: how many of the picture's scales are kept, from 0 (none: plain sampling) to all (none is drawn).

    Raises:
        UserError: a picture that is not square, or more scales than there are.
    """
    scales = len(pipeline.schedule)
    if not 0 <= keep_scales <= scales:
        raise UserError(f"keep_scales must lie in 0..{scales}, the model's number of scales; got {keep_scales}")
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    pixels = _pixels(picture, pipeline.resolution, pipeline.device)
    target_BCHH = _latent(pipeline, pixels).expand(len(prompts), -1, -1, -1)
    everywhere = torch.ones_like(target_BCHH[:, :1])
    known = KnownLatent(pipeline.tokenizer.quantize, pipeline.schedule, target_BCHH, everywhere, keep_scales)
    return pipeline(prompts, seed, options, known=known)


def fill_unknown(pixels_B3SS: Tensor, known_B1SS: Tensor) -> Tensor:
    """Fills unknown pixels smoothly from the known ones around them, so that the encoder sees no edge at the border.

    Averages of the known pixels of ever larger squares, the smallest that holds one; grey where nothing is known.
    """
    filled, weight = pixels_B3SS * known_B1SS, known_B1SS
    levels = [(filled, weight)]
    while filled.shape[-1] > 1:
        filled, weight = (F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False) for x in (filled, weight))
        levels.append((filled, weight))
    result = torch.zeros_like(levels[-1][0])
    for filled, weight in reversed(levels):
        coarser = F.interpolate(result, size=filled.shape[-2:], mode="bilinear", align_corners=False)
        result = torch.where(weight > 0, filled / weight.where(weight > 0, 1), coarser)
    return result


def _redraw(
    pipeline: StarPipeline,
    prompts: str | Sequence[str],
    pixels_13SS: Tensor,
    known_11SS: Tensor,
    seed: int | Sequence[int],
    options: SamplingOptions,
) -> list[Image.Image]:
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    target_BCHH = _latent(pipeline, fill_unknown(pixels_13SS, known_11SS)).expand(len(prompts), -1, -1, -1)
    # A cell of the latent is known if all of its pixels are.
    known_B1HH = (shrink(known_11SS, pipeline.schedule.latent_side) == 1).float().expand(len(prompts), -1, -1, -1)
    known = KnownLatent(pipeline.tokenizer.quantize, pipeline.schedule, target_BCHH, known_B1HH)
    drawn = pipeline.sample(prompts, seed, options, known=known)
    pictures = pipeline.decode_pixels(drawn.latent_BCHH)
    return to_pil(torch.where(known_11SS == 1, pixels_13SS, pictures))


def _latent(pipeline: StarPipeline, pixels: Tensor) -> Tensor:
    with torch.no_grad(), full_float32(pixels.device):
        return pipeline.tokenizer.encode_latent(pixels)


def _pixels(picture: Image.Image, side: int, device: torch.device) -> Tensor:
    """A square picture at the model's resolution; (1, 3, side, side) in [-1, 1]."""
    _check_square(picture)
    resized = picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
    return normalize(to_tensor(resized)).unsqueeze(0).to(device)


def _check_square(picture: Image.Image) -> None:
    if picture.width != picture.height:
        raise UserError(f"the picture has {_size(picture)} pixels, the model draws squares; crop it to one")


def _size(picture: Image.Image) -> str:
    return f"{picture.width} x {picture.height}"
