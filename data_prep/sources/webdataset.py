"""WebDataset tars as img2dataset writes them: for each sample KEY.jpg, KEY.txt and KEY.json, in one run of members.

The .json's fields are captions and scores; the .txt is the first caption where the .json has none. Units are tars;
those on S3 are copied to a temporary file first. A picture's key is the tar's path and the sample's key.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Mapping
from functools import partial
from typing import BinaryIO

from data_prep.sources import (
    DamagedFields,
    DamagedUnit,
    Description,
    FileSource,
    SourceItem,
    parse_fields,
)
from star_dist.data.pictures import PICTURE_SUFFIXES

BLOCK_BYTES = 512
DAMAGED = "damaged tar"


class Source(FileSource):
    """All .tar files under a folder or prefix; see the module. One without any member is whole, and has no items."""

    suffix = ".tar"

    def open_file(self, unit: str, recaptions: Mapping[str, Mapping[str, str]]) -> _Tar:
        with self.local_copy(unit) as path:
            return _Tar(self, unit, path.open("rb"), recaptions)


class _Tar:
    """Samples of one tar; members are read by position, so any thread may read any of them."""

    def __init__(self, source: Source, unit: str, file: BinaryIO, recaptions: Mapping[str, Mapping[str, str]]) -> None:
        self.source, self.unit, self.file, self.recaptions = source, unit, file, recaptions
        self.place = f"{source.options.path}/{unit}"
        self.samples: dict[str, dict[str, tarfile.TarInfo]] = {}
        self.repeated: set[str] = set()
        for member in self._members():
            folder, _, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            sample = self.samples.setdefault(key, {})
            if f".{suffix.lower()}" in sample:
                self.repeated.add(key)
            sample[f".{suffix.lower()}"] = member
        if self.samples and not any(PICTURE_SUFFIXES & sample.keys() for sample in self.samples.values()):
            raise DamagedUnit(self.place, "tar without a picture", f"holds {len(self.samples)} samples but no picture")

    def __len__(self) -> int:
        return len(self.samples)

    def keys(self) -> Iterator[str]:
        return map(self._name, self.samples)

    def __iter__(self) -> Iterator[SourceItem]:
        for key in self.samples:
            yield SourceItem(self._name(key), partial(self._describe, key), partial(self._read_picture, key))

    def _name(self, key: str) -> str:
        return f"{self.unit}/{key}"

    def _members(self) -> list[tarfile.TarInfo]:
        """Raises DamagedUnit for a tar that ends too early, which the library takes for its end in some places."""
        try:
            with tarfile.open(fileobj=self.file, mode="r:") as tar:
                members = tar.getmembers()
                end = tar.offset
        except (tarfile.TarError, ValueError) as error:  # ValueError: of extended headers
            raise DamagedUnit(self.place, DAMAGED, f"is no whole tar ({error})") from None
        if os.pread(self.file.fileno(), BLOCK_BYTES, end) != bytes(BLOCK_BYTES):
            raise DamagedUnit(self.place, DAMAGED, f"is cut short or damaged at byte {end}")
        return [member for member in members if member.isfile()]

    def _read(self, member: tarfile.TarInfo) -> bytes:
        return os.pread(self.file.fileno(), member.size, member.offset_data)

    def _read_picture(self, key: str) -> bytes:
        return self._read(next(self.samples[key][suffix] for suffix in self.samples[key] if suffix in PICTURE_SUFFIXES))

    def _describe(self, key: str) -> Description:
        sample = self.samples[key]
        if key in self.repeated:
            return Description(problem="key twice in a tar", has_picture=False)
        if not PICTURE_SUFFIXES & sample.keys():
            return Description(problem="no picture in the sample", has_picture=False)
        fields = {}
        try:
            if ".json" in sample:
                fields = parse_fields(self._read(sample[".json"]))
            if ".txt" in sample:
                self.source.add_text(fields, partial(self._read, sample[".txt"]))
        except DamagedFields as error:
            return Description(problem=str(error))
        name = self._name(key)
        recaptions = {caption: texts[name] for caption, texts in self.recaptions.items() if name in texts}
        return self.source.description(fields, recaptions)
