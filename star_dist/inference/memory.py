"""How many pictures can be drawn together: what one takes on the device against what is free there."""

from __future__ import annotations

import torch

from star_dist.inference.pipeline import StarPipeline

USED_SHARE = 0.8  # of the free memory; the rest is left for fragments and for what others take
FLOAT32_BYTES = 4
LOGITS_COPIES = 4  # a scale's logits as computed, guided, sorted and with their noise
BLOCK_WIDTHS = 12  # most that one block holds at once, in widths of a token: the feed-forward's 4 twice, and the rest
DECODER_MAPS = 4  # of the finest level, held at once by a residual block of the decoder


def drawing_bytes(pipeline: StarPipeline) -> int:
    """What one picture more takes while it is drawn with guidance, beyond the weights: an estimate from the shapes."""
    config, schedule = pipeline.model.config, pipeline.schedule
    element = pipeline.model.word_embed.weight.element_size()
    rows, largest = 2, max(schedule.lengths)
    text_tokens = pipeline.text_encoder.config.max_tokens
    cache = 2 * config.depth * config.width * (schedule.num_tokens + text_tokens) * element
    activations = BLOCK_WIDTHS * config.width * largest * element
    logits = LOGITS_COPIES * config.vocab_size * largest * FLOAT32_BYTES
    drawn = rows * (cache + activations + logits)
    pixels = DECODER_MAPS * pipeline.tokenizer.config.channels * pipeline.resolution**2 * FLOAT32_BYTES
    # On a GPU a few pictures are decoded at a time, whatever the batch (`tokenizer/pixels.py`).
    return drawn + (pixels if pipeline.device.type == "cpu" else 0)


def free_bytes(device: torch.device) -> int:
    """Memory that is free now, on the GPU or on this host."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def most_pictures(pipeline: StarPipeline) -> int:
    """How many pictures fit into the free memory at once."""
    return int(USED_SHARE * free_bytes(pipeline.device)) // drawing_bytes(pipeline)
