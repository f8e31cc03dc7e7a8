"""Small files: read with errors that say what is wrong, replaced as a whole, locked. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from star_dist.errors import Unavailable, UserError

FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT})
# Of a network file system that has lost its server, or that a node has lost.
LOST_FILE_SYSTEM = {errno.EIO, errno.ENOTCONN, errno.ESHUTDOWN, errno.ESTALE, errno.ETIMEDOUT}


def cannot_write(place: str, error: OSError) -> UserError:
    """What to raise where a folder cannot be written; `Unavailable` where its file system may come back."""
    kind = Unavailable if error.errno in LOST_FILE_SYSTEM else UserError
    return kind(f"cannot write to {place}: {error.strerror}")


def sync_to_disk(path: Path) -> None:
    """Waits until a file's content, or a folder's names, would be there after a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json_object(path: Path, absent: str) -> dict[str, Any]:
    """The JSON object of a file that one of our commands wrote.

    Raises:
        UserError: `absent` where there is no such file; that it is damaged where it holds anything else.
    """
    try:
        return parse_json_object(path.read_bytes(), str(path))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(absent) from None
    except OSError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def parse_json_object(text: bytes, place: str) -> dict[str, Any]:
    """The JSON object in what was read from a place, which names it in errors.

    Raises:
        UserError: it is damaged.
    """
    try:
        values = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{place} is damaged: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{place} is damaged: it holds no JSON object")
    return values


def read_text(path: Path, name: str) -> str:
    """The text of a file that a command was given; `name` stands for it in errors.

    Raises:
        UserError: no such file, or no UTF-8.
    """
    try:
        return path.read_text("utf-8-sig")  # as editors on Windows save it, or without their mark
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {name}: byte {error.start} is no UTF-8; save it as UTF-8") from None


def read_text_lines(path: Path) -> list[str]:
    """The lines of such a file, stripped, without empty ones; raises as `read_text`."""
    return [line.strip() for line in read_text(path, str(path)).split("\n") if line.strip()]


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, oldest first; none where there is no file.

    A line that a kill cut short is left out.
    """
    lines = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def write_text_atomically(path: Path, text: str) -> None:
    """Replaces a file as a whole: whoever reads it, or kills this, finds the old text or the new one."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which then takes its place; gone when writing fails.

    For a path that several processes may write at once: each has a file of its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


_reported: set[str] = set()  # what this process has warned of


@contextlib.contextmanager
def training_goes_on(path: Path) -> Iterator[None]:
    """For what only reports on a training: an OSError inside becomes a warning, once per file, and ends nothing."""
    try:
        yield
    except OSError as error:
        if str(path) not in _reported:
            _reported.add(str(path))
            reason = error.strerror or str(error)
            print(f"warning: cannot write {path}: {reason}; going on without", file=sys.stderr, flush=True)


def append_json_line(path: Path, values: dict[str, Any]) -> None:
    """Adds one object to a JSONL file that reports on a training; see `training_goes_on`. A number that is not finite
    becomes null, as JSON has none."""
    unknown = {name: None for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)}
    with training_goes_on(path), path.open("a") as file:
        file.write(("" if _ends_with_a_line(path) else "\n") + json.dumps(values | unknown) + "\n")


def _ends_with_a_line(path: Path) -> bool:
    """False where a kill or a full disk has cut the last line short."""
    if not path.stat().st_size:
        return True
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def free_bytes(folder: Path) -> int:
    """Room on the disk where a folder is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def try_lock(path: Path) -> IO[str] | None:
    """Opens and locks a file, or returns None if another process holds it; kept until it is closed or this ends.

    Raises:
        OSError: it cannot be opened, or its file system knows no locks.
    """
    file = path.open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not kept by forked loader workers
    except (BlockingIOError, PermissionError):
        file.close()
        return None
    except OSError:
        file.close()
        raise
    return file
