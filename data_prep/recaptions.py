"""New captions beside the originals: JSON lines of `{"key": …, "caption": …}`, one file per unit or partition."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping

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


def check_keys(recaptions: Mapping[str, Mapping[str, str]], keys: Callable[[], Iterable[str]], place: str) -> None:
    """Compares new captions, by name and key, with the keys of the items at a place, usable or not.

    Raises:
        UserError: captions of some name are there, but none is of an item; gives an example of both keys.
    """
    for name, texts in recaptions.items():
        if not texts or any(key in texts for key in keys()):
            continue
        own = next(iter(keys()), None)
        if own is not None:  # a place without items has nothing to lose
            raise UserError(
                f"source.recaptions.{name} has captions, but none of a picture of {place}: its keys are such as "
                f"{next(iter(texts))!r}, the source's such as {own!r}; give data_prep.caption the same source.path "
                f"(and source.key_column of Parquet files) as this job"
            )


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
