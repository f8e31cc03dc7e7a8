"""What is read of a data set before anything streams: its metadata, the empty caption, sizes of local shards."""

from __future__ import annotations

import tempfile
from pathlib import Path

from star_dist.config import DataSection, DataSource, RunConfig
from star_dist.data.schema import (
    EMPTY_CAPTION_FILE,
    METADATA_FILE,
    DatasetMetadata,
    check_matches,
    parse_metadata,
    read_metadata,
)
from star_dist.data.streams import apply_s3_settings
from star_dist.errors import UserError
from star_dist.files import read_json_object, replaced
from star_dist.object_store import open_store
from star_dist.text import TextFeatures
from star_dist.weights import read_weights


def fetch_metadata(data: DataSection) -> list[DatasetMetadata]:
    """Reads `dataset.json` of every source, and keeps that of a remote one in its local cache.

    Raises:
        UserError: no data set there, a remote that cannot be read, or a cache that holds another version of it.
    """
    apply_s3_settings(data)
    return [_fetch_metadata(data, source) for source in data.all_sources]


def fetch_matching_metadata(config: RunConfig, tokenizer_hash: str) -> list[DatasetMetadata]:
    """`fetch_metadata` of a run's data sets, each checked against the run.

    Raises:
        UserError: one cannot be read, or was made for another run (`schema.check_matches`).
    """
    metadata = fetch_metadata(config.data)
    for source, found in zip(config.data.all_sources, metadata):
        check_matches(found, config, tokenizer_hash, source.place)
    return metadata


def read_remote_metadata(data: DataSection, source: DataSource) -> DatasetMetadata:
    """`dataset.json` of a remote source, without its cache.

    Raises:
        UserError: no data set there, or a remote that cannot be read.
    """
    return parse_metadata(_read(data, source, METADATA_FILE), f"{source.remote}/{METADATA_FILE}")


def _fetch_metadata(data: DataSection, source: DataSource) -> DatasetMetadata:
    local = Path(source.local)
    if source.remote is None:
        return read_metadata(local)
    text = _read(data, source, METADATA_FILE)
    metadata = parse_metadata(text, f"{source.remote}/{METADATA_FILE}")
    cached = local / METADATA_FILE
    # Streaming takes whatever shard it finds in the cache for the remote's.
    if cached.is_file() and read_metadata(local) != metadata:
        raise UserError(f"the cache {local} holds another version of {source.remote}; remove the folder")
    try:
        with replaced(cached) as partial:
            partial.write_bytes(text)
    except OSError as error:
        raise UserError(f"cannot write to the cache {local} of {source.remote}: {error.strerror}") from None
    return metadata


def fetch_empty_caption(data: DataSection) -> TextFeatures:
    """Stored features of the empty caption, for data sets with text features.

    Raises:
        UserError: the file is missing or damaged, or the remote cannot be read.
    """
    source = data.all_sources[0]  # the text encoder is the same for all, so the features of "" are too
    with tempfile.TemporaryDirectory() as fetched:
        folder = Path(source.local) if source.remote is None else Path(fetched)
        if source.remote is not None:
            (folder / EMPTY_CAPTION_FILE).write_bytes(_read(data, source, EMPTY_CAPTION_FILE))
        tensors = read_weights(folder / EMPTY_CAPTION_FILE)
    return TextFeatures.pack([(tensors["text_hidden"], tensors["text_pooled"])])


def _read(data: DataSection, source: DataSource, name: str) -> bytes:
    """One small file of a remote data set."""
    try:
        return open_store(source.remote, endpoint=data.s3_endpoint_url, region=data.s3_region).read(name)
    except FileNotFoundError:
        written = "data_prep.tokenize writes it"
        if name == METADATA_FILE:
            written += (
                f", for several partitions python -m data_prep.merge {source.remote}; of several resolutions each has "
                f"one, such as {source.remote}/256"
            )
        raise UserError(f"no data set at {source.remote}: it has no {name} ({written})") from None


def check_local_shards(data: DataSection, split: str) -> None:
    """Compares every shard of a local data set with the size that its index records.

    Raises:
        UserError: naming the split or the shard that is missing or damaged.
    """
    for source in data.all_sources:
        if source.remote is None:  # shards of a remote are checked as they are downloaded
            _check_local_shards(Path(source.local), split)


def _check_local_shards(root: Path, split: str) -> None:
    index = root / split / "index.json"
    absent = f"no split {split!r} in the data set at {root}: {index} does not exist"
    shards = read_json_object(index, absent).get("shards")
    if not shards:
        raise UserError(f"{index} is damaged: it names no shards; copy the data set again")
    for shard in shards:
        file = shard["zip_data"] or shard["raw_data"]
        path = index.parent / file["basename"]
        size = path.stat().st_size if path.is_file() else None
        if size != file["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes"
            raise UserError(f"shard {path} {found}, its index says {file['bytes']}; copy the data set again")
