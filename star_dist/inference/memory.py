"""How many pictures can be drawn together: what one takes on the device against what is free there."""

from __future__ import annotations

from pathlib import Path

import torch

from star_dist.inference.pipeline import StarPipeline
from star_dist.model.size import FLOAT32_BYTES

USED_SHARE = 0.8  # of the free memory; the rest is left for fragments and for what others take
LOGITS_COPIES = 4  # a scale's logits as computed, guided, sorted and with their noise
BLOCK_WIDTHS = 12  # most that one block holds at once, in widths of a token: the feed-forward's 4 twice, and the rest
DECODER_MAPS = 4  # of the finest level, held at once by a residual block of the decoder

OWN_CGROUPS = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")
# By version: the tree's place, the limit, what is used, and the part of that which the kernel gives back first.
CGROUP_FILES = {
    1: ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("", "memory.max", "memory.current", "inactive_file"),
}


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
    """Memory that is free now, on the GPU or on this host, where a container or a job may have less than there is."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return min([psutil.virtual_memory().available, *_cgroup_rooms()])


def _cgroup_rooms() -> list[int]:
    """What each control group with a limit that this process is in leaves it; who takes more is killed."""
    rooms = []
    for line in OWN_CGROUPS.read_text().splitlines() if OWN_CGROUPS.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        tree, limit, usage, reclaimable = CGROUP_FILES[1 if controllers else 2]
        root = CGROUPS / tree
        group = root / path.lstrip("/")
        for folder in (group, *group.parents[: len(group.relative_to(root).parts)]):
            try:
                most, used = (int((folder / name).read_text()) for name in (limit, usage))
                statistics = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # "max" is no limit, and a container does not see the host's folders
                continue
            rooms.append(max(0, most - used + int(statistics.get(reclaimable, 0))))
    return rooms


def most_pictures(pipeline: StarPipeline) -> int:
    """How many pictures fit into the free memory at once."""
    return int(USED_SHARE * free_bytes(pipeline.device)) // drawing_bytes(pipeline)
