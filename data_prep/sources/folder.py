"""A folder of picture files, captioned by one `captions.jsonl` or by a text file beside each picture.

FOLDER/captions.jsonl       {"file": "hearts/red.png", "caption": "a red heart"} per line
FOLDER/hearts/red.png       where there is no captions.jsonl: the caption is the text of hearts/red.txt
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath

from data_prep.sources import SourceItem
from star_dist.data.pictures import PICTURE_SUFFIXES
from star_dist.errors import UserError

CAPTIONS_FILE = "captions.jsonl"


class FolderSource:
    """Pictures of a folder in the order of their keys, which are their paths inside the folder.

    With `captions.jsonl` exactly the listed pictures are taken; without it every picture file, where one without a
    text file has an empty caption. Whether a picture can be read shows only when it is read.

    Raises:
        UserError: no such folder, no captions at all, or a line of `captions.jsonl` that cannot be used.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"no folder of pictures at {self.path}; change source.path")
        listing = self.path / CAPTIONS_FILE
        self.captions: dict[str, str | None]  # None: still in the picture's text file
        self.captions = _read_listing(listing) if listing.is_file() else self._find_captioned_files()

    def __len__(self) -> int:
        return len(self.captions)

    def __iter__(self) -> Iterator[SourceItem]:
        for key in sorted(self.captions):
            file = self.path / key
            caption = self.captions[key]
            if caption is None:
                caption = _read_text_beside(file)
            yield SourceItem(key, caption, partial(Path.read_bytes, file))

    def _find_captioned_files(self) -> dict[str, str | None]:
        files = [file for file in self.path.rglob("*") if file.suffix.lower() in PICTURE_SUFFIXES]
        if not any(file.with_suffix(".txt").is_file() for file in files):
            raise UserError(
                f"{self.path} holds {len(files)} pictures but no captions: neither {CAPTIONS_FILE} nor a .txt beside "
                f"any picture"
            )
        return {file.relative_to(self.path).as_posix(): None for file in files}


def _read_listing(path: Path) -> dict[str, str | None]:
    captions: dict[str, str | None] = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where} is not JSON: {error.msg} at column {error.colno}") from None
        file = values.get("file") if isinstance(values, dict) else None
        caption = values.get("caption") if isinstance(values, dict) else None
        if not isinstance(file, str) or not isinstance(caption, str):
            raise UserError(
                f'{where} must be {{"file": "…", "caption": "…"}} with two strings, got {line.strip()[:80]}'
            )
        if not file or PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            raise UserError(f"{where}: file {file!r} must be a path inside the folder")
        if file in captions:
            raise UserError(f"{where}: file {file!r} is listed twice")
        captions[file] = caption
    return captions


def _read_text_beside(picture: Path) -> str:
    """The text file's caption; empty where there is none or it is not UTF-8: one picture's fault, not the job's."""
    try:
        return picture.with_suffix(".txt").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
