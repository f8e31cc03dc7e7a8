"""Where shards come from: streams whose cache holds nothing but what the index promises, alone or mixed by weight."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import IO, Any

from numpy.typing import NDArray
from streaming import Stream
from streaming.base.format import Reader
from streaming.base.world import World

from star_dist.config import DataSection
from star_dist.data.open_shards import OpenShard
from star_dist.data.schema import SHARD_HASH
from star_dist.errors import Unavailable
from star_dist.files import cannot_write, try_lock
from star_dist.object_store import ENDPOINT_VARIABLE

FIRST_PAUSE_S = 0.5  # before a shard with the wrong bytes is fetched again; doubles each time
CACHE_LOCK_FILE = "star_dist.lock"
CORRUPT_MARK = ".corrupt"
PARTIAL_DOWNLOAD = re.compile(r"\.[0-9a-fA-F]{8}$")  # what boto3 adds to a file's name until it is whole


class CorruptShard(RuntimeError):
    """A shard whose bytes are not those that the index promises, however often it is fetched."""


class UnreadableIndex(RuntimeError):
    """An index.json that cannot be fetched, or that names no shards; its cause says why."""


class CheckedStream(Stream):
    """A stream that fetches a shard again when its hash is wrong, and never leaves a wrong one in the cache.

    The library checks the hash once, raises, and leaves the file; the next start would take it as good.
    downloading: the shards that this process is fetching.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.downloading: set[Reader] = set()

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Reader]:
        """All shards, as index.json names them.

        Raises:
            UnreadableIndex: it cannot be fetched, or names none.
            ValueError: it is no JSON, or of another version.
        """
        try:
            shards = super().get_shards(world, allow_unsafe_types)
        except ValueError:
            raise
        except Exception as error:  # of any client of any store
            raise UnreadableIndex from error
        return [OpenShard(shard) for shard in shards]

    def set_up_local(self, shards: list[Reader], cache_usage_per_shard: NDArray) -> None:
        if self.remote is not None:
            for shard in shards:
                for info, path in self._files(shard):
                    if path.is_file() and path.stat().st_size != info.bytes:  # cut short by a crash or a full disk
                        path.unlink()
        super().set_up_local(shards, cache_usage_per_shard)

    def prepare_shard(self, shard: Reader) -> int:
        """Ensures that a shard is in the cache; returns by how many bytes the cache has grown.

        Raises:
            CorruptShard: its hash is wrong each time.
        """
        self.downloading.add(shard)
        try:
            return self._fetch(shard)
        finally:
            self.downloading.remove(shard)

    def _fetch(self, shard: Reader) -> int:
        for attempt in range(self.download_retry):
            try:
                return super().prepare_shard(shard)
            except ValueError as error:  # what the library raises for a checksum
                reason = str(error)
                for _, path in self._files(shard):
                    path.unlink(missing_ok=True)
                if attempt + 1 < self.download_retry:
                    time.sleep(FIRST_PAUSE_S * 2**attempt)
        name = shard.file_pairs[0][0].basename
        raise CorruptShard(f"{self.remote}/{self.split}/{name} after {self.download_retry} downloads: {reason}")

    def _files(self, shard: Reader) -> list[tuple[Any, Path]]:
        folder = Path(self.local) / self.split
        return [(info, folder / info.basename) for pair in shard.file_pairs for info in pair if info is not None]


def build_streams(data: DataSection, split: str) -> list[CheckedStream]:
    """One stream per source of the data section; the training split mixes them by weight, others hold each once."""
    weighted = len(data.all_sources) > 1 and split == data.train_split
    return [
        CheckedStream(
            remote=source.remote,
            local=source.local,
            split=split,
            proportion=source.weight if weighted else None,
            download_timeout=data.download_timeout_s,
            download_retry=data.download_attempts,
            validate_hash=SHARD_HASH if source.remote is not None else None,
        )
        for source in data.all_sources
    ]


def remove_leftovers(data: DataSection, split: str) -> None:
    """Removes from the caches what killed downloads have left, and the marks of corrupt shards: another start, another
    try."""
    for source in data.all_sources:
        for path in Path(source.local, split).rglob("*") if source.remote is not None else ():
            if path.name.endswith(CORRUPT_MARK) or PARTIAL_DOWNLOAD.search(path.name):
                path.unlink(missing_ok=True)


def claim_caches(data: DataSection) -> list[IO[str]]:
    """Takes the cache folders of all remote sources for this host's processes of this training.

    Two trainings in one cache would evict each other's shards. The kernel gives the folders back when this ends.

    Raises:
        Unavailable: another training on this host uses one of them and may be ending, or its file system is lost.
        UserError: it cannot be written.
    """
    locks = []
    for source in data.all_sources:
        if source.remote is None:
            continue
        folder = Path(source.local)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = try_lock(folder / CACHE_LOCK_FILE)
        except OSError as error:
            raise cannot_write(f"the cache {folder} of {source.remote}", error) from None
        if lock is None:
            raise Unavailable(
                f"another training on this host uses the cache {folder} of {source.remote}; wait for it, or set "
                f"data.local to a folder of its own"
            )
        locks.append(lock)
    return locks


def apply_s3_settings(data: DataSection) -> None:
    """Hands endpoint and region of the config to boto3 and streaming, which read the environment.

    Keys come from the ordinary AWS chain (environment, ~/.aws, instance role) and never from a config.
    """
    if data.s3_endpoint_url is not None:
        os.environ[ENDPOINT_VARIABLE] = os.environ["AWS_ENDPOINT_URL_S3"] = data.s3_endpoint_url
    if data.s3_region is not None:
        os.environ["AWS_DEFAULT_REGION"] = data.s3_region
