"""Scale-by-scale sampling with a key/value cache and guidance.

B pictures, R rows of the transformer (with guidance 2 B: conditional, then unconditional), N tokens of one scale, M
kept candidates, L tokens of all scales, C code dimension, V codebook size, H latent side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from star_dist.errors import UserError
from star_dist.inference.cached_model import CachedModel, ScaleLogits
from star_dist.inference.options import SamplingOptions, ScaleOptions
from star_dist.model.star import STAR
from star_dist.scales import ScaleSchedule
from star_dist.text import TextFeatures
from star_dist.tokenizer.quantizer import MultiScaleQuantizer, full_float32

SMALLEST_NOISE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class SampledPictures:
    """tokens_BL: int64. latent_BCHH: what the decoder makes pictures of; the sum of the tokens' codes, or with
    smoothing of mixtures."""

    tokens_BL: Tensor
    latent_BCHH: Tensor


@dataclass(frozen=True)
class SampledScale:
    """One scale of `num_scales` just drawn, everything still on the device. latent_BCHH: the running sum."""

    scale: int
    num_scales: int
    tokens_BN: Tensor
    latent_BCHH: Tensor


class KnownTokens(Protocol):
    """What editing keeps of a picture."""

    def at(self, latent_BCHH: Tensor, scale: int) -> tuple[Tensor, Tensor] | None:
        """The tokens to keep at a scale, given what was drawn before, and where: (B, N) int64 and bool; or None."""
        ...


@torch.no_grad()
def sample_pictures(
    model: STAR,
    quantizer: MultiScaleQuantizer,
    text: TextFeatures,
    empty_text: TextFeatures,
    schedule: ScaleSchedule,
    options: SamplingOptions,
    seeds: Sequence[int],
    *,
    known: KnownTokens | None = None,
    on_scale: Callable[[SampledScale], None] | None = None,
    reserve: Callable[[int, int], ScaleLogits] | None = None,
) -> SampledPictures:
    """Draws one picture per caption. Tokens never leave the device.

    seeds: one per picture; a picture's random numbers depend on its own seed, not on the batch it is in (the logits
    may differ in their last bits with the batch, as matrix products do: in fp32 that hardly ever changes a token, in
    bf16 it does). empty_text: features of one empty caption, for the unconditional half under guidance. Scales after
    the last guided one run without that half; earlier ones run with it also where their own guidance is 0, because
    later ones need its keys and values. reserve: gives the model with room for a number of rows and of text tokens of
    each, where it is kept from one drawing to the next (`acceleration.py`); None makes one that runs operation by
    operation.

    Raises:
        UserError: not one seed per caption, or options for another number of scales.
    """
    batch = len(text.lengths)
    if len(seeds) != batch:
        raise UserError(f"{batch} captions but {len(seeds)} seeds; give one seed per picture")
    by_scale = options.by_scale(len(schedule))
    guided_scales = max((scale + 1 for scale, chosen in enumerate(by_scale) if chosen.guidance), default=0)
    device = model.word_embed.weight.device
    hidden_SW, pooled_RW, starts, lengths = _pack_text(text, empty_text if guided_scales else None)
    reserve = reserve or partial(CachedModel, model, schedule)
    scale_logits = reserve(len(lengths), max(lengths))
    scale_logits.set_text(hidden_SW, starts, lengths)
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    latent_BCHH = quantizer.empty_latent(batch, schedule)
    input_BNC: Tensor | None = None
    tokens = []
    for scale, chosen in enumerate(by_scale):
        rows = 2 * batch if scale < guided_scales else batch
        inputs = pooled_RW[:rows] if input_BNC is None else input_BNC.repeat(rows // batch, 1, 1)
        logits_BNV = scale_logits.logits(scale, inputs)
        if chosen.guidance:
            conditional, unconditional = logits_BNV.chunk(2)
            logits_BNV = conditional + chosen.guidance * (conditional - unconditional)
        else:
            logits_BNV = logits_BNV[:batch]
        tokens_BN, weights_BNV = draw(logits_BNV, chosen, generators)
        with full_float32(device):
            codes_BNC = quantizer.embedding(tokens_BN)
            if weights_BNV is not None:
                codes_BNC = weights_BNV @ quantizer.embedding.weight
            kept = None if known is None else known.at(latent_BCHH, scale)
            if kept is not None:
                tokens_BN = torch.where(kept[1], kept[0], tokens_BN)
                codes_BNC = torch.where(kept[1].unsqueeze(-1), quantizer.embedding(tokens_BN), codes_BNC)
            latent_BCHH, input_BNC = quantizer.next_input_of_codes(latent_BCHH, codes_BNC, scale, schedule)
        tokens.append(tokens_BN)
        if on_scale is not None:
            on_scale(SampledScale(scale, len(schedule), tokens_BN, latent_BCHH))
    return SampledPictures(torch.cat(tokens, dim=1), latent_BCHH)


def _pack_text(
    text: TextFeatures, empty_text: TextFeatures | None
) -> tuple[Tensor, Tensor, tuple[int, ...], tuple[int, ...]]:
    """Text of all rows: (S, W) with the empty caption once, pooled (R, W), where each row's stands, and its length."""
    starts = tuple(sum(text.lengths[:row]) for row in range(len(text.lengths)))
    if empty_text is None:
        return text.hidden_SW, text.pooled_BW, starts, text.lengths
    batch = len(starts)
    return (
        torch.cat([text.hidden_SW, empty_text.hidden_SW.to(text.hidden_SW)]),
        torch.cat([text.pooled_BW, empty_text.pooled_BW.to(text.pooled_BW).expand(batch, -1)]),
        starts + (len(text.hidden_SW),) * batch,
        text.lengths + empty_text.lengths * batch,
    )


def draw(
    logits_BNV: Tensor, options: ScaleOptions, generators: Sequence[torch.Generator]
) -> tuple[Tensor, Tensor | None]:
    """Draws one token per position after temperature, top-k and top-p.

    Returns the tokens (B, N) int64, and with smoothing the weights of the codes' mixture (B, N, V), else None. A token
    is the largest of log p plus Gumbel noise over the kept candidates, which is a draw from their distribution.
    """
    if options.top_k == 1:
        return logits_BNV.argmax(-1), None
    logits_BNM, candidates_BNM = logits_BNV / options.temperature, None
    if options.top_k or options.top_p:
        vocab_size = logits_BNV.shape[-1]
        logits_BNM, candidates_BNM = logits_BNM.topk(min(options.top_k or vocab_size, vocab_size), dim=-1)
    if options.top_p:
        probabilities = logits_BNM.softmax(-1)
        # A token goes when those before it already hold top_p; the likeliest always stays.
        dropped = probabilities.cumsum(-1) - probabilities >= options.top_p
        dropped[..., 0] = False
        logits_BNM = logits_BNM.masked_fill(dropped, float("-inf"))
    noise = [torch.empty_like(logits_BNM[0]).exponential_(generator=generator) for generator in generators]
    # -log of an exponential is Gumbel noise. A draw of exactly 0 would let even a dropped token win.
    scores_BNM = logits_BNM - torch.stack(noise).clamp_(min=SMALLEST_NOISE).log()
    drawn_BN1 = scores_BNM.argmax(-1, keepdim=True)
    tokens_BN1 = drawn_BN1 if candidates_BNM is None else candidates_BNM.gather(-1, drawn_BN1)
    weights_BNV = None
    if options.smoothing:
        weights_BNV = (scores_BNM / options.smoothing).softmax(-1)
        if candidates_BNM is not None:
            weights_BNV = torch.zeros_like(logits_BNV).scatter(-1, candidates_BNM, weights_BNV)
    return tokens_BN1.squeeze(-1), weights_BNV
