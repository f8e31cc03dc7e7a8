"""Parameters and activation memory of the transformer, by formula. Imports no torch.

T image tokens of a micro-batch, D width, V codebook size.
"""

from __future__ import annotations

from star_dist.model.config import StarConfig
from star_dist.scales import ScaleSchedule

FLOAT32_BYTES = 4
LOSS_CHUNK_TOKENS = 2048  # that chunked_loss.py works on at a time

# What one block keeps for its backward pass, in tensors of T x D of the activations' precision, checked against
# measured peaks. Self-attention: LayerNorm's input and output, 3 of queries, keys and values, 2 of them normalised,
# output by scale and joined. Cross-attention: LayerNorm's input and output, queries, normalised, output. Feed-forward:
# LayerNorm's input and output, 4 + 4 inside.
KEPT_PER_BLOCK = 9 + 5 + 10
KEPT_SELECTIVE = 14  # the block's input, 3 of queries, keys and values, 2 + 3 of attention, 4 + 1 of feed-forward
BACKWARD_PER_BLOCK = 8  # gradients that live together while a block runs backwards: the feed-forward's 4 + 4


def parameter_count(config: StarConfig) -> int:
    """Trained parameters of a `STAR`."""
    width, text = config.width, config.text_width
    attention_shared = config.heads + 2 * width + width * width + width  # factors, biases, output projection
    block = attention_shared + 3 * width * width
    if config.cross_attention:
        block += attention_shared + width * width + 2 * width * text
    block += 2 * config.ffn_ratio * width * width + config.ffn_ratio * width + width
    embedding = text * width + width + width + config.code_dim * width + width + len(config.scales) * width
    if config.positions == "learned":
        embedding += ScaleSchedule(config.scales).num_tokens * width
    return config.depth * block + embedding + width * config.vocab_size + config.vocab_size


def activation_bytes(config: StarConfig, tokens: int, bytes_per_value: int, checkpointing: str) -> dict[str, int]:
    """Peak of what a forward and backward pass holds besides weights and gradients, by part.

    tokens: T. bytes_per_value: of the activations, 2 in bf16. checkpointing: none, selective or full. Attention is a
    kernel that keeps no scores.
    """
    unit = tokens * config.width
    block = KEPT_PER_BLOCK * unit * bytes_per_value
    kept = {"none": block, "selective": KEPT_SELECTIVE * unit * bytes_per_value, "full": unit * bytes_per_value}
    chunk = min(tokens, LOSS_CHUNK_TOKENS)
    head_weights = config.vocab_size * config.width * FLOAT32_BYTES  # their gradient, before it is stored
    head = 3 * unit * FLOAT32_BYTES + 2 * chunk * config.vocab_size * FLOAT32_BYTES + head_weights
    running_block = BACKWARD_PER_BLOCK * unit * bytes_per_value
    if checkpointing != "none":
        running_block += block - kept[checkpointing]
    # Head and block are never backwards at the same time.
    return {"kept for the backward pass": config.depth * kept[checkpointing], "head or block": max(head, running_block)}
