"""One picture from the source to the tokenizer: captions and scores checked, read, decoded, cropped and resized."""

from __future__ import annotations

import math
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice

from torch import Tensor

from data_prep.sources import Description, SourceItem
from star_dist.config import PrepConfig
from star_dist.data.pictures import FILE_FAULTS, UnreadablePicture, crop_and_resize, decode_picture, to_tensor
from star_dist.errors import UserError


class Rejected(ValueError):
    """A captioned picture that the data set leaves out; the message is the reason that it is counted under."""


@dataclass(frozen=True)
class Prepared:
    """A picture ready for the tokenizer, or the reason why there is none.

    pictures: (3, side, side) uint8 by resolution; too_small: resolutions that leave this picture out. read_s,
    decode_s: seconds of this thread.
    """

    key: str
    captions: Mapping[str, str] = field(default_factory=dict)
    pictures: Mapping[int, Tensor] = field(default_factory=dict)
    too_small: tuple[int, ...] = ()
    reason: str | None = None
    read_s: float = 0.0
    decode_s: float = 0.0


def prepare(item: SourceItem, config: PrepConfig, caption_names: tuple[str, ...]) -> Prepared:
    """Reads, checks, crops and resizes one picture; never raises for what is wrong with the picture.

    Raises:
        UserError: the storage fails, so that nothing is known of the picture.
    """
    started = time.perf_counter()
    try:
        description = describe_item(item)
        captions = {name: description.captions.get(name, "") for name in caption_names}
        _check_description(description, captions, config)
        data = read_item(item)
        read_at = time.perf_counter()
        image = decode_picture(data, lambda width, height: _check_size(width, height, config))
    except (UnreadablePicture, Rejected) as error:
        return Prepared(item.key, reason=str(error))
    wanted = [section for section in config.all_resolutions if min(image.size) >= section.min_side]
    pictures = {
        section.resolution: to_tensor(crop_and_resize(image, section.resolution)).contiguous() for section in wanted
    }
    left_out = tuple(section.resolution for section in config.all_resolutions if section.resolution not in pictures)
    return Prepared(
        item.key,
        captions,
        pictures,
        left_out,
        reason=None if pictures else "too small",
        read_s=read_at - started,
        decode_s=time.perf_counter() - read_at,
    )


def read_item(item: SourceItem) -> bytes:
    """The bytes of a picture's file.

    Raises:
        Rejected: the file is missing, may not be read or is none.
        UserError: the storage fails, so that nothing is known of the picture.
    """
    with _file_faults(item.key, "file"):
        return item.read()


def describe_item(item: SourceItem) -> Description:
    """What the source says of a picture that it does not refuse.

    Raises:
        Rejected: the source has found a problem, the name is no Unicode text (shards could not hold it), or the file
            of the captions is missing or may not be read.
        UserError: the storage fails, so that nothing is known of the picture.
    """
    _check_name(item)
    with _file_faults(item.key, "caption file"):
        description = item.describe()
    if description.problem is not None:
        raise Rejected(description.problem)
    return description


def check_picture(item: SourceItem) -> None:
    """Finds out whether the source has a picture, for who captions it anew: its captions may be what they like.

    Raises:
        Rejected: it has none, or the name is no Unicode text.
        UserError: the storage fails, so that nothing is known of the picture.
    """
    _check_name(item)
    description = Description()
    with suppress(Rejected), _file_faults(item.key, "caption file"):
        description = item.describe()
    if not description.has_picture:
        raise Rejected(description.problem)


def prepare_all(
    items: Iterable[SourceItem], config: PrepConfig, caption_names: tuple[str, ...], workers: int
) -> Iterator[Prepared]:
    """Prepares pictures on threads some batches ahead, in the source's order."""
    with warnings.catch_warnings(), ThreadPoolExecutor(workers, thread_name_prefix="prepare") as pool:
        warnings.filterwarnings("ignore", module="PIL")  # of damaged pictures; what matters becomes a reason
        submitted = (pool.submit(prepare, item, config, caption_names) for item in items)
        ahead = deque(islice(submitted, 2 * config.batch + 2 * workers))
        try:
            while ahead:
                yield ahead.popleft().result()
                ahead.extend(islice(submitted, 1))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _file_faults(key: str, kind: str) -> Iterator[None]:
    """Tells a fault of one file from one of the storage."""
    try:
        yield
    except OSError as error:
        if error.errno in FILE_FAULTS:
            raise Rejected(f"unreadable {kind}: {error.strerror}") from None
        raise UserError(f"cannot read {key}: {error.strerror or error}; run the same command again") from None


def _check_name(item: SourceItem) -> None:
    if not _is_unicode(item.key) or "\0" in item.key:
        raise Rejected("name is not Unicode text")


def _is_unicode(text: str) -> bool:
    """False for lone surrogates: half a character in a JSON escape, or a file's name in another encoding."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_description(description: Description, captions: Mapping[str, str], config: PrepConfig) -> None:
    if not next(iter(captions.values())):
        raise Rejected("empty caption")
    if not all(map(_is_unicode, captions.values())):
        raise Rejected("caption is not Unicode text")
    lengths = [len(caption) for caption in captions.values() if caption]
    if min(lengths) < config.min_caption_chars:
        raise Rejected("caption too short")
    if max(lengths) > config.max_caption_chars:
        raise Rejected("caption too long")
    for name, least in config.min_scores.items():
        score = description.scores.get(name, math.nan)
        if math.isnan(score):
            raise Rejected(f"no {name} score")
        if score < least:
            raise Rejected(f"low {name} score")


def _check_size(width: int, height: int, config: PrepConfig) -> None:
    """Before decoding, so that pictures that are left out anyway cost nothing."""
    if min(width, height) < max(config.min_side, 1):
        raise Rejected("too small")
    if config.max_aspect is not None and max(width, height) > config.max_aspect * min(width, height):
        raise Rejected("aspect too extreme")
