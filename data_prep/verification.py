"""Reads every shard of a merged data set back and compares it with everything that is known of it.

W text width.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load
from streaming.base.format.mds.reader import MDSReader
from streaming.base.hashing import get_hash
from tqdm import tqdm

from data_prep.assembly import split_of
from data_prep.job import REJECTS_FILE, JobDescription, manifest_name, read_job, read_manifest, stored_config
from data_prep.merging import INDEX_FILE, read_merged_metadata
from data_prep.partition import Partition
from star_dist.config import PrepConfig, StorageSection
from star_dist.data.schema import (
    EMPTY_CAPTION_FILE,
    FEATURE_DTYPE,
    METADATA_FILE,
    SHARD_HASH,
    DatasetMetadata,
    columns,
    content_hash,
    decode_captions,
    decode_tokens,
)
from star_dist.errors import UserError
from star_dist.object_store import ObjectStore, open_store
from star_dist.scales import ScaleSchedule

DOWNLOADS_PREFIX = "star-dist-verify-"
PROBLEMS_AT_MOST = 20  # that one shard reports: a shard of another format has as many as samples
KEY_DIGEST_BYTES = 8


@dataclass
class SplitReport:
    """shards, samples, bytes: as read. captions: samples that have each named caption. tokens: least and largest."""

    shards: int = 0
    samples: int = 0
    bytes: int = 0
    captions: dict[str, int] = field(default_factory=dict)
    tokens: tuple[int, int] | None = None


@dataclass
class DatasetReport:
    """One data set; it is whole where `problems` is empty."""

    place: str
    resolution: int
    splits: dict[str, SplitReport] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.place}: {self.resolution} pixels, {'damaged' if self.problems else 'whole'}"]
        for name, split in self.splits.items():
            captions = ", ".join(f"{caption}: {count}" for caption, count in split.captions.items())
            tokens = "none" if split.tokens is None else f"{split.tokens[0]} to {split.tokens[1]}"
            lines.append(
                f"  {name}: {split.samples} samples in {split.shards} shards, {split.bytes / 1e6:.1f} MB; captions "
                f"{captions or 'none'}; tokens {tokens}"
            )
        lines += [f"  problem: {problem}" for problem in self.problems]
        return "\n".join(lines)


@dataclass
class _Shard:
    """What reading one shard found; key_digests: KEY_DIGEST_BYTES of every key."""

    samples: int = 0
    bytes: int = 0
    captions: Counter[str] = field(default_factory=Counter)
    tokens: tuple[int, int] | None = None
    key_digests: bytes = b""
    problems: list[str] = field(default_factory=list)


def verify(output: str, storage: StorageSection | None = None, workers: int = 1) -> list[DatasetReport]:
    """Reads every data set at an output, shards on `workers` processes; one report per resolution.

    Raises:
        UserError: there is no merged data set, or its store cannot be read.
    """
    storage = storage or StorageSection()
    store = open_store(output, endpoint=storage.endpoint, region=storage.region)
    job = read_job(store)
    if job is None:
        raise UserError(f"no data set of a tokenization job at {output}; give the job's output, not one of its folders")
    config = stored_config(PrepConfig, job.config, store.url)
    reports = []
    rejects_problem = _rejects_problem(store, job)
    for section in config.all_resolutions:
        folder = config.folder_of(section.resolution)
        metadata = read_merged_metadata(store, folder)
        report = _verify_dataset(store, folder, metadata, config.validation_fraction, workers)
        if rejects_problem is not None:  # one file for all resolutions
            report.problems.append(rejects_problem)
        reports.append(report)
    return reports


def _verify_dataset(
    store: ObjectStore, folder: str, metadata: DatasetMetadata, validation_fraction: float, workers: int
) -> DatasetReport:
    report = DatasetReport(f"{store.url}/{folder}".rstrip("/"), metadata.resolution)
    indices: dict[str, bytes] = {}
    for split in metadata.splits:
        try:
            indices[split] = store.read(f"{folder}{split}/{INDEX_FILE}")
        except FileNotFoundError:
            report.problems.append(f"{split}/{INDEX_FILE} is missing")
    if len(indices) == len(metadata.splits) and content_hash(indices) != metadata.content_hash:
        report.problems.append(
            f"the indices have hash {content_hash(indices)}, {METADATA_FILE} says {metadata.content_hash}"
        )
    digests = array("Q")
    for split, index in indices.items():
        try:
            shards = json.loads(index)["shards"]
        except (ValueError, KeyError, TypeError):
            report.problems.append(f"{split}/{INDEX_FILE} is damaged")
            continue
        report.splits[split] = total = SplitReport(shards=len(shards))
        read = partial(_read_shard, store, f"{folder}{split}", split, metadata, validation_fraction)
        captions: Counter[str] = Counter()
        bar = tqdm(total=sum(shard["samples"] for shard in shards), unit="sample", desc=f"verify {folder}{split}")
        with bar:
            for found in _on_processes(read, shards, workers):
                total.samples += found.samples
                total.bytes += found.bytes
                captions.update(found.captions)
                if found.tokens is not None:
                    least, largest = total.tokens or found.tokens
                    total.tokens = min(least, found.tokens[0]), max(largest, found.tokens[1])
                digests.frombytes(found.key_digests)
                report.problems += found.problems
                bar.update(found.samples)
        total.captions = {name: captions[name] for name in metadata.captions}
        if total.samples != metadata.splits[split]:
            report.problems.append(
                f"split {split} has {total.samples} samples, {METADATA_FILE} says {metadata.splits[split]}"
            )
    for name, count in metadata.captions.items():
        found_count = sum(split.captions.get(name, 0) for split in report.splits.values())
        if found_count != count:
            report.problems.append(f"{found_count} samples have caption {name!r}, {METADATA_FILE} says {count}")
    repeated = len(digests) - len(np.unique(np.frombuffer(digests, np.uint64)))
    if repeated:
        report.problems.append(f"{repeated} keys come more than once")
    if metadata.text_features is not None:
        problem = _empty_caption_problem(store, f"{folder}{EMPTY_CAPTION_FILE}", metadata.text_features.width)
        if problem is not None:
            report.problems.append(problem)
    return report


def _rejects_problem(store: ObjectStore, job: JobDescription) -> str | None:
    """Compares rejects.jsonl with the manifests of all partitions, as far as nobody has removed these."""
    with tempfile.TemporaryDirectory(prefix=DOWNLOADS_PREFIX) as folder:
        path = Path(folder) / REJECTS_FILE  # can be too large for memory
        try:
            store.download(REJECTS_FILE, path)
        except FileNotFoundError:
            return f"{REJECTS_FILE} is missing"
        with path.open("rb") as file:
            lines = sum(1 for _ in file)
    manifests = [read_manifest(store, manifest_name(Partition(i, job.partitions))) for i in range(job.partitions)]
    if None in manifests:
        return None
    rejected = sum(sum(manifest.rejected.values()) for manifest in manifests)
    return None if lines == rejected else f"{REJECTS_FILE} has {lines} lines, the manifests say {rejected}"


def _empty_caption_problem(store: ObjectStore, name: str, width: int) -> str | None:
    try:
        tensors = load(store.read(name))
    except FileNotFoundError:
        return f"{name} is missing"
    except SafetensorError as error:
        return f"{name} is damaged ({error})"
    # safetensors gives tensors in any order; the message is always the same.
    shapes = {part: tuple(tensor.shape) for part, tensor in sorted(tensors.items())}
    tokens = len(tensors.get("text_hidden", ()))
    if not tokens or shapes != {"text_hidden": (tokens, width), "text_pooled": (width,)}:
        return f"{name} holds {shapes}, expected text_hidden (tokens, {width}) and text_pooled ({width},)"
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        return f"{name} has values that are not finite"
    return None


def _on_processes(read: partial[_Shard], shards: list[dict[str, Any]], workers: int) -> Iterator[_Shard]:
    """Reads shards in their order."""
    if workers == 1:
        yield from map(read, shards)
        return
    context = multiprocessing.get_context("forkserver")  # imports torch once, not once a worker
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from pool.map(read, shards)


def _read_shard(
    store: ObjectStore,
    split_folder: str,
    split: str,
    metadata: DatasetMetadata,
    validation_fraction: float,
    shard: dict[str, Any],
) -> _Shard:
    """Everything that one shard can be wrong in."""
    raw = shard["raw_data"]
    name = f"{split_folder}/{raw['basename']}"
    found = _Shard()
    with tempfile.TemporaryDirectory(prefix=DOWNLOADS_PREFIX) as folder:
        path = Path(folder) / raw["basename"]
        try:
            store.download(name, path)
        except FileNotFoundError:
            found.problems.append(f"{name} is missing")
            return found
        data = path.read_bytes()
        found.bytes = len(data)
        if len(data) != raw["bytes"]:
            found.problems.append(f"{name} has {len(data)} bytes, its index says {raw['bytes']}")
        elif (digest := get_hash(SHARD_HASH, data)) != raw["hashes"].get(SHARD_HASH):
            found.problems.append(f"{name} has hash {digest}, its index says {raw['hashes'].get(SHARD_HASH)}")
        expected = columns(metadata.captions, metadata.text_features is not None)
        if dict(zip(shard["column_names"], shard["column_encodings"])) != expected:
            found.problems.append(f"{name} has columns {shard['column_names']}, expected {sorted(expected)}")
        if found.problems:
            return found  # nothing in it can be trusted
        reader = MDSReader.from_json(folder, None, shard)
        for i in range(len(reader)):
            try:
                problem = _check_sample(reader[i], metadata, found)
            except Exception as error:  # whatever decoding raises for bytes that are no sample
                problem = f"cannot be decoded ({type(error).__name__})"
            if problem is None and split != split_of(reader[i]["key"], validation_fraction):
                problem = f"with key {reader[i]['key']!r} belongs to another split"
            if problem is not None:
                found.problems.append(f"{name}, sample {i} {problem}")
                if len(found.problems) == PROBLEMS_AT_MOST:
                    found.problems.append(f"{name}: further problems are left out")
                    break
            found.samples += 1
    return found


def _check_sample(sample: Mapping[str, Any], metadata: DatasetMetadata, found: _Shard) -> str | None:
    """What is wrong with a sample; adds it to what was found of its shard."""
    found.key_digests += hashlib.blake2b(sample["key"].encode(), digest_size=KEY_DIGEST_BYTES).digest()
    tokens = decode_tokens(sample, metadata)
    num_tokens = ScaleSchedule(metadata.scales).num_tokens
    if len(tokens) != num_tokens:
        return f"has {len(tokens)} tokens, scales {list(metadata.scales)} have {num_tokens}"
    least, largest = int(tokens.min()), int(tokens.max())
    if largest >= metadata.vocab_size:
        return f"has token {largest}, the codebook has {metadata.vocab_size}"
    found.tokens = (
        (least, largest) if found.tokens is None else (min(least, found.tokens[0]), max(largest, found.tokens[1]))
    )
    captions = decode_captions(sample, metadata)
    found.captions.update(captions.keys())
    first = next(iter(metadata.captions))
    if first not in captions:
        return f"has no caption {first!r}"
    if metadata.text_features is None:
        return None
    for name in captions:
        for part, several in (("hidden", True), ("pooled", False)):
            values = np.frombuffer(sample[f"text_{part}_{name}"], dtype=FEATURE_DTYPE)
            width = metadata.text_features.width
            if not len(values) or len(values) % width or (len(values) != width and not several):
                return f"has {len(values)} values of text_{part}_{name}, the width is {width}"
            if not np.isfinite(values).all():
                return f"has values of text_{part}_{name} that are not finite"
    return None
