"""Floating-point operations of the transformer, counted as 2 per multiply-add of its matrix products. Imports no torch.

Attention counts visible pairs only: a kernel that computes masked pairs too does work that nobody asked for.
"""

from __future__ import annotations

from star_dist.model.config import StarConfig
from star_dist.scales import ScaleSchedule

# The backward pass repeats every product twice, for the gradient of its weights and of its inputs. The inputs of these
# parts, texts and latents, have none.
PARTS_WITHOUT_INPUT_GRADIENT = ("text_projections", "embedding")


def forward_flops(config: StarConfig, schedule: ScaleSchedule, text_tokens: int) -> dict[str, int]:
    """FLOPs of one picture's forward pass by part; `text_tokens` is the length of its caption."""
    tokens, width = schedule.num_tokens, config.width
    per_block = {
        "attention_projections": 2 * tokens * 4 * width**2,
        "attention": 4 * width * schedule.visible_pairs,
        "feed_forward": 2 * tokens * 2 * config.ffn_ratio * width**2,
    }
    if config.cross_attention:
        per_block["cross_attention_projections"] = 4 * tokens * width**2
        per_block["text_projections"] = 4 * text_tokens * config.text_width * width
        per_block["cross_attention"] = 4 * width * tokens * text_tokens
    parts = {name: config.depth * flops for name, flops in per_block.items()}
    parts["embedding"] = 2 * tokens * config.code_dim * width + 2 * config.text_width * width
    parts["head"] = 2 * tokens * width * config.vocab_size
    return parts


def training_flops(config: StarConfig, schedule: ScaleSchedule, text_tokens: int) -> int:
    """FLOPs of one picture's forward and backward pass; what is computed again (checkpointing, the head's logits) does
    not count.
    """
    parts = forward_flops(config, schedule, text_tokens)
    return sum((2 if part in PARTS_WITHOUT_INPUT_GRADIENT else 3) * flops for part, flops in parts.items())
