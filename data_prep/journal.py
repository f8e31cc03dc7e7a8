"""The unfinished work of one partition: chunks of tokenized pictures, so that a killed job loses at most one.

JOURNAL/00000012/index.json, …    samples of one chunk with the tokens of all resolutions (MDS)
JOURNAL/00000012/chunk.json       Chunk: where the next chunk starts in the source, and what was left out
JOURNAL/00000012/rejects.jsonl
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from streaming import MDSWriter
from streaming.base.format.mds.reader import MDSReader
from streaming.base.hashing import get_hash

from data_prep.job import REJECTS_FILE
from data_prep.merging import INDEX_FILE
from data_prep.work import TEMPORARY
from star_dist.config import Section
from star_dist.data.schema import SHARD_HASH
from star_dist.errors import UserError
from star_dist.files import read_json_object, sync_to_disk

CHUNK_FILE = "chunk.json"
CHUNK_DIGITS = 8
SHARD_BYTES = 2**28


class Chunk(Section):
    """items: read from the source so far, this chunk included. unit, offset: where the next item is. last: the
    partition has no more. rejected: of this chunk, by reason. too_small: of this chunk, by resolution."""

    items: int = 0
    unit: int = 0
    offset: int = 0
    last: bool = False
    rejected: dict[str, int] = {}
    too_small: dict[str, int] = {}


class Journal:
    """Complete chunks of one partition's job, in order, in the folder of its unfinished work.

    A chunk that is missing or damaged (power loss, full disk) ends them; it and all after it are removed with a
    warning, since the same pictures give the same chunks again.
    """

    def __init__(self, folder: Path, columns: dict[str, str]) -> None:
        self.folder = folder
        self.columns = columns
        self.chunks: list[Chunk] = []
        found = sorted(folder.glob("[0-9]" * CHUNK_DIGITS))
        try:
            while len(self.chunks) < len(found):
                self.chunks.append(_read_chunk(self._path(len(self.chunks))))
        except UserError as error:
            print(f"warning: {error}; that chunk and all after it are made again", file=sys.stderr)
            for path in reversed(found):
                if path >= self._path(len(self.chunks)):
                    shutil.rmtree(path)

    @property
    def position(self) -> Chunk:
        """The last complete chunk, or the beginning."""
        return self.chunks[-1] if self.chunks else Chunk()

    def append(self, chunk: Chunk, samples: Sequence[dict[str, Any]], rejects: Sequence[dict[str, str]]) -> None:
        """Writes a chunk, which appears complete or not at all, after a loss of power too."""
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=TEMPORARY) as temporary:
            partial = Path(temporary) / "chunk"
            options = dict(columns=self.columns, hashes=[SHARD_HASH], size_limit=SHARD_BYTES)
            with MDSWriter(out=str(partial), **options) as writer:
                for sample in samples:
                    writer.write(sample)
            (partial / REJECTS_FILE).write_text("".join(json.dumps(reject) + "\n" for reject in rejects))
            (partial / CHUNK_FILE).write_text(chunk.model_dump_json())
            for path in (*partial.iterdir(), partial):
                sync_to_disk(path)
            os.replace(partial, self._path(len(self.chunks)))
            sync_to_disk(self.folder)
        self.chunks.append(chunk)

    def samples(self) -> Iterator[dict[str, Any]]:
        """All samples of all chunks.

        Raises:
            UserError: a chunk was damaged after it was written.
        """
        for number in range(len(self.chunks)):
            folder = self._path(number)
            for shard in json.loads((folder / INDEX_FILE).read_text())["shards"]:
                raw = shard["raw_data"]
                if get_hash(SHARD_HASH, (folder / raw["basename"]).read_bytes()) != raw["hashes"][SHARD_HASH]:
                    raise UserError(f"{folder} is damaged; remove it and run the same command again")
                reader = MDSReader.from_json(str(folder), None, shard)
                for i in range(len(reader)):
                    yield reader[i]

    def copy_rejects(self, path: Path) -> None:
        """Writes the rejects of all chunks into one file."""
        with path.open("wb") as target:
            for number in range(len(self.chunks)):
                with (self._path(number) / REJECTS_FILE).open("rb") as source:
                    shutil.copyfileobj(source, target)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:0{CHUNK_DIGITS}}"


def _read_chunk(folder: Path) -> Chunk:
    """A chunk whose files have the sizes that they were written with; their content is checked when it is read.

    Raises:
        UserError: a file is missing or damaged.
    """
    values = read_json_object(folder / CHUNK_FILE, f"{folder / CHUNK_FILE} is missing")
    index = read_json_object(folder / INDEX_FILE, f"{folder / INDEX_FILE} is missing")
    try:
        chunk = Chunk(**values)
        sizes = {shard["raw_data"]["basename"]: shard["raw_data"]["bytes"] for shard in index["shards"]}
    except (ValidationError, KeyError, TypeError):
        raise UserError(f"{folder} is damaged: {CHUNK_FILE} or {INDEX_FILE} is of something else") from None
    for name, expected in sizes.items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if size != expected:
            raise UserError(f"{folder / name} has {size} bytes, its index says {expected}")
    rejects = folder / REJECTS_FILE
    lines = rejects.read_bytes().count(b"\n") if rejects.is_file() else 0
    if lines != sum(chunk.rejected.values()):
        raise UserError(f"{rejects} has {lines} lines, {CHUNK_FILE} says {sum(chunk.rejected.values())}")
    return chunk
