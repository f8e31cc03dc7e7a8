"""A grid that sets what a model draws beside what its data set shows, apart for held-out, seen and new captions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from streaming.base.format.mds.reader import MDSReader  # reads a local split without the machinery of a training job
from tqdm import tqdm

from star_dist.data.pictures import to_pil
from star_dist.data.schema import DatasetMetadata, decode_captions, decode_tokens, read_metadata
from star_dist.errors import UserError
from star_dist.inference.grid import GridSection, draw_grid, grid_size
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
    longest_side: int | None = None,
) -> Image.Image:
    """Draws `count` pictures per caption; a caption of the data set has a picture of it first in its cell.

    longest_side: in pixels, of what the grid is for; None for any.

    Raises:
        UserError: the data set was made with another tokenizer than the model's, a caption that it does not have is
            too long, or the grid would be too large, which is said before anything is drawn.
    """
    found = _find(data, captions, pipeline)
    pipeline.text_encoder.check_fit([caption for caption in captions if caption not in found])
    cells = Counter(found[caption][0] if caption in found else None for caption in captions)
    width, height = grid_size(list(cells.values()), count + 1, columns)
    if longest_side is not None and max(width, height) > longest_side:
        raise UserError(
            f"the grid would have {width} x {height} pixels, a side may have {longest_side}; give fewer captions, "
            f"other --columns, or an --out that ends in .png"
        )
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
    """Which split each caption is in, and its first picture there through the tokenizer.

    A caption of both splits is one of training's: it was seen, whatever picture of it was held out.
    """
    metadata = read_metadata(data)
    if metadata.tokenizer_hash != tokenizer_hash(pipeline.tokenizer):
        raise UserError(
            f"{data} has tokens of tokenizer {metadata.tokenizer_hash}, the model has "
            f"{tokenizer_hash(pipeline.tokenizer)}; give the data set that the model was trained on"
        )
    if metadata.scales != pipeline.schedule.sides:
        raise UserError(f"{data} has scales {list(metadata.scales)}, the model {list(pipeline.schedule.sides)}")
    wanted, found = set(captions), {}
    for split, sample in _samples(data, metadata):
        for caption in wanted.intersection(decode_captions(sample, metadata).values()):
            tokens_BL = torch.from_numpy(decode_tokens(sample, metadata)[np.newaxis].astype(np.int64))
            picture = pipeline.tokenizer.decode(tokens_BL.to(pipeline.device), pipeline.schedule)
            found[caption] = split, to_pil(picture)[0]
            wanted.remove(caption)
        if not wanted:
            break
    return found


def _samples(data: Path, metadata: DatasetMetadata) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every sample with its split, those of training first."""
    for split in sorted(metadata.splits, key=lambda split: split != "train"):
        index = json.loads((data / split / "index.json").read_text())
        for shard in index["shards"]:
            reader = MDSReader.from_json(str(data), split, shard)
            for i in range(len(reader)):
                yield split, reader[i]
