"""The transformer with everything that drawing keeps on the device: from a scale's input to the scale's logits.

R rows, N tokens of one scale, C code dimension, D width, V codebook size, S text tokens, W text width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from star_dist.model.cache import KeyValueCache
from star_dist.model.rope import Rotary
from star_dist.model.star import STAR
from star_dist.scales import ScaleSchedule


class ScaleLogits(Protocol):
    """What the sampler draws from."""

    def set_text(self, hidden_SW: Tensor, starts: tuple[int, ...], lengths: tuple[int, ...]) -> None:
        """The text of each row from now on: where it stands in the packed features, and its length."""
        ...

    def logits(self, scale: int, inputs: Tensor) -> Tensor:
        """Logits (R, N, V) float32 of a scale, after all smaller ones; they hold until the next call.

        inputs: of the first scale the pooled text (R, W), of the others the latents so far (R, N, C).
        """
        ...


@dataclass(frozen=True)
class ScaleConstants:
    """What is the same whenever a scale is drawn. offset_ND: level embedding, and learned positions where there are."""

    start: int
    end: int
    rotary: Rotary | None
    offset_ND: Tensor


class CachedModel:
    """Operation by operation, on any device. rows, text_tokens: the most that its cache holds.

    It is of the weights that it was made with: their constants are computed here.
    """

    @torch.no_grad()
    def __init__(self, model: STAR, schedule: ScaleSchedule, rows: int, text_tokens: int) -> None:
        self.model = model
        weight = model.word_embed.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.cache = KeyValueCache(model, schedule, rows, text_tokens)
        # Keys and values of the texts are in the cache already.
        self.no_text_SW = weight.new_empty(0, model.config.text_width)
        tables = model.rotary((schedule,), self.device)
        self.scales = []
        for scale, (start, end) in enumerate(zip(schedule.starts, schedule.ends)):
            positions_N = torch.arange(start, end, device=self.device)
            nothing_ND = weight.new_zeros(end - start, model.config.width)
            offset_ND = model.add_positions(nothing_ND, torch.full_like(positions_N, scale), positions_N)
            # Copies: for slices torch.compile compiles anew by where they start.
            rotary = None if tables is None else (tables[0][start:end].clone(), tables[1][start:end].clone())
            self.scales.append(ScaleConstants(start, end, rotary, offset_ND))

    def set_text(self, hidden_SW: Tensor, starts: tuple[int, ...], lengths: tuple[int, ...]) -> None:
        self.cache.set_text(hidden_SW.to(self.device, self.dtype), starts, lengths)

    def logits(self, scale: int, inputs: Tensor) -> Tensor:
        constants = self.scales[scale]
        inputs = inputs.to(self.device, self.dtype)
        x_RND = self.model.start_token(inputs).unsqueeze(1) if scale == 0 else self.model.word_embed(inputs)
        self.cache.begin_scale(constants.start, constants.end, len(inputs))
        x_RND = self.model.run_blocks(x_RND + constants.offset_ND, self.no_text_SW, constants.rotary, self.cache)
        return self.model.head_logits(x_RND)
