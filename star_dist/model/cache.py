"""Keys and values of the scales sampled so far: new queries see the whole cache, so sampling needs no mask.

R rows, L tokens of a picture, N tokens of one scale, S text tokens of a row at most, H heads, d channels of a head, W
text width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from star_dist.model.attention import Constants, KeyValue
from star_dist.model.kernels.sdpa import padded_text_index, scaled_dot_product
from star_dist.model.layout import copy_to_device
from star_dist.model.star import STAR
from star_dist.scales import ScaleSchedule


class KeyValueCache:
    """What sampling attends to. Allocated once for all layers and scales and written in place, scale after scale.

    The memory stays where it is from one drawing to the next, so that a captured CUDA graph finds it again. What the
    layers derive from their parameters alone is computed here once: a cache is of the weights that it was made with.

    rows: at most. text_tokens: of a row's text at most.
    """

    def __init__(self, model: STAR, schedule: ScaleSchedule, rows: int, text_tokens: int) -> None:
        config, weight = model.config, model.word_embed.weight
        self.max_rows, self.text_tokens = rows, text_tokens
        heads = (config.heads, config.head_dim)
        self.keys, self.values = weight.new_empty(2, config.depth, rows, schedule.num_tokens, *heads)
        # Zeros, because what is masked must still be finite.
        texts = config.depth if config.cross_attention else 0
        self.text_keys, self.text_values = weight.new_zeros(2, texts, rows, text_tokens, *heads)
        self.text_mask_R11S = torch.zeros(rows, 1, 1, text_tokens, dtype=torch.bool, device=weight.device)
        self.blocks = model.blocks
        self.image_constants = [block.attn.constants() for block in model.blocks]
        self.text_constants = [block.cross_attn.constants() for block in model.blocks if block.cross_attn is not None]
        self.rows = self.start = self.end = 0

    def set_text(self, hidden_SW: Tensor, starts: tuple[int, ...], lengths: tuple[int, ...]) -> None:
        """Computes the keys and values of the texts that the first rows attend to from now on, once per layer.

        hidden_SW: text features, packed. starts, lengths: where the text of each row stands there; rows may share one.
        """
        self.write_text(self.lay_out_text(hidden_SW, starts, lengths))

    def lay_out_text(self, hidden_SW: Tensor, starts: tuple[int, ...], lengths: tuple[int, ...]) -> Tensor:
        """Text features row by row, padded to the longest, (R, S, W); rows attend to their own lengths from now on."""
        index_RS, present_RS = (copy_to_device(x, hidden_SW.device) for x in padded_text_index(starts, lengths))
        rows, longest = index_RS.shape
        self.text_mask_R11S.zero_()
        self.text_mask_R11S[:rows, 0, 0, :longest] = present_RS
        return hidden_SW[index_RS]

    def write_text(self, hidden_RSW: Tensor) -> None:
        """Computes every layer's keys and values of these texts, in place."""
        rows, longest = hidden_RSW.shape[:2]
        for layer, (keys, values) in enumerate(zip(self.text_keys, self.text_values)):
            key_RSHd, value_RSHd = self.blocks[layer].cross_attn.text_key_value(hidden_RSW)
            keys[:rows, :longest] = key_RSHd
            values[:rows, :longest] = value_RSHd

    def begin_scale(self, start: int, end: int, rows: int) -> None:
        """The tokens that come next are [start, end) of the first `rows` rows.

        A row that is left out of one scale must be left out of all later ones: it has no keys for this one.
        """
        self.start, self.end, self.rows = start, end, rows

    def of_layer(self, layer: int) -> LayerCache:
        return LayerCache(self, layer)


class LayerCache:
    """One layer's part of a cache at one scale; it knows no layer number, so a compiled block serves every layer."""

    def __init__(self, cache: KeyValueCache, layer: int) -> None:
        rows, self.start, self.end = cache.rows, cache.start, cache.end
        self.keys, self.values = cache.keys[layer, :rows], cache.values[layer, :rows]
        self.constants_of_image = cache.image_constants[layer]
        if cache.text_constants:
            self.constants_of_text = cache.text_constants[layer]
            self.text_keys, self.text_values = cache.text_keys[layer, :rows], cache.text_values[layer, :rows]
            self.text_mask_R11S = cache.text_mask_R11S[:rows]

    def image_constants(self, compute: Callable[[], Constants]) -> Constants:
        return self.constants_of_image

    def text_constants(self, compute: Callable[[], Constants]) -> Constants:
        return self.constants_of_text

    def attend_image(self, query_RNHd: Tensor, key_RNHd: Tensor, value_RNHd: Tensor) -> Tensor:
        """Keeps the scale's keys and values, and attends to all kept ones; (R, N, H, d) -> (R, N, H, d)."""
        self.keys[:, self.start : self.end] = key_RNHd
        self.values[:, self.start : self.end] = value_RNHd
        return scaled_dot_product(query_RNHd, self.keys[:, : self.end], self.values[:, : self.end])

    def attend_text(self, query_RNHd: Tensor, key_value: Callable[[], KeyValue]) -> Tensor:
        """Attention to the row's own text; (R, N, H, d) -> (R, N, H, d)."""
        return scaled_dot_product(query_RNHd, self.text_keys, self.text_values, self.text_mask_R11S)
