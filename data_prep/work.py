"""Unfinished work of one partition, which a killed job goes on with: WORK/JOB_HASH/PARTITION.

A job that starts again on another machine goes on there where WORK is in a file system that both see.

The job's hash in the path keeps jobs apart that share WORK: none takes over what another has begun, none loses it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from data_prep.partition import Partition
from star_dist.errors import Unavailable, UserError
from star_dist.files import FULL_DISK
from star_dist.object_store import is_s3

TEMPORARY = "partial-"  # begins the names of what is worth nothing after a kill


@contextmanager
def unfinished_work(output: str, work: str | None, job_hash: str, partition: Partition) -> Iterator[Path]:
    """A folder that this process alone holds while it is at a partition; leaving without an error removes it.

    work: as the config has it; null takes `OUTPUT.work`.

    Raises:
        Unavailable: another process is at the partition.
        UserError: the folder cannot be written or its disk is full, or the output is on S3 and no folder is given.
    """
    root = work_root(output, work)
    folder = root / job_hash / partition.name
    with exclusive(folder, f"partition {partition}"):
        folder.mkdir(exist_ok=True)
        for leftover in folder.glob(f"{TEMPORARY}*"):
            shutil.rmtree(leftover)
        with named_if_full(str(folder)):
            yield folder
        shutil.rmtree(folder)
    with suppress(OSError):  # other partitions are still at work
        folder.parent.rmdir()
        if work is None:
            root.rmdir()


def work_root(output: str, work: str | None) -> Path:
    """Where unfinished work of all jobs of an output lies.

    Raises:
        UserError: the output is on S3 and no folder is given.
    """
    if work is not None:
        return Path(work)
    if is_s3(output):
        raise UserError(
            f"output {output} is on S3; set work to a folder of a file system for what is not finished yet (on a "
            f"cluster one that all nodes see)"
        )
    return Path(output.rstrip("/") + ".work")


@contextmanager
def named_if_full(place: str) -> Iterator[None]:
    """Turns the error of a full disk into one line that names the place that was written to."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise UserError(
            f"cannot write to {place}: {error.strerror}; make room and run the same command again to go on"
        ) from None


@contextmanager
def exclusive(folder: Path, what: str) -> Iterator[None]:
    """Holds a lock beside a working folder; the kernel gives it back however the process ends.

    Raises:
        UserError: it cannot be written; Unavailable where another process holds it.
    """
    path = folder.with_name(folder.name + ".lock")
    with _locked(path, f"another worker is at {what} in {folder}; wait for it, or stop it"):
        yield
        path.unlink(missing_ok=True)


def _locked(path: Path, refusal: str) -> IO[str]:
    """An open lock file that this process holds, and that is still the one at the path."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = path.open("a")
        except FileNotFoundError:
            continue  # the folder was removed by a worker that had nothing left there
        except OSError as error:
            raise UserError(f"cannot write to {path.parent}: {error.strerror}; change work") from None
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            lock.close()
            raise Unavailable(refusal) from None  # a lost node's locks last a while longer than its job
        except OSError as error:
            print(f"warning: {path} cannot be locked ({error.strerror}): start one worker at a time", file=sys.stderr)
        if path.exists() and path.stat().st_ino == os.fstat(lock.fileno()).st_ino:
            return lock
        lock.close()  # whoever held it before has removed it
