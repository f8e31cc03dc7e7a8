"""A grid that sets what a model draws beside what its data set shows, apart for held-out, seen and new captions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from streaming.base.format.mds.reader import MDSReader  # reads a local split without the machinery of a training job
from tqdm import tqdm

from star_dist.data.pictures import to_pil
from star_dist.data.schema import decode_captions, decode_tokens, read_metadata
from star_dist.errors import UserError
from star_dist.inference.grid import GridSection, draw_grid
from star_dist.inference.options import SamplingOptions
from star_dist.inference.pipeline import StarPipeline
from star_dist.tokenizer.io import tokenizer_hash

TITLES = {
    "val": "Held out: captions that training never saw",
    "train": "Seen in training",
    None: "New captions",
}
BATCH = 16


def draw_seen_grid(
    pipeline: StarPipeline,
    data: Path,
    captions: Sequence[str],
    options: SamplingOptions,
    count: int,
    columns: int,
    seed: int,
) -> Image.Image:
    """Draws `count` pictures per caption; a caption of the data set has that picture first in its cell.

    Raises:
        UserError: the data set was made with another tokenizer than the model's.
    """
    found = _find(data, captions, pipeline)
    jobs = [(caption, seed + i) for caption in captions for i in range(count)]
    drawn: list[Image.Image] = []
    with tqdm(total=len(jobs), unit="picture", desc="draw") as bar:
        for start in range(0, len(jobs), BATCH):
            prompts, seeds = zip(*jobs[start : start + BATCH])
            drawn += pipeline(prompts, seeds, options)
            bar.update(len(prompts))
    sections: dict[str | None, list] = {split: [] for split in TITLES}
    for i, caption in enumerate(captions):
        split, reference = found.get(caption, (None, None))
        pictures = drawn[i * count : (i + 1) * count]
        blank = Image.new("RGB", drawn[0].size, "white")
        sections[split].append(([blank if reference is None else reference, *pictures], caption))
    titled = [
        GridSection(f"{TITLES[split]} (left: the data, right: drawn from the text)", cells)
        for split, cells in sections.items()
        if cells
    ]
    return draw_grid(titled, columns)


def _find(data: Path, captions: Sequence[str], pipeline: StarPipeline) -> dict[str, tuple[str, Image.Image]]:
    """Which split each caption is in, and its picture through the tokenizer."""
    metadata = read_metadata(data)
    if metadata.tokenizer_hash != tokenizer_hash(pipeline.tokenizer):
        raise UserError(
            f"{data} has tokens of tokenizer {metadata.tokenizer_hash}, the model has "
            f"{tokenizer_hash(pipeline.tokenizer)}; give the data set that the model was trained on"
        )
    if metadata.scales != pipeline.schedule.sides:
        raise UserError(f"{data} has scales {list(metadata.scales)}, the model {list(pipeline.schedule.sides)}")
    wanted, found = set(captions), {}
    for split in metadata.splits:
        index = json.loads((data / split / "index.json").read_text())
        for shard in index["shards"]:
            reader = MDSReader.from_json(str(data), split, shard)
            for i in range(len(reader)):
                sample = reader[i]
                for caption in wanted.intersection(decode_captions(sample, metadata).values()):
                    tokens_BL = torch.from_numpy(decode_tokens(sample, metadata)[np.newaxis].astype(np.int64))
                    picture = pipeline.tokenizer.decode(
                        tokens_BL.to(pipeline.model.word_embed.weight.device), pipeline.schedule
                    )
                    found[caption] = split, to_pil(picture)[0]
    return found
