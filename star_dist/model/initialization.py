"""Initial weights as a function of (seed, parameter name) alone: the same for any number of ranks and any ZeRO stage.

| parameter                                   | initial value                                                     |
|---------------------------------------------|-------------------------------------------------------------------|
| projections, embeddings, `pos_start`        | normal, std 1 / sqrt(3 width), cut at 2 std (VAR)                 |
| `proj`, `fc2`: what ends a residual branch  | the same over sqrt(number of residual branches)                   |
| `head_logits.weight`                        | the same x 0.02, so that training starts at the uniform loss      |
| `scale_mul_1H11`                            | log 4                                                             |
| biases                                      | 0                                                                 |
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from star_dist.model.config import StarConfig
from star_dist.model.star import STAR

INITIAL_QUERY_SCALE = 4.0
HEAD_GAIN = 0.02


@torch.no_grad()
def initialize_weights(model: STAR, seed: int) -> None:
    """Fills every parameter of a whole model in place (`train/engine.py` does the same for a partitioned one)."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, parameter.shape, model.config, seed))


def initial_value(name: str, shape: torch.Size, config: StarConfig, seed: int) -> Tensor:
    """Initial value of one parameter, float32 on the CPU (see the table above)."""
    if name.endswith("scale_mul_1H11"):
        return torch.full(shape, math.log(INITIAL_QUERY_SCALE))
    if name.endswith("bias"):
        return torch.zeros(shape)
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    std = math.sqrt(1 / (3 * config.width))
    if name.endswith(("proj.weight", "fc2.weight")) and name.startswith("blocks."):
        std /= math.sqrt((3 if config.cross_attention else 2) * config.depth)
    if name == "head_logits.weight":
        std *= HEAD_GAIN
    value = torch.empty(shape)
    return nn.init.trunc_normal_(value, std=std, a=-2 * std, b=2 * std, generator=generator)
