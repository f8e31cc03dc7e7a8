"""Scale-by-scale sampling with a key/value cache and guidance.

B pictures, R rows of the transformer (2 B with guidance: conditional, then unconditional), N tokens of one scale,
L of all scales, C code dimension, V codebook size, H heads, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from star_dist.model.attention import KeyValue
from star_dist.model.kernels.sdpa import padded_text_index, scaled_dot_product
from star_dist.model.star import STAR
from star_dist.scales import ScaleSchedule
from star_dist.text import TextFeatures
from star_dist.tokenizer.quantizer import MultiScaleQuantizer


@dataclass(frozen=True)
class SamplingOptions:
    """guidance: 0 is off; it grows linearly over the scales to this value at the last. top_k: 0 is off, 1 is greedy.
    top_p: 0 is off.

    Raises:
        ValueError: a value out of range.
    """

    guidance: float = 4.0
    top_k: int = 0
    top_p: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.guidance < 0 or self.top_k < 0 or not 0 <= self.top_p <= 1 or self.temperature <= 0:
            raise ValueError(
                f"guidance and top_k must not be negative, top_p must lie in 0..1, temperature above 0; got guidance "
                f"{self.guidance}, top_k {self.top_k}, top_p {self.top_p}, temperature {self.temperature}"
            )


class CachedAttention:
    """Keys and values of all scales so far: new queries see the whole cache, so no mask is needed."""

    def __init__(self, model: STAR, rows: int, schedule: ScaleSchedule, text_lengths: tuple[int, ...]) -> None:
        config = model.config
        weight = model.word_embed.weight
        shape = (config.depth, rows, schedule.num_tokens, config.heads, config.head_dim)
        self.keys = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        self.values = torch.empty_like(self.keys)
        self.rows = rows
        self.text: list[KeyValue | None] = [None] * config.depth
        starts = [sum(text_lengths[:row]) for row in range(rows)]
        index_RS, present_RS = padded_text_index(tuple(starts), text_lengths)
        self.text_index_RS = index_RS.to(weight.device)
        self.text_mask_R11S = present_RS.to(weight.device)[:, None, None, :]
        self.start = self.end = 0

    def begin_scale(self, start: int, end: int) -> None:
        self.start, self.end = start, end

    def attend_image(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (x.unflatten(0, (self.rows, -1)) for x in (query, key, value))
        self.keys[layer, :, self.start : self.end] = key
        self.values[layer, :, self.start : self.end] = value
        mixed = scaled_dot_product(query, self.keys[layer, :, : self.end], self.values[layer, :, : self.end])
        return mixed.flatten(0, 1)

    def attend_text(self, layer: int, query: Tensor, key_value: Callable[[], KeyValue]) -> Tensor:
        cached = self.text[layer]
        if cached is None:
            key, value = key_value()
            cached = self.text[layer] = key[self.text_index_RS], value[self.text_index_RS]
        query = query.unflatten(0, (self.rows, -1))
        return scaled_dot_product(query, *cached, self.text_mask_R11S).flatten(0, 1)


@torch.no_grad()
def sample_tokens(
    model: STAR,
    quantizer: MultiScaleQuantizer,
    text: TextFeatures,
    empty_text: TextFeatures,
    schedule: ScaleSchedule,
    options: SamplingOptions,
    seeds: Sequence[int],
) -> Tensor:
    """Draws the tokens of one picture per caption; (B, L) int64.

    seeds: one per picture; a picture depends on its own seed, not on the batch it is in. empty_text: features of one
    empty caption, used for the unconditional half under guidance (golden/README.md: logits = (1 + t) cond - t uncond,
    t = guidance * k / (K - 1)).
    """
    batch = len(text.lengths)
    if len(seeds) != batch:
        raise ValueError(f"{batch} captions but {len(seeds)} seeds")
    device = model.word_embed.weight.device
    dtype = model.word_embed.weight.dtype
    hidden, pooled, lengths = text.hidden_SW, text.pooled_BW, text.lengths
    if options.guidance > 0:
        hidden = torch.cat([hidden, empty_text.hidden_SW.repeat(batch, 1)])
        pooled = torch.cat([pooled, empty_text.pooled_BW.repeat(batch, 1)])
        lengths = lengths + empty_text.lengths * batch
    hidden, pooled = hidden.to(device, dtype), pooled.to(device, dtype)
    rows = len(lengths)
    cache = CachedAttention(model, rows, schedule, lengths)
    rotary = model.rotary((schedule,), device)
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    latent = quantizer.empty_latent(batch, schedule)
    x_RNC: Tensor | None = None
    all_tokens = []
    for scale, (start, end) in enumerate(zip(schedule.starts, schedule.ends)):
        x_TD = model.start_token(pooled) if x_RNC is None else model.word_embed(x_RNC.to(dtype)).flatten(0, 1)
        positions_T = torch.arange(start, end, device=device).repeat(rows)
        x_TD = model.add_positions(x_TD, torch.full_like(positions_T, scale), positions_T)
        scale_rotary = None if rotary is None else tuple(table[start:end].repeat(rows, 1) for table in rotary)
        cache.begin_scale(start, end)
        logits_RNV = model.head_logits(model.run_blocks(x_TD, hidden, scale_rotary, cache)).unflatten(0, (rows, -1))
        if options.guidance > 0:
            strength = options.guidance * scale / max(len(schedule) - 1, 1)
            conditional, unconditional = logits_RNV.chunk(2)
            logits_RNV = (1 + strength) * conditional - strength * unconditional
        tokens_BN = draw(logits_RNV, options, generators)
        all_tokens.append(tokens_BN)
        latent, next_BNC = quantizer.next_input(latent, tokens_BN, scale, schedule)
        if next_BNC is not None:
            x_RNC = next_BNC.repeat(rows // batch, 1, 1)
    return torch.cat(all_tokens, dim=1)


def draw(logits_BNV: Tensor, options: SamplingOptions, generators: Sequence[torch.Generator]) -> Tensor:
    """Draws one token per position after temperature, top-k and top-p; (B, N, V) -> (B, N) int64."""
    if options.top_k == 1:
        return logits_BNV.argmax(-1)
    logits_BNV = logits_BNV / options.temperature
    if options.top_k:
        smallest_kept = logits_BNV.topk(min(options.top_k, logits_BNV.shape[-1]), dim=-1).values[..., -1:]
        logits_BNV = logits_BNV.masked_fill(logits_BNV < smallest_kept, float("-inf"))
    if options.top_p:
        ordered, order = logits_BNV.sort(-1, descending=True)
        probabilities = ordered.softmax(-1)
        # A token goes when those before it already hold top_p; the likeliest always stays.
        dropped = probabilities.cumsum(-1) - probabilities >= options.top_p
        dropped[..., 0] = False
        logits_BNV = logits_BNV.masked_fill(dropped.gather(-1, order.argsort(-1)), float("-inf"))
    probabilities_BNV = logits_BNV.softmax(-1)
    rows = [torch.multinomial(row, 1, generator=g).squeeze(-1) for row, g in zip(probabilities_BNV, generators)]
    return torch.stack(rows)
