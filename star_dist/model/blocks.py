"""The transformer block of STAR: self-attention, cross-attention to the text, feed-forward, each behind a LayerNorm.

T image tokens of the batch, S text tokens, D width, H heads, d channels of a head. Parameter names are those of the
public checkpoints (tests/golden/star_official_layout.json).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from star_dist.model.attention import Constants, KeyValue, LayerContext
from star_dist.model.block_functions import PLAIN, BlockFunctions, layer_norm
from star_dist.model.config import StarConfig
from star_dist.model.rope import Rotary

MAX_QUERY_SCALE = 100.0


class NormalizedHeads(nn.Module):
    """What self- and cross-attention share: q and k of unit length per head, q times a learned factor per head."""

    def __init__(self, config: StarConfig, functions: BlockFunctions) -> None:
        super().__init__()
        self.functions = functions
        self.heads = config.heads
        self.scale_mul_1H11 = nn.Parameter(torch.empty(1, config.heads, 1, 1))
        self.q_bias = nn.Parameter(torch.empty(config.width))
        self.v_bias = nn.Parameter(torch.empty(config.width))
        self.proj = nn.Linear(config.width, config.width)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def split_parts(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """The heads of several projections that one product made; (…, parts * D) -> (…, H, d) each.

        Split head by head: were they split along channels, where their gradients meet, the compiler would not write
        those in the pass that computes them. Not unbound: in float32 it would then keep copies.
        """
        return x.unflatten(-1, (parts * self.heads, -1)).chunk(parts, dim=-2)

    def query_factor_H1(self) -> Tensor:
        """What queries of unit length are multiplied with; the softmax scale itself is 1."""
        return self.scale_mul_1H11.float().clamp(max=math.log(MAX_QUERY_SCALE)).exp().view(self.heads, 1)


class BiasedLinear(nn.Linear):
    """A linear layer whose bias is another module's parameter."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, self.weight, bias)


class SelfAttention(NormalizedHeads):
    def __init__(self, config: StarConfig, functions: BlockFunctions) -> None:
        super().__init__(config, functions)
        self.mat_qkv = BiasedLinear(config.width, 3 * config.width)

    def constants(self) -> Constants:
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]), self.query_factor_H1()

    def forward(self, x_TD: Tensor, *, rotary: Rotary | None, context: LayerContext) -> Tensor:
        bias, factor_H1 = context.image_constants(self.constants)
        query, key, value = self.split_parts(self.mat_qkv(x_TD, bias), 3)
        query = self.functions.rotate_and_normalize(query, rotary, factor_H1)
        key = self.functions.rotate_and_normalize(key, rotary)
        return self.proj(context.attend_image(query, key, value).flatten(-2))


class CrossAttention(NormalizedHeads):
    def __init__(self, config: StarConfig, functions: BlockFunctions) -> None:
        super().__init__(config, functions)
        self.mat_q = BiasedLinear(config.width, config.width)
        self.mat_kv = BiasedLinear(config.text_width, 2 * config.width)

    def constants(self) -> Constants:
        return self.q_bias, self.query_factor_H1()

    def text_key_value(self, text_SC: Tensor) -> KeyValue:
        """Keys and values of the text tokens, (S, H, d) each."""
        bias = torch.cat([torch.zeros_like(self.v_bias), self.v_bias])
        key, value = self.split_parts(self.mat_kv(text_SC, bias), 2)
        return self.functions.rotate_and_normalize(key, None), value

    def forward(self, x_TD: Tensor, text_SC: Tensor, *, context: LayerContext) -> Tensor:
        bias, factor_H1 = context.text_constants(self.constants)
        query = self.functions.rotate_and_normalize(self.split_heads(self.mat_q(x_TD, bias)), None, factor_H1)
        key_value: Callable[[], KeyValue] = lambda: self.text_key_value(text_SC)
        return self.proj(context.attend_text(query, key_value).flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, config: StarConfig, functions: BlockFunctions) -> None:
        super().__init__()
        self.functions = functions
        self.fc1 = nn.Linear(config.width, config.ffn_ratio * config.width)
        self.fc2 = nn.Linear(config.ffn_ratio * config.width, config.width)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.fc2(self.functions.gelu(self.fc1(x_TD)))


class Block(nn.Module):
    def __init__(self, config: StarConfig, functions: BlockFunctions = PLAIN) -> None:
        super().__init__()
        self.functions = functions
        self.attn = SelfAttention(config, functions)
        self.cross_attn = CrossAttention(config, functions) if config.cross_attention else None
        self.ffn = FeedForward(config, functions)

    def forward(self, x_TD: Tensor, text_SC: Tensor, *, rotary: Rotary | None, context: LayerContext) -> Tensor:
        add_and_norm = self.functions.add_and_norm
        x_TD, normed_TD = add_and_norm(x_TD, self.attn(layer_norm(x_TD), rotary=rotary, context=context))
        if self.cross_attn is not None:
            x_TD, normed_TD = add_and_norm(x_TD, self.cross_attn(normed_TD, text_SC, context=context))
        return x_TD + self.ffn(normed_TD)
