"""New captions beside the originals: JSON lines of `{"key": …, "caption": …}`, one file per unit or partition."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from star_dist.errors import UserError
from star_dist.object_store import ObjectStore

PARTITION_FILE = re.compile(r"(\d{5})-of-(\d{5})\.jsonl")


def caption_line(key: str, caption: str) -> str:
    return json.dumps({"key": key, "caption": caption}, ensure_ascii=False) + "\n"


def read_unit_captions(stores: Mapping[str, ObjectStore], file: str) -> dict[str, dict[str, str]]:
    """New captions of one unit by name, then by key.

    Raises:
        UserError: a re-captioning job has not written the unit's file yet, or it is damaged.
    """
    found = {}
    for name, store in stores.items():
        try:
            found[name] = _parse(store.read(file), f"{store.url}/{file}")
        except FileNotFoundError:
            raise UserError(
                f"source.recaptions.{name}: {store.url} has no {file}; finish the job of data_prep.caption first"
            ) from None
    return found


def read_all_captions(stores: Mapping[str, ObjectStore]) -> dict[str, dict[str, str]]:
    """New captions of a whole source by name, then by key, from the files of all partitions.

    Raises:
        UserError: a partition's file is missing, there are files of different numbers of partitions, or one is damaged.
    """
    found = {}
    for name, store in stores.items():
        matches = {entry.name: PARTITION_FILE.fullmatch(entry.name) for entry in store.list()}
        indices = {tuple(map(int, match.groups())) for match in matches.values() if match}
        counts = {count for _, count in indices}
        if len(counts) != 1 or indices != {(i, count) for count in counts for i in range(count)}:
            raise UserError(
                f"source.recaptions.{name}: {store.url} must have the files of all partitions of one job of "
                f"data_prep.caption, it has {sorted(file for file in matches if matches[file]) or 'none'}"
            )
        found[name] = {}
        for file in sorted(file for file in matches if matches[file]):
            found[name] |= _parse(store.read(file), f"{store.url}/{file}")
    return found


def _parse(data: bytes, place: str) -> dict[str, str]:
    captions = {}
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line:
            continue
        try:
            values = json.loads(line)
            captions[values["key"]] = values["caption"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{place}, line {number} is damaged: {line[:80]!r}") from None
    return captions
