"""mosaicml-streaming's shared memory on a host that several jobs share, and what a killed job leaves of it.

Every StreamingDataset takes a number on its host and keeps segments /dev/shm/<number>_<name> and lock files in the
temporary folder under it. The library's own cleaner removes those of every job on the host. Here each dataset leaves
a record, locked as long as its process lives; only what a record without a living owner names is removed. Records lie
beside the segments: containers of one host may share a temporary folder and not /dev/shm, and jobs /dev/shm and not a
temporary folder.
"""

from __future__ import annotations

import itertools
import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch.distributed as dist
from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, LOCALS, SHM_TO_CLEAN
from streaming.base.shared import prefix

from star_dist.files import try_lock

SEGMENTS = Path("/dev/shm")
RECORD_PREFIX = f"star_dist_streaming_{os.getuid()}_"

NUMBERS = 10**6  # six digits

_records: dict[int, IO[str]] = {}  # open, and so locked, until this process ends


@contextmanager
def one_number_for_all_ranks() -> Iterator[None]:
    """A dataset that is made inside has the same number on all ranks, whatever other jobs of the host do meanwhile.

    The library takes the first number that is free, and every rank looks for it by itself: a job that starts or ends
    between two ranks' looks makes the start fail (mosaicml-streaming 0.13, streaming/base/shared/prefix.py). So all
    ranks begin to look at one random number.
    """
    drawn = [secrets.randbelow(NUMBERS)]  # not from a seeded generator: jobs of one seed share hosts
    if dist.is_initialized():
        dist.broadcast_object_list(drawn)
    from_zero = prefix._each_prefix_int
    prefix._each_prefix_int = lambda: itertools.count(drawn[0])
    try:
        yield
    finally:
        prefix._each_prefix_int = from_zero


def record_segments(number: int) -> None:
    """Marks the segments of a number as this process's, for whoever cleans up after it."""
    path = SEGMENTS / f"{RECORD_PREFIX}{number:06}"
    partial = path.with_name(f".{path.name}")
    record = try_lock(partial)
    if record is None:
        return  # another first rank of the same job marks them just now; it lives as long
    record.write(json.dumps({"identity": _identity(number), "lock_folder": tempfile.gettempdir()}))
    record.flush()
    partial.rename(path)  # whoever cleans up sees it locked and whole or not at all
    _records[number] = record


def remove_segments_of_dead_jobs() -> None:
    """Removes what recorded jobs of this user left on this host that live no longer.

    For one process of a host, before its others look for a free number.
    """
    for path in sorted(SEGMENTS.glob(f"{RECORD_PREFIX}*")):
        number = int(path.name.removeprefix(RECORD_PREFIX))
        if number in _records:
            continue  # this process's own; POSIX locks do not keep a process from itself
        record = try_lock(path)
        if record is None:
            continue
        with record:
            record.seek(0)
            if text := record.read():  # else another job has just cleaned up, and opening has made the record anew
                _remove_segments(number, **json.loads(text))
            path.unlink(missing_ok=True)


def _remove_segments(number: int, identity: str, lock_folder: str) -> None:
    if _segment(number, LOCALS).exists() and _identity(number) != identity:
        return  # somebody else has cleaned up, and another job taken the number since
    for name in SHM_TO_CLEAN:
        _segment(number, name).unlink(missing_ok=True)
    for name in (BARRIER_FILELOCK, CACHE_FILELOCK):
        (Path(lock_folder) / f"{number:06}_{name}").unlink(missing_ok=True)


def _identity(number: int) -> str:
    """Whose segments they are: all but the first four bytes, the length, which a dataset that is destroyed zeroes."""
    return _segment(number, LOCALS).read_bytes()[4:].hex()


def _segment(number: int, name: str) -> Path:
    return SEGMENTS / f"{number:06}_{name}"
