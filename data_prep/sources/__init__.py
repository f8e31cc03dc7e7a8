"""Sources of captioned pictures: one module per kind, which `{"kind": NAME, …}` in a config names.

A source is a sorted list of units (pictures of a folder, tars, Parquet files), which partitions of a job share out,
and gives the items of one unit at a time. A new kind is one new module here with a class `Source(SourceBase)`, or
`Source(FileSource)` where units are files of many pictures.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import pkgutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field
from tqdm import tqdm

from data_prep.recaptions import check_keys, read_unit_captions
from data_prep.work import named_if_full
from star_dist.config import Section, StorageSection, parse_config
from star_dist.errors import Unavailable, UserError
from star_dist.object_store import FolderStore, ObjectStore, open_store

CaptionName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class SourceOptions(Section):
    """What every kind takes.

    path: a folder or `s3://bucket/prefix`. captions: names of captions and where the source has them (a column or
    field), `{}` where it has none. recaptions: names of captions that `data_prep.caption` made, and the folder or
    `s3://…` where it wrote them. Every picture must have the first of all.
    """

    path: str
    captions: dict[CaptionName, str] = {"original": "caption"}
    recaptions: dict[CaptionName, str] = {}


class FileOptions(SourceOptions):
    """What the kinds take whose units are files of many pictures.

    damaged_units: whether a file that is not whole stops the job, or what is lost of it is left out, counted and listed
    as pictures are. It decides nothing else of the result, so a job that has stopped may go on with the other value.
    """

    damaged_units: Literal["stop", "skip"] = "stop"


@dataclass(frozen=True)
class Description:
    """What a source says of a picture. captions: by name; absent ones are left out. scores: of the asked-for columns.

    problem: why the item cannot be used, where the source has found that already; counted as a reason of rejection.
    has_picture: False where the problem is that there is no picture, not one alone, or none that has a name; otherwise
    it is the captions'.
    """

    captions: Mapping[str, str] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    problem: str | None = None
    has_picture: bool = True


@dataclass(frozen=True)
class SourceItem:
    """One captioned picture that is not read yet; both functions may be called on any thread.

    key: unique in its source and the same in every run. describe: its captions and scores. read: the file's bytes;
    raises OSError where they are missing.
    """

    key: str
    describe: Callable[[], Description]
    read: Callable[[], bytes]


class Unit(Protocol):
    """The items of one unit, in an order that is the same in every run."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[SourceItem]: ...


class FileUnit(Unit, Protocol):
    """The items of one file."""

    def keys(self) -> Iterator[str]:
        """Keys of all items, without their pictures; raises DamagedUnit where they cannot be read."""


def parse_fields(data: bytes) -> dict[str, Any]:
    """The object in a .json that somebody else wrote.

    Raises:
        DamagedFields: it is none, or one that Python does not read: nested too deeply, integers of thousands of digits.
    """
    try:
        values = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise DamagedFields(".json is not UTF-8") from None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise DamagedFields(".json is no JSON object")
    return values


def parse_text(data: bytes) -> str:
    """The caption in a .txt.

    Raises:
        DamagedFields: it is not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DamagedFields(".txt is not UTF-8") from None


class DamagedFields(ValueError):
    """What stands beside a picture cannot be read: that picture's fault, not the job's. The message is the reason."""


class DamagedUnit(UserError):
    """A unit that is not whole; `reason` is what its pictures are counted under where they are left out."""

    def __init__(self, place: str, reason: str, details: str) -> None:
        super().__init__(f"{place} {details}; fetch it again, or go on without it by source.damaged_units=skip")
        self.reason = reason


class SourceBase:
    """What all kinds share. A kind is a subclass `Source` with its own `Options`, `units` and `open`.

    units: names of the units, sorted. score_names: score columns that the job filters by.
    """

    Options: type[SourceOptions] = SourceOptions
    units: Sequence[str]

    def __init__(self, options: SourceOptions, storage: StorageSection, score_names: Sequence[str]) -> None:
        self.options = options
        self.score_names = tuple(score_names)
        self._open_store = lambda url: open_store(url, endpoint=storage.endpoint, region=storage.region)
        self.store: ObjectStore = self._open_store(options.path)
        if twice := options.captions.keys() & options.recaptions.keys():
            raise UserError(f"source.captions and source.recaptions both have {sorted(twice)}; give each name once")

    @property
    def caption_names(self) -> tuple[str, ...]:
        """All named captions, the one that every picture must have first."""
        return (*self.options.captions, *self.options.recaptions)

    @property
    def first_field(self) -> str | None:
        """The field of the first caption that the source has itself, None where it has none."""
        return next(iter(self.options.captions.values()), None)

    def open(self, unit: str) -> Unit:
        """The items of a unit; what they read from stays open as long as one of them is held.

        Raises:
            UserError: a unit that cannot be read at all.
        """
        raise NotImplementedError

    def caption_file(self, unit: str, partition_name: str) -> str:
        """The file that `data_prep.caption` writes new captions of a unit to; consecutive units may share one."""
        return f"{unit}.jsonl"

    def description(self, fields: Mapping[str, Any], recaptions: Mapping[str, str]) -> Description:
        """The configured captions and scores out of an item's fields, and its new captions by name.

        A caption that is no text and a score that is no number count as absent.
        """
        found = {name: fields.get(column) for name, column in self.options.captions.items()} | dict(recaptions)
        captions = {name: caption.strip() for name, caption in found.items() if isinstance(caption, str)}
        scores = {}
        for name in self.score_names:
            with contextlib.suppress(TypeError, ValueError, OverflowError):
                scores[name] = float(fields[name]) if name in fields else math.nan
        return Description(captions, {name: score for name, score in scores.items() if not math.isnan(score)})

    def add_text(self, fields: dict[str, Any], read: Callable[[], bytes]) -> None:
        """Fills the field of the first caption with the .txt that `read` gives, where the .json has no caption there.

        Raises:
            DamagedFields: the .txt is not UTF-8.
        """
        if self.first_field is None:
            return
        caption = fields.get(self.first_field)
        if not isinstance(caption, str) or not caption.strip():
            fields[self.first_field] = parse_text(read())

    def read_file(self, name: str) -> bytes:
        """The bytes of one file of the source.

        Raises:
            OSError: this file cannot be read; Unavailable where the whole folder is away.
        """
        try:
            return self.store.read(name)
        except OSError as error:
            if isinstance(self.store, FolderStore) and not _has_entries(self.store.path):
                raise Unavailable(
                    f"cannot read {self.options.path}/{name}: {error.strerror}, and source.path {self.options.path} is "
                    f"no longer a folder with anything in it; mount it and run the same command again"
                ) from None
            raise

    def recaption_stores(self) -> dict[str, ObjectStore]:
        """Where each re-captioning's files are, by the name of the caption."""
        return {name: self._open_store(url) for name, url in self.options.recaptions.items()}


class FileSource(SourceBase):
    """What the kinds share whose units are files of many pictures. A kind has its `suffix` and `open_file`.

    Raises:
        UserError: there are no such files.
    """

    Options = FileOptions
    suffix: str

    def __init__(self, options: FileOptions, storage: StorageSection, score_names: Sequence[str]) -> None:
        super().__init__(options, storage, score_names)
        self.units = sorted(entry.name for entry in self.store.list() if entry.name.endswith(self.suffix))
        if not self.units:
            raise UserError(f"no {self.suffix} files at {options.path}; change source.path")
        self._recaption_stores = self.recaption_stores()

    def open(self, unit: str) -> Unit:
        recaptions = read_unit_captions(self._recaption_stores, self.caption_file(unit, ""))
        try:
            opened = self.open_file(unit, recaptions)
        except DamagedUnit as error:
            return list(self.without_damaged(error, [unit]))
        with contextlib.suppress(DamagedUnit):  # whoever reads the items comes to it
            check_keys(recaptions, opened.keys, f"{self.options.path}/{unit}")
        return opened

    def open_file(self, unit: str, recaptions: Mapping[str, Mapping[str, str]]) -> FileUnit:
        """The items of a file; recaptions: by name, then by key.

        Raises:
            UserError: the file cannot be read; DamagedUnit where the fault is in its content.
        """
        raise NotImplementedError

    def without_damaged(self, error: DamagedUnit, keys: Iterable[str]) -> Iterator[SourceItem]:
        """Items that stand for what a damaged unit leaves out; raises the error where the job is to stop."""
        if self.options.damaged_units == "stop":
            raise error
        tqdm.write(f"warning: {error} (left out)", file=sys.stderr)
        description = Description(problem=error.reason, has_picture=False)
        return (SourceItem(key, lambda: description, bytes) for key in keys)

    @contextlib.contextmanager
    def local_copy(self, unit: str) -> Iterator[Path]:
        """A unit's file on this machine. A copy is gone afterwards, but whoever has opened it may go on reading.

        A copy lies in the temporary folder (TMPDIR), a disk of the node: a file that is removed while it is open does
        not let NFS remove its folder, and the folder of unfinished work may be on NFS.

        Raises:
            UserError: the file cannot be read, or the temporary folder is full.
        """
        try:
            if isinstance(self.store, FolderStore):
                yield self.store.path / unit
            else:
                temporary = f"the temporary folder {tempfile.gettempdir()} (TMPDIR)"
                with named_if_full(temporary), tempfile.TemporaryDirectory(prefix="star-dist-") as folder:
                    self.store.download(unit, Path(folder) / "unit")
                    yield Path(folder) / "unit"
        except OSError as error:
            if isinstance(error, UserError):  # S3 refuses this file
                raise
            place = f"{self.options.path}/{unit}"
            raise UserError(f"cannot read {place}: {error.strerror or error}; run the same command again") from None


def _has_entries(folder: Path) -> bool:
    """False for what is no folder, may not be read, or is an empty place to mount something at."""
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is not None
    except OSError:
        return False


def open_units(source: SourceBase, names: Iterable[str]) -> Iterator[Unit]:
    """Opens units in their order, always the next one while one is in use: its copy from S3 comes meanwhile.

    Raises:
        UserError: a unit that cannot be read, when its turn has come.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="open")
    try:
        opening = (pool.submit(source.open, name) for name in names)
        following = next(opening, None)
        while following is not None:
            unit = following.result()
            following = next(opening, None)
            yield unit
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def open_source(
    description: Mapping[str, Any],
    storage: StorageSection | None = None,
    score_names: Sequence[str] = (),
) -> SourceBase:
    """The source that `{"kind": …, …}` describes; the other keys are options of that kind.

    Raises:
        UserError: an unknown kind, options that the kind does not take, or nothing to read at its path.
    """
    kinds = sorted(module.name for module in pkgutil.iter_modules(__path__))
    values = dict(description)
    kind = values.pop("kind", None)
    if kind not in kinds:
        raise UserError(f"source.kind is {kind!r}; known kinds: {', '.join(kinds)}")
    source_class = importlib.import_module(f"{__name__}.{kind}").Source
    options = parse_config(source_class.Options, values, source=f"source of kind {kind!r}")
    return source_class(options, storage or StorageSection(), score_names)
