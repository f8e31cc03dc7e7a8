"""From the chunks of a complete journal to a partition's final files, and from there to the output."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save
from streaming import MDSWriter
from torch import Tensor
from tqdm import tqdm

from data_prep.job import PARTS_FOLDER, REJECTS_FILE, JobDescription, Manifest, StoredFile, splits_of, write_section
from data_prep.journal import Journal
from data_prep.partition import Partition
from star_dist.config import PrepConfig
from star_dist.data.schema import EMPTY_CAPTION_FILE, SHARD_HASH, columns
from star_dist.object_store import ObjectStore

HASH_RANGE = 2**32
CONTENT_DIGITS = 16


@dataclass(frozen=True)
class AssembledPartition:
    """files: where each file of the manifest lies on this machine."""

    manifest: Manifest
    files: dict[str, Path]


def split_of(key: str, validation_fraction: float) -> str:
    """The split a picture belongs to, from a hash of its key alone."""
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return "val" if int.from_bytes(digest, "little") < validation_fraction * HASH_RANGE else "train"


def assemble(
    journal: Journal,
    folder: Path,
    config: PrepConfig,
    partition: Partition,
    job: JobDescription,
    empty_caption: tuple[Tensor, Tensor] | None,
) -> AssembledPartition:
    """Writes a partition's shards, rejects and (with stored features) the empty caption's features into a folder.

    The bytes follow from the samples and the config alone, not from the chunks that the samples came in.
    """
    names, sections = job.dataset.caption_names, config.all_resolutions
    writers = {
        (section.resolution, split): MDSWriter(
            out=str(folder / config.folder_of(section.resolution) / split),
            columns=columns(names, empty_caption is not None),
            hashes=[SHARD_HASH],
            size_limit=config.shard_size_bytes,
        )
        for section in sections
        for split in splits_of(config)
    }
    kept: Counter[tuple[int, str]] = Counter()
    captions: dict[int, Counter[str]] = {section.resolution: Counter() for section in sections}
    total = journal.position.items - sum(sum(chunk.rejected.values()) for chunk in journal.chunks)
    for sample in tqdm(journal.samples(), total=total, unit="sample", desc="write shards", dynamic_ncols=True):
        split = split_of(sample["key"], config.validation_fraction)
        tokens = {section.resolution: sample.pop(f"tokens_{section.resolution}") for section in sections}
        present = [name for name in names if sample[f"caption_{name}"]]
        for resolution, stored in tokens.items():
            if stored:
                writers[resolution, split].write(sample | {"tokens": stored})
                kept[resolution, split] += 1
                captions[resolution].update(present)
    for writer in writers.values():
        writer.finish()
    own = folder / PARTS_FOLDER
    own.mkdir()
    journal.copy_rejects(own / REJECTS_FILE)
    if empty_caption is not None:
        hidden, pooled = (part.contiguous().cpu() for part in empty_caption)
        (own / EMPTY_CAPTION_FILE).write_bytes(save({"text_hidden": hidden, "text_pooled": pooled}))

    content_folder, stored_files, local_files = _name_by_content(folder, partition)
    rejected, too_small = Counter(), Counter()
    for chunk in journal.chunks:
        rejected.update(chunk.rejected)
        too_small.update(chunk.too_small)
    manifest = Manifest(
        partition=partition.index,
        partitions=partition.count,
        job_hash=job.hash,
        folder=content_folder,
        read=journal.position.items,
        rejected=dict(sorted(rejected.items())),
        samples={str(side): {split: kept[side, split] for split in splits_of(config)} for side in captions},
        captions={str(side): {name: counts[name] for name in names} for side, counts in captions.items()},
        too_small=dict(sorted(too_small.items())),
        files=stored_files,
    )
    return AssembledPartition(manifest, local_files)


def upload(partition: AssembledPartition, store: ObjectStore, manifest_name: str) -> None:
    """Copies the files that are not there yet, then writes the manifest.

    A file of the right name and size is the right one: the name holds the hash of all content, and objects appear
    whole.
    """
    files = partition.manifest.files
    parents = {f"{name.rpartition('/')[0]}/" for name in files}
    present = {entry.name: entry.num_bytes for parent in parents for entry in store.list(parent)}
    total = sum(file.bytes for file in files.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="upload", dynamic_ncols=True) as bar:
        for name, path in partition.files.items():
            if present.get(name) != files[name].bytes:
                store.upload(path, name)
            bar.update(files[name].bytes)
    write_section(store, manifest_name, partition.manifest)


def _name_by_content(folder: Path, partition: Partition) -> tuple[str, dict[str, StoredFile], dict[str, Path]]:
    """The folder that all files go to beside others of their kind, and the files by their final names."""
    stored: dict[str, StoredFile] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        stored[path.relative_to(folder).as_posix()] = StoredFile(bytes=path.stat().st_size, sha256=digest)
    content = "".join(f"{name} {file.sha256}\n" for name, file in stored.items())
    content_folder = f"{partition.name}.{hashlib.sha256(content.encode()).hexdigest()[:CONTENT_DIGITS]}"
    final_names = {}
    for name in stored:
        parent, _, basename = name.rpartition("/")
        final_names[name] = f"{parent}/{content_folder}/{basename}"
    return (
        content_folder,
        {final: stored[name] for name, final in final_names.items()},
        {final: folder / name for name, final in final_names.items()},
    )
