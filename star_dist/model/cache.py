"""Keys and values of the scales sampled so far: new queries see the whole cache, so sampling needs no mask.

R rows, L tokens of a picture, T tokens of one scale over the rows that run, S text tokens, H heads, d channels of a
head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from star_dist.model.attention import KeyValue
from star_dist.model.kernels.sdpa import padded_text_index, scaled_dot_product
from star_dist.model.star import STAR
from star_dist.scales import ScaleSchedule


class KeyValueCache:
    """What sampling attends to. Allocated once for all layers and scales and written in place, scale after scale.

    text_starts, text_lengths: where the text of each row stands in the packed text features; rows may share a text,
    whose keys and values are computed once per layer.
    """

    def __init__(
        self, model: STAR, schedule: ScaleSchedule, text_starts: tuple[int, ...], text_lengths: tuple[int, ...]
    ) -> None:
        config = model.config
        weight = model.word_embed.weight
        shape = (config.depth, len(text_lengths), schedule.num_tokens, config.heads, config.head_dim)
        self.keys = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        self.values = torch.empty_like(self.keys)
        self.text: list[KeyValue | None] = [None] * config.depth
        index_RS, present_RS = padded_text_index(text_starts, text_lengths)
        self.text_index_RS = index_RS.to(weight.device)
        self.text_mask_R11S = present_RS.to(weight.device)[:, None, None, :]
        self.rows = self.start = self.end = 0

    def begin_scale(self, start: int, end: int, rows: int) -> None:
        """The tokens that come next are [start, end) of the first `rows` rows.

        A row that is left out of one scale must be left out of all later ones: it has no keys for this one.
        """
        self.start, self.end, self.rows = start, end, rows

    def of_layer(self, layer: int) -> LayerCache:
        return LayerCache(self, layer)


class LayerCache:
    """One layer's part of a cache."""

    def __init__(self, cache: KeyValueCache, layer: int) -> None:
        self.cache, self.layer = cache, layer

    def attend_image(self, query_THd: Tensor, key_THd: Tensor, value_THd: Tensor) -> Tensor:
        """Keeps the scale's keys and values, and attends to all kept ones; (T, H, d) -> (T, H, d)."""
        cache = self.cache
        query, key, value = (x.unflatten(0, (cache.rows, -1)) for x in (query_THd, key_THd, value_THd))
        keys, values = (kept[self.layer, : cache.rows] for kept in (cache.keys, cache.values))
        keys[:, cache.start : cache.end] = key
        values[:, cache.start : cache.end] = value
        return scaled_dot_product(query, keys[:, : cache.end], values[:, : cache.end]).flatten(0, 1)

    def attend_text(self, query_THd: Tensor, key_value: Callable[[], KeyValue]) -> Tensor:
        """Attention to the row's own text; (T, H, d) -> (T, H, d)."""
        cache = self.cache
        cached = cache.text[self.layer]
        if cached is None:
            key_SHd, value_SHd = key_value()
            cached = cache.text[self.layer] = key_SHd[cache.text_index_RS], value_SHd[cache.text_index_RS]
        key, value = (kept[: cache.rows] for kept in cached)
        query = query_THd.unflatten(0, (cache.rows, -1))
        return scaled_dot_product(query, key, value, cache.text_mask_R11S[: cache.rows]).flatten(0, 1)
