"""Makes one data set of complete partitions: indices are merged, shards stay where their partition put them."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.job import (
    JOB_FILE,
    PARTS_FOLDER,
    REJECTS_FILE,
    JobDescription,
    Manifest,
    manifest_name,
    read_job,
    read_manifest,
    splits_of,
    stored_config,
)
from data_prep.partition import Partition
from star_dist.config import PrepConfig, ResolutionSection, StorageSection
from star_dist.data.schema import EMPTY_CAPTION_FILE, METADATA_FILE, DatasetMetadata, content_hash, parse_metadata
from star_dist.errors import UserError
from star_dist.object_store import ObjectStore, open_store

INDEX_FILE = "index.json"
INDEX_VERSION = 2  # of mosaicml-streaming's index.json
NAMED_AT_MOST = 5


def merge(output: str, storage: StorageSection | None = None) -> dict[int, DatasetMetadata]:
    """Merges the partitions at an output into one data set per resolution; returns their metadata by resolution.

    Doing it again gives the same bytes. Until the end of the first time there is no dataset.json, so no trainer takes
    half a data set.

    Raises:
        UserError: no job there, a partition that is missing or of another job, or a file that is missing or of another
            size; also, when all other resolutions are merged, one that has no sample for training.
    """
    storage = storage or StorageSection()
    store = open_store(output, endpoint=storage.endpoint, region=storage.region)
    job = read_job(store)
    if job is None:
        raise UserError(f"no tokenization job at {output}: it has no {JOB_FILE} (data_prep.tokenize writes it)")
    config = stored_config(PrepConfig, job.config, store.url)
    manifests = _complete_partitions(store, job)
    _check_files(store, manifests)
    sides = [section.resolution for section in config.all_resolutions]
    empty = [side for side in sides if not any(manifest.samples[str(side)]["train"] for manifest in manifests)]
    sections = [section for section in config.all_resolutions if section.resolution not in empty]
    found = {
        section.resolution: _merge_resolution(store, job, config, section, manifests)
        for section in tqdm(sections, desc="merge", unit="resolution", disable=job.partitions == 1)
    }
    _merge_rejects(store, manifests)
    for section in sections:
        folder = config.folder_of(section.resolution)
        _copy_empty_caption(store, manifests[0], folder)
        text = found[section.resolution].model_dump_json(indent=2) + "\n"
        store.write(f"{folder}{METADATA_FILE}", text.encode())
        counts = ", ".join(f"{split}: {count}" for split, count in found[section.resolution].splits.items())
        print(f"{output}/{folder}: {section.resolution} pixels, {counts}, from {job.partitions} partition(s)")
    store.discard_unfinished()
    if empty:
        reasons = "; ".join(f"{side} pixels (rejected: {_rejected(manifests, side) or 'none'})" for side in empty)
        others = f"; complete are {', '.join(map(str, found))} pixels" if found else ""
        raise UserError(
            f"the source gave no usable picture for training at {reasons}; change source or the option that left "
            f"them out, and output{others}"
        )
    return found


def read_merged_metadata(store: ObjectStore, folder: str = "") -> DatasetMetadata:
    """`dataset.json` of a merged data set in any store.

    Raises:
        UserError: there is none, it is damaged, or of another schema version.
    """
    place = f"{store.url}/{folder}{METADATA_FILE}"
    try:
        text = store.read(f"{folder}{METADATA_FILE}")
    except FileNotFoundError:
        raise UserError(
            f"no data set at {place}: its partitions are not merged yet (python -m data_prep.merge), or held no usable "
            f"picture, as the merge then said"
        ) from None
    return parse_metadata(text, place)


def _complete_partitions(store: ObjectStore, job: JobDescription) -> list[Manifest]:
    """Manifests of all partitions of the job, in order."""
    expected = {manifest_name(Partition(i, job.partitions)): i for i in range(job.partitions)}
    entries = (entry.name for entry in store.list(f"{PARTS_FOLDER}/"))
    present = {name for name in entries if name.count("/") == 1 and name.endswith(".json")}
    if foreign := sorted(present - expected.keys()):
        raise UserError(
            f"{store.url} holds foreign partitions: {_some(foreign)}; its job has {job.partitions} partitions; remove "
            f"what does not belong there"
        )
    if missing := [f"{i}/{job.partitions}" for name, i in expected.items() if name not in present]:
        raise UserError(
            f"{len(missing)} of {job.partitions} partitions are missing at {store.url}: {_some(missing)}; run "
            f"python -m data_prep.tokenize with --partition {missing[0]}" + (" and so on" if missing[1:] else "")
        )
    manifests = []
    for name, i in tqdm(expected.items(), desc="read manifests", unit="partition", disable=len(expected) == 1):
        manifest = read_manifest(store, name)
        if manifest.job_hash != job.hash or (manifest.partition, manifest.partitions) != (i, job.partitions):
            raise UserError(
                f"{store.url}/{name} is of another job ({manifest.job_hash}, partition {manifest.partition}/"
                f"{manifest.partitions}; this one is {job.hash}); remove it and run --partition {i}/{job.partitions}"
            )
        manifests.append(manifest)
    return manifests


def _check_files(store: ObjectStore, manifests: Sequence[Manifest]) -> None:
    """Compares what every manifest promises with what is there, by name and size."""
    present = {entry.name: entry.num_bytes for entry in store.list()}
    for manifest in manifests:
        for name, file in manifest.files.items():
            if present.get(name) != file.bytes:
                found = f"has {present[name]} bytes" if name in present else "is missing"
                raise UserError(
                    f"{store.url}/{name} {found}, its manifest says {file.bytes}; remove "
                    f"{manifest_name(Partition(manifest.partition, manifest.partitions))} and run --partition "
                    f"{manifest.partition}/{manifest.partitions} again"
                )


def _merge_resolution(
    store: ObjectStore,
    job: JobDescription,
    config: PrepConfig,
    section: ResolutionSection,
    manifests: Sequence[Manifest],
) -> DatasetMetadata:
    """Writes the index of every split and returns what dataset.json will hold."""
    folder, side = config.folder_of(section.resolution), str(section.resolution)
    captions = dict.fromkeys(job.dataset.caption_names, 0)
    splits = dict.fromkeys(splits_of(config), 0)
    for manifest in manifests:
        for name in captions:
            captions[name] += manifest.captions[side][name]
        for split in splits:
            splits[split] += manifest.samples[side][split]
    indices = {split: _merged_index(store, folder + split, manifests) for split in splits}
    for split, index in indices.items():
        store.write(f"{folder}{split}/{INDEX_FILE}", index)
    return DatasetMetadata(
        **{name: getattr(job.dataset, name) for name in ("tokenizer_hash", "vocab_size", "code_dim", "downsampling")},
        resolution=section.resolution,
        scales=section.scales,
        token_dtype=job.dataset.token_dtype,
        captions=captions,
        text_features=job.dataset.text_features,
        splits=splits,
        content_hash=content_hash(indices),
        rejected=_rejected(manifests, section.resolution),
        attribution=config.attribution,
    )


def _rejected(manifests: Sequence[Manifest], side: int) -> dict[str, int]:
    """Pictures that a resolution leaves out, by reason."""
    rejected: Counter[str] = Counter()
    for manifest in manifests:
        rejected.update(manifest.rejected)
        if too_small := manifest.too_small.get(str(side)):
            rejected[f"too small for {side} pixels"] += too_small
    return dict(sorted(rejected.items()))


def _merged_index(store: ObjectStore, split_folder: str, manifests: Sequence[Manifest]) -> bytes:
    """One index.json for the shards of all partitions, in their order."""
    shards: list[dict[str, Any]] = []
    for manifest in manifests:
        name = f"{split_folder}/{manifest.folder}/{INDEX_FILE}"
        data = store.read(name)
        if hashlib.sha256(data).hexdigest() != manifest.files[name].sha256:
            raise UserError(f"{store.url}/{name} is not what its manifest says; remove the manifest and run it again")
        for shard in json.loads(data)["shards"]:
            shard["raw_data"]["basename"] = f"{manifest.folder}/{shard['raw_data']['basename']}"
            shards.append(shard)
    return json.dumps({"version": INDEX_VERSION, "shards": shards}, sort_keys=True).encode()


def _merge_rejects(store: ObjectStore, manifests: Sequence[Manifest]) -> None:
    """One rejects.jsonl of all partitions; it can be large, so it never is in memory as a whole."""
    with tempfile.TemporaryDirectory() as folder:
        path, part = Path(folder) / REJECTS_FILE, Path(folder) / "part"
        with path.open("wb") as target:
            for manifest in manifests:
                store.download(f"{PARTS_FOLDER}/{manifest.folder}/{REJECTS_FILE}", part)
                with part.open("rb") as source:
                    shutil.copyfileobj(source, target)
        store.upload(path, REJECTS_FILE)


def _copy_empty_caption(store: ObjectStore, manifest: Manifest, folder: str) -> None:
    name = f"{PARTS_FOLDER}/{manifest.folder}/{EMPTY_CAPTION_FILE}"
    if name in manifest.files:
        store.write(f"{folder}{EMPTY_CAPTION_FILE}", store.read(name))


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMED_AT_MOST])
    return shown + (f" and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST else "")
