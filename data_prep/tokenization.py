"""The tokenization job: source -> decode -> crop -> VQ-VAE -> MDS shards."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import save_file
from streaming import MDSWriter
from torch import Tensor
from tqdm import tqdm

from data_prep.sources import SourceItem, open_source
from star_dist.config import PrepConfig, dump_config
from star_dist.data.pictures import UnreadablePicture, crop_and_resize, decode_picture, normalize, to_tensor
from star_dist.data.schema import (
    EMPTY_CAPTION_FILE,
    METADATA_FILE,
    SHARD_HASH,
    DatasetMetadata,
    columns,
    content_hash,
    encode_sample,
    read_metadata,
    token_dtype,
    write_metadata,
)
from star_dist.errors import UserError
from star_dist.files import read_json_object
from star_dist.run_folder import differences
from star_dist.text import TextEncoder
from star_dist.tokenizer.io import load_tokenizer, tokenizer_hash

REJECTS_FILE = "rejects.jsonl"
JOB_FILE = "job.json"
HASH_RANGE = 2**32


class Rejected(ValueError):
    """A captioned picture that the data set leaves out; the message is the reason that it is counted under."""


@dataclass(frozen=True)
class Prepared:
    """A picture ready for the tokenizer: (3, side, side) uint8, or the reason why there is none."""

    item: SourceItem
    picture: Tensor | None
    reason: str | None = None


def tokenize(config: PrepConfig, device_name: str | None = None) -> DatasetMetadata:
    """Runs the job and returns what it wrote; shows progress, and prints a summary at the end.

    Raises:
        UserError: a source, tokenizer or output that cannot be used, or no usable picture at all.
    """
    output = Path(config.output)
    device = torch.device(device_name or ("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer = load_tokenizer(Path(config.tokenizer)).to(device)
    job = json.loads(dump_config(config)) | {"tokenizer_hash": tokenizer_hash(tokenizer)}
    if (output / METADATA_FILE).is_file():
        return _reuse(output, job)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output {output} exists and is no data set; choose another output")
    downsampling = tokenizer.config.downsampling
    if config.schedule.resolution(downsampling) != config.resolution:
        raise UserError(
            f"resolution {config.resolution} is not the last of scales ({config.schedule.latent_side}) x the "
            f"tokenizer's downsampling ({downsampling}); change one of them"
        )
    source = open_source(config.source)
    text_encoder = TextEncoder(config.text_features, device) if config.text_features else None

    # Everything is written beside the final place and moved there when it is complete.
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    dtype = token_dtype(tokenizer.config.vocab_size)
    splits = ("train", "val") if config.validation_fraction else ("train",)
    writers = {
        split: MDSWriter(
            out=str(partial / split),
            columns=columns(text_encoder is not None),
            hashes=[SHARD_HASH],
            size_limit=config.shard_size_bytes,
        )
        for split in splits
    }
    kept, rejected = Counter(), Counter()
    started = time.perf_counter()
    with (partial / REJECTS_FILE).open("w") as rejects, tqdm(total=len(source), unit="picture", desc="tokenize") as bar:
        for group in _batches(_prepare_all(source, config), config.batch):
            for prepared in group:
                if prepared.reason is not None:
                    rejected[prepared.reason] += 1
                    rejects.write(json.dumps({"key": prepared.item.key, "reason": prepared.reason}) + "\n")
            good = [prepared for prepared in group if prepared.picture is not None]
            bar.update(len(group))
            if not good:
                continue
            pictures = normalize(torch.stack([prepared.picture for prepared in good]).to(device))
            tokens_BL = tokenizer.encode(pictures, config.schedule).cpu().numpy()
            features = text_encoder([prepared.item.caption for prepared in good]) if text_encoder else None
            for i, (prepared, tokens_L) in enumerate(zip(good, tokens_BL)):
                stored = None if features is None else tuple(part.float().cpu().numpy() for part in features[i])
                split = split_of(prepared.item.key, config.validation_fraction)
                writers[split].write(encode_sample(prepared.item.key, prepared.item.caption, tokens_L, dtype, stored))
                kept[split] += 1
    for writer in writers.values():
        writer.finish()
    if not kept["train"]:
        raise UserError(f"the source gave no usable picture for training; rejected: {dict(rejected) or 'none'}")
    if text_encoder is not None:
        hidden, pooled = text_encoder([""])[0]
        empty = {"text_hidden": hidden.contiguous().cpu(), "text_pooled": pooled.contiguous().cpu()}
        save_file(empty, partial / EMPTY_CAPTION_FILE)
    metadata = DatasetMetadata(
        tokenizer_hash=job["tokenizer_hash"],
        vocab_size=tokenizer.config.vocab_size,
        code_dim=tokenizer.config.code_dim,
        downsampling=downsampling,
        resolution=config.resolution,
        scales=config.scales,
        token_dtype=dtype.str,
        text_features=config.text_features,
        splits={split: kept[split] for split in splits},
        content_hash=content_hash(partial, splits),
        rejected=dict(rejected),
        attribution=config.attribution,
    )
    (partial / JOB_FILE).write_text(json.dumps(job, indent=2) + "\n")
    write_metadata(partial, metadata)
    os.replace(partial, output)  # takes the place of an empty folder too
    rate = sum(kept.values()) / (time.perf_counter() - started)
    print(f"{output}: kept {dict(kept)}, rejected {dict(rejected) or 'none'}, {rate:.0f} pictures/s")
    return metadata


def split_of(key: str, validation_fraction: float) -> str:
    """The split a picture belongs to, from a hash of its key alone."""
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return "val" if int.from_bytes(digest, "little") < validation_fraction * HASH_RANGE else "train"


def prepare(item: SourceItem, config: PrepConfig) -> Prepared:
    """Reads, checks, crops and resizes one picture; never raises for what is wrong with the picture."""
    try:
        return Prepared(item, _picture(item, config))
    except (UnreadablePicture, Rejected) as error:
        return Prepared(item, None, str(error))


def _picture(item: SourceItem, config: PrepConfig) -> Tensor:
    if not item.caption.strip():
        raise Rejected("empty caption")
    if len(item.caption) > config.max_caption_chars:
        raise Rejected("caption too long")
    try:
        data = item.read()
    except OSError as error:
        raise Rejected(f"unreadable file: {error.strerror}") from None
    image = decode_picture(data)
    if min(image.size) < config.min_side:
        raise Rejected("too small")
    return to_tensor(crop_and_resize(image, config.resolution))


def _prepare_all(source, config: PrepConfig) -> Iterator[Prepared]:
    """Prepares pictures on threads a few batches ahead, in the source's order."""
    with ThreadPoolExecutor() as pool:
        items = iter(source)
        ahead = [pool.submit(prepare, item, config) for item in islice(items, 4 * config.batch)]
        while ahead:
            finished, ahead = ahead[: config.batch], ahead[config.batch :]
            yield from (future.result() for future in finished)
            ahead += [pool.submit(prepare, item, config) for item in islice(items, len(finished))]


def _batches(prepared: Iterator[Prepared], size: int) -> Iterator[list[Prepared]]:
    while group := list(islice(prepared, size)):
        yield group


def _reuse(output: Path, job: dict) -> DatasetMetadata:
    stored = read_json_object(output / JOB_FILE, f"{output} holds a data set but no {JOB_FILE}; change output")
    for key, before, now in differences(stored, job):
        raise UserError(
            f"{output} holds a data set made with {key} = {json.dumps(before)}, this job has {json.dumps(now)}; "
            f"change output, or remove the folder"
        )
    metadata = read_metadata(output)
    print(f"{output} is complete, nothing to do: {dict(metadata.splits)}")
    return metadata
