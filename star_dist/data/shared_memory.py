"""Shared memory that mosaicml-streaming leaves behind when a job is killed: removed by the next job, if it was ours.

Every StreamingDataset takes a number on its host and keeps segments /dev/shm/<number>_<name> and lock files in the
temporary folder under it. The library's own cleaner removes those of every job on the host. Here each dataset leaves
a record, locked as long as its process lives; only what a record without a living owner names is removed.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import IO

from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, LOCALS, SHM_TO_CLEAN

from star_dist.files import try_lock

SEGMENTS = Path("/dev/shm")
RECORD_PREFIX = f"star_dist_streaming_{os.getuid()}_"

_records: list[IO[str]] = []  # open, and so locked, until this process ends


def record_segments(number: int) -> None:
    """Marks the segments of a number as this process's, for whoever cleans up after it."""
    record = try_lock(Path(tempfile.gettempdir()) / f"{RECORD_PREFIX}{number:06}")
    if record is None:
        return  # a process that forked from us keeps it; it lives as long
    record.truncate(0)
    record.write(_segment(number, LOCALS).read_bytes().hex())
    record.flush()
    _records.append(record)


def remove_segments_of_dead_jobs() -> int:
    """Removes what recorded jobs of this user left on this host that live no longer; returns how many.

    For one process of a host, before its others look for a free number.
    """
    removed = 0
    for path in sorted(Path(tempfile.gettempdir()).glob(f"{RECORD_PREFIX}*")):
        number = int(path.name.removeprefix(RECORD_PREFIX))
        if any(Path(record.name) == path for record in _records):
            continue  # this process's own; POSIX locks do not keep a process from itself
        record = try_lock(path)
        if record is None:
            continue
        with record:
            record.seek(0)
            identity = record.read()
            found = _segment(number, LOCALS)
            # Somebody else may have cleaned up and another job taken the number since.
            if not found.exists() or _is_same(identity, found.read_bytes().hex()):
                for name in SHM_TO_CLEAN:
                    _segment(number, name).unlink(missing_ok=True)
                for name in (BARRIER_FILELOCK, CACHE_FILELOCK):
                    (path.parent / f"{number:06}_{name}").unlink(missing_ok=True)
                removed += 1
            path.unlink(missing_ok=True)
    return removed


def _is_same(recorded: str, found: str) -> bool:
    """Compares all but the first four bytes, the length, which a dataset sets to zero when it is destroyed."""
    return bool(recorded) and recorded[8:] == found[8:]


def _segment(number: int, name: str) -> Path:
    return SEGMENTS / f"{number:06}_{name}"
