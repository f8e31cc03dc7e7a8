"""A folder of picture files, captioned by one listing or by a file beside each picture.

PATH/captions.jsonl      {"file": "hearts/red.png", "caption": "a red heart", "aesthetic": 6.1} per line
PATH/captions.csv        or the same as columns under a header: file,caption,aesthetic
PATH/hearts/red.png      where there is neither: hearts/red.json holds the fields, hearts/red.txt a caption they lack

A listing's pictures are exactly those taken; without one every picture file is, whether captioned or not. Units are
pictures, and a picture's key is its path inside the folder.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from data_prep.recaptions import check_keys, read_all_captions
from data_prep.sources import (
    DamagedFields,
    Description,
    SourceBase,
    SourceItem,
    SourceOptions,
    parse_fields,
)
from star_dist.config import StorageSection
from star_dist.data.pictures import PICTURE_SUFFIXES
from star_dist.errors import UserError

LISTINGS = ("captions.jsonl", "captions.csv")
Rows = dict[str, dict[str, Any] | None]  # fields by file; None for one that is listed twice
SIDECARS = (".json", ".txt")


class Source(SourceBase):
    """Pictures of a folder or prefix; see the module. Whether a picture can be read shows only when it is read.

    Raises:
        UserError: no such folder, no captions where some are named, or a listing that is no JSON or CSV.
    """

    def __init__(self, options: SourceOptions, storage: StorageSection, score_names: Sequence[str]) -> None:
        super().__init__(options, storage, score_names)
        listings = [name for name in LISTINGS if self.store.exists(name)]
        if len(listings) > 1:
            raise UserError(f"{options.path} has both {' and '.join(listings)}; remove one")
        self._listed: Rows | None = None
        self._sidecars: frozenset[str] = frozenset()
        if listings:
            read = _read_csv if listings[0].endswith(".csv") else _read_jsonl
            self._listed = read(_decoded(self.store.read(listings[0]), f"{options.path}/{listings[0]}"))
            column = self.first_field
            rows = self._listed.values()
            if rows and column is not None and not any(isinstance((row or {}).get(column), str) for row in rows):
                raise UserError(
                    f'no line of {options.path}/{listings[0]} has "{column}" with a string; source.captions names the '
                    f"fields of captions"
                )
            self.units = sorted(self._listed)
        else:
            self.units, self._sidecars = self._find()
        if not self.units:
            raise UserError(f"no picture is listed or found at {options.path}; change source.path")
        self._recaptions = read_all_captions(self.recaption_stores())
        check_keys(self._recaptions, lambda: self.units, options.path)

    def open(self, unit: str) -> Sequence[SourceItem]:
        return [SourceItem(unit, partial(self._describe, unit), partial(self.read_file, unit))]

    def caption_file(self, unit: str, partition_name: str) -> str:
        return f"{partition_name}.jsonl"

    def _describe(self, key: str) -> Description:
        """Runs on a worker's thread: a file beside the picture may take a while to come."""
        try:
            fields = self._listed[key] if self._listed is not None else self._fields_beside(key)
        except DamagedFields as error:
            return Description(problem=str(error))
        if fields is None:
            return Description(problem="listed twice")
        return self.description(fields, {name: texts[key] for name, texts in self._recaptions.items() if key in texts})

    def _find(self) -> tuple[list[str], frozenset[str]]:
        names = {entry.name for entry in self.store.list()}
        if not names:
            raise UserError(f"no folder of pictures at {self.options.path}; change source.path")
        pictures = sorted(name for name in names if PurePosixPath(name).suffix.lower() in PICTURE_SUFFIXES)
        candidates = {_beside(name, suffix) for name in pictures for suffix in SIDECARS}
        sidecars = frozenset(candidates & names)
        if not sidecars and self.options.captions:
            raise UserError(
                f"{self.options.path} holds {len(pictures)} pictures but no captions: neither {' nor '.join(LISTINGS)} "
                f"nor a .txt or .json beside any picture; set source.captions={{}} to caption them (data_prep.caption) "
                f"or where source.recaptions has their captions"
            )
        return pictures, sidecars

    def _fields_beside(self, key: str) -> dict[str, Any]:
        """A .json's fields; a .txt is the first caption where they have none. Both may be there."""
        fields: dict[str, Any] = {}
        table, text = (_beside(key, suffix) for suffix in SIDECARS)
        if table in self._sidecars:
            fields = parse_fields(self.read_file(table))
        if text in self._sidecars:
            self.add_text(fields, partial(self.read_file, text))
        return fields


def _beside(picture: str, suffix: str) -> str:
    """The picture's name with another suffix; a key of S3 may hold `//`, which a path would lose."""
    return picture.removesuffix(PurePosixPath(picture).suffix) + suffix


def _decoded(data: bytes, place: str) -> tuple[str, str]:
    try:
        return data.decode("utf-8-sig"), place
    except UnicodeDecodeError as error:
        raise UserError(f"{place} is not UTF-8: {error}") from None


def _read_jsonl(listing: tuple[str, str]) -> Rows:
    text, place = listing
    rows: Rows = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{place}, line {number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON: {error}") from None
        _add(rows, values, where, line)
    return rows


def _read_csv(listing: tuple[str, str]) -> Rows:
    text, place = listing
    csv.field_size_limit(sys.maxsize)  # a caption that is too long is its picture's fault alone, as in JSONL
    reader = csv.DictReader(io.StringIO(text), strict=True)
    rows: Rows = {}
    try:
        for values in reader:
            where = f"{place}, line {reader.line_num}"
            if None in values or None in values.values():
                raise UserError(f"{where} has another number of fields than the header ({len(reader.fieldnames)})")
            _add(rows, values, where, str(values))
    except csv.Error as error:
        raise UserError(f"{place}, line {reader.line_num} is not CSV: {error}") from None
    return rows


def _add(rows: Rows, values: Any, where: str, line: str) -> None:
    """Adds one line of a listing, which must name a file. What else is wrong with it is that picture's fault alone."""
    file = values.get("file") if isinstance(values, dict) else None
    if not isinstance(file, str):
        raise UserError(f'{where} must have "file" with a string, got {line.strip()[:80]}')
    if not file or PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
        raise UserError(f"{where}: file {file!r} must be a path inside the folder")
    if file != str(PurePosixPath(file)):  # the same picture could be listed under several names
        raise UserError(f"{where}: file {file!r} must be written as {str(PurePosixPath(file))!r}")
    rows[file] = None if file in rows else {name: value for name, value in values.items() if name != "file"}
